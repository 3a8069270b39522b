"""Reading a task directory of Terminal-Bench 1 as a task.

    task.yaml  Dockerfile  docker-compose.yaml  run-tests.sh  tests/  solution.sh

The tests print pytest's summary (`pytest -rA`); the reward is 1 if there are tests and all of them pass. Only the usual
docker-compose.yaml, with one service that is built from the folder, is supported.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from agentkit.environment_config import BuildConfig, EnvironmentConfig, LimitsConfig, NetworkConfig
from agentkit.errors import TaskFileError
from agentkit.harbor import HarborConfig, HarborStep
from agentkit.strict import Strict, Timeout
from agentkit.task import AgentConfig, SolutionConfig, Task, load_yaml, read_yaml
from agentkit_environments.folder import folder_hash
from agentkit_evals.harbor.read import MAX_TURNS, MEMORY_MIB, OPEN_FILES, PROCESSES, STORAGE_MIB, task_id

CLIENT_KEYS = {"build", "image", "container_name", "command", "environment", "volumes"}


class TaskYaml(Strict):
    """The keys of `task.yaml`."""

    instruction: str = Field(min_length=1)
    difficulty: Literal["easy", "medium", "hard", "unknown"]
    author_name: str | None = None
    author_email: str | None = None
    category: str | None = None
    tags: list[str] = Field(default_factory=list)
    parser_name: str = "pytest"
    max_agent_timeout_sec: Timeout = 360.0
    max_test_timeout_sec: Timeout = 60.0
    run_tests_in_same_shell: bool = False
    disable_asciinema: bool = False
    estimated_duration_sec: float | None = None
    expert_time_estimate_min: float | None = None
    junior_time_estimate_min: float | None = None


def is_terminal_bench(folder: Path) -> bool:
    """Return whether a folder is a task directory of Terminal-Bench 1."""
    return (folder / "task.yaml").is_file() and (folder / "run-tests.sh").is_file()


def read_terminal_bench(folder: Path) -> Task:
    """Read a task directory.

    Raises:
        TaskFileError: a file is missing or malformed, or asks for something that is not supported.
    """
    folder = folder.resolve()
    path = folder / "task.yaml"
    settings = load_yaml(path, TaskYaml)
    if settings.parser_name != "pytest":
        raise TaskFileError(f"{path}:1: parser_name: {settings.parser_name!r:.60} is not supported, only pytest is")
    if settings.run_tests_in_same_shell:
        raise TaskFileError(
            f"{path}:1: run_tests_in_same_shell is not supported: the tests start when the agent is dead"
        )
    if not (folder / "Dockerfile").is_file():
        raise TaskFileError(f"{folder / 'Dockerfile'} is missing")
    _check_compose(folder / "docker-compose.yaml")
    solution = folder / "solution.sh"
    try:
        sha256 = folder_hash(folder)
    except OSError as exc:
        raise TaskFileError(f"{exc.filename or folder}: cannot be read: {exc.strerror}") from exc
    step = HarborStep(
        instruction=settings.instruction,
        agent_timeout_s=settings.max_agent_timeout_sec,
        verifier_timeout_s=settings.max_test_timeout_sec,
        verifier_env={"TEST_DIR": "/tests"},
        tests=["run-tests.sh", *(["tests"] if (folder / "tests").is_dir() else [])],
        solution="solution.sh" if solution.is_file() else None,
    )
    return Task(
        id=task_id(folder),
        instruction=settings.instruction,
        environment=EnvironmentConfig(
            build=BuildConfig(folder=str(folder), sha256=sha256),
            as_image=True,
            backend="docker",
            workdir="",
            network=NetworkConfig.everywhere("public"),
            limits=LimitsConfig(
                memory_mib=MEMORY_MIB, file_size_mib=STORAGE_MIB, processes=PROCESSES, open_files=OPEN_FILES
            ),
        ),
        agent=AgentConfig(max_turns=MAX_TURNS, timeout_s=settings.max_agent_timeout_sec),
        verifier=HarborConfig(
            folder=str(folder),
            sha256=sha256,
            script="run-tests.sh",
            solution_script="solution.sh",
            reward="pytest",
            steps=[step],
        ),
        solution=SolutionConfig(command="/solution/solution.sh", timeout_s=settings.max_agent_timeout_sec)
        if step.solution
        else None,
        metadata={"difficulty": settings.difficulty, "category": settings.category, "tags": settings.tags},
    )


def _check_compose(path: Path) -> None:
    """Raise TaskFileError unless the file is missing or describes one container that is built from its folder."""
    if not path.exists():
        return
    _, data = read_yaml(path)
    match data:
        case {"services": {**services}, **others} if len(services) == 1 and not others.keys() - {"version"}:
            client: Any = next(iter(services.values()))
        case _:
            raise TaskFileError(f"{path}:1: only one service and no networks or volumes are supported")
    if not isinstance(client, dict) or (foreign := client.keys() - CLIENT_KEYS):
        named = ", ".join(sorted(map(str, foreign))) if isinstance(client, dict) else "no mapping"
        raise TaskFileError(f"{path}:1: keys of the service that are not supported: {named}")
    build = client.get("build", ".")
    context = build.get("context", ".") if isinstance(build, dict) else build
    dockerfile = build.get("dockerfile", "Dockerfile") if isinstance(build, dict) else "Dockerfile"
    if context not in (".", "./") or dockerfile not in ("Dockerfile", "./Dockerfile"):
        raise TaskFileError(f"{path}:1: build: only the Dockerfile beside this file is supported")
