"""Functions as tools: supported functions and parameters, and direct calls."""

from __future__ import annotations

import asyncio
import collections
import dataclasses
import datetime
import decimal
import enum
import functools
import inspect
import json
import math
import pathlib
import threading
import typing
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Annotated, Any, Literal, NamedTuple, TypedDict

import pytest
from pydantic import BaseModel, Field

import agentkit_tools.function as function_module
from agentkit_tools import (
    BUILTINS,
    ArgumentsError,
    CommandTool,
    FunctionTool,
    ToolCall,
    ToolContext,
    ToolDefinitionError,
    ToolOutput,
    as_tool,
    tool,
)

pytestmark = pytest.mark.anyio


async def run(made: Any, context: ToolContext, **arguments: Any) -> str:
    result = await as_tool(made).call(ToolCall("c", "mine", json.dumps(arguments)), context)
    return result.content


def add(a: int, b: int = 2) -> int:
    """Add two numbers."""
    return a + b


async def add_later(a: int, b: int = 2) -> int:
    """Add two numbers, some time."""
    return a + b


class Counter:
    """Counts."""

    def __init__(self) -> None:
        self.count = 0

    def up(self, by: int = 1) -> int:
        """Count up."""
        self.count += by
        return self.count

    @classmethod
    def kind(cls, word: str) -> str:
        return f"{cls.__name__} {word}"

    @staticmethod
    def double(n: int) -> int:
        return 2 * n

    async def __call__(self, by: int) -> int:
        """Count down."""
        self.count -= by
        return self.count


def logged(fn: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(fn)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return fn(*args, **kwargs)

    return wrapper


async def test_supported_functions(context: ToolContext) -> None:
    counter = Counter()
    cases: list[tuple[Any, str, str, dict[str, Any], str]] = [
        (add, "add", "Add two numbers.", {"a": 1}, "3"),
        (add_later, "add_later", "Add two numbers, some time.", {"a": 1, "b": 5}, "6"),
        (tool(add), "add", "Add two numbers.", {"a": 1}, "3"),
        (counter.up, "up", "Count up.", {"by": 3}, "3"),
        (Counter.kind, "kind", "", {"word": "x"}, '"Counter x"'[1:-1]),
        (Counter.double, "double", "", {"n": 4}, "8"),
        (functools.partial(add, b=5), "add", "Add two numbers.", {"a": 1}, "6"),
        (functools.partial(add, 7), "add", "Add two numbers.", {"b": 1}, "8"),
        (functools.partial(add_later, 7), "add_later", "Add two numbers, some time.", {}, "9"),
        (functools.partial(functools.partial(add, a=1), b=1), "add", "Add two numbers.", {}, "2"),
        (logged(add), "add", "Add two numbers.", {"a": 1}, "3"),
        (logged(add_later), "add_later", "Add two numbers, some time.", {"a": 1}, "3"),
        (logged(functools.partial(logged(add_later), b=1)), "add_later", "Add two numbers, some time.", {"a": 1}, "2"),
        (functools.lru_cache(add), "add", "Add two numbers.", {"a": 1}, "3"),
        (tool(name="down")(counter), "down", "Count down.", {"by": 1}, "2"),
        (tool(name="two")(lambda: 2), "two", "", {}, "2"),
    ]
    for made, name, description, arguments, content in cases:
        ready = as_tool(made)
        assert (ready.name, ready.description) == (name, description)
        assert await run(ready, context, **arguments) == content


def test_arguments_bound_by_a_partial_are_hidden() -> None:
    def fetch(url: str, secret: str, retries: int = 3) -> str:
        return url + secret

    made = as_tool(functools.partial(fetch, secret="hidden"))
    assert list(made.parameters["properties"]) == ["url", "retries"]
    assert "hidden" not in json.dumps(made.spec)
    with pytest.raises(ArgumentsError, match=r"\$\.secret: unknown parameter"):
        made.parse('{"url": "u", "secret": "mine"}')

    behind = as_tool(logged(functools.partial(fetch, secret="hidden")))
    assert behind.spec == made.spec


def test_as_tool_returns_tools_unchanged() -> None:
    command = CommandTool("c", "", {"type": "object"}, "true")
    for made in (command, BUILTINS["bash"], tool(add)):
        assert as_tool(made) is made


class Silent:
    def __call__(self, a: int) -> int:
        return a


def circle() -> Callable[[], None]:
    def fn() -> None: ...

    fn.__wrapped__ = fn  # type: ignore[attr-defined]
    return fn


def generates(n: int) -> Iterator[int]:
    yield n


async def generates_later(n: int) -> AsyncIterator[int]:
    yield n


class Yielding:
    def __call__(self) -> Iterator[int]:
        yield 1


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        (lambda x: x, "has no name; use def or tool"),
        (Silent(), "has no name; use def or tool"),
        (Silent, "given the class Silent, expected a function"),
        (functools.partial(Silent), "expected a function; write a function that calls it"),
        (FunctionTool, "given the class FunctionTool, expected a tool; pass an instance"),
        ("bash", "given the text 'bash', expected a tool or a function; look up built-in tools by name"),
        (None, "given None, expected a function"),
        ({"type": "function"}, "expected a function"),
        (len, "parameter 'obj': is positional-only"),
        (max, "has no signature; call it from a function with typed parameters"),
        (print, "expected a named parameter; declare each one"),
        (Counter.up, "parameter 'self': has no type annotation.*pass `instance.method`"),
        (vars(Counter)["kind"], "expected a function"),
        (generates, "tool 'generates': is a generator, but a call returns one result; collect the items"),
        (generates_later, "tool 'generates_later': is an async generator, but a call returns one result"),
        (functools.partial(generates, 1), "is a generator"),
        (functools.partial(generates_later, 1), "is an async generator"),
        (Yielding(), "is a generator"),
        (circle(), "expected a function: wrapper loop"),
    ],
)
def test_unsupported_objects_are_refused_with_a_remedy(given: Any, reason: str) -> None:
    with pytest.raises(ToolDefinitionError, match=reason):
        as_tool(given)


def test_a_method_decorated_in_its_class_is_refused_with_a_remedy() -> None:
    with pytest.raises(ToolDefinitionError, match=r"pass `instance\.method`"):

        class Service:
            @tool
            def ask(self, text: str) -> str:
                return text


async def test_a_decorated_function_can_be_called_directly() -> None:
    sync, later = tool(add), tool(read_only=True)(add_later)
    typing.assert_type(sync(1, 2), int)
    typing.assert_type(await later(1), int)
    assert (sync(1, 2), sync(a=1), await later(1, 2), await later(a=5)) == (3, 3, 3, 7)
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'a'"):
        sync()  # type: ignore[call-arg]
    pairs: list[tuple[FunctionTool[..., Any], Callable[..., Any]]] = [(sync, add), (later, add_later)]
    for made, fn in pairs:
        assert vars(made)["__name__"] == fn.__name__
        assert made.__doc__ == fn.__doc__
        assert made.__wrapped__ is fn
        assert made.__module__ == __name__
        assert inspect.signature(made) == inspect.signature(fn)


async def test_a_direct_call_passes_the_context_like_any_argument(context: ToolContext) -> None:
    @tool
    async def read(path: str, context: ToolContext) -> str:
        return (await context.environment.read_file(path)).decode()

    await context.environment.write_file("a", "text")
    assert await read("a", context) == await read(path="a", context=context) == "text"
    with pytest.raises(TypeError, match="'context'"):
        await read("a")  # type: ignore[call-arg]


async def test_a_direct_call_raises_what_the_function_raises() -> None:
    @tool
    def fails(n: int) -> int:
        return 1 // n

    with pytest.raises(ZeroDivisionError):
        fails(0)


async def test_every_context_parameter_receives_the_context(context: ToolContext) -> None:
    def optional(context: ToolContext | None = None) -> bool:
        return context is not None

    def described(where: Annotated[ToolContext, "Where."]) -> bool:
        return where is context

    def twice(one: ToolContext, other: ToolContext) -> bool:
        return one is other

    for fn in (optional, described, twice):
        assert as_tool(fn).parameters == {"type": "object", "properties": {}}
        assert await run(fn, context) == "true"


def test_tools_need_an_environment_unless_they_are_functions_without_a_context() -> None:
    def plain(x: int) -> int:
        return x

    def with_context(x: int, context: ToolContext | None = None) -> int:
        return x

    assert not as_tool(plain).needs_environment
    assert as_tool(with_context).needs_environment
    assert [name for name, built_in in BUILTINS.items() if not built_in.needs_environment] == ["submit"]
    assert CommandTool("count", "Count.", {"type": "object"}, "wc").needs_environment


async def test_parameter_names_do_not_collide_with_internal_names(context: ToolContext) -> None:
    def fn(self: int, args: int, kwargs: int, func: int, name: int, call: int) -> int:
        return self + args + kwargs + func + name + call

    assert await run(fn, context, self=1, args=2, kwargs=3, func=4, name=5, call=6) == "21"


async def test_fields_as_defaults(context: ToolContext) -> None:
    def fn(
        x: int = Field(3, ge=1, description="The x."),
        y: Annotated[int, Field(5, le=9)] = 7,
        z: Annotated[int, Field(5)] = Field(6),
        made: list[int] = Field(default_factory=lambda: [1]),  # noqa: B008
    ) -> list[Any]:
        made.append(x)
        return [x, y, z, made]

    made = tool(fn)
    assert made.parameters["properties"] == {
        "x": {"type": "integer", "minimum": 1, "default": 3, "description": "The x."},
        "y": {"type": "integer", "maximum": 9, "default": 7},
        "z": {"type": "integer", "default": 6},
        "made": {"type": "array", "items": {"type": "integer"}},
    }
    assert "required" not in made.parameters
    for _ in range(2):
        assert await run(made, context) == "[3, 7, 6, [1, 3]]"
        assert made() == made(3) == made(x=3) == [3, 7, 6, [1, 3]]
    assert (
        await run(made, context, x=0)
        == "Error: invalid arguments for mine: $.x: given 0 (integer)".replace("mine", "fn") + ", expected minimum 1"
    )

    def needed(x: int = Field(..., ge=1), y: int = Field(ge=1)) -> int:
        return x + y

    assert as_tool(needed).parameters["required"] == ["x", "y"]
    assert await run(needed, context, x=1, y=1) == "2"


@pytest.mark.parametrize(
    ("default", "reason"),
    [
        (Field("three"), "default 'three' does not fit its type <class 'int'>"),
        (Field(0, ge=1), "default 0 does not fit its type"),
        (Field(3, alias="other"), "rename the parameter instead"),
        (Field(3, max_length=2), "default 3 does not fit"),
        (Field(default_factory=lambda: 1 // 0), "its default_factory fails"),
        (Field(default_factory=lambda data: 1), "default_factory"),
    ],
)
def test_invalid_fields_are_refused(default: Any, reason: str) -> None:
    def fn(x: int) -> int:
        return x

    fn.__defaults__ = (default,)
    with pytest.raises(ToolDefinitionError, match=f"tool 'fn', parameter 'x'.*{reason}"):
        as_tool(fn)


MISSING = object()


async def test_defaults_are_applied_by_python_itself(context: ToolContext) -> None:
    def fn(
        mark: Any = MISSING,
        limit: float = math.inf,
        names: set[str] = set(),  # noqa: B006
        data: bytes = b"\xff",
        ratio: float = math.nan,
    ) -> list[bool]:
        return [mark is MISSING, limit == math.inf, names == set(), data == b"\xff", math.isnan(ratio)]

    made = as_tool(fn)
    shown = {name: schema["default"] for name, schema in made.parameters["properties"].items() if "default" in schema}
    assert shown == {"names": []}
    json.dumps(made.spec, allow_nan=False)
    assert await run(fn, context) == "[true, true, true, true, true]"


class Plain(TypedDict):
    a: int
    b: typing.NotRequired[str]


class Partly(Plain, total=False):
    inner: list[Plain]


class Tree(TypedDict):
    children: list[Tree]


class Pair(NamedTuple):
    x: int
    y: str = "q"


class Color(enum.Enum):
    RED = "red"


class Word(enum.StrEnum):
    GO = "go"


@dataclasses.dataclass
class Box:
    size: int


T = typing.TypeVar("T")


class Holder(BaseModel, typing.Generic[T]):
    held: T


@pytest.mark.parametrize(
    ("kind", "given", "value"),
    [
        (Plain, {"a": 1}, {"a": 1}),
        (Partly, {"a": 1, "inner": [{"a": 2, "b": "c"}]}, {"a": 1, "inner": [{"a": 2, "b": "c"}]}),
        (list[Plain] | None, [{"a": 1}], [{"a": 1}]),
        (dict[str, Annotated[Plain, "Text."]], {"k": {"a": 1}}, {"k": {"a": 1}}),
        (Pair, [1, "a"], Pair(1, "a")),
        (Color, "red", Color.RED),
        (Literal[Word.GO], "go", Word.GO),
        (Box, {"size": 1}, Box(1)),
        (Holder[int], {"held": 1}, Holder[int](held=1)),
        (T, [1], [1]),
        (datetime.datetime, "2024-01-02T03:04:05", datetime.datetime(2024, 1, 2, 3, 4, 5)),
        (datetime.timedelta, "PT5S", datetime.timedelta(seconds=5)),
        (pathlib.Path, "a/b", pathlib.Path("a/b")),
        (uuid.UUID, "12345678-1234-5678-1234-567812345678", uuid.UUID("12345678-1234-5678-1234-567812345678")),
        (decimal.Decimal, "1.50", decimal.Decimal("1.50")),
        (decimal.Decimal, 1.5, decimal.Decimal("1.5")),
        (bytes, "é", "é".encode()),
        (set[int], [1, 2], {1, 2}),
        (tuple[int, str], [1, "a"], (1, "a")),
        (collections.abc.Sequence[int], [1], [1]),
        (collections.deque[int], [1], collections.deque([1])),
        (typing.Final[int], 1, 1),
        (complex, "1+2j", 1 + 2j),
        (None, None, None),
    ],
)
def test_supported_types(kind: Any, given: Any, value: Any) -> None:
    def fn(x: Any) -> None: ...

    fn.__annotations__["x"] = kind
    assert tool(fn).parse(json.dumps({"x": given})) == {"x": value}
    with pytest.raises(ArgumentsError, match=r"\$\.x: missing"):
        tool(fn).parse("{}")


@dataclasses.dataclass
class Outer:
    plain: Plain


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (Tree, "TypedDict 'Tree' contains itself; import TypedDict from typing_extensions"),
        (Outer, "typing_extensions.TypedDict"),
        (Literal[Color.RED], "cannot be read from JSON; write its value"),
        (type[int], "has no JSON schema"),
        (list[type], "has no JSON schema"),
        (typing.ClassVar[int], "has no JSON schema"),
        (typing.TextIO, "has no JSON schema"),
        (Callable[[int], str], "has no JSON schema"),
        (Awaitable[int], "has no JSON schema"),
        (asyncio.Event, "has no JSON schema"),
        ("Nowhere", "cannot be resolved"),
        ("1 / 0", r"cannot be resolved \(division by zero\)"),
        ("x y", "cannot be resolved"),
    ],
)
def test_unsupported_types_are_refused_by_name(kind: Any, reason: str) -> None:
    def fn(x: Any) -> None: ...

    fn.__annotations__["x"] = kind
    with pytest.raises(ToolDefinitionError, match=f"tool 'fn', parameter 'x'.*{reason}"):
        tool(fn)


async def test_local_types_resolve_in_another_scope(context: ToolContext) -> None:
    """Annotations in this module are strings, so they have to be resolved."""

    class Local(BaseModel):
        n: int

    class Record(TypedDict):
        local: Local

    def fn(value: Local, record: Record) -> int:
        return value.n + record["local"].n

    def make_elsewhere() -> str:
        return as_tool(fn).name

    assert make_elsewhere() == "fn"
    arguments = {"value": {"n": 1}, "record": {"local": {"n": 2}}}
    assert await run(fn, context, **arguments) == await run(tool(fn), context, **arguments) == "3"


async def test_a_type_in_a_closure_resolves_after_its_scope_ended(context: ToolContext) -> None:
    def factory() -> Callable[..., Any]:
        class Local(BaseModel):
            n: int

        def fn(value: Local) -> bool:
            return isinstance(value, Local)

        return fn

    assert await run(factory(), context, value={"n": 1}) == "true"


async def test_the_return_value_decides_if_a_call_is_async(context: ToolContext) -> None:
    def returns_coroutine(n: int) -> Any:
        return add_later(n)

    async def forgets_to_await(n: int) -> Any:
        return add_later(n)

    def runs_its_own_loop(n: int) -> int:
        return asyncio.run(add_later(n))

    def asks_for_a_thread() -> bool:
        return threading.current_thread() is not threading.main_thread()

    async def asks_for_the_loop() -> bool:
        return threading.current_thread() is threading.main_thread()

    for fn in (returns_coroutine, forgets_to_await, runs_its_own_loop):
        assert await run(fn, context, n=1) == "3"
    for question in (asks_for_a_thread, asks_for_the_loop, logged(asks_for_a_thread), logged(asks_for_the_loop)):
        assert await run(question, context) == "true"


async def test_a_tool_output_keeps_its_flags_behind_a_wrapper(context: ToolContext) -> None:
    async def says() -> ToolOutput:
        return ToolOutput("odd", is_error=True)

    result = await as_tool(logged(says)).call(ToolCall("c", "says", ""), context)
    assert (result.content, result.is_error) == ("odd", True)


def test_options_are_checked_when_the_tool_is_defined() -> None:
    for options in ({"name": "a b"}, {"name": 3}, {"description": 3}):
        with pytest.raises(ToolDefinitionError, match="expected"):
            tool(**options)(add)
    with pytest.raises(ToolDefinitionError, match=r"to name a tool, write tool\(name='sum'\)"):
        tool("sum")  # type: ignore[call-overload]
    assert tool()(add).name == "add"


async def test_a_large_result_is_converted_to_text_in_a_thread(
    context: ToolContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The conversion of a small result would cost less than the thread."""
    converted_in: list[int] = []
    output = function_module._output

    def noted(value: object) -> Any:
        converted_in.append(threading.get_ident())
        return output(value)

    monkeypatch.setattr(function_module, "_output", noted)

    async def large() -> list[list[int]]:
        return [[1, 2, 3]] * 300_000

    async def small() -> list[int]:
        return [1, 2, 3]

    content = await run(large, context)
    assert content.startswith("[[1, 2, 3], ")
    assert " bytes cut ...]" in content
    assert await run(small, context) == "[1, 2, 3]"
    assert converted_in[0] != threading.get_ident() == converted_in[1]
