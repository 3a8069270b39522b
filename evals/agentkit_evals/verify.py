"""Scoring: the verifier looks at the world the agent left, in a clean place, never at the model's words.

The agent's workdir is taken out of its sandbox once every process of the agent is dead, and put into a fresh sandbox
of the same specification; nothing else crosses. There the verifier's command runs with its own files, which the agent
never saw, and with the answer that was submitted.

The agent's files are hostile to it. Nothing of the workdir is run or read unless the command asks for it: HOME is an
empty directory outside the workdir, and Python looks for modules neither in HOME nor in the working directory. Files
may only refine a yes: an exit status other than 0 is reward 0, whatever has been written.
"""

from __future__ import annotations

import json
import math
import secrets
from dataclasses import dataclass
from typing import Literal

from agentkit.task import Task, VerifierConfig
from agentkit_environments import Environment, ExecResult, open_environment
from agentkit_evals.errors import VerifierError

Backend = Literal["auto", "docker", "process", "unsafe-local"]
RewardSource = Literal["exit", "reward.txt", "reward.json"]

MAX_ENV_ANSWER_BYTES = 65_536
"""An answer beyond this stands only in AGENTKIT_ANSWER_FILE: Linux bounds one variable at 128 KiB."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the verifier said. A verifier that ran out of time gives 0: what it ran was the agent's work."""

    reward: float
    source: RewardSource
    exit_code: int
    output: str  # the end of what it printed
    timed_out: bool
    duration_s: float


def backend_for(task: Task, override: Backend | None = None) -> Backend:
    """Where a task runs: what the caller says, else what the task says, else what this machine can do."""
    return override or task.environment.backend


async def verify(
    task: Task, *, archive: bytes, answer: str | None, backend: Backend = "auto", run_id: str | None = None
) -> Verdict:
    """Score a workdir (`archive`, from `Environment.export_dir`) and an answer (None: none was given).

    Raises:
        VerifierError: the task has no verifier, its command was not found or not executable (exit status 127 or 126),
            or it left a reward that is no number.
        SandboxError: the sandbox failed.
    """
    if task.verifier is None:
        raise VerifierError(f"task {task.id} has no verifier; add `verifier: {{command: ...}}` to score it")
    async with await open_environment(task.environment.spec(), backend=backend, run_id=run_id) as environment:
        await environment.import_dir(environment.spec.workdir, archive)
        # A model can write any JSON string, also one with half a surrogate pair, which no file can hold.
        text = (answer or "").encode("utf-8", "replace").decode()
        return await _run_verifier(task.id, task.verifier, environment, text)


async def _run_verifier(task_id: str, verifier: VerifierConfig, environment: Environment, answer: str) -> Verdict:
    place = f"/tmp/agentkit-{secrets.token_hex(8)}"  # empty in a fresh sandbox, of a name that nobody knew
    await environment.write_file(f"{place}/answer.txt", answer)
    for path, text in verifier.files.items():
        await environment.write_file(f"{place}/files/{path}", text)
    await environment.exec(["mkdir", "-p", f"{place}/files", f"{place}/reward", f"{place}/home"])
    fits = len(answer.encode()) <= MAX_ENV_ANSWER_BYTES and "\0" not in answer
    result = await environment.exec(
        verifier.command,
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
    output = _tail(result)
    if result.exit_code in (126, 127) and not result.timed_out:
        raise VerifierError(
            f"task {task_id}: the verifier {verifier.command!r} could not start (exit status {result.exit_code}): "
            f"{output or 'no output'}. Its command must exist in the task's environment and be executable"
        )
    said_yes = result.exit_code == 0 and not result.timed_out
    reward, source = await _reward(task_id, environment, f"{place}/reward") if said_yes else (0.0, "exit")
    return Verdict(reward, source, result.exit_code, output, result.timed_out, result.duration_s)


async def _reward(task_id: str, environment: Environment, directory: str) -> tuple[float, RewardSource]:
    """The reward of a verifier that exited with 0; where it has left both files, the lower one counts."""
    found: list[tuple[float, RewardSource]] = []
    names: tuple[Literal["reward.txt", "reward.json"], ...] = ("reward.txt", "reward.json")
    for name in names:
        try:
            text = (await environment.read_file(f"{directory}/{name}", max_bytes=65_536)).decode(errors="replace")
        except FileNotFoundError:
            continue
        try:
            reward = float(text) if name == "reward.txt" else float(json.loads(text)["reward"])
        except (ValueError, TypeError, KeyError) as exc:
            raise VerifierError(f"task {task_id}: {name} must hold a number, got {text[:200]!r}") from exc
        if not math.isfinite(reward):
            raise VerifierError(f"task {task_id}: {name} must hold a finite number, got {text[:200]!r}")
        found.append((reward, name))
    return min(found, default=(1.0, "exit"))


def _tail(result: ExecResult, limit: int = 8_000) -> str:
    return "\n".join(part for part in (result.stdout.rstrip(), result.stderr.rstrip()) if part)[-limit:]
