"""Rotary frequencies."""

from __future__ import annotations

import pytest
import torch

from agentkit_engine.model.rope import frequencies
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
