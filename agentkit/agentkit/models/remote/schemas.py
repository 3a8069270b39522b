"""JSON schemas in the form that each API accepts, and how the model's JSON is mapped back to the original schema.

The APIs take a subset of JSON Schema. A schema is sent as strict, which constrains the model to it, if the strict
subset can describe every value that it allows; otherwise it is sent with the least change that the API needs. Keywords
that only forbid values are left out if the subset lacks them, because arguments and answers are always validated.

Sources: "Structured Outputs" in OpenAI's API guides, "Structured outputs" and "Tool use" in Anthropic's.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Final

from jsonschema import Draft202012Validator, SchemaError

Schema = Mapping[str, Any]

SUBSCHEMA: Final = (
    "additionalItems",
    "additionalProperties",
    "contains",
    "else",
    "if",
    "items",
    "not",
    "propertyNames",
    "then",
    "unevaluatedItems",
    "unevaluatedProperties",
)
SUBSCHEMA_LIST: Final = ("allOf", "anyOf", "oneOf", "prefixItems")
SUBSCHEMA_MAP: Final = ("$defs", "dependentSchemas", "patternProperties", "properties")

KEPT: Final[dict[str, tuple[str, ...]]] = {
    "string": ("pattern", "format"),
    "number": ("multipleOf", "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"),
    "integer": ("multipleOf", "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"),
    "array": ("minItems", "maxItems"),
    "boolean": (),
    "null": (),
}
"""Keywords that the strict subset supports for each type, apart from an object's properties."""
FORMATS: Final = ("date-time", "time", "date", "duration", "email", "hostname", "ipv4", "ipv6", "uuid")
SHAPING: Final = frozenset(
    (
        *("type", "enum", "const", "properties", "required", "additionalProperties", "items"),
        *(keyword for keywords in KEPT.values() for keyword in keywords),
    )
)
"""Keywords that the strict subset supports, apart from the combiners."""
BEYOND: Final = {"$dynamicRef", "$recursiveRef", "patternProperties", "prefixItems"}
"""Keywords that allow values and that the strict subset does not support."""
COMBINERS: Final = ("$ref", "allOf", "anyOf", "oneOf")
ROOT_ALTERNATIVES: Final = {"$ref", "allOf", "anyOf", "oneOf", "not", "enum", "const", "if", "then", "else"}

MAX_PROPERTIES: Final = 5_000
MAX_DEPTH: Final = 10
MAX_ENUM_VALUES: Final = 1_000
MAX_CHARACTERS: Final = 120_000
MAX_OPTIONAL: Final = 24
MAX_UNIONS: Final = 16
"""OpenAI's limits on strict schemas, and Anthropic's limits on optional properties and unions."""

PROPERTY_NAME: Final = re.compile(r"[A-Za-z0-9_.-]{1,64}")
"""Property names that Anthropic accepts at the root of a tool's parameters."""
WRAPPER: Final = "value"
"""The property that holds an answer that is not an object."""


@dataclass(frozen=True, slots=True)
class SentSchema:
    """A schema as it is sent. `mapping` is None if the model's JSON needs no mapping back."""

    schema: dict[str, Any]
    strict: bool
    mapping: Callable[[str], str] | None = None

    def restored(self, text: str) -> str:
        """Return the JSON text that the model wrote, mapped back to the schema that was given.

        Text that is not a JSON object is returned unchanged.
        """
        return text if self.mapping is None else self.mapping(text)


class _NotStrictError(Exception):
    """The strict subset cannot describe the schema."""


def openai_tool(parameters: Schema, *, strict: bool = True) -> SentSchema:
    """Return the parameters of a tool for OpenAI. With `strict`, they are strict if they fit the strict subset.

    In a strict schema, an optional parameter is null if it is absent.
    """
    return _openai_tool(json.dumps(parameters), strict)


@lru_cache(maxsize=1024)
def _openai_tool(parameters: str, strict: bool) -> SentSchema:
    given = _modern(json.loads(parameters))
    try:
        if not strict:
            raise _NotStrictError
        sent = _strict_root(given, nullable=True)
    except _NotStrictError:
        return SentSchema(object_root(given), False)
    if all(set(node.get("properties", ())) <= set(node.get("required", ())) for node in _nodes(given)):
        return SentSchema(sent, True)
    return SentSchema(sent, True, _mapping(lambda value: _without_nulls(value, given, given)))


def openai_output(schema: Schema, *, strict: bool = True) -> SentSchema:
    """Return the schema of an answer for OpenAI. A schema of anything but objects is wrapped in an object."""
    given = _modern(schema)
    if _is_object(given):
        return openai_tool(given, strict=strict)
    wrapped = openai_tool(_wrapped(given), strict=strict)
    return SentSchema(wrapped.schema, wrapped.strict, lambda text: _unwrapped(wrapped.restored(text)))


def anthropic_tool(parameters: Schema) -> SentSchema:
    """Return the parameters of a tool for Anthropic: an object at the root, with property names that it accepts."""
    return _anthropic_tool(json.dumps(parameters))


@lru_cache(maxsize=1024)
def _anthropic_tool(parameters: str) -> SentSchema:
    root = object_root(_modern(json.loads(parameters)))
    sent_names: dict[str, str] = {}
    for name in root["properties"]:
        accepted = re.sub(r"[^A-Za-z0-9_.-]", "_", name)[:64] or "_"
        while accepted in sent_names.values() or (accepted != name and accepted in root["properties"]):
            accepted = f"{accepted[:56]}_{len(sent_names)}"
        sent_names[name] = accepted
    if all(name == sent for name, sent in sent_names.items()):
        return SentSchema(root, False)
    root["properties"] = {sent_names[name]: property for name, property in root["properties"].items()}
    root["required"] = [sent_names.get(name, name) for name in root.get("required", ())]
    names = {sent: name for name, sent in sent_names.items()}
    return SentSchema(root, False, _mapping(lambda value: {names.get(key, key): item for key, item in value.items()}))


def anthropic_output(schema: Schema) -> SentSchema | None:
    """Return the schema of an answer for Anthropic; None if its structured outputs cannot describe it."""
    from anthropic import transform_schema

    given = _modern(schema)
    is_object = _is_object(given)
    try:
        sent = _strict_root(given if is_object else _wrapped(given), nullable=False)
    except _NotStrictError:
        return None
    nodes = list(_nodes(sent))
    optional = sum(len(set(node.get("properties", ())) - set(node.get("required", ()))) for node in nodes)
    unions = sum("anyOf" in node for node in nodes)
    if optional > MAX_OPTIONAL or unions > MAX_UNIONS or _is_recursive(sent):
        return None
    return SentSchema(transform_schema(sent), True, None if is_object else _unwrapped)


def object_root(schema: Schema) -> dict[str, Any]:
    """Return the schema with type "object" and no alternatives at its root, as every API requires.

    Alternatives at the root become one object with the properties of all of them; a property is required if
    every alternative requires it. The result allows everything that the schema allows.
    """
    root = _merged(schema, schema, depth=0)
    return {**root, "$defs": dict(schema["$defs"])} if "$defs" in schema else root


def _merged(schema: object, root: Schema, *, depth: int) -> dict[str, Any]:
    """Return the schema, with everything that it refers to or combines, as one object schema without definitions."""
    if not isinstance(schema, Mapping) or depth > MAX_DEPTH:
        return {"type": "object", "properties": {}}
    merged = {key: value for key, value in schema.items() if key not in ROOT_ALTERNATIVES and key != "$defs"}
    properties = dict(schema["properties"]) if isinstance(schema.get("properties"), Mapping) else {}
    required = list(schema["required"]) if isinstance(schema.get("required"), list) else []
    together = list(schema.get("allOf", ()))
    if "$ref" in schema:
        together.append(_target(schema["$ref"], root))
    for part in together:
        one = _merged(part, root, depth=depth + 1)
        properties = {**one["properties"], **properties}
        required += one.get("required", ())
    for keyword in ("anyOf", "oneOf"):
        branches = [_merged(branch, root, depth=depth + 1) for branch in schema.get(keyword, ())]
        for name in dict.fromkeys(name for branch in branches for name in branch["properties"]):
            found = [branch["properties"][name] for branch in branches if name in branch["properties"]]
            distinct = [one for index, one in enumerate(found) if one not in found[:index]]
            properties.setdefault(name, distinct[0] if len(distinct) == 1 else {"anyOf": distinct})
        required += [
            name for name in properties if branches and all(name in branch.get("required", ()) for branch in branches)
        ]
    merged |= {"type": "object", "properties": properties}
    if required:
        merged["required"] = list(dict.fromkeys(required))
    return merged


def _strict_root(schema: Schema, *, nullable: bool) -> dict[str, Any]:
    if not _is_object(schema):
        raise _NotStrictError
    sent = _strict(schema, schema, nullable=nullable)
    if sent.get("type") != "object":
        raise _NotStrictError
    if "$defs" in schema:
        sent["$defs"] = {name: _strict(one, schema, nullable=nullable) for name, one in schema["$defs"].items()}
    _refuse_large(sent)
    return sent


def _strict(schema: object, root: Schema, *, nullable: bool) -> dict[str, Any]:
    """Return the schema in the strict subset, without its definitions.

    With `nullable`, every property is required, and one that may be absent may be null.

    Raises:
        _NotStrictError: the subset has no schema that allows the same values.
    """
    if not isinstance(schema, Mapping) or BEYOND & schema.keys():
        raise _NotStrictError
    combiners = [keyword for keyword in COMBINERS if keyword in schema]
    if combiners:
        return _strict_combination(schema, combiners, root, nullable=nullable)
    described = _described(schema)
    for keyword in ("const", "enum"):
        if keyword in schema:
            values = schema[keyword] if keyword == "enum" else [schema[keyword]]
            if not values or any(isinstance(value, dict | list) for value in values):
                raise _NotStrictError
            return {**described, keyword: schema[keyword], "type": _types_of(values)}
    match schema.get("type", "object" if "properties" in schema else "array" if "items" in schema else None):
        case "object":
            return {**described, **_strict_object(schema, root, nullable=nullable)}
        case str(name) if name in KEPT:
            kept = {key: schema[key] for key in KEPT[name] if key in schema and _is_kept(key, schema[key])}
            items = {"items": _strict(schema.get("items"), root, nullable=nullable)} if name == "array" else {}
            return {**described, "type": name, **items, **kept}
        case [_, *_] as names:
            return {
                **described,
                "anyOf": [
                    _strict({**_without(schema, described), "type": name}, root, nullable=nullable) for name in names
                ],
            }
    raise _NotStrictError


def _strict_combination(schema: Schema, combiners: list[str], root: Schema, *, nullable: bool) -> dict[str, Any]:
    [combiner, *others] = combiners
    rest = SHAPING & schema.keys()
    if combiner == "allOf" and not others:
        match schema["allOf"]:
            case [Mapping() as only] if not rest & only.keys():
                return _strict({**only, **_without(schema, ["allOf"])}, root, nullable=nullable)
        raise _NotStrictError
    if others or rest:
        raise _NotStrictError
    if combiner == "$ref":
        if schema["$ref"] != "#" and _target(schema["$ref"], root) is None:
            raise _NotStrictError
        return {"$ref": schema["$ref"]}
    described = _described(schema)
    return {**described, "anyOf": [_strict(branch, root, nullable=nullable) for branch in schema[combiner]]}


def _strict_object(schema: Schema, root: Schema, *, nullable: bool) -> dict[str, Any]:
    properties, required = schema.get("properties", {}), schema.get("required", [])
    is_open = "additionalProperties" not in schema and not properties
    if is_open or schema.get("additionalProperties", False) is not False or set(required) - set(properties):
        raise _NotStrictError
    sent = {}
    for name, property in properties.items():
        sent[name] = _strict(property, root, nullable=nullable)
        if nullable and name not in required:
            if not _allows(property, None, root):
                sent[name] = {"anyOf": [sent[name], {"type": "null"}]}
            elif isinstance(property, Mapping) and property.get("default") is not None:
                raise _NotStrictError  # null and absent differ, and the model could not leave it out
    return {
        "type": "object",
        "properties": sent,
        "required": list(properties) if nullable else list(required),
        "additionalProperties": False,
    }


def _described(schema: Schema) -> dict[str, Any]:
    return {"description": schema["description"]} if "description" in schema else {}


def _is_kept(keyword: str, value: object) -> bool:
    """Return True if the strict subset supports the keyword with this value."""
    if keyword == "format":
        return value in FORMATS
    return keyword != "pattern" or "(?" not in str(value)  # no lookarounds


def _types_of(values: list[Any]) -> str | list[str]:
    names = {bool: "boolean", str: "string", int: "integer", float: "number", type(None): "null"}
    types = sorted({names[type(value)] for value in values})
    return types[0] if len(types) == 1 else types


def _refuse_large(sent: Schema) -> None:
    nodes = list(_nodes(sent))
    if (
        sum(len(node.get("properties", ())) for node in nodes) > MAX_PROPERTIES
        or sum(len(node.get("enum", ())) for node in nodes) > MAX_ENUM_VALUES
        or len(json.dumps(sent)) > MAX_CHARACTERS
        or _depth(sent) > MAX_DEPTH
    ):
        raise _NotStrictError


def _depth(schema: Schema) -> int:
    own = 1 if schema.get("type") in ("object", "array") else 0
    return own + max((_depth(child) for child in _children(schema)), default=0)


def _is_recursive(sent: Schema) -> bool:
    """Return True if a definition refers to itself, directly or through others."""
    parts = {"#": {**sent, "$defs": {}}, **{f"#/$defs/{name}": one for name, one in sent.get("$defs", {}).items()}}
    refers = {name: {node["$ref"] for node in _nodes(one) if "$ref" in node} for name, one in parts.items()}
    while leaves := [name for name, targets in refers.items() if not targets & refers.keys()]:
        for name in leaves:
            del refers[name]
    return bool(refers)


def _without_nulls(value: object, schema: object, root: Schema) -> object:
    """Return `value` without the properties that are null because the strict schema requires every property."""
    if not isinstance(schema, Mapping):
        return value
    if "$ref" in schema:
        return _without_nulls(value, _target(schema["$ref"], root), root)
    if "allOf" in schema:
        [only] = schema["allOf"]
        return _without_nulls(value, {**only, **_without(schema, ["allOf"])}, root)
    for keyword in ("anyOf", "oneOf"):
        if keyword in schema:
            found = [(branch, _without_nulls(value, branch, root)) for branch in schema[keyword]]
            return next((one for branch, one in found if _allows(branch, one, root)), value)
    if isinstance(value, list):
        return [_without_nulls(item, schema.get("items"), root) for item in value]
    if isinstance(value, dict):
        properties, required = schema.get("properties", {}), schema.get("required", ())
        return {
            name: _without_nulls(item, properties.get(name), root)
            for name, item in value.items()
            if item is not None or name in required or name not in properties
        }
    return value


def _allows(schema: object, value: object, root: Schema) -> bool:
    allows: bool = Draft202012Validator(root).evolve(schema=schema).is_valid(value)
    return allows


def _modern(schema: Schema) -> dict[str, Any]:
    """Return the schema with the keywords of JSON Schema 2020-12, and all definitions in `$defs` at the root.

    A reference at the root is replaced by its target. A schema that is not valid becomes one that allows everything.
    """
    modern = _modernised(schema)
    if "definitions" in schema and "$defs" not in schema:
        modern = _modernised({**_without(schema, ["definitions"]), "$defs": schema["definitions"]})
    seen: set[object] = set()
    while "$ref" in modern and modern["$ref"] not in seen:
        seen.add(modern["$ref"])
        target = _target(modern["$ref"], modern)
        if not isinstance(target, Mapping):
            break
        modern = {**target, **_without(modern, ["$ref"])}
    try:
        Draft202012Validator.check_schema(modern)
    except SchemaError:
        return {}
    return modern


def _modernised(schema: Schema) -> dict[str, Any]:
    modern = _without(schema, ["$schema", "id"] if isinstance(schema.get("id"), str) else ["$schema"])
    if isinstance(modern.get("items"), list):  # draft 7 and older
        modern["prefixItems"] = modern.pop("items")
        if "additionalItems" in modern:
            modern["items"] = modern.pop("additionalItems")
    for exclusive, bound in (("exclusiveMinimum", "minimum"), ("exclusiveMaximum", "maximum")):  # draft 4
        if modern.get(exclusive) is True and bound in modern:
            modern[exclusive] = modern.pop(bound)
        elif isinstance(modern.get(exclusive), bool):
            del modern[exclusive]
    if isinstance(modern.get("$ref"), str):
        modern["$ref"] = modern["$ref"].replace("#/definitions/", "#/$defs/")
    return _with_children(modern, _modernised)


def _wrapped(schema: Schema) -> dict[str, Any]:
    """Return the schema of an object whose only property has this schema."""
    name = WRAPPER
    while name in schema.get("$defs", {}):
        name += "_"

    def moved(node: Schema) -> dict[str, Any]:
        if node.get("$ref") == "#":
            node = {**node, "$ref": f"#/$defs/{name}"}
        return _with_children(node, moved)

    inner = moved(_without(schema, ["$defs"]))
    definitions = {key: moved(one) for key, one in schema.get("$defs", {}).items()}
    return {
        "type": "object",
        "properties": {WRAPPER: {"$ref": f"#/$defs/{name}"}},
        "required": [WRAPPER],
        "additionalProperties": False,
        "$defs": {**definitions, name: inner},
    }


def _unwrapped(text: str) -> str:
    value = _object_in(text)
    return json.dumps(value[WRAPPER], ensure_ascii=False) if value is not None and value.keys() == {WRAPPER} else text


def _mapping(change: Callable[[dict[str, Any]], object]) -> Callable[[str], str]:
    """Return the function that applies `change` to the JSON object in a text."""

    def restore(text: str) -> str:
        value = _object_in(text)
        changed = None if value is None else change(value)
        return text if value is None or changed == value else json.dumps(changed, ensure_ascii=False)

    return restore


def _object_in(text: str) -> dict[str, Any] | None:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _is_object(schema: Schema) -> bool:
    return bool(schema.get("type", "object" if "properties" in schema else None) == "object")


def _target(reference: object, root: Schema) -> object:
    """Return the definition that the reference names; None if it is not one at the root."""
    if reference == "#":
        return root
    if not isinstance(reference, str) or not reference.startswith("#/$defs/"):
        return None
    name = reference.removeprefix("#/$defs/").replace("~1", "/").replace("~0", "~")
    found: object = root.get("$defs", {}).get(name)
    return found


def _without(schema: Schema, keywords: Collection[str]) -> dict[str, Any]:
    return {key: value for key, value in schema.items() if key not in keywords}


def _children(schema: Schema) -> Iterator[Schema]:
    for key in SUBSCHEMA:
        if isinstance(schema.get(key), Mapping):
            yield schema[key]
    for key in SUBSCHEMA_LIST:
        yield from (child for child in schema.get(key, ()) if isinstance(child, Mapping))
    for key in SUBSCHEMA_MAP:
        if isinstance(schema.get(key), Mapping):
            yield from (child for child in schema[key].values() if isinstance(child, Mapping))


def _nodes(schema: Schema) -> Iterator[Schema]:
    yield schema
    for child in _children(schema):
        yield from _nodes(child)


def _with_children(schema: Schema, change: Callable[[Schema], dict[str, Any]]) -> dict[str, Any]:
    """Return a copy of the schema with `change` applied to the schemas directly inside it."""

    def changed(child: Any) -> Any:
        return change(child) if isinstance(child, Mapping) else child

    copy = dict(schema)
    for key in SUBSCHEMA:
        if key in copy:
            copy[key] = changed(copy[key])
    for key in SUBSCHEMA_LIST:
        if isinstance(copy.get(key), list):
            copy[key] = [changed(child) for child in copy[key]]
    for key in SUBSCHEMA_MAP:
        if isinstance(copy.get(key), Mapping):
            copy[key] = {name: changed(child) for name, child in copy[key].items()}
    return copy
