"""Calls and results: return values, errors, deadlines, limits, and the set of built-in tools."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import anyio
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import BaseModel

from agentkit_environments import Environment, SandboxLostError
from agentkit_tools import (
    BUILTINS,
    ImagePart,
    TextPart,
    ToolCall,
    ToolContext,
    ToolDefinitionError,
    ToolError,
    ToolOutput,
    ToolResult,
    cut,
    tool,
    unknown_tool,
)
from agentkit_tools.output import MIN_OUTPUT_BYTES, cut_parts

pytestmark = pytest.mark.anyio
relaxed = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])  # the first example builds tables


class Point(BaseModel):
    x: int


async def run(fn: Callable[..., Any], context: ToolContext, **arguments: Any) -> ToolResult:
    made = tool(name="mine")(fn)
    return await made.call(ToolCall("call_0_0", "mine", json.dumps(arguments)), context)


def test_builtins_in_order_with_their_specs() -> None:
    text = {"type": "string"}
    here = {"type": "string", "default": "."}
    properties = {
        "bash": {"command": text},
        "read_file": {"path": text},
        "write_file": {"path": text, "content": text},
        "edit_file": {"path": text, "old": text, "new": text},
        "list_dir": {"path": here},
        "search": {"pattern": text, "path": here},
        "python": {"code": text},
        "submit": {"answer": text},
    }
    assert list(BUILTINS) == list(properties)
    for name, builtin in BUILTINS.items():
        required = [key for key, schema in properties[name].items() if schema is text]
        parameters: dict[str, Any] = {"type": "object", "properties": properties[name]}
        if required:
            parameters["required"] = required
        function = {"name": name, "description": builtin.description, "parameters": parameters}
        assert builtin.spec == {"type": "function", "function": function}
        assert builtin.description.endswith(".")
    assert {name for name, builtin in BUILTINS.items() if builtin.read_only} == {"read_file", "list_dir", "search"}
    assert {name for name, builtin in BUILTINS.items() if builtin.barrier} == {"submit"}


def test_the_schema_text_is_frozen() -> None:
    """The tiny model was trained on these bytes."""
    assert json.dumps(BUILTINS["search"].spec) == (
        '{"type": "function", "function": {"name": "search", "description": "Search files for a regular expression, '
        'line by line. Returns path:line:text.", '
        '"parameters": {"type": "object", "properties": {"pattern": {"type": "string"}, '
        '"path": {"default": ".", "type": "string"}}, "required": ["pattern"]}}}'
    )


async def test_strings_are_returned_unchanged_and_other_values_as_json(context: ToolContext) -> None:
    returned: list[tuple[Any, str]] = [
        ("é\n", "é\n"),
        ({"é": [1, None]}, '{"é": [1, null]}'),
        (None, "null"),
        (Point(x=1), '{"x": 1}'),
        ([Point(x=1)], '[{"x": 1}]'),
        (ToolOutput("odd", is_error=True), "odd"),
    ]
    for value, content in returned:
        result = await run(_constant(value), context)
        assert result.content == content
        assert result.is_error == isinstance(value, ToolOutput)
        assert (result.call_id, result.name, result.final) == ("call_0_0", "mine", False)


def _constant(value: Any) -> Callable[[], Any]:
    def constant() -> Any:
        return value

    return constant


async def test_sync_functions_leave_the_event_loop_free(context: ToolContext) -> None:
    def thread() -> bool:
        return threading.current_thread() is threading.main_thread()

    async def task() -> bool:
        return threading.current_thread() is threading.main_thread()

    assert (await run(thread, context)).content == "false"
    assert (await run(task, context)).content == "true"


async def test_errors_become_results(context: ToolContext) -> None:
    def fails() -> NoReturn:
        raise KeyError("k")

    def silent() -> NoReturn:
        raise ValueError

    async def says() -> NoReturn:
        raise ToolError("nothing there")

    assert (await run(fails, context)).content == "Error: KeyError: 'k'"
    assert (await run(silent, context)).content == "Error: ValueError"
    result = await run(says, context)
    assert (result.content, result.is_error) == ("Error: nothing there", True)


async def test_invalid_arguments_are_a_result(context: ToolContext) -> None:
    async def fn(path: str) -> str:
        return path

    result = await run(fn, context, path=3)
    assert result.content == "Error: invalid arguments for mine: $.path: given 3 (integer), expected string"
    assert result.is_error


async def test_a_lost_sandbox_is_never_a_result(context: ToolContext) -> None:
    async def lost() -> NoReturn:
        raise SandboxLostError("gone")

    async def lost_in_a_group() -> None:
        async with anyio.create_task_group() as group:
            group.start_soon(lost)

    with pytest.raises(SandboxLostError):
        await run(lost, context)
    with pytest.raises(ExceptionGroup) as caught:
        await run(lost_in_a_group, context)
    assert caught.group_contains(SandboxLostError)


async def test_async_and_sync_functions_have_a_deadline(environment: Environment) -> None:
    release = threading.Event()

    async def never() -> None:
        await anyio.sleep_forever()

    def stuck() -> None:
        release.wait()

    context = ToolContext(environment, timeout_s=0.05)
    assert (await run(never, context)).content == "Error: mine timed out after 0.05 s"
    result = await run(stuck, context)
    release.set()
    assert (result.content, result.is_error) == ("Error: mine timed out after 0.05 s", True)
    assert result.duration_s >= 0.05


async def test_cancellation_is_not_swallowed(context: ToolContext) -> None:
    async def never() -> None:
        await anyio.sleep_forever()

    with anyio.move_on_after(0.02) as scope:
        await run(never, context)
    assert scope.cancelled_caught


async def test_results_are_bounded_except_the_answer(environment: Environment) -> None:
    context = ToolContext(environment, max_output_bytes=200)
    result = await run(_constant("a" * 1000 + "z" * 1000), context)
    assert result.content == "a" * 76 + "\n[... 1848 bytes cut ...]\n" + "z" * 76
    answer = "x" * 1000
    result = await BUILTINS["submit"].call(ToolCall("c", "submit", json.dumps({"answer": answer})), context)
    assert (result.content, result.final, result.is_error) == (answer, True, False)


def test_context_bounds_are_checked() -> None:
    with pytest.raises(ValueError, match="max_output_bytes=10, expected at least 128"):
        ToolContext(None, max_output_bytes=10)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="timeout_s=0, expected a positive"):
        ToolContext(None, timeout_s=0)  # type: ignore[arg-type]


def test_unknown_tool_names_the_available_ones() -> None:
    result = unknown_tool(ToolCall("c", "x", "{}"), ["bash", "submit"])
    assert result == ToolResult("c", "x", 'Error: unknown tool "x"; available: bash, submit', is_error=True)
    assert unknown_tool(ToolCall("c", "x", "{}"), []).content == 'Error: unknown tool "x"; available: none'


async def test_the_readmes_example(context: ToolContext) -> None:
    readme = (Path(__file__).parents[2] / "tools" / "README.md").read_text()
    example: dict[str, Any] = {}
    exec(readme.partition("```python\n")[2].partition("```")[0], example)
    await context.environment.write_file("a", "1\n2\n")
    call = ToolCall("c", "count", '{"path": "a", "what": "lines"}')
    assert (await example["count"].call(call, context)).content == "2"
    assert list(example["count"].parameters["properties"]) == ["path", "what"]


def test_decorator_options() -> None:
    @tool(name="other", description="Says.", read_only=True, barrier=True)
    def fn() -> None:
        """Not this."""

    assert (fn.name, fn.description, fn.read_only, fn.barrier) == ("other", "Says.", True, True)
    assert repr(fn) == "FunctionTool('other')"
    with pytest.raises(ToolDefinitionError):
        tool(lambda: None)


@relaxed
@given(st.text(), st.integers(1, 300), st.integers(MIN_OUTPUT_BYTES, 600))
def test_cut_is_bounded_keeps_characters_whole_and_counts_bytes(text: str, repeat: int, max_bytes: int) -> None:
    text *= repeat
    short = cut(text, max_bytes)
    data = text.encode()
    assert len(short.encode()) <= max_bytes
    if len(data) <= max_bytes:
        assert short == text
        return
    head, notice, tail = short.rpartition(" bytes cut ...]\n")
    head, _, count = head.rpartition("\n[... ")
    assert notice
    assert text.startswith(head)
    assert text.endswith(tail)
    assert int(count) == len(data) - len(head.encode()) - len(tail.encode())
    assert len(head.encode()) + len(tail.encode()) >= max_bytes - 48 - 1 - 6  # one odd byte and two split characters


@relaxed
@given(st.integers(MIN_OUTPUT_BYTES, 2000), st.integers(0, 10**15))
def test_cut_adds_the_count_of_an_earlier_cut(max_bytes: int, earlier: int) -> None:
    text = "a" * max_bytes + f"\n[... {earlier} bytes cut ...]\n" + "z" * max_bytes
    head, _, rest = cut(text, max_bytes).partition("\n[... ")
    count, _, tail = rest.partition(" bytes cut ...]\n")
    assert int(count) + len(head) + len(tail) == 2 * max_bytes + earlier


def test_large_images_are_left_out() -> None:
    """One image may have 5 MiB, and the images of a result 20 MiB together."""
    large, small = ImagePart.of(bytes((5 << 20) + 1), "image/png"), ImagePart.of(bytes(5 << 20), "image/png")
    kept = cut_parts([large, *[small] * 5, TextPart("end")], 1000)
    assert [isinstance(part, ImagePart) for part in kept] == [False, True, True, True, True, False, False]
    assert isinstance(kept[0], TextPart) and "is larger than 5,242,880 bytes and was left out" in kept[0].text
    assert isinstance(kept[5], TextPart) and "was left out: a result has 20,971,520 bytes" in kept[5].text
    assert kept[6] == TextPart("end")
