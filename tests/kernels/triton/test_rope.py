"""Rotations agree with their torch twin, and with float64 for the same float32 angle."""

from __future__ import annotations

import pytest
import torch

from agentkit_kernels.reference.rope import rotations_at
from agentkit_kernels.triton.launch import LAUNCHES
from agentkit_kernels.triton.rope import rotations


def frequencies(pairs: int, theta: float = 10_000.0) -> torch.Tensor:
    return theta ** (-torch.arange(pairs, dtype=torch.float32) / pairs)


@pytest.mark.parametrize(("rows", "pairs"), [(1, 1), (5, 16), (8, 32), (9, 32), (257, 1)])
def test_rotations_equal_the_twin(rows: int, pairs: int) -> None:
    positions = torch.arange(rows) * 37
    before = LAUNCHES["_rotations"]
    actual = rotations(positions, frequencies(pairs))
    assert LAUNCHES["_rotations"] == before + 1
    torch.testing.assert_close(actual, rotations_at(positions, frequencies(pairs)), rtol=0, atol=1e-6)


def test_rotations_are_exact_at_a_million_tokens() -> None:
    positions = torch.tensor([0, 127, 65_535, 105_615, 1_048_575])
    angles = (positions.float()[:, None] * frequencies(32)).double()
    exact = torch.stack((angles.cos(), angles.sin()), -1).flatten(1)
    for actual in (rotations(positions, frequencies(32)), rotations_at(positions, frequencies(32))):
        torch.testing.assert_close(actual.double(), exact, rtol=0, atol=2e-7)


def test_no_rows_are_no_launch() -> None:
    before = sum(LAUNCHES.values())
    assert rotations(torch.empty(0, dtype=torch.int64), frequencies(16)).shape == (0, 32)
    assert sum(LAUNCHES.values()) == before
