"""Statistics of scores: mean with standard error, pass@k and pass^k.

Every function takes `scores`: one sequence per task, with the reward of each scored epoch. Epochs of one task are not
independent, so the task is the cluster. `estimate` ignores tasks without a scored epoch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction

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


RESAMPLES = 10_000
CONFIDENCE = 0.95


@dataclass(frozen=True, slots=True)
class Difference:
    """Mean over `tasks` tasks of the difference of two models' mean rewards, second minus first.

    `stderr` and the bootstrap interval `low` to `high` are None for a single task. `p_value` is from McNemar's exact
    test; None unless every task has one trial per model with reward 0 or 1.
    """

    value: float
    stderr: float | None
    low: float | None
    high: float | None
    p_value: float | None
    tasks: int

    def __str__(self) -> str:
        return f"{self.value:+.3f}" if self.stderr is None else f"{self.value:+.3f} ± {self.stderr:.3f}"


def paired_difference(
    first: Sequence[Sequence[float]], second: Sequence[Sequence[float]], *, seed: int = 0
) -> Difference | None:
    """Compare two models on the same tasks: `first[i]` and `second[i]` are the scored epochs of task i.

    The task is the unit: epochs are averaged, tasks without a scored epoch of both models are ignored, and all others
    have the same weight. The standard error is for paired differences (Miller 2024, arXiv:2411.00640, section 4). The
    95 % interval is the percentile interval of a paired bootstrap over tasks, whose random numbers depend on `seed`
    only. Return None if no task can be paired.

    Raises:
        ValueError: the numbers of tasks differ.
    """
    pairs = [(one, other) for one, other in zip(first, second, strict=True) if one and other]
    if not pairs:
        return None
    differences = [math.fsum(other) / len(other) - math.fsum(one) / len(one) for one, other in pairs]
    n = len(differences)
    mean = math.fsum(differences) / n
    stderr = low = high = None
    if n > 1:
        stderr = math.sqrt(math.fsum((each - mean) ** 2 for each in differences) / (n - 1) / n)
        low, high = bootstrap_interval(differences, seed=seed)
    p_value = None
    if all(len(one) == len(other) == 1 and _binary(one[0]) and _binary(other[0]) for one, other in pairs):
        p_value = mcnemar_exact(
            sum(one[0] >= SOLVED > other[0] for one, other in pairs),
            sum(other[0] >= SOLVED > one[0] for one, other in pairs),
        )
    return Difference(mean, stderr, low, high, p_value, n)


def _binary(reward: float) -> bool:
    return reward == 0 or abs(reward - 1) <= 1 - SOLVED


def bootstrap_interval(values: Sequence[float], *, seed: int = 0) -> tuple[float, float]:
    """Return the 95 % percentile interval of the mean of `values`, from `RESAMPLES` resamples with replacement."""
    import numpy as np

    random = np.random.default_rng(seed)
    numbers = np.asarray(values, dtype=float)
    rows = max(1, (1 << 20) // len(numbers))  # resamples per batch, so that memory stays bounded
    means = np.concatenate(
        [
            numbers[random.integers(len(numbers), size=(min(rows, RESAMPLES - start), len(numbers)))].mean(axis=1)
            for start in range(0, RESAMPLES, rows)
        ]
    )
    low, high = np.quantile(means, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return float(low), float(high)


def mcnemar_exact(first_only: int, second_only: int) -> float:
    """Return the two-sided p-value of McNemar's exact test, from the numbers of tasks that only one model solved.

    If both models were equally good, each of these tasks would be a fair coin toss. Source: McNemar 1947, with the
    binomial distribution in place of its approximation.
    """
    n, least = first_only + second_only, min(first_only, second_only)
    tail = ways = 1  # `ways` to choose k of n, updated from k to k + 1
    for k in range(least):
        ways = ways * (n - k) // (k + 1)
        tail += ways
    return float(min(Fraction(1), Fraction(2 * tail, 2**n)))
