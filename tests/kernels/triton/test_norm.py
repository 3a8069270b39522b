"""RMSNorm agrees with its torch twin and with float64."""

from __future__ import annotations

import mmap

import pytest
import torch

from agentkit_kernels.reference.norm import rms_norm as reference
from agentkit_kernels.triton.launch import LAUNCHES
from agentkit_kernels.triton.norm import rms_norm


@pytest.mark.parametrize(("rows", "size"), [(1, 1), (2, 96), (3, 128), (5, 129), (2, 4096)])
def test_the_first_columns_of_wider_rows_are_normed(rows: int, size: int) -> None:
    wide, weight = torch.randn(rows, size + 40), torch.randn(size)
    wide[:, size:] = torch.nan
    x = wide[:, :size].double()
    exact = x * (x.square().mean(1, keepdim=True) + 1e-6).rsqrt() * weight
    before = LAUNCHES["_rms_norm"]
    actual = rms_norm(wide, weight, 1e-6)
    assert LAUNCHES["_rms_norm"] == before + 1
    for one in (actual, reference(wide, weight, 1e-6)):
        torch.testing.assert_close(one.double(), exact, rtol=2e-6, atol=1e-6)


def test_rows_may_have_more_dimensions_and_be_bfloat16() -> None:
    x, weight = torch.randn(3, 4, 96).bfloat16(), torch.randn(96)
    actual = rms_norm(x, weight, 1e-6)
    assert actual.dtype == torch.bfloat16
    torch.testing.assert_close(actual.float(), reference(x.float(), weight, 1e-6), rtol=2**-7, atol=0)


def test_rows_lie_beyond_32_bits() -> None:
    stride, weight = 1 << 30, torch.randn(32)
    memory = torch.frombuffer(mmap.mmap(-1, 2 * (2 * stride + 32)), dtype=torch.bfloat16)
    x = memory.as_strided((3, 32), (stride, 1))
    x.copy_(torch.randn(3, 32))
    assert torch.equal(rms_norm(x, weight, 1e-6), rms_norm(x.clone(), weight, 1e-6))


def test_no_rows_are_no_launch() -> None:
    before = sum(LAUNCHES.values())
    assert rms_norm(torch.empty(0, 64), torch.ones(32), 1e-6).shape == (0, 32)
    assert sum(LAUNCHES.values()) == before
