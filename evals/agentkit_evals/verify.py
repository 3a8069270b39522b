"""Scoring: the verifier looks at the world the agent left, in a clean place, never at the model's words.

The agent's workdir is taken out of its sandbox once every process of the agent is dead, and put into a fresh sandbox
of the same specification; nothing else crosses. There the verifier's command runs with its own files, which the agent
never saw, and with the answer that was submitted.

The agent's files are hostile to it. Nothing of the workdir is run or read unless the command asks for it: HOME is an
empty directory outside the workdir, and Python looks for modules neither in HOME nor in the working directory. Files
may only refine a yes: an exit status other than 0 is reward 0, whatever has been written. They are read when every
process in the sandbox is dead, so that none which the agent's code left behind can rewrite them.

Whatever the agent's files do to the verifier or to its sandbox is a verdict of 0 that says so (`Verdict.error`), and
never an exception; `blame.py` has the rule.
"""

from __future__ import annotations

import json
import math
import secrets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, replace
from typing import Literal

from agentkit.task import Task, VerifierConfig
from agentkit_environments import (
    Environment,
    ExecResult,
    SandboxUnavailableError,
    open_environment,
)
from agentkit_evals.blame import blame, describe
from agentkit_evals.errors import VerifierError

Backend = Literal["auto", "docker", "process", "unsafe-local"]
RewardSource = Literal["exit", "reward.txt", "reward.json"]

MAX_ENV_ANSWER_BYTES = 65_536
"""An answer beyond this stands only in AGENTKIT_ANSWER_FILE: Linux bounds one variable at 128 KiB."""


MAX_REWARD = 1e6
"""Largest reward, either way; sums and squares of what is larger overflow."""


KILL_REST = '/bin/sh -c "$0"; status=$?; kill -KILL -1 2>/dev/null; exit "$status"'
"""Runs a command, and kills what it has left running the moment it ends: `kill_all` comes a round trip later, which is
time enough for a process of the agent's to rewrite the reward."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the verifier said. A verifier that ran out of time gives 0: what it ran was the agent's work."""

    reward: float
    source: RewardSource
    exit_code: int | None  # None: the command did not run to its end
    output: str  # the end of what it printed
    timed_out: bool
    duration_s: float
    error: str | None = None  # why the reward is 0 although the verifier said nothing that counts

    @property
    def started(self) -> bool:
        """Whether the verifier's command ran: exit statuses 126 and 127 are a shell's for one that did not."""
        return self.timed_out or self.exit_code not in (None, 126, 127)


def broken(error: str) -> Verdict:
    """The verdict on an agent whose work cannot be scored, through no fault of the machine's."""
    return Verdict(0.0, "exit", None, "", False, 0.0, error)


def backend_for(task: Task, override: Backend | None = None) -> Backend:
    """Where a task runs: what the caller says, else what the task says, else what this machine can do."""
    return override or task.environment.backend


@asynccontextmanager
async def opened(task: Task, backend: Backend, run_id: str | None = None) -> AsyncIterator[Environment]:
    """Open a sandbox of the task's specification, and close it.

    An error in closing it is not raised: what the block has found out stands, and `reap` removes what is left.

    Raises:
        SandboxUnavailableError: no sandbox can be opened.
    """
    try:
        environment = await open_environment(task.environment.spec(), backend=backend, run_id=run_id)
    except OSError as exc:
        raise SandboxUnavailableError(f"no sandbox could be opened: {exc}") from exc
    try:
        yield environment
    finally:
        with suppress(Exception):
            await environment.close()


async def verify(
    task: Task, *, archive: bytes, answer: str | None, backend: Backend = "auto", run_id: str | None = None
) -> Verdict:
    """Score a workdir (`archive`, from `Environment.export_dir`) and an answer (None: none was given).

    Raises:
        VerifierError: the task has no verifier.
        SandboxUnavailableError, HostFailureError: no sandbox could be opened, or the host failed.
    """
    if task.verifier is None:
        raise VerifierError(f"task {task.id} has no verifier; add `verifier: {{command: ...}}` to score it")
    # A model can write any JSON string, also one with half a surrogate pair, which no file can hold.
    text = (answer or "").encode("utf-8", "replace").decode()
    async with opened(task, backend, run_id) as environment:
        try:
            await environment.import_dir(environment.spec.workdir, archive)
            return await _run_verifier(task.verifier, environment, text)
        except Exception as exc:
            if blame(exc, "scoring") == "infrastructure":
                raise
            return broken(f"the verifier could not do its work: {describe(exc)}")


async def _run_verifier(verifier: VerifierConfig, environment: Environment, answer: str) -> Verdict:
    place = f"/tmp/agentkit-{secrets.token_hex(8)}"  # empty in a fresh sandbox, of a name that nobody knew
    await environment.write_file(f"{place}/answer.txt", answer)
    for path, text in verifier.files.items():
        await environment.write_file(f"{place}/files/{path}", text)
    await environment.exec(["mkdir", "-p", f"{place}/files", f"{place}/reward", f"{place}/home"])
    fits = len(answer.encode()) <= MAX_ENV_ANSWER_BYTES and "\0" not in answer
    alone = environment.backend != "unsafe-local"  # elsewhere -1 is every process of this machine's user
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
    verdict = Verdict(0.0, "exit", result.exit_code, _tail(result), result.timed_out, result.duration_s)
    if not verdict.started:
        return replace(
            verdict,
            error=f"the verifier {verifier.command!r} could not start, or what it ran could not "
            f"(exit status {result.exit_code})",
        )
    if result.timed_out:
        return replace(verdict, error=f"the verifier ran out of time after {verifier.timeout_s:g} s")
    if result.exit_code != 0:
        return verdict
    try:
        await environment.kill_all()
        reward, source = await _reward(environment, f"{place}/reward")
    except Exception as exc:
        if blame(exc, "scoring") == "infrastructure":
            raise
        return replace(verdict, error=f"the verifier's reward cannot be used: {describe(exc)}")
    return replace(verdict, reward=reward, source=source)


async def _reward(environment: Environment, directory: str) -> tuple[float, RewardSource]:
    """Return the reward of a verifier that exited with 0; where it has left both files, the lower one counts.

    Raises:
        ValueError: one of them holds no finite number.
        SandboxError, OSError: one of them cannot be read.
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
            raise ValueError(f"{name} must hold a number of at most {MAX_REWARD:g}, got {text[:200]!r}")
        found.append((reward, name))
    return min(found, default=(1.0, "exit"))


def _tail(result: ExecResult, limit: int = 8_000) -> str:
    return "\n".join(part for part in (result.stdout.rstrip(), result.stderr.rstrip()) if part)[-limit:]
