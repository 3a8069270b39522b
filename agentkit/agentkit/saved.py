"""The snapshot beside the record of a run: the files of its environment, with which a resumed run begins.

The file of the record `run.jsonl` is `run.jsonl.ID-N.snapshot`: the files as they were when the record had `N` records.
`ID` is a hash of the record's id, so that a new record of the same name is not resumed with the files of an old one. It
is written whole before the file of an earlier turn is removed, so a killed run leaves at least one.
"""

from __future__ import annotations

import hashlib
import os
import re
from dataclasses import dataclass
from pathlib import Path

from agentkit.errors import TrajectoryWriteError
from agentkit.events import TurnStarted
from agentkit.trajectory import Trajectory
from agentkit_environments import Snapshot


@dataclass(frozen=True, slots=True)
class SavedSnapshot:
    """The file of a snapshot.

    Attributes:
        path: The file.
        turns: Number of turns of the session whose effects the snapshot has.
    """

    path: Path
    turns: int


def save_snapshot(snapshot: Snapshot, trajectory: Trajectory) -> None:
    """Write a snapshot beside the file of a record, and remove the ones that are there. Blocks.

    Raises:
        TrajectoryWriteError: a file cannot be written.
    """
    assert trajectory.path is not None, "the record is only in memory"
    try:
        trajectory.sync()  # the snapshot must not be on the disk without the records that it goes with
        path = trajectory.path.with_name(f"{_prefix(trajectory)}{len(trajectory.records)}.snapshot")
        snapshot.save(path)
        remove_snapshots(trajectory.path, but=path)
    except OSError as exc:
        raise TrajectoryWriteError(
            f"Cannot write a snapshot beside trajectory {trajectory.path}: {exc.strerror}. Free space on that disk, or "
            "run without snapshots."
        ) from exc


def saved_snapshot(trajectory: Trajectory) -> SavedSnapshot | None:
    """Return the newest snapshot that goes with a record, if there is one."""
    if trajectory.path is None:
        return None
    prefix = _prefix(trajectory)
    names = [path.name.removeprefix(prefix).removesuffix(".snapshot") for path in _files(trajectory.path)]
    counts = [int(name) for name in names if name.isdecimal() and int(name) <= len(trajectory.records)]
    if not counts:
        return None
    count = max(counts)
    turns = [each.turn for each in trajectory.records[:count] if isinstance(each, TurnStarted)]
    return SavedSnapshot(trajectory.path.with_name(f"{prefix}{count}.snapshot"), turns[-1] + 1 if turns else 0)


def remove_snapshots(path: Path, *, but: Path | None = None) -> None:
    """Remove the snapshots beside the record `path`, including parts of them that a killed process left.

    Raises:
        OSError: a file cannot be removed.
    """
    for file in _files(path):
        if file != but:
            file.unlink(missing_ok=True)


def record_of(file: Path) -> Path:
    """Return the record that a snapshot, or a part of one, is beside."""
    return file.with_name(file.name.removeprefix(".").rpartition(".jsonl.")[0] + ".jsonl")


def _prefix(trajectory: Trajectory) -> str:
    assert trajectory.path is not None
    identity = hashlib.sha256(trajectory.header.id.encode("utf-8", "replace")).hexdigest()[:8]
    return f"{trajectory.path.name}.{identity}-"


def _files(path: Path) -> list[Path]:
    """Return the snapshots beside the record `path`, whole ones and parts (see `Snapshot.save`)."""
    own = re.compile(rf"\.?{re.escape(path.name)}\.[0-9a-f]{{8}}-[0-9]{{1,9}}\.snapshot(\.[0-9a-f]{{8}})?")
    return [path.with_name(name) for name in os.listdir(path.parent) if own.fullmatch(name)]
