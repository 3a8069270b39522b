"""From a call's JSON text to checked arguments; and the check of JSON schemas (2020-12) written by hand.

Two readers share one schema: the model sees the short form (no titles), the validator refuses unknown parameters too.
The JSON schema is the contract: a value it accepts is accepted, and each refusal is explained in its words.
"""

from __future__ import annotations

import json
import re
import typing
from collections.abc import Iterator, Mapping
from typing import Any

import jsonschema
import referencing
import referencing.exceptions
import referencing.jsonschema
from pydantic import ValidationError
from pydantic_core import from_json

from agentkit_tools.errors import ArgumentsError, ToolDefinitionError
from agentkit_tools.signature import Signature

MAX_PROBLEMS = 3  # a model repairs a call from the first few problems; the rest is noise
MAX_GIVEN_CHARS = 60
JSON_TYPES = {dict: "object", list: "array", str: "string", bool: "boolean", int: "integer", float: "number"}


def check_schema(schema: Mapping[str, Any], *, name: str) -> None:
    """Refuse a hand-written parameter schema that is not a JSON schema (2020-12) of an object.

    References must point into the schema itself: validation never fetches anything.

    Raises:
        ToolDefinitionError: naming the tool and the place in the schema.
    """
    problem = schema_problem(schema)
    if problem is None and schema.get("type") != "object":
        problem = f'$.type: given {json.dumps(schema.get("type"))}, expected "object"'
    if problem is not None:
        raise ToolDefinitionError(f"tool {name!r}, parameters: {problem}")


def schema_problem(schema: Mapping[str, Any]) -> str | None:
    """Why `schema` is not a JSON schema (2020-12) that refers to itself only; None when it is one."""
    try:
        json.dumps(schema)
        jsonschema.Draft202012Validator.check_schema(schema)
    except (TypeError, ValueError) as error:  # as with an unquoted date in YAML
        return f"not JSON: {error}; quote it if it is text"
    except jsonschema.SchemaError as error:
        return f"{_path(error.absolute_path)}: {error.message}"
    resolver = _resolver(schema)
    for reference in _references(schema):
        try:
            resolver.lookup(reference)
        except referencing.exceptions.Unresolvable:
            return f"given $ref {reference!r}, expected a place in this schema, as #/$defs/x"
    return None


def _resolver(schema: Mapping[str, Any]) -> Any:
    registry: referencing.Registry[Any] = referencing.Registry()
    return registry.resolver_with_root(referencing.jsonschema.DRAFT202012.create_resource(schema))


def _references(schema: Any) -> Iterator[str]:
    if isinstance(schema, Mapping):
        if isinstance(reference := schema.get("$ref"), str):
            yield reference
        for key, value in schema.items():
            if key not in ("default", "const", "enum", "examples"):
                yield from _references(value)
    elif isinstance(schema, list):
        for item in schema:
            yield from _references(item)


def parse_object(text: str, *, name: str) -> dict[str, Any]:
    """The JSON object in `text`; blank text is the empty object.

    Raises:
        ArgumentsError: not JSON (NaN and lone surrogates are not), or not an object.
    """
    try:
        value = from_json(text if text.strip() else "{}", allow_inf_nan=False)
    except ValueError as error:
        raise ArgumentsError(name, [f"$: not valid JSON: {error}, expected an object"]) from error
    if not isinstance(value, dict):
        raise ArgumentsError(name, [f"$: given {_given(value)}, expected object"])
    return value


def problems(schema: Mapping[str, Any], value: Any) -> list[str]:
    """Why `value` does not fit `schema`: `$.path: given X, expected Y`, sorted by path; empty when it fits."""
    validator = jsonschema.Draft202012Validator(schema, registry=referencing.Registry())
    errors = sorted(validator.iter_errors(value), key=lambda error: [str(part) for part in error.absolute_path])
    found = dict.fromkeys(problem for error in errors for problem in _explain(error, schema))
    return list(found)[:MAX_PROBLEMS]


def read_arguments(signature: Signature, text: str, *, name: str) -> dict[str, Any]:
    """The arguments that a call gives to the function behind `signature`, converted to its types; no defaults.

    Raises:
        ArgumentsError: the text is not JSON or does not fit the schema.
    """
    model = signature.model
    text = text if text.strip() else "{}"
    try:
        read = model.model_validate_json(text, strict=True)
    except ValidationError:
        value = parse_object(text, name=name)
        if found := problems(model.model_json_schema(), value):
            raise ArgumentsError(name, found) from None
        try:  # the schema is the contract and accepts the value (1.0 is an integer there): so must we
            read = model.model_validate_json(text)
        except ValidationError as error:
            details = error.errors()[:MAX_PROBLEMS]
            told = [f"{_path(item['loc'])}: given {_given(item['input'])}: {item['msg']}" for item in details]
            raise ArgumentsError(name, told) from None
    given = ((f"p{index}", parameter) for index, parameter in enumerate(signature.names))
    return {parameter: getattr(read, field) for field, parameter in given if field in read.model_fields_set}


def _explain(error: jsonschema.ValidationError, root: Mapping[str, Any]) -> list[str]:
    """One jsonschema error as sentences: several parameters may be missing or unknown at once."""
    path = _path(error.absolute_path)
    value, asked = typing.cast(Any, error.instance), typing.cast(Any, error.validator_value)
    schema = error.schema if isinstance(error.schema, Mapping) else {}  # the schema `false` has no keywords
    known: Mapping[str, Any] = schema.get("properties", {})
    if error.validator == "required":
        missing = [key for key in asked if key not in value]
        return [f"{path}.{key}: missing, expected {_expected(known.get(key, {}), root)}" for key in missing]
    if error.validator == "additionalProperties" and asked is False:
        expected = ", ".join(known) or "no parameters"
        patterns = schema.get("patternProperties", {})
        unknown = [key for key in value if key not in known and not any(re.search(p, key) for p in patterns)]
        return [f"{path}.{key}: unknown parameter, expected {expected}" for key in unknown]
    if error.validator in ("type", "enum", "const", "anyOf", "oneOf"):
        return [f"{path}: given {_given(value)}, expected {_expected(schema, root)}"]
    return [f"{path}: given {_given(value)}, expected {error.validator} {json.dumps(asked)}"]


def _path(parts: Any) -> str:
    return "$" + "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in parts)


def _given(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    if len(text) > MAX_GIVEN_CHARS:
        text = text[: MAX_GIVEN_CHARS - 3] + "..."
    return text if value is None else f"{text} ({JSON_TYPES.get(type(value), 'value')})"


def _expected(schema: Any, root: Mapping[str, Any]) -> str:
    """A schema in a few words: `string`, `one of "a", "b"`, `array of integer`, `string or null`."""
    if not isinstance(schema, Mapping):
        return "another value"
    if reference := schema.get("$ref"):
        return _expected(_resolver(root).lookup(reference).contents, root)
    if "enum" in schema:
        return "one of " + ", ".join(json.dumps(item, ensure_ascii=False) for item in schema["enum"])
    if "const" in schema:
        return json.dumps(schema["const"], ensure_ascii=False)
    for union in ("anyOf", "oneOf"):
        if union in schema:
            return " or ".join(_expected(branch, root) for branch in schema[union])
    kind = schema.get("type", "another value")
    if kind == "array" and "items" in schema:
        return f"array of {_expected(schema['items'], root)}"
    if kind == "object" and "properties" in schema:
        return f"object with {', '.join(schema['properties'])}"
    return kind if isinstance(kind, str) else " or ".join(kind)
