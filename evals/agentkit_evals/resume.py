"""Resume an interrupted run: keep what it has finished, go on with what it has begun, and refuse other settings.

An interrupted trial of a task with `environment.snapshots` goes on after its last complete turn, in a new sandbox with
its files. Without snapshots, it goes on before its first turn that may have changed the old sandbox. If that is its
first turn, the trial starts again as a new attempt, and so does a trial that the machine kept from being scored.

A trial whose agent had ended, but that was not scored, is scored from its record and its files if those were saved, and
else starts again.
"""

from __future__ import annotations

from collections.abc import Container
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from agentkit.errors import TrajectoryError
from agentkit.events import Outcome, TurnStarted
from agentkit.harbor import HarborConfig
from agentkit.interrupted import BROKEN_OFF, has_changes_of_all, interrupted_run
from agentkit.saved import record_of, remove_snapshots, saved_snapshot
from agentkit.task import CallsConfig, Task
from agentkit.trajectory import Trajectory
from agentkit_environments import Snapshot, SnapshotError, reap
from agentkit_evals.errors import RunDirectoryError
from agentkit_evals.record import (
    RunDirectory,
    RunLock,
    attempt_path,
    lock_bytes,
    patch_path,
    trajectory_path,
    write_lock,
)
from agentkit_evals.suite import Case, Suite

FIXED = ("name", "model", "fingerprint", "backend", "epochs", "seed", "sampling")
"""The fields of a lock that a resumed run must have in common with it, besides the tasks."""
NOT_SCORED = "the machine kept it from being scored"


def suite_of(lock: RunLock) -> Suite:
    """Return the suite of a run, as it was when the run began. Its cases have no signatures and oracles."""
    held_out = set(lock.held_out_phrasings)
    return Suite(
        lock.name,
        tuple(
            Case(task, lock.families.get(task.id, ""), lock.phrasings.get(task.id, ""), task.id in held_out)
            for task in lock.tasks
        ),
    )


def check_same(run: Path, was: RunLock, now: RunLock) -> None:
    """Compare the settings of a run with those that it is to be resumed with.

    Raises:
        RunDirectoryError: one of them differs; the message names it, with both values.
    """
    for name in FIXED:
        old, new = getattr(was, name), getattr(now, name)
        if old != new:
            if name == "sampling":
                name, old, new = next(
                    (field, before, getattr(new, field))
                    for field, before in ((field, getattr(old, field)) for field in old.__dataclass_fields__)
                    if before != getattr(new, field)
                )
            if name == "fingerprint":
                raise RunDirectoryError(
                    f"{run} was started with other weights of the model {was.model}, or with other options that change "
                    "its results; start a new run"
                )
            raise RunDirectoryError(
                f"{run} was started with {name} {old!r}, given {new!r}; a resumed run keeps its settings. Leave the "
                "setting out, or start a new run"
            )
    before, after = ({task.id: task for task in lock.tasks} for lock in (was, now))
    changed = [name for name in before.keys() | after.keys() if before.get(name) != after.get(name)]
    if changed or list(before) != list(after):
        named = f"task {min(changed)} differs" if changed else "the order of the tasks differs"
        raise RunDirectoryError(
            f"{run} was started with other tasks: {named}. Leave out the suite to resume with the tasks of the run, or "
            "start a new run"
        )


@dataclass(frozen=True, slots=True)
class Begun:
    """A trial that has begun: its `record` goes on, or it starts again as a new `attempt`.

    Attributes:
        attempt: Number of the attempt.
        record: The record that goes on.
        kept_turns: Number of its turns that are not done again.
        snapshot: The files that the sandbox begins with, if they were saved.
        world_turns: Number of turns whose effects these files have.
        has_ended: True if the agent's run has ended, and only the score is missing.
        why_again: The reason why the trial starts again.
    """

    attempt: int
    record: Trajectory | None = None
    kept_turns: int = 0
    snapshot: Snapshot | None = None
    world_turns: int = 0
    has_ended: bool = False
    why_again: str = ""


def prepare(run: RunDirectory, lock: RunLock) -> dict[str, Begun]:
    """Prepare a run for being resumed with the settings of `lock`; its `TrialLog` is open.

    The trajectories and patches of trials that start again move to `attempts/`, and snapshots of finished trials are
    removed.

    Returns:
        The trials that have begun and are not finished, by name.

    Raises:
        RunDirectoryError: see `check_same`.
        OSError: a file cannot be moved or written.
    """
    check_same(run.path, run.lock, lock)
    tasks = {f"{task.id}.{epoch}": task for task in lock.tasks for epoch in range(lock.epochs)}
    again = {trial.trial: (trial.attempt, NOT_SCORED) for trial in run.trials if trial.is_retried}
    begun: dict[str, Begun] = {}
    for name, file in run.unfinished.items():
        kept = [int(each.stem) for each in (run.path / "attempts" / name).glob("*.jsonl") if each.stem.isdecimal()]
        attempt = max(kept, default=0) + 1
        found = goes_on(tasks[name], file, attempt) if name in tasks else "it is no trial of the run"
        if isinstance(found, Begun):
            begun[name] = found
        else:
            again[name] = attempt, found
    for name, (attempt, why) in again.items():
        target = attempt_path(run.path, name, attempt)
        for source, kept_as in (
            (patch_path(run.path, name), target.with_suffix(".diff")),
            (trajectory_path(run.path, name), target),
        ):
            if source.exists():
                target.parent.mkdir(parents=True, exist_ok=True)
                source.rename(kept_as)
        remove_snapshots(trajectory_path(run.path, name))
        begun[name] = Begun(attempt + 1, why_again=why)
    _remove_snapshots_but(run, begun)
    changes = {
        "concurrency": lock.concurrency,
        "warm": lock.warm,
        "max_cost_usd": lock.max_cost_usd,
        "model_options": lock.model_options,
        "run_id": lock.run_id,
        "resumed": [*run.lock.resumed, datetime.now(UTC).isoformat(timespec="seconds")],
    }
    write_lock(run.path, lock_bytes(run.lock.model_copy(update=changes)))
    return begun


async def remove_leftovers(run: RunDirectory) -> None:
    """Remove the sandboxes and snapshots that a killed process has left of a run without trials to run.

    Files that cannot be removed stay.
    """
    if run.lock.run_id is not None:
        await reap(run.lock.run_id)
    with suppress(OSError):
        _remove_snapshots_but(run, ())


def _remove_snapshots_but(run: RunDirectory, trials: Container[str]) -> None:
    """Remove the snapshots of all trials but these."""
    for file in {record_of(each) for each in (run.path / "trajectories").glob("*.snapshot*")}:
        if file.stem not in trials:
            remove_snapshots(file)


def goes_on(task: Task, file: Path, attempt: int) -> Begun | str:
    """Return how an interrupted attempt goes on, or the reason why none of its turns can be kept."""
    if isinstance(task.verifier, HarborConfig) and (state := task.verifier.beside_the_sandbox) is not None:
        return f"{state} are gone"
    tools = {tool.name: tool for tool in task.build_tools()}
    try:
        record = Trajectory.load(file)
        last = record.records[-1] if record.records else None
        # a run that the budget stopped is not scored
        has_ended = isinstance(last, Outcome) and last.status not in BROKEN_OFF and last.limit != "max_cost_usd"
        if isinstance(task.verifier, CallsConfig):
            return Begun(attempt, record, 1, has_ended=True) if has_ended else "its only turn was interrupted"
        if [*record.header.tools] != [tool.spec for tool in tools.values()]:  # of another version of agentkit
            return "its tools have other definitions now"
        snapshot, world_turns = None, 0
        if (saved := saved_snapshot(record)) is not None:
            snapshot, world_turns = Snapshot.load(saved.path), saved.turns
        turns = sum(isinstance(each, TurnStarted) for each in record.records)
        if has_ended:
            if snapshot is None or not has_changes_of_all(record, tools, world_turns):
                return "its agent had ended, but the files that are scored were not saved; --snapshots saves them"
            return Begun(attempt, record, turns, snapshot, world_turns, has_ended=True)
        length = interrupted_run(record, tools, world_turns=world_turns).length
    except (TrajectoryError, SnapshotError) as exc:
        return str(exc)
    kept = sum(isinstance(each, TurnStarted) for each in record.records[:length])
    if not kept:
        return "its first turn is done again"
    return Begun(attempt, record, kept, snapshot, world_turns)
