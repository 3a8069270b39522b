"""Scoring: run a task's verifier on the agent's workdir, in a fresh sandbox.

When every process of the agent is dead, the workdir is exported and imported into a fresh sandbox of the same
specification; nothing else crosses. The verifier's command runs there with its own files, which the agent never saw,
and with the submitted answer.

The agent's files are treated as hostile. Nothing in the workdir is run or read unless the command asks for it: HOME is
an empty directory elsewhere, and Python imports neither from HOME nor from the working directory. An exit status other
than 0 is reward 0; reward files matter only after exit status 0, and are read when every process in the sandbox is
dead, so that a process of the agent's code cannot rewrite them.

Anything that the agent's files do to the verifier or its sandbox gives a verdict of 0 with the reason in
`Verdict.error`, and never an exception. `blame.py` has the rule.
"""

from __future__ import annotations

import json
import math
import secrets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from typing import Literal

from agentkit.task import CallsConfig, HarborConfig, Task, TestsConfig, VerifierConfig
from agentkit.trajectory import Trajectory
from agentkit_environments import (
    Environment,
    EnvironmentPool,
    ExportedDir,
    SandboxUnavailableError,
    Snapshot,
    SnapshotError,
    open_environment,
)
from agentkit_evals.blame import blame, describe, well_formed
from agentkit_evals.calls import calls_made, mismatch
from agentkit_evals.errors import VerifierError
from agentkit_evals.harbor.episode import prepare
from agentkit_evals.harbor.sandbox import settled
from agentkit_evals.harbor.services import mounted, services_beside, volumes_for
from agentkit_evals.patches import patch_since, snapshot
from agentkit_evals.repository import MAX_NAMED, apply_and_test, not_passing, parse_log
from agentkit_evals.verdict import MAX_REWARD, RewardSource, tail
from agentkit_evals.verdict import Verdict as Verdict
from agentkit_evals.verdict import broken as broken

Backend = Literal["auto", "docker", "process", "unsafe-local"]
MAX_ENV_ANSWER_BYTES = 65_536
"""Maximum bytes of AGENTKIT_ANSWER, as Linux limits a variable to 128 KiB. AGENTKIT_ANSWER_FILE has no limit."""


KILL_REST = '/bin/sh -c "$0"; status=$?; kill -KILL -1 2>/dev/null; exit "$status"'
"""Runs a command and then kills every other process of the sandbox. `kill_all` comes a round trip later, which gives a
process of the agent's code enough time to rewrite the reward."""


def backend_for(task: Task, override: Backend | None = None) -> Backend:
    """Return the backend that the caller chose, else the task's own.

    A task that is scored by calls runs no command, so it needs an empty folder but no sandbox.
    """
    if isinstance(task.verifier, CallsConfig):
        return "unsafe-local"
    return override or task.environment.backend


def answer_of(task: Task, trajectory: Trajectory) -> str | None:
    """Return the answer of a finished run for the verifier of `task`: the calls if it scores calls, else the text."""
    assert trajectory.outcome is not None
    return calls_made(trajectory) if isinstance(task.verifier, CallsConfig) else trajectory.outcome.answer


async def begin(task: Task, environment: Environment) -> str:
    """Return the state of a prepared sandbox before the agent starts in it; `collect` needs it.

    Raises:
        TaskSetupError: the task is scored by tests, and its workdir is not a git repository; or the first step of a
            Harbor task could not be set up.
    """
    if isinstance(task.verifier, HarborConfig):
        await prepare(task, task.verifier, environment)
        return ""
    return await snapshot(environment) if isinstance(task.verifier, TestsConfig) else ""


async def collect(task: Task, environment: Environment, start: str) -> ExportedDir:
    """Return the agent's work once all its processes are dead: the workdir, or a patch if tests score the task.

    Raises:
        UnsafeArchiveError, FileTooLargeError: the work is too large.
        ValueError: the repository was damaged.
    """
    if isinstance(task.verifier, CallsConfig):
        return ExportedDir(b"")
    if isinstance(task.verifier, TestsConfig):
        return ExportedDir(await patch_since(environment, start))
    return await environment.export_dir(environment.spec.workdir)


@asynccontextmanager
async def opened(
    task: Task,
    backend: Backend,
    run_id: str | None = None,
    snapshot: Snapshot | None = None,
    *,
    pool: EnvironmentPool | None = None,
) -> AsyncIterator[Environment]:
    """Open a sandbox of the task's specification, with the services of a Harbor task, and close it at the end.

    With a snapshot, the sandbox has its files. With a pool, it is one that the pool has opened ahead, if any.

    Errors on closing are ignored, so that the block keeps its result; `reap` removes what is left.

    Raises:
        SandboxUnavailableError: no sandbox can be opened, its image cannot be built, or the snapshot is of another
            image or does not fit.
        TaskSetupError: a variable that the task takes from this machine is not set.
        ServiceError: a service of the task did not start.
    """
    harbor = task.verifier if isinstance(task.verifier, HarborConfig) else None
    run_id = run_id or secrets.token_hex(6)
    async with volumes_for(harbor, run_id) as volumes:
        try:
            spec = await settled(task.environment)
            if harbor and harbor.volumes:
                spec = replace(spec, volumes=mounted(harbor.volumes, volumes))
            if pool is not None:
                environment = await pool.open(spec, backend=backend, snapshot=snapshot)
            else:
                environment = await open_environment(spec, backend=backend, run_id=run_id, snapshot=snapshot)
        except OSError as exc:
            raise SandboxUnavailableError(f"no sandbox could be opened: {exc}") from exc
        except SnapshotError as exc:
            raise SandboxUnavailableError(f"no sandbox with the saved files could be opened: {exc}") from exc
        try:
            async with services_beside(harbor, environment, volumes):
                yield environment
        finally:
            with suppress(Exception):
                await environment.close()


async def verify(
    task: Task,
    *,
    archive: bytes,
    answer: str | None,
    backend: Backend = "auto",
    run_id: str | None = None,
    pool: EnvironmentPool | None = None,
) -> Verdict:
    """Score an agent's work and its answer.

    Args:
        task: The task, with a verifier.
        archive: The agent's work, from `collect`.
        answer: The agent's answer, from `answer_of`, or None if there is none.
        backend: Sandbox backend.
        run_id: Label of the sandbox.
        pool: Pool that the sandbox is taken from.

    Raises:
        VerifierError: the task has no verifier, or is scored in the agent's own sandbox (`harbor.episode`).
        SandboxUnavailableError: no sandbox could be opened.
        HostFailureError: the host failed.
    """
    if task.verifier is None:
        raise VerifierError(f"task {task.id} has no verifier; add `verifier: {{command: ...}}` to score it")
    if isinstance(task.verifier, CallsConfig):
        reason = mismatch(task, answer)
        return Verdict(float(reason is None), "calls", 0, reason or "", False, 0.0)
    if isinstance(task.verifier, HarborConfig):
        raise VerifierError(f"task {task.id} is scored in the agent's own sandbox, by agentkit_evals.harbor.episode")
    text = well_formed(answer or "")
    async with opened(task, backend, run_id, pool=pool) as environment:
        try:
            if isinstance(task.verifier, TestsConfig):
                verdict = await _run_tests(task, task.verifier, environment, archive)
            else:
                await environment.enter_phase("verifier")
                await environment.import_dir(environment.spec.workdir, archive)
                verdict = await _run_verifier(task.verifier, environment, text)
        except Exception as exc:
            if blame(exc, "scoring") == "infrastructure":
                raise
            verdict = broken(f"scoring failed: {describe(exc)}")
        return replace(verdict, refused=tuple(environment.refusals()))


async def _run_tests(task: Task, tests: TestsConfig, environment: Environment, patch: bytes) -> Verdict:
    result = await apply_and_test(task, tests, environment, patch)
    if isinstance(result, str):
        return broken(result)
    found = {} if result.timed_out else parse_log(result.stdout)
    failed = not_passing(tests, found)
    total = len(tests.fail_to_pass) + len(tests.pass_to_pass)
    lines = [f"{total - len(failed)} of {total} tests pass", *failed[:MAX_NAMED]]
    verdict = Verdict(
        float(not failed and not result.timed_out),
        "tests",
        result.exit_code,
        "\n".join([tail(result), *lines]),
        result.timed_out,
        result.duration_s,
        tests=len(found),
    )
    if result.timed_out:
        return replace(verdict, error=f"the tests timed out after {tests.timeout_s:g} s")
    if not found:
        return replace(verdict, error="the output of the tests has no result of `pytest -rA` or `unittest -v`")
    return verdict


async def _run_verifier(verifier: VerifierConfig, environment: Environment, answer: str) -> Verdict:
    place = f"/tmp/agentkit-{secrets.token_hex(8)}"  # a name that the agent could not guess
    await environment.write_file(f"{place}/answer.txt", answer)
    for path, text in verifier.files.items():
        await environment.write_file(f"{place}/files/{path}", text)
    await environment.exec(["mkdir", "-p", f"{place}/files", f"{place}/reward", f"{place}/home"])
    fits = len(answer.encode()) <= MAX_ENV_ANSWER_BYTES and "\0" not in answer
    alone = environment.backend != "unsafe-local"  # without a sandbox, `kill -1` would kill every process of the user
    result = await environment.exec(
        ["/bin/sh", "-c", KILL_REST, verifier.command] if alone else verifier.command,
        env={
            "AGENTKIT_ANSWER": answer if fits else "",
            "AGENTKIT_ANSWER_FILE": f"{place}/answer.txt",
            "AGENTKIT_VERIFIER_DIR": f"{place}/files",
            "AGENTKIT_REWARD_DIR": f"{place}/reward",
            "HOME": f"{place}/home",
            "PYTHONNOUSERSITE": "1",
            "PYTHONSAFEPATH": "1",
        },
        timeout_s=verifier.timeout_s,
    )
    verdict = Verdict(0.0, "exit", result.exit_code, tail(result), result.timed_out, result.duration_s)
    if not verdict.started:
        return replace(
            verdict,
            error=f"the verifier {verifier.command!r} could not start, or a command that it runs could not "
            f"(exit status {result.exit_code})",
        )
    if result.timed_out:
        return replace(verdict, error=f"the verifier timed out after {verifier.timeout_s:g} s")
    if result.exit_code != 0:
        return verdict
    try:
        await environment.kill_all()
        reward, source = await _reward(environment, f"{place}/reward")
    except Exception as exc:
        if blame(exc, "scoring") == "infrastructure":
            raise
        return replace(verdict, error=f"the reward cannot be used: {describe(exc)}")
    return replace(verdict, reward=reward, source=source)


async def _reward(environment: Environment, directory: str) -> tuple[float, RewardSource]:
    """Return the reward of a verifier that exited with 0, and its source. With both files, the lower reward counts.

    Raises:
        ValueError: a file does not hold a finite number.
        SandboxError, OSError: a file cannot be read.
    """
    found: list[tuple[float, RewardSource]] = []
    names: tuple[Literal["reward.txt", "reward.json"], ...] = ("reward.txt", "reward.json")
    for name in names:
        try:
            text = (await environment.read_file(f"{directory}/{name}", max_bytes=65_536)).decode(errors="replace")
        except FileNotFoundError:
            continue
        try:
            reward = float(text) if name == "reward.txt" else float(json.loads(text)["reward"])
        except (ValueError, TypeError, LookupError, OverflowError, RecursionError) as exc:
            raise ValueError(f"{name} must hold a number, got {text[:200]!r}") from exc
        if not math.isfinite(reward) or abs(reward) > MAX_REWARD:
            raise ValueError(f"{name} must hold a number within ±{MAX_REWARD:g}, got {text[:200]!r}")
        found.append((reward, name))
    return min(found, default=(1.0, "exit"))
