"""Convert a call's arguments to JSON text: interpret parameters by attribute and schema, and unwrap wrapped ones."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from agentkit_engine.chat.format import json_object, json_text
from agentkit_engine.schema_types import MAX_DEPTH, MAX_LOOKS, branches, could_accept, read_json, resolve

_WRAPPING_KEYS = ("arguments", "input", "parameters")
"""Names of a parameter that wraps all arguments, if the tool does not declare that parameter."""


def parameters_json(parameters: Mapping[str, tuple[str, str | None]], schema: Any) -> str:
    """Return a call's arguments as JSON text, unwrapped if one parameter holds them all."""
    values = {
        key: _value_json(value, string, _parameter(schema, key), schema) for key, (value, string) in parameters.items()
    }
    if schema is not None and len(values) == 1:
        [(key, value)] = values.items()
        if key not in _properties(schema) and not schema.get("additionalProperties"):
            unwrapped = _unwrapped(key, read_json(value)[1], schema)
            if unwrapped is not None:
                return json_text(unwrapped)
    return json_object(values)


def _unwrapped(key: str, value: Any, schema: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the arguments inside the one parameter `key` if they fit: an object, its JSON text, or a single value."""
    inner = read_json(value)[1] if isinstance(value, str) else value
    if isinstance(inner, dict) and _fits(inner, schema):
        return inner
    needed = _required(schema) or list(_properties(schema))
    if key in _WRAPPING_KEYS and len(needed) == 1 and _fits({needed[0]: value}, schema):
        return {needed[0]: value}
    return None


def body_json(text: str, schema: Any) -> str | None:
    """Return the arguments written as the body of an invoke as JSON text; None if they do not fit the schema."""
    body = read_json(text)[1]
    if schema is None or not isinstance(body, dict):
        return None
    if _fits(body, schema):
        return text
    for key in _WRAPPING_KEYS:
        inner = body.get(key)
        inner = read_json(inner)[1] if isinstance(inner, str) else inner
        if isinstance(inner, dict) and body.keys() <= {key, "name"} and _fits(inner, schema):
            return json_text(inner)
    return None


def _fits(arguments: Mapping[str, Any], schema: Mapping[str, Any]) -> bool:
    """Return whether the arguments have the schema's parameters, with values of its types."""
    if not arguments.keys() >= set(_required(schema)):
        return False
    if not (arguments.keys() <= _properties(schema).keys() or schema.get("additionalProperties")):
        return False
    return all(could_accept(_parameter(schema, key), schema, value) for key, value in arguments.items())


def _properties(schema: Mapping[str, Any]) -> Mapping[str, Any]:
    found = schema.get("properties")
    return found if isinstance(found, Mapping) else {}


def _required(schema: Mapping[str, Any]) -> list[str]:
    found = schema.get("required")
    return [name for name in found if isinstance(name, str)] if isinstance(found, list) else []


def _value_json(value: str, string: str | None, schema: Any, root: Any) -> str:
    """Return a parameter as JSON text, decided by its raw value, its `string` attribute and, if unclear, its schema.

    The attribute decides unless the schema rejects its interpretation and accepts the other one.
    """
    is_json, read = read_json(value)
    if not is_json:
        return json_text(value)
    as_text, as_json = could_accept(schema, root, value), could_accept(schema, root, read)
    if string == "false":
        text = as_text and not as_json and read is not None  # null means no value, not the text "null"
        return json_text(value) if text else value
    return json_text(value) if as_text or not as_json else value


def _parameter(schema: Any, key: str) -> Any:
    """Return the schema of one parameter from `properties`, including those behind references and in branches."""
    found: list[Any] = []
    looks = 0

    def look(part: Any, inside: tuple[int, ...]) -> None:
        nonlocal looks
        looks += 1
        if not isinstance(part, Mapping) or id(part) in inside or looks > MAX_LOOKS or len(inside) > MAX_DEPTH:
            return
        inside = (*inside, id(part))
        properties = part.get("properties")
        if isinstance(properties, Mapping) and key in properties:
            found.append(properties[key])
        look(resolve(part.get("$ref"), schema), inside)
        for keyword in ("allOf", "anyOf", "oneOf"):
            for branch in branches(part, keyword):
                look(branch, inside)
        if not found and isinstance(part.get("additionalProperties"), Mapping):
            found.append(part["additionalProperties"])

    look(schema, ())
    return {"anyOf": found} if found else True
