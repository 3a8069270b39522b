"""Read MCP servers from a JSON file in the format of Claude Desktop, Cursor and others.

    {"mcpServers": {
        "time": {"command": "uvx", "args": ["mcp-server-time"], "env": {"TZ": "${TZ:-UTC}"}},
        "wiki": {"url": "https://example.com/mcp", "headers": {"Authorization": "Bearer ${WIKI_TOKEN}"}}
    }}

Entries are checked strictly. Other keys of the file, which are for the client that it was written for, are ignored.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_core import ErrorDetails

from agentkit_tools.errors import MCPConfigError
from agentkit_tools.mcp.server import MCPServer, MCPServerStdio, MCPServerStreamableHttp

VARIABLE = re.compile(r"\$\{(?:env:)?([A-Za-z_][A-Za-z0-9_]*)(?::-([^}]*))?\}")
SHAPE = '{"mcpServers": {"NAME": {"command": "...", "args": []} or {"url": "https://..."}}}'


class _Entry(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    type: Literal["stdio", "http", "streamable-http", "streamableHttp"] | None = None
    command: str | None = None
    args: list[str] = []
    env: dict[str, str] = {}
    cwd: str | None = None
    url: str | None = None
    headers: dict[str, str] = {}
    disabled: bool = False


def load_mcp_servers(path: str | Path) -> list[MCPServer]:
    """Return the servers of a JSON file, except disabled ones. They are not started yet.

    `${NAME}` and `${NAME:-default}` in any text are replaced by environment variables.

    Raises:
        MCPConfigError: the file cannot be read or has another format, or a variable is not set. The message names
            the place, and never contains a value.
    """
    try:
        data = json.loads(Path(path).read_bytes(), object_pairs_hook=_unique)
    except OSError as error:
        raise MCPConfigError(f"{path}: cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise MCPConfigError(f"{path}: not JSON: {error}") from None
    entries = data.get("mcpServers") if isinstance(data, dict) else None
    if not isinstance(entries, dict):
        raise MCPConfigError(f"{path}: no mcpServers object; expected {SHAPE}")
    servers = (_server(name, entry, f"{path}: mcpServers.{name}") for name, entry in entries.items())
    return [server for server in servers if server is not None]


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(key for key, _ in pairs if sum(key == other for other, _ in pairs) > 1)
        raise ValueError(f"the key {twice!r} appears twice in one object")
    return found


def _server(name: str, entry: Any, place: str) -> MCPServer | None:
    if not isinstance(entry, dict):
        raise MCPConfigError(f'{place}: expected an object such as {{"command": "...", "args": []}}')
    if entry.get("disabled") is True:
        return None
    if entry.get("type") == "sse":
        raise MCPConfigError(f"{place}.type: the SSE transport is not supported; use the server's streamable HTTP URL")
    try:
        read = _Entry.model_validate(_expanded(entry, place))
    except ValidationError as error:
        problems = [f"{'.'.join([place, *map(str, item['loc'])])}: {_told(item)}" for item in error.errors()]
        raise MCPConfigError("; ".join(problems)) from None  # the original error holds values
    if (read.command is None) == (read.url is None):
        given = "neither" if read.url is None else "both"
        raise MCPConfigError(f'{place}: given {given}, expected either "command" (stdio) or "url" (streamable HTTP)')
    foreign = {"headers"} if read.url is None else {"args", "env", "cwd"}
    if read.type is not None and (read.type == "stdio") != (read.url is None):
        foreign.add("type")
    if misplaced := sorted(foreign & read.model_fields_set):
        transport = "command" if read.url is None else "url"
        raise MCPConfigError(f"{place}: {', '.join(misplaced)} cannot be used with {transport}; remove it")
    try:
        if read.url is not None:
            return MCPServerStreamableHttp(read.url, headers=read.headers, name=name)
        assert read.command is not None
        return MCPServerStdio(read.command, read.args, env=read.env, cwd=read.cwd, name=name)
    except ValueError as error:
        raise MCPConfigError(f"{place}: {error}") from None


def _told(problem: ErrorDetails) -> str:
    if problem["type"] == "extra_forbidden":
        return f"unknown key; expected one of {', '.join(_Entry.model_fields)}"
    return problem["msg"]


def _expanded(value: Any, place: str) -> Any:
    """Return a JSON value with environment variables in its texts replaced."""
    if isinstance(value, dict):
        return {key: _expanded(item, f"{place}.{key}") for key, item in value.items()}
    if isinstance(value, list):
        return [_expanded(item, f"{place}[{index}]") for index, item in enumerate(value)]
    if not isinstance(value, str):
        return value

    def replace(match: re.Match[str]) -> str:
        variable, default = match[1], match[2]
        if variable not in os.environ and default is None:
            raise MCPConfigError(
                f"{place}: the environment variable {variable} is not set; set it, or write ${{{variable}:-default}}"
            )
        return os.environ.get(variable) or default or ""

    return VARIABLE.sub(replace, value)
