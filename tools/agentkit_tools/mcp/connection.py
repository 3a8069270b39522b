"""One connection to an MCP server. It starts and ends in the same task, as the SDK's cancel scopes require.

Lists of tools are checked here, before the SDK sees them, because the SDK rejects a list with one invalid tool.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import anyio
import anyio.abc
from mcp.client import Client
from mcp.shared.message import SessionMessage
from mcp.types import Implementation, JSONRPCResponse
from pydantic import ValidationError

from agentkit_tools.errors import ToolDefinitionError
from agentkit_tools.schema import check_schema
from agentkit_tools.validation import Validator

if TYPE_CHECKING:
    from mcp.client._transport import ReadStream, TransportStreams

CLOSE_S = 5.0  # time to end a session properly, before processes are killed
MAX_EXCERPT_CHARS = 200

# The SDK logs tracebacks of what `Connection` handles. Without a handler, Python would print them to standard error.
for sdk in ("mcp", "client"):
    logging.getLogger(sdk).addHandler(logging.NullHandler())


class Connection:
    """A connection, its state, and the information that explains its failure.

    Attributes:
        client: the SDK's client, once connected.
        over: set when the server can give no more answers. Set it to close the connection.
        ended: set when everything is cleaned up, and the server's processes are dead.
        suspect: True if a call has timed out since the server last answered.
        calls: number of calls in flight.
        validators: the validator of the arguments of each listed tool, by name.
        dropped: the reason for each listed tool that cannot be used.
        garbage: the start of a line that is not JSON-RPC, if the server wrote any.
        stderr: the last lines of the server's standard error, once it has ended.
        status: the status of the last HTTP response.
    """

    client: Client

    def __init__(self) -> None:
        self.over = anyio.Event()
        self.ended = anyio.Event()
        self.suspect = False
        self.calls = 0
        self.validators: dict[str, Validator] = {}
        self.dropped: dict[str, str] = {}
        self.garbage = ""
        self.stderr = ""
        self.status: int | None = None

    @property
    def noise(self) -> str:
        """A clause for an error that shows `garbage`, if there is any."""
        return self.garbage and f"; its standard output is not JSON-RPC: {self.garbage!r}"

    async def serve(
        self,
        transport: AbstractAsyncContextManager[TransportStreams],
        mode: str,
        timeout_s: float,
        *,
        task_status: anyio.abc.TaskStatus[None],
    ) -> None:
        """Connect within `timeout_s`, report `started`, and stay connected until `over` is set.

        `mode` is passed to the SDK's `Client`: "auto" or "legacy".

        Raises:
            TimeoutError: the connection was not made in time.
            Exception: the connection failed for another reason. Failures after that only end the connection; the calls
                in flight report them.
        """
        started = False
        scope = anyio.CancelScope(deadline=anyio.current_time() + timeout_s)
        try:
            with scope:
                async with Client(
                    self._watched(transport), cache=None, client_info=_identity(), mode=mode
                ) as self.client:
                    scope.deadline = math.inf
                    started = True
                    task_status.started()
                    await self.over.wait()
                    scope.deadline = anyio.current_time() + CLOSE_S
            if not started:
                raise TimeoutError
        except Exception:
            if not started:
                if scope.cancel_called:
                    raise TimeoutError from None
                raise
        finally:
            self.over.set()
            self.ended.set()

    @asynccontextmanager
    async def _watched(
        self, transport: AbstractAsyncContextManager[TransportStreams]
    ) -> AsyncIterator[TransportStreams]:
        async with transport as (incoming, outgoing):
            yield _Watched(incoming, self), outgoing

    def receive(self, item: SessionMessage | Exception) -> None:
        """Inspect a message before the SDK does. In a list of tools, keep only tools that the SDK accepts."""
        if isinstance(item, Exception):
            if isinstance(item, ValidationError):
                self.garbage = str(item.errors()[0]["input"])[:MAX_EXCERPT_CHARS]
        elif isinstance(item.message, JSONRPCResponse) and isinstance(tools := item.message.result.get("tools"), list):
            item.message.result["tools"] = [kept for tool in tools if (kept := self._sifted(tool)) is not None]

    def _sifted(self, tool: Any) -> dict[str, Any] | None:
        """Return the fields of a listed tool that are used; None, with the reason in `dropped`, if it is invalid.

        Output schemas are left out, because the SDK would validate results in the event loop, without a time limit.
        """
        name = tool.get("name") if isinstance(tool, dict) else None
        if not isinstance(name, str):
            self.dropped[""] = "name: given none, expected a text"
            return None
        schema, annotations = tool.get("inputSchema"), tool.get("annotations")
        try:
            if not isinstance(schema, dict):
                raise ToolDefinitionError(f"parameters: given {json.dumps(schema):.60}, expected a JSON schema")
            self.validators.setdefault(name, check_schema(schema, name=name))  # the first tool of a name is used
        except ToolDefinitionError as error:
            self.dropped[name] = str(error).removeprefix(f"tool {name!r}, ")
            return None
        about = next((text for key in ("description", "title") if isinstance(text := tool.get(key), str)), "")
        read_only = isinstance(annotations, dict) and annotations.get("readOnlyHint") is True
        return {
            "name": name,
            "description": about,
            "inputSchema": schema,
            "annotations": {"readOnlyHint": read_only},
        }


class _Watched:
    """The incoming stream of a transport, seen by a `Connection`."""

    def __init__(self, stream: ReadStream[SessionMessage | Exception], connection: Connection) -> None:
        self._stream = stream
        self._connection = connection

    @property
    def last_context(self) -> Any:
        """The context of the last message's sender, which the SDK looks up by this name."""
        return getattr(self._stream, "last_context", None)

    async def receive(self) -> SessionMessage | Exception:
        try:
            item = await self._stream.receive()
        except BaseException:  # including the cancellation by a transport that fails
            self._connection.over.set()
            raise
        self._connection.receive(item)
        return item

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> SessionMessage | Exception:
        try:
            return await self.receive()
        except anyio.EndOfStream:
            raise StopAsyncIteration from None

    async def aclose(self) -> None:
        await self._stream.aclose()

    async def __aenter__(self) -> Self:
        await self._stream.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> bool | None:
        return await self._stream.__aexit__(kind, error, traceback)


def _identity() -> Implementation:
    from importlib.metadata import version

    return Implementation(name="agentkit", version=version("agentkit-harness"))
