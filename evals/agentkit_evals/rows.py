"""Training rows from the trajectories of runs: JSON Lines, each with its provenance.

A row has the ids and the loss mask of an engine session (empty for a model behind an API), the messages in OpenAI's
form, the reward, and the provenance. Rows without an accepted licence are refused, or left out and counted.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from agentkit.messages import to_openai_all
from agentkit.task import Strict
from agentkit.trajectory import Trajectory
from agentkit_engine.untrusted import describe
from agentkit_evals.errors import ProvenanceError, not_written
from agentkit_evals.provenance import PERMISSIVE, Provenance, generator_name, is_accepted
from agentkit_evals.record import RunDirectory, TrialRecord

Unlisted = Literal["refuse", "drop"]


class TrainingRow(Strict):
    """One trajectory."""

    trial: str
    task: str
    reward: float
    ids: list[int]
    loss_mask: list[int]
    tools: list[dict[str, Any]]
    messages: list[dict[str, Any]]
    provenance: Provenance


@dataclass(frozen=True, slots=True)
class Exported:
    """Numbers of an export. `unlisted` counts rows that were left out, by licence; None is an unknown one."""

    rows: int
    below_reward: int
    unlisted: dict[str | None, int]


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
) -> Exported:
    """Write the rows of runs to a new file.

    Args:
        runs: The runs.
        out: The file to write. It appears when it is complete.
        licences: Accepted SPDX identifiers.
        unlisted: `refuse` writes nothing if a row has no accepted licence; `drop` leaves such rows out.
        min_reward: Lowest reward of a row.

    Raises:
        ProvenanceError: a row has no accepted licence and `unlisted` is `refuse`, or its provenance is malformed.
        OutputError: the file cannot be written.
    """
    accepted = frozenset(licences)
    written = below = 0
    refused: Counter[str | None] = Counter()
    example: dict[str | None, str] = {}
    partial = out.with_name(out.name + ".partial")
    try:
        with partial.open("w", encoding="utf-8") as file:
            for run in runs:
                for row in training_rows(run):
                    licence = row.provenance.licence
                    if row.reward < min_reward:
                        below += 1
                    elif not is_accepted(licence, accepted):
                        refused[licence] += 1
                        example.setdefault(licence, row.trial)
                    else:
                        file.write(row.model_dump_json() + "\n")
                        written += 1
            if refused and unlisted == "refuse":
                parts = [f"{count} with {name or 'none'} (such as {example[name]})" for name, count in refused.items()]
                raise ProvenanceError(
                    f"{refused.total()} rows have no accepted licence: {', '.join(parts)}; accepted are "
                    f"{', '.join(sorted(accepted))}. Give --licences, or leave such rows out with --unlisted drop"
                )
            file.flush()
            os.fsync(file.fileno())
        partial.replace(out)
    except OSError as exc:
        raise not_written(exc, out) from exc
    finally:
        partial.unlink(missing_ok=True)
    return Exported(written, below, dict(refused))
