"""Statistics of scores: mean with standard error, pass@k and pass^k.

Every function takes `scores`: one sequence per task, with the reward of each scored epoch. Epochs of one task are not
independent, so the task is the cluster. `estimate` ignores tasks without a scored epoch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

SOLVED = 1.0 - 1e-6
"""Minimum reward that counts as solved. It is below 1 because ten times 0.1 is a little less than 1."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """Mean reward over `n` trials of `tasks` tasks. `stderr` is None for a single task."""

    mean: float
    stderr: float | None
    n: int
    tasks: int

    def __str__(self) -> str:
        return f"{self.mean:.3f}" if self.stderr is None else f"{self.mean:.3f} ± {self.stderr:.3f}"


def estimate(scores: Sequence[Sequence[float]]) -> Estimate | None:
    """Return the mean over all trials and its standard error clustered by task, or None if nothing was scored.

    The error is the cluster-robust one of Miller 2024 (arXiv:2411.00640, equation 4), with the variance multiplied by
    G / (G - 1) for G tasks. With one epoch per task it equals the sample standard deviation over the square root of n.
    """
    clusters = [task for task in scores if task]
    n = sum(len(task) for task in clusters)
    if n == 0:
        return None
    mean = math.fsum(score for task in clusters for score in task) / n
    groups = len(clusters)
    if groups < 2:
        return Estimate(mean, None, n, groups)
    spread = math.fsum(math.fsum(score - mean for score in task) ** 2 for task in clusters)
    return Estimate(mean, math.sqrt(spread * groups / (groups - 1)) / n, n, groups)


@dataclass(frozen=True, slots=True)
class PassRate:
    """A pass@k or pass^k: the mean over the `tasks` tasks, out of `of`, that have at least k scored epochs."""

    value: float
    tasks: int
    of: int

    @property
    def complete(self) -> bool:
        """True if the mean covers every task."""
        return self.tasks == self.of

    def __str__(self) -> str:
        return f"{self.value:.3f}" if self.complete else f"{self.value:.3f} ({self.tasks} of {self.of} tasks)"


def pass_at_k(scores: Sequence[Sequence[float]], k: int) -> PassRate | None:
    """Return the chance that at least one of k epochs, drawn without replacement, passes: 1 - C(n-c, k) / C(n, k).

    The value is the mean over the tasks with at least k scored epochs; without any, the result is None. Include tasks
    with fewer or no epochs in `scores`, so that `PassRate.of` counts them. Source: Chen et al. 2021, arXiv:2107.03374.
    """
    return _over_tasks(scores, k, lambda n, c: 1 - math.comb(n - c, k) / math.comb(n, k))


def pass_hat_k(scores: Sequence[Sequence[float]], k: int) -> PassRate | None:
    """Return the chance that all of k epochs, drawn without replacement, pass: C(c, k) / C(n, k), as for `pass_at_k`.

    Source: Yao et al. 2024 (tau-bench), arXiv:2406.12045.
    """
    return _over_tasks(scores, k, lambda n, c: math.comb(c, k) / math.comb(n, k))


def _over_tasks(scores: Sequence[Sequence[float]], k: int, chance: Callable[[int, int], float]) -> PassRate | None:
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    chances = [chance(len(task), sum(score >= SOLVED for score in task)) for task in scores if len(task) >= k]
    return PassRate(math.fsum(chances) / len(chances), len(chances), len(scores)) if chances else None
