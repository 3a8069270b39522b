"""MCP servers that run in a sandbox, or are reached from inside it.

A task may bring servers that nobody has vetted. They have what the agent has: its sandbox, its user and its network.
The sandbox must have /bin/sh, mkfifo, dd, base64 and tr and, for servers at a URL, bash or nc.
"""

from __future__ import annotations

import base64
import secrets
import tempfile
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING, Unpack
from urllib.parse import urlsplit

import anyio
import anyio.abc

from agentkit_environments import Environment
from agentkit_tools.mcp.server import MCPServer, MCPServerOptions, MCPServerStreamableHttp, last_lines, start_trouble

if TYPE_CHECKING:
    import httpx2
    from mcp.client._transport import TransportStreams
    from mcp.shared.message import SessionMessage

    from agentkit_tools.mcp.connection import Connection

MAX_MESSAGE_BYTES = 16 << 20
MAX_STDERR_BYTES = 16_384
CHUNK_BYTES = 65_536
CLOSE_S = 2.0

MAKE = """\
for program in mkfifo dd base64 tr; do
    command -v "$program" >/dev/null || { echo "it has no program $program" >&2; exit 1; }
done
mkdir -m 700 "$0" && mkfifo "$0/in" "$0/out" "$0/end"
"""
# The shell keeps both pipes open, so that a command that reads or writes one of them never finds it without a partner.
# The output goes through in lines of base64, because the text of a command's output cannot be cut within a character; a
# line with a dot ends it. Nothing is lost: the pipes are there until the dot has been read.
RUN = f"""\
exec 3<>"$0/in" 4<>"$0/out"
{{ "$@" <&3 3>&- 4>&-; echo "exited with status $?" >&2; }} | {{
    while chunk=$(dd bs={CHUNK_BYTES} count=1 2>/dev/null | base64 | tr -d '\\n') && test "$chunk"; do
        echo "$chunk"
    done
    echo .
}} >&4
read -r end <"$0/end"
rm -rf "$0"
"""
SEND = 'cat >"$0/in"'
RECEIVE = f'dd bs={CHUNK_BYTES} count=1 <"$0/out" 2>/dev/null'
END = 'echo >"$0/end"'
CONNECT = """\
if command -v bash >/dev/null; then
    exec bash -c 'exec 5<>"/dev/tcp/$0/$1" 6<&0 && { cat <&6 >&5 & cat <&5; kill $!; }' "$0" "$1"
fi
exec nc "$0" "$1"
"""


class Pipe:
    """The standard input and output of a command in a sandbox, while the command runs.

    Both are named pipes in the sandbox, and each transfer is a short command that reads or writes one of them.
    """

    def __init__(self, environment: Environment, argv: Sequence[str]) -> None:
        self._environment, self._argv = environment, argv
        self._place = f"/tmp/agentkit-mcp-{secrets.token_hex(8)}"
        self._line = ""

    async def run(self, *, task_status: anyio.abc.TaskStatus[None]) -> str:
        """Run the command, report `started`, and return the last lines of its standard error once it has ended.

        Cancellation kills it with everything that it started.

        Raises:
            OSError: The sandbox lacks a program that this needs.
            SandboxLostError: The sandbox is gone.
        """
        made = await self._environment.exec(["/bin/sh", "-c", MAKE, self._place])
        if made.exit_code != 0:
            raise OSError(f"the sandbox cannot connect to it: {made.stderr.strip()}")
        task_status.started()
        argv = ["/bin/sh", "-c", RUN, self._place, *self._argv]
        return last_lines((await self._environment.exec(argv, max_output_bytes=MAX_STDERR_BYTES)).stderr)

    async def send(self, data: bytes) -> None:
        await self._environment.exec(["/bin/sh", "-c", SEND, self._place], stdin=data)

    async def receive(self) -> bytes:
        """Wait for output and return it; empty at the end."""
        while True:
            line, newline, rest = self._line.partition("\n")
            if newline:
                self._line = rest
                if line == ".":
                    await self._environment.exec(["/bin/sh", "-c", END, self._place])
                    return b""
                return base64.b64decode(line)
            text = (await self._environment.exec(["/bin/sh", "-c", RECEIVE, self._place])).stdout
            if not text:
                return b""
            self._line += text


class MCPServerInSandbox(MCPServer):
    """A server that runs as a command in a sandbox and speaks over its standard input and output."""

    def __init__(
        self,
        environment: Environment,
        command: str,
        args: Sequence[str] = (),
        *,
        name: str,
        **options: Unpack[MCPServerOptions],
    ) -> None:
        """Describe a server to be started with `command` and `args`, without a shell, in the work directory.

        Args:
            environment: The sandbox, which must stay open until the server's `async with` is left.
            command: A program, by its path or its name in PATH.
            args: Its arguments.
            name: The server's name.
            options: See `MCPServer`.

        Raises:
            ValueError: see `MCPServer`.
        """
        super().__init__(name=name, **options)
        self.environment = environment
        self.command = command
        self.args = list(args)

    @asynccontextmanager
    async def _transport(self, connection: Connection) -> AsyncIterator[TransportStreams]:
        from mcp.shared.message import SessionMessage

        pipe = Pipe(self.environment, [self.command, *self.args])
        arrived, incoming = anyio.create_memory_object_stream[SessionMessage | Exception](0)
        outgoing, leaving = anyio.create_memory_object_stream[SessionMessage](0)

        async def run(*, task_status: anyio.abc.TaskStatus[None]) -> None:
            async with arrived:
                connection.stderr = await pipe.run(task_status=task_status)

        async def read() -> None:
            with suppress(anyio.BrokenResourceError, anyio.ClosedResourceError):
                async for line in _lines(pipe):
                    await arrived.send(_parsed(line))

        async def write() -> None:
            async for message in leaving:
                text = message.message.model_dump_json(by_alias=True, exclude_unset=True)
                await pipe.send(f"{text}\n".encode())

        async with incoming, outgoing, leaving, anyio.create_task_group() as tasks:
            await tasks.start(run)
            tasks.start_soon(read)
            tasks.start_soon(write)
            yield incoming, outgoing
            tasks.cancel_scope.cancel()

    def _trouble(self, connection: Connection, error: BaseException) -> str:
        return start_trouble(connection, error, self.connect_timeout_s)


class MCPServerHttpInSandbox(MCPServerStreamableHttp):
    """A server that is reached from inside a sandbox, by its network and its host names; `localhost` is the sandbox."""

    def __init__(
        self,
        environment: Environment,
        url: str,
        *,
        sse: bool = False,
        headers: Mapping[str, str] | None = None,
        name: str | None = None,
        **options: Unpack[MCPServerOptions],
    ) -> None:
        """Describe a server at a URL.

        Args:
            environment: The sandbox, which must stay open until the server's `async with` is left.
            url: The URL of the MCP endpoint.
            sse: True if it speaks the older protocol over server-sent events instead of streamable HTTP.
            headers: Headers of every request.
            name: Default: the URL's host.
            options: See `MCPServer`.

        Raises:
            ValueError: the URL or a header is not valid; see also `MCPServer`.
        """
        super().__init__(url, headers=headers, name=name, **options)
        self.environment = environment
        self.sse = sse

    @asynccontextmanager
    async def _connections(self, connection: Connection) -> AsyncIterator[httpx2.AsyncBaseTransport]:
        """Return HTTP over a socket of this machine, each connection of which goes on from inside the sandbox."""
        import httpx2

        parts = urlsplit(self.url)
        port = parts.port or (443 if parts.scheme == "https" else 80)
        argv = ["/bin/sh", "-c", CONNECT, str(parts.hostname), str(port)]

        async def relay(client: anyio.abc.SocketStream) -> None:
            pipe, ended = Pipe(self.environment, argv), anyio.Event()

            async def run(*, task_status: anyio.abc.TaskStatus[None]) -> None:
                connection.stderr = await pipe.run(task_status=task_status) or connection.stderr
                ended.set()

            async def answer() -> None:
                while data := await pipe.receive():
                    await client.send(data)
                with anyio.move_on_after(CLOSE_S):  # a failed command's reason is known before the client sees the end
                    await ended.wait()
                await client.send_eof()

            with suppress(anyio.BrokenResourceError, anyio.ClosedResourceError):
                async with client, anyio.create_task_group() as ours:
                    await ours.start(run)
                    ours.start_soon(answer)
                    async for data in client:
                        await pipe.send(data)
                    ours.cancel_scope.cancel()

        with tempfile.TemporaryDirectory(prefix="agentkit-mcp-") as folder:
            listener = await anyio.create_unix_listener(f"{folder}/http")
            async with anyio.create_task_group() as relays, listener, anyio.create_task_group() as tasks:
                tasks.start_soon(listener.serve, relay, relays)
                async with httpx2.AsyncHTTPTransport(uds=f"{folder}/http") as transport:
                    yield transport
                tasks.cancel_scope.cancel()
                relays.cancel_scope.deadline = anyio.current_time() + CLOSE_S  # they end with the client's connections

    @asynccontextmanager
    async def _session(self, client: httpx2.AsyncClient) -> AsyncIterator[TransportStreams]:
        from mcp.client.sse import sse_client

        if not self.sse:
            async with super()._session(client) as streams:
                yield streams
            return
        found = sse_client(self.url, httpx_client_factory=lambda headers=None, timeout=None, auth=None: client)
        async with found as streams:
            yield streams

    def _trouble(self, connection: Connection, error: BaseException) -> str:
        said = connection.stderr and f"; in the sandbox: {connection.stderr}"
        return super()._trouble(connection, error) + said


async def _lines(pipe: Pipe) -> AsyncIterator[bytes]:
    """Yield the lines of a command's output that are not empty."""
    rest = bytearray()
    while chunk := await pipe.receive():
        *ends, last = chunk.split(b"\n")
        for end in ends:
            if line := bytes(rest) + end:
                yield line
            rest.clear()
        rest += last
        if len(rest) > MAX_MESSAGE_BYTES:
            raise OSError(f"a message has more than {MAX_MESSAGE_BYTES} bytes")


def _parsed(line: bytes) -> SessionMessage | Exception:
    from mcp.shared.message import SessionMessage
    from mcp.types import jsonrpc_message_adapter

    try:
        return SessionMessage(jsonrpc_message_adapter.validate_json(line, by_name=False))
    except ValueError as error:
        return error
