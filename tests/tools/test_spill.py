"""The whole text of a result that is too long is kept in a file of the environment."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentkit_environments import Environment, SandboxLostError
from agentkit_tools import BUILTINS, ToolCall, ToolContext, cut, tool
from agentkit_tools.output import MAX_SPILLED_BYTES, MIN_OUTPUT_BYTES

pytestmark = pytest.mark.anyio


@pytest.fixture
def context(environment: Environment) -> ToolContext:
    return ToolContext(environment, max_output_bytes=1000, spill_dir="/tmp/agentkit")


def path_in(result: str) -> str:
    return result.partition("; see ")[2].partition(" (")[0]


async def bash(command: str, context: ToolContext) -> str:
    call = ToolCall("call_0_0", "bash", json.dumps({"command": command}))
    return (await BUILTINS["bash"].call(call, context)).content


async def test_a_command_leaves_its_whole_output_in_a_file(environment: Environment, context: ToolContext) -> None:
    content = await bash("seq 1000; echo oops >&2; exit 3", context)
    whole = "".join(f"{number}\n" for number in range(1, 1001)) + "oops\n[exit code 3]"
    path = path_in(content)
    assert len(content) <= 1000
    assert content.startswith("1\n2\n") and content.endswith("1000\noops\n[exit code 3]")
    assert f" bytes cut; see {path} (1002 lines) ...]\n" in content
    assert (await environment.read_file(path)).decode() == whole
    assert await bash(f"sed -n 500p {path}", context) == "500"


async def test_equal_outputs_share_a_file(environment: Environment, context: ToolContext) -> None:
    first, again, other = [await bash(f"seq {last}", context) for last in (1000, 1000, 1001)]
    assert first == again
    assert (await bash("ls /tmp/agentkit | wc -l", context), path_in(first) != path_in(other)) == ("2", True)


async def test_the_output_of_a_command_that_timed_out_is_kept(environment: Environment, context: ToolContext) -> None:
    context.timeout_s = 0.5
    content = await bash("seq 1000; sleep 30", context)
    kept = (await environment.read_file(path_in(content))).decode()
    assert kept.startswith("Error: bash timed out after 0.5 s\n1\n2\n") and "\n500\n" in kept


async def test_a_long_file_is_named_and_not_copied(environment: Environment, context: ToolContext) -> None:
    await environment.write_file("numbers", "7\n" * 1000)
    result = await BUILTINS["read_file"].call(ToolCall("c", "read_file", '{"path": "numbers"}'), context)
    assert " bytes cut; see numbers (1000 lines) ...]\n" in result.content
    assert await bash("ls /tmp", context) == "(no output)"


async def test_short_results_and_answers_are_not_written(environment: Environment, context: ToolContext) -> None:
    assert await bash("seq 100", context) == "\n".join(map(str, range(1, 101)))
    await BUILTINS["submit"].call(ToolCall("c", "submit", json.dumps({"answer": "x" * 2000})), context)
    assert await bash("ls /tmp", context) == "(no output)"


async def test_a_file_has_a_limit_too(environment: Environment, context: ToolContext) -> None:
    @tool
    def flood() -> str:
        """Return a lot."""
        return "é" * MAX_SPILLED_BYTES

    result = await flood.call(ToolCall("c", "flood", "{}"), context)
    kept = (await environment.read_file(path_in(result.content))).decode()
    assert len(kept.encode()) <= MAX_SPILLED_BYTES and " bytes cut ...]\n" in kept


async def test_without_room_the_text_is_only_cut(environment: Environment, context: ToolContext) -> None:
    await environment.write_file("/tmp/agentkit", "a file of the agent's")
    content = await bash("seq 1000", context)
    assert " bytes cut ...]\n" in content and "see" not in content


async def test_a_lost_sandbox_is_not_a_result(environment: Environment, context: ToolContext) -> None:
    @tool
    def flood() -> str:
        """Return more than fits."""
        return "a" * 2000

    await environment.close()
    with pytest.raises(SandboxLostError):
        await flood.call(ToolCall("c", "flood", "{}"), context)


@given(st.text(), st.integers(MIN_OUTPUT_BYTES, 600), st.text())
def test_the_notice_takes_at_most_a_quarter(text: str, max_bytes: int, where: str) -> None:
    short = cut(text + "a" * (max_bytes + 1), max_bytes, where=where)
    assert len(short.encode()) <= max_bytes
    named = where.isprintable() and len(where.encode()) <= max_bytes // 4
    assert f" bytes cut{where if named else ''} ...]\n" in short
