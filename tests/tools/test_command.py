"""`CommandTool`: tools declared by a task."""

from __future__ import annotations

from typing import Any

import pytest

from agentkit_tools import CommandTool, ToolCall, ToolContext, ToolDefinitionError, ToolResult

pytestmark = pytest.mark.anyio

PARAMETERS: dict[str, Any] = {
    "type": "object",
    "properties": {"word": {"type": "string"}, "times": {"type": "integer", "minimum": 1}},
    "required": ["word"],
    "additionalProperties": False,
}


async def run(command: str, arguments: str, context: ToolContext) -> ToolResult:
    return await CommandTool("mine", "Do it.", PARAMETERS, command).call(ToolCall("c", "mine", arguments), context)


def test_spec_is_as_written() -> None:
    made = CommandTool("mine", "Do it.", PARAMETERS, "cat", read_only=True)
    assert made.spec["function"] == {"name": "mine", "description": "Do it.", "parameters": PARAMETERS}
    assert (made.read_only, made.barrier) == (True, False)


@pytest.mark.parametrize(
    ("command", "content", "is_error"),
    [
        ("cat", '{"word": "é\\n", "times": 2}', False),
        ("true", "(no output)", False),
        ("echo out; echo err >&2; exit 9", "out\nerr\n[exit code 9]", True),
        ("python3 -c 'import json, sys; print(json.load(sys.stdin)[\"times\"])'", "2", False),
    ],
)
async def test_arguments_on_stdin(context: ToolContext, command: str, content: str, is_error: bool) -> None:
    result = await run(command, '{"word": "\\u00e9\\n", "times": 2}', context)
    assert (result.content, result.is_error) == (content, is_error)


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ("{}", "$.word: missing, expected string"),
        ('{"word": 1}', "$.word: given 1 (integer), expected string"),
        ('{"word": "a", "times": 0}', "$.times: given 0 (integer), expected minimum 1"),
        ('{"word": "a", "x": 0}', "$.x: unknown parameter, expected word, times"),
        ("null", "$: given null, expected object"),
        (
            '{"word": NaN}',
            "$: not valid JSON: expected value at line 1 column 10, expected an object",
        ),
    ],
)
async def test_invalid_arguments_run_nothing(context: ToolContext, arguments: str, problem: str) -> None:
    result = await run("touch ran", arguments, context)
    assert (result.content, result.is_error) == (f"Error: invalid arguments for mine: {problem}", True)
    with pytest.raises(FileNotFoundError):
        await context.environment.read_file("ran")


async def test_timeout_names_the_tool(context: ToolContext) -> None:
    context.timeout_s = 0.3
    assert (await run("echo a; sleep 30", '{"word": "a"}', context)).content == "Error: mine timed out after 0.3 s\na"


def test_bad_definitions() -> None:
    with pytest.raises(ToolDefinitionError, match="command is empty"):
        CommandTool("mine", "", PARAMETERS, " ")
    with pytest.raises(ToolDefinitionError, match="tool 'mine', parameters"):
        CommandTool("mine", "", {"type": "array"}, "cat")
    with pytest.raises(ToolDefinitionError, match="tool name 'a b'"):
        CommandTool("a b", "", PARAMETERS, "cat")
