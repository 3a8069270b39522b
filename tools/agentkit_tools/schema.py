"""Parse and check the arguments of a call, and check hand-written JSON schemas (2020-12).

One schema has two forms: the model sees a short one (no titles), the validator uses one that also refuses unknown
parameters. The JSON schema is the contract: a value that it accepts is accepted, and errors are explained in its terms.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError
from pydantic_core import from_json

from agentkit_tools.errors import ArgumentsError, ToolDefinitionError
from agentkit_tools.signature import Signature
from agentkit_tools.validation import CannotCheckError, Problem, SchemaProblemError, Validator, depth, path_text

MAX_PROBLEMS = 3  # the model can repair a call from the first few problems
MAX_GIVEN_CHARS = 60
MAX_CHOICES = 50  # enum values listed in a message
MAX_TRIES = 50_000  # nested branches of a recursive union that pydantic may try, about 0.1 s
MAX_TOLD_DEPTH = 4  # levels of arrays, references and unions in a message
JSON_TYPES = {dict: "object", list: "array", str: "string", bool: "boolean", int: "integer", float: "number"}


def check_schema(schema: Mapping[str, Any], *, name: str) -> Validator:
    """Return a validator for a hand-written parameter schema.

    References must point into the schema itself; nothing is fetched.

    Raises:
        ToolDefinitionError: it is not a JSON schema (2020-12) of an object; the message names the tool and the place.
    """
    try:
        validator = Validator(schema)
    except SchemaProblemError as error:
        raise ToolDefinitionError(f"tool {name!r}, parameters: {error}") from error
    if schema.get("type") != "object":
        raise ToolDefinitionError(
            f'tool {name!r}, parameters: $.type: given {json.dumps(schema.get("type"))}, expected "object"'
        )
    return validator


def parse_object(text: str, *, name: str) -> dict[str, Any]:
    """Parse the JSON object in `text`; blank text is an empty object.

    Raises:
        ArgumentsError: the text is not JSON (NaN and lone surrogates are refused), or not an object.
    """
    try:
        value = from_json(text if text.strip() else "{}", allow_inf_nan=False)
    except ValueError as error:
        raise ArgumentsError(name, [f"$: not valid JSON: {error}, expected an object"]) from error
    if not isinstance(value, dict):
        raise ArgumentsError(name, [f"$: given {_given(value)}, expected object"])
    return value


def problems(validator: Validator, value: Any) -> list[str]:
    """Return messages `$.path: given X, expected Y`, sorted by path; empty if `value` is valid.

    Raises:
        NeedsTimeError: called inside `briefly`, and the check takes longer.
    """
    try:
        found = validator.problems(value)
    except CannotCheckError as error:
        return [f"$: cannot be checked: {error}; expected a simpler value"]
    return list(dict.fromkeys(told for problem in found for told in _explain(problem, validator)))[:MAX_PROBLEMS]


def read_arguments(signature: Signature, text: str, *, name: str) -> dict[str, Any]:
    """Parse the arguments of a call and convert them to the function's types. Defaults are not filled in.

    Raises:
        ArgumentsError: the text is not JSON or does not match the schema.
    """
    model = signature.model
    text = text if text.strip() else "{}"
    branches = signature.validator.recursive_branches
    if branches > 1 and branches ** depth(parse_object(text, name=name)) > MAX_TRIES:
        raise ArgumentsError(name, ["$: cannot be checked: nested too deeply; expected a simpler value"])
    try:
        read = model.model_validate_json(text, strict=True)
    except ValidationError:
        value = parse_object(text, name=name)
        if found := problems(signature.validator, value):
            raise ArgumentsError(name, found) from None
        try:  # the schema accepts the value (1.0 is an integer there), so pydantic must not be stricter
            read = model.model_validate_json(text)
        except ValidationError as error:
            details = error.errors()[:MAX_PROBLEMS]
            told = [f"{path_text(item['loc'])}: given {_given(item['input'])}: {item['msg']}" for item in details]
            raise ArgumentsError(name, told) from None
    given = ((f"p{index}", parameter) for index, parameter in enumerate(signature.names))
    return {parameter: getattr(read, field) for field, parameter in given if field in read.model_fields_set}


def _explain(problem: Problem, validator: Validator) -> list[str]:
    """Write one problem as messages: several if parameters are missing or unknown."""
    path, keyword, value, schema = path_text(problem.path), problem.keyword, problem.value, problem.schema
    asked = schema.get(keyword)
    known: Mapping[str, Any] = schema.get("properties", {})
    match keyword:
        case "required":
            missing = [key for key in schema["required"] if key not in value]
            return [f"{path}.{key}: missing, expected {_expected(known.get(key, {}), validator)}" for key in missing]
        case "additionalProperties" | "unevaluatedProperties":
            expected = ", ".join(known) or "no parameters"
            return [f"{path}.{key}: unknown parameter, expected {expected}" for key in value]
        case "dependentRequired":
            return [
                f"{path}.{other}: missing, required together with {key}"
                for key, others in schema[keyword].items()
                if key in value
                for other in others
                if other not in value
            ]
        case "oneOf" if problem.fits:
            expected = _expected(schema, validator)
            return [f"{path}: given {_given(value)}, matches {problem.fits} of {expected}, expected exactly one"]
        case "type" | "enum" | "const" | "anyOf" | "oneOf":
            return [f"{path}: given {_given(value)}, expected {_expected(schema, validator)}"]
        case "" | "$ref":
            return [f"{path}: given {_given(value)}, expected {'no value' if not keyword else 'another value'}"]
    return [f"{path}: given {_given(value)}, expected {keyword} {json.dumps(asked):.200}"]


def _given(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    if len(text) > MAX_GIVEN_CHARS:
        text = text[: MAX_GIVEN_CHARS - 3] + "..."
    return text if value is None else f"{text} ({JSON_TYPES.get(type(value), 'value')})"


def _expected(schema: Any, validator: Validator, depth: int = 0) -> str:
    """Describe a schema briefly: `string`, `one of "a", "b"`, `array of integer`, `string or null`."""
    if not isinstance(schema, Mapping) or depth > MAX_TOLD_DEPTH:
        return "another value"
    if id(schema) in validator.targets:
        return _expected(validator.targets[id(schema)], validator, depth + 1)
    if "enum" in schema:
        choices = [json.dumps(item, ensure_ascii=False) for item in schema["enum"]]
        more = f" and {len(choices) - MAX_CHOICES} more" if len(choices) > MAX_CHOICES else ""
        return "one of " + ", ".join(choices[:MAX_CHOICES]) + more
    if "const" in schema:
        return json.dumps(schema["const"], ensure_ascii=False)
    for union in ("anyOf", "oneOf"):
        if union in schema:
            return " or ".join(dict.fromkeys(_expected(branch, validator, depth + 1) for branch in schema[union]))
    kind = schema.get("type", "another value")
    if kind == "array" and "items" in schema:
        return f"array of {_expected(schema['items'], validator, depth + 1)}"
    if kind == "object" and "properties" in schema:
        return f"object with {', '.join(schema['properties'])}"
    return kind if isinstance(kind, str) else " or ".join(kind)
