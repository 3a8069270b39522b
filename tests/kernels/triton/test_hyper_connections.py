"""The mHC kernels agree with their torch twins and with float64."""

from __future__ import annotations

import mmap

import pytest
import torch
from torch import Tensor

from agentkit_kernels.ops import HyperConnection, HyperHead
from agentkit_kernels.reference import hyper_connections as reference
from agentkit_kernels.reference.linear import Weight
from agentkit_kernels.triton.hyper_connections import _read, hc_head, hc_post, hc_post_pre, hc_pre
from agentkit_kernels.triton.launch import LAUNCHES, launch

SIZE = 4
EDGES = [(1, 32), (3, 96), (15, 128), (16, 160), (17, 256)]
"""Rows and columns around the edges of a tile (16 rows) and of a slab (128 columns)."""


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def connection(dim: int, iterations: int = 3) -> HyperConnection:
    outputs = (2 + SIZE) * SIZE
    fn = normal(outputs, SIZE * dim, seed=1) * 0.1
    base, scale, norm = normal(outputs, seed=2), normal(3, seed=3), normal(dim, seed=4)
    return HyperConnection(fn, base, scale, norm, 1e-6, 1e-6, iterations)


def packed(hc: HyperConnection) -> HyperConnection:
    return hc._replace(fn=Weight((hc.fn,)))


def mixing_of(mixing: reference.Mixing) -> Tensor:
    return torch.cat((mixing.post_NM, mixing.comb_NMM.flatten(1)), 1)


def in_float64(streams: Tensor, hc: HyperConnection) -> tuple[Tensor, Tensor]:
    """`hc_pre` as its formulas read."""
    x = streams.double()
    flat = x.flatten(1)
    mix = flat @ hc.fn.double().mT * (flat.square().mean(1, keepdim=True) + hc.norm_eps).rsqrt()
    pre, post, comb = mix.split([SIZE, SIZE, SIZE * SIZE], 1)
    base_pre, base_post, base_comb = hc.base.double().split([SIZE, SIZE, SIZE * SIZE])
    pre = (pre * hc.scale[0] + base_pre).sigmoid() + hc.eps
    post = 2 * (post * hc.scale[1] + base_post).sigmoid()
    matrix = (comb * hc.scale[2] + base_comb).view(-1, SIZE, SIZE).softmax(2) + hc.eps
    matrix = matrix / (matrix.sum(1, keepdim=True) + hc.eps)
    for _ in range(hc.iterations - 1):
        matrix = matrix / (matrix.sum(2, keepdim=True) + hc.eps)
        matrix = matrix / (matrix.sum(1, keepdim=True) + hc.eps)
    read = (pre[:, :, None] * x).sum(1)
    read = read * (read.square().mean(1, keepdim=True) + hc.norm_eps).rsqrt() * hc.norm
    return read, torch.cat((post, matrix.flatten(1)), 1)


def assert_close(actual: Tensor, expected: Tensor, tolerance: float = 2e-5) -> None:
    torch.testing.assert_close(actual, expected.to(actual.dtype), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("rows", "dim"), EDGES)
def test_a_boundary_equals_the_twin(rows: int, dim: int) -> None:
    streams, hc = normal(rows, SIZE, dim), connection(dim)
    before = LAUNCHES["_write_and_mix"], LAUNCHES["_read"]
    x, mixing = hc_pre(streams, hc, dtype=torch.float32)
    assert (LAUNCHES["_write_and_mix"], LAUNCHES["_read"]) == (before[0] + 1, before[1] + 1)
    expected_x, expected_mixing = reference.hc_pre(streams, packed(hc))
    assert_close(x, expected_x)
    assert_close(mixing, mixing_of(expected_mixing))

    y = normal(rows, 2 * dim, seed=5)[:, 3 : 3 + dim]
    actual = hc_post_pre(streams, y, mixing, hc, dtype=torch.float32)
    expected_streams, expected_x, expected_mixing = reference.hc_post_pre(streams, y, expected_mixing, packed(hc))
    for one, other in zip(actual, (expected_streams, expected_x, mixing_of(expected_mixing)), strict=True):
        assert_close(one, other)
    assert_close(hc_post(streams, y, mixing), expected_streams)


def test_kernel_and_twin_agree_with_float64() -> None:
    streams, hc = normal(5, SIZE, 96), connection(96, iterations=20)
    expected = in_float64(streams, hc)
    twin_x, twin_mixing = reference.hc_pre(streams, packed(hc))
    for x, mixing in (hc_pre(streams, hc, dtype=torch.float32), (twin_x, mixing_of(twin_mixing))):
        assert_close(x.double(), expected[0])
        assert_close(mixing.double(), expected[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_fused_boundary_has_the_bits_of_a_write_and_a_read(dtype: torch.dtype) -> None:
    streams, hc = normal(5, SIZE, 160).to(dtype), connection(160)
    y = normal(5, 160, seed=5).to(dtype)
    _, mixing = hc_pre(streams, hc, dtype=dtype)
    fused = hc_post_pre(streams, y, mixing, hc, dtype=dtype)
    written = hc_post(streams, y, mixing)
    for one, other in zip(fused, (written, *hc_pre(written, hc, dtype=dtype)), strict=True):
        assert torch.equal(one, other)


def test_a_row_has_the_same_bits_alone_and_among_others() -> None:
    streams, hc, y = normal(18, SIZE, 160), connection(160), normal(18, 160, seed=5)
    _, mixing = hc_pre(streams, hc, dtype=torch.float32)
    together = hc_post_pre(streams, y, mixing, hc, dtype=torch.float32)
    for row in (0, 15, 17):
        some = slice(row, row + 1)
        alone = hc_post_pre(streams[some], y[some], mixing[some], hc, dtype=torch.float32)
        for one, other in zip(alone, together, strict=True):
            assert torch.equal(one[0], other[row])


def test_streams_in_bfloat16_stay_close_to_the_twin() -> None:
    streams, hc, y = normal(3, SIZE, 96).bfloat16(), connection(96), normal(3, 96, seed=5).bfloat16()
    x, mixing = hc_pre(streams, hc, dtype=torch.bfloat16)
    assert x.dtype == torch.bfloat16
    expected_x, expected_mixing = reference.hc_pre(streams.float(), packed(hc))
    assert_close(x, expected_x, 2**-6)
    assert_close(mixing, mixing_of(expected_mixing))
    written = hc_post(streams, y, mixing)
    assert written.dtype == torch.bfloat16
    assert_close(written, reference.hc_post(streams.float(), y.float(), expected_mixing), 2**-6)


@pytest.mark.parametrize("iterations", [1, 20])
def test_sinkhorn_equals_the_twin(iterations: int) -> None:
    streams, hc = normal(2, SIZE, 32) * 30, connection(32, iterations)
    _, mixing = hc_pre(streams, hc, dtype=torch.float32)
    assert_close(mixing, mixing_of(reference.hc_pre(streams, packed(hc))[1]))


@pytest.mark.parametrize(("rows", "dim"), EDGES)
def test_the_head_equals_the_twin(rows: int, dim: int) -> None:
    streams = normal(rows, SIZE, dim)
    fn, base, scale, norm = normal(SIZE, SIZE * dim, seed=1) * 0.1, normal(SIZE), normal(1), normal(dim, seed=4)
    head = HyperHead(fn, base, scale, norm, 1e-6, 1e-6)
    expected = reference.hc_head(streams, head._replace(fn=Weight((fn,))))
    assert_close(hc_head(streams, head, dtype=torch.float32), expected)


def test_rows_of_y_lie_beyond_32_bits() -> None:
    rows, dim, stride = 9, 32, 1 << 28
    memory = torch.frombuffer(mmap.mmap(-1, 2 * (8 * stride + dim)), dtype=torch.bfloat16)
    y = memory.as_strided((rows, dim), (stride, 1))
    y.copy_(normal(rows, dim))
    streams, mixing = normal(rows, SIZE, dim), normal(rows, SIZE + SIZE * SIZE)
    assert torch.equal(hc_post(streams, y, mixing), hc_post(streams, y.clone(), mixing))


def test_streams_lie_beyond_32_bits() -> None:
    """Equal rows of 2^30 elements, of which the kernel is told to read 32 per stream, give the same."""
    rows, dim, block = 3, 1 << 28, 32
    memory = torch.frombuffer(mmap.mmap(-1, 2 * rows * SIZE * dim), dtype=torch.bfloat16)
    streams = memory.view(rows, SIZE, dim)
    streams[:, :, :block] = normal(SIZE, block)
    x = torch.frombuffer(mmap.mmap(-1, 2 * rows * dim), dtype=torch.bfloat16).view(rows, dim)
    launch(
        _read, (rows,), streams, normal(1, 16).abs().repeat(rows, 1), normal(SIZE), normal(1), normal(block), x,
        torch.empty(0), 1.0, 1e-6, M=SIZE, D=dim, OUTPUTS=SIZE, PADDED=16, SLABS=1, SLABS_PADDED=1, BLOCK=block,
        ITERATIONS=0,
    )  # fmt: skip
    assert x[0, :block].all() and torch.equal(x[2, :block], x[0, :block])


def test_no_rows_are_no_launch() -> None:
    hc, before = connection(32), sum(LAUNCHES.values())
    streams, y = torch.empty(0, SIZE, 32), torch.empty(0, 32)
    x, mixing = hc_pre(streams, hc, dtype=torch.float32)
    assert hc_post_pre(streams, y, mixing, hc, dtype=torch.float32)[1].shape == x.shape == (0, 32)
    assert sum(LAUNCHES.values()) == before
