"""The harness's end of an executor: requests out, replies in, any number in flight.

There are two executors with one protocol, which `executor.py` documents: `executor.py` itself in a process sandbox, and
`docker/executor/executor.c` in a container.
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable, Mapping, Sequence
from itertools import count
from typing import IO, Any, Protocol

import anyio
from anyio.abc import Process

from agentkit_environments.environment import ExecRequest, ExecResult, input_bytes
from agentkit_environments.errors import HostFailureError, SandboxLostError, SnapshotError
from agentkit_environments.executor import FRAME, start_failure
from agentkit_environments.live_output import OnChunk

START_TIMEOUT_S = 20.0
FILE_TIMEOUT_S = 60.0
SEND_TIMEOUT_S = 30.0
CANCEL_TIMEOUT_S = 5.0
CLOSE_TIMEOUT_S = 5.0
HANG_TIMEOUT_S = 10.0
MAX_HEADER_BYTES = 8 << 20
READY = 0

Reply = tuple[dict[str, Any], bytes]


class Peer(Protocol):
    """A running executor: its standard streams and its end."""

    async def send(self, data: bytes) -> None:
        """Write to its standard input. Raises OSError or an anyio resource error if it is gone."""

    async def receive(self) -> bytes:
        """Return some bytes of its standard output. Raises `anyio.EndOfStream` or such an error at the end."""

    def kill(self) -> None:
        """End it at once, without waiting. Does nothing if it has ended."""

    async def loss(self) -> SandboxLostError:
        """Wait for its end, which nobody requested, and return the error that gives the reason."""

    async def close(self) -> None:
        """End it and with it every process of its sandbox; all are dead on return."""


class ProcessPeer:
    """An executor that is a child process of the harness, or ends with one."""

    def __init__(self, process: Process, stderr: IO[bytes], host_failure: Callable[[], str | None]) -> None:
        """Take over a started process.

        Args:
            process: The executor, or the launcher that ends with it.
            stderr: The file that receives its standard error; closed by this object.
            host_failure: Returns evidence that the host failed; called when the process has ended unexpectedly.
        """
        assert process.stdin is not None
        assert process.stdout is not None
        self._process, self._stderr, self._host_failure = process, stderr, host_failure
        self._stdin = process.stdin
        self.send, self.receive = process.stdin.send, process.stdout.receive

    def kill(self) -> None:
        if self._process.returncode is None:
            self._process.kill()

    async def loss(self) -> SandboxLostError:
        with anyio.CancelScope(shield=True), anyio.move_on_after(CLOSE_TIMEOUT_S):
            await self._process.wait()
        self._stderr.seek(0, 2)
        self._stderr.seek(max(0, self._stderr.tell() - 2000))
        said = self._stderr.read().decode("utf-8", "replace").strip()
        reason = f"its process ended with status {self._process.returncode}" + (f": {said}" if said else "")
        failure = self._host_failure()
        return SandboxLostError(reason) if failure is None else HostFailureError(f"{failure}; {reason}")

    async def close(self) -> None:
        with anyio.move_on_after(CLOSE_TIMEOUT_S):
            await self._stdin.aclose()
            await self._process.wait()
        if self._process.returncode is None:
            self._process.kill()
            await self._process.wait()
        await self._process.aclose()
        self._stderr.close()


class Connection:
    """Frames to and from one executor.

    There is no background task. A request that waits for its reply reads frames for all waiting requests, and hands the
    reading over to another waiter when its own reply has arrived. Once the executor is gone, every request raises
    `SandboxLostError`.
    """

    def __init__(self, peer: Peer) -> None:
        self._peer = peer
        self._ids = count(READY + 1)
        self._buffer = bytearray()
        self._waiting: dict[int, anyio.Event] = {READY: anyio.Event()}
        self._replies: dict[int, Reply] = {}
        self._listeners: dict[int, OnChunk] = {}
        self._is_reading = False
        self._sending = anyio.Lock()
        self._lost: str | None = None
        self._error: type[SandboxLostError] = SandboxLostError

    async def ready(self) -> None:
        """Wait for the executor's first frame. Raises SnapshotError if the sandbox's snapshot cannot be restored."""
        header, _ = await self._reply_to(READY)
        if "errno" in header:
            raise SnapshotError(f"the snapshot cannot be restored: {header['message']}")
        del self._waiting[READY]  # otherwise `_hand_on` would keep handing the reading to a waiter that is gone

    async def request(
        self,
        operation: str,
        fields: Mapping[str, Any],
        body: bytes,
        timeout_s: float | None,
        on_chunk: OnChunk | None = None,
    ) -> Reply:
        """Send one request and return its reply.

        When the caller is cancelled, a cancel request goes to the executor, and the cancellation continues after the
        executor's reply. A reply that takes longer than `timeout_s` means that the executor hangs, so it is killed.
        `on_chunk` is called with the chunks that come before the reply, from the task of any request.

        Raises:
            SandboxLostError: If the executor is gone or hangs.
            OSError: If the operation fails inside the sandbox; E2BIG if `fields` are too large.
        """
        request_id = next(self._ids)
        self._waiting[request_id] = anyio.Event()
        if on_chunk is not None:
            self._listeners[request_id] = on_chunk
        try:
            await self._send({"id": request_id, "op": operation, **fields}, body)
            try:
                with anyio.fail_after(timeout_s):
                    header, reply = await self._reply_to(request_id)
            except TimeoutError:
                raise self._lose(f"it did not answer within {timeout_s} s") from None
            except anyio.get_cancelled_exc_class():
                self._listeners.pop(request_id, None)
                with anyio.move_on_after(CANCEL_TIMEOUT_S, shield=True) as scope:
                    await self._send({"id": next(self._ids), "op": "cancel", "target": request_id}, b"")
                    await self._reply_to(request_id)
                if scope.cancelled_caught:
                    self._lose("it did not answer a cancellation")
                raise
        finally:
            self._waiting.pop(request_id, None)
            self._replies.pop(request_id, None)
            self._listeners.pop(request_id, None)
            self._hand_on()
        if "errno" in header:
            number = header["errno"]
            path = header.get("path", fields.get("path", fields.get("cwd")))
            raise OSError(number, header["message"] or os.strerror(number), path)
        return header, reply

    async def exec(self, request: ExecRequest, env: Mapping[str, str], user: Sequence[str] | None = None) -> ExecResult:
        """Run a command; see `Environment.exec`.

        Args:
            request: The command.
            env: All its variables; those in `request` are ignored.
            user: Its uid, gid and further gids, for the executor of a container. Default: the agent's.
        """
        fields = {
            "argv": request.argv,
            "cwd": request.cwd,
            "env": dict(env),
            "timeout_s": request.timeout_s,
            "max_output_bytes": request.max_output_bytes,
            **({} if user is None else {"user": list(user)}),
            **({} if request.on_chunk is None else {"chunks": True}),
        }
        answer_s = None if request.timeout_s is None else request.timeout_s + HANG_TIMEOUT_S
        try:
            header, body = await self.request("exec", fields, input_bytes(request.stdin), answer_s, request.on_chunk)
        except OSError as error:
            if error.errno != errno.E2BIG:
                raise
            exit_code, message = start_failure(error, request.argv)
            return ExecResult(exit_code, "", message, False, False, 0.0)
        return ExecResult(
            exit_code=header["exit_code"],
            stdout=body[: header["stdout"]].decode("utf-8", "replace"),
            stderr=body[header["stdout"] :].decode("utf-8", "replace"),
            truncated=header["truncated"],
            timed_out=header["timed_out"],
            duration_s=header["duration_s"],
        )

    async def kill_all(self) -> None:
        """Kill every process of the sandbox except the executor; see `Environment.kill_all`."""
        try:
            await self.request("kill_all", {}, b"", HANG_TIMEOUT_S)
        except TimeoutError as error:
            raise SandboxLostError(f"the sandbox is gone: {error.strerror}") from error

    async def close(self) -> None:
        """End the executor and with it every process of its sandbox; all are dead on return."""
        self._lost = self._lost or "it was closed"
        with anyio.CancelScope(shield=True):
            await self._peer.close()
            self._wake_all()

    async def _send(self, header: dict[str, Any], body: bytes) -> None:
        encoded = json.dumps(header).encode()
        if len(encoded) > MAX_HEADER_BYTES:  # no kernel accepts a path or an argument list of this size
            raise OSError(errno.E2BIG, os.strerror(errno.E2BIG))
        async with self._sending:
            if self._lost is not None:
                raise self._gone()
            try:
                # A partial frame makes the connection unusable, so a cancelled sender still sends all of its frame.
                with anyio.CancelScope(shield=True), anyio.fail_after(SEND_TIMEOUT_S):
                    await self._peer.send(FRAME.pack(len(encoded), len(body)) + encoded + body)
            except TimeoutError:
                raise self._lose("it takes no more requests") from None
            except (OSError, anyio.BrokenResourceError, anyio.ClosedResourceError):
                raise await self._died() from None

    async def _reply_to(self, request_id: int) -> Reply:
        while request_id not in self._replies:
            if self._lost is not None:
                raise self._gone()
            if self._is_reading:
                await self._waiting[request_id].wait()
                if request_id not in self._replies:
                    self._waiting[request_id] = anyio.Event()
                continue
            self._is_reading = True
            try:
                await self._read_frame()
            finally:
                self._is_reading = False
        return self._replies.pop(request_id)

    async def _read_frame(self) -> None:
        """Read at least one frame. Wake the request that waits for a reply, or pass on a chunk."""
        while True:
            if len(self._buffer) >= FRAME.size:
                header_size, body_size = FRAME.unpack_from(self._buffer)
                body_start = FRAME.size + header_size
                if len(self._buffer) >= body_start + body_size:
                    header = json.loads(self._buffer[FRAME.size : body_start])
                    body = bytes(self._buffer[body_start : body_start + body_size])
                    del self._buffer[: body_start + body_size]
                    if "chunk" in header:
                        if (on_chunk := self._listeners.get(header["id"])) is not None:
                            on_chunk(header["chunk"], body)
                    elif header["id"] in self._waiting:
                        self._replies[header["id"]] = header, body
                        self._waiting[header["id"]].set()
                    return
            try:
                self._buffer += await self._peer.receive()
            except (OSError, anyio.EndOfStream, anyio.BrokenResourceError, anyio.ClosedResourceError):
                raise await self._died() from None

    def _hand_on(self) -> None:
        """Let another waiter read, if none is reading."""
        if not self._is_reading:
            for request_id, event in self._waiting.items():
                if request_id not in self._replies:
                    event.set()
                    return

    def _wake_all(self) -> None:
        for event in self._waiting.values():
            event.set()

    def _lose(self, reason: str) -> SandboxLostError:
        if self._lost is None:
            self._lost = reason
            self._peer.kill()
            self._wake_all()
        return self._gone()

    async def _died(self) -> SandboxLostError:
        if self._lost is None:
            error = await self._peer.loss()
            if self._lost is None:
                self._error = type(error)
                self._lose(str(error))
        return self._gone()

    def _gone(self) -> SandboxLostError:
        return self._error(f"the sandbox is gone: {self._lost}")
