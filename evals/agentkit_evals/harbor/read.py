"""Reading a Harbor task directory as a task.

    task.toml  instruction.md  environment/Dockerfile  tests/test.sh  solution/solve.sh  steps/NAME/...

Every file is checked before anything runs. A key that Harbor does not have is an error, and so is one that asks for
something that agentkit does not support: the message names the key.
"""

from __future__ import annotations

import datetime
import math
import re
import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from agentkit.atif import load_atif
from agentkit.environment_config import BuildConfig, EnvironmentConfig, LimitsConfig, NetworkConfig
from agentkit.errors import TaskFileError, TrajectoryError
from agentkit.harbor import Artifact, HarborConfig, HarborStep
from agentkit.history import check_history
from agentkit.task import AgentConfig, SolutionConfig, Task, explain
from agentkit_engine.untrusted import describe, read_regular, shorten
from agentkit_environments.folder import folder_hash
from agentkit_evals.harbor.compose import Compose
from agentkit_evals.harbor.config import DeclaredArtifact, Environment, Phase, Step, TaskToml, Verifier, mebibytes

MAX_TOML_BYTES = 1 << 19
MAX_INSTRUCTION_BYTES = 1 << 20
MAX_PROBLEMS = 50
MAX_DEPTH = 50
AGENT_TIMEOUT_S = 3600.0
"""Wall time of an agent whose task sets none; Harbor has no limit then."""
MAX_TURNS = 200
"""Harbor counts no turns; this stops an agent that goes round in circles."""
MEMORY_MIB = 2048
STORAGE_MIB = 10_240
PROCESSES = 4096
OPEN_FILES = 4096
CONVENTION = "/logs/artifacts"
COMPOSE = "docker-compose.yaml"
OTHER_COMPOSE = ("docker-compose.yml", "compose.yaml", "compose.yml")


def is_harbor(folder: Path) -> bool:
    """Return whether a folder is a Harbor task directory."""
    return (folder / "task.toml").is_file()


def read_harbor(folder: Path) -> Task:
    """Read a task directory.

    Raises:
        TaskFileError: a file is missing or malformed, or asks for something that is not supported. The message has one
            `FILE:LINE: problem` per problem.
    """
    folder = folder.resolve()
    path = folder / "task.toml"
    text = _text(path, MAX_TOML_BYTES)
    toml = _parse(path, text)
    if problems := list(_unsupported(toml, folder)):
        raise TaskFileError("\n".join(f"{path}:{_line(text, loc)}: {problem}" for loc, problem in problems))
    compose = Compose(file, toml.environment) if (file := folder / "environment" / COMPOSE).exists() else None
    if compose is not None:
        toml = _merged(toml, compose)
    build = compose.build if compose else None
    try:
        environment = _environment(
            toml.environment,
            folder / "environment",
            user=toml.agent.user,
            network=NetworkConfig.everywhere("none")
            if compose and not compose.has_network
            else toml.environment.network(toml.agent, toml.verifier),
            build=build,
        )
        steps = [_step(toml, step, folder, build) for step in toml.steps] or [_step(toml, None, folder, build)]
        return Task(
            id=task_id(folder),
            instruction=steps[0].instruction,
            environment=environment,
            agent=AgentConfig(max_turns=MAX_TURNS, timeout_s=steps[0].agent_timeout_s),
            verifier=HarborConfig(
                folder=str(folder),
                sha256=folder_hash(folder),
                steps=steps,
                final_step_only=toml.multi_step_reward_strategy == "final",
                solution_env=toml.solution.env,
                healthcheck=toml.environment.healthcheck,
                **(compose.harbor_fields if compose else {}),
                mcp_servers=toml.environment.mcp_servers,
                skills_dir=toml.environment.skills_dir,
                history=_history(folder),
            ),
            solution=_solution(steps),
            metadata=_metadata(toml),
        )
    except ValidationError as exc:
        raise TaskFileError(f"{path}:1: {describe(exc)}") from exc
    except OSError as exc:
        raise TaskFileError(f"{exc.filename or folder}: cannot be read: {exc.strerror}") from exc


def _merged(toml: TaskToml, compose: Compose) -> TaskToml:
    """Return task.toml with the settings that the Compose file has for the agent's sandbox."""
    own, main = toml.environment, compose.main
    settings = {
        "env": {**compose.env, **own.env},
        "docker_image": own.docker_image or main.image,
        "workdir": own.workdir or main.working_dir,
        "healthcheck": own.healthcheck or compose.healthcheck,
        "cpus": compose.cpus,
        "memory_mb": compose.memory_mib,
    }
    agent = toml.agent.model_copy(update={"user": toml.agent.user or main.user})
    return toml.model_copy(update={"environment": own.model_copy(update=settings), "agent": agent})


def task_id(folder: Path) -> str:
    """Return a task's id: the name of its folder, with other characters than letters, digits, `._-` replaced."""
    return re.sub(r"[^A-Za-z0-9._-]", "-", folder.name).lstrip("._-")[:120] or "task"


def _text(path: Path, max_bytes: int) -> str:
    try:
        data = read_regular(path, max_bytes=max_bytes)
        return data.decode("utf-8-sig")
    except OSError as exc:
        raise TaskFileError(f"{path}: cannot be read: {exc.strerror}") from exc
    except UnicodeDecodeError as exc:
        line = data.count(b"\n", 0, exc.start) + 1
        raise TaskFileError(f"{path}:{line}: not UTF-8 text") from exc


def _history(folder: Path) -> str | None:
    """Return the name of the file with prior context, which can be read; None if there is none."""
    path = folder / "trajectory.json"
    if not path.exists():
        return None
    try:
        check_history(load_atif(path))
    except TrajectoryError as exc:
        raise TaskFileError(str(exc)) from exc
    except ValueError as exc:
        raise TaskFileError(f"{path}: not a conversation that an agent can continue: {exc}") from exc
    return path.name


def _parse(path: Path, text: str) -> TaskToml:
    try:
        data = tomllib.loads(text)
    except (ValueError, RecursionError) as exc:
        place = re.search(r"\(at line (\d+)", str(exc))
        reason = "nested too deeply" if isinstance(exc, RecursionError) else shorten(str(exc), 200, quote=False)
        raise TaskFileError(f"{path}:{place[1] if place else 1}: not valid TOML: {reason}") from exc
    if _depth(data) > MAX_DEPTH:
        raise TaskFileError(f"{path}:1: nested more than {MAX_DEPTH} deep")
    if "version" in data and "schema_version" not in data:  # before schema 1.1
        data["schema_version"] = data.pop("version")
    try:
        return TaskToml.model_validate(data)
    except ValidationError as exc:
        errors = exc.errors(include_url=False)
        shown = sorted({(_line(text, error["loc"]), explain(error, TaskToml)) for error in errors[:MAX_PROBLEMS]})
        lines = [f"{path}:{line}: {problem}" for line, problem in shown]
        if len(errors) > MAX_PROBLEMS:
            lines.append(f"{path}:{shown[-1][0]}: and {len(errors) - MAX_PROBLEMS} more problems")
        raise TaskFileError("\n".join(lines)) from exc


def _depth(value: Any) -> int:
    """Return how deeply a value is nested, without recursion."""
    depth, level = 0, [value]
    while level:
        depth += 1
        level = [
            inner
            for each in level
            for inner in (each.values() if isinstance(each, dict) else each if isinstance(each, list) else ())
        ]
    return depth


def _line(text: str, loc: Sequence[int | str]) -> int:
    """Return the line (from 1) of a key, or else of the nearest table around it."""
    wanted = [str(step) for step in loc if not isinstance(step, int)]
    table: list[str] = []
    best, line_of_best = -1, 1
    for number, line in enumerate(text.splitlines(), start=1):
        if match := re.match(r"\s*\[\[?\s*([^\]]+?)\s*\]", line):
            table = keys = re.split(r"\s*\.\s*", match[1].replace('"', ""))
        elif match := re.match(r"\s*([\w.\"-]+)\s*=", line):
            keys = [*table, *match[1].replace('"', "").split(".")]
        else:
            continue
        if keys == wanted[: len(keys)] and len(keys) > best:
            best, line_of_best = len(keys), number
    return line_of_best


def _unsupported(toml: TaskToml, folder: Path) -> Iterator[tuple[tuple[str, ...], str]]:
    """Yield the place of each key that asks for something that agentkit does not support, and the reason."""
    environments: list[tuple[tuple[str, ...], Environment, Path]] = [
        (("environment",), toml.environment, folder / "environment")
    ]
    verifiers = [(("verifier",), toml.verifier), *((("steps", "verifier"), step.verifier) for step in toml.steps)]
    for loc, verifier in verifiers:
        if verifier.environment is not None:
            environments.append(((*loc, "environment"), verifier.environment, folder / "tests"))
        for hook in verifier.collect:
            if hook.service not in (None, "main"):
                yield (*loc, "collect", "service"), f"{'.'.join(loc)}.collect: service {hook.service!r}: {_COMPOSE}"
    for loc, environment, context in environments:
        name = ".".join(loc)
        if environment.os != "linux":
            yield (*loc, "os"), f"{name}.os: only linux containers are supported, got {environment.os}"
        if environment.gpus:
            yield (*loc, "gpus"), f"{name}.gpus: GPUs in sandboxes are not supported"
        if environment.tpu:
            yield (*loc, "tpu"), f"{name}.tpu: TPUs are not supported"
        if environment.skills_dir is not None and environment is not toml.environment:
            yield (*loc, "skills_dir"), f"{name}.skills_dir: only the agent can have skills, not a verifier"
        if environment.mcp_servers and environment is not toml.environment:
            yield (*loc, "mcp_servers"), f"{name}.mcp_servers: only the agent can have MCP servers, not a verifier"
        files = OTHER_COMPOSE if environment is toml.environment else (COMPOSE, *OTHER_COMPOSE)
        if environment.docker_image is None and (found := [file for file in files if (context / file).exists()]):
            yield loc, f"{context / found[0]}: only environment/{COMPOSE} can declare services"
    network = toml.environment.network(toml.agent, toml.verifier)
    for step in toml.steps:
        own = toml.environment.network(step.agent, step.verifier)
        if step.agent.policy is not None and own.agent != network.agent:
            yield ("steps", "agent", "network_mode"), f"steps.agent.network_mode: {_STEP_NETWORK}"
        if step.verifier.policy is not None and own.verifier != network.verifier:
            yield ("steps", "verifier", "network_mode"), f"steps.verifier.network_mode: {_STEP_NETWORK}"
        if step.agent.user not in (None, toml.agent.user):
            yield (
                ("steps", "agent", "user"),
                f"steps.agent.user: {step.agent.user} for one step; give agent.user instead",
            )
        if (folder / "steps" / step.name / "trajectory.json").exists():
            yield ("steps", "name"), f"steps/{step.name}/trajectory.json: prior context of one step is not supported"
    for artifact in [*toml.artifacts, *(artifact for step in toml.steps for artifact in step.artifacts)]:
        if artifact.service not in (None, "main"):
            yield ("artifacts",), f"artifacts: service {artifact.service!r}: {_COMPOSE}"


_STEP_NETWORK = "a network for one step is not supported; give it for the whole task"
_COMPOSE = "only the agent's sandbox is supported, not a service"


def _environment(
    toml: Environment, context: Path, *, user: str | None, network: NetworkConfig, build: BuildConfig | None = None
) -> EnvironmentConfig:
    """Return the sandbox of `environment` or `verifier.environment`.

    Its image is `docker_image`, or is built: as `build` says, or else from the Dockerfile in the folder `context`.
    """
    if toml.docker_image is None and build is None:
        if not (context / "Dockerfile").is_file():
            raise TaskFileError(f"{context / 'Dockerfile'} is missing; add it, or give environment.docker_image")
        build = BuildConfig(folder=str(context), sha256=folder_hash(context), timeout_s=toml.build_timeout_sec)
    memory = mebibytes(toml.memory) if toml.memory else MEMORY_MIB
    storage = mebibytes(toml.storage) if toml.storage else STORAGE_MIB
    return EnvironmentConfig(
        image=toml.docker_image,
        build=build,
        as_image=True,
        user=user,
        backend="docker",
        workdir=toml.workdir or "",
        network=network,
        env=toml.env,
        limits=LimitsConfig(
            memory_mib=toml.memory_mb or memory,
            cpus=toml.cpus or 1.0,
            processes=PROCESSES,
            file_size_mib=toml.storage_mb or storage,
            open_files=OPEN_FILES,
        ),
    )


def _step(toml: TaskToml, step: Step | None, folder: Path, build: BuildConfig | None) -> HarborStep:
    """Return one step of a task with several, or the whole task for None; `build` is that of the agent's sandbox."""
    place = "." if step is None else f"steps/{step.name}"
    own = folder / place
    tests = [each for each in dict.fromkeys(("tests", f"{place}/tests")) if (folder / each).is_dir()]
    if step is None:
        tests = tests[:1]
    agent, verifier = (toml.agent, toml.verifier) if step is None else (step.agent, step.verifier)
    mode = verifier.mode or toml.verifier.mode or "shared"
    settings = verifier.environment or toml.verifier.environment
    separate, upload_tests = None, True
    if mode == "separate":
        separate, upload_tests = _separate(settings, verifier, toml, folder, tests, build)
    if upload_tests and not any((folder / each / "test.sh").is_file() for each in tests):
        raise TaskFileError(f"{own / 'tests/test.sh'} is missing; it scores the agent's work")
    solutions = (f"{place}/solution", "solution")
    artifacts = [*toml.artifacts, *(step.artifacts if step else ())]
    minimum = step.min_reward if step else None
    return HarborStep(
        name=step.name if step else "",
        folder=place,
        instruction=_text(own / "instruction.md", MAX_INSTRUCTION_BYTES),
        agent_timeout_s=agent.timeout_sec or toml.agent.timeout_sec or AGENT_TIMEOUT_S,
        verifier_timeout_s=verifier.timeout_sec or toml.verifier.timeout_sec or 600.0,
        verifier_user=verifier.user or toml.verifier.user,
        verifier_env={**toml.verifier.env, **verifier.env},
        healthcheck=step.healthcheck if step else None,
        min_reward={} if minimum is None else minimum if isinstance(minimum, dict) else {"reward": minimum},
        tests=tests,
        solution=next((each for each in solutions if (folder / each / "solve.sh").is_file()), None),
        separate=separate,
        upload_tests=upload_tests,
        artifacts=_distinct(artifacts),
        collect=[*toml.verifier.collect, *(step.verifier.collect if step else ())],
    )


def _distinct(declared: Sequence[DeclaredArtifact]) -> list[Artifact]:
    """Return each source once, as it is declared first; `/logs/artifacts` is one in any case."""
    found = {CONVENTION: Artifact(source=CONVENTION)} if all(each.source != CONVENTION for each in declared) else {}
    for each in declared:
        found.setdefault(each.source, Artifact(source=each.source, exclude=each.exclude))
    return list(found.values())


def _separate(
    settings: Environment | None,
    verifier: Verifier,
    toml: TaskToml,
    folder: Path,
    tests: Sequence[str],
    build: BuildConfig | None,
) -> tuple[EnvironmentConfig, bool]:
    """Return the sandbox of a separate verifier, and whether the tests must be copied into it.

    An image of the verifier's own, or one built from the Dockerfile beside the tests, has the tests. Without either,
    the verifier gets a fresh sandbox like the agent's.
    """
    chosen = settings or toml.environment.model_copy(update={"docker_image": None})
    phase = toml.verifier if verifier.policy is None else verifier
    network = chosen.network(agent=Phase(), verifier=phase)
    if chosen.docker_image is not None:
        return _environment(chosen, folder, user=None, network=network), False
    for each in reversed(tests):
        if (folder / each / "Dockerfile").is_file():
            return _environment(chosen, folder / each, user=None, network=network), False
    image = chosen.model_copy(update={"docker_image": toml.environment.docker_image})
    return _environment(image, folder / "environment", user=None, network=network, build=build), True


def _solution(steps: Sequence[HarborStep]) -> SolutionConfig | None:
    """Return the oracle's command; None unless every step has a solution."""
    if any(step.solution is None for step in steps):
        return None
    return SolutionConfig(command="/solution/solve.sh", timeout_s=max(step.agent_timeout_s for step in steps))


def _metadata(toml: TaskToml) -> dict[str, Any]:
    package = {"package": toml.task.name} if toml.task else {}
    metadata: dict[str, Any] = _plain({**toml.metadata, **package})
    return metadata


def _plain(value: Any) -> Any:
    """Return a TOML value as a JSON value: dates, huge integers and numbers that are not finite become text."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return str(value) if isinstance(value, int) and value.bit_length() > 64 else value
