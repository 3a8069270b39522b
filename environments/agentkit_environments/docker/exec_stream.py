"""One `docker exec`: the hijacked connection that carries its standard streams, in frames."""

from __future__ import annotations

import select
import socket
import time
from collections.abc import Iterator, Mapping
from typing import Any, Self

from docker import APIClient

from agentkit_environments.executor import BoundedOutput

POLL_S = 0.01
KILLED = 128 + 9
STDERR = 2


class Frames:
    """Parser for the bytes of a connection: frames of an 8-byte header (stream, 0, 0, 0, length) and a payload."""

    def __init__(self) -> None:
        self._header = bytearray()
        self._stream = self._left = 0

    def feed(self, chunk: bytes) -> Iterator[tuple[int, bytes]]:
        """Yield (stream, payload) for the bytes that have arrived; a payload may come in several parts."""
        rest = memoryview(chunk)
        while rest:
            if self._left == 0:
                need = 8 - len(self._header)
                self._header += rest[:need]
                rest = rest[need:]
                if len(self._header) == 8:
                    self._stream, self._left = self._header[0], int.from_bytes(self._header[4:], "big")
                    self._header.clear()
                continue
            yield self._stream, bytes(rest[: self._left])
            rest, self._left = rest[self._left :], max(0, self._left - len(rest))


class ExecStream:
    """One `docker exec` and the connection that carries its standard streams."""

    def __init__(
        self,
        api: APIClient,
        container_id: str,
        argv: list[str],
        stdin: bytes,
        cwd: str,
        env: Mapping[str, str],
        user: str,
        max_output_bytes: int,
    ) -> None:
        self._api = api
        self.stdout, self.stderr = BoundedOutput(max_output_bytes), BoundedOutput(max_output_bytes)
        self._stdin = memoryview(stdin)
        self._id = api.exec_create(
            container_id, argv, stdin=bool(stdin), workdir=cwd, environment=dict(env), user=user
        )["Id"]
        self._stream: Any = api.exec_start(self._id, socket=True)
        self._socket = raw_socket(self._stream)
        self._socket.setblocking(False)
        self._frames = Frames()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        close_socket(self._stream)

    def pump(self, deadline: float, cancel_fd: int | None) -> bool:
        """Move bytes until the command's streams end; return False at the deadline or when `cancel_fd` is readable."""
        poll = select.poll()
        if cancel_fd is not None:
            poll.register(cancel_fd, select.POLLIN)
        while True:
            poll.register(self._socket, select.POLLIN | (select.POLLOUT if self._stdin else 0))
            remaining_s = deadline - time.monotonic()
            if remaining_s <= 0:
                return False
            for fd, event in poll.poll(None if remaining_s == float("inf") else remaining_s * 1000 + 1):
                if fd == cancel_fd:
                    return False
                if event & select.POLLOUT:
                    self._send()
                if event & ~select.POLLOUT and not self._receive():
                    return True

    def exit_code(self, deadline: float, cancel_fd: int | None) -> int | None:
        """Return the command's exit code once its streams have ended, or None at the deadline or on cancellation."""
        cancelled = select.poll()
        if cancel_fd is not None:
            cancelled.register(cancel_fd, select.POLLIN)
        while True:
            state = self._api.exec_inspect(self._id)
            if not state["Running"] and state["ExitCode"] is not None:
                return int(state["ExitCode"])
            if time.monotonic() >= deadline or cancelled.poll(POLL_S * 1000):
                return None

    def _send(self) -> None:
        try:
            self._stdin = self._stdin[self._socket.send(self._stdin[: 1 << 16]) :]
        except BlockingIOError:
            return
        except (BrokenPipeError, ConnectionResetError):
            self._stdin = self._stdin[:0]
            return
        if not self._stdin:
            self._socket.shutdown(socket.SHUT_WR)

    def _receive(self) -> bool:
        try:
            chunk = self._socket.recv(1 << 16)
        except BlockingIOError:
            return True
        except ConnectionResetError:
            return False
        for stream, payload in self._frames.feed(chunk):
            (self.stderr if stream == STDERR else self.stdout).add(payload)
        return bool(chunk)


def close_socket(stream: Any) -> None:
    """Close a connection from the docker library and its response."""
    raw = raw_socket(stream)
    response = getattr(stream, "_response", None)
    if response is not None:
        response.close()
    stream.close()
    raw.close()


def raw_socket(stream: Any) -> socket.socket:
    """Return the socket of a docker library connection: inside a `SocketIO` for a local engine, the object itself
    for TLS."""
    raw: socket.socket = getattr(stream, "_sock", stream)
    return raw
