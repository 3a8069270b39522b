"""The parts of a task directory that a task keeps; `agentkit_evals.harbor` reads and runs such directories."""

from __future__ import annotations

import posixpath
import re
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from agentkit.environment_config import BuildConfig, EnvironmentConfig
from agentkit.strict import RelativePath, Shell, Strict, Timeout, Variables


def _source(path: str) -> str:
    normal = posixpath.normpath(path)
    if not path or "\0" in path or ".." in path.split("/") or normal in ("/", "//", "."):
        raise ValueError(f"{path!r:.80} must be the path of a file or folder, without '..'")
    return normal


def _user(user: Any) -> Any:
    if isinstance(user, int) and not isinstance(user, bool):
        user = str(user)
    if isinstance(user, str) and not re.fullmatch(r"[\w.-]+(:[\w.-]+)?", user):
        raise ValueError(f"{user!r:.80} is not a user name or a uid")
    return user


SandboxPath = Annotated[str, AfterValidator(_source)]
"""A path in a sandbox; a relative one begins at its work directory."""
TaskPath = Literal["."] | RelativePath
"""A file or folder of the task, or its whole folder."""
Condition = Literal["service_started", "service_healthy", "service_completed_successfully"]
HOST_NAME = r"^[a-zA-Z0-9][a-zA-Z0-9_.-]*$"
HostName = Annotated[str, Field(pattern=HOST_NAME, max_length=63)]
Restart = Literal["no", "always", "unless-stopped", "on-failure"]
User = Annotated[str, BeforeValidator(_user)]
"""A user's name or uid; a number becomes text."""


_SECRET_HEADER = re.compile(r"key|secret|token(?!s)|password|credential|auth|^(set-)?cookie$", re.IGNORECASE)


def _transport(name: Any) -> Any:
    return "streamable-http" if name == "http" else name


class Healthcheck(Strict):
    """A command that must succeed before the agent starts."""

    command: Shell
    interval_sec: float = Field(default=5.0, ge=0, le=1e6)
    timeout_sec: Timeout = 30.0
    start_period_sec: float = Field(default=0.0, ge=0, le=1e6)
    start_interval_sec: float = Field(default=5.0, ge=0, le=1e6)
    retries: int = Field(default=3, ge=1, le=1_000_000)


def _exclusion(pattern: str) -> str:
    if "\0" in pattern or re.search(r"\[[^\]]*(\\|\[[:.=])|(?<!\\)(\\\\)*\\$", pattern):
        raise ValueError(
            f"{pattern!r:.80}: escapes and classes such as [:alpha:] in brackets, and a backslash at the end, are not "
            "supported"
        )
    return pattern


class Artifact(Strict):
    """A file or folder of the agent's sandbox that a separate verifier gets, at the same path."""

    source: SandboxPath
    exclude: list[Annotated[str, AfterValidator(_exclusion)]] = Field(default_factory=list)  # as `tar --exclude`


class Collect(Strict):
    """A command in the agent's sandbox, before artifacts are taken out of it."""

    command: Shell
    service: str | None = None
    timeout_sec: Timeout = 60.0
    user: User | None = None


class McpServer(Strict):
    """An MCP server for the agent: a command in its sandbox, or a URL that is reached from there."""

    name: str = Field(min_length=1, max_length=100)
    transport: Annotated[Literal["stdio", "sse", "streamable-http"], BeforeValidator(_transport)] = "sse"
    url: str | None = None
    command: Shell | None = None
    args: list[Shell] = Field(default_factory=list)
    headers: dict[str, str] = Field(default_factory=dict)  # values may have `${NAME}`

    @model_validator(mode="after")
    def _complete(self) -> Self:
        needed, foreign = ("command", ("url", "headers")) if self.transport == "stdio" else ("url", ("command", "args"))
        if not getattr(self, needed):
            raise ValueError(f'the transport "{self.transport}" needs {needed}')
        if given := [name for name in foreign if getattr(self, name)]:
            raise ValueError(f'the transport "{self.transport}" has no {" and no ".join(given)}')
        if self.url is not None and not re.match(r"https?://[^/]", self.url):
            raise ValueError(f"url: {self.url!r:.80} must begin with http:// or https:// and a host")
        for header, value in self.headers.items():
            if _SECRET_HEADER.search(header) and value.strip() and "${" not in value:
                raise ValueError(
                    f"headers: {header!r:.80} is a secret; write it as ${{NAME}}, a variable of the machine"
                )
        return self


def _test(test: list[str]) -> list[str]:
    if not test or test[0] not in ("CMD", "CMD-SHELL", "NONE"):
        raise ValueError(f"test: given {test!r:.80}, expected a command, or a list that begins with CMD or CMD-SHELL")
    return test


class ServiceHealthcheck(Strict):
    """A health check of a service; None leaves a setting to the engine."""

    test: Annotated[list[Shell], AfterValidator(_test)]  # ["CMD", ...], ["CMD-SHELL", command] or ["NONE"]
    interval_s: Timeout | None = None
    timeout_s: Timeout | None = None
    start_period_s: float | None = Field(default=None, ge=0, le=1e6)
    retries: int | None = Field(default=None, ge=1, le=1_000_000)


class VolumeConfig(Strict):
    """A volume in a container. Those of the same name are one volume."""

    name: str
    read_only: bool = False


class ServiceConfig(Strict):
    """A container beside the agent's sandbox, which reaches it by its name. None leaves a setting to the image."""

    name: HostName
    image: str | None = Field(default=None, min_length=1)
    build: BuildConfig | None = None  # instead of `image`
    command: list[Shell] | None = None
    entrypoint: list[Shell] | None = None
    user: User | None = None
    workdir: str | None = Field(default=None, pattern="^/")
    env: Variables = Field(default_factory=dict)
    healthcheck: ServiceHealthcheck | None = None
    aliases: list[HostName] = Field(default_factory=list)
    restart: Restart = "no"
    cpus: float | None = Field(default=None, gt=0, le=1 << 14)  # None: as many as the agent's sandbox
    memory_mib: int | None = Field(default=None, ge=16, le=1 << 24)
    depends_on: dict[str, Condition] = Field(default_factory=dict)
    files: dict[str, TaskPath] = Field(default_factory=dict)  # path in the container -> below the task's folder
    volumes: dict[str, VolumeConfig] = Field(default_factory=dict)  # path in the container -> volume


class HarborStep(Strict):
    """One step as agentkit runs it; a task without steps has one, without a name."""

    name: str = ""
    folder: str = "."  # below the task's folder: instruction.md, tests/, solution/, workdir/
    instruction: str = Field(min_length=1)
    agent_timeout_s: Timeout
    verifier_timeout_s: Timeout
    verifier_user: User | None = None
    verifier_env: Variables = Field(default_factory=dict)
    healthcheck: Healthcheck | None = None
    min_reward: dict[str, float] = Field(default_factory=dict)
    tests: list[str]  # files and folders below the task's folder that make up /tests; later ones override earlier ones
    solution: str | None = None  # a file or folder below the task's folder that becomes /solution
    separate: EnvironmentConfig | None = None  # the verifier's own sandbox; None: the agent's
    upload_tests: bool = True  # False: the image of the separate sandbox has them
    artifacts: list[Artifact] = Field(default_factory=list)
    collect: list[Collect] = Field(default_factory=list)


class HarborConfig(Strict):
    """Scoring of the task of a directory in the format of Harbor or Terminal-Bench 1.

    The tests run in the agent's own sandbox once its processes are dead, or in a separate one with the step's
    artifacts. The reward is what they write to /logs/verifier as `reward.txt` or `reward.json`; the reward of several
    steps is their mean, or the last one.
    """

    folder: str  # absolute path of the directory
    sha256: str = Field(pattern="^[0-9a-f]{64}$")  # `folder_hash` when the task was read
    script: RelativePath = "test.sh"  # in /tests
    solution_script: RelativePath = "solve.sh"  # in /solution
    reward: Literal["file", "pytest"] = "file"  # "pytest": 1 if the script's output reports that every test passed
    steps: list[HarborStep] = Field(min_length=1)
    final_step_only: bool = False
    solution_env: Variables = Field(default_factory=dict)
    healthcheck: Healthcheck | None = None  # before the first step
    entrypoint: list[Shell] | None = None  # None: the image's
    command: list[Shell] | None = None  # arguments of the entry point; None: a command that waits
    files: dict[str, TaskPath] = Field(default_factory=dict)  # path in the sandbox -> below the task's folder
    volumes: dict[str, VolumeConfig] = Field(default_factory=dict)  # path in the sandbox -> one that services share
    services: list[ServiceConfig] = Field(default_factory=list)  # each after those that it depends on
    wait_for: dict[str, Condition] = Field(default_factory=dict)  # services that the agent's sandbox depends on
    aliases: list[HostName] = Field(default_factory=list)  # how services reach the agent's sandbox, besides `main`
    mcp_servers: list[McpServer] = Field(default_factory=list)
    skills_dir: str | None = None  # a folder in the sandbox with folders that have a SKILL.md
    history: RelativePath | None = None  # an ATIF file with the conversation before the task

    @property
    def beside_the_sandbox(self) -> str | None:
        """The state of a trial that is not in the files of its sandbox, and so in no snapshot of it; None without."""
        if len(self.steps) > 1:
            return "the rewards of its steps"
        if self.services:
            return "its services"
        return "its MCP servers" if self.mcp_servers else None
