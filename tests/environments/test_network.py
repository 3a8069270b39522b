"""Network policies: what can be written, and what an entry of an allowlist stands for."""

from __future__ import annotations

from typing import Any

import pytest

from agentkit_environments import EnvironmentSpec, Network, SandboxUnavailableError, open_environment
from agentkit_environments.network import Destination, is_public_address


@pytest.mark.parametrize(
    ("entry", "allowed", "refused"),
    [
        ("pypi.org", ["pypi.org:443", "pypi.org:80"], ["pypi.org:8080", "www.pypi.org:443", "pypi.org.evil.com:443"]),
        ("PyPI.org.", ["pypi.org:443", "PYPI.ORG.:443"], ["pypiborg:443"]),
        ("pypi.org:8443", ["pypi.org:8443"], ["pypi.org:443"]),
        ("*.example.com", ["a.example.com:80", "a.b.example.com:443"], ["example.com:443", "notexample.com:443"]),
        ("*.example.com:22", ["a.example.com:22"], ["a.example.com:443"]),
        ("10.0.0.5:5000", ["10.0.0.5:5000"], ["10.0.0.5:80", "10.0.0.50:5000"]),
        ("2001:DB8::1", ["[2001:db8:0::1]:443"], ["[2001:db8::2]:443"]),
        ("[2001:db8::1]:8080", ["[2001:db8::1]:8080"], ["[2001:db8::1]:443"]),
        ("*.0.5", [], []),
    ],
)
def test_an_entry_stands_for_its_destinations(entry: str, allowed: list[str], refused: list[str]) -> None:
    if not allowed:
        with pytest.raises(ValueError, match="is not a host"):
            Network(agent=[entry])
        return
    policy = Network(agent=[entry]).agent
    for text in [*allowed, *refused]:
        assert Destination.parse(text).is_allowed_by(policy[0]) == (text in allowed), text


@pytest.mark.parametrize(
    "policy",
    [
        *("all", "pypi.org", 5, None, {"pypi.org": 1}, b"none", [5], [""], ["*"], ["*.10.0.0.1"], ["a..b"]),
        *(["https://pypi.org"], ["pypi.org/simple"], ["pypi.org:0"], ["pypi.org:65536"], ["pypi.org:"], [":443"]),
        *(["10.0.0.0/8"], ["127.1"], ["0x7f.1"], ["2130706433"], ["fe80::1%lo"], ["[::1"], ["a b"], ["ä.org"]),
        *(["u@pypi.org"], ["x" * 64 + ".org"], [".".join(["x" * 60] * 5)], ["-a.org"], ["pypi.*"], ["[pypi.org]"]),
    ],
)
def test_anything_else_is_refused(policy: Any) -> None:
    with pytest.raises(ValueError, match=r"network must be none, public or a list|is not a host|a host must be text"):
        Network(setup=policy)


def test_a_network_has_a_policy_for_each_phase() -> None:
    network = Network(setup="public", agent=["PyPI.org"])
    assert [network.policy(phase) for phase in ("setup", "agent", "verifier")] == ["public", ("pypi.org",), "none"]
    assert network.is_public and network.has_allowlist
    nothing = EnvironmentSpec().network
    assert nothing == Network.everywhere("none") and not nothing.is_public and not nothing.has_allowlist
    assert Network.everywhere([]).has_allowlist


@pytest.mark.parametrize(
    ("address", "is_public"),
    [
        *((address, True) for address in ("151.101.0.223", "1.1.1.1", "2606:4700::1111")),
        *((address, False) for address in ("127.0.0.1", "10.0.0.1", "172.17.0.1", "192.168.1.1", "100.64.0.1")),
        *((address, False) for address in ("169.254.169.254", "0.0.0.0", "224.0.0.1", "255.255.255.255", "::1", "::")),
        *((address, False) for address in ("fe80::1", "fe80::1%eth0", "fd00:ec2::254", "fec0::1", "ff02::1")),
        *((address, False) for address in ("::ffff:10.0.0.1", "::ffff:151.101.0.223", "64:ff9b::10.0.0.1")),
        *((address, False) for address in ("2002:a00:1::", "2001:0:1::1")),
    ],
)
def test_addresses_of_the_public_internet(address: str, is_public: bool) -> None:
    assert is_public_address(address) == is_public


@pytest.mark.anyio
async def test_a_backend_without_the_network_is_refused_by_name() -> None:
    with pytest.raises(SandboxUnavailableError, match="a network allowlist needs the docker or the process backend"):
        await open_environment(EnvironmentSpec(network=Network(agent=["pypi.org"])), backend="unsafe-local")
    with pytest.raises(SandboxUnavailableError, match="a public network needs the docker backend"):
        await open_environment(EnvironmentSpec(network=Network(setup="public")), backend="process")
