"""Queries, key-value rows and index queries agree with their torch twins and with float64."""

from __future__ import annotations

import mmap

import pytest
import torch
from torch import Tensor

from agentkit_kernels.ops import Heads
from agentkit_kernels.reference.qkv import qkv as reference
from agentkit_kernels.reference.rope import rotations_at
from agentkit_kernels.triton.launch import LAUNCHES
from agentkit_kernels.triton.qkv import qkv

SIZES = [(1, 96, 32, 0, 0), (4, 96, 32, 8, 32), (3, 64, 64, 1, 64), (9, 512, 64, 5, 128), (65, 64, 16, 129, 16)]
"""Heads, head size, rotary size, index heads, index head size; 9, 65 and 129 heads need one program more."""


def inputs(
    rows: int, sizes: tuple[int, ...], dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor, Heads]:
    """Arguments of `qkv`; both matrices are views of wider rows, full of NaN beside what is read."""
    count, size, rotary, index_heads, index_size = sizes
    generator = torch.Generator().manual_seed(0)
    width = count * size + index_heads * index_size
    q = torch.full((rows, width + 24), torch.nan)
    q[:, 8 : 8 + width] = torch.randn(rows, width, generator=generator)
    projected = torch.full((rows, size + index_heads + 40), torch.nan)
    projected[:, 5 : 5 + size] = torch.randn(rows, size, generator=generator)
    projected[:, 25 + size : 25 + size + index_heads] = torch.randn(rows, index_heads, generator=generator)
    rotations = rotations_at(torch.arange(rows) * 1009, 0.7 ** torch.arange(rotary // 2))
    norm = torch.randn(size, generator=generator)
    heads = Heads(count, size, 5, norm, 1e-6, index_heads, index_size, 25 + size)
    return q.to(dtype)[:, 8 : 8 + width], projected.to(dtype), rotations, heads


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("rows", [1, 3])
def test_all_parts_of_a_row_equal_the_twin(rows: int, sizes: tuple[int, ...]) -> None:
    q, projected, rotations, heads = inputs(rows, sizes)
    before = LAUNCHES["_qkv"]
    actual = qkv(q, projected, rotations, heads)
    assert LAUNCHES["_qkv"] == before + 1
    for one, other in zip(actual, reference(q, projected, rotations, heads), strict=True):
        torch.testing.assert_close(one, other.reshape(one.shape), rtol=2e-6, atol=2e-6)


def test_kernel_and_twin_agree_with_float64() -> None:
    q, projected, rotations, heads = inputs(3, SIZES[1])
    wide = q.double(), projected.double(), rotations.double(), heads._replace(kv_norm=heads.kv_norm.double())
    x = wide[0][:, : 4 * 96].view(3, 4, 96)
    x = x * (x.square().mean(2, keepdim=True) + 1e-6).rsqrt() * 96**-0.5
    cosine, sine = wide[2][:, None, 0::2], wide[2][:, None, 1::2]
    even, odd = x[..., 64::2], x[..., 65::2]
    rotated = torch.stack((even * cosine - odd * sine, even * sine + odd * cosine), -1).flatten(2)
    exact = torch.cat((x[..., :64], rotated), 2)
    for actual in (qkv(q, projected, rotations, heads)[0], reference(q, projected, rotations, heads)[0]):
        torch.testing.assert_close(actual.double(), exact, rtol=2e-6, atol=2e-6)


def test_bfloat16_inputs_stay_close_to_the_twin() -> None:
    q, projected, rotations, heads = inputs(2, SIZES[1], torch.bfloat16)
    actual = qkv(q, projected, rotations, heads)
    assert [x.dtype for x in actual] == [torch.bfloat16] * 3 + [torch.float32]
    for one, other in zip(actual, reference(q.float(), projected.float(), rotations, heads), strict=True):
        torch.testing.assert_close(one.float(), other, rtol=2**-7, atol=2**-10)


def test_a_row_has_the_same_bits_alone_and_among_others() -> None:
    q, projected, rotations, heads = inputs(4, SIZES[1])
    together = qkv(q, projected, rotations, heads)
    alone = qkv(q[2:3], projected[2:3], rotations[2:3], heads)
    for one, other in zip(alone, together, strict=True):
        assert torch.equal(one[0], other[2])


def test_rows_lie_beyond_32_bits() -> None:
    q, projected, rotations, heads = inputs(3, SIZES[1])
    stride = 1 << 30
    memory = torch.frombuffer(mmap.mmap(-1, 2 * (2 * stride + 1024)), dtype=torch.bfloat16)
    far_q, far_projected = (memory.as_strided(x.shape, (stride, 1), at) for x, at in ((q, 0), (projected, 700)))
    far_q.copy_(q)
    far_projected.copy_(projected)
    near = qkv(q.bfloat16(), projected.bfloat16(), rotations, heads)
    for one, other in zip(qkv(far_q, far_projected, rotations, heads), near, strict=True):
        assert torch.equal(one, other)


def test_no_rows_are_no_launch() -> None:
    q, projected, rotations, heads = inputs(1, SIZES[1])
    before = sum(LAUNCHES.values())
    assert qkv(q[:0], projected[:0], rotations[:0], heads)[0].shape == (0, 4, 96)
    assert sum(LAUNCHES.values()) == before
