"""The batched sampler against its twin, and the twin against one draw in Python floats."""

from __future__ import annotations

import math
import mmap

import pytest
import torch
from torch import Tensor

from agentkit_kernels.reference import sampler as reference
from agentkit_kernels.triton.sampler import SPLIT, sample


def arguments(rows: int, size: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return strided logits, temperatures (every third is 0), uniform numbers, and a mask that allows half the ids."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.full((rows, size + 5), float("nan"))[:, :size]
    logits[:] = torch.randn(rows, size, generator=generator) * 3
    temperatures = torch.rand(rows, generator=generator) * 2 + 0.1
    temperatures[::3] = 0.0
    uniforms = torch.rand(rows, generator=generator, dtype=torch.float64)
    bitmask = torch.randint(-(2**31), 2**31, (rows, -(-size // 32)), generator=generator).to(torch.int32)
    return logits, temperatures, uniforms, bitmask


def check(logits: Tensor, temperatures: Tensor, uniforms: Tensor, bitmask: Tensor | None = None) -> reference.Sampled:
    result = sample(logits, temperatures, uniforms, bitmask)
    answer = reference.sample(logits, temperatures, uniforms, bitmask)
    assert torch.equal(result.ids, answer.ids) and torch.equal(result.finite, answer.finite)
    torch.testing.assert_close(result.logprobs, answer.logprobs, atol=1e-6, rtol=1e-6)
    return result


@pytest.mark.parametrize("rows", [0, 1, 7])
@pytest.mark.parametrize("size", [1, 31, 33, 1000, SPLIT, SPLIT + 1, 3 * SPLIT - 1])
def test_rows_match_the_twin(rows: int, size: int) -> None:
    logits, temperatures, uniforms, bitmask = arguments(rows, size, seed=size)
    check(logits, temperatures, uniforms)
    check(logits, temperatures, uniforms, bitmask)


def test_the_twin_inverts_the_cumulative_distribution() -> None:
    logits, temperatures, uniforms, bitmask = arguments(9, 40)
    result = reference.sample(logits, temperatures, uniforms, bitmask)
    for row in range(9):
        words, values = bitmask[row].tolist(), logits[row].tolist()
        allowed = [v for v in range(40) if words[v // 32] >> (v % 32) & 1]
        temperature = float(temperatures[row])
        if temperature == 0:
            answer = max(allowed, key=lambda v: values[v])
        else:
            weights = [math.exp(values[v] / temperature) for v in allowed]
            target, total, answer = float(uniforms[row]) * sum(weights), 0.0, allowed[-1]
            for v, weight in zip(allowed, weights, strict=True):
                total += weight
                if total > target:
                    answer = v
                    break
        assert result.ids[row] == answer
        logprob = values[answer] - math.log(sum(math.exp(value) for value in values))
        assert abs(float(result.logprobs[row]) - logprob) < 1e-6


def test_every_id_is_drawn_where_its_share_begins() -> None:
    logits = torch.tensor([[0.0, math.log(2.0), -math.inf, 0.0]]).clamp(min=-800.0)
    uniforms = torch.tensor([0.0, 0.24, 0.26, 0.74, 0.76, 1 - 2.0**-53], dtype=torch.float64)
    rows = len(uniforms)
    result = check(logits.expand(rows, -1), torch.ones(rows), uniforms)
    assert result.ids.tolist() == [0, 0, 1, 1, 3, 3]


def test_the_lowest_of_equal_logits_is_taken_across_splits() -> None:
    logits = torch.zeros(1, 2 * SPLIT)
    logits[0, [SPLIT - 1, SPLIT, SPLIT + 7]] = 5.0
    assert check(logits, torch.zeros(1), torch.zeros(1, dtype=torch.float64)).ids.tolist() == [SPLIT - 1]


def test_a_mask_with_one_id_leaves_no_choice() -> None:
    logits, temperatures, uniforms, bitmask = arguments(4, SPLIT + 40)
    bitmask.zero_()
    bitmask[:, (SPLIT + 39) // 32] = 1 << 7
    assert check(logits, temperatures, uniforms, bitmask).ids.tolist() == [SPLIT + 39] * 4


def test_a_mask_that_allows_nothing_gives_minus_one() -> None:
    logits, temperatures, uniforms, bitmask = arguments(2, 50)
    bitmask[1] = 0
    ids = sample(logits, temperatures, uniforms, bitmask).ids.tolist()
    assert ids[0] >= 0 and ids[1] == -1


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("at", [0, SPLIT + 3])
def test_rows_that_are_not_finite_are_flagged(bad: float, at: int) -> None:
    logits, temperatures, uniforms, bitmask = arguments(3, SPLIT + 9)
    logits[1, at] = bad
    result = sample(logits, temperatures, uniforms, bitmask)
    assert result.finite.tolist() == [True, False, True]
    assert bool((result.ids < SPLIT + 9).all())


def test_small_differences_of_large_logits_survive() -> None:
    logits = torch.full((1, 9), 3e4)
    logits[0, 4] += 8.0
    check(logits, torch.full((1,), 0.5), torch.tensor([0.5], dtype=torch.float64))


def test_the_choice_of_a_row_does_not_depend_on_the_other_rows() -> None:
    logits, temperatures, uniforms, bitmask = arguments(5, 300)
    whole = sample(logits, temperatures, uniforms, bitmask)
    for row in range(5):
        some = slice(row, row + 1)
        alone = sample(logits[some], temperatures[some], uniforms[some], bitmask[some])
        assert all(torch.equal(part[0], parts[row]) for part, parts in zip(alone, whole, strict=True))


def test_rows_lie_beyond_32_bits() -> None:
    stride, (logits, temperatures, uniforms, bitmask) = 1 << 30, arguments(3, 33)
    memory = torch.frombuffer(mmap.mmap(-1, 4 * (2 * stride + 48)), dtype=torch.float32)
    far = memory.as_strided((3, 33), (stride, 1)).copy_(logits)
    far_mask = memory.view(torch.int32).as_strided((3, 2), (stride, 1), 40).copy_(bitmask)
    for token, answer in zip(
        sample(far, temperatures, uniforms, far_mask), check(logits, temperatures, uniforms, bitmask), strict=True
    ):
        assert torch.equal(token, answer)
