"""Strict validation against the types of an SDK: unknown fields are errors, on every level."""

from __future__ import annotations

from typing import Any

from pydantic import ConfigDict, TypeAdapter


class Strictly:
    """Validates values of one of the SDK's types."""

    def __init__(self, kind: Any) -> None:
        # a list, because the configuration of an adapter does not apply to a TypedDict at its root
        self._adapter: TypeAdapter[list[Any]] = TypeAdapter(
            list[kind], config=ConfigDict(extra="forbid", arbitrary_types_allowed=True)
        )

    def check(self, value: object) -> None:
        """Raise ValidationError if the value is not one of the type."""
        _exhaust(self._adapter.validate_python([value]))


def _exhaust(value: Any) -> None:
    """Read the value to its end: an Iterable is validated while it is read."""
    match value:
        case dict():
            for item in value.values():
                _exhaust(item)
        case str() | bytes() | int() | float() | None:
            pass
        case _:
            for item in value:
                _exhaust(item)
