"""Resume an interrupted run: keep what it has finished, set aside what it has begun, and refuse other settings."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

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


def prepare(run: RunDirectory, lock: RunLock) -> dict[str, int]:
    """Prepare a run for being resumed with the settings of `lock`; its `TrialLog` is open.

    The trajectories and patches of trials that run again move to `attempts/`.

    Returns:
        The number of the next attempt of each trial that has an earlier one.

    Raises:
        RunDirectoryError: see `check_same`.
        OSError: a file cannot be moved or written.
    """
    check_same(run.path, run.lock, lock)
    again = {trial.trial: trial.attempt for trial in run.trials if trial.is_retried}
    for name in run.unfinished:
        kept = [int(file.stem) for file in (run.path / "attempts" / name).glob("*.jsonl") if file.stem.isdecimal()]
        again[name] = max(kept, default=0) + 1
    for name, attempt in again.items():
        target = attempt_path(run.path, name, attempt)
        for source, kept_as in (
            (patch_path(run.path, name), target.with_suffix(".diff")),
            (trajectory_path(run.path, name), target),
        ):
            if source.exists():
                target.parent.mkdir(parents=True, exist_ok=True)
                source.rename(kept_as)
    changes = {
        "concurrency": lock.concurrency,
        "max_cost_usd": lock.max_cost_usd,
        "model_options": lock.model_options,
        "run_id": lock.run_id,
        "resumed": [*run.lock.resumed, datetime.now(UTC).isoformat(timespec="seconds")],
    }
    write_lock(run.path, lock_bytes(run.lock.model_copy(update=changes)))
    return {name: attempt + 1 for name, attempt in again.items()}
