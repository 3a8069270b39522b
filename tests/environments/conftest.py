"""Contract tests run once for each backend that works here; other backends are skipped with the reason."""

from __future__ import annotations

import re
import socketserver
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import replace
from typing import Literal

import anyio
import pytest
from anyio.abc import SocketStream

from agentkit_environments import Environment, EnvironmentSpec, Snapshot, open_environment
from agentkit_environments.docker import docker_failure
from agentkit_environments.docker.engine import BASE_IMAGE
from agentkit_environments.process import LAUNCHERS, Launcher, ProcessEnvironment, launcher_failure
from agentkit_environments.proxy import Internet

BACKENDS = [
    pytest.param("unsafe-local", id="unsafe-local"),
    pytest.param("process-bwrap", id="process-bwrap", marks=pytest.mark.sandbox),
    pytest.param("process-unshare", id="process-unshare", marks=pytest.mark.sandbox),
    pytest.param("process-bwrap-plain", id="process-bwrap-plain", marks=[pytest.mark.sandbox, pytest.mark.hostile]),
    pytest.param("docker", id="docker", marks=pytest.mark.docker),
]

AS_IMAGE = "docker-as-image"
"""A sandbox `as_image` of the base image, for tests whose guarantees it shares."""
LAUNCHER_OF: dict[str, Launcher] = {f"process-{launcher}": launcher for launcher in LAUNCHERS}

Opener = Callable[..., Awaitable[Environment]]


def require(backend: str) -> None:
    """Skip the test if `backend` does not work here."""
    reason = None
    if backend.startswith("docker"):
        reason = docker_failure()
    elif backend in LAUNCHER_OF:
        reason = launcher_failure(LAUNCHER_OF[backend])
    if reason is not None:
        pytest.skip(f"{backend}: {reason}")


async def _open(
    backend: str, spec: EnvironmentSpec | None = None, run_id: str = "tests", *, snapshot: Snapshot | None = None
) -> Environment:
    spec = spec or EnvironmentSpec()
    if backend == AS_IMAGE:
        backend, spec = "docker", replace(spec, image=BASE_IMAGE, as_image=True)
    if backend in LAUNCHER_OF:
        return await ProcessEnvironment.open(spec, run_id, launcher=LAUNCHER_OF[backend], snapshot=snapshot)
    chosen: Literal["docker", "unsafe-local"] = "docker" if backend == "docker" else "unsafe-local"
    return await open_environment(spec, backend=chosen, run_id=run_id, snapshot=snapshot)


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="module", params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    require(name)
    return name


@pytest.fixture(scope="session")
def open_backend() -> Opener:
    """Return a function that opens an environment: `await open_backend(backend, spec, run_id, snapshot=snapshot)`."""
    return _open


@pytest.fixture(scope="module")
async def env(backend: str, anyio_backend: str) -> AsyncIterator[Environment]:
    """One environment, shared by all tests of a module that do not end it."""
    async with await _open(backend, EnvironmentSpec(env={"FROM_SPEC": "spec"})) as environment:
        yield environment


class _Echo(socketserver.StreamRequestHandler):
    """Answers an HTTP request with its own head and body; sends everything else back as it comes."""

    def handle(self) -> None:
        head = b"".join(iter(lambda: self.rfile.readline().rstrip(b"\r\n") + b"\r\n", b"\r\n")) + b"\r\n"
        self.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nConnection: close\r\n\r\n" + head)
        if b"HTTP/1." in head:
            length = re.search(rb"Content-Length: ([0-9]+)", head)
            self.wfile.write(self.rfile.read(int(length[1]) if length else 0))
            return
        while chunk := self.rfile.read1(4096):
            self.wfile.write(chunk)


class FakeInternet(Internet):
    """Names and addresses that exist only here. A connection to any address reaches a server of the test."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.names = {"pypi.org": ["151.101.0.223"], "files.example.com": ["93.184.216.34"]}
        self.resolved: list[str] = []
        self.connected: list[tuple[str, int]] = []
        self.unreachable: set[str] = set()

    async def resolve(self, host: str) -> list[str]:
        self.resolved.append(host)
        if host not in self.names:
            raise OSError("no such name")
        return self.names[host]

    async def connect(self, address: str, port: int) -> SocketStream:
        self.connected.append((address, port))
        if address in self.unreachable:
            raise OSError("no route to host")
        return await anyio.connect_tcp("127.0.0.1", self.port)


@pytest.fixture
def internet() -> Iterator[FakeInternet]:
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), _Echo) as server:
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield FakeInternet(server.server_address[1])
        server.shutdown()
        thread.join()
