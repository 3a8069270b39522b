"""The filtering proxy of a sandbox: HTTP and HTTPS to the hosts of an allowlist, from outside the sandbox.

    command ── 127.0.0.1:3128 in the sandbox ══ this proxy, in the harness ── one of the host's public addresses

The sandbox has no network but its loopback interface, so the proxy is the only way out, and no name can be resolved
inside. The sandbox's first program opens the listening socket there and hands it to the harness, which accepts the
connections: nothing inside the sandbox takes part in the filtering, or can replace it.

A client names its destination by `CONNECT HOST:PORT`, or by a request for `http://HOST:PORT/...`, whose `Host` field is
written anew. A name is resolved once, and the connection goes to one of the addresses that are public, so that no name
leads into the host's own networks. An address can only be reached if the allowlist has it. What a client sends through
a tunnel is not looked at: a host in the allowlist can pass it on.
"""

from __future__ import annotations

import re
import socket
import threading
from collections import Counter
from dataclasses import dataclass
from typing import Self

import anyio
import anyio.from_thread
import anyio.lowlevel
from anyio.abc import SocketListener, SocketStream

from agentkit_environments.errors import SandboxLostError
from agentkit_environments.network import Destination, Network, Phase, is_public_address

PORT = 3128
"""Port of the proxy on the sandbox's loopback interface."""
MAX_CLIENTS = 32
"""Connections at the same time; others wait. Each takes two descriptors of the harness."""
MAX_HEAD_BYTES = 32 << 10
HEAD_TIMEOUT_S = 10.0
CONNECT_TIMEOUT_S = 30.0
LINGER_S = 2.0
MAX_REFUSALS = 256
"""Different refusals that are kept; of further ones, only the number."""
CHUNK = 1 << 16

VARIABLES = {
    **dict.fromkeys(("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy"), f"http://127.0.0.1:{PORT}"),
    **dict.fromkeys(("NO_PROXY", "no_proxy"), "localhost,127.0.0.1,::1"),
}
"""Variables that send the HTTP clients of commands to the proxy."""

REQUEST_LINE = re.compile(rb"([A-Z]{1,20}) ([!-~]+) HTTP/1\.[01]")
FIELD = re.compile(rb"([!#$%&'*+.^_`|~0-9A-Za-z-]+):[^\x00\r\n]*")
HTTP_URL = re.compile(r"http://([^/?#@]+)(/[^#]*|\?[^#]*)?", re.IGNORECASE)
OWN_FIELDS = (b"host", b"connection", b"proxy-connection", b"keep-alive", b"proxy-authorization", b"upgrade")
"""Fields of a request that are not passed on; `Host` and `Connection` are written anew."""
STATUSES = {400: "Bad Request", 403: "Forbidden", 408: "Request Timeout", 431: "Too Large", 502: "Bad Gateway"}
BROKEN = (OSError, anyio.BrokenResourceError, anyio.ClosedResourceError)


class Internet:
    """The network outside the sandbox."""

    async def resolve(self, host: str) -> list[str]:
        """Return the addresses of a name. Raises OSError if it has none."""
        found = await anyio.getaddrinfo(host, None, type=socket.SOCK_STREAM)
        return list(dict.fromkeys(str(address[0]) for *_, address in found))

    async def connect(self, address: str, port: int) -> SocketStream:
        """Open a connection to an address. Raises OSError."""
        return await anyio.connect_tcp(address, port)


class _Refused(Exception):
    """An answer of the proxy itself, instead of one of the destination."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status = status


@dataclass(frozen=True, slots=True)
class _Request:
    """The head of a request: its destination, and what to send there (nothing for a tunnel)."""

    destination: Destination
    head: bytes
    is_tunnel: bool

    @classmethod
    def parse(cls, data: bytes) -> Self:
        """Read a head without the empty line at its end. Raises _Refused."""
        first, *lines = data.split(b"\r\n")
        line, fields = REQUEST_LINE.fullmatch(first), [FIELD.fullmatch(each) for each in lines]
        if line is None or not all(fields):
            raise _Refused(400, "the request is malformed")
        method, target = line[1].decode(), line[2].decode()
        try:
            if method == "CONNECT":
                return cls(Destination.parse(target), b"", True)
            url = HTTP_URL.fullmatch(target)
            if url is None:
                raise ValueError(f"{target!r:.80} is not an http:// URL")
            destination = Destination.parse(url[1], 80)
        except ValueError as error:
            raise _Refused(400, f"the proxy takes CONNECT HOST:PORT and http:// URLs: {error}") from None
        path = url[2] or "/"
        host = str(destination).removesuffix(":80")
        head = [f"{method} {path if path[0] == '/' else f'/{path}'} HTTP/1.1".encode(), f"Host: {host}".encode()]
        head += [field[0] for field in fields if field is not None and field[1].lower() not in OWN_FIELDS]
        return cls(destination, b"\r\n".join([*head, b"Connection: close", b"", b""]), False)


def receive_listener(channel: socket.socket) -> socket.socket:
    """Return the listening socket that the first program of a sandbox has sent through a UNIX socket."""
    _, (listener, *_), _, _ = socket.recv_fds(channel, 1, 1, socket.MSG_CMSG_CLOEXEC)
    return socket.socket(fileno=listener)


class Proxy:
    """A proxy in a thread of its own, because an environment outlives the task that opened it."""

    def __init__(self, listener: socket.socket, network: Network, internet: Internet | None = None) -> None:
        """Serve the connections of a listening socket, in the phase `setup`. Blocks until the proxy is ready.

        Args:
            listener: The socket, which is closed with the proxy.
            network: The policy of each phase. In a phase that has no allowlist, everything is refused.
            internet: The network outside.
        """
        self._listener, self._network, self._internet = listener, network, internet or Internet()
        self._phase: Phase = "setup"
        self._refused: Counter[str] = Counter()
        self._unlisted = 0
        self._clients: set[anyio.CancelScope] = set()
        self._lock = threading.Lock()
        self._portal: anyio.from_thread.BlockingPortal | None = None
        self._started = threading.Event()
        # A daemon, so that an environment that was not closed does not keep the interpreter from ending.
        self._thread = threading.Thread(target=anyio.run, args=(self._serve,), name="agentkit proxy", daemon=True)
        self._thread.start()
        self._started.wait()

    def refusals(self) -> list[str]:
        """Return one line for each different refusal, with its phase, destination, reason and number."""
        refused, unlisted = self._refused.copy(), self._unlisted
        lines = [line if count == 1 else f"{line} ({count} times)" for line, count in refused.items()]
        return [*lines, *([f"... and {unlisted} more"] if unlisted else [])]

    def enter(self, phase: Phase) -> None:
        """Apply the policy of a phase. Every connection has ended on return.

        Raises:
            SandboxLostError: If the proxy was closed.
        """
        with self._lock:
            if self._portal is None:
                raise SandboxLostError("the sandbox was closed")
            self._portal.call(self._enter, phase)

    def close(self) -> None:
        """End every connection and the proxy. Safe to call twice."""
        with self._lock:
            if self._portal is not None:
                self._portal.start_task_soon(self._portal.stop)
                self._portal = None
        self._thread.join()

    async def _serve(self) -> None:
        try:
            async with (
                anyio.from_thread.BlockingPortal() as portal,
                await SocketListener.from_socket(self._listener) as listener,
                anyio.create_task_group() as tasks,
            ):
                tasks.start_soon(self._accept, listener)
                self._portal = portal
                self._started.set()
                await portal.sleep_until_stopped()
                tasks.cancel_scope.cancel()
        finally:
            self._portal = None
            self._started.set()

    async def _enter(self, phase: Phase) -> None:
        self._phase = phase
        ending = self._clients.copy()
        for scope in ending:
            scope.cancel()
        while ending & self._clients:
            await anyio.lowlevel.checkpoint()

    async def _accept(self, listener: SocketListener) -> None:
        places = anyio.Semaphore(MAX_CLIENTS)

        async def attend(client: SocketStream) -> None:
            scope = anyio.CancelScope()
            self._clients.add(scope)
            try:
                with scope:
                    async with client:
                        await self._attend(client)
            except BROKEN:
                pass  # the client has gone
            finally:
                self._clients.discard(scope)
                places.release()

        async with anyio.create_task_group() as tasks:
            while True:
                await places.acquire()
                try:
                    client = await listener.accept()
                except OSError:  # the harness has no descriptor left
                    places.release()
                    await anyio.sleep(0.1)
                    continue
                tasks.start_soon(attend, client)

    async def _attend(self, client: SocketStream) -> None:
        try:
            head, rest = await _read_head(client)
            request = _Request.parse(head)
            host = await self._connect(request.destination)
        except _Refused as refused:
            await client.send(_answer(refused.status, str(refused)))
            await client.send_eof()
            with anyio.move_on_after(LINGER_S):  # closing before everything was read could discard the answer
                async for _ in client:
                    continue
            return
        async with host:
            if request.is_tunnel:
                await client.send(b"HTTP/1.1 200 Connection established\r\n\r\n")
            if first := request.head + rest:
                await host.send(first)
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(_pass_on, client, host)
                await _pass_on(host, client)
                tasks.cancel_scope.cancel()

    async def _connect(self, destination: Destination) -> SocketStream:
        """Connect to a destination that is allowed. Raises _Refused."""
        policy = self._network.policy(self._phase)
        if isinstance(policy, str):
            raise self._refuse(destination, f"network.{self._phase} is {policy}")
        if not any(destination.is_allowed_by(entry) for entry in policy):
            raise self._refuse(destination, f"not in the allowlist: add it to network.{self._phase}")
        try:
            with anyio.fail_after(CONNECT_TIMEOUT_S):
                if destination.is_address:
                    return await self._internet.connect(destination.host, destination.port)
                found = await self._internet.resolve(destination.host)
                public = [address for address in found if is_public_address(address)]
                if not public:
                    reason = f"its address {found[0]} is not public" if found else "it has no address"
                    raise self._refuse(destination, reason)
                return await self._first(public, destination.port)
        except OSError as error:
            reason = str(error) or f"no answer within {CONNECT_TIMEOUT_S:g} s"
            raise _Refused(502, f"{destination} cannot be reached: {reason}") from None

    async def _first(self, addresses: list[str], port: int) -> SocketStream:
        """Connect to the first address that can be reached. Raises OSError."""
        for address in addresses[:-1]:
            try:
                return await self._internet.connect(address, port)
            except OSError:
                continue
        return await self._internet.connect(addresses[-1], port)

    def _refuse(self, destination: Destination, reason: str) -> _Refused:
        """Record a refusal, and return the answer."""
        text = f"{destination}: {reason}"
        line = f"{self._phase}: {text}"
        if line in self._refused or len(self._refused) < MAX_REFUSALS:
            self._refused[line] += 1
        else:
            self._unlisted += 1
        return _Refused(403, text)


async def _read_head(client: SocketStream) -> tuple[bytes, bytes]:
    """Return the head of a request without its empty line, and what has come after it. Raises _Refused."""
    data = b""
    try:
        with anyio.fail_after(HEAD_TIMEOUT_S):
            while b"\r\n\r\n" not in data:
                if len(data) > MAX_HEAD_BYTES:
                    raise _Refused(431, f"the head of the request has more than {MAX_HEAD_BYTES} bytes")
                data += await client.receive(CHUNK)
    except TimeoutError:
        raise _Refused(408, f"no whole request within {HEAD_TIMEOUT_S:g} s") from None
    except anyio.EndOfStream:
        raise _Refused(400, "the request ends too early") from None
    head, _, rest = data.partition(b"\r\n\r\n")
    return head, rest


async def _pass_on(source: SocketStream, target: SocketStream) -> None:
    """Send what arrives on one connection to the other, and its end."""
    try:
        async for chunk in source:
            await target.send(chunk)
        await target.send_eof()
    except BROKEN:
        return


def _answer(status: int, reason: str) -> bytes:
    """Return an answer with the reason in its first line too, which is what clients show of a refused tunnel."""
    said = re.sub(r"[^ -~]", "?", reason)[:500]
    body = f"agentkit: {said}\n"
    head = [
        f"HTTP/1.1 {status} {STATUSES[status]}: {said}",
        "Content-Type: text/plain",
        f"Content-Length: {len(body)}",
        "Connection: close",
    ]
    return "\r\n".join([*head, "", body]).encode()
