"""The estimators agree with brute-force versions of their definitions."""

from __future__ import annotations

import itertools
import math
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentkit_evals.statistics import (
    SOLVED,
    bootstrap_interval,
    estimate,
    mcnemar_exact,
    paired_difference,
    pass_at_k,
    pass_hat_k,
)

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


@given(st.integers(0, 8), st.integers(0, 8))
def test_mcnemar_is_the_share_of_coin_tosses_at_least_as_uneven(first_only: int, second_only: int) -> None:
    n, uneven = first_only + second_only, abs(first_only - second_only)
    tosses = itertools.product((1, -1), repeat=n)
    share = statistics.fmean(abs(sum(toss)) >= uneven for toss in tosses)
    assert mcnemar_exact(first_only, second_only) == pytest.approx(share)
    assert mcnemar_exact(first_only, second_only) == mcnemar_exact(second_only, first_only)


def test_mcnemar_agrees_with_published_values() -> None:
    """Two-sided binomial tests of 9 out of 10, 1 out of 6, and 25 out of 37 tosses, from tables."""
    assert mcnemar_exact(9, 1) == pytest.approx(0.021484375)
    assert mcnemar_exact(5, 1) == pytest.approx(0.21875)
    assert mcnemar_exact(12, 25) == pytest.approx(0.0470, abs=5e-5)
    assert mcnemar_exact(0, 0) == 1.0
    assert 0 <= mcnemar_exact(5000, 5000) <= 1


@given(st.lists(st.tuples(rewards, rewards), min_size=2, max_size=30))
def test_a_paired_difference_has_the_textbook_standard_error(pairs: list[tuple[float, float]]) -> None:
    found = paired_difference([[one] for one, _ in pairs], [[other] for _, other in pairs])
    differences = [other - one for one, other in pairs]
    assert found is not None and None not in (found.stderr, found.low, found.high)
    assert found.value == pytest.approx(statistics.fmean(differences))
    assert found.stderr == pytest.approx(statistics.stdev(differences) / math.sqrt(len(pairs)), abs=1e-12)
    assert found.low is not None and found.high is not None
    assert min(differences) - 1e-12 <= found.low <= found.high <= max(differences) + 1e-12
    assert (found.p_value is None) == any(reward == 0.25 for pair in pairs for reward in pair)


@given(st.lists(st.tuples(rewards, rewards), min_size=2, max_size=8), st.integers(2, 4))
def test_repeating_every_epoch_does_not_change_a_paired_difference(
    pairs: list[tuple[float, float]], epochs: int
) -> None:
    once = paired_difference([[one] for one, _ in pairs], [[other] for _, other in pairs])
    often = paired_difference([[one] * epochs for one, _ in pairs], [[other] * epochs for _, other in pairs])
    assert once is not None and often is not None
    assert often.value == pytest.approx(once.value) and often.stderr == pytest.approx(once.stderr)
    assert (often.low, often.high) == pytest.approx((once.low, once.high)) and often.p_value is None


def test_unpaired_tasks_are_left_out_of_a_difference() -> None:
    found = paired_difference([[0.0], [], [1.0], [0.0]], [[1.0], [1.0], [], [0.0, 1.0]])
    assert found is not None and (found.value, found.tasks, found.p_value) == (0.75, 2, None)
    assert paired_difference([[]], [[1.0]]) is None
    single = paired_difference([[0.0]], [[1.0]])
    assert single is not None and (single.stderr, single.low, single.p_value) == (None, None, 1.0)
    with pytest.raises(ValueError):
        paired_difference([[0.0]], [])


def test_the_bootstrap_interval_is_that_of_all_resamples() -> None:
    """With 5 values all 3125 resamples can be listed; the random ones have the same quantiles."""
    values = [0.0, 1.0, 1.0, -1.0, 0.5]
    means = sorted(statistics.fmean(draw) for draw in itertools.product(values, repeat=len(values)))
    exact = means[round(0.025 * len(means))], means[round(0.975 * len(means))]
    assert bootstrap_interval(values) == pytest.approx(exact, abs=0.101)
    assert bootstrap_interval(values) == bootstrap_interval(values) != bootstrap_interval([*values, 0.25])
    spread = [((7 * i) % 11) / 10 for i in range(200)]
    half = 1.96 * statistics.stdev(spread) / math.sqrt(len(spread))
    middle = statistics.fmean(spread)
    assert bootstrap_interval(spread) == pytest.approx((middle - half, middle + half), abs=half / 20)
