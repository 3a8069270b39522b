"""MCP servers over streamable HTTP on loopback: the SDK's own server, and hand-written ones."""

from __future__ import annotations

import json
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import anyio
import pytest
import uvicorn
from mcp.server.mcpserver import Context
from mcp.server.mcpserver import MCPServer as SdkServer
from mcp.types import (
    AudioContent,
    BlobResourceContents,
    CallToolResult,
    ContentBlock,
    EmbeddedResource,
    ImageContent,
    ResourceLink,
    TextContent,
    TextResourceContents,
)
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route

from agentkit_tools import (
    ImagePart,
    MCPServer,
    MCPServerError,
    MCPServerStreamableHttp,
    TextPart,
    ToolCall,
    ToolContext,
    ToolResult,
)

pytestmark = pytest.mark.anyio

PIXEL = "iVBORw0KGgo="
BLOCKS: dict[str, list[ContentBlock]] = {
    "texts": [TextContent(type="text", text="a"), TextContent(type="text", text="b\nc")],
    "image": [
        TextContent(type="text", text="before"),
        ImageContent(type="image", data=PIXEL, mime_type="image/png"),
        TextContent(type="text", text="after"),
    ],
    "odd image": [
        ImageContent(type="image", data="PHN2Zy8+", mime_type="image/svg+xml"),
        ImageContent(type="image", data="%", mime_type="image/png"),
    ],
    "audio": [AudioContent(type="audio", data="AAAA", mime_type="audio/wav")],
    "resources": [
        ResourceLink(type="resource_link", name="readme", uri="file:///a.md", mime_type="text/markdown"),
        EmbeddedResource(type="resource", resource=TextResourceContents(uri="file:///b", text="inside")),
        EmbeddedResource(type="resource", resource=BlobResourceContents(uri="file:///c", blob="AAA=")),
    ],
    "nothing": [],
}
SHOWN = {
    "texts": "a\nb\nc",
    "image": "before\n[image: image/png, 8 bytes]\nafter",
    "odd image": "[image: image/svg+xml, 6 bytes]\n[image: image/png, 0 bytes]",
    "audio": "[audio: audio/wav, 3 bytes]",
    "resources": "[resource readme: file:///a.md, text/markdown]\n[resource file:///b]\ninside\n"
    "[resource file:///c: binary, 2 bytes]",
    "nothing": "",
}


def sdk_app() -> Any:
    server = SdkServer("ours")

    @server.tool()
    def add(a: int, b: int = 1) -> int:
        """Add two numbers."""
        return a + b

    @server.tool()
    def show(kind: str) -> CallToolResult:
        return CallToolResult(content=BLOCKS[kind])

    @server.tool()
    def structured() -> CallToolResult:
        return CallToolResult(content=[], structured_content={"a": [1, None]})

    @server.tool()
    def broken() -> CallToolResult:
        return CallToolResult(content=[TextContent(type="text", text="no such page")], is_error=True)

    @server.tool()
    async def wait(progress: bool, context: Context) -> str:
        for step in range(12):
            if progress:
                await context.report_progress(step)
            await anyio.sleep(0.1)
        return "done"

    return server.streamable_http_app()


def uvicorn_server(app: Any) -> uvicorn.Server:
    return uvicorn.Server(uvicorn.Config(app, log_config=None, ws="none", timeout_graceful_shutdown=1))


@asynccontextmanager
async def serving(app: Any, *, port: int = 0) -> AsyncIterator[str]:
    """Serve an ASGI app on loopback; yield its address."""
    with socket.create_server(("127.0.0.1", port)) as listening:
        server = uvicorn_server(app)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(server.serve, [listening])
            yield f"http://127.0.0.1:{listening.getsockname()[1]}"
            server.should_exit = True


async def use(server: MCPServer, context: ToolContext, tool: str, /, **arguments: Any) -> ToolResult:
    found = next(each for each in server.tools if each.name == tool)
    return await found.call(ToolCall("call_0_0", tool, json.dumps(arguments)), context)


async def test_the_sdks_server(context: ToolContext) -> None:
    async with serving(sdk_app()) as address, MCPServerStreamableHttp(f"{address}/mcp", prefix="") as server:
        assert [tool.name for tool in server.tools] == ["add", "show", "structured", "broken", "wait"]
        assert (await use(server, context, "add", a=2)).content == "3"
        assert (await use(server, context, "add", a=2, b=None)).content == "3"
        assert (await use(server, context, "structured")).content == '{"a": [1, null]}'
        broken = await use(server, context, "broken")
        assert (broken.content, broken.is_error) == ("Error: no such page", True)
        for kind, shown in SHOWN.items():
            assert (await use(server, context, "show", kind=kind)).content == shown
        image = await use(server, context, "show", kind="image")
        assert image.parts == (TextPart("before"), ImagePart("image/png", PIXEL), TextPart("after"))


async def test_progress_extends_the_deadline(context: ToolContext) -> None:
    options: Any = {"prefix": "", "timeout_s": 1.0}
    async with serving(sdk_app()) as address, MCPServerStreamableHttp(f"{address}/mcp", **options) as server:
        assert (await use(server, context, "wait", progress=True)).content == "done"
        assert "timed out" in (await use(server, context, "wait", progress=False)).content
        assert (await use(server, context, "add", a=2)).content == "3"


async def test_parallel_calls(context: ToolContext) -> None:
    results: dict[int, str] = {}

    async def add(server: MCPServer, number: int) -> None:
        results[number] = (await use(server, context, "add", a=number)).content

    async with (
        serving(sdk_app()) as address,
        MCPServerStreamableHttp(f"{address}/mcp", prefix="") as server,
        anyio.create_task_group() as tasks,
    ):
        for number in range(64):
            tasks.start_soon(add, server, number)
    assert results == {number: str(number + 1) for number in range(64)}


async def test_a_server_that_comes_back_is_used_again(context: ToolContext) -> None:
    ended = anyio.Event()
    first = uvicorn_server(sdk_app())

    async def serve() -> None:
        await first.serve([listening])
        ended.set()

    async with anyio.create_task_group() as tasks:
        listening = socket.create_server(("127.0.0.1", 0))
        port = listening.getsockname()[1]
        tasks.start_soon(serve)
        url = f"http://127.0.0.1:{port}/mcp"
        async with MCPServerStreamableHttp(url, prefix="", connect_timeout_s=5) as server:
            assert (await use(server, context, "add", a=2)).content == "3"
            first.should_exit = True
            await ended.wait()
            lost = await use(server, context, "add", a=2)
            assert lost.is_error and "ended during this call" in lost.content
            refused = await use(server, context, "add", a=2)
            assert refused.content.startswith(f"Error: not called: MCP server 127.0.0.1: {url} cannot be reached")
            async with serving(sdk_app(), port=port):
                assert (await use(server, context, "add", a=2)).content == "3"


class Legacy:
    """A server with sessions and nothing else, as they were before 2026. `sessions` are those that it knows."""

    def __init__(self) -> None:
        self.sessions: set[str] = set()
        self.opened = 0
        self.calls: list[str] = []
        self.headers: dict[str, str] = {}
        self.app = Starlette(routes=[Route("/mcp", self.answer, methods=["POST", "GET", "DELETE"])])

    async def answer(self, request: Request) -> Response:
        self.headers = dict(request.headers)
        session = request.headers.get("mcp-session-id")
        if request.method != "POST":
            return Response(status_code=405)
        message = await request.json()
        method = message["method"]
        if method == "initialize":
            self.opened += 1
            session = f"session-{self.opened}"
            self.sessions.add(session)
            about = {"protocolVersion": "2025-06-18", "capabilities": {"tools": {}}}
            result: dict[str, Any] = about | {"serverInfo": {"name": "legacy", "version": "1"}}
        elif session not in self.sessions:
            return Response(status_code=400 if session is None else 404)
        elif "id" not in message:
            return Response(status_code=202)
        elif method == "tools/list":
            result = {"tools": [{"name": "note", "inputSchema": {"type": "object"}}]}
        else:
            self.calls.append(session)
            result = {"content": [{"type": "text", "text": session}]}
        headers = {"mcp-session-id": session}
        return JSONResponse({"jsonrpc": "2.0", "id": message["id"], "result": result}, headers=headers)


async def test_a_session_that_the_server_has_forgotten_is_opened_again(context: ToolContext) -> None:
    legacy = Legacy()
    async with serving(legacy.app) as address, MCPServerStreamableHttp(f"{address}/mcp", prefix="") as server:
        assert (await use(server, context, "note")).content == "session-1"
        legacy.sessions.clear()
        assert (await use(server, context, "note")).content == "session-2"
    assert legacy.calls == ["session-1", "session-2"]


async def test_headers_are_sent_and_never_shown() -> None:
    legacy = Legacy()
    headers = {"Authorization": "Bearer s3cret-value"}
    async with serving(legacy.app) as address, MCPServerStreamableHttp(f"{address}/mcp", headers=headers) as server:
        assert legacy.headers["authorization"] == "Bearer s3cret-value"
        assert "s3cret" not in repr(server) + repr(server.tools)


def answering(status: int, body: str = "", **headers: str) -> Callable[[Request], Awaitable[Response]]:
    async def answer(request: Request) -> Response:
        echoed = request.headers.get("authorization", "")
        return HTMLResponse(body + echoed, status_code=status, headers=headers)

    return answer


async def silent(request: Request) -> Response:
    await anyio.sleep(20)
    return Response()


async def refuse(request: Request) -> Response:
    message = await request.json()
    error = {"code": -32000, "message": f"bad {request.headers['authorization']}"}
    return JSONResponse({"jsonrpc": "2.0", "id": message["id"], "error": error})


@pytest.mark.parametrize(
    ("path", "told"),
    [
        ("/none?key=s3cret-value", r"nothing at http://127.0.0.1:\d+/none \(HTTP 404\); check the path, .* /mcp"),
        ("/401", r"http://127.0.0.1:\d+/401 refuses access \(HTTP 401\); check the headers"),
        ("/500", r"http://127.0.0.1:\d+/500 answered with HTTP 500; check that it is an MCP endpoint"),
        ("/html", r"http://127.0.0.1:\d+/html does not speak MCP .*: Unexpected content type: text/html.*; check"),
        ("/json", r"http://127.0.0.1:\d+/json does not speak MCP .*; check the path"),
        ("/moved", r"http://127.0.0.1:\d+/moved .*Redirect to https://example.com/mcp not followed"),
        ("/silent", r"http://127.0.0.1:\d+/silent did not answer within 1 s; check the URL"),
        ("/refuse", r"http://127.0.0.1:\d+/refuse does not speak MCP .*: bad Bearer \$\{Authorization\}"),
    ],
)
async def test_an_endpoint_that_cannot_be_used_says_why(path: str, told: str) -> None:
    answers = {
        "/401": answering(401),
        "/500": answering(500),
        "/html": answering(200, "<p>Hello</p>"),
        "/json": answering(200, "{}", **{"content-type": "application/json"}),
        "/moved": answering(307, location="https://example.com/mcp?key=s3cret-value"),
        "/silent": silent,
        "/refuse": refuse,
    }
    app = Starlette(routes=[Route(place, answer, methods=["POST", "GET"]) for place, answer in answers.items()])
    async with serving(app) as address:
        options: Any = {"connect_timeout_s": 1 if path == "/silent" else 20}
        with pytest.raises(MCPServerError, match=f"^MCP server 127.0.0.1: {told}") as caught:
            async with MCPServerStreamableHttp(
                address + path, headers={"Authorization": "Bearer s3cret-value"}, **options
            ):
                pass
        assert "\n" not in str(caught.value) and "s3cret" not in str(caught.value)


async def test_an_address_that_nobody_listens_on() -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with pytest.raises(MCPServerError, match=rf"http://127.0.0.1:{port}/mcp cannot be reached: .*; check the URL"):
        async with MCPServerStreamableHttp(f"http://127.0.0.1:{port}/mcp"):
            pass


@pytest.mark.parametrize(
    "url", ["localhost:8000/mcp", "mcp", "ftp://a/mcp", "http://", "http:///mcp", "http://[a/mcp", "http://a:b/", ""]
)
def test_an_address_that_is_not_http(url: str) -> None:
    with pytest.raises(ValueError, match=r"url: given .*, expected http"):
        MCPServerStreamableHttp(url)


@pytest.mark.parametrize("headers", [{"A": "s3cret\nX: y"}, {"A b": "s3cret"}, {"A": "s3crét"}, {"": "s3cret"}])
def test_a_header_that_cannot_be_sent(headers: dict[str, str]) -> None:
    with pytest.raises(ValueError, match=r"headers: .*: expected a header's name and one line of ASCII") as caught:
        MCPServerStreamableHttp("http://localhost/mcp", headers=headers)
    assert "s3cr" not in str(caught.value)
