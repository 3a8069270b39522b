"""One `docker exec`: the hijacked connection that carries its standard streams, in frames."""

from __future__ import annotations

import select
import socket
import time
from collections.abc import Mapping
from typing import Any, Self

from docker import APIClient
from docker.errors import NotFound

from agentkit_environments.errors import SandboxLostError
from agentkit_environments.executor import BoundedOutput

KILL_TIMEOUT_S = 10.0


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
        self._api, self._container_id = api, container_id
        self.stdout, self.stderr = BoundedOutput(max_output_bytes), BoundedOutput(max_output_bytes)
        self._stdin = memoryview(stdin)
        self._id = api.exec_create(
            container_id, argv, stdin=bool(stdin), workdir=cwd, environment=dict(env), user=user
        )["Id"]
        self._stream: Any = api.exec_start(self._id, socket=True)
        self._socket = _raw_socket(self._stream)
        self._socket.setblocking(False)
        self._frame = bytearray()
        self._output: BoundedOutput = self.stdout
        self._left = 0

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

    def exit_code(self) -> int:
        """Return the command's exit code, once its streams have ended."""
        deadline = time.monotonic() + KILL_TIMEOUT_S
        while time.monotonic() < deadline:
            try:
                state = self._api.exec_inspect(self._id)
            except NotFound as error:
                raise SandboxLostError(f"container {self._container_id[:12]} has ended") from error
            if not state["Running"]:
                return int(state["ExitCode"])
            time.sleep(0.01)
        raise SandboxLostError(f"container {self._container_id[:12]}: a command ended without an exit code")

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
        """Take what has arrived apart: frames of 8 bytes (stream, 0, 0, 0, length) and a payload."""
        try:
            chunk = memoryview(self._socket.recv(1 << 16))
        except BlockingIOError:
            return True
        except ConnectionResetError:
            return False
        if not chunk:
            return False
        while chunk:
            if self._left == 0:
                need = 8 - len(self._frame)
                self._frame += chunk[:need]
                chunk = chunk[need:]
                if len(self._frame) == 8:
                    self._output = self.stderr if self._frame[0] == 2 else self.stdout
                    self._left = int.from_bytes(self._frame[4:], "big")
                    self._frame.clear()
                continue
            payload = chunk[: self._left]
            self._output.add(bytes(payload))
            self._left -= len(payload)
            chunk = chunk[len(payload) :]
        return True


def close_socket(stream: Any) -> None:
    """Close a connection that the docker library has handed out, and the response it belongs to."""
    raw = _raw_socket(stream)
    response = getattr(stream, "_response", None)
    if response is not None:
        response.close()
    stream.close()
    raw.close()


def _raw_socket(stream: Any) -> socket.socket:
    """Return the socket under a connection of the docker library: a `SocketIO` for a local engine, itself for TLS."""
    raw: socket.socket = getattr(stream, "_sock", stream)
    return raw
