"""JSON types and values that a JSON Schema can accept.

The answers are upper bounds, found without validation: `type`, `enum`, `const`, references and their combinations are
evaluated, and every other keyword is assumed to accept, as is a malformed one. `chat.v4_arguments` uses them to
interpret a parameter's text, and `schema_forms` to choose its forms in a grammar.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any
from urllib.parse import unquote

Schema = Any
"""A JSON schema: an object or a bool."""

TYPES = ("string", "null", "boolean", "integer", "number", "array", "object")
MAX_LOOKS = 1000
"""Number of subschemas that are evaluated before the rest is assumed to accept."""
MAX_DEPTH = 100
"""Number of subschemas inside each other, also through references, below which the rest is assumed to accept."""

_INDEX = re.compile(r"[0-9]{1,9}")

_Leaf = Callable[[Sequence[str] | None, Sequence[Any] | None], bool]
"""Returns whether the names in a `type`, or the values of an `enum`, can satisfy the query."""


def accepted_types(schema: Schema, root: Schema) -> frozenset[str]:
    """Return the JSON types that a value of `schema` can have. A number such as 1.0 is also an integer.

    `$ref` is resolved inside `root`.
    """

    def can(name: str) -> bool:
        def leaf(names: Sequence[str] | None, values: Sequence[Any] | None) -> bool:
            if names is not None:
                return name in names or (name == "integer" and "number" in names)
            return any(name in json_types(value) for value in values or ())

        return _passes(schema, root, leaf)

    return frozenset(filter(can, TYPES))


def could_accept(schema: Schema, root: Schema, value: Any) -> bool:
    """Return whether `schema` may accept `value`, judged by types and listed values only."""
    types = json_types(value)

    def leaf(names: Sequence[str] | None, values: Sequence[Any] | None) -> bool:
        if names is not None:
            return any(name in names for name in types)
        return any(equal(value, each) for each in values or ())

    return _passes(schema, root, leaf)


def resolve(reference: Any, root: Schema) -> Schema | None:
    """Return the target of a `$ref` inside `root`, or None if it does not exist there."""
    if not isinstance(reference, str) or not isinstance(root, Mapping):
        return None
    base, _, fragment = reference.partition("#")
    if base and base != root.get("$id"):
        return None
    if fragment and not fragment.startswith("/"):
        return _anchored(fragment, root)
    found: Any = root
    for part in unquote(fragment).split("/")[1:]:
        key = part.replace("~1", "/").replace("~0", "~")
        if isinstance(found, Mapping) and key in found:
            found = found[key]
        elif isinstance(found, list) and _INDEX.fullmatch(key) and int(key) < len(found):
            found = found[int(key)]
        else:
            return None
    return found if isinstance(found, Mapping | bool) else None


def branches(schema: Mapping[str, Schema], keyword: str) -> list[Schema]:
    """Return the subschemas in `allOf`, `anyOf` or `oneOf`; none if the keyword is malformed."""
    found = schema.get(keyword)
    return found if isinstance(found, list) else []


def json_types(value: Any) -> frozenset[str]:
    """Return the JSON Schema types of a JSON value."""
    match value:
        case None:
            return frozenset(("null",))
        case bool():
            return frozenset(("boolean",))
        case int():
            return frozenset(("integer", "number"))
        case float():
            return frozenset(("integer", "number") if value.is_integer() else ("number",))
        case str():
            return frozenset(("string",))
    return frozenset(("array",) if isinstance(value, list) else ("object",))


def equal(one: Any, other: Any) -> bool:
    """Return whether two JSON values are equal: 1 and 1.0 are, 1 and true are not."""
    if json_types(one) != json_types(other):
        return False
    if isinstance(one, list):
        return len(one) == len(other) and all(map(equal, one, other))
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(item, other[key]) for key, item in one.items())
    return bool(one == other)


def read_json(text: str) -> tuple[bool, Any]:
    """Return whether `text` is JSON (without NaN and Infinity), and its value."""

    def refuse(constant: str) -> None:
        raise ValueError(constant)

    try:
        return True, json.loads(text, parse_constant=refuse)
    except (ValueError, RecursionError):
        return False, None


def _passes(schema: Schema, root: Schema, leaf: _Leaf) -> bool:
    looks = 0

    def passes(schema: Schema, inside: tuple[int, ...]) -> bool:
        nonlocal looks
        looks += 1
        if looks > MAX_LOOKS or len(inside) > MAX_DEPTH:
            return True
        if not isinstance(schema, Mapping):
            return schema is not False
        if id(schema) in inside:  # a cyclic reference adds nothing
            return False
        inside = (*inside, id(schema))
        for key in ("$ref", "$dynamicRef"):
            if key in schema:
                target = resolve(schema[key], root)
                if target is not None and not passes(target, inside):
                    return False
        names, values = schema.get("type"), schema.get("enum")
        if isinstance(names, str | list) and not leaf([names] if isinstance(names, str) else names, None):
            return False
        if isinstance(values, list) and not leaf(None, values):
            return False
        if "const" in schema and not leaf(None, [schema["const"]]):
            return False
        if not all(passes(part, inside) for part in branches(schema, "allOf")):
            return False
        for key in ("anyOf", "oneOf"):
            if isinstance(schema.get(key), list) and not any(passes(part, inside) for part in branches(schema, key)):
                return False
        return not (isinstance(schema.get("not"), Mapping) and set(schema["not"]) == {"type"}) or not passes(
            schema["not"], inside
        )

    return passes(schema, ())


def _anchored(name: str, root: Schema) -> Schema | None:
    waiting, looks = [root], 0
    while waiting and (looks := looks + 1) < MAX_LOOKS:
        schema = waiting.pop()
        if isinstance(schema, Mapping):
            if name in (schema.get("$anchor"), schema.get("$dynamicAnchor")):
                return schema
            waiting += schema.values()
        elif isinstance(schema, list):
            waiting += schema
    return None
