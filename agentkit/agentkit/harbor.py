"""The parts of a task directory that a task keeps; `agentkit_evals.harbor` reads and runs such directories."""

from __future__ import annotations

import posixpath
import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field

from agentkit.environment_config import EnvironmentConfig
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
User = Annotated[str, BeforeValidator(_user)]
"""A user's name or uid; a number becomes text."""


class Healthcheck(Strict):
    """A command that must succeed before the agent starts."""

    command: Shell
    interval_sec: float = Field(default=5.0, ge=0, le=1e6)
    timeout_sec: Timeout = 30.0
    start_period_sec: float = Field(default=0.0, ge=0, le=1e6)
    start_interval_sec: float = Field(default=5.0, ge=0, le=1e6)
    retries: int = Field(default=3, ge=1, le=1_000_000)


class Collect(Strict):
    """A command in the agent's sandbox, before artifacts are taken out of it."""

    command: Shell
    service: str | None = None
    timeout_sec: Timeout = 60.0
    user: User | None = None


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
    artifacts: list[SandboxPath] = Field(default_factory=list)
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
    history: RelativePath | None = None  # an ATIF file with the conversation before the task
