"""The network of an environment: one policy for each phase of a task.

    "none"      a loopback interface only
    "public"    the engine's network, without a filter (docker only)
    an allowlist such as ["pypi.org", "*.example.com:8443", "10.0.0.5:5000"]
                HTTP and HTTPS to these hosts through a proxy outside the sandbox (`proxy.py`), and nothing else

An entry is a name, `*.` and a name (every name below it, but not the name itself), or an IP address, with an optional
port; without one, the ports are 80 and 443.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Literal, Self, get_args

Phase = Literal["setup", "agent", "verifier"]
"""The part of a task that runs in an environment: its setup, the agent, or the verifier."""
PHASES: tuple[Phase, ...] = get_args(Phase)

NetworkPolicy = Literal["none", "public"] | Sequence[str]
"""Hosts that commands can reach: none, all, or those of an allowlist."""

DEFAULT_PORTS = (80, 443)
LABEL = r"(?!-)[a-z0-9_-]{1,63}(?<!-)"
HOST_NAME = re.compile(rf"(?=.{{1,253}}\Z)(?:{LABEL}\.)*(?![0-9]+\Z|0x[0-9a-f]*\Z){LABEL}")
"""Names in lower case. The last label is not a number: C libraries read `127.1` and `0x7f000001` as addresses."""


@dataclass(frozen=True, slots=True)
class Destination:
    """A host and a port. The host is a name in lower case without a final dot, or an address in its usual form."""

    host: str
    port: int

    @classmethod
    def parse(cls, text: str, default_port: int | None = None) -> Self:
        """Read `HOST:PORT`, or `HOST` if there is a default port; IPv6 addresses are in brackets.

        Raises:
            ValueError: If it is not that.
        """
        host, port = _split(text, default_port)
        return cls(host, port)

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def is_address(self) -> bool:
        """True if the host is an IP address."""
        return _address(self.host) is not None

    def is_allowed_by(self, entry: str) -> bool:
        """Return whether an entry of an allowlist, as `checked_policy` returns it, stands for this destination."""
        is_wildcard = entry.startswith("*.")
        host, port = _split(entry.removeprefix("*."), 0)
        if port != self.port and not (port == 0 and self.port in DEFAULT_PORTS):
            return False
        return self.host.endswith(f".{host}") and not self.is_address if is_wildcard else self.host == host


@dataclass(frozen=True, slots=True)
class Network:
    """The policy of each phase. Allowlists become tuples of entries in lower case."""

    setup: NetworkPolicy = "none"
    agent: NetworkPolicy = "none"
    verifier: NetworkPolicy = "none"

    def __post_init__(self) -> None:
        for each in fields(self):
            object.__setattr__(self, each.name, checked_policy(getattr(self, each.name)))

    @classmethod
    def everywhere(cls, policy: NetworkPolicy) -> Self:
        """Return a network that has the same policy in every phase."""
        return cls(policy, policy, policy)

    def policy(self, phase: Phase) -> NetworkPolicy:
        """Return the policy of a phase."""
        policies = {"setup": self.setup, "agent": self.agent, "verifier": self.verifier}
        return policies[phase]

    @property
    def is_public(self) -> bool:
        """True if a phase is public."""
        return any(self.policy(phase) == "public" for phase in PHASES)

    @property
    def has_allowlist(self) -> bool:
        """True if a phase has an allowlist."""
        return any(not isinstance(self.policy(phase), str) for phase in PHASES)


def checked_policy(policy: object) -> NetworkPolicy:
    """Return a policy in its usual form.

    Raises:
        ValueError: If it is neither none, nor public, nor a sequence of entries.
    """
    if policy == "none" or policy == "public":
        return policy
    if isinstance(policy, str) or not isinstance(policy, Sequence):
        raise ValueError(f"network must be none, public or a list of hosts, got {policy!r:.80}")
    return tuple(map(_checked_entry, policy))


def _checked_entry(entry: object) -> str:
    if not isinstance(entry, str):
        raise ValueError(f"a host must be text, got {entry!r:.80}")
    wildcard = "*." if entry.startswith("*.") else ""
    try:
        host, port = _split(entry.removeprefix("*."), 0)
    except ValueError:
        host, port = "", 0
    if not host or (wildcard and _address(host)):
        raise ValueError(
            f"{entry!r:.80} is not a host; write a name, *.NAME or an IP address, with an optional :PORT, and no URL"
        )
    if port == 0:
        return wildcard + host
    return wildcard + str(Destination(host, port))


def _split(text: str, default_port: int | None) -> tuple[str, int]:
    """Return the host and the port of `HOST`, `HOST:PORT` or `[IPV6]:PORT`. Raises ValueError."""
    if default_port is not None and (address := _address(text)) is not None:
        return address, default_port
    match = re.fullmatch(r"(\[[0-9A-Fa-f:.]+\]|[^:\[\]]+)(?::([0-9]{1,5}))?", text)
    if match is None or (match[2] is None and default_port is None):
        raise ValueError(f"{text!r:.80} is not HOST:PORT")
    port = int(match[2]) if match[2] is not None else default_port
    assert port is not None
    if match[2] is not None and not 0 < port < 65536:
        raise ValueError(f"{match[2]} is not a port")
    bare = match[1].strip("[]")
    if (address := _address(bare)) is not None and (":" in address) == (match[1][0] == "["):
        return address, port
    name = bare.lower().removesuffix(".")
    if match[1][0] == "[" or not HOST_NAME.fullmatch(name):
        raise ValueError(f"{match[1]!r:.80} is not a host name")
    return name, port


def _address(text: str) -> str | None:
    """Return an IP address in its usual form; None if `text` is none, or one with a zone."""
    try:
        return str(ipaddress.ip_address(text)) if "%" not in text else None
    except ValueError:
        return None


def is_public_address(text: str) -> bool:
    """Return whether an address belongs to the public internet: not to a private network, this machine, a link (with
    the metadata services of clouds), a group, or a way to write an IPv4 address as an IPv6 one."""
    address = ipaddress.ip_address(text)
    if address.is_multicast or not address.is_global:
        return False
    return isinstance(address, ipaddress.IPv4Address) or (address in GLOBAL_UNICAST and address not in SIX_TO_FOUR)


GLOBAL_UNICAST, SIX_TO_FOUR = ipaddress.IPv6Network("2000::/3"), ipaddress.IPv6Network("2002::/16")
