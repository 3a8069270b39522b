"""The estimators agree with brute-force versions of their definitions."""

from __future__ import annotations

import itertools
import math
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentkit_evals.statistics import SOLVED, estimate, pass_at_k, pass_hat_k

rewards = st.sampled_from([0.0, 0.25, 1.0])
tables = st.lists(st.lists(rewards, max_size=5), max_size=6)


@given(tables, st.integers(1, 5))
def test_pass_at_k_and_pass_hat_k_are_the_share_of_all_subsets(scores: list[list[float]], k: int) -> None:
    draws = [list(itertools.combinations(task, k)) for task in scores if len(task) >= k]
    for measured, passes in ((pass_at_k(scores, k), any), (pass_hat_k(scores, k), all)):
        if not draws:
            assert measured is None
        else:
            shares = [statistics.fmean(passes(score == 1.0 for score in draw) for draw in task) for task in draws]
            assert measured is not None and measured.value == pytest.approx(statistics.fmean(shares))
            assert (measured.tasks, measured.of) == (len(draws), len(scores))


@given(st.lists(rewards, min_size=2, max_size=30))
def test_one_epoch_gives_the_textbook_standard_error(scores: list[float]) -> None:
    got = estimate([[score] for score in scores])
    assert got is not None and got.stderr is not None
    assert got.mean == pytest.approx(statistics.fmean(scores))
    assert got.stderr == pytest.approx(statistics.stdev(scores) / math.sqrt(len(scores)), abs=1e-12)


@given(st.lists(rewards, min_size=2, max_size=12), st.integers(1, 5))
def test_repeating_every_epoch_adds_no_certainty(scores: list[float], epochs: int) -> None:
    once, often = estimate([[score] for score in scores]), estimate([[score] * epochs for score in scores])
    assert once is not None and often is not None and once.stderr is not None
    assert often.stderr == pytest.approx(once.stderr, abs=1e-12)
    assert (often.n, often.tasks) == (epochs * len(scores), len(scores))


@given(tables)
def test_the_clustered_error_is_the_sum_over_pairs_inside_a_task(scores: list[list[float]]) -> None:
    got = estimate(scores)
    clusters = [task for task in scores if task]
    if got is None or got.stderr is None:
        assert len(clusters) < 2
        return
    pairs = sum((a - got.mean) * (b - got.mean) for task in clusters for a in task for b in task)
    correction = len(clusters) / (len(clusters) - 1)
    assert got.stderr**2 == pytest.approx(max(pairs, 0.0) * correction / got.n**2, abs=1e-12)


def test_nothing_scored_and_a_single_task() -> None:
    assert estimate([]) is None
    assert estimate([[], []]) is None
    single = estimate([[1.0, 0.0]])
    assert single is not None and (single.mean, single.stderr, str(single)) == (0.5, None, "0.500")
    with pytest.raises(ValueError, match="k must be at least 1, got 0"):
        pass_at_k([[1.0]], 0)


def test_a_rate_over_some_tasks_shows_how_many() -> None:
    scores = [[1.0, 1.0], [0.0], [0.0], [], [0.0]]
    for rate in (pass_at_k(scores, 2), pass_hat_k(scores, 2)):
        assert rate is not None and not rate.complete
        assert (rate.value, rate.tasks, rate.of, str(rate)) == (1.0, 1, 5, "1.000 (1 of 5 tasks)")
    whole = pass_at_k(scores[:1], 2)
    assert whole is not None and whole.complete and str(whole) == "1.000"


def test_sums_of_tenths_are_solved() -> None:
    tenths = sum([0.1] * 10)
    assert tenths < 1.0 and tenths >= SOLVED > 0.99999
    rate = pass_hat_k([[tenths, 1.0]], 2)
    assert rate is not None and rate.value == 1.0


@pytest.mark.parametrize(("reward", "value"), [(SOLVED, 1.0), (math.nextafter(SOLVED, 0), 0.0)])
def test_a_reward_of_at_least_the_threshold_is_solved(reward: float, value: float) -> None:
    rate = pass_at_k([[reward]], 1)
    assert rate is not None and rate.value == value
