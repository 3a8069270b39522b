"""Training rows from the trajectories of runs: JSON Lines, each with its provenance.

A row has the ids, the loss mask and the log-probabilities of an engine session (empty for a model behind an API), the
messages in OpenAI's form, the reward, and the provenance. Rows without an accepted licence are refused, or left out and
counted.
"""

from __future__ import annotations

import os
import shutil
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from agentkit.atif import atif_bytes
from agentkit.messages import to_openai_all
from agentkit.task import Strict
from agentkit.trajectory import Trajectory
from agentkit_engine.untrusted import describe
from agentkit_evals.errors import ProvenanceError, not_written
from agentkit_evals.provenance import PERMISSIVE, Provenance, generator_name, is_accepted
from agentkit_evals.record import RunDirectory, TrialRecord, trajectory_path

Unlisted = Literal["refuse", "drop", "keep"]


class TrainingRow(Strict):
    """One trajectory."""

    trial: str
    task: str
    reward: float
    ids: list[int]
    loss_mask: list[int]
    logprobs: list[float | None]
    """One per id; None if the id was not sampled or its log-probability was not reported."""
    tools: list[dict[str, Any]]
    messages: list[dict[str, Any]]
    provenance: Provenance


@dataclass(frozen=True, slots=True)
class Exported:
    """Numbers of an export.

    Attributes:
        rows: Rows that were written.
        below_reward: Trials left out because of their reward.
        unlisted: Trials left out because of their licence, by licence; None is an unknown one.
        not_scored: Trials without a reward.
        no_trajectory: Scored trials whose trajectory is missing.
    """

    rows: int
    below_reward: int
    unlisted: dict[str | None, int]
    not_scored: int
    no_trajectory: int


def training_rows(run: RunDirectory) -> Iterator[TrainingRow]:
    """Yield a row for each scored trial that has a trajectory.

    Raises:
        ProvenanceError: the provenance in a trajectory is malformed.
        TrajectoryError: a trajectory cannot be read.
    """
    for trial in run.trials:
        if trial.reward is not None and (trajectory := run.trajectory(trial)):
            yield TrainingRow(
                trial=trial.trial,
                task=trial.task,
                reward=trial.reward,
                ids=trajectory.token_ids,
                loss_mask=trajectory.loss_mask,
                logprobs=trajectory.logprobs,
                tools=list(trajectory.header.tools),
                messages=to_openai_all(trajectory.messages),
                provenance=provenance_of_trajectory(trial, trajectory),
            )


def provenance_of_trajectory(trial: TrialRecord, trajectory: Trajectory) -> Provenance:
    """Return the provenance of the task, with the model and the sampling parameters that wrote the trajectory.

    A task without provenance gives one without a licence.

    Raises:
        ProvenanceError: the provenance of the task is malformed.
    """
    header = trajectory.header
    found = header.metadata.get("provenance", {"generator": generator_name("unknown")})
    sampling = {name: value for name, value in asdict(header.sampling).items() if value not in (None, (), {}, [])}
    try:
        return Provenance.model_validate({**found, "model": header.model, "sampling": sampling})
    except (TypeError, ValidationError) as exc:
        problem = describe(exc) if isinstance(exc, ValidationError) else str(exc)
        raise ProvenanceError(f"{trial.trial}: metadata.provenance: {problem}") from exc


def export_rows(
    runs: Sequence[RunDirectory],
    out: Path,
    *,
    licences: Iterable[str] = PERMISSIVE,
    unlisted: Unlisted = "refuse",
    min_reward: float = 1.0,
    fields: Collection[str] | None = None,
) -> Exported:
    """Write the rows of runs to a new file. Without a row, no file is written.

    Args:
        runs: The runs.
        out: The file to write. It appears when it is complete.
        licences: Accepted SPDX identifiers.
        unlisted: `refuse` writes nothing if a row has no accepted licence; `drop` leaves such rows out; `keep` writes
            them.
        min_reward: Lowest reward of a row.
        fields: Fields of `TrainingRow` to write; None writes all.

    Raises:
        ProvenanceError: a row has no accepted licence and `unlisted` is `refuse`, or its provenance is malformed.
        OutputError: the file cannot be written.
    """
    accepted = frozenset(licences)
    written = below = 0
    trials = [trial for run in runs for trial in run.trials]
    missing = scored = sum(trial.reward is not None for trial in trials)
    refused: Counter[str | None] = Counter()
    example: dict[str | None, str] = {}
    partial = out.with_name(out.name + ".partial")
    try:
        with partial.open("w", encoding="utf-8") as file:
            for run in runs:
                for row in training_rows(run):
                    missing -= 1
                    licence = row.provenance.licence
                    if row.reward < min_reward:
                        below += 1
                    elif unlisted != "keep" and not is_accepted(licence, accepted):
                        refused[licence] += 1
                        example.setdefault(licence, row.trial)
                    else:
                        file.write(row.model_dump_json(include=None if fields is None else {*fields}) + "\n")
                        written += 1
            if refused and unlisted == "refuse":
                parts = [f"{count} with {name or 'none'} (such as {example[name]})" for name, count in refused.items()]
                raise ProvenanceError(
                    f"{refused.total()} rows have no accepted licence: {', '.join(parts)}; accepted are "
                    f"{', '.join(sorted(accepted))}. Accept other licences with --licences, leave such rows out with "
                    "--unlisted drop, or write them too with --unlisted keep, for example if the tasks are your own"
                )
            file.flush()
            os.fsync(file.fileno())
        if written:
            partial.replace(out)
    except OSError as exc:
        raise not_written(exc, out) from exc
    finally:
        partial.unlink(missing_ok=True)
    return Exported(written, below, dict(refused), len(trials) - scored, missing)


def export_atif(sources: Sequence[RunDirectory | Path], out: Path) -> int:
    """Write trajectories as ATIF 1.8, one file each, to a new folder. Without a trajectory, there is no folder.

    Args:
        sources: Runs, of which the trajectories of all finished trials are written, and trajectory files.
        out: The folder. It appears when it is complete. A file is `NAME.json`, with the name of the trajectory's file;
            with several sources, `NAME` begins with the source's number.

    Returns:
        The number of files.

    Raises:
        TrajectoryError: a trajectory cannot be read, or has no message.
        OutputError: a file cannot be written.
    """
    partial = out.with_name(out.name + ".partial")
    count = 0
    try:
        partial.mkdir()
        for number, source in enumerate(sources, start=1):
            files = [source] if isinstance(source, Path) else _trajectories(source)
            for file in files:
                name = f"{file.stem}.json" if len(sources) == 1 else f"{number}-{file.stem}.json"
                (partial / name).write_bytes(atif_bytes(Trajectory.load(file)))
                count += 1
        if count:
            partial.replace(out)
    except OSError as exc:
        raise not_written(exc, out) from exc
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return count


def _trajectories(run: RunDirectory) -> list[Path]:
    files = (trajectory_path(run.path, trial.trial) for trial in run.trials)
    return [file for file in files if file.exists()]
