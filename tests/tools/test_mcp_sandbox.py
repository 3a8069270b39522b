"""MCP servers in a sandbox: nothing of them runs on this machine, and nothing is left of them."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import anyio
import pytest

from agentkit_environments import Environment, EnvironmentSpec, available_backends, open_environment
from agentkit_tools import (
    MCPServer,
    MCPServerError,
    MCPServerHttpInSandbox,
    MCPServerInSandbox,
    ToolCall,
    ToolContext,
)

pytestmark = pytest.mark.anyio

HERE = Path(__file__).parent
START_HTTP = "mkfifo ready && { python3 server.py >ready & } && read -r port <ready && echo $port"
RUNNING = "cat /proc/[0-9]*/cmdline 2>/dev/null | tr '\\0' ' ' | grep -c 'server[.]py\\|mcp[-]'"


@pytest.fixture(params=["process", pytest.param("docker", marks=pytest.mark.docker)])
async def sandbox(anyio_backend: str, request: pytest.FixtureRequest) -> AsyncIterator[Environment]:
    """A sandbox with both servers, of each isolated backend."""
    reason = available_backends()[request.param]
    if reason is not None:
        pytest.skip(reason)
    async with await open_environment(EnvironmentSpec(), backend=request.param) as environment:
        await environment.write_file("server.py", (HERE / "small_http_mcp_server.py").read_text())
        await environment.write_file("rough/server.py", (HERE / "rough_mcp_server.py").read_text())
        yield environment


def rough(sandbox: Environment, mode: str = "", **options: Any) -> MCPServerInSandbox:
    defaults: dict[str, Any] = {"name": "rough", "prefix": ""}
    return MCPServerInSandbox(sandbox, "python3", ["rough/server.py", mode], **defaults | options)


async def use(server: MCPServerInSandbox | MCPServerHttpInSandbox, tool: str, /, **arguments: Any) -> str:
    found = next(each for each in server.tools if each.name == tool)
    context = ToolContext(server.environment)
    return (await found.call(ToolCall("call_0_0", tool, json.dumps(arguments)), context)).content


async def text_of(server: MCPServer, tool: str, /, **arguments: Any) -> Any:
    """Return the text of a call's result, which is not cut as results for a model are."""
    (content,) = (await server.call_tool(tool, arguments, timeout_s=60)).content
    assert content.type == "text"
    return content.text


async def test_a_command_in_the_sandbox(sandbox: Environment) -> None:
    async with rough(sandbox) as server:
        said = "ü\n" + "é\u2028" * 60_000
        results: dict[int, str] = {}

        async def call(number: int) -> None:
            results[number] = await text_of(server, "echo", text=said, times=number)

        async with anyio.create_task_group() as tasks:
            for number in range(3):
                tasks.start_soon(call, number)
        assert [json.loads(results[number]) for number in range(3)] == [
            {"text": said, "times": number} for number in range(3)
        ]
        assert await text_of(server, "large") == "a" * 300_000
        assert await use(server, "spawn") == "done"
    assert (await sandbox.exec(RUNNING)).stdout == "0\n"
    assert (await sandbox.exec("cat /proc/[0-9]*/comm | grep -c sleep")).stdout == "0\n"
    assert (await sandbox.exec("sort -u calls")).stdout.split() == ["echo", "large", "spawn"], "it ran in the sandbox"


async def test_a_server_that_ends_or_is_killed_is_started_again(sandbox: Environment) -> None:
    async with rough(sandbox) as server:
        assert "ended during this call" in await use(server, "crash")
        assert json.loads(await use(server, "echo", text="b")) == {"text": "b"}
        await sandbox.kill_all()
        assert json.loads(await use(server, "echo", text="c")) == {"text": "c"}


@pytest.mark.parametrize(
    ("mode", "error"),
    [
        (
            "exit",
            r"^MCP server rough: it ended before it answered.*: starting \| cannot log in .* \| exited with status 3",
        ),
        ("silent", r"^MCP server rough: it did not answer within 0\.5 s"),
        ("refuse", r"^MCP server rough: .*the license has expired"),
    ],
)
async def test_servers_that_cannot_be_used_are_named(sandbox: Environment, mode: str, error: str) -> None:
    deadline = 0.5 if mode == "silent" else 30.0
    with pytest.raises(MCPServerError, match=error):
        async with rough(sandbox, mode, connect_timeout_s=deadline):
            pass
    assert (await sandbox.exec(RUNNING)).stdout == "0\n"


async def test_a_program_that_is_missing(sandbox: Environment) -> None:
    with pytest.raises(MCPServerError, match=r"^MCP server x: it ended before it answered.*no-such-program: not found"):
        async with MCPServerInSandbox(sandbox, "no-such-program", name="x"):
            pass


@pytest.mark.parametrize("sse", [False, True])
async def test_a_server_on_the_sandboxs_own_loopback_interface(sandbox: Environment, sse: bool) -> None:
    port = (await sandbox.exec(START_HTTP)).stdout.strip()
    url = f"http://localhost:{port}/{'sse' if sse else 'mcp'}"
    headers = {"Authorization": "Bearer t0ken"}
    async with MCPServerHttpInSandbox(sandbox, url, sse=sse, headers=headers, name="web", prefix="") as server:
        hostname = (await sandbox.exec("python3 -c 'import socket; print(socket.gethostname())'")).stdout.strip()
        assert await use(server, "where") == f"{hostname} Bearer t0ken localhost:{port}"
        assert await text_of(server, "large") == "é" * 200_000
    with pytest.raises(MCPServerError, match=r"^MCP server web: .*localhost.*in the sandbox: .*refused"):
        async with MCPServerHttpInSandbox(sandbox, "http://localhost:1/mcp", name="web"):
            pass
