"""`bash`: the exact result texts."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import pytest

from agentkit_environments import EnvironmentSpec, open_environment
from agentkit_tools import BUILTINS, ToolCall, ToolContext, ToolResult

pytestmark = pytest.mark.anyio
Call = Callable[..., Awaitable[ToolResult]]


@pytest.mark.parametrize(
    ("command", "content", "is_error"),
    [
        ("echo hello", "hello", False),
        ("true", "(no output)", False),
        ("printf 'a\\n\\n'", "a\n", False),
        ("echo out; echo err >&2", "out\nerr", False),
        ("echo err >&2; echo out", "out\nerr", False),
        ("false", "[exit code 1]", True),
        ("echo out; echo err >&2; exit 3", "out\nerr\n[exit code 3]", True),
        ("printf '\\377'", "\N{REPLACEMENT CHARACTER}", False),
        ("cat", "(no output)", False),
        ("[[ a == a ]] && echo bash", "bash", False),
        ("echo 'it'\"'\"'s'", "it's", False),
    ],
)
async def test_output(call: Call, command: str, content: str, is_error: bool) -> None:
    result = await call("bash", command=command)
    assert (result.content, result.is_error) == (content, is_error)


async def test_starts_in_the_workdir_and_keeps_only_files(call: Call) -> None:
    await call("bash", command="mkdir sub; cd sub; echo 1 > here; export X=1")
    assert (await call("bash", command='cat sub/here; echo "X=$X"')).content == "1\nX="


async def test_a_timeout_result_includes_the_output_so_far(call: Call, context: ToolContext) -> None:
    context.timeout_s = 0.5
    result = await call("bash", command="echo begun; echo oops >&2; sleep 30; echo never")
    assert (result.content, result.is_error) == ("Error: bash timed out after 0.5 s\nbegun\noops", True)
    assert result.duration_s < 5


async def test_long_output_keeps_head_tail_and_exit_code(call: Call, context: ToolContext) -> None:
    context.max_output_bytes = 1000
    result = await call("bash", command="printf start; head -c 5000000 /dev/zero | tr '\\0' x; echo end; exit 7")
    head, _, rest = result.content.partition("\n[... ")
    count, _, tail = rest.partition(" bytes cut ...]\n")
    assert head.startswith("startxxx")
    assert tail.endswith("xxxend\n[exit code 7]")
    assert len(result.content) <= 1000
    assert len(head) + int(count) + len(tail) == len("start") + 5_000_000 + len("end\n[exit code 7]")


async def test_invalid_commands_are_refused(call: Call) -> None:
    assert (await call("bash", command="a\0b")).content == 'Error: "command" contains a NUL byte; remove it'
    result = await call("bash", command="#" * 140_000)
    assert result.content.startswith("Error: command has 140000 bytes, expected at most 131071; ")


async def test_sh_is_used_if_there_is_no_bash(anyio_backend: str) -> None:
    spec = EnvironmentSpec(env={"PATH": "/nowhere"})
    async with await open_environment(spec, backend="unsafe-local") as environment:
        call = ToolCall("c", "bash", '{"command": "echo $0"}')
        assert (await BUILTINS["bash"].call(call, ToolContext(environment))).content == "/bin/sh"
