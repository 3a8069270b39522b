"""MCP servers over stdio: a third party's, and a hand-written one that misbehaves in every way."""

from __future__ import annotations

import itertools
import json
import logging
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import anyio
import anyio.to_thread
import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentkit_environments import Environment
from agentkit_tools import MCPServer, MCPServerError, MCPServerStdio, ToolCall, ToolContext, ToolError, ToolResult
from agentkit_tools.mcp.naming import tool_names
from agentkit_tools.tool import NAME

pytestmark = pytest.mark.anyio

ROUGH = Path(__file__).with_name("rough_mcp_server.py")
LINUX = pytest.mark.skipif(sys.platform != "linux", reason="needs PR_SET_PDEATHSIG and /proc")


@pytest.fixture
def rough(tmp_path: Path) -> Callable[..., MCPServerStdio]:
    """`rough(mode, **options)`: the misbehaving server, which writes its files in `tmp_path`."""

    def make(mode: str = "", **options: Any) -> MCPServerStdio:
        defaults: dict[str, Any] = {"name": "rough", "cwd": tmp_path, "connect_timeout_s": 20.0, "prefix": ""}
        return MCPServerStdio(sys.executable, ["-S", str(ROUGH), mode], **defaults | options)

    return make


@pytest.fixture
def use(context: ToolContext) -> Callable[..., Any]:
    """`await use(server, "echo", text="a")`: call a tool as the agent does."""

    async def use(server: MCPServer, tool: str, /, **arguments: Any) -> ToolResult:
        found = next(each for each in server.tools if each.name == tool)
        return await found.call(ToolCall("call_0_0", tool, json.dumps(arguments)), context)

    return use


def calls(folder: Path) -> list[str]:
    return (folder / "calls").read_text().split()


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


async def cancel_once(file: Path, scope: anyio.CancelScope, wait_until: Any) -> None:
    """Cancel when a server has written a file."""
    await anyio.to_thread.run_sync(wait_until, file.exists, f"the file {file}")
    scope.cancel()


async def test_a_server_that_is_not_ours(use: Any) -> None:
    async with MCPServerStdio(sys.executable, ["-m", "mcp_server_time"], name="time") as server:
        assert [tool.name for tool in server.tools] == ["time__get_current_time", "time__convert_time"]
        assert not server.dropped and not any(tool.needs_environment for tool in server.tools)
        result = await use(server, "time__get_current_time", timezone="Asia/Tokyo")
        assert json.loads(result.content)["timezone"] == "Asia/Tokyo" and not result.is_error
        result = await use(server, "time__get_current_time", timezone="Nowhere")
        assert result.is_error and "Nowhere" in result.content
        result = await use(server, "time__get_current_time", zone="UTC")
        assert result.content.startswith("Error: invalid arguments for time__get_current_time: $.timezone: missing")


@pytest.mark.parametrize(
    ("arguments", "sent"),
    [
        ({"text": "a"}, {"text": "a"}),
        ({"text": "a", "times": None}, {"text": "a"}),
        ({"text": "a", "note": None}, {"text": "a", "note": None}),
        ({"text": "ä\n", "times": 2**70}, {"text": "ä\n", "times": 2**70}),
    ],
)
async def test_omitted_parameters_are_absent(
    rough: Any, use: Any, arguments: dict[str, Any], sent: dict[str, Any]
) -> None:
    async with rough() as server:
        assert json.loads((await use(server, "echo", **arguments)).content) == sent


async def test_null_for_a_required_parameter_is_refused(rough: Any, use: Any) -> None:
    async with rough() as server:
        result = await use(server, "echo", text=None, times=None)
        assert "$.text: given null, expected string" in result.content and result.is_error


async def test_an_error_result_and_a_protocol_error_are_told_to_the_model(rough: Any, use: Any) -> None:
    async with rough() as server:
        result = await use(server, "fail")
        assert (result.content, result.is_error) == ("Error: there is no such file", True)
        assert "invalid result" in (await use(server, "invalid")).content
        with pytest.raises(ToolError, match=r"^no tool is named none$"):
            await server.call_tool("none", {}, timeout_s=20)
        assert not (await use(server, "echo", text="a")).is_error


async def test_a_large_result_is_cut(rough: Any, use: Any, context: ToolContext) -> None:
    async with rough() as server:
        content = (await use(server, "large")).content
        assert len(content) <= context.max_output_bytes and "bytes cut" in content


async def test_progress_extends_the_deadline(rough: Any, use: Any) -> None:
    async with rough(timeout_s=1.0) as server:
        assert (await use(server, "slow")).content == "done"
    async with rough(timeout_s=1.0, max_timeout_s=0.4) as server:
        assert "timed out" in (await use(server, "slow")).content


async def test_the_deadline_is_that_of_the_run_unless_given(rough: Any, context: ToolContext) -> None:
    context.timeout_s = 0.1
    async with rough() as server:
        tool = next(each for each in server.tools if each.name == "hang")
        result = await tool.call(ToolCall("call_0_0", "hang", "{}"), context)
        assert "no answer and no progress from MCP server rough within 0.1 s" in result.content and result.is_error


async def test_after_a_deadline_the_server_is_used_again(rough: Any, use: Any, tmp_path: Path) -> None:
    async with rough(timeout_s=0.3) as server:
        assert "timed out" in (await use(server, "hang")).content
        first, server.timeout_s = server._connection, 20
        assert (await use(server, "echo", text="a")).content == '{"text": "a"}'
        assert server._connection is first
    assert calls(tmp_path) == ["hang", "echo"]


async def test_after_a_deadline_a_server_that_is_stuck_is_restarted(
    rough: Any, use: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("agentkit_tools.mcp.server.HEALTH_S", 0.2)
    async with rough(timeout_s=0.3) as server:
        assert "timed out" in (await use(server, "freeze")).content
        server.timeout_s = 20
        assert (await use(server, "echo", text="a")).content == '{"text": "a"}'
    assert calls(tmp_path) == ["freeze", "echo"]


async def test_a_crash_is_an_unknown_outcome_and_the_next_call_restarts(rough: Any, use: Any, tmp_path: Path) -> None:
    async with rough() as server:
        for _ in range(3):
            crashed = await use(server, "crash")
            assert "ended during this call" in crashed.content and "not repeated" in crashed.content
            assert (await use(server, "echo", text="a")).content == '{"text": "a"}'
    assert calls(tmp_path) == ["crash", "echo"] * 3


async def test_calls_that_were_running_at_a_crash_all_end(rough: Any, use: Any, tmp_path: Path) -> None:
    results = []
    async with rough() as server:

        async def one(tool: str) -> None:
            results.append(await use(server, tool))

        async with anyio.create_task_group() as tasks:
            for tool in ("hang", "hang", "hang", "crash"):
                tasks.start_soon(one, tool)
        assert all("ended during this call" in result.content for result in results) and len(results) == 4
        results.clear()
        async with anyio.create_task_group() as tasks:
            for _ in range(8):
                tasks.start_soon(lambda: one("fail"))
        assert [result.content for result in results] == ["Error: there is no such file"] * 8
    assert len(calls(tmp_path)) == 12


async def test_a_server_that_knows_only_older_protocols_is_started_again_for_them(
    rough: Any, use: Any, tmp_path: Path
) -> None:
    async with rough("strict") as server:
        assert "ended during this call" in (await use(server, "crash")).content
        assert (await use(server, "echo", text="a")).content == '{"text": "a"}'
    assert calls(tmp_path) == ["crash", "echo"]


async def test_restarts_are_bounded(rough: Any, use: Any, tmp_path: Path) -> None:
    async with rough(max_restarts=2) as server:
        for _ in range(3):
            assert "ended during this call" in (await use(server, "crash")).content
        last = await use(server, "echo", text="a")
        assert "not called: MCP server rough was restarted 2 times" in last.content and last.is_error
    assert calls(tmp_path) == ["crash"] * 3


async def test_a_failed_restart_says_that_the_call_was_not_made(rough: Any, use: Any, tmp_path: Path) -> None:
    async with rough("once") as server:
        await use(server, "crash")
        result = await use(server, "echo", text="a")
        assert result.content.startswith("Error: not called: MCP server rough: it ended before it answered")
        assert "exited with status 4" in result.content
    assert calls(tmp_path) == ["crash"]


async def test_a_tool_of_a_closed_server_says_so(rough: Any, use: Any) -> None:
    async with rough() as server:
        with pytest.raises(RuntimeError, match="is running already"):
            await server.__aenter__()
    assert "is not running" in (await use(server, "echo", text="a")).content
    async with server:
        assert not (await use(server, "echo", text="a")).is_error


async def test_an_exception_of_the_block_propagates_as_it_is(rough: Any) -> None:
    with pytest.raises(ZeroDivisionError):
        async with rough():
            raise ZeroDivisionError


@LINUX
@pytest.mark.parametrize("ending", ["left", "cancelled", "crashed", "stubborn"])
async def test_no_process_outlives_the_server(rough: Any, use: Any, tmp_path: Path, ending: str) -> None:
    with anyio.CancelScope() as scope:
        async with rough() as server:
            assert (await use(server, "spawn")).content == "done"
            pids = [*map(int, (tmp_path / "pids").read_text().split())]
            assert all(map(is_alive, pids))
            if ending == "cancelled":
                scope.cancel()
                await anyio.sleep_forever()
            if ending == "stubborn":
                await use(server, "stubborn")
            if ending == "crashed":
                await use(server, "crash")
                await server._connection.ended.wait()
                assert not any(map(is_alive, pids))
    assert not any(map(is_alive, pids))


HARNESS = """
import sys
import anyio
from agentkit_tools import MCPServerStdio

async def main():
    async with MCPServerStdio(sys.executable, ["-S", sys.argv[1]], prefix="") as server:
        await server.call_tool("spawn", {}, timeout_s=20)
        print(server._connection is not None, flush=True)
        await server.call_tool("freeze", {}, timeout_s=600)

anyio.run(main)
"""


@LINUX
def test_no_process_outlives_a_harness_that_is_killed(tmp_path: Path, wait_until: Any) -> None:
    command = [sys.executable, "-c", HARNESS, str(ROUGH)]
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, text=True) as harness:
        assert harness.stdout is not None and harness.stdout.readline() == "True\n"
        pids = [*map(int, (tmp_path / "pids").read_text().split())]
        family = {int(entry) for entry in os.listdir("/proc") if entry.isdigit() and _cwd(entry) == str(tmp_path)}
        assert family > {*pids, harness.pid}
        harness.send_signal(signal.SIGKILL)
    wait_until(lambda: not any(map(is_alive, family)), "the processes' end")


def _cwd(pid: str) -> str | None:
    try:
        return os.readlink(f"/proc/{pid}/cwd")
    except OSError:
        return None


@LINUX
async def test_no_process_outlives_a_start_that_is_cancelled(rough: Any, tmp_path: Path, wait_until: Any) -> None:
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(cancel_once, tmp_path / "started", tasks.cancel_scope, wait_until)
        async with rough("silent"):
            pass
    assert tasks.cancel_scope.cancelled_caught
    assert not [entry for entry in os.listdir("/proc") if entry.isdigit() and _cwd(entry) == str(tmp_path)]


async def test_a_cancelled_restart_leaves_the_server_usable(
    rough: Any, use: Any, tmp_path: Path, wait_until: Any
) -> None:
    async with rough("twice") as server:
        await use(server, "crash")
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(cancel_once, tmp_path / "again", tasks.cancel_scope, wait_until)
            await use(server, "echo", text="a")
        assert tasks.cancel_scope.cancelled_caught
        assert (await use(server, "echo", text="a")).content == '{"text": "a"}'
    assert calls(tmp_path) == ["crash", "echo"]


async def test_without_the_sdk(rough: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mcp", None)  # as if it were not installed
    with pytest.raises(MCPServerError, match=re.escape('need the package mcp: pip install "agentkit-harness[mcp]"')):
        async with rough():
            pass


async def test_a_file_that_hides_the_sdk(rough: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("mcp")
    module.__spec__ = ModuleSpec("mcp", None, origin="/x/mcp.py")
    monkeypatch.setitem(sys.modules, "mcp", module)
    with pytest.raises(MCPServerError, match=r"the file /x/mcp.py hides the package mcp; rename the file"):
        async with rough():
            pass


@pytest.mark.parametrize(
    ("mode", "told"),
    [
        ("exit", r"it ended before it answered; .*cannot log in with \$\{TOKEN\} \| .* exited with status 3"),
        ("silent", r"it did not answer within 2 s of its start; check its command.*; its last lines: starting"),
        ("garbage", r"it did not answer within 2 s .*; its standard output is not JSON-RPC: 'Hello, I am a server'"),
        ("refuse", r"it refused the session: the license has expired; check"),
        ("endless", r"its list of tools has more than 100 pages"),
    ],
)
async def test_a_server_that_does_not_start_says_why(rough: Any, mode: str, told: str) -> None:
    timeout_s = 2 if mode in ("silent", "garbage") else 20
    with pytest.raises(MCPServerError, match=f"^MCP server rough: {told}") as caught:
        async with rough(mode, env={"TOKEN": "s3cret-value"}, connect_timeout_s=timeout_s):
            pass
    assert "\n" not in str(caught.value) and "s3cret" not in str(caught.value)


@pytest.mark.parametrize(
    ("command", "options", "told"),
    [
        ("no-such-program", {}, "there is no program no-such-program; install it, or give its full path"),
        ("./no-such-program", {"cwd": "/tmp"}, "there is no program ./no-such-program"),
        ("/etc/passwd", {}, "there is no program /etc/passwd"),
        ("true", {"cwd": "/no/such"}, "there is no directory /no/such; give an existing one as cwd"),
        ("true", {}, "it ended before it answered"),
        ("ls", {"env": {"PATH": "/no/such"}}, "there is no program ls"),
    ],
)
async def test_a_command_that_cannot_be_run(command: str, options: dict[str, Any], told: str) -> None:
    with pytest.raises(MCPServerError, match=told):
        async with MCPServerStdio(command, **options):
            pass


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({"command": " "}, "command: given an empty text"),
        ({"command": "a", "timeout_s": 0}, "timeout_s: given 0, expected a positive"),
        ({"command": "a", "connect_timeout_s": float("nan")}, "connect_timeout_s: given nan"),
        ({"command": "a", "max_restarts": -1}, "max_restarts: given -1"),
        ({"command": "a", "args": [1]}, "args and env: expected only texts"),
        ({"command": "a", "env": {"TOKEN": 12345678}}, "args and env: expected only texts"),
    ],
)
def test_bad_options(arguments: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        MCPServerStdio(**arguments)


async def test_a_line_that_is_not_json_is_skipped(rough: Any, use: Any, capfd: pytest.CaptureFixture[str]) -> None:
    async with rough("noisy") as server:
        assert not (await use(server, "echo", text="a")).is_error
    assert capfd.readouterr() == ("", "")


async def test_an_odd_tool_is_left_out_and_named(rough: Any, use: Any, caplog: pytest.LogCaptureFixture) -> None:
    async with rough("odd") as server:
        assert [tool.name for tool in server.tools] == ["fine", "also_fine"]
        assert server.tools[0].description == "Fine"
    names = "array dangling deep empty fine large null pattern properties remote text type".split()
    assert sorted(server.dropped) == sorted(["", "no schema", *names])
    assert server.dropped["array"] == 'parameters: $.type: given "array", expected "object"'
    assert server.dropped["null"] == "parameters: given null, expected a JSON schema"
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warnings) == len(server.dropped) and all(text.isprintable() for text in warnings)
    assert "MCP server rough: the tool 'dangling' is left out: parameters: given $ref '#/$defs/none'" in warnings[7]


async def test_all_pages_are_read(rough: Any) -> None:
    async with rough("paged") as paged, rough() as plain:
        assert [tool.spec for tool in paged.tools] == [tool.spec for tool in plain.tools]


async def test_hints_are_believed_only_if_asked(rough: Any) -> None:
    for trust in (False, True):
        async with rough(trust_hints=trust) as server:
            assert [tool.name for tool in server.tools if tool.read_only] == ["echo"] * trust


async def test_only_harmless_variables_are_passed_on(
    rough: Any, environment: Environment, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "s3cret-value")
    script = "env > variables; exec python3 -S " + str(ROUGH)
    async with MCPServerStdio("sh", ["-c", script], env={"GIVEN": "1"}, cwd=tmp_path) as server:
        assert server.tools
    variables = (tmp_path / "variables").read_text()
    assert "GIVEN=1" in variables and "s3cret" not in variables


def test_a_server_shows_no_secret() -> None:
    server = MCPServerStdio("program", ["--key", "s3cret"], env={"TOKEN": "s3cret"})
    assert repr(server) == "MCPServerStdio('program')"


@pytest.mark.parametrize(
    ("names", "prefix", "expected"),
    [
        (["a", "b-c_D9"], "time", {"a": "time__a", "b-c_D9": "time__b-c_D9"}),
        (["a"], "", {"a": "a"}),
        (["a.b"], "x", {"a.b": "x__a_b"}),
        (["a.b", "a_b"], "", {"a_b": "a_b", "a.b": "a_b_2e7336dc"}),
        (["a" * 62, "a" * 61], "xy", {"a" * 61: None, "a" * 62: None}),
        (["né"], "日本", {"né": "____n_"}),
        ([""], "", {"": "_e3b0c442"}),
    ],
)
def test_names(names: list[str], prefix: str, expected: dict[str, str | None]) -> None:
    found = tool_names(prefix, names)
    assert found.keys() == expected.keys()
    for name, wanted in expected.items():
        assert wanted in (None, found[name]), found


@given(
    st.text(max_size=40), st.lists(st.text("ab._é😀\ud800" + "x" * 3, max_size=80) | st.text(max_size=70), unique=True)
)
def test_names_are_valid_unique_and_independent_of_the_order(prefix: str, names: list[str]) -> None:
    found = tool_names(prefix, names)
    assert found.keys() == set(names)
    assert all(NAME.fullmatch(name) for name in found.values())
    assert len(set(found.values())) == len(names)
    assert found == tool_names(prefix, names[::-1])
    for name, other in itertools.islice(found.items(), 3):
        whole = f"{prefix}__{name}" if prefix else name
        assert other == whole or not NAME.fullmatch(whole)
