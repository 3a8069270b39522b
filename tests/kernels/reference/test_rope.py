"""Rotations of queries and keys."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from agentkit_kernels.reference.rope import rotate, rotations_at

FREQUENCIES = torch.tensor([1.0, 0.1, 0.01, 0.001, 2e-4, 5e-5, 1e-5, 5.680529e-7])


def test_pairs_are_interleaved_and_on_the_last_dimensions() -> None:
    x = torch.arange(1.0, 9.0).view(1, 8)
    angles = 5 * FREQUENCIES[:2]
    got = rotate(x, rotations_at(torch.tensor([5]), FREQUENCIES[:2]))[0]
    cos, sin = angles.cos(), angles.sin()
    expected = [5 * cos[0] - 6 * sin[0], 6 * cos[0] + 5 * sin[0], 7 * cos[1] - 8 * sin[1], 8 * cos[1] + 7 * sin[1]]
    torch.testing.assert_close(got, torch.cat((x[0, :4], torch.stack(expected))))


def test_the_inverse_undoes_a_rotation_per_head() -> None:
    x = torch.randn(14, 3, 16, generator=torch.Generator().manual_seed(0))
    turns = rotations_at(torch.arange(1_000_000, 1_000_014), FREQUENCIES[:4])
    assert not torch.equal(rotate(x, turns), x)
    torch.testing.assert_close(rotate(rotate(x, turns), turns, inverse=True), x, atol=1e-6, rtol=0)


def test_dot_products_depend_on_the_distance_only() -> None:
    q, k = torch.randn(2, 1, 16, generator=torch.Generator().manual_seed(1))

    def at(x: Tensor, position: int) -> Tensor:
        return rotate(x, rotations_at(torch.tensor([position]), FREQUENCIES))

    def dot(at_q: int, at_k: int) -> float:
        return float((at(q, at_q) * at(k, at_k)).sum())

    assert dot(9, 4) == pytest.approx(dot(1009, 1004), abs=1e-4)
    assert dot(9, 4) != pytest.approx(dot(9, 5), abs=1e-2)
