"""Signatures become schemas, unsupported ones are refused by name, and arguments are checked against the schema."""

from __future__ import annotations

import dataclasses
import datetime
import enum
import inspect
import json
from collections.abc import Callable
from typing import Annotated, Any, Literal

import jsonschema
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, Field

from agentkit_tools import ArgumentsError, FunctionTool, ToolContext, ToolDefinitionError, tool
from agentkit_tools.schema import check_schema, problems
from agentkit_tools.signature import parse_docstring
from agentkit_tools.validation import Validator


class Color(enum.Enum):
    RED = "red"
    BLUE = "blue"


class Point(BaseModel):
    """A place."""

    x: int
    title: str = "origin"


@dataclasses.dataclass
class Size:
    width: int


def schema_of(fn: Callable[..., Any]) -> dict[str, Any]:
    schema = tool(fn).parameters
    jsonschema.Draft202012Validator.check_schema(schema)
    return schema


def test_plain_types_and_defaults() -> None:
    def fn(a: str, b: int = 3, c: float = 0.5, d: bool = False, e: list[int] = [], f: dict[str, int] | None = None): ...  # type: ignore[no-untyped-def]  # noqa: B006

    assert schema_of(fn) == {
        "type": "object",
        "properties": {
            "a": {"type": "string"},
            "b": {"type": "integer", "default": 3},
            "c": {"type": "number", "default": 0.5},
            "d": {"type": "boolean", "default": False},
            "e": {"type": "array", "items": {"type": "integer"}, "default": []},
            "f": {
                "anyOf": [{"type": "object", "additionalProperties": {"type": "integer"}}, {"type": "null"}],
                "default": None,
            },
        },
        "required": ["a"],
    }


def test_choices_unions_and_constraints() -> None:
    def fn(
        mode: Literal["r", "w"],
        color: Color,
        key: int | str,
        count: Annotated[int, Field(ge=1, le=9)],
        shade: Color = Color.BLUE,
    ) -> None: ...

    schema = schema_of(fn)
    assert schema["properties"] == {
        "mode": {"enum": ["r", "w"], "type": "string"},
        "color": {"$ref": "#/$defs/Color"},
        "key": {"anyOf": [{"type": "integer"}, {"type": "string"}]},
        "count": {"type": "integer", "minimum": 1, "maximum": 9},
        "shade": {"$ref": "#/$defs/Color", "default": "blue"},
    }
    assert schema["$defs"] == {"Color": {"enum": ["red", "blue"], "type": "string"}}


def test_nested_models_lose_their_titles_but_not_a_property_of_that_name() -> None:
    def fn(points: list[Point], size: Size) -> None: ...

    schema = schema_of(fn)
    assert schema["$defs"]["Point"] == {
        "description": "A place.",
        "type": "object",
        "properties": {"x": {"type": "integer"}, "title": {"type": "string", "default": "origin"}},
        "required": ["x"],
    }
    arguments = tool(fn).parse('{"points": [{"x": 1}], "size": {"width": 2}}')
    assert arguments == {"points": [Point(x=1)], "size": Size(2)}


def test_descriptions_from_annotations_and_docstring() -> None:
    def fn(
        a: Annotated[int, "From the annotation."], b: Annotated[int, Field(description="From the field.")], c: int
    ) -> None:
        """Add three numbers.

        All of them.

        Args:
            a: Not this one.
            c (int): From the docstring,
                in two lines.

        Returns:
            Nothing.
        """

    made = tool(fn)
    assert made.description == "Add three numbers.\n\nAll of them."
    descriptions = [schema["description"] for schema in made.parameters["properties"].values()]
    assert descriptions == ["From the annotation.", "From the field.", "From the docstring, in two lines."]


def test_docstring_text_after_a_section_is_prose() -> None:
    assert parse_docstring("Do.\n\nArgs:\n    x: The x.\n\nMore.") == ("Do.\n\nMore.", {"x": "The x."})


def test_context_is_injected_and_no_parameters_are_fine() -> None:
    def fn(context: ToolContext) -> None: ...

    assert schema_of(fn) == {"type": "object", "properties": {}}
    assert tool(fn).parse("") == {}


def test_parameter_names_that_pydantic_refuses_are_supported() -> None:
    def fn(schema: int, _hidden: int, model_config: int, copy: int = 1) -> None: ...

    arguments = {"schema": 1, "_hidden": 2, "model_config": 3}
    assert tool(fn).parse(json.dumps(arguments)) == arguments


def test_types_defined_beside_the_function() -> None:
    class Local(BaseModel):
        n: int

    @tool
    def fn(value: Local) -> None: ...

    assert fn.parse('{"value": {"n": 1}}') == {"value": Local(n=1)}


def untyped(good: int, bad) -> None: ...  # type: ignore[no-untyped-def]
def var_positional(*bad: int) -> None: ...
def var_keyword(**bad: int) -> None: ...
def positional_only(bad: int, /) -> None: ...
def unresolved(bad: Nowhere) -> None: ...  # type: ignore[name-defined]  # noqa: F821
def function_type(bad: Callable[[], int]) -> None: ...
def some_class(bad: inspect.Signature) -> None: ...
def wrong_default(bad: str = 3) -> None: ...  # type: ignore[assignment]
def enum_default(bad: Color = "red") -> None: ...  # type: ignore[assignment]


@pytest.mark.parametrize(
    ("fn", "reason"),
    [
        (untyped, "has no type annotation"),
        (var_positional, "expected a named parameter"),
        (var_keyword, "expected a named parameter"),
        (positional_only, "is positional-only"),
        (unresolved, "cannot be resolved"),
        (function_type, "has no JSON schema"),
        (some_class, "has no JSON schema"),
        (wrong_default, "default 3 does not fit"),
        (enum_default, "default 'red' does not fit"),
    ],
)
def test_bad_signatures_are_refused_by_name(fn: Callable[..., Any], reason: str) -> None:
    with pytest.raises(ToolDefinitionError, match=f"tool '{fn.__name__}', parameter 'bad': .*{reason}"):
        tool(fn)


def test_bad_names_and_non_functions_are_refused() -> None:
    with pytest.raises(ToolDefinitionError, match="expected 1 to 64 letters"):
        tool(name="no spaces")(positional)
    with pytest.raises(ToolDefinitionError, match="expected a function"):
        tool(Point)


def positional(
    path: str,
    count: int = 1,
    mode: Literal["r", "w"] = "r",
    key: int | str = 0,
    point: Point | None = None,
    tags: list[str] = [],  # noqa: B006
    bound: Annotated[int, Field(ge=1)] = 1,
) -> None: ...


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ("{}", "$.path: missing, expected string"),
        ("", "$.path: missing, expected string"),
        ('{"path": 3}', "$.path: given 3 (integer), expected string"),
        ('{"path": null}', "$.path: given null, expected string"),
        ('{"path": "a", "count": "3"}', '$.count: given "3" (string), expected integer'),
        ('{"path": "a", "count": true}', "$.count: given true (boolean), expected integer"),
        ('{"path": "a", "mode": "x"}', '$.mode: given "x" (string), expected one of "r", "w"'),
        ('{"path": "a", "key": 1.5}', "$.key: given 1.5 (number), expected integer or string"),
        ('{"path": "a", "point": 1}', "$.point: given 1 (integer), expected object with x, title or null"),
        ('{"path": "a", "tags": "x"}', '$.tags: given "x" (string), expected array of string'),
        ('{"path": "a", "tags": ["x", 1]}', "$.tags[1]: given 1 (integer), expected string"),
        ('{"path": "a", "bound": 0}', "$.bound: given 0 (integer), expected minimum 1"),
        (
            '{"path": "a", "pth": 1}',
            "$.pth: unknown parameter, expected path, count, mode, key, point, tags, bound",
        ),
        ('{"count": "3"}', '$.path: missing, expected string; $.count: given "3" (string), expected integer'),
        ('{"path": "a", "key": NaN}', "$: not valid JSON: expected value at line 1 column 22, expected an object"),
        ("[1]", "$: given [1] (array), expected object"),
        ('{"path": "a"', "$: not valid JSON: EOF while parsing an object at line 1 column 12, expected an object"),
        (
            '{"path": "\\ud800\\u0041"}',
            "$: not valid JSON: lone leading surrogate in hex escape at line 1 column 22, expected an object",
        ),
        (json.dumps({"path": ["x" * 99]}), f'$.path: given ["{"x" * 55}... (array), expected string'),
    ],
)
def test_invalid_arguments_name_path_given_and_expected(arguments: str, problem: str) -> None:
    with pytest.raises(ArgumentsError) as caught:
        tool(positional).parse(arguments)
    assert str(caught.value) == f"invalid arguments for positional: {problem}"


def test_only_the_first_problems_are_listed() -> None:
    with pytest.raises(ArgumentsError) as caught:
        tool(positional).parse('{"a": 1, "b": 1, "c": 1, "d": 1}')
    assert len(caught.value.problems) == 3


def test_values_accepted_by_the_schema_are_accepted() -> None:
    assert tool(positional).parse('{"path": "a", "count": 2.0}')["count"] == 2


def test_a_models_own_validator_is_explained() -> None:
    class Even(BaseModel):
        n: Annotated[str, Field(pattern="^[0-9]$")]

        def model_post_init(self, context: object) -> None:
            if int(self.n) % 2:
                raise ValueError("must be even")

    @tool
    def fn(even: Even) -> None: ...

    with pytest.raises(ArgumentsError, match=r"\$\.even: given .*: Value error, must be even"):
        fn.parse('{"even": {"n": "3"}}')


JSON_VALUES: list[tuple[Any, st.SearchStrategy[Any]]] = [
    (str, st.text()),
    (int, st.integers(-(2**60), 2**60)),
    (float, st.floats(allow_nan=False, allow_infinity=False)),
    (bool, st.booleans()),
    (list[str], st.lists(st.text(), max_size=3)),
    (dict[str, int], st.dictionaries(st.text(), st.integers(0, 9), max_size=3)),
    (Literal["a", "b"], st.sampled_from(["a", "b"])),
    (int | str | None, st.one_of(st.integers(0, 9), st.text(), st.none())),
    (Any, st.recursive(st.none() | st.booleans() | st.text(), lambda inner: st.lists(inner, max_size=2))),
]


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_valid_arguments_validate_and_arrive_unchanged(data: st.DataObject) -> None:
    chosen = data.draw(st.lists(st.sampled_from(JSON_VALUES), max_size=4))

    def fn() -> None: ...

    fn.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [
            inspect.Parameter(f"a{index}", inspect.Parameter.KEYWORD_ONLY, annotation=kind)
            for index, (kind, _) in enumerate(chosen)
        ]
    )
    made = FunctionTool(fn)
    arguments = {f"a{index}": data.draw(values) for index, (_, values) in enumerate(chosen)}
    assert problems(Validator(made.parameters), arguments) == []
    assert made.parse(json.dumps(arguments)) == arguments
    assert made.parse(json.dumps(arguments, ensure_ascii=False)) == arguments


@pytest.mark.parametrize(
    ("schema", "reason"),
    [
        ({"type": "objekt"}, r"\$\.type: 'objekt' is not valid"),
        ({"type": "object", "properties": {"a": {"type": "strin"}}}, r"\$\.properties\.a\.type: 'strin'"),
        ({"type": "object", "default": datetime.date(2024, 1, 1)}, "not JSON: Object of type date"),
        ({"type": "string"}, r'\$\.type: given "string", expected "object"'),
        ({"type": "object", "properties": {"a": {"pattern": "("}}}, r"\$\.properties\.a\.pattern: '\('"),
        ({}, r'\$\.type: given null, expected "object"'),
        ({"type": "object", "properties": {"a": {"$ref": "#/$defs/none"}}}, "expected a place in this schema"),
        ({"type": "object", "properties": {"a": {"$ref": "http://localhost/x"}}}, "expected a place in this schema"),
    ],
)
def test_bad_hand_written_schemas_are_refused(schema: dict[str, Any], reason: str) -> None:
    with pytest.raises(ToolDefinitionError, match=rf"tool 'mine', parameters: .*{reason}"):
        check_schema(schema, name="mine")


def test_hand_written_references_are_explained() -> None:
    schema = {"type": "object", "properties": {"a": {"$ref": "#/$defs/n"}}, "$defs": {"n": {"const": 1}}}
    check_schema(schema, name="mine")
    assert problems(Validator(schema), {"a": 2}) == ["$.a: given 2 (integer), expected 1"]


def test_unknown_names_next_to_pattern_properties_are_refused() -> None:
    schema = {"type": "object", "patternProperties": {"^x-": {}}, "additionalProperties": False}
    assert problems(Validator(schema), {"x-a": 1, "b": 2}) == ["$.b: unknown parameter, expected no parameters"]
