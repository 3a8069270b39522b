"""A small HTTP/1.1 server on a free port of the loopback interface, for fake APIs.

Each connection carries one request. A handler answers it with a `Reply`, whose body may arrive in pieces, wait for
events between them, and break off. In a test without an event loop, run it in a thread:

    with anyio.from_thread.start_blocking_portal() as portal:
        with portal.wrap_async_context_manager(serve(handler)) as url:
            ...
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import anyio
from anyio.abc import SocketAttribute, SocketStream
from anyio.streams.buffered import BufferedByteReceiveStream


@dataclass(frozen=True)
class Request:
    """A request as it arrived; the names of `headers` are in lower case."""

    method: str
    path: str
    headers: Mapping[str, str]
    body: bytes
    connection: BufferedByteReceiveStream

    def json(self) -> Any:
        return json.loads(self.body)

    async def disconnected(self) -> None:
        """Return when the client has closed the connection."""
        while True:
            try:
                await self.connection.receive()
            except (anyio.EndOfStream, anyio.BrokenResourceError):
                return


@dataclass(frozen=True)
class Reply:
    """A response. With `cut`, the connection closes after the body without the end that HTTP asks for."""

    body: bytes | AsyncIterable[bytes] = b""
    status: int = 200
    headers: Mapping[str, str] = field(default_factory=lambda: {"content-type": "text/event-stream"})
    cut: bool = False

    @classmethod
    def of_json(cls, value: object, status: int = 200, headers: Mapping[str, str] | None = None) -> Reply:
        return cls(json.dumps(value).encode(), status, {"content-type": "application/json", **(headers or {})})


Handler = Callable[[Request], Awaitable[Reply]]


@asynccontextmanager
async def serve(handler: Handler, *, port: int = 0) -> AsyncIterator[str]:
    """Serve on a port, by default a free one, and yield the server's URL, without a path.

    An exception of the handler fails the test.
    """

    async def connection(stream: SocketStream) -> None:
        async with stream:
            request = await _read(stream)
            if request is not None:
                reply = await handler(request)
                with suppress(anyio.BrokenResourceError, anyio.ClosedResourceError):  # the client left early
                    await _write(stream, reply)

    listener = await anyio.create_tcp_listener(local_host="127.0.0.1", local_port=port)
    async with listener, anyio.create_task_group() as tasks:
        tasks.start_soon(listener.serve, connection)
        yield f"http://127.0.0.1:{listener.extra(SocketAttribute.local_port)}"
        tasks.cancel_scope.cancel()


async def _read(stream: SocketStream) -> Request | None:
    connection = BufferedByteReceiveStream(stream)
    try:
        head = await connection.receive_until(b"\r\n\r\n", 1 << 20)
    except (anyio.IncompleteRead, anyio.BrokenResourceError):
        return None  # a connection that the client opened and did not use
    first, *lines = head.decode("latin-1").split("\r\n")
    method, path, _ = first.split(" ")
    headers = {name.strip().lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    body = await connection.receive_exactly(int(headers.get("content-length", "0")))
    return Request(method, path, headers, body, connection)


async def _write(stream: SocketStream, reply: Reply) -> None:
    head = {**reply.headers, "transfer-encoding": "chunked", "connection": "close"}
    lines = [f"HTTP/1.1 {reply.status} Scripted", *(f"{name}: {value}" for name, value in head.items())]
    await stream.send("\r\n".join([*lines, "", ""]).encode("latin-1"))
    async for piece in _pieces(reply.body):
        await stream.send(f"{len(piece):x}\r\n".encode() + piece + b"\r\n")
    if not reply.cut:
        await stream.send(b"0\r\n\r\n")


async def _pieces(body: bytes | AsyncIterable[bytes]) -> AsyncIterator[bytes]:
    if isinstance(body, bytes):
        if body:
            yield body
    else:
        async for piece in body:
            if piece:
                yield piece
