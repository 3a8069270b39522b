"""From a typed Python function to a JSON schema (2020-12), and from a call's JSON text to checked arguments.

Two readers share one schema: the model sees the short form (no titles), the validator refuses unknown parameters too.
The JSON schema is the contract: a value it accepts is accepted, and each refusal is explained in its words.
"""

from __future__ import annotations

import inspect
import json
import re
import types
import typing
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import jsonschema
import referencing
import referencing.exceptions
import referencing.jsonschema
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, create_model
from pydantic.errors import PydanticUserError
from pydantic.fields import FieldInfo
from pydantic_core import from_json

from agentkit_tools.errors import ArgumentsError, ToolDefinitionError

MAX_PROBLEMS = 3  # a model repairs a call from the first few problems; the rest is noise
MAX_GIVEN_CHARS = 60
JSON_TYPES = {dict: "object", list: "array", str: "string", bool: "boolean", int: "integer", float: "number"}
SECTION = re.compile(r"^(Args|Arguments|Parameters|Returns|Yields|Raises|Examples?|Notes?):\s*$")
ENTRY = re.compile(r"\s+\*{0,2}(\w+)\s*(?:\([^)]*\))?:\s*(.*)")  # `name: text` or `name (type): text`


@dataclass(frozen=True, slots=True)
class Signature:
    """What a tool needs to know about its function."""

    description: str  # the docstring's prose, without its sections
    parameters: dict[str, Any]  # JSON schema, as the model sees it
    model: type[BaseModel]  # reads arguments; field i is named `p{i}`, its alias is the parameter's name
    names: tuple[str, ...]  # parameter names, in the order of the model's fields
    injected: str | None  # the parameter that gets the call's context


def read_signature(
    fn: Callable[..., Any], *, name: str, injected_type: type, namespace: Mapping[str, Any] | None = None
) -> Signature:
    """Read the parameters of `fn` from its signature, annotations and docstring.

    Every parameter needs an annotation that JSON can carry. A parameter annotated `injected_type` stays out of the
    schema. Descriptions come from `Annotated[T, "text"]`, `Annotated[T, Field(description=...)]` or the docstring's
    `Args:` section. `namespace` resolves annotations of types that are local to the caller.

    Raises:
        ToolDefinitionError: naming the tool, the parameter and what to write instead.
    """
    description, documented = parse_docstring(inspect.getdoc(fn) or "")
    fields: dict[str, Any] = {}
    names: list[str] = []
    injected: str | None = None
    for parameter in inspect.signature(fn).parameters.values():
        where = f"tool {name!r}, parameter {parameter.name!r}"
        annotation = _annotation(fn, parameter, where, namespace or {})
        if annotation is injected_type:
            injected = parameter.name
            continue
        field = _field(parameter, annotation, documented.get(parameter.name), where)
        fields[f"p{len(names)}"] = (annotation, field)
        names.append(parameter.name)
    model: type[BaseModel] = create_model(
        "Arguments", __config__=ConfigDict(extra="forbid", allow_inf_nan=False), **fields
    )
    parameters = {"type": "object", "properties": {}} | strip_noise(model.model_json_schema())
    del parameters["additionalProperties"]  # told to the validator, taken for granted by models
    return Signature(description, parameters, model, tuple(names), injected)


def _annotation(fn: Callable[..., Any], parameter: inspect.Parameter, where: str, namespace: Mapping[str, Any]) -> Any:
    """The resolved annotation of one parameter, or the reason it cannot be one of a tool."""
    if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
        raise ToolDefinitionError(f"{where}: given {parameter}, expected a named parameter; write each one out")
    if parameter.kind is parameter.POSITIONAL_ONLY:
        raise ToolDefinitionError(f"{where}: is positional-only, but arguments come by name; remove the '/'")
    if parameter.annotation is parameter.empty:
        raise ToolDefinitionError(f"{where}: has no type annotation; write for example `{parameter.name}: str`")
    holder = types.SimpleNamespace(__annotations__={parameter.name: parameter.annotation})
    scope = getattr(inspect.unwrap(fn), "__globals__", {})
    try:
        return typing.get_type_hints(holder, globalns=scope, localns=dict(namespace), include_extras=True)[
            parameter.name
        ]
    except (NameError, SyntaxError, TypeError, AttributeError) as error:
        raise ToolDefinitionError(
            f"{where}: annotation {parameter.annotation!r} cannot be resolved ({error}); "
            "define its type at module level and import it outside TYPE_CHECKING"
        ) from error


def _field(parameter: inspect.Parameter, annotation: Any, documented: str | None, where: str) -> FieldInfo:
    """The pydantic field of one parameter; its type and default are tried out here, so that errors have its name."""
    try:
        adapter: TypeAdapter[Any] = TypeAdapter(annotation)
        adapter.json_schema()
    except (PydanticUserError, TypeError) as error:
        raise ToolDefinitionError(
            f"{where}: type {annotation!r} has no JSON schema; use str, int, float, bool, list, dict, Literal, "
            "an Enum, a dataclass or a pydantic model"
        ) from error
    metadata = getattr(annotation, "__metadata__", ())
    told = next((item for item in metadata if isinstance(item, str)), None)
    described = any(isinstance(item, FieldInfo) and item.description for item in metadata)
    description = None if described else told or documented
    options: dict[str, Any] = {"alias": parameter.name} | ({"description": description} if description else {})
    if parameter.default is parameter.empty:
        return typing.cast(FieldInfo, Field(**options))
    try:
        adapter.validate_python(parameter.default, strict=True)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            adapter.dump_json(parameter.default)
    except (ValidationError, ValueError, UserWarning) as error:
        raise ToolDefinitionError(
            f"{where}: default {parameter.default!r} does not fit its type {annotation!r}; change one of them"
        ) from error
    return typing.cast(FieldInfo, Field(default=parameter.default, **options))


def parse_docstring(text: str) -> tuple[str, dict[str, str]]:
    """Split a docstring into its prose and the descriptions in its `Args:` section (Google style)."""
    prose: list[str] = []
    arguments: dict[str, str] = {}
    section = current = ""
    indent = 0
    for line in text.splitlines():
        if heading := SECTION.match(line):
            section, current, indent = heading[1], "", 0
        elif not section or (line and not line[0].isspace()):
            section = ""
            prose.append(line.rstrip())
        elif section in ("Args", "Arguments", "Parameters") and line.strip():
            depth = len(line) - len(line.lstrip())
            indent = indent or depth
            if depth == indent and (entry := ENTRY.match(line)):
                current = entry[1]
                arguments[current] = entry[2].strip()
            elif current:
                arguments[current] = f"{arguments[current]} {line.strip()}".strip()
    return "\n".join(prose).strip(), arguments


def strip_noise(schema: Any) -> Any:
    """The same schema without what pydantic adds and no model needs: titles and OpenAPI discriminators."""
    if isinstance(schema, list):
        return [strip_noise(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    short: dict[str, Any] = {}
    for key, value in schema.items():
        if key in ("title", "discriminator"):
            continue
        if key in ("properties", "patternProperties", "$defs"):
            short[key] = {name: strip_noise(item) for name, item in value.items()}
        else:
            short[key] = value if key in ("default", "const", "enum", "examples") else strip_noise(value)
    return short


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
    """The keyword arguments for a call of the function behind `signature`, converted to its types.

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
    return {parameter: getattr(read, f"p{index}") for index, parameter in enumerate(signature.names)}


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
