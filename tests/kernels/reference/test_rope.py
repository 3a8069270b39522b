"""Rotary frequencies and rotations."""

from __future__ import annotations

import pytest
import torch

from agentkit_engine.model.rope import frequencies, rotate, rotations
from agentkit_engine.spec import RopeSpec

CPU = torch.device("cpu")
COMPRESSED = RopeSpec(160_000.0, factor=16.0)
PLAIN = RopeSpec(10_000.0)


def test_yarn_table_of_the_released_models() -> None:
    freqs = frequencies(COMPRESSED, 64, CPU)
    plain = frequencies(RopeSpec(160_000.0), 64, CPU)
    blend = [0.90625, 0.8125, 0.71875, 0.625, 0.53125, 0.4375, 0.34375, 0.25, 0.15625]
    expected = torch.tensor([1.0] * 16 + blend + [0.0625] * 7)
    torch.testing.assert_close(freqs / plain, expected, rtol=1e-6, atol=0)
    samples = {0: 1.0, 8: 5.0e-2, 15: 3.635539e-3, 16: 2.265625e-3, 20: 2.969778e-4, 24: 1.953125e-5, 31: 5.680529e-7}
    for index, value in samples.items():
        assert float(freqs[index]) == pytest.approx(value, rel=1e-6)


def test_window_layers_have_no_yarn() -> None:
    expected = 10_000.0 ** -(torch.arange(32, dtype=torch.float64) / 32)
    torch.testing.assert_close(frequencies(PLAIN, 64, CPU).double(), expected, rtol=1e-6, atol=0)


def test_pairs_are_interleaved_and_on_the_last_dimensions() -> None:
    x = torch.arange(1.0, 9.0).view(1, 1, 8)
    angles = 5 * frequencies(PLAIN, 4, CPU)
    got = rotate(x, rotations(PLAIN, torch.tensor([5]), 4))[0, 0]
    cos, sin = angles.cos(), angles.sin()
    expected = [5 * cos[0] - 6 * sin[0], 6 * cos[0] + 5 * sin[0], 7 * cos[1] - 8 * sin[1], 8 * cos[1] + 7 * sin[1]]
    torch.testing.assert_close(got, torch.cat((x[0, 0, :4], torch.stack(expected))))


def test_the_conjugate_undoes_a_rotation_per_head() -> None:
    x = torch.randn(2, 7, 3, 16, generator=torch.Generator().manual_seed(0))
    turns = rotations(COMPRESSED, torch.arange(1_000_000, 1_000_007), 8)
    torch.testing.assert_close(rotate(rotate(x, turns), turns.conj_physical()), x, atol=1e-6, rtol=0)


def test_dot_products_depend_on_the_distance_only() -> None:
    q, k = torch.randn(2, 1, 1, 16, generator=torch.Generator().manual_seed(1))

    def dot(at_q: int, at_k: int) -> float:
        left = rotate(q[None], rotations(PLAIN, torch.tensor([at_q]), 16))
        return float((left * rotate(k[None], rotations(PLAIN, torch.tensor([at_k]), 16))).sum())

    assert dot(9, 4) == pytest.approx(dot(1009, 1004), abs=1e-4)
