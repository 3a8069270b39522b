"""One trial of a Harbor task: its steps in one sandbox, and the verification of each.

The verifier starts when every process of the agent is dead, so a server that the agent leaves running is gone; the
image's entry point is started again. In shared mode the tests then run in the agent's sandbox, whose programs the agent
could have changed if it is root there. In separate mode only the artifacts leave it. Reward files of the agent are
removed before the tests run, and read by the engine once every process is dead again.
"""

from __future__ import annotations

import io
import json
import math
import shlex
import tarfile
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Literal

import anyio
import anyio.to_thread

from agentkit.atif import load_atif
from agentkit.errors import TaskSetupError
from agentkit.harbor import HarborConfig, HarborStep, Healthcheck
from agentkit.messages import Message
from agentkit.task import Task
from agentkit_environments import Environment, ExecResult, SandboxUnavailableError, open_environment
from agentkit_environments.folder import folder_hash, pack_folder
from agentkit_evals.blame import blame, describe
from agentkit_evals.harbor.artifacts import exported, one_file, packed_at
from agentkit_evals.harbor.sandbox import filled_in, settled
from agentkit_evals.harbor.servers import servers_tools
from agentkit_evals.harbor.skills import with_skills
from agentkit_evals.repository import parse_log
from agentkit_evals.verdict import MAX_REWARD, Verdict, broken, tail
from agentkit_tools import Tool

Act = Callable[[HarborStep, Sequence[Tool]], Awaitable[bool]]
"""Does the work of a step in the open sandbox, with the tools of the task's MCP servers. Returns False if the trial
ends without a score."""

RewardFile = Literal["reward.json", "reward.txt"]
ROOT = "0:0"
LOGS = "/logs/agent /logs/verifier /logs/artifacts"
START_ENTRY_POINT = '"$@" </dev/null >/dev/null 2>&1 &'
WAIT = ["sh", "-c", "sleep infinity"]
FORGERY = """\
mkdir -p /logs/verifier /tests
for place in . /tmp /logs /logs/verifier /logs/artifacts "$HOME"; do
    echo 1 > "$place/reward.txt"; echo '{"reward": 1}' > "$place/reward.json"
done 2>/dev/null
printf '#!/bin/sh\\necho 1 > /logs/verifier/reward.txt\\n' > /tests/test.sh && chmod +x /tests/test.sh
( while :; do echo 1 > /logs/verifier/reward.txt; echo '{"reward": 1}' > /logs/verifier/reward.json; done ) \
    >/dev/null 2>&1 &
true
"""
"""Commands that try to forge a reward: reward files, tests of their own, and a process that keeps writing rewards."""


async def prepare(task: Task, config: HarborConfig, environment: Environment, *, is_restored: bool = False) -> None:
    """Make a new sandbox ready for the first step.

    A sandbox that `is_restored` has the files of a step that goes on. Its setup is not done again, and it need not
    become healthy, as the agent may have changed that.

    Raises:
        TaskSetupError: the task's files have changed, a command of the first step's setup failed, or the sandbox did
            not become healthy.
    """
    folder = Path(config.folder)
    if await anyio.to_thread.run_sync(folder_hash, folder) != config.sha256:
        raise TaskSetupError(f"task {task.id}: the files in {folder} have changed since it was read; run again")
    files = {} if is_restored else config.files
    for path, source in files.items():
        await environment.import_dir(*await anyio.to_thread.run_sync(packed_at, path, folder / source))
    await _begin(config, config.steps[0], environment, is_restored=is_restored)


async def episode(
    config: HarborConfig, environment: Environment, act: Act, *, run_id: str | None = None
) -> Verdict | None:
    """Run the steps of a task in a prepared sandbox, and score each.

    Args:
        config: The task's verifier.
        environment: The sandbox, after `prepare`.
        act: Does the work of a step.
        run_id: Label of further sandboxes.

    Returns:
        The verdict, or None if `act` ended the trial.

    Raises:
        TaskSetupError: an MCP server of the task could not be started before the first step.
        SandboxUnavailableError: no sandbox could be opened for a separate verifier.
        HostFailureError: the host failed.
        Other errors: those of `act`.
    """
    scores: list[_Score] = []
    for number, step in enumerate(config.steps):
        async with AsyncExitStack() as stack:
            try:
                if number > 0:
                    await _begin(config, step, environment)
                tools = await stack.enter_async_context(servers_tools(config, environment))
            except Exception as exc:
                if number == 0:
                    raise
                scores.append(_Score.broken(step, exc))
                break
            if not await act(await with_skills(config, step, environment), tools):
                return None
        try:
            await environment.kill_all()
            await environment.enter_phase("verifier")
            scores.append(await _score(config, step, environment, run_id))
            await environment.kill_all()
        except Exception as exc:
            scores.append(_Score.broken(step, exc))
        if any(scores[-1].rewards.get(key, -math.inf) < least for key, least in step.min_reward.items()):
            break
    return _combined(config, scores)


async def solve(config: HarborConfig, step: HarborStep, environment: Environment) -> ExecResult:
    """Run the oracle solution of a step, which must have one."""
    assert step.solution is not None, "a task whose steps lack a solution has no `solution`"
    await _upload(config, [step.solution], "/solution", environment)
    script = f"/solution/{config.solution_script}"
    await _as_root(environment, f"chmod +x {shlex.quote(script)}")
    env = {"DEBIAN_FRONTEND": "noninteractive", **filled_in(config.solution_env)}
    return await environment.exec([script], env=env, timeout_s=step.agent_timeout_s)


def for_step(task: Task, step: HarborStep) -> Task:
    """Return the task with the instruction and the time limit of one of its steps."""
    if len(getattr(task.verifier, "steps", ())) < 2:  # a caller may have set another time limit
        return task.model_copy(update={"instruction": step.instruction})
    agent = task.agent.model_copy(update={"timeout_s": step.agent_timeout_s})
    return task.model_copy(update={"instruction": step.instruction, "agent": agent})


def prior(task: Task) -> list[Message] | None:
    """Return the conversation that comes before the task, if its directory has one. Raises TrajectoryError."""
    if not isinstance(task.verifier, HarborConfig) or task.verifier.history is None:
        return None
    return load_atif(Path(task.verifier.folder, task.verifier.history))


@dataclass(frozen=True, slots=True)
class _Score:
    """The rewards of one step, and the verdict that they were read for."""

    step: HarborStep
    rewards: dict[str, float]
    verdict: Verdict

    @classmethod
    def broken(cls, step: HarborStep, exc: Exception) -> _Score:
        """Return the score of a step that broke, or raise the error again if the machine is at fault."""
        if blame(exc, "scoring") == "infrastructure":
            raise exc
        return cls(step, {}, broken(f"scoring failed: {describe(exc)}"))


def _combined(config: HarborConfig, scores: Sequence[_Score]) -> Verdict:
    """Return the verdict of all steps that were run: that of the last one, or one with the mean of each reward."""
    last = scores[-1].verdict
    if len(config.steps) == 1:
        return last
    if config.final_step_only:
        rewards = scores[-1].rewards
    else:
        names = {name for score in scores for name in score.rewards}
        rewards = {name: sum(score.rewards.get(name, 0.0) for score in scores) / len(scores) for name in names}
    lines = []
    for score in scores:
        lines += [f"[step {score.step.name}: reward {score.verdict.reward:g}]", score.verdict.output]
    errors = [f"step {score.step.name}: {score.verdict.error}" for score in scores if score.verdict.error]
    return replace(
        last,
        reward=_reward(rewards) if rewards else 0.0,
        output="\n".join(filter(None, lines)),
        error="; ".join(errors) or None,
        refused=tuple(line for score in scores for line in score.verdict.refused),
        duration_s=sum(score.verdict.duration_s for score in scores),
        timed_out=any(score.verdict.timed_out for score in scores),
    )


async def _begin(
    config: HarborConfig, step: HarborStep, environment: Environment, *, is_restored: bool = False
) -> None:
    """Make the sandbox ready for a step. Raises TaskSetupError."""
    if step is not config.steps[0]:
        await environment.enter_phase("setup")
        await _as_root(environment, "rm -rf /tests /solution /logs/verifier")
    await _as_root(environment, f"mkdir -p {LOGS} && chmod 777 {LOGS}")
    await _start_entry_point(environment, config)
    workdir, has_setup = Path(config.folder, step.folder, "workdir"), False
    if (
        step.name
        and not is_restored
        and (archive := await anyio.to_thread.run_sync(_packed_if_there, workdir)) is not None
    ):
        await environment.import_dir(environment.spec.workdir, archive)
        has_setup = "setup.sh" in _names(archive)
    if has_setup:
        script = str(PurePosixPath(environment.spec.workdir, "setup.sh"))
        result = await environment.exec(["/bin/sh", "-c", 'bash "$0"', script], timeout_s=step.agent_timeout_s)
        if result.exit_code != 0:
            raise TaskSetupError(f"step {step.name}: setup.sh exited {result.exit_code}: {tail(result)[-2000:]}")
    for check in filter(None, [config.healthcheck if step is config.steps[0] else None, step.healthcheck]):
        try:
            await _until_healthy(check, environment)
        except TaskSetupError:
            if not is_restored:
                raise


def _packed_if_there(folder: Path) -> bytes | None:
    return pack_folder(folder) if folder.is_dir() else None


def _names(archive: bytes) -> list[str]:
    with tarfile.open(fileobj=io.BytesIO(archive)) as files:
        return files.getnames()


async def _until_healthy(check: Healthcheck, environment: Environment) -> None:
    """Run a health check until it succeeds. Failures in the start period do not count. Raises TaskSetupError."""
    grace_ends, failures = anyio.current_time() + check.start_period_sec, 0
    while True:
        starting = anyio.current_time() < grace_ends
        result = await environment.exec(check.command, timeout_s=check.timeout_sec)
        if result.exit_code == 0:
            return
        failures += not starting
        if failures >= check.retries:
            end = f"no end within {check.timeout_sec:g} s" if result.timed_out else f"exit status {result.exit_code}"
            raise TaskSetupError(
                f"the health check {check.command!r} failed {failures} times: {end}, "
                f"{tail(result)[-2000:] or 'no output'}"
            )
        await anyio.sleep(check.start_interval_sec if starting else check.interval_sec)


async def _score(config: HarborConfig, step: HarborStep, environment: Environment, run_id: str | None) -> _Score:
    """Run the tests of a step whose agent is dead, and return what they say."""
    if step.separate is None:
        await _as_root(
            environment, "rm -rf /tests /logs/verifier && mkdir -p /logs/verifier && chmod 777 /logs/verifier"
        )
        return await _run_tests(config, step, environment)
    for hook in step.collect:
        result = await environment.exec(hook.command, user=hook.user, timeout_s=hook.timeout_sec)
        if result.exit_code != 0:
            return _Score(step, {}, broken(f"{hook.command!r} exited {result.exit_code}: {tail(result)[-2000:]}"))
    found = [await exported(environment, artifact) for artifact in step.artifacts]
    async with AsyncExitStack() as stack:
        try:
            spec = await settled(step.separate)
            place = await stack.enter_async_context(await open_environment(spec, backend="docker", run_id=run_id))
        except (OSError, TaskSetupError) as exc:
            raise SandboxUnavailableError(f"no sandbox for the verifier could be opened: {exc}") from exc
        await place.enter_phase("verifier")
        await _as_root(place, f"mkdir -p {LOGS} && chmod 777 {LOGS}")
        for folder, archive in filter(None, found):
            await place.import_dir(folder, archive)
        score = await _run_tests(config, step, place)
        return replace(score, verdict=replace(score.verdict, refused=tuple(place.refusals())))


async def _run_tests(config: HarborConfig, step: HarborStep, environment: Environment) -> _Score:
    await _start_entry_point(environment, config if step.separate is None else None)
    if step.upload_tests:
        await _upload(config, step.tests, "/tests", environment)
    script = f"/tests/{config.script}"
    await _as_root(environment, f"chmod +x {shlex.quote(script)}")
    user = step.verifier_user or (await _image(environment)).get("User") or ROOT
    env = filled_in(step.verifier_env)
    result = await environment.exec([script], env=env, user=user, timeout_s=step.verifier_timeout_s)
    verdict = Verdict(0.0, "exit", result.exit_code, tail(result), result.timed_out, result.duration_s)
    if result.timed_out:
        error = f"the tests timed out after {step.verifier_timeout_s:g} s"
        return _Score(step, {}, replace(verdict, error=error))
    await environment.kill_all()
    if config.reward == "pytest":
        tests = parse_log(result.stdout)
        rewards = {"reward": float(bool(tests) and all(outcome == "PASSED" for outcome in tests.values()))}
        return _Score(step, rewards, replace(verdict, reward=rewards["reward"], source="tests", tests=len(tests)))
    try:
        found = _read_rewards((await environment.export_dir("/logs/verifier")).data)
        if found is None:
            error = f"the tests wrote neither reward.json nor reward.txt (exit status {result.exit_code})"
            return _Score(step, {}, replace(verdict, source="missing", error=error))
        name, rewards = found
        return _Score(step, rewards, replace(verdict, reward=_reward(rewards), source=name))
    except ValueError as exc:
        return _Score(step, {}, replace(verdict, error=f"the reward cannot be used: {exc}"))


def _read_rewards(archive: bytes) -> tuple[RewardFile, dict[str, float]] | None:
    """Return the rewards in an archive of /logs/verifier, and the file that has them; None if no file does.

    Raises:
        ValueError: the file does not hold finite numbers.
    """
    texts: dict[str, str] = {}
    with tarfile.open(fileobj=io.BytesIO(archive)) as files:
        for member in files:
            if member.name in ("reward.json", "reward.txt") and member.isreg() and member.size <= 1 << 16:
                content = files.extractfile(member)
                texts[member.name] = content.read().decode(errors="replace") if content else ""
    names: tuple[RewardFile, ...] = ("reward.json", "reward.txt")
    for name in names:
        if name in texts:
            return name, _numbers(name, texts[name])
    return None


def _numbers(name: str, text: str) -> dict[str, float]:
    try:
        value = json.loads(text) if name == "reward.json" else float(text)
        given = value if isinstance(value, dict) else {"reward": value}
        rewards = {key: float(number) for key, number in given.items() if not isinstance(number, str)}
    except (ValueError, TypeError, OverflowError, RecursionError) as exc:
        raise ValueError(f"{name} must hold numbers, got {text[:200]!r}") from exc
    if len(rewards) < len(given) or any(not math.isfinite(x) or abs(x) > MAX_REWARD for x in rewards.values()):
        raise ValueError(f"{name} must hold numbers within ±{MAX_REWARD:g}, got {text[:200]!r}")
    return rewards


def _reward(rewards: Mapping[str, float]) -> float:
    """Return the reward among several: the one called `reward`, or the only one. Raises ValueError."""
    if "reward" in rewards:
        return rewards["reward"]
    if len(rewards) == 1:
        return next(iter(rewards.values()))
    raise ValueError(f"expected a number named `reward`, got {', '.join(sorted(rewards)[:8]) or 'none'}")


async def _upload(config: HarborConfig, paths: Sequence[str], place: str, environment: Environment) -> None:
    """Copy files, and the content of folders, of the task into a folder of the sandbox; later ones replace earlier."""
    for path in paths:
        archive = await anyio.to_thread.run_sync(_packed, Path(config.folder, path))
        await environment.import_dir(place, archive)


def _packed(path: Path) -> bytes:
    return pack_folder(path) if path.is_dir() else one_file(path.name, path.read_bytes())


async def _start_entry_point(environment: Environment, config: HarborConfig | None) -> None:
    """Start the entry point as Harbor does, with a command that waits unless the task has another.

    It may start services. None stands for a separate verifier, whose image alone says what is started.
    """
    image = await _image(environment)
    entry_point = image.get("Entrypoint") if config is None or config.entrypoint is None else config.entrypoint
    command = None if config is None else config.command
    if entry_point or command:
        argv = ["/bin/sh", "-c", START_ENTRY_POINT, "sh", *(entry_point or []), *(command or WAIT)]
        await environment.exec(argv, user=image.get("User") or ROOT)


async def _image(environment: Environment) -> Mapping[str, str]:
    from agentkit_environments.docker import image_config  # the docker library takes long to import

    return await anyio.to_thread.run_sync(image_config, str(environment.spec.image))


async def _as_root(environment: Environment, command: str) -> None:
    """Run a command as root. Raises TaskSetupError if it fails."""
    result = await environment.exec(command, user=ROOT)
    if result.exit_code != 0:
        raise TaskSetupError(f"{command!r} exited {result.exit_code}: {tail(result)[-2000:]}")
