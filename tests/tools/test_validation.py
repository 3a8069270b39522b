"""The validator agrees with the jsonschema library where both are exact, and stays bounded where the library is not."""

from __future__ import annotations

import json
import time
from typing import Annotated, Any, Literal

import anyio
import jsonschema
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, Field

from agentkit_tools import ArgumentsError, CommandTool, ToolCall, ToolContext, ToolDefinitionError, ToolResult, tool
from agentkit_tools.patterns import PatternTooSlowError, is_pattern, search
from agentkit_tools.schema import problems
from agentkit_tools.validation import CannotCheckError, SchemaProblemError, Validator

JSON = st.recursive(
    st.one_of(
        st.none(), st.booleans(), st.integers(-3, 9), st.sampled_from([0.5, 1.0, 2.5, -0.0]), st.text("ab1", max_size=3)
    ),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from("abx"), inner, max_size=3),
    max_leaves=6,
)
SMALL = st.integers(0, 3)
LEAVES = st.one_of(
    st.fixed_dictionaries({"type": st.sampled_from("string integer number boolean null array object".split())}),
    st.lists(st.sampled_from(["string", "integer", "null", "object"]), min_size=1, unique=True).map(
        lambda names: {"type": names}
    ),
    st.fixed_dictionaries({"enum": st.lists(JSON, max_size=3)}),
    st.fixed_dictionaries({"const": JSON}),
    st.fixed_dictionaries({"minimum": st.integers(-2, 5), "exclusiveMaximum": st.sampled_from([1, 2.5, 6])}),
    st.fixed_dictionaries({"multipleOf": st.sampled_from([1, 2, 0.5])}),
    st.fixed_dictionaries({"minLength": SMALL, "maxLength": SMALL}),
    st.fixed_dictionaries({"pattern": st.sampled_from(["^a", "b$", "[0-9]", "^(a|b)+$", "a.b"])}),
    st.fixed_dictionaries({"minItems": SMALL, "maxItems": SMALL, "uniqueItems": st.booleans()}),
    st.fixed_dictionaries({"minProperties": SMALL, "maxProperties": SMALL}),
    st.fixed_dictionaries({"required": st.lists(st.sampled_from("abx"), max_size=2, unique=True)}),
    st.fixed_dictionaries({"dependentRequired": st.fixed_dictionaries({"a": st.just(["b"])})}),
    st.just({"$ref": "#/$defs/d"}),
    st.booleans(),
)


def grown(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    listed, named = st.lists(inner, min_size=1, max_size=3), st.dictionaries(st.sampled_from("abx"), inner, max_size=2)
    keywords: dict[str, st.SearchStrategy[Any]] = {
        **dict.fromkeys(("allOf", "anyOf", "oneOf", "prefixItems"), listed),
        **dict.fromkeys(("properties", "dependentSchemas"), named),
        "patternProperties": st.dictionaries(st.sampled_from(["^a", "b", "x$"]), inner, max_size=2),
        **dict.fromkeys("not if then else items contains additionalProperties propertyNames".split(), inner),
        **dict.fromkeys(("unevaluatedProperties", "unevaluatedItems"), inner),
        "minContains": SMALL,
        "maxContains": SMALL,
    }
    some = st.lists(st.sampled_from(sorted(keywords)), min_size=1, max_size=4, unique=True)
    return some.flatmap(lambda names: st.fixed_dictionaries({name: keywords[name] for name in names}))


SCHEMAS = st.recursive(LEAVES, grown, max_leaves=8)


@settings(max_examples=400, deadline=None, suppress_health_check=list(HealthCheck))
@given(SCHEMAS, SCHEMAS.filter(lambda schema: "$ref" not in json.dumps(schema)), JSON)
def test_the_validator_agrees_with_jsonschema(schema: Any, definition: Any, value: Any) -> None:
    whole = {"allOf": [schema], "$defs": {"d": definition}}
    expected = list(jsonschema.Draft202012Validator(whole).iter_errors(value))
    found = Validator(whole).problems(value)
    assert bool(found) == bool(expected), (whole, value, found, expected)


@settings(max_examples=200, deadline=None)
@given(st.integers(-10_000, 10_000), st.integers(0, 4), st.integers(1, 500), st.integers(0, 4))
def test_multiple_of_uses_exact_decimals(n: int, places: int, m: int, step_places: int) -> None:
    value, step = json.loads(f"{n}e-{places}"), json.loads(f"{m}e-{step_places}")
    exact = (n * 10 ** (8 - places)) % (m * 10 ** (8 - step_places)) == 0
    assert (Validator({"multipleOf": step}).problems(value) == []) == exact


@pytest.mark.parametrize(("step", "value"), [(0.01, 19.99), (0.1, 0.3), (0.01, 4.35), (1e-8, 0.12345678), (0.1, 1e300)])
def test_prices_are_multiples_of_a_cent(step: float, value: float) -> None:
    assert Validator({"multipleOf": step}).problems(value) == []


@pytest.mark.parametrize(
    ("name", "good", "bad"),
    [
        ("date", ["2024-02-29", "2000-02-29", "1999-12-31"], ["tomorrow", "2023-02-29", "1900-02-29", ""]),
        ("time", ["10:00:00Z", "10:00", "23:59:59.5+05:30"], ["24:00:00Z", "10", "10:60"]),
        ("date-time", ["2024-01-01T10:00:00Z", "2024-01-01 10:00"], ["2024-01-01", "2024-13-01T10:00:00Z", "now"]),
        ("duration", ["P1D", "PT5M", "P1Y2M3DT4H", "P2W"], ["P", "1D", "PT", "P1DT"]),
        ("email", ["a@b.c", "jürgen@example.org"], ["a", "a@", "a b@c"]),
        ("hostname", ["a", "a-b.example.org"], ["-a", "a..b", "a b"]),
        ("ipv4", ["1.2.3.4", "255.255.255.255"], ["1.2.3", "256.1.1.1", "01.2.3.4", "1.2.3.4\n"]),
        ("ipv6", ["::", "::1", "1:2:3:4:5:6:7:8", "1::8", "::ffff:1.2.3.4"], ["1:2", ":::", "1::2::3", "g::"]),
        ("uri", ["https://example.org/a?b#c", "mailto:a@b"], ["example.org", "//x", "http://a b"]),
        ("uuid", ["123e4567-e89b-12d3-a456-426614174000"], ["123e4567", "123e4567-e89b-12d3-a456-42661417400g"]),
        ("int32", ["anything", ""], []),
    ],
)  # fmt: skip
def test_formats_are_checked(name: str, good: list[str], bad: list[str]) -> None:
    validator = Validator({"type": "string", "format": name})
    assert [text for text in good if validator.problems(text)] == []
    assert [text for text in bad if not validator.problems(text)] == []


def test_a_command_tool_refuses_an_invalid_date() -> None:
    made = CommandTool("f", "", {"type": "object", "properties": {"d": {"type": "string", "format": "date"}}}, "true")
    with pytest.raises(Exception, match=r'\$\.d: given "tomorrow" \(string\), expected format "date"'):
        made.parse('{"d": "tomorrow"}')


@pytest.mark.parametrize(
    ("pattern", "text", "found"),
    [
        (r"^(\w+\s?)+$", "a" * 28 + "!", False),
        (r"^(\w+\s?)+$", "a b c", True),
        (r"^(a+)+$", "a" * 5000 + "b", False),
        (r"(?=a)[a-c]", "xa", True),  # look-around: Python's `re`
        (r"^(?<w>\w+) \k<w>$", "no no", True),  # named back-reference, ECMAScript syntax
        (r"^(.)\1$", "ab", False),
        (r"^a$", "a\n", False),  # `$` is the very end, not before a final newline
        (r"(?=a)a$", "a\n", False),
        (r"^\w+$", "é", True),
        (r"^\d$", "٣", True),
        (r"\p{Lu}", "É", True),
        (r"[[a]", "[", True),  # a nested set in Rust, a literal bracket in ECMAScript
        (r"\<b\>", "<b>", True),  # a word boundary in Rust, an escape in ECMAScript
        (r"^https?:\/\/", "https://x", True),
    ],
)
def test_patterns(pattern: str, text: str, found: bool) -> None:
    assert search(pattern, text, deadline=time.monotonic() + 30) is found


@pytest.mark.parametrize("pattern", [r"^(?=(\w+\s?)+$)", r"^(?=a)(a|a)*$", r"(?!x)((a+)+)+$"])
def test_a_backtracking_pattern_is_stopped_at_the_deadline(pattern: str) -> None:
    start = time.monotonic()
    with pytest.raises(PatternTooSlowError):
        search(pattern, "a" * 40 + "!", deadline=start + 0.3)
    assert time.monotonic() - start < 10
    assert search("(?=a)a", "a", deadline=time.monotonic() + 30)  # a new worker replaces the killed one


@pytest.mark.parametrize(
    ("pattern", "fine"), [("(", False), ("*", False), ("[b-a]", False), ("(?=a", False), ("[[]", True)]
)
def test_a_pattern_needs_an_engine_that_accepts_it(pattern: str, fine: bool) -> None:
    assert is_pattern(pattern) is fine


NODE = {
    "$defs": {
        "n": {
            "anyOf": [
                {"type": "object", "properties": {"k": {"$ref": "#/$defs/n"}, "a": {"type": "integer"}}},
                {"type": "object", "properties": {"k": {"$ref": "#/$defs/n"}, "b": {"type": "integer"}}},
                {"type": "object", "properties": {"k": {"$ref": "#/$defs/n"}, "c": {"type": "integer"}}},
            ]
        }
    },
    "$ref": "#/$defs/n",
}


DOUBLED = {
    "$defs": {
        **{f"d{n}": {"allOf": [{"$ref": f"#/$defs/d{n + 1}"}] * 2, "unevaluatedProperties": False} for n in range(25)},
        "d25": {"properties": {"a": {}}},
    },
    "$ref": "#/$defs/d0",
}


def chain(depth: int, last: Any) -> Any:
    value = last
    for _ in range(depth):
        value = {"k": value}
    return value


@pytest.mark.parametrize(
    ("schema", "value", "fits"),
    [
        (NODE, chain(40, {"a": 1}), True),
        (NODE, chain(40, 3), False),
        ({"type": "array", "uniqueItems": True}, [{"i": i, "x": [i]} for i in range(3000)], True),
        ({"type": "array", "uniqueItems": True}, [{"i": i % 2999, "x": []} for i in range(3000)], False),
        ({"enum": list(range(5000))}, 4999, True),
        ({"type": "array", "items": {"type": "array", "uniqueItems": True}}, [[[i] for i in range(500)]] * 10, True),
        ({"type": "array", "uniqueItems": True}, [i * (2**61 - 1) for i in range(3000)], True),  # all hashes collide
        ({"patternProperties": {"^(a+)+$": {"type": "null"}}}, {"a" * 40 + "!": 1}, True),
        ({"anyOf": [{"$ref": "#"}, {"type": "integer"}]}, 3, True),
        ({"anyOf": [{"$ref": "#"}, {"type": "integer"}]}, "x", False),
        (DOUBLED, {"a": 1}, True),
        (DOUBLED, {"b": 1}, False),
    ],
    ids=range(12),
)  # fmt: skip
def test_hostile_schemas_are_checked_quickly(schema: Any, value: Any, fits: bool) -> None:
    start = time.monotonic()
    assert (Validator(schema).problems(value) == []) is fits
    assert time.monotonic() - start < 10


@pytest.mark.parametrize(
    ("schema", "value"),
    [
        ({"type": "string", "pattern": r"^(?=(\w+\s?)+$)"}, "a" * 40 + "!"),
        ({"patternProperties": {r"^(?=(\w+\s?)+$)": {}}}, {"a" * 40 + "!": 1}),
        ({"multipleOf": 0.1}, float("inf")),
        ({"items": {"$ref": "#"}}, json.loads("[" * 400 + "]" * 400)),
    ],
)
def test_unbounded_checks_raise_cannot_check_error(schema: Any, value: Any) -> None:
    validator = Validator(schema)
    with pytest.raises(CannotCheckError):
        validator.problems(value)
    assert problems(validator, value)[0].startswith("$: cannot be checked: ")


def nested(depth: int) -> Any:
    schema: Any = {"type": "integer"}
    for _ in range(depth):
        schema = {"type": "object", "properties": {"a": schema}}
    return schema


def loop() -> Any:
    schema: dict[str, Any] = {"type": "object"}
    schema["properties"] = {"a": schema}
    return schema


@pytest.mark.parametrize(
    ("schema", "problem"),
    [
        ({"$ref": "#"}, "no finite value is valid"),
        ({"items": {"$ref": "#/$defs/x"}, "$defs": {"x": {"$ref": "#/$defs/y"}, "y": {"$ref": "#/$defs/x"}}},
         "no finite value is valid"),
        ({"properties": {"a": {"allOf": [{"$ref": "#/properties/a"}]}}}, "no finite value is valid"),
        ({"type": "object", "properties": {"a": {"$ref": "#"}}, "required": ["a"]}, "no finite value is valid"),
        ({"type": "array", "items": {"$ref": "#"}, "minItems": 1}, "no finite value is valid"),
        ({"anyOf": [{"$ref": "#"}, {"allOf": [{"$ref": "#"}]}]}, "no finite value is valid"),
        ({"$ref": "#/$defs/none"}, "expected a place in this schema"),
        ({"properties": {"enum": {"$ref": "#/nowhere"}}}, "expected a place in this schema"),
        ({"$ref": "https://example.com/x.json"}, "expected a place in this schema"),
        ({"$ref": "file:///etc/passwd"}, "expected a place in this schema"),
        ({"$ref": "#/title", "title": "x"}, "expected a schema there"),
        ({"properties": {"a": {"pattern": "("}}}, r"\$\.properties\.a\.pattern: '\(' is not a regular expression"),
        ({"patternProperties": {"[": {}}}, "is not"),
        ({"type": "strin"}, "'strin' is not valid"),
        ({"type": "object", "properties": []}, r"\$\.properties"),
        ({"const": {1, 2}}, "not JSON"),
        (nested(200), "levels deep"),
        (loop(), "levels deep"),
        ({"enum": list(range(200_000))}, "more than 100000 values"),
    ],
    ids=str,
)  # fmt: skip
def test_unusable_schemas_are_refused_when_the_validator_is_built(schema: Any, problem: str) -> None:
    with pytest.raises(SchemaProblemError, match=problem):
        Validator(schema)
    with pytest.raises(ToolDefinitionError, match="tool 'f', parameters: "):
        CommandTool("f", "", schema, "true")


@pytest.mark.parametrize(
    ("schema", "value"),
    [
        ({"properties": {"next": {"$ref": "#"}}}, {"next": {"next": {}}}),
        ({"anyOf": [{"type": "null"}, {"type": "array", "items": {"$ref": "#"}, "minItems": 1}]}, [[None]]),
        ({"$ref": "#node", "$defs": {"n": {"$anchor": "node", "type": "integer"}}}, 3),
        ({"$id": "https://e.org/s", "$ref": "https://e.org/s#/$defs/n", "$defs": {"n": {"type": "integer"}}}, 3),
        ({"$defs": {"a/b~c": {"type": "integer"}}, "$ref": "#/$defs/a~1b~0c"}, 3),
        ({"properties": {"default": {"type": "integer"}, "enum": {"$ref": "#/properties/default"}}}, {"enum": 1}),
        ({"properties": {"a": False}}, {"b": 1}),
    ],
    ids=str,
)
def test_finite_recursion_and_every_kind_of_reference_are_supported(schema: Any, value: Any) -> None:
    assert Validator(schema).problems(value) == []
    assert Validator({**schema, "not": {}}).problems(value) != []


@pytest.mark.anyio
async def test_a_slow_check_does_not_block_the_event_loop(context: ToolContext) -> None:
    """The event loop stays free during the check, and the error message gives the reason."""
    schema = {"type": "object", "properties": {"v": {"type": "string", "pattern": r"^(?=(\w+\s?)+$)"}}}
    slow = CommandTool("slow", "", schema, "true")
    results: list[ToolResult] = []
    ticks = 0

    async def call() -> None:
        results.append(await slow.call(ToolCall("1", "slow", json.dumps({"v": "a" * 40 + "!"})), context))

    async with anyio.create_task_group() as task_group:
        task_group.start_soon(call)
        while not results:
            await anyio.sleep(0.01)
            ticks += 1
    assert results[0].is_error and "cannot be checked: takes longer than 2 s" in results[0].content
    assert ticks > 20


@pytest.mark.anyio
async def test_a_long_check_gives_the_same_result_in_a_thread(context: ToolContext) -> None:
    schema = {"type": "object", "properties": {"v": {"type": "array", "items": {"type": "integer"}}}}
    counted = CommandTool("counted", "", schema, "true")
    good = await counted.call(ToolCall("1", "counted", json.dumps({"v": [1] * 50_000})), context)
    bad = await counted.call(ToolCall("2", "counted", json.dumps({"v": [1] * 50_000 + ["x"]})), context)
    assert not good.is_error
    assert bad.content == 'Error: invalid arguments for counted: $.v[50000]: given "x" (string), expected integer'


class Left(BaseModel):
    k: Left | Right | None = None
    a: int = 0


class Right(BaseModel):
    k: Left | Right | None = None
    b: int = 0


class Circle(BaseModel):
    kind: Literal["circle"] = "circle"
    radius: int


class Square(BaseModel):
    kind: Literal["square"] = "square"
    side: int


class Point(BaseModel):
    x: int
    y: int = 0


@tool
def shapes(
    tree: Left | Right | None = None,
    p: Point | None = None,
    s: Circle | Square | None = None,
    many: list[Point] | Point | None = None,
    size: Literal["auto"] | int = "auto",
    small: Annotated[int, Field(ge=1)] | None = None,
) -> str:
    return "fine"


@pytest.mark.parametrize("depth", [3, 12, 30, 150])
def test_a_recursive_union_does_not_take_exponential_time(depth: int) -> None:
    start = time.monotonic()
    text = json.dumps({"tree": chain(depth, None)})
    if depth <= 12:
        shapes.parse(text)
    else:
        with pytest.raises(ArgumentsError, match="cannot be checked: nested too deeply"):
            shapes.parse(text)
    assert time.monotonic() - start < 10


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ({"p": {"x": "one"}}, '$.p.x: given "one" (string), expected integer'),
        ({"p": {}}, "$.p.x: missing, expected integer"),
        ({"p": 1}, "$.p: given 1 (integer), expected object with x, y or null"),
        ({"s": {"side": "a"}}, '$.s.side: given "a" (string), expected integer'),
        ({"s": {"kind": "circle", "side": 1}}, "$.s.radius: missing, expected integer"),
        ({"s": {"kind": "square", "side": "1"}}, '$.s.side: given "1" (string), expected integer'),
        ({"many": [{"x": 1}, {"x": "2"}]}, '$.many[1].x: given "2" (string), expected integer'),
        ({"many": {"x": 1, "y": []}}, "$.many.y: given [] (array), expected integer"),
        ({"size": "big"}, '$.size: given "big" (string), expected "auto" or integer'),
        ({"small": 0}, "$.small: given 0 (integer), expected minimum 1"),
    ],
    ids=str,
)
def test_the_most_likely_branch_is_explained(arguments: dict[str, Any], problem: str) -> None:
    with pytest.raises(ArgumentsError) as caught:
        shapes.parse(json.dumps(arguments))
    assert caught.value.problems == [problem]


def test_a_value_matching_two_branches_of_one_of_is_explained() -> None:
    validator = Validator({"oneOf": [{"type": "integer"}, {"type": "number"}]})
    assert problems(validator, 1) == ["$: given 1 (integer), matches 2 of integer or number, expected exactly one"]
    assert problems(validator, "x") == ['$: given "x" (string), expected integer or number']


def test_a_function_tool_with_a_bad_pattern_is_refused_when_it_is_defined() -> None:
    with pytest.raises(ToolDefinitionError, match="tool 'bad', parameter 'v'"):

        @tool
        def bad(v: Annotated[str, Field(pattern="(")]) -> None: ...
