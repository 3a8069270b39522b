"""Reading a task directory of Terminal-Bench 1 as a task.

    task.yaml  Dockerfile  docker-compose.yaml  run-tests.sh  tests/  solution.sh

The tests print pytest's summary (`pytest -rA`); the reward is 1 if there are tests and all of them pass. One service of
docker-compose.yaml is the agent's sandbox: the one with the container name that Terminal-Bench sets, the only one, or
`client`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, ValidationError

from agentkit.environment_config import BuildConfig, EnvironmentConfig, LimitsConfig, NetworkConfig
from agentkit.errors import TaskFileError
from agentkit.harbor import HarborConfig, HarborStep
from agentkit.strict import Strict, Timeout
from agentkit.task import AgentConfig, SolutionConfig, Task, load_yaml, read_yaml
from agentkit_engine.untrusted import describe
from agentkit_environments.folder import folder_hash
from agentkit_evals.harbor.compose import Compose
from agentkit_evals.harbor.read import COMPOSE, MAX_TURNS, MEMORY_MIB, OPEN_FILES, PROCESSES, STORAGE_MIB, task_id

CLIENT = "T_BENCH_TASK_DOCKER_CLIENT_CONTAINER_NAME"


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
    compose = _compose(folder)
    image = compose.main.image if compose else None
    solution = folder / "solution.sh"
    try:
        sha256 = folder_hash(folder)
        build = compose.build if compose else BuildConfig(folder=str(folder), sha256=sha256)
        if image is None and (build is None or not Path(build.folder, build.dockerfile).is_file()):
            raise TaskFileError(f"{folder / 'Dockerfile'} is missing")
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
    try:
        return Task(
            id=task_id(folder),
            instruction=settings.instruction,
            environment=EnvironmentConfig(
                image=image,
                build=build,
                as_image=True,
                user=compose.main.user if compose else None,
                backend="docker",
                workdir=(compose.main.working_dir if compose else None) or "",
                network=NetworkConfig.everywhere("public" if compose is None or compose.has_network else "none"),
                env=compose.env if compose else {},
                limits=LimitsConfig(
                    memory_mib=(compose.memory_mib if compose else None) or MEMORY_MIB,
                    cpus=(compose.cpus if compose else None) or 1.0,
                    processes=PROCESSES,
                    file_size_mib=STORAGE_MIB,
                    open_files=OPEN_FILES,
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
                **(compose.harbor_fields if compose else {}),
            ),
            solution=SolutionConfig(command="/solution/solution.sh", timeout_s=settings.max_agent_timeout_sec)
            if step.solution
            else None,
            metadata={"difficulty": settings.difficulty, "category": settings.category, "tags": settings.tags},
        )
    except ValidationError as exc:
        raise TaskFileError(f"{folder / COMPOSE}:1: {describe(exc)}") from exc


def _compose(folder: Path) -> Compose | None:
    """Read docker-compose.yaml; None if there is none. Raises TaskFileError."""
    path = folder / COMPOSE
    if not path.exists():
        return None
    _, data = read_yaml(path)
    services = data.get("services") if isinstance(data, dict) else None
    named = services if isinstance(services, dict) else {"client": None}  # the other errors are those of `Compose`
    own = [name for name, each in named.items() if isinstance(each, dict) and CLIENT in str(each.get("container_name"))]
    main_name = str(own[0] if own else next(iter(named)) if len(named) == 1 else "client")
    if named and main_name not in named:
        raise TaskFileError(f"{path}:1: services: none is the agent's sandbox; name one `client`")
    return Compose(path, root=folder, main_name=main_name)
