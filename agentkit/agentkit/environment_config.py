"""The `environment` of a task: the sandbox of the agent."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import Field, PlainValidator, model_validator

from agentkit.strict import MAX_TIMEOUT_S, RelativePath, Shell, Strict, Variables
from agentkit_environments import EnvironmentSpec, Network, NetworkPolicy, ResourceLimits
from agentkit_environments.folder import image_tag
from agentkit_environments.network import PHASES, checked_policy

Policy = Annotated[NetworkPolicy, PlainValidator(checked_policy)]


class LimitsConfig(Strict):
    """Resource limits of a sandbox, with the fields and defaults of `agentkit_environments.ResourceLimits`."""

    memory_mib: int = Field(default=1024, ge=16, le=1 << 24)
    processes: int = Field(default=256, ge=1, le=1 << 22)
    cpus: float = Field(default=1.0, gt=0, le=1 << 14)
    file_size_mib: int = Field(default=256, ge=1, le=1 << 24)
    open_files: int = Field(default=1024, ge=16, le=1 << 20)
    disk_mib: int = Field(default=512, ge=1, le=1 << 24)


class NetworkConfig(Strict):
    """Network of commands in each phase: `none`, `public` or a list of hosts; see `agentkit_environments.network`.

    A single value is that of every phase.
    """

    setup: Policy = "none"
    agent: Policy = "none"
    verifier: Policy = "none"

    @model_validator(mode="before")
    @classmethod
    def _same_in_every_phase(cls, value: Any) -> Any:
        if isinstance(value, Mapping | NetworkConfig):
            return value
        return dict.fromkeys(PHASES, checked_policy(value))

    @classmethod
    def everywhere(cls, policy: NetworkPolicy) -> Self:
        """Return a configuration with the same policy in every phase."""
        return cls(setup=policy, agent=policy, verifier=policy)

    def network(self) -> Network:
        """Return this configuration as a `Network`."""
        return Network(self.setup, self.agent, self.verifier)


class BuildConfig(Strict):
    """A Docker image that is built from a folder with a Dockerfile when a sandbox opens, and then kept."""

    folder: str  # absolute path
    sha256: str = Field(pattern="^[0-9a-f]{64}$")  # `folder_hash` of the folder when the task was read
    dockerfile: RelativePath = "Dockerfile"  # in the folder
    target: str | None = Field(default=None, min_length=1)  # the stage to build; None: the last one
    args: Variables = Field(default_factory=dict)  # build arguments
    timeout_s: float = Field(default=600.0, gt=0, le=MAX_TIMEOUT_S)

    @property
    def image(self) -> str:
        """The name of the image."""
        return image_tag(self.sha256, dockerfile=self.dockerfile, target=self.target, args=self.args)


class EnvironmentConfig(Strict):
    """The sandbox of the agent. `files` are written first, then `setup` runs, both before the agent starts."""

    image: str | None = None
    build: BuildConfig | None = None  # instead of `image`
    as_image: bool = False  # the image as it was built: see `EnvironmentSpec.as_image`
    user: str | None = None  # with `as_image`: the user of commands, else the image's
    backend: Literal["auto", "docker", "process"] = "auto"
    files: dict[RelativePath, str] = Field(default_factory=dict)  # path in the workdir -> text
    setup: list[Shell] = Field(default_factory=list)  # shell commands; a non-zero exit status is an error of the task
    workdir: str = "/workspace"
    workdir_from_image: bool = False  # the workdir starts with the image's files at its path, instead of empty
    network: NetworkConfig = NetworkConfig()
    env: Variables = Field(default_factory=dict)
    limits: LimitsConfig = LimitsConfig()
    snapshots: bool = False  # the files are saved after each turn that may change them, for a run that is resumed

    @model_validator(mode="after")
    def _accepted(self) -> Self:
        if self.image is not None and self.build is not None:
            raise ValueError("image and build contradict each other; give one of them")
        self.spec()  # validates: EnvironmentSpec has rules of its own, such as reserved workdirs
        return self

    def spec(self) -> EnvironmentSpec:
        """Return this configuration as an `EnvironmentSpec`."""
        return EnvironmentSpec(
            image=self.image if self.build is None else self.build.image,
            workdir=self.workdir,
            workdir_from_image=self.workdir_from_image,
            as_image=self.as_image,
            user=self.user,
            network=self.network.network(),
            env=dict(self.env),
            limits=ResourceLimits(**self.limits.model_dump()),
        )
