"""Tools of MCP servers over stdio and streamable HTTP, through the official SDK.

    async with MCPServerStdio("mcp-server-time", name="time") as server:
        agent = Agent("tiny", [*server.tools])

A server starts and lists its tools when its `async with` is entered. Later changes of the list have no effect. All its
processes are dead once the block has been left, in any way. A server runs outside the sandbox, as the user.

- Every request has a deadline. A call's deadline starts again when the server reports progress. At the deadline the
  call is cancelled and becomes an error result. If the server then answers no other request either, the next call
  restarts it.
- A server that ends is restarted by the next call. The call in progress becomes an error result that says that its
  outcome is unknown; it is never repeated.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
import sys
import tempfile
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, nullcontext, suppress
from importlib.util import find_spec
from math import inf
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TypedDict, Unpack
from urllib.parse import urlsplit, urlunsplit

import anyio
import anyio.abc

from agentkit_tools.errors import ArgumentsError, MCPServerError, ToolError
from agentkit_tools.mcp.content import result_parts
from agentkit_tools.mcp.naming import tool_names
from agentkit_tools.parts import ImagePart, parts_text
from agentkit_tools.schema import parse_object, problems
from agentkit_tools.tool import Tool, ToolContext, ToolOutput
from agentkit_tools.validation import Validator

if TYPE_CHECKING:
    import httpx2
    from mcp.client._transport import TransportStreams
    from mcp.types import CallToolResult
    from mcp.types import Tool as RemoteTool

    from agentkit_tools.mcp.connection import Connection

KEEPER = Path(__file__).with_name("keeper.py")
BACKOFF_S = 0.5  # wait before the second restart in a row; doubles with each further one
HEALTH_S = 5.0  # deadline of a health check after a call has timed out
MAX_PAGES = 100  # of a list of tools
MAX_EVENT_BYTES = 64 << 20
MAX_STDERR_LINES = 5  # in an error message
CLOSED = "Connection closed"  # the SDK's message
MIN_SECRET_CHARS = 6  # shorter values are hardly secrets, and redacting them would garble ordinary text

logger = logging.getLogger(__name__)


class MCPServerOptions(TypedDict, total=False):
    """Options of every server; see `MCPServer`."""

    prefix: str | None
    timeout_s: float | None
    max_timeout_s: float
    connect_timeout_s: float
    max_restarts: int
    trust_hints: bool


class MCPServer(ABC):
    """A server whose tools an agent can call, inside `async with`. Use one of the subclasses.

    Attributes:
        tools: the server's tools, in its order.
        dropped: the reason for each tool that cannot be used. Each is also logged as a warning.
    """

    def __init__(
        self,
        *,
        name: str,
        prefix: str | None = None,
        timeout_s: float | None = None,
        max_timeout_s: float = 3600.0,
        connect_timeout_s: float = 30.0,
        max_restarts: int = 5,
        trust_hints: bool = False,
    ) -> None:
        """Describe a server. It starts when its `async with` is entered.

        Args:
            name: The server's name in messages.
            prefix: The model sees `prefix__tool`. Default: the name. Empty: only the tool's name.
            timeout_s: Deadline of a call, in seconds since its start or its last report of progress. Default: the
                agent's time limit of calls (`Limits.call_timeout_s`).
            max_timeout_s: Deadline of a call in seconds since its start, even if progress is reported.
            connect_timeout_s: Deadline for the server to start, and for each page of its list of tools.
            max_restarts: Maximum number of restarts without a successful call in between.
            trust_hints: If True, the server's `readOnlyHint` sets `Tool.read_only`, which lets calls start early.

        Raises:
            ValueError: a time is not positive, or the number of restarts is negative.
        """
        given = {"timeout_s": timeout_s, "max_timeout_s": max_timeout_s, "connect_timeout_s": connect_timeout_s}
        for parameter, value in given.items():
            if value is not None and not value > 0:
                raise ValueError(f"{parameter}: given {value}, expected a positive number of seconds")
        if max_restarts < 0:
            raise ValueError(f"max_restarts: given {max_restarts}, expected 0 or more")
        self.name = name
        self.prefix = name if prefix is None else prefix
        self.timeout_s = timeout_s
        self.max_timeout_s = max_timeout_s
        self.connect_timeout_s = connect_timeout_s
        self.max_restarts = max_restarts
        self.trust_hints = trust_hints
        self.tools: list[Tool] = []
        self.dropped: dict[str, str] = {}
        self._secrets: dict[str, str] = {}
        self._connection: Connection | None = None
        self._tasks: anyio.abc.TaskGroup | None = None
        self._lock = anyio.Lock()
        self._restarts = 0
        self._modes: tuple[str, ...] = ("auto", "legacy")  # modes of the SDK's client to try

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name!r})"

    @abstractmethod
    def _transport(self, connection: Connection) -> AbstractAsyncContextManager[TransportStreams]:
        """Return the streams to the server, which is started or connected to."""

    @abstractmethod
    def _trouble(self, connection: Connection, error: BaseException) -> str:
        """Return why a connection could not be made, and what to do, in one line."""

    async def __aenter__(self) -> Self:
        """Start the server and list its tools.

        Raises:
            MCPServerError: it cannot be started or reached, or does not list its tools.
            RuntimeError: it is running already.
        """
        if self._tasks is not None:
            raise RuntimeError(f"{self!r} is running already; make another object for another connection")
        self._lock, self._restarts = anyio.Lock(), 0
        self._tasks = anyio.create_task_group()
        await self._tasks.__aenter__()
        try:
            connection = await self._connect()
            self.tools = await self._list_tools(connection)
        except BaseException:
            await self._stop()
            raise
        for name, reason in self.dropped.items():
            logger.warning("%s", _printable(f"MCP server {self.name}: the tool {name!r} is left out: {reason}"))
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self._stop()

    async def _stop(self) -> None:
        tasks, self._tasks = self._tasks, None
        if self._connection is not None:
            self._connection.over.set()
        if tasks is not None:
            await tasks.__aexit__(None, None, None)  # an exception of the block propagates as it is, not in a group

    async def _connect(self) -> Connection:
        """Open a new connection.

        Raises:
            MCPServerError: it cannot be opened.
        """
        sdk = find_spec("mcp")
        if sdk is None:
            raise MCPServerError('MCP servers need the package mcp: pip install "agentkit-harness[mcp]"')
        if sdk.submodule_search_locations is None:
            raise MCPServerError(f"the file {sdk.origin} hides the package mcp; rename the file")
        from agentkit_tools.mcp.connection import Connection

        assert self._tasks is not None
        for mode in self._modes:
            connection = Connection()
            try:
                await self._tasks.start(connection.serve, self._transport(connection), mode, self.connect_timeout_s)
            except Exception as error:
                cause = _cause(error)
                if mode != self._modes[-1] and str(cause) == CLOSED:
                    continue  # some servers exit if the first message is not the `initialize` of older protocols
                raise self._error(self._trouble(connection, cause)) from None  # the cause may hold secrets
            break
        self._connection, self._modes = connection, (mode,)
        if self._tasks is None:  # the block was left meanwhile
            connection.over.set()
        return connection

    async def _list_tools(self, connection: Connection) -> list[Tool]:
        from mcp import MCPError
        from mcp.types import METHOD_NOT_FOUND
        from pydantic import ValidationError

        found: dict[str, RemoteTool] = {}
        cursor: str | None = None
        try:
            for _ in range(MAX_PAGES):
                with anyio.fail_after(self.connect_timeout_s):
                    page = await connection.client.list_tools(cursor=cursor)
                for tool in page.tools:
                    if tool.name in found:
                        connection.dropped[tool.name] = "listed twice; the first is used"
                    found.setdefault(tool.name, tool)
                cursor = page.next_cursor
                if not cursor:
                    break
            else:
                raise self._error(f"its list of tools has more than {MAX_PAGES} pages")
        except TimeoutError:
            late = f"it did not list its tools within {self.connect_timeout_s:g} s{connection.noise}"
            raise self._error(late) from None
        except ValidationError as error:
            raise self._error(f"its list of tools is invalid: {error.errors()[0]['msg']}") from None
        except MCPError as error:
            if error.code != METHOD_NOT_FOUND:
                raise self._error(f"it cannot list its tools: {error}") from None
        for name in connection.validators.keys() - found.keys() - connection.dropped.keys():
            connection.dropped[name] = "its x-mcp-header annotation is invalid"  # removed by the SDK
        self.dropped = dict(connection.dropped)
        names = tool_names(self.prefix, found)
        return [
            MCPTool(
                self,
                tool.name,
                names[tool.name],
                tool.description or "",
                connection.validators[tool.name],
                tool.input_schema,
                read_only=self.trust_hints and bool(tool.annotations and tool.annotations.read_only_hint),
            )
            for tool in found.values()
        ]

    async def call_tool(self, name: str, arguments: dict[str, Any], *, timeout_s: float) -> CallToolResult:
        """Call a tool by the server's name for it. The server gets the call at most once.

        Raises:
            ToolError: the server cannot be restarted, ended during the call, answered with an error, or neither
                answered nor reported progress for `timeout_s` seconds.
        """
        try:
            return await self._call(await self._live(), name, arguments, timeout_s)
        except _SessionUnknownError:  # the server was restarted, and refused the call without reading it
            return await self._call(await self._live(), name, arguments, timeout_s)

    async def _call(
        self, connection: Connection, name: str, arguments: dict[str, Any], timeout_s: float
    ) -> CallToolResult:
        """Send a call on a connection and wait for its result, an error, the end of the server, or the deadline."""
        from mcp import MCPError
        from pydantic import ValidationError

        latest = anyio.current_time() + self.max_timeout_s

        async def progress(progress: float, total: float | None, message: str | None) -> None:
            scope.deadline = min(anyio.current_time() + timeout_s, latest)

        connection.calls += 1
        try:
            with anyio.CancelScope(deadline=min(anyio.current_time() + timeout_s, latest)) as scope:
                result = await connection.client.call_tool(name, arguments, progress_callback=progress)
                connection.suspect = False
                self._restarts = 0
                return result
        except Exception as error:
            if connection.over.is_set():
                raise ToolError(
                    f"MCP server {self.name} ended during this call. Its outcome is unknown, and it was not repeated; "
                    "the next call restarts the server"
                ) from None
            if isinstance(error, MCPError) and error.message == "Session terminated":
                connection.over.set()
                raise _SessionUnknownError(f"MCP server {self.name} does not know its session") from None
            if isinstance(error, ValidationError):
                raise ToolError(f"MCP server {self.name} gave an invalid result: {error.errors()[0]['msg']}") from None
            raise ToolError(self._redacted(str(error))) from None
        finally:
            connection.calls -= 1
        connection.suspect = True
        raise ToolError(
            f"{name} timed out: no answer and no progress from MCP server {self.name} within {timeout_s:g} s. It was "
            "asked to stop, and may have taken effect"
        )

    async def _live(self) -> Connection:
        """Return a connection that is open; restart the server if needed.

        Raises:
            ToolError: the server cannot be restarted, or its `async with` has been left.
        """
        async with self._lock:
            connection = self._connection
            if connection is None or self._tasks is None:
                raise ToolError(f"MCP server {self.name} is not running; call its tools inside its `async with`")
            if connection.suspect and not connection.calls and not connection.over.is_set():
                with anyio.move_on_after(HEALTH_S) as scope, suppress(Exception):  # an error is an answer too
                    await connection.client.list_tools()
                connection.suspect = scope.cancelled_caught
                if connection.suspect:
                    connection.over.set()
            if not connection.over.is_set():
                return connection
            await connection.ended.wait()
            if self._restarts >= self.max_restarts:
                raise ToolError(
                    f"not called: MCP server {self.name} was restarted {self._restarts} times without a successful "
                    "call, which is the limit"
                )
            if self._restarts:
                await anyio.sleep(BACKOFF_S * 2 ** (self._restarts - 1))
            self._restarts += 1
            try:
                return await self._connect()
            except MCPServerError as error:
                raise ToolError(f"not called: {error}") from None

    def _error(self, trouble: str) -> MCPServerError:
        return MCPServerError(_printable(self._redacted(f"MCP server {self.name}: {trouble}")))

    def _redacted(self, text: str) -> str:
        """Replace the values of given environment variables and headers in the text by their names."""
        for name, value in sorted(self._secrets.items(), key=lambda item: -len(item[1])):
            if len(value) >= MIN_SECRET_CHARS:
                text = text.replace(value, f"${{{name}}}")
        return text


class MCPServerStdio(MCPServer):
    """A server that runs as a process of this machine and speaks over its standard input and output."""

    def __init__(
        self,
        command: str,
        args: Sequence[str] = (),
        *,
        env: Mapping[str, str] | None = None,
        cwd: str | Path | None = None,
        name: str | None = None,
        **options: Unpack[MCPServerOptions],
    ) -> None:
        """Describe a server to be started with `command` and `args`, without a shell.

        Args:
            command: A program, by its path or its name in PATH.
            args: Its arguments.
            env: Environment variables. Of the harness's own variables, only HOME, LOGNAME, PATH, SHELL, TERM and USER
                are passed on.
            cwd: Working directory. Default: the harness's.
            name: Default: the program's name.
            options: See `MCPServer`.

        Raises:
            ValueError: the command is empty, or an argument or variable is not text; see also `MCPServer`.
        """
        if not command.strip():
            raise ValueError("command: given an empty text, expected a program")
        super().__init__(name=Path(command).stem if name is None else name, **options)
        self.command = command
        self.args = list(args)
        self.env = dict(env or {})
        self.cwd = cwd
        self._secrets = self.env
        if not all(isinstance(text, str) for text in (*self.args, *self.env, *self.env.values())):
            raise ValueError("args and env: expected only texts; convert numbers with str()")

    @asynccontextmanager
    async def _transport(self, connection: Connection) -> AsyncIterator[TransportStreams]:
        from mcp.client.stdio import StdioServerParameters, stdio_client

        self._check_paths()
        kept = StdioServerParameters(
            command=sys.executable,
            args=["-I", "-S", str(KEEPER), self.command, *self.args],
            env=self.env,
            cwd=self.cwd,
            encoding_error_handler="replace",
        )
        with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as stderr:
            try:
                async with stdio_client(kept, stderr) as streams:
                    yield streams
            finally:
                stderr.seek(0)
                connection.stderr = last_lines(stderr.read())

    def _check_paths(self) -> None:
        if self.cwd is not None and not os.path.isdir(self.cwd):
            raise OSError(f"there is no directory {self.cwd}; give an existing one as cwd")
        command = self.command if os.sep not in self.command else os.path.join(self.cwd or "", self.command)
        if shutil.which(command, path=self.env.get("PATH")) is None:
            raise OSError(f"there is no program {self.command}; install it, or give its full path")

    def _trouble(self, connection: Connection, error: BaseException) -> str:
        return start_trouble(connection, error, self.connect_timeout_s)


class MCPServerStreamableHttp(MCPServer):
    """A server that is reached by streamable HTTP."""

    def __init__(
        self,
        url: str,
        *,
        headers: Mapping[str, str] | None = None,
        name: str | None = None,
        **options: Unpack[MCPServerOptions],
    ) -> None:
        """Describe a server at a URL such as `http://localhost:8000/mcp`.

        Args:
            url: The URL of the MCP endpoint.
            headers: Headers of every request, for example `Authorization`.
            name: Default: the URL's host.
            options: See `MCPServer`.

        Raises:
            ValueError: the URL or a header is not valid; see also `MCPServer`.
        """
        host = _host(url)
        if host is None:
            raise ValueError(f"url: given {_public(url)!r}, expected http://... or https://...")
        for header, value in (headers or {}).items():
            if not re.fullmatch(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+", header) or not re.fullmatch(r"[\t\x20-\x7e]*", value):
                raise ValueError(f"headers: {header!r}: expected a header's name and one line of ASCII text")
        super().__init__(name=host if name is None else name, **options)
        self.url = url
        self.headers = dict(headers or {})
        self._secrets = self.headers | {name: value.rpartition(" ")[2] for name, value in self.headers.items()}

    @asynccontextmanager
    async def _transport(self, connection: Connection) -> AsyncIterator[TransportStreams]:
        import httpx2

        async def note(response: httpx2.Response) -> None:
            connection.status = response.status_code

        async with self._connections(connection) as transport:
            # no timeout here: each request has its own deadline
            client = httpx2.AsyncClient(
                transport=transport, headers=self.headers, timeout=None, event_hooks={"response": [note]}
            )
            async with self._session(client) as streams:
                yield streams

    def _connections(self, connection: Connection) -> AbstractAsyncContextManager[httpx2.AsyncBaseTransport | None]:
        """Return how connections are made; None is the client's default."""
        return nullcontext()

    @asynccontextmanager
    async def _session(self, client: httpx2.AsyncClient) -> AsyncIterator[TransportStreams]:
        """Return the streams of a session over a client that has not been entered."""
        from mcp.client.streamable_http import streamable_http_client

        async with (
            client,
            streamable_http_client(self.url, http_client=client, max_sse_event_size=MAX_EVENT_BYTES) as streams,
        ):
            yield streams

    def _trouble(self, connection: Connection, error: BaseException) -> str:
        url, status = _public(self.url), connection.status or 0
        if isinstance(error, TimeoutError):
            return f"{url} did not answer within {self.connect_timeout_s:g} s; check the URL"
        if status == 404:
            return f"nothing at {url} (HTTP 404); check the path, which is often /mcp"
        if status in (401, 403):
            return f"{url} refuses access (HTTP {status}); check the headers, for example Authorization"
        if status >= 400:
            return f"{url} answered with HTTP {status}; check that it is an MCP endpoint"
        if status:
            return f"{url} does not speak MCP over streamable HTTP: {error}; check the path, which is often /mcp"
        return f"{url} cannot be reached: {str(error).rstrip('.')}; check the URL, and that the server runs"


class MCPTool(Tool):
    """A tool of an MCP server. `remote_name` is the server's name for it."""

    needs_environment = False

    def __init__(
        self,
        server: MCPServer,
        remote_name: str,
        name: str,
        description: str,
        validator: Validator,
        parameters: Mapping[str, Any],
        *,
        read_only: bool,
    ) -> None:
        super().__init__(name, description, parameters, read_only=read_only)
        self.server = server
        self.remote_name = remote_name
        self._validator = validator

    def parse(self, arguments: str) -> dict[str, Any]:
        value = parse_object(arguments, name=self.name)
        found = problems(self._validator, value)
        if found:  # many models write null for an optional parameter instead of omitting it
            required = self.parameters.get("required", ())
            fewer = {key: item for key, item in value.items() if item is not None or key in required}
            if len(fewer) == len(value) or problems(self._validator, fewer):
                raise ArgumentsError(self.name, found)
            return fewer
        return value

    def deadline_s(self, context: ToolContext) -> float:
        return inf  # the server's own deadlines apply

    async def run(self, arguments: dict[str, Any], context: ToolContext) -> ToolOutput:
        timeout_s = self.server.timeout_s or context.timeout_s
        result = await self.server.call_tool(self.remote_name, arguments, timeout_s=timeout_s)
        parts = result_parts(result)
        if result.is_error:
            raise ToolError(parts_text(parts) or "the server reports an error without a text")
        if not any(isinstance(part, ImagePart) for part in parts):
            return ToolOutput(parts_text(parts))
        return ToolOutput(parts=parts)


class _SessionUnknownError(ToolError):
    """The server no longer knows the session, and has not read the call."""


def last_lines(stderr: str) -> str:
    """Return the last lines of a server's standard error, as one line for a message."""
    return " | ".join(stderr.split("\n")[-MAX_STDERR_LINES - 1 :]).strip(" |")


def start_trouble(connection: Connection, error: BaseException, timeout_s: float) -> str:
    """Return why a server that is started by a command could not be connected to."""
    match error:
        case TimeoutError():
            trouble = f"it did not answer within {timeout_s:g} s of its start"
        case OSError():
            return str(error)
        case _ if str(error) == CLOSED:
            trouble = "it ended before it answered"
        case _:
            trouble = f"it refused the session: {error}"
    last = connection.stderr and f"; its last lines: {connection.stderr}"
    return f"{trouble}; check its command and arguments{connection.noise}{last}"


def _cause(error: BaseException) -> BaseException:
    """Return the first exception of a group, preferably one that does not only report the end of the connection."""
    leaves = _leaves(error)
    return next((leaf for leaf in leaves if type(leaf).__name__ != "MCPError"), leaves[0])


def _leaves(error: BaseException) -> list[BaseException]:
    if isinstance(error, BaseExceptionGroup):
        return [leaf for member in error.exceptions for leaf in _leaves(member)]
    return [error]


def _host(url: str) -> str | None:
    """Return the host of a URL; None if it is not an HTTP URL."""
    try:
        parts = urlsplit(url)
        return parts.hostname if parts.scheme in ("http", "https") and parts.port != 0 else None
    except ValueError:
        return None


def _public(url: str) -> str:
    """Return a URL without its user, query and fragment, which may hold secrets."""
    try:
        parts = urlsplit(url)
        return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))
    except ValueError:
        return "an invalid URL"


def _printable(text: str) -> str:
    """Return text without control characters, for messages that quote a server."""
    return "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in text)
