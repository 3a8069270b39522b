"""Files that list MCP servers, in the shape that clients share."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentkit_tools import MCPConfigError, MCPServerStdio, MCPServerStreamableHttp, load_mcp_servers


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TOKEN", "s3cret-value")
    monkeypatch.setenv("EMPTY", "")
    monkeypatch.delenv("NOT_SET", raising=False)
    return tmp_path / "mcp.json"


def test_a_file(file: Path) -> None:
    servers: dict[str, Any] = {
        "time": {"command": "uvx", "args": ["${HOME:-/}", "$TOKEN", "${NOT_SET:-}"], "env": {"A": "x${env:TOKEN}y"}},
        "wiki": {"type": "http", "url": "https://${EMPTY:-example.com}/mcp", "headers": {"A": "Bearer ${TOKEN}"}},
        "local": {"type": "stdio", "command": "./server", "cwd": "/tmp"},
        "off": {"command": "${NOT_SET}", "disabled": True},
        "on": {"command": "a${EMPTY}b", "disabled": False},
    }
    file.write_text(json.dumps({"mcpServers": servers, "theme": "dark"}))
    time, wiki, local, on = load_mcp_servers(file)
    assert isinstance(time, MCPServerStdio) and isinstance(wiki, MCPServerStreamableHttp)
    assert (time.name, time.command, time.args[1:], time.env) == (
        *("time", "uvx", ["$TOKEN", ""]),
        {"A": "xs3cret-valuey"},
    )
    assert (wiki.name, wiki.url, wiki.headers) == ("wiki", "https://example.com/mcp", {"A": "Bearer s3cret-value"})
    assert isinstance(local, MCPServerStdio) and local.cwd == "/tmp"
    assert isinstance(on, MCPServerStdio) and on.command == "ab"
    assert "s3cret" not in repr(time) + repr(wiki)


@pytest.mark.parametrize(
    ("entry", "told"),
    [
        ({}, 'a: given neither, expected either "command" (stdio) or "url" (streamable HTTP)'),
        ({"command": "x", "url": "http://x"}, 'a: given both, expected either "command"'),
        ({"command": ["s3cret"]}, "a.command: Input should be a valid string"),
        ({"command": "x", "args": "s3cret"}, "a.args: Input should be a valid list"),
        ({"command": "x", "args": [7]}, "a.args.0: Input should be a valid string"),
        ({"command": "x", "env": {"KEY": 7}}, "a.env.KEY: Input should be a valid string"),
        (
            {"command": "x", "environment": {"KEY": "s3cret"}},
            "a.environment: unknown key; expected one of type, command, args, env,",
        ),
        ({"command": "x", "headers": {"A": "s3cret"}}, "a: headers cannot be used with command; remove it"),
        ({"url": "http://x", "args": [], "env": {}}, "a: args, env cannot be used with url; remove it"),
        ({"url": "http://x", "type": "stdio"}, "a: type cannot be used with url"),
        ({"command": "x", "type": "http"}, "a: type cannot be used with command"),
        ({"url": "http://x", "type": "sse"}, "a.type: the SSE transport is not supported; use the server's streamable"),
        ({"url": "http://x", "type": "other"}, "a.type: Input should be "),
        ({"url": "localhost:80/mcp"}, "a: url: given 'localhost:80/mcp', expected http://... or https://..."),
        ({"command": " "}, "a: command: given an empty text, expected a program"),
        ({"command": "x", "env": {"KEY": "${NOT_SET}"}}, "a.env.KEY: the environment variable NOT_SET is not set; set"),
        ({"command": "x", "args": ["${env:NOT_SET}"]}, "a.args[0]: the environment variable NOT_SET is not set"),
        ({"url": "http://x", "headers": {"A": "${TOKEN}\n"}}, "a: headers: 'A': expected a header's name and one line"),
        ({"url": "ws://u:s3cret@x/?key=${TOKEN}"}, "a: url: given 'ws://x/'"),
        ("s3cret", "a: expected an object such as "),
        (None, "a: expected an object such as "),
    ],
)
def test_an_entry_that_is_wrong_is_named_without_its_value(file: Path, entry: Any, told: str) -> None:
    file.write_text(json.dumps({"mcpServers": {"fine": {"command": "x"}, "a": entry}}))
    with pytest.raises(MCPConfigError) as caught:
        load_mcp_servers(file)
    assert str(caught.value).startswith(f"{file}: mcpServers.{told}")
    assert "s3cret" not in str(caught.value).removeprefix(f"{file}: mcpServers.{told}")


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (b"", "not JSON: Expecting value: line 1"),
        (b"{'mcpServers': {}}", "not JSON: Expecting property name"),
        (b"\xff", "not JSON: "),
        (b"[" * 100_000, "not JSON: "),
        (b'{"mcpServers": {}, "mcpServers": {}}', "not JSON: the key 'mcpServers' appears twice"),
        (b'{"mcpServers": {"a": {"command": "x", "command": "y"}}}', "not JSON: the key 'command' appears twice"),
        (b"{}", 'no mcpServers object; expected {"mcpServers": {"NAME": {"command"'),
        (b"[]", "no mcpServers object"),
        (b'{"servers": {}}', "no mcpServers object"),
        (b'{"mcpServers": []}', "no mcpServers object"),
    ],
)
def test_a_file_that_is_wrong(file: Path, text: bytes, told: str) -> None:
    file.write_bytes(text)
    with pytest.raises(MCPConfigError) as caught:
        load_mcp_servers(file)
    assert str(caught.value).startswith(f"{file}: {told}")


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(MCPConfigError, match=r"no.json: cannot be read: No such file"):
        load_mcp_servers(tmp_path / "no.json")
    with pytest.raises(MCPConfigError, match="cannot be read: Is a directory"):
        load_mcp_servers(tmp_path)


JSON = st.recursive(
    st.none() | st.booleans() | st.floats() | st.text(max_size=5) | st.sampled_from(["stdio", "http", "x", "${A"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["command", "args", "env", "url", "headers", "type", "cwd"]) | st.text(max_size=3),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)


@given(JSON)
def test_any_entry_is_a_server_or_a_config_error(tmp_path_factory: pytest.TempPathFactory, entry: Any) -> None:
    file = tmp_path_factory.getbasetemp() / "any.json"
    file.write_text(json.dumps({"mcpServers": {"a": entry}}))
    try:
        servers = load_mcp_servers(file)
    except MCPConfigError as error:
        assert str(error).startswith(f"{file}: mcpServers.a")
    else:
        assert len(servers) <= 1
