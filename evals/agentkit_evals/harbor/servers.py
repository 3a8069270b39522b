"""MCP servers of a task: they run in the agent's sandbox, or are reached from inside it, during each step."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

from agentkit.errors import TaskSetupError
from agentkit.harbor import HarborConfig, McpServer
from agentkit_environments import Environment
from agentkit_evals.harbor.sandbox import filled_in
from agentkit_tools import MCPServer, MCPServerError, MCPServerHttpInSandbox, MCPServerInSandbox, Tool

VARIABLE = re.compile(r"\$\{[^}]+\}")


@asynccontextmanager
async def servers_tools(config: HarborConfig, environment: Environment) -> AsyncIterator[list[Tool]]:
    """Start the task's MCP servers and yield their tools; the servers end with the block.

    Raises:
        TaskSetupError: a server cannot be started or reached, or a variable is not set. The message names the server.
    """
    async with AsyncExitStack() as stack:
        tools: list[Tool] = []
        for declared in config.mcp_servers:
            try:
                server = await stack.enter_async_context(_server(declared, environment))
            except (MCPServerError, ValueError) as exc:
                raise TaskSetupError(str(exc)) from exc
            tools += server.tools
        names = [tool.name for tool in tools]
        if twice := {name for name in names if names.count(name) > 1}:
            raise TaskSetupError(f"two tools of MCP servers are named {min(twice)}; rename a server")
        yield tools


def _server(declared: McpServer, environment: Environment) -> MCPServer:
    if declared.transport == "stdio":
        assert declared.command is not None, "checked when the task was read"
        return MCPServerInSandbox(environment, declared.command, declared.args, name=declared.name)
    assert declared.url is not None, "checked when the task was read"
    headers = {header: _with_variables(declared, value) for header, value in declared.headers.items()}
    is_sse = declared.transport == "sse"
    return MCPServerHttpInSandbox(environment, declared.url, sse=is_sse, headers=headers, name=declared.name)


def _with_variables(declared: McpServer, value: str) -> str:
    """Return a header's value with `${NAME}` and `${NAME:-default}` replaced. Raises TaskSetupError."""
    name = f"of MCP server {declared.name}"
    return VARIABLE.sub(lambda match: filled_in({name: match[0]})[name], value)
