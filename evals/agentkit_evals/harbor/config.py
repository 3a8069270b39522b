"""The keys of Harbor's `task.toml`, in Harbor's units: seconds, and MiB for memory and storage.

Keys that Harbor does not have are refused. `read.py` refuses what agentkit does not support.
"""

from __future__ import annotations

import re
import unicodedata
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BeforeValidator, Field, field_validator, model_validator

from agentkit.environment_config import NetworkConfig
from agentkit.harbor import Artifact, Collect, Healthcheck, McpServer, User
from agentkit.strict import Strict, Timeout, Variables
from agentkit_environments.network import NetworkPolicy, checked_policy

NetworkMode = Literal["public", "no-network", "allowlist"]


_DEVICE = re.compile(r"(con|prn|aux|nul|conin\$|conout\$|(com|lpt)[1-9¹²³]) *(\..*)?", re.IGNORECASE)


def _step_name(name: str) -> str:
    """Check that a step's name is that of a folder on every system, as Harbor demands."""
    if (
        not name.strip()
        or name.endswith((".", " "))
        or re.search(r'[<>:"/\\|?*\x00-\x1f\x7f]', name)
        or _DEVICE.fullmatch(name)
        or len(name.encode()) > 255
    ):
        raise ValueError(f"{name!r:.80} is not the name of a folder")
    return name


StepName = Annotated[str, AfterValidator(_step_name)]


def _lower(text: Any) -> Any:
    return text.lower() if isinstance(text, str) else text


class DeclaredArtifact(Artifact):
    """An artifact with all keys of Harbor."""

    destination: str | None = None  # a place in Harbor's job folder, which agentkit does not have
    service: str | None = None

    @field_validator("destination")
    @classmethod
    def _inside(cls, path: str | None) -> str | None:
        if path and (path.startswith("/") or "\\" in path or not {".", ".."}.isdisjoint(path.split("/"))):
            raise ValueError(f"{path!r:.80} must be a relative path, without '.' and '..'")
        return path


class Networked(Strict):
    """A network, or None for that of the environment. The ports of `allowed_hosts` are 80 and 443."""

    network_mode: NetworkMode | None = None
    allowed_hosts: list[str] = Field(default_factory=list)

    @field_validator("allowed_hosts")
    @classmethod
    def _hosts(cls, hosts: list[str]) -> list[str]:
        if ported := next((host for host in hosts if re.fullmatch(r"[^:]+:\d+|\[.*", host)), None):
            raise ValueError(f"{ported!r:.80} must be a host without a port")
        return [*checked_policy(hosts)]

    @model_validator(mode="after")
    def _mode_of_hosts(self) -> Self:
        if self.allowed_hosts and self.network_mode != "allowlist":
            given = "none" if self.network_mode is None else f'"{self.network_mode}"'
            raise ValueError(f'allowed_hosts need network_mode = "allowlist", got {given}')
        return self

    @property
    def policy(self) -> NetworkPolicy | None:
        """The network as agentkit names it."""
        if self.network_mode == "allowlist":
            return tuple(self.allowed_hosts)
        return None if self.network_mode is None else "public" if self.network_mode == "public" else "none"


class Phase(Networked):
    """The user and the network of the agent's or the verifier's phase; None is that of the environment."""

    timeout_sec: Timeout | None = None
    user: User | None = None


class Environment(Networked):
    """A sandbox. `storage_mb` limits the size of one file; the total is that of the engine's disk."""

    build_timeout_sec: Timeout = 600.0
    docker_image: str | None = Field(default=None, min_length=1)
    os: Annotated[Literal["linux", "windows"], BeforeValidator(_lower)] = "linux"
    cpus: float | None = Field(default=None, gt=0, le=1 << 14)
    memory_mb: int | None = Field(default=None, ge=16, le=1 << 24)
    storage_mb: int | None = Field(default=None, ge=1, le=1 << 24)
    gpus: int | None = None
    gpu_types: list[str] | None = None
    tpu: dict[str, Any] | None = None
    env: Variables = Field(default_factory=dict)
    skills_dir: str | None = None
    workdir: str | None = Field(default=None, pattern="^/")
    mcp_servers: list[McpServer] = Field(default_factory=list)
    healthcheck: Healthcheck | None = None
    allow_internet: bool | None = None  # before schema 1.2
    memory: str | None = None  # "2G", before schema 1.1
    storage: str | None = None

    @field_validator("memory", "storage")
    @classmethod
    def _size(cls, size: str | None) -> str | None:
        if size is not None:
            mebibytes(size)
        return size

    def network(self, agent: Phase, verifier: Phase) -> NetworkConfig:
        """Return the network of each phase; that of the setup, also if it is given in the old way, is the default."""
        own = self.policy
        if own is None:
            own = "none" if self.allow_internet is False else "public"
        return NetworkConfig(
            setup=own,
            agent=own if agent.policy is None else agent.policy,
            verifier=own if verifier.policy is None else verifier.policy,
        )

    @field_validator("mcp_servers")
    @classmethod
    def _distinct_servers(cls, servers: list[McpServer]) -> list[McpServer]:
        names = [server.name for server in servers]
        if twice := {name for name in names if names.count(name) > 1}:
            raise ValueError(f"two servers are named {', '.join(sorted(twice))}")
        return servers


def mebibytes(size: str) -> int:
    """Return a size such as "2G" or "512M" in MiB. Raises ValueError."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG])", size.strip().upper())
    if match is None:
        raise ValueError(f'{size!r:.40} is not a size; write a number with K, M or G, such as "2G"')
    return max(1, int(float(match[1]) * {"K": 1 / 1024, "M": 1, "G": 1024}[match[2]]))


class Verifier(Phase):
    """The verifier: `tests/test.sh`, in the agent's sandbox (shared) or in one of its own (separate)."""

    env: Variables = Field(default_factory=dict)
    environment_mode: Literal["shared", "separate"] | None = None
    environment: Environment | None = None
    collect: list[Collect] = Field(default_factory=list)

    @model_validator(mode="after")
    def _one_mode(self) -> Self:
        if self.environment_mode == "shared" and self.environment is not None:
            raise ValueError('environment_mode is "shared", but there is an environment; remove one of them')
        return self

    @property
    def mode(self) -> Literal["shared", "separate"] | None:
        """The mode; None if nothing says which."""
        return self.environment_mode or ("separate" if self.environment is not None else None)


class Solution(Strict):
    """The oracle solution, `solution/solve.sh`."""

    env: Variables = Field(default_factory=dict)


def _long_form(entries: Any) -> Any:
    """Return artifacts with each bare path as a table."""
    if not isinstance(entries, list):
        return entries
    return [{"source": entry} if isinstance(entry, str) else entry for entry in entries]


Artifacts = Annotated[list[DeclaredArtifact], BeforeValidator(_long_form)]


class Step(Strict):
    """One step of a task with several; unset values are those of the task."""

    name: StepName
    agent: Phase = Phase()
    verifier: Verifier = Verifier()
    min_reward: float | dict[str, float] | None = None
    healthcheck: Healthcheck | None = None
    artifacts: Artifacts = Field(default_factory=list)


class Author(Strict):
    """An author of a task."""

    name: str
    email: str | None = None


class Package(Strict):
    """The task in Harbor's registry."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=200)
    version: str | None = Field(default=None, min_length=1)
    description: str = ""
    authors: list[Author] = Field(default_factory=list)
    keywords: list[str] = Field(default_factory=list)


class TaskToml(Strict):
    """A whole `task.toml`."""

    schema_version: str = "1.0"  # as in Harbor, any text: tasks give the version of their own template here
    source: str | None = None
    multi_step_reward_strategy: Literal["mean", "final"] = "mean"
    artifacts: Artifacts = Field(default_factory=list)
    task: Package | None = None
    metadata: dict[str, Any] = Field(default_factory=dict)
    agent: Phase = Phase()
    verifier: Verifier = Verifier()
    environment: Environment = Environment()
    solution: Solution = Solution()
    steps: list[Step] = Field(default_factory=list)

    @field_validator("steps")
    @classmethod
    def _distinct_steps(cls, steps: list[Step]) -> list[Step]:
        names = [unicodedata.normalize("NFC", step.name).casefold() for step in steps]
        if twice := {name for name in names if names.count(name) > 1}:
            raise ValueError(f"two steps are named {', '.join(sorted(twice))}")
        return steps
