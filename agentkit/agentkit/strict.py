"""The base of models that are read from a file, and types of their fields."""

from __future__ import annotations

from pathlib import PurePosixPath
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from agentkit_engine.untrusted import shorten

MAX_TIMEOUT_S = 1e7


def _inside(path: str) -> str:
    pure = PurePosixPath(path)
    if pure.is_absolute() or ".." in pure.parts or not pure.parts or "\0" in path:
        raise ValueError(f"{shorten(path)} must be a relative path without '..'")
    return path


def _without_nul(text: str) -> str:
    if "\0" in text:
        raise ValueError("must not contain a NUL character")
    return text


def _variable(name: str) -> str:
    if not name or "=" in name or "\0" in name:
        raise ValueError(f"{shorten(name)} is not a variable name; write `NAME: value`")
    return name


Shell = Annotated[str, AfterValidator(_without_nul)]
RelativePath = Annotated[str, AfterValidator(_inside)]
Identifier = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=120)]


Timeout = Annotated[float, Field(gt=0, le=MAX_TIMEOUT_S)]
"""Seconds."""
Variables = dict[Annotated[str, AfterValidator(_variable)], Shell]
"""Environment variables."""


class Strict(BaseModel):
    """Base of all models read from a file: no unknown keys, no coercion, immutable."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)
