"""Clamped SwiGLU against float64."""

from __future__ import annotations

import mmap

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from agentkit_kernels.triton.launch import LAUNCHES
from agentkit_kernels.triton.swiglu import swiglu


def formula(gate_up: Tensor, limit: float) -> Tensor:
    gate, up = gate_up.double().chunk(2, -1)
    return (F.silu(gate.clamp(max=limit)) * up.clamp(-limit, limit)).float()


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("width", [1, 5, 96, 1023, 1025])
def test_swiglu_matches_float64(rows: int, width: int) -> None:
    x = 3 * torch.randn(rows, 2 * width)
    torch.testing.assert_close(swiglu(x, 2.0), formula(x, 2.0), rtol=1e-6, atol=1e-6)


def test_bfloat16_is_computed_in_float32() -> None:
    x = torch.randn(3, 64).bfloat16()
    result = swiglu(x, 10.0)
    assert result.dtype == torch.bfloat16
    torch.testing.assert_close(result.float(), formula(x, 10.0), rtol=2**-7, atol=1e-6)


def test_gate_is_clamped_above_and_up_on_both_sides() -> None:
    x = torch.tensor([[100.0, -100.0, 0.5, 100.0, -100.0, -100.0]])
    torch.testing.assert_close(swiglu(x, 7.0), formula(x, 7.0), rtol=1e-6, atol=1e-30)


@pytest.mark.parametrize("column", [1, 4])
def test_nan_passes_through(column: int) -> None:
    x = torch.randn(2, 6)
    x[1, column] = torch.nan
    assert swiglu(x, 10.0).isnan().tolist() == [[False] * 3, [False, True, False]]


def test_views_are_read_in_place() -> None:
    fused = torch.full((5, 40), torch.nan)
    x = fused[:, 7:27].copy_(torch.randn(5, 20))
    torch.testing.assert_close(swiglu(x, 10.0), formula(x, 10.0), rtol=1e-6, atol=1e-6)
    transposed = x.t().contiguous().t()
    torch.testing.assert_close(swiglu(transposed, 10.0), formula(x, 10.0), rtol=1e-6, atol=1e-6)


def test_no_rows_launch_nothing() -> None:
    before = LAUNCHES.total()
    assert swiglu(torch.empty(0, 8), 10.0).shape == (0, 4)
    assert LAUNCHES.total() == before


def test_addresses_are_64_bit() -> None:
    stride = 2**30 + 64
    memory = torch.frombuffer(mmap.mmap(-1, 4 * (2 * stride + 64)), dtype=torch.float32)  # pages appear when written
    x = memory.as_strided((3, 8), (stride, 1)).copy_(torch.randn(3, 8))
    torch.testing.assert_close(swiglu(x, 10.0), formula(x, 10.0), rtol=1e-6, atol=1e-6)


def test_an_odd_number_of_columns_is_refused() -> None:
    with pytest.raises(ValueError, match="even number"):
        swiglu(torch.randn(2, 5), 10.0)
