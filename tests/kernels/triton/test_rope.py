"""Rotations agree with their torch twin, and with float64 for the same float32 angle."""

from __future__ import annotations

import mmap

import numpy as np
import pytest
import torch
import triton.language as tl
from triton.runtime.interpreter import TensorHandle, interpreter_builder

from agentkit_kernels.reference.rope import rotations_at
from agentkit_kernels.triton.launch import LAUNCHES, launch
from agentkit_kernels.triton.rope import _rotations, rotations


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


def test_results_lie_beyond_32_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """One program far from the first: the result has 2^31 elements, of which no others are touched."""
    pairs, block = 1 << 20, 256
    row, program = 1025, (1025 << 20) // block
    memory = torch.frombuffer(mmap.mmap(-1, 8 * (row + 1) * pairs), dtype=torch.float32)
    positions, of_pairs = torch.arange(row + 1), frequencies(pairs)
    number = TensorHandle(np.array([program], np.int32), tl.int32)
    monkeypatch.setattr(interpreter_builder, "create_get_program_id", lambda axis: number)
    launch(_rotations, (1,), positions, of_pairs, memory, (row + 1) * pairs, PAIRS=pairs, BLOCK=block)
    expected = rotations_at(positions[row:], of_pairs[:block])[0]
    first = 2 * row * pairs
    torch.testing.assert_close(memory[first : first + 2 * block], expected, rtol=0, atol=1e-6)


def test_no_rows_are_no_launch() -> None:
    before = sum(LAUNCHES.values())
    assert rotations(torch.empty(0, dtype=torch.int64), frequencies(16)).shape == (0, 32)
    assert sum(LAUNCHES.values()) == before
