"""Schemas as they are sent, and what the model writes under them mapped back to the schemas of our tools."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator
from pydantic import BaseModel, Field

from agentkit.models.remote.schemas import (
    SentSchema,
    anthropic_output,
    anthropic_tool,
    openai_output,
    openai_tool,
)
from agentkit_tools import BUILTINS, Tool, tool

Json = dict[str, Any]

NAMES = st.sampled_from(["a", "b", "count", "path", "kind"])
SCALARS: st.SearchStrategy[Json] = st.one_of(
    st.just({"type": "string"}),
    st.just({"type": "string", "minLength": 1, "title": "Text"}),
    st.integers(0, 5).map(lambda least: {"type": "integer", "minimum": least, "maximum": least + 3}),
    st.just({"type": "boolean"}),
    st.just({"type": "null"}),
    st.just({"enum": ["x", "y", None]}),
    st.just({"const": 7, "description": "always seven"}),
    st.just({"type": ["string", "null"]}),
    st.just({"$ref": "#/$defs/node"}),
    st.just({"allOf": [{"$ref": "#/$defs/leaf"}], "description": "a leaf", "default": {"kind": "x"}}),
)


def _object(children: st.SearchStrategy[Json]) -> st.SearchStrategy[Json]:
    @st.composite
    def build(draw: st.DrawFn) -> Json:
        properties = draw(st.dictionaries(NAMES, children, min_size=1, max_size=4))
        required = draw(st.lists(st.sampled_from(sorted(properties)), unique=True))
        closed: Json = draw(st.sampled_from([{}, {"additionalProperties": False}]))
        return {"type": "object", "properties": properties, "required": required, **closed}

    return build()


SCHEMAS: st.SearchStrategy[Json] = st.recursive(
    SCALARS,
    lambda children: st.one_of(
        _object(children),
        children.map(lambda items: {"type": "array", "items": items, "uniqueItems": False, "maxItems": 3}),
        st.lists(children, min_size=1, max_size=3).map(lambda branches: {"anyOf": branches}),
        st.lists(children, min_size=1, max_size=2).map(lambda branches: {"oneOf": branches}),
        st.dictionaries(NAMES, children, max_size=1).map(
            lambda extra: {"type": "object", "additionalProperties": True, "properties": extra}
        ),
    ),
    max_leaves=8,
)
DEFINITIONS: Json = {
    "leaf": {
        "type": "object",
        "properties": {"kind": {"enum": ["x"]}, "note": {"type": "string"}},
        "required": ["kind"],
    },
    "node": {
        "type": "object",
        "properties": {"name": {"type": "string"}, "children": {"type": "array", "items": {"$ref": "#/$defs/node"}}},
        "required": ["name"],
    },
}
TOOL_SCHEMAS = _object(SCHEMAS).map(lambda schema: {**schema, "$defs": DEFINITIONS})


def _values(schema: Any, root: Json, depth: int = 0) -> st.SearchStrategy[Any]:
    """Values that a model can write under a schema in the strict subset."""
    if "$ref" in schema:
        return st.deferred(lambda: _values(_resolved(schema["$ref"], root), root, depth + 1))
    if "anyOf" in schema:
        branches = schema["anyOf"]
        if depth > 3:  # end the recursion: an optional property can be null
            branches = [branch for branch in branches if branch == {"type": "null"}] or branches
        return st.one_of([_values(branch, root, depth) for branch in branches])
    if "enum" in schema:
        return st.sampled_from(schema["enum"])
    if "const" in schema:
        return st.just(schema["const"])
    match schema["type"]:
        case "object":
            return st.fixed_dictionaries(
                {name: _values(property, root, depth) for name, property in schema["properties"].items()}
            )
        case "array":
            size = 0 if depth > 3 else min(2, schema.get("maxItems", 2))
            return st.lists(_values(schema["items"], root, depth), max_size=size)
        case "integer":
            return st.integers(schema["minimum"], schema["maximum"])
        case "boolean":
            return st.booleans()
        case "null":
            return st.none()
        case _:
            return st.text("ab", min_size=1, max_size=2)


def _resolved(reference: str, root: Json) -> Any:
    return root["$defs"][reference.removeprefix("#/$defs/")]


def _objects(schema: Any) -> list[Json]:
    if isinstance(schema, list):
        return [found for item in schema for found in _objects(item)]
    if not isinstance(schema, dict):
        return []
    return [schema] * (schema.get("type") == "object") + [f for value in schema.values() for f in _objects(value)]


def _without_one_of(schema: Any) -> Any:
    """The schema with anyOf for oneOf: the strict subset has no oneOf, so a value may fit two alternatives."""
    if isinstance(schema, dict):
        return {"anyOf" if key == "oneOf" else key: _without_one_of(value) for key, value in schema.items()}
    return [_without_one_of(item) for item in schema] if isinstance(schema, list) else schema


@settings(deadline=None)
@given(st.data())
def test_what_the_model_writes_under_a_strict_schema_fits_the_schema_of_the_tool(data: st.DataObject) -> None:
    schema = data.draw(TOOL_SCHEMAS)
    sent = openai_tool(schema)
    Draft202012Validator.check_schema(sent.schema)
    assert sent.schema["type"] == "object"
    if not sent.strict:
        assert sent.restored('{"a": null}') == '{"a": null}'
        return
    for found in _objects(sent.schema):
        assert found["additionalProperties"] is False
        assert sorted(found["required"]) == sorted(found["properties"])
    written = data.draw(_values(sent.schema, sent.schema))
    Draft202012Validator(sent.schema).validate(written)
    restored = json.loads(sent.restored(json.dumps(written)))
    Draft202012Validator(_without_one_of(schema)).validate(restored)
    assert json.loads(sent.restored(json.dumps(restored))) == restored


@settings(deadline=None, max_examples=50)
@given(TOOL_SCHEMAS)
def test_the_schema_of_a_tool_for_anthropic_allows_all_that_the_tool_accepts(schema: Json) -> None:
    sent = anthropic_tool(schema)
    Draft202012Validator.check_schema(sent.schema)
    assert sent.schema["type"] == "object" and not {"anyOf", "oneOf", "allOf"} & sent.schema.keys()
    assert sent.schema["properties"] == schema["properties"]


@settings(deadline=None, max_examples=50)
@given(TOOL_SCHEMAS)
def test_the_schema_of_an_answer_for_anthropic_has_closed_objects(schema: Json) -> None:
    sent = anthropic_output(schema)
    if sent is not None:
        for found in _objects(sent.schema):
            assert found["additionalProperties"] is False
        assert sent.restored('{"a": 1}') == '{"a": 1}'


@pytest.mark.parametrize("builtin", BUILTINS.values(), ids=str)
def test_the_built_in_tools_are_strict(builtin: Tool) -> None:
    assert openai_tool(builtin.parameters).strict


class Point(BaseModel):
    x: int
    y: int = 0
    label: str | None = None


class Shape(BaseModel):
    kind: Literal["polygon"] = "polygon"
    points: list[Point] = Field(min_length=1)
    parent: Shape | None = None


def restored(sent: SentSchema, value: object) -> Any:
    return json.loads(sent.restored(json.dumps(value)))


def test_an_optional_parameter_that_is_null_is_left_out() -> None:
    sent = openai_tool(Shape.model_json_schema())
    point = {"x": 1, "y": None, "label": None}
    inner = {"kind": None, "points": [point], "parent": None}
    assert sent.strict
    assert restored(sent, {"kind": "polygon", "points": [point, {"x": 1, "y": 2, "label": "a"}], "parent": inner}) == {
        "kind": "polygon",
        "points": [{"x": 1}, {"x": 1, "y": 2, "label": "a"}],
        "parent": {"points": [{"x": 1}]},
    }


def test_a_required_parameter_may_be_null() -> None:
    properties = {"a": {"type": ["string", "null"]}, "b": {"type": "string"}}
    sent = openai_tool({"type": "object", "properties": properties, "required": ["a"]})
    assert sent.strict and restored(sent, {"a": None, "b": None, "unknown": None}) == {"a": None, "unknown": None}


def test_patterns_and_formats_are_kept_where_the_api_has_them() -> None:
    properties = {
        "id": {"type": "string", "format": "uuid", "pattern": "^[a-f0-9-]+$"},
        "url": {"type": "string", "format": "uri", "pattern": "^(?!http:)"},
        "n": {"type": "integer", "minimum": 1, "multipleOf": 2},
    }
    schema = {"type": "object", "properties": properties, "required": ["id", "url", "n"]}
    assert openai_tool(schema).schema["properties"] == {**properties, "url": {"type": "string"}}


@tool
def pad(text: str, width: int | None = 80) -> str:
    """Pad a text; width None does not."""
    return text.ljust(width or 0)


def test_a_parameter_whose_absence_differs_from_null_is_not_strict() -> None:
    assert not openai_tool(pad.parameters).strict


@pytest.mark.parametrize("text", ["", "{", "[1]", "null", '{"x": 1', "\x00", "[" * 100_000])
def test_text_that_is_no_object_is_left_for_the_tool_to_refuse(text: str) -> None:
    assert openai_tool(Point.model_json_schema()).restored(text) == text


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "object"},
        {"type": "object", "additionalProperties": {"type": "integer"}},
        {"type": "object", "properties": {"a": {}}},
        {"type": "object", "properties": {"a": True}},
        {"type": "object", "properties": {"a": {"type": "array"}}},
        {"type": "object", "properties": {"a": {"type": "array", "prefixItems": [{"type": "string"}]}}},
        {"type": "object", "properties": {"a": {"items": [{"type": "string"}], "type": "array"}}},
        {"type": "object", "properties": {"a": {"$ref": "https://example.com/schema"}}},
        {"type": "object", "properties": {"a": {"$ref": "#/$defs/missing"}}},
        {"type": "object", "properties": {"a": {"allOf": [{"type": "string"}, {"minLength": 1}]}}},
        {"type": "object", "properties": {"a": {"enum": [{"b": 1}]}}},
        {"type": "object", "properties": {}, "patternProperties": {"^a": {"type": "string"}}},
        {"type": "object", "properties": {"a": {"type": "string"}}, "required": ["b"]},
        {"type": "object", "properties": {"a": {"type": "string"}}, "anyOf": [{"required": ["a"]}, {"required": []}]},
        {"type": "object", "properties": {"a": {"enum": list(range(1_001))}}},
        {"type": "object", "properties": {str(number): {"type": "string"} for number in range(5_001)}},
        {},
    ],
    ids=lambda schema: json.dumps(schema)[:60],
)
def test_a_schema_beyond_the_strict_subset_is_sent_without_strictness(schema: Json) -> None:
    sent = openai_tool(schema)
    assert not sent.strict
    assert sent.schema["type"] == "object" and isinstance(sent.schema["properties"], dict)
    assert sent.schema["properties"].keys() == schema.get("properties", {}).keys()


def test_deeply_nested_objects_are_sent_without_strictness() -> None:
    schema: Json = {"type": "string"}
    for _ in range(11):
        schema = {"type": "object", "properties": {"a": schema}}
    assert not openai_tool(schema).strict and openai_tool(schema["properties"]["a"]).strict


@pytest.mark.parametrize(
    "schema",
    [{"type": "dict"}, {"type": "object", "properties": []}, {"type": "object", "required": "a", "properties": {}}],
    ids=str,
)
@pytest.mark.parametrize("send", [openai_tool, anthropic_tool], ids=["openai", "anthropic"])
def test_an_invalid_schema_is_sent_as_any_object(schema: Json, send: Any) -> None:
    assert send(schema).schema == {"type": "object", "properties": {}}


def test_alternatives_at_the_root_become_one_object() -> None:
    schema = {
        "$defs": {"id": {"type": "object", "properties": {"id": {"type": "integer"}}, "required": ["id"]}},
        "type": "object",
        "properties": {"force": {"type": "boolean"}},
        "oneOf": [
            {"properties": {"name": {"type": "string"}, "at": {"type": "string"}}, "required": ["name", "at"]},
            {"allOf": [{"$ref": "#/$defs/id"}], "properties": {"at": {"type": "integer"}}, "required": ["at"]},
        ],
        "not": {"required": ["name", "id"]},
    }
    sent = anthropic_tool(schema).schema
    assert sent["properties"] == {
        "force": {"type": "boolean"},
        "name": {"type": "string"},
        "at": {"anyOf": [{"type": "string"}, {"type": "integer"}]},
        "id": {"type": "integer"},
    }
    assert sent["required"] == ["at"]
    assert sent == openai_tool(schema).schema
    for arguments in ({"name": "a", "at": "b", "force": True}, {"id": 1, "at": 2}):
        Draft202012Validator(schema).validate(arguments)
        Draft202012Validator(sent).validate(arguments)


def test_a_schema_that_is_a_reference_is_sent_as_its_target() -> None:
    schema = {"$ref": "#/definitions/Tree", "definitions": {"Tree": TREE}}
    sent = openai_tool(schema)
    assert sent.strict and "$ref" not in sent.schema
    assert restored(sent, {"name": "a", "left": {"name": "b", "left": None}}) == {"name": "a", "left": {"name": "b"}}
    assert anthropic_tool(schema).schema["properties"] == {
        "name": {"type": "string"},
        "left": {"$ref": "#/$defs/Tree"},
    }


TREE: Json = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "left": {"$ref": "#/definitions/Tree"}},
    "required": ["name"],
}


def test_a_definition_that_only_refers_to_itself_does_not_hang() -> None:
    schema = {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}}
    assert openai_tool(schema).schema["type"] == anthropic_tool(schema).schema["type"] == "object"


def test_keywords_of_older_drafts_are_sent_in_the_words_of_the_current_one() -> None:
    schema = {
        "$schema": "http://json-schema.org/draft-04/schema#",
        "id": "http://example.com/a",
        "type": "object",
        "properties": {
            "n": {"type": "integer", "minimum": 1, "exclusiveMinimum": True, "maximum": 9, "exclusiveMaximum": False},
            "pair": {"type": "array", "items": [{"type": "integer"}, {"type": "integer"}], "additionalItems": False},
        },
    }
    sent = anthropic_tool(schema).schema
    assert sent == {
        "type": "object",
        "properties": {
            "n": {"type": "integer", "exclusiveMinimum": 1, "maximum": 9},
            "pair": {"type": "array", "prefixItems": [{"type": "integer"}] * 2, "items": False},
        },
    }


def test_property_names_that_anthropic_refuses_are_mapped_back() -> None:
    names = ["$filter", "filter", "_filter", "größe", "a" * 70, "a" * 71, "top level"]
    schema = {"type": "object", "properties": {name: {"type": "string"} for name in names}, "required": ["$filter"]}
    sent = anthropic_tool(schema)
    accepted = list(sent.schema["properties"])
    assert len(set(accepted)) == len(names) and accepted[1:3] == ["filter", "_filter"]
    assert all(len(name) <= 64 and name.isascii() and " " not in name and "$" not in name for name in accepted)
    assert sent.schema["required"] == [accepted[0]]
    assert restored(sent, {name: name for name in accepted}) == dict(zip(names, accepted, strict=True))


@pytest.mark.parametrize("send", [openai_output, anthropic_output], ids=["openai", "anthropic"])
@pytest.mark.parametrize(
    ("schema", "answer"),
    [
        ({"type": "array", "items": {"type": "integer"}}, [1, 2]),
        ({"anyOf": [{"type": "string"}, {"type": "null"}]}, None),
        ({"type": "array", "items": {"$ref": "#/$defs/value"}, "$defs": {"value": {"type": "boolean"}}}, [True]),
    ],
    ids=str,
)
def test_an_answer_that_is_no_object_is_wrapped_in_one(send: Any, schema: Json, answer: object) -> None:
    sent = send(schema)
    assert sent.strict and sent.schema["type"] == "object"
    Draft202012Validator(sent.schema).validate({"value": answer})
    assert restored(sent, {"value": answer}) == answer
    assert sent.restored("no JSON") == "no JSON"


def test_a_recursive_answer_is_strict_only_where_the_api_has_recursion() -> None:
    recursive = {"type": "array", "items": {"$ref": "#"}}
    assert anthropic_output(recursive) is None and anthropic_output(Shape.model_json_schema()) is None
    sent = openai_output(recursive)
    assert sent.strict and restored(sent, {"value": [[], [[]]]}) == [[], [[]]]


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "object", "additionalProperties": {"type": "integer"}},
        {"type": "object", "properties": {f"p{number}": {"type": "string"} for number in range(25)}},
        {"type": "object", "properties": {f"p{n}": {"type": ["string", "null"]} for n in range(17)}, "required": []},
    ],
    ids=["map", "optional", "unions"],
)
def test_an_answer_beyond_anthropics_limits_is_not_constrained(schema: Json) -> None:
    assert anthropic_output(schema) is None


def test_an_answer_for_anthropic_keeps_its_bounds_as_a_description() -> None:
    sent = anthropic_output({"type": "object", "properties": {"n": {"type": "integer", "minimum": 3}}})
    assert sent is not None and isinstance(sent.schema, Mapping)
    assert "minimum: 3" in sent.schema["properties"]["n"]["description"]
