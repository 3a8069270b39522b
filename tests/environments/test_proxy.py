"""The proxy by itself: its policy, its answers and its bounds, against clients that try to get past it."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from agentkit_environments import Network, SandboxLostError
from agentkit_environments.proxy import Proxy

if TYPE_CHECKING:
    from tests.environments.conftest import FakeInternet

ALLOWED = ["pypi.org", "*.example.com:8443", "10.0.0.5:5000"]
Start = Callable[..., tuple[Proxy, int]]


@pytest.fixture
def start(internet: FakeInternet) -> Iterator[Start]:
    """Function that starts a proxy and returns it with its port."""
    started: list[Proxy] = []

    def start(network: Network | None = None) -> tuple[Proxy, int]:
        listener = socket.create_server(("127.0.0.1", 0))
        port = listener.getsockname()[1]
        started.append(Proxy(listener, network or Network.everywhere(ALLOWED), internet))
        return started[-1], port

    yield start
    for proxy in started:
        proxy.close()


def client(port: int, request: bytes = b"") -> socket.socket:
    """Return a connection on which a request was sent."""
    connection = socket.create_connection(("127.0.0.1", port), timeout=20)
    connection.sendall(request)
    return connection


def received(connection: socket.socket) -> bytes:
    """Return everything up to the end of a connection, and close it."""
    with connection:
        return b"".join(iter(lambda: connection.recv(4096), b""))


def talk(port: int, request: bytes) -> bytes:
    """Send a request and its end, and return the answer."""
    connection = client(port, request)
    connection.shutdown(socket.SHUT_WR)
    return received(connection)


def tunnel(port: int, destination: str = "pypi.org:443") -> socket.socket:
    """Return a connection through a tunnel."""
    connection = client(port, f"CONNECT {destination} HTTP/1.1\r\nHost: {destination}\r\n\r\n".encode())
    answer = b""
    while not answer.endswith(b"\r\n\r\n"):
        answer += connection.recv(1)
    assert answer == b"HTTP/1.1 200 Connection established\r\n\r\n"
    return connection


def test_a_request_reaches_its_host_with_fields_of_the_proxy(start: Start, internet: FakeInternet) -> None:
    _, port = start()
    fields = b"Host: evil.com\r\nContent-Length: 4\r\nProxy-Authorization: x\r\nConnection: keep-alive\r\nUpgrade: h2c"
    answer = talk(port, b"POST http://PyPI.org./simple?q HTTP/1.1\r\n" + fields + b"\r\n\r\nbody")
    _, head, body = answer.decode().split("\r\n\r\n")
    assert head.split("\r\n") == ["POST /simple?q HTTP/1.1", "Host: pypi.org", "Content-Length: 4", "Connection: close"]
    assert body == "body"
    assert (internet.resolved, internet.connected) == (["pypi.org"], [("151.101.0.223", 80)])
    assert b"GET /?q HTTP/1.1" in talk(port, b"GET HTTP://pypi.org?q HTTP/1.0\r\n\r\n")
    assert b"Host: files.example.com:8443" in talk(port, b"GET http://files.example.com:8443 HTTP/1.1\r\n\r\n")
    assert talk(port, b"CONNECT 10.0.0.5:5000 HTTP/1.1\r\n\r\n").startswith(b"HTTP/1.1 200 Connection established")
    assert internet.connected[-1] == ("10.0.0.5", 5000)


def test_a_tunnel_carries_bytes_both_ways_until_an_end_closes_it(start: Start) -> None:
    _, port = start()
    connection = tunnel(port)
    connection.sendall(b"\x16\x03\x01\r\n\r\n")
    assert connection.recv(17) == b"HTTP/1.1 200 OK\r\n"
    connection.sendall(b"more")
    connection.shutdown(socket.SHUT_WR)
    assert received(connection).endswith(b"\x16\x03\x01\r\n\r\nmore")
    with tunnel(port) as connection:
        connection.sendall(b"x")


@pytest.mark.parametrize(
    "destination",
    [
        *("evil.com:443", "pypi.org:22", "pypi.org.evil.com:443", "evilpypi.org:443", "example.com:8443"),
        *("files.example.com:443", "localhost:80", "127.0.0.1:80", "[::1]:80", "[::ffff:127.0.0.1]:80"),
        *("151.101.0.223:443", "10.0.0.5:80", "10.0.0.50:5000", "169.254.169.254:80"),
    ],
)
def test_other_destinations_are_refused_and_recorded(start: Start, internet: FakeInternet, destination: str) -> None:
    proxy, port = start()
    answer = talk(port, f"CONNECT {destination} HTTP/1.1\r\nHost: pypi.org:443\r\n\r\n".encode())
    told = talk(port, f"GET http://{destination}/ HTTP/1.1\r\nHost: pypi.org\r\n\r\n".encode())
    assert answer == told
    first, *_ = answer.decode().split("\r\n")
    assert first.startswith("HTTP/1.1 403 ")
    assert first.endswith(": not in the allowlist: add it to network.setup")
    assert answer.decode().endswith(": not in the allowlist: add it to network.setup\n")
    (line,) = proxy.refusals()
    assert line.startswith("setup: ") and line.endswith("network.setup (2 times)")
    assert (internet.resolved, internet.connected) == ([], [])


@pytest.mark.parametrize(
    "request_line",
    [
        *("GET / HTTP/1.1", "GET https://pypi.org/ HTTP/1.1", "GET ftp://pypi.org/ HTTP/1.1", "OPTIONS * HTTP/1.1"),
        *("GET http://evil.com@pypi.org/ HTTP/1.1", "GET http://pypi.org#@evil.com/ HTTP/1.1", "GET http:// HTTP/1.1"),
        *("GET http:///x HTTP/1.1", "GET http://pypi.org/#x HTTP/1.1", "GET http://pypi.org:80:80/ HTTP/1.1"),
        *("CONNECT pypi.org HTTP/1.1", "CONNECT pypi.org:0 HTTP/1.1", "CONNECT pypi.org:99999 HTTP/1.1"),
        *("CONNECT pypi.org:443/ HTTP/1.1", "CONNECT 127.1:80 HTTP/1.1", "CONNECT 0x7f000001:80 HTTP/1.1"),
        *("CONNECT 2130706433:80 HTTP/1.1", "CONNECT [fe80::1%lo]:80 HTTP/1.1", "CONNECT pypi.org..:443 HTTP/1.1"),
        *("CONNECT pypi.org\\@evil.com:443 HTTP/1.1", "CONNECT xn--\u00e4.org:443 HTTP/1.1", "PRI * HTTP/2.0"),
        *("GET  http://pypi.org/ HTTP/1.1", "GET http://pypi.org/", "get http://pypi.org/ HTTP/1.1", "", "\0"),
        *("GET http://pypi.org/ HTTP/1.1\r\nno field", "GET http://pypi.org/ HTTP/1.1\r\nA: b\nHost: evil.com"),
        *("GET http://pypi.org/ HTTP/1.1\r\n folded: x", "GET http://pypi.org/ HTTP/1.1\r\nHost : evil.com"),
        *("GET http://pypi.org/ HTTP/1.1\r\nA: \0", "GET http://pypi.org/\nHost: evil.com HTTP/1.1"),
    ],
)
def test_malformed_requests_are_answered_and_go_nowhere(
    start: Start, internet: FakeInternet, request_line: str
) -> None:
    _, port = start()
    assert talk(port, request_line.encode() + b"\r\n\r\n").startswith(b"HTTP/1.1 400 Bad Request: ")
    assert (internet.resolved, internet.connected) == ([], [])


def test_a_name_that_leads_to_a_private_address_is_refused(start: Start, internet: FakeInternet) -> None:
    proxy, port = start()
    internet.names["pypi.org"] = ["127.0.0.1", "169.254.169.254", "fd00::1", "::ffff:10.0.0.1"]
    answer = talk(port, b"CONNECT pypi.org:443 HTTP/1.1\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 403 Forbidden: pypi.org:443: its address 127.0.0.1 is not public")
    assert internet.connected == []
    assert proxy.refusals() == ["setup: pypi.org:443: its address 127.0.0.1 is not public"]
    internet.names["pypi.org"] += ["2606:4700::1111", "151.101.0.223"]
    internet.unreachable = {"2606:4700::1111"}
    tunnel(port).close()
    assert internet.connected == [("2606:4700::1111", 443), ("151.101.0.223", 443)]
    assert internet.resolved == ["pypi.org"] * 2  # once for each connection, so that it cannot change in between


def test_hosts_that_cannot_be_reached(start: Start, internet: FakeInternet) -> None:
    _, port = start()
    internet.names["pypi.org"] = []
    assert b"403 Forbidden: pypi.org:443: it has no address" in talk(port, b"CONNECT pypi.org:443 HTTP/1.1\r\n\r\n")
    del internet.names["pypi.org"]
    answer = talk(port, b"GET http://pypi.org/ HTTP/1.1\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 502 Bad Gateway: pypi.org:80 cannot be reached: no such name")
    internet.unreachable = {"10.0.0.5"}
    assert b"10.0.0.5:5000 cannot be reached: no route" in talk(port, b"CONNECT 10.0.0.5:5000 HTTP/1.1\r\n\r\n")


def test_a_head_is_bounded_in_size_and_time(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    _, port = start()
    assert talk(port, b"GET http://pypi.org/").startswith(b"HTTP/1.1 400 Bad Request: the request ends too early")
    assert talk(port, b"GET http://pypi.org/ HTTP/1.1\r\nA: " + b"x" * (1 << 20)).startswith(b"HTTP/1.1 431 ")
    assert talk(port, b"POST http://evil.com/ HTTP/1.1\r\n\r\n" + b"x" * (1 << 20)).startswith(b"HTTP/1.1 403 ")
    monkeypatch.setattr("agentkit_environments.proxy.HEAD_TIMEOUT_S", 0.01)
    assert received(client(port, b"GET http://pypi.org/")).startswith(b"HTTP/1.1 408 Request Timeout")


def test_idle_clients_give_their_place_to_others(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("agentkit_environments.proxy.MAX_CLIENTS", 2)
    monkeypatch.setattr("agentkit_environments.proxy.HEAD_TIMEOUT_S", 0.05)
    monkeypatch.setattr("agentkit_environments.proxy.LINGER_S", 0.05)
    _, port = start()
    idle = [client(port) for _ in range(6)]
    assert b"200 OK" in talk(port, b"GET http://pypi.org/ HTTP/1.1\r\n\r\n")
    assert all(received(each).startswith(b"HTTP/1.1 408") for each in idle)


def test_clients_beyond_the_bound_wait_and_do_not_hold_up_the_next_phase(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("agentkit_environments.proxy.MAX_CLIENTS", 1)
    proxy, port = start()
    held = tunnel(port)
    refused, allowed = (client(port, f"CONNECT {host}:443 HTTP/1.1\r\n\r\n".encode()) for host in ("a.org", "pypi.org"))
    held.sendall(b"x\r\n\r\n")
    while held.recv(4096)[-5:] != b"x\r\n\r\n":
        continue
    for _ in range(20):  # the proxy has time for the others, if it took more than one
        held.sendall(b"y")
        assert held.recv(1) == b"y"
    assert proxy.refusals() == []
    proxy.enter("agent")
    assert received(held) == b""
    assert b"add it to network.agent" in received(refused)
    assert allowed.recv(12) == b"HTTP/1.1 200"
    allowed.close()
    assert [line.partition(":")[0] for line in proxy.refusals()] == ["agent"]


def test_a_phase_has_its_own_policy_and_ends_the_connections_of_the_last_one(start: Start) -> None:
    proxy, port = start(Network(setup=["pypi.org"], agent="none", verifier=["files.example.com"]))
    open_tunnel = tunnel(port)
    proxy.enter("agent")
    assert received(open_tunnel) == b""
    assert b"403 Forbidden: pypi.org:443: network.agent is none" in talk(port, b"CONNECT pypi.org:443 HTTP/1.1\r\n\r\n")
    proxy.enter("verifier")
    assert b"add it to network.verifier" in talk(port, b"CONNECT pypi.org:443 HTTP/1.1\r\n\r\n")
    tunnel(port, "files.example.com:443").close()
    assert [line.partition(":")[0] for line in proxy.refusals()] == ["agent", "verifier"]


def test_the_list_of_refusals_is_bounded(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("agentkit_environments.proxy.MAX_REFUSALS", 2)
    proxy, port = start()
    for name in ("a", "b", "c", "a", "d"):
        talk(port, f"CONNECT {name}.org:443 HTTP/1.1\r\n\r\n".encode())
    reason = "not in the allowlist: add it to network.setup"
    assert proxy.refusals() == [
        f"setup: a.org:443: {reason} (2 times)",
        f"setup: b.org:443: {reason}",
        "... and 2 more",
    ]


def test_closing_ends_the_connections_and_the_proxy(start: Start) -> None:
    proxy, port = start()
    open_tunnel, idle = tunnel(port), client(port)
    proxy.close()
    proxy.close()
    assert received(open_tunnel) == received(idle) == b""
    with pytest.raises(ConnectionRefusedError):
        client(port)
    with pytest.raises(SandboxLostError, match="the sandbox was closed"):
        proxy.enter("agent")
    assert proxy.refusals() == []


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    parts=st.lists(
        st.sampled_from([b"GET ", b"CONNECT ", b"http://", b"pypi.org", b"evil.com", b":80", b"@", b"/", b" HTTP/1.1"])
        | st.sampled_from([b"\r\n", b"\n", b"Host: ", b"[::1]", b"127.0.0.1", b"\xff", b"\0"])
        | st.binary(max_size=8),
        max_size=12,
    )
)
def test_any_bytes_are_answered_and_lead_nowhere_else(start: Start, internet: FakeInternet, parts: list[bytes]) -> None:
    _, port = start()
    talk(port, b"".join(parts) + b"\r\n\r\n")
    assert b"200 OK" in talk(port, b"GET http://pypi.org/ HTTP/1.1\r\n\r\n")
    assert {address for address, _ in internet.connected} == {"151.101.0.223"}
