"""Return values and exceptions of a tool become text; exceptions that belong to the agent loop propagate."""

from __future__ import annotations

import asyncio
import collections
import dataclasses
import datetime
import decimal
import enum
import json
import math
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import anyio
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, ConfigDict

from agentkit_environments import SandboxLostError
from agentkit_tools import ToolCall, ToolContext, ToolError, ToolOutput, ToolResult, as_tool
from agentkit_tools.results import error_text, value_text

pytestmark = pytest.mark.anyio


async def run(fn: Callable[..., Any], context: ToolContext) -> ToolResult:
    return await as_tool(fn).call(ToolCall("c", "fn", ""), context)


class Model(BaseModel):
    model_config = ConfigDict(arbitrary_types_allowed=True)
    x: int = 1
    other: object = None


@dataclasses.dataclass
class Data:
    raw: bytes = b"\xff"
    other: object = None


class Bare: ...


class Own:
    def __repr__(self) -> str:
        return "Own(\ud800)"


class Broken:
    def __str__(self) -> str:
        raise ValueError("no")

    __repr__ = __str__


class BrokenMapping(collections.UserDict[str, int]):
    def items(self) -> NoReturn:
        raise KeyError("no")


class Color(enum.Enum):
    RED = "red"


class Word(enum.StrEnum):
    GO = "go"


Pair = collections.namedtuple("Pair", "a b")
circular_list: list[Any] = [1]
circular_list.append(circular_list)
circular_dict: dict[str, Any] = {}
circular_dict["me"] = {"again": circular_dict}
circular_data = Data(b"")
circular_data.other = circular_data
circular_model = Model()
circular_model.other = [circular_model]
deep: list[Any] = []
for _ in range(100_000):
    deep = [deep]

RESULTS: list[tuple[Any, str]] = [
    (b"text \xc3\xa9", "text é"),
    (b"", ""),
    (b"\xff\xfe", "<2 bytes of binary data>"),
    (b"a\0b", "<3 bytes of binary data>"),
    (bytearray(b"x"), "x"),
    (memoryview(b"x"), "x"),
    ({"b": b"\xff", "t": b"t"}, '{"b": "<1 bytes of binary data>", "t": "t"}'),
    (Model(), '{"x": 1, "other": null}'),
    (Model(other=Bare()), '{"x": 1, "other": "<Bare object>"}'),
    ([Data(), Data(b"t")], '[{"raw": "<1 bytes of binary data>", "other": null}, {"raw": "t", "other": null}]'),
    ({3, 1, 2}, "[1, 2, 3]"),
    ({"b", "a"}, '["a", "b"]'),
    ({"x": frozenset([(2, "b"), (1, "a")])}, '{"x": [[1, "a"], [2, "b"]]}'),
    (datetime.datetime(2020, 1, 2), '"2020-01-02T00:00:00"'),
    ({"price": decimal.Decimal("1.10")}, '{"price": "1.10"}'),
    (math.nan, "NaN"),
    ([math.inf], "[Infinity]"),
    (circular_list, '[1, "<circular reference>"]'),
    (circular_dict, '{"me": {"again": "<circular reference>"}}'),
    (circular_data, '{"raw": "", "other": "<circular reference>"}'),
    (circular_model, '{"x": 1, "other": ["<circular reference>"]}'),
    (deep, "[" * 64 + '"<list, nested too deeply to show>"' + "]" * 64),
    ([[1]] * 2, "[[1], [1]]"),
    (10**5000, "<integer of 16610 bits>"),
    ({"n": 10**5000}, '{"n": "<integer of 16610 bits>"}'),
    (Bare(), "<Bare object>"),
    (Own(), "Own(\N{REPLACEMENT CHARACTER})"),
    (Broken(), "<Broken that cannot be shown>"),
    ([Broken(), 1], '["<Broken that cannot be shown>", 1]'),
    (BrokenMapping(a=1), "<BrokenMapping that cannot be shown>"),
    ("\ud83d\ude00 \ud800", "😀 \N{REPLACEMENT CHARACTER}"),
    ({"\ud800": ["\udfff"]}, '{"\N{REPLACEMENT CHARACTER}": ["\N{REPLACEMENT CHARACTER}"]}'),
    ({(1, 2): 1, Color.RED: 2, Own(): 3}, '{"1,2": 1, "red": 2, "Own(\N{REPLACEMENT CHARACTER})": 3}'),
    (Color.RED, '"red"'),
    (Word.GO, "go"),
    ([Color.RED, Word.GO], '["red", "go"]'),
    (Pair(1, 2), "[1, 2]"),
    (range(3), "[0, 1, 2]"),
    ({"a": 1}.keys(), '["a"]'),
    ({"a": 1}.items(), '[["a", 1]]'),
    (collections.deque([1]), "[1]"),
    (collections.UserDict(a=1), '{"a": 1}'),
    ({"g": (n for n in range(3))}, '{"g": "<a generator>"}'),
    (KeyError("k"), "KeyError: 'k'"),
    (ToolOutput(5), "5"),  # type: ignore[arg-type]
    (ToolOutput(b"\xff"), "<1 bytes of binary data>"),  # type: ignore[arg-type]
]


@pytest.mark.parametrize(("value", "content"), RESULTS, ids=range(len(RESULTS)))
async def test_any_return_value_is_a_result(context: ToolContext, value: Any, content: str) -> None:
    def returns() -> Any:
        return value

    async def returns_later() -> Any:
        return value

    for fn in (returns, returns_later):
        result = await run(fn, context)
        assert (result.content, result.is_error) == (content, False)


async def numbers() -> AsyncIterator[int]:
    yield 1


class Later:
    def __await__(self) -> Iterator[Any]:
        return iter(())


@pytest.mark.parametrize(
    ("make", "content"),
    [
        (numbers, "Error: the tool returned an async generator (async_generator); collect its items and return a list"),
        (lambda: (n for n in "ab"), "Error: the tool returned a generator (generator); return a list of its items"),
        (lambda: map(str, [1]), "Error: the tool returned an iterator (map); return a list of its items"),
    ],
)
async def test_iterators_and_awaitables_are_errors_with_a_remedy(
    context: ToolContext, make: Callable[[], Any], content: str
) -> None:
    def returns() -> Any:
        return make()

    result = await run(returns, context)
    assert (result.content, result.is_error) == (content, True)


class BrokenError(Exception):
    def __str__(self) -> str:
        raise SystemExit(1)


ERRORS: list[tuple[BaseException, str]] = [
    (SystemExit(3), "SystemExit: 3"),
    (SystemExit(), "SystemExit"),
    (KeyboardInterrupt("me"), "KeyboardInterrupt: me"),
    (GeneratorExit(), "GeneratorExit"),
    (StopIteration(4), "RuntimeError: coroutine raised StopIteration"),
    (StopAsyncIteration(), "StopAsyncIteration"),
    (asyncio.CancelledError("why"), "CancelledError: why"),
    (RecursionError("deep"), "RecursionError: deep"),
    (MemoryError(), "MemoryError"),
    (BaseException("base"), "BaseException: base"),
    (
        ExceptionGroup("many", [ValueError("a"), ExceptionGroup("more", [KeyError("b")])]),
        "ExceptionGroup: many (2 sub-exceptions): ValueError: a; KeyError: 'b'",
    ),
    (BaseExceptionGroup("hard", [SystemExit(2)]), "BaseExceptionGroup: hard (1 sub-exception): SystemExit: 2"),
    (BrokenError(), "BrokenError: <its message cannot be shown: SystemExit>"),
    (ValueError("\ud800"), "ValueError: \N{REPLACEMENT CHARACTER}"),
    (ToolError("\ud800"), "\N{REPLACEMENT CHARACTER}"),
]


@pytest.mark.parametrize(("error", "content"), ERRORS, ids=[type(error).__name__ for error, _ in ERRORS])
async def test_any_exception_of_a_tool_is_its_result(context: ToolContext, error: BaseException, content: str) -> None:
    def fails() -> NoReturn:
        raise error

    async def fails_later() -> NoReturn:
        raise error

    def fails_in_a_coroutine() -> Any:
        return fails_later()

    for fn in (fails, fails_later, fails_in_a_coroutine):
        result = await run(fn, context)
        assert (result.content, result.is_error) == (f"Error: {content}", True)
        await anyio.lowlevel.checkpoint()  # the task is not left cancelled


async def test_a_tools_own_cancellation_and_exit_do_not_propagate(context: ToolContext) -> None:
    async def awaits_a_cancelled_task() -> None:
        task = asyncio.create_task(asyncio.sleep(60))
        task.cancel()
        await task

    async def cancels_its_own_scope() -> str:
        with anyio.CancelScope() as scope:
            scope.cancel()
            await anyio.sleep(60)
        return "went on"

    async def exits() -> None:
        sys.exit("bye")

    def recurses() -> Any:
        return recurses()

    assert (await run(awaits_a_cancelled_task, context)).content == "Error: CancelledError"
    assert (await run(cancels_its_own_scope, context)).content == "went on"
    assert (await run(exits, context)).content == "Error: SystemExit: bye"
    assert (await run(recurses, context)).content.startswith("Error: RecursionError: maximum recursion depth")


async def test_a_cancellation_from_outside_propagates(context: ToolContext) -> None:
    """The cancellation comes from a scope or from asyncio."""
    started = anyio.Event()

    async def waits() -> None:
        started.set()
        await anyio.sleep_forever()

    with anyio.CancelScope() as scope:
        async with anyio.create_task_group() as task_group:
            task_group.start_soon(run, waits, context)
            await started.wait()
            scope.cancel()
    assert scope.cancelled_caught

    started = anyio.Event()
    task = asyncio.ensure_future(run(waits, context))
    await started.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_a_lost_sandbox_propagates_through_threads_and_groups(context: ToolContext) -> None:
    def lost() -> NoReturn:
        raise SandboxLostError("gone")

    def lost_in_a_group() -> NoReturn:
        raise BaseExceptionGroup("g", [SystemExit(1), ExceptionGroup("h", [SandboxLostError("gone")])])

    with pytest.raises(SandboxLostError):
        await run(lost, context)
    with pytest.raises(BaseExceptionGroup):
        await run(lost_in_a_group, context)


async def test_the_coroutine_of_a_call_can_be_closed(context: ToolContext) -> None:
    async def waits() -> None:
        await asyncio.sleep(60)

    coroutine = run(waits, context)
    coroutine.send(None)
    coroutine.close()  # raises RuntimeError if GeneratorExit is swallowed


PROGRAM = """
import os, signal, time
import anyio
from agentkit_environments import EnvironmentSpec, open_environment
from agentkit_tools import ToolCall, ToolContext, tool

def leave(number, frame):
    raise SystemExit(5)

@tool
async def blocks() -> None:
    print("begun", flush=True)
    while True:
        time.sleep(0.01)

async def main():
    async with await open_environment(EnvironmentSpec(), backend="unsafe-local") as environment:
        result = await blocks.call(ToolCall("c", "blocks", ""), ToolContext(environment))
        print(result.content, flush=True)

signal.signal(signal.SIGTERM, leave)
signal.signal(signal.SIGINT, signal.default_int_handler)  # a background shell may have had it ignored
try:
    anyio.run(main)
except (KeyboardInterrupt, SystemExit) as error:
    os._exit(6 if isinstance(error, KeyboardInterrupt) else error.code)
"""


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 5), (signal.SIGINT, 6)])
def test_signals_during_a_tool_end_the_program(tmp_path: Path, number: int, code: int) -> None:
    """The tool blocks the event loop, so only the second Ctrl-C raises an exception, in the middle of the tool."""
    script = tmp_path / "program.py"
    script.write_text(PROGRAM)
    with subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True, env=os.environ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "begun\n"
        for _ in range(60):
            process.send_signal(number)
            try:
                assert process.wait(1) == code
                break
            except subprocess.TimeoutExpired:
                continue
        assert process.stdout.read() == ""


any_value = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(st.characters())
    | st.binary()
    | st.datetimes()
    | st.decimals()
    | st.builds(Bare)
    | st.builds(Broken),
    lambda inner: st.lists(inner) | st.tuples(inner) | st.dictionaries(st.text() | st.integers() | st.none(), inner),
    max_leaves=10,
)


@settings(deadline=None)
@given(any_value)
def test_the_text_of_any_value_is_encodable_and_deterministic(value: Any) -> None:
    text = value_text(value)
    text.encode()
    assert value_text(value) == text
    if isinstance(value, dict | list | tuple):
        json.loads(text)
    error_text(ValueError(value)).encode()
