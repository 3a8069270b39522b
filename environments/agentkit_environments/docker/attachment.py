"""The executor of a container, reached through the engine: its standard streams share one attached connection."""

from __future__ import annotations

import socket
import ssl
from collections.abc import Iterator

import anyio
import anyio.lowlevel
import anyio.to_thread

from agentkit_environments.docker.container import Container, raw_socket
from agentkit_environments.errors import SandboxLostError

CHUNK = 1 << 20
STDERR = 2
SAID_BYTES = 2000


class Frames:
    """Parser for the bytes of a connection: frames of an 8-byte header (stream, 0, 0, 0, length) and a payload."""

    def __init__(self) -> None:
        self._header = bytearray()
        self._stream = self._left = 0

    def feed(self, chunk: bytes) -> Iterator[tuple[int, memoryview]]:
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
            yield self._stream, rest[: self._left]
            rest, self._left = rest[self._left :], max(0, self._left - len(rest))


class AttachedPeer:
    """A container's executor, as a peer of `Connection`."""

    def __init__(self, container: Container) -> None:
        self._container = container
        self._socket = raw_socket(container.stream)
        self._socket.setblocking(False)
        self._frames, self._said = Frames(), b""

    async def send(self, data: bytes) -> None:
        view = memoryview(data)
        while view:
            try:
                view = view[self._socket.send(view[:CHUNK]) :]
            except (BlockingIOError, ssl.SSLWantWriteError):
                await anyio.wait_writable(self._socket)
            except ssl.SSLWantReadError:
                await anyio.wait_readable(self._socket)

    async def receive(self) -> bytes:
        while True:
            # Read before waiting: a TLS socket can hold data that has already been taken from the kernel.
            try:
                chunk = self._socket.recv(CHUNK)
            except (BlockingIOError, ssl.SSLWantReadError):
                await anyio.wait_readable(self._socket)
                continue
            except ssl.SSLWantWriteError:
                await anyio.wait_writable(self._socket)
                continue
            if not chunk:
                raise anyio.EndOfStream
            data = bytearray()
            for stream, payload in self._frames.feed(chunk):
                if stream == STDERR:
                    self._said = (self._said + bytes(payload))[-SAID_BYTES:]
                else:
                    data += payload
            await anyio.lowlevel.cancel_shielded_checkpoint()
            if data:
                return bytes(data)

    def kill(self) -> None:
        try:
            self._socket.shutdown(socket.SHUT_RDWR)
        except OSError:  # the engine has closed it
            return

    async def loss(self) -> SandboxLostError:
        with anyio.CancelScope(shield=True):
            error = await anyio.to_thread.run_sync(self._container.lost)
        said = self._said.decode("utf-8", "replace").strip()
        return type(error)(f"{error}: {said}") if said else error

    async def close(self) -> None:
        anyio.notify_closing(self._socket)
        await anyio.to_thread.run_sync(self._container.remove)
