"""Network policies in real sandboxes: what commands reach through the proxy, and that nothing else leaves."""

from __future__ import annotations

import contextlib
import os
import socket
import socketserver
import tempfile
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from tests.environments.conftest import BACKENDS, require

from agentkit_environments import (
    DeferredEnvironment,
    Environment,
    EnvironmentSpec,
    Network,
    SandboxUnavailableError,
    open_environment,
)

if TYPE_CHECKING:
    from tests.environments.conftest import FakeInternet, Opener

pytestmark = pytest.mark.anyio

SPEC = EnvironmentSpec(network=Network(setup=["*.example.com"], agent=["pypi.org"]))
FETCH = "python3 -c 'import sys, urllib.request as u; print(u.urlopen(sys.argv[1], timeout=20).read().decode())' "
ENGINE = os.environ.get("DOCKER_HOST", "unix:///var/run/docker.sock").removeprefix("unix://")
LEAKS = """
import errno, os, socket
def attempt(name, function):
    try:
        print(name, "got through:", function())
    except OSError as error:
        print(name, type(error).__name__)
def connect(family, address):
    with socket.socket(family) as connection:
        connection.connect(address)
        return address
def send(address):
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
        return sender.sendto(b"x", address)
attempt("address", lambda: connect(socket.AF_INET, ("151.101.0.223", 443)))
attempt("address 6", lambda: connect(socket.AF_INET6, ("2606:4700::1111", 443)))
attempt("bridge", lambda: connect(socket.AF_INET, ("172.17.0.1", 80)))
attempt("metadata", lambda: connect(socket.AF_INET, ("169.254.169.254", 80)))
attempt("datagram", lambda: send(("1.1.1.1", 53)))
attempt("name", lambda: socket.getaddrinfo("pypi.org", 443))
attempt("handover", lambda: connect(socket.AF_UNIX, "/.agentkit/proxy"))
attempt("port", lambda: socket.create_server(("127.0.0.1", 3128)))
attempt("any port", lambda: socket.create_server(("0.0.0.0", 3128), reuse_port=True))
print("interfaces", [name for _, name in socket.if_nameindex()])
"""


@pytest.fixture(scope="module", params=[each for each in BACKENDS if each.id != "unsafe-local"])
def backend(request: pytest.FixtureRequest) -> str:
    """A backend that can have an allowlist."""
    require(request.param)
    return str(request.param)


@pytest.fixture
async def env(
    backend: str, open_backend: Opener, internet: FakeInternet, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Environment]:
    """An environment whose proxy has the internet of the test."""
    monkeypatch.setattr("agentkit_environments.proxy.Internet", lambda: internet)
    async with await open_backend(backend, SPEC) as environment:
        yield environment


async def test_commands_reach_the_hosts_of_the_phase(env: Environment, internet: FakeInternet) -> None:
    fetched = await env.exec(f"{FETCH} http://files.example.com/a")
    assert "GET /a HTTP/1.1\r\nHost: files.example.com" in fetched.stdout, fetched.stderr
    refused = await env.exec(f"{FETCH} https://pypi.org/simple")
    assert "Tunnel connection failed: 403" in refused.stderr
    assert "pypi.org:443: not in the allowlist: add it to network.setup" in refused.stderr

    await env.enter_phase("agent")
    assert "Host: pypi.org" in (await env.exec(f"{FETCH} http://pypi.org/")).stdout
    await env.kill_all()  # the proxy is no process of the sandbox
    assert "Host: pypi.org" in (await env.exec(f"{FETCH} http://pypi.org/")).stdout

    await env.enter_phase("verifier")
    assert "network.verifier is none" in (await env.exec(f"{FETCH} http://pypi.org/")).stderr
    assert env.refusals() == [
        "setup: pypi.org:443: not in the allowlist: add it to network.setup",
        "verifier: pypi.org:80: network.verifier is none",
    ]
    assert {address for address, _ in internet.connected} == {"93.184.216.34", "151.101.0.223"}


async def test_nothing_leaves_but_through_the_proxy(env: Environment, internet: FakeInternet) -> None:
    result = await env.exec(["python3", "-c", LEAKS])
    assert result.exit_code == 0, result.stderr
    assert "got through" not in result.stdout
    assert result.stdout.splitlines()[-1] == "interfaces ['lo']"
    assert len(result.stdout.splitlines()) == 10
    assert internet.connected == []
    everything = await env.exec(f"{FETCH} http://127.0.0.1:3128/ 2>&1; env | grep -i proxy | sort | head -3")
    assert "400" in everything.stdout  # the proxy serves no requests to itself
    assert (
        "HTTPS_PROXY=http://127.0.0.1:3128\nHTTP_PROXY=http://127.0.0.1:3128\nNO_PROXY=localhost" in everything.stdout
    )


async def test_a_fork_has_the_phase_and_a_proxy_of_its_own(env: Environment) -> None:
    await env.enter_phase("agent")
    async with env.fork() as (fork,):
        assert fork.phase == "agent"
        assert "Host: pypi.org" in (await fork.exec(f"{FETCH} http://pypi.org/")).stdout
        await fork.exec(f"{FETCH} http://files.example.com/")
        assert len(fork.refusals()) == 1
    assert env.refusals() == []
    with pytest.raises(ValueError, match="phase must be one of setup, agent, verifier, got 'test'"):
        await env.enter_phase("test")  # type: ignore[arg-type]


async def test_closing_leaves_nothing_behind(
    backend: str, open_backend: Opener, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    environment = await open_backend(backend, SPEC)
    assert [thread.name for thread in threading.enumerate()].count("agentkit proxy") == 1
    await environment.close()
    await environment.close()
    assert "agentkit proxy" not in [thread.name for thread in threading.enumerate()]
    assert os.listdir(tmp_path) == []


async def test_a_deferred_environment_opens_in_its_phase(
    backend: str, open_backend: Opener, internet: FakeInternet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("agentkit_environments.proxy.Internet", lambda: internet)
    async with DeferredEnvironment(SPEC, lambda spec: open_backend(backend, spec)) as deferred:
        await deferred.enter_phase("agent")
        assert deferred.refusals() == [] and not deferred.is_open
        assert "Host: pypi.org" in (await deferred.exec(f"{FETCH} http://pypi.org/")).stdout
        await deferred.enter_phase("verifier")
        await deferred.exec(f"{FETCH} http://pypi.org/")
        assert deferred.refusals() == ["verifier: pypi.org:80: network.verifier is none"]


@pytest.mark.docker
async def test_a_public_phase_has_the_engines_network_and_others_have_not(open_backend: Opener) -> None:
    spec = EnvironmentSpec(network=Network(setup="none", agent="public", verifier=["pypi.org"]))
    async with await open_backend("docker", spec) as env:
        seen = "ls /sys/class/net | grep -c eth; env | grep -c HTTP_PROXY"
        assert (await env.exec(seen)).stdout == "0\n1\n"
        await env.enter_phase("agent")
        assert (await env.exec(seen)).stdout == "1\n0\n"
        async with env.fork() as (fork,):
            assert (await fork.exec(seen)).stdout == "1\n0\n"
        await env.enter_phase("verifier")
        assert (await env.exec(seen)).stdout == "0\n1\n"


class _Relay(socketserver.BaseRequestHandler):
    """Passes a connection on to the engine of this machine."""

    def handle(self) -> None:
        with socket.socket(socket.AF_UNIX) as engine:
            engine.connect(ENGINE)
            back = threading.Thread(target=self.copy, args=(engine, self.request))
            back.start()
            self.copy(self.request, engine)
            back.join()

    @staticmethod
    def copy(source: socket.socket, target: socket.socket) -> None:
        while chunk := source.recv(1 << 16):
            target.sendall(chunk)
        with contextlib.suppress(OSError):
            target.shutdown(socket.SHUT_WR)


@pytest.mark.docker
async def test_an_engine_elsewhere_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    require("docker")
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), _Relay) as engine:
        engine.daemon_threads = True
        threading.Thread(target=engine.serve_forever, kwargs={"poll_interval": 0.01}).start()
        monkeypatch.setenv("DOCKER_HOST", f"tcp://127.0.0.1:{engine.server_address[1]}")
        with pytest.raises(SandboxUnavailableError, match=r"needs a Docker engine on this machine, but DOCKER_HOST is"):
            await open_environment(SPEC, backend="docker")
        engine.shutdown()
