"""Compare two runs, task by task.

Only tasks in both runs, with the same content and a scored trial in each, are compared. All others are counted in
`Left`, with the reason.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from agentkit.task import Task
from agentkit_engine.untrusted import shorten
from agentkit_evals.errors import ComparisonError
from agentkit_evals.record import RunDirectory, TrialRecord
from agentkit_evals.statistics import Difference, paired_difference

MAX_NAMED = 5
"""Maximum number of tasks that an error names."""


@dataclass(frozen=True, slots=True)
class Side:
    """One model on the compared tasks of one family: its mean reward, with equal weight per task, and means per trial.

    `cost_usd` is None if the price of a trial is unknown.
    """

    mean: float
    solved: int
    trials: int
    tokens: float
    prompt_tokens: float
    turns: float
    seconds: float
    cost_usd: float | None


@dataclass(frozen=True, slots=True)
class Row:
    """A comparison on the tasks of one family, or on all of them if `family` is None."""

    family: str | None
    first: Side
    second: Side
    difference: Difference


@dataclass(frozen=True, slots=True)
class Flip:
    """A task that one model solved in more of its scored epochs than the other."""

    task: str
    family: str
    first: tuple[int, int]  # solved and scored epochs
    second: tuple[int, int]


@dataclass(frozen=True, slots=True)
class Left:
    """Numbers of tasks that are not compared: tasks in one run only, and tasks without a scored trial in a run."""

    only_first: int
    only_second: int
    unscored_first: int
    unscored_second: int

    def __str__(self) -> str:
        parts = (
            (self.only_first, "only in A"),
            (self.only_second, "only in B"),
            (self.unscored_first, "not scored in A"),
            (self.unscored_second, "not scored in B"),
        )
        return ", ".join(f"{count} {what}" for count, what in parts if count)


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two runs side by side: A is `first`, B is `second`, and differences are B minus A."""

    first: RunDirectory
    second: RunDirectory
    total: Row
    families: tuple[Row, ...]
    first_better: tuple[Flip, ...]
    second_better: tuple[Flip, ...]
    left: Left
    settings: tuple[tuple[str, str, str], ...]
    """The settings that differ between the runs, with both values."""

    def as_json(self) -> dict[str, Any]:
        """Return the comparison as JSON data."""
        runs = {
            name: {"run": str(run.path), "suite": run.lock.name, "model": run.lock.model, "complete": run.complete}
            for name, run in (("a", self.first), ("b", self.second))
        }
        return {
            **runs,
            "compared_tasks": self.total.difference.tasks,
            "left_out": asdict(self.left),
            "total": _row_json(self.total),
            "families": {row.family: _row_json(row) for row in self.families},
            "a_better": [asdict(flip) for flip in self.first_better],
            "b_better": [asdict(flip) for flip in self.second_better],
            "settings": {name: [one, other] for name, one, other in self.settings},
        }


def compare(first: RunDirectory, second: RunDirectory) -> Comparison:
    """Compare two runs on the tasks that both have.

    Raises:
        ComparisonError: no task is in both runs, a task of the same id has different content, or no task has a scored
            trial in both runs.
    """
    tasks, others = ({task.id: task for task in run.lock.tasks} for run in (first, second))
    shared = [task for task in tasks if task in others]
    names = f"{first.path} ({first.lock.name}) and {second.path} ({second.lock.name})"
    if not shared:
        raise ComparisonError(
            f"{names} have no task in common; compare two runs of the same suite (for `synth`, of the same --seed)"
        )
    if changed := [task for task in shared if task_hash(tasks[task]) != task_hash(others[task])]:
        named = ", ".join(changed[:MAX_NAMED]) + (", ..." if len(changed) > MAX_NAMED else "")
        raise ComparisonError(
            f"{names}: {len(changed)} of {len(shared)} tasks have the same id in both runs but different content "
            f"({named}); run both models on the same version of the suite"
        )
    scored, scored_by_other = _scored(first), _scored(second)
    paired = [task for task in shared if task in scored and task in scored_by_other]
    if not paired:
        raise ComparisonError(f"{names}: no task has a scored trial in both runs; `agentkit view RUN` shows why")
    family_of = {task: first.lock.families.get(task) or scored[task][0].family for task in paired}
    families = sorted(set(family_of.values()))
    flips = [flip for task in paired if (flip := _flip(task, family_of[task], scored[task], scored_by_other[task]))]
    return Comparison(
        first,
        second,
        _row(None, paired, scored, scored_by_other),
        tuple(_row(name, [t for t in paired if family_of[t] == name], scored, scored_by_other) for name in families),
        tuple(flip for flip in flips if _rate(flip.first) > _rate(flip.second)),
        tuple(flip for flip in flips if _rate(flip.first) < _rate(flip.second)),
        Left(
            len(tasks) - len(shared),
            len(others) - len(shared),
            sum(task not in scored for task in shared),
            sum(task not in scored_by_other for task in shared),
        ),
        tuple(_settings(first, second)),
    )


def task_hash(task: Task) -> str:
    """Return a hash of everything in a task but its metadata and `snapshots`, which do not affect a run."""
    data = task.model_dump_json(exclude={"metadata": True, "environment": {"snapshots": True}})
    return hashlib.sha256(data.encode()).hexdigest()


Scored = Mapping[str, Sequence[TrialRecord]]


def _scored(run: RunDirectory) -> Scored:
    trials: dict[str, list[TrialRecord]] = {}
    for trial in run.trials:
        if trial.reward is not None:
            trials.setdefault(trial.task, []).append(trial)
    return trials


def _row(family: str | None, tasks: Sequence[str], first: Scored, second: Scored) -> Row:
    rewards = [[[trial.reward or 0.0 for trial in side[task]] for task in tasks] for side in (first, second)]
    difference = paired_difference(*rewards)
    assert difference is not None, "every task of a row has scored trials of both models"
    one, other = (_side([side[task] for task in tasks]) for side in (first, second))
    return Row(family, one, other, difference)


def _side(trials_of_tasks: Sequence[Sequence[TrialRecord]]) -> Side:
    trials = [trial for trials in trials_of_tasks for trial in trials]
    costs = [trial.usage.cost_usd for trial in trials if trial.usage.cost_usd is not None]
    means = [math.fsum(trial.reward or 0.0 for trial in trials) / len(trials) for trials in trials_of_tasks]
    return Side(
        mean=math.fsum(means) / len(means),
        solved=sum(trial.solved for trial in trials),
        trials=len(trials),
        tokens=_mean(trial.usage.sampled_tokens for trial in trials),
        prompt_tokens=_mean(trial.usage.prompt_tokens for trial in trials),
        turns=_mean(trial.usage.turns for trial in trials),
        seconds=_mean(trial.agent_s for trial in trials),
        cost_usd=_mean(costs) if len(costs) == len(trials) else None,
    )


def _mean(values: Iterable[float]) -> float:
    numbers = list(values)
    return math.fsum(numbers) / len(numbers)


def _flip(task: str, family: str, first: Sequence[TrialRecord], second: Sequence[TrialRecord]) -> Flip | None:
    one, other = ((sum(trial.solved for trial in side), len(side)) for side in (first, second))
    return Flip(task, family, one, other) if _rate(one) != _rate(other) else None


def _rate(solved_of: tuple[int, int]) -> float:
    return solved_of[0] / solved_of[1]


def _settings(first: RunDirectory, second: RunDirectory) -> Iterable[tuple[str, str, str]]:
    locks = [run.lock.model_dump(include={"epochs", "backend", "seed", "agentkit"}) for run in (first, second)]
    for lock, run in zip(locks, (first, second), strict=True):
        lock |= {name: value for name, value in asdict(run.lock.sampling).items() if name != "seed"}
    for name, value in locks[0].items():
        if value != locks[1][name]:
            yield name, shorten(value, quote=False), shorten(locks[1][name], quote=False)


def _row_json(row: Row) -> dict[str, Any]:
    return {"a": asdict(row.first), "b": asdict(row.second), "difference": asdict(row.difference)}
