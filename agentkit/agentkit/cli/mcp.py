"""`agentkit mcp`, which lists the tools of MCP servers, and `--mcp`, which gives the tools to an agent."""

from __future__ import annotations

import copy
import json
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from agentkit.cli.ending import ExitCode, run
from agentkit.cli.options import JsonFlag
from agentkit.cli.terminal import console, visible_line

if TYPE_CHECKING:
    from agentkit.agent import Agent
    from agentkit_tools import MCPServer, Tool

MCPFlag = Annotated[
    Path | None,
    typer.Option(
        "--mcp",
        help='A JSON file with `{"mcpServers": {...}}`: the agent also gets the tools of these servers, which run '
        "outside the sandbox.",
    ),
]


def command(
    file: Annotated[Path, typer.Argument(metavar="FILE", help='A JSON file with `{"mcpServers": {...}}`.')],
    as_json: JsonFlag = False,
) -> ExitCode:
    """Start the MCP servers of a file and list their tools. Exits with 3 if one cannot be started or reached."""
    servers = read_servers(file, hint="FILE")
    found = run(lambda: _inspect(servers))
    if as_json:
        typer.echo(json.dumps({"servers": found}, indent=2))
    else:
        _print(found)
    return ExitCode.INFRASTRUCTURE if any(server["error"] for server in found) else ExitCode.OK


def read_servers(path: Path | None, *, hint: str = "--mcp") -> list[MCPServer]:
    """Return the servers of a file; an empty list without a file. Raises BadParameter if the file is wrong."""
    from agentkit_tools import MCPConfigError, load_mcp_servers

    try:
        return [] if path is None else load_mcp_servers(path)
    except MCPConfigError as exc:
        raise typer.BadParameter(str(exc), param_hint=hint) from exc


@asynccontextmanager
async def equipped(agent: Agent, servers: Sequence[MCPServer]) -> AsyncIterator[Agent]:
    """Start the servers and yield the agent with their tools; the servers end with the block.

    Raises:
        MCPServerError: A server cannot be started or reached.
        BadParameter: Two tools have the same name.
    """
    async with AsyncExitStack() as stack:
        equipped = copy.copy(agent)
        for server in servers:
            await stack.enter_async_context(server)
            equipped.tools = with_tools(equipped.tools, server.tools)
        yield equipped


def with_tools(tools: Mapping[str, Tool], more: Sequence[Tool]) -> dict[str, Tool]:
    """Return the tools of an agent with those of a server. Raises BadParameter if two have the same name."""
    if twice := tools.keys() & {tool.name for tool in more}:
        raise typer.BadParameter(f'two tools are named "{min(twice)}"; rename a server', param_hint="--mcp")
    return {**tools, **{tool.name: tool for tool in more}}


async def _inspect(servers: Sequence[MCPServer]) -> list[dict[str, Any]]:
    from agentkit_tools import MCPServerError

    found: list[dict[str, Any]] = []
    for server in servers:
        error = None
        try:
            async with server:
                pass
        except MCPServerError as exc:
            error = str(exc)
        tools = [tool.spec["function"] for tool in server.tools]
        found.append({"name": server.name, "error": error, "tools": tools, "dropped": server.dropped})
    return found


def _print(found: list[dict[str, Any]]) -> None:
    from rich.text import Text

    terminal = console()
    for server in found:
        if server["error"]:
            terminal.print(Text.assemble(("✗ ", "red"), visible_line(server["error"])), soft_wrap=True)
            continue
        terminal.print(Text.assemble(("✓ ", "green"), (visible_line(server["name"]), "bold")), soft_wrap=True)
        for tool in server["tools"]:
            about = visible_line(tool["description"].strip().partition("\n")[0])
            terminal.print(Text.assemble("  ", tool["name"], (f"  {about}", "dim")), soft_wrap=True)
        if not server["tools"]:
            terminal.print("  no tools", style="dim")
