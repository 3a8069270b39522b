"""Queries, key-value rows and index queries agree with their torch twins and with float64.

Rows are quantised and stored by the same kernel: with the bits of a kernel that only does that.
"""

from __future__ import annotations

import mmap
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from agentkit_kernels.ops import Heads
from agentkit_kernels.reference.qkv import qkv as reference
from agentkit_kernels.reference.quantize import kv_row_bytes, round_index
from agentkit_kernels.reference.rope import rotations_at
from agentkit_kernels.triton.launch import LAUNCHES
from agentkit_kernels.triton.qkv import qkv
from agentkit_kernels.triton.quantize import store_kv_rows

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


RING = 7


@dataclass
class Window:
    """The window that rows are stored in, each in a slot of its own; whatever no row has been stored in is NaN."""

    pool: Tensor
    positions: Tensor
    sequences: Tensor
    slots: Tensor

    @classmethod
    def empty(cls, rows: int, size: int, rotary: int = 0, *, fp8: bool = False) -> Window:
        if fp8:
            pool = torch.full((rows + 1, RING, kv_row_bytes(size, rotary)), 0xAB, dtype=torch.uint8)
        else:
            pool = torch.full((rows + 1, RING, 2 * size), torch.nan)[:, :, :size]
        slots = torch.arange(rows + 1).flip(0)[1:]  # the last slot, which no row has, is before them in memory
        return cls(pool, torch.arange(rows) * 1009, torch.arange(rows), slots)

    @property
    def places(self) -> tuple[Tensor, Tensor]:
        """The slot and the row of the ring of each row."""
        return self.slots[self.sequences], self.positions % RING

    def run(
        self, q: Tensor, projected: Tensor, rotations: Tensor, heads: Heads, *, store: bool = True, fp4: bool = False
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return qkv(
            q, projected, rotations, heads, self.positions, self.sequences, self.slots, self.pool, store=store, fp4=fp4
        )


def run(
    q: Tensor, projected: Tensor, rotations: Tensor, heads: Heads, *, fp4: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute rows of float32, stored in a window."""
    return Window.empty(len(q), heads.head_dim).run(q, projected, rotations, heads, fp4=fp4)


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("rows", [1, 3])
def test_all_parts_of_a_row_equal_the_twin(rows: int, sizes: tuple[int, ...]) -> None:
    q, projected, rotations, heads = inputs(rows, sizes)
    before = LAUNCHES["_qkv"]
    actual = run(q, projected, rotations, heads)
    assert LAUNCHES["_qkv"] == before + 1
    for one, other in zip(actual, reference(q, projected, rotations, heads), strict=True):
        torch.testing.assert_close(one, other.reshape(one.shape), rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("store", [True, False])
def test_rows_are_stored_at_their_places_unless_they_are_padding(store: bool) -> None:
    arguments = inputs(3, SIZES[1])
    window = Window.empty(3, 96)
    window.sequences[1] = -1
    _, rows, *_ = window.run(*arguments, store=store)
    assert bool(rows.isfinite().all())
    expected = torch.full_like(window.pool, torch.nan)
    if store:
        expected[2, 0], expected[0, 2018 % RING] = rows[0], rows[2]
    torch.testing.assert_close(window.pool, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("sizes", [SIZES[1], SIZES[3]], ids=str)
def test_rows_in_fp8_have_the_bits_of_rows_that_are_quantised_apart(sizes: tuple[int, ...], dtype: torch.dtype) -> None:
    _, size, rotary, *_ = sizes
    arguments = inputs(3, sizes, dtype)
    packed, plain = Window.empty(3, size, rotary, fp8=True), Window.empty(3, size)
    found, expected = packed.run(*arguments), plain.run(*arguments)
    page, pool = torch.empty_like(found[1])[None], torch.full_like(packed.pool, 0xAB)
    store_kv_rows(expected[1], torch.arange(3), page, rotary=rotary)
    slots, places = packed.places
    store_kv_rows(expected[1], slots * RING + places, pool, rotary=rotary)
    assert torch.equal(found[1], page[0])
    assert torch.equal(packed.pool, pool)
    for one, other in zip(found[2:], expected[2:], strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("sizes", [(4, 96, 32, 8, 32), (1, 64, 64, 3, 64), (2, 64, 64, 33, 128)], ids=str)
def test_index_queries_in_fp4_are_the_twins_of_those_that_are_not_rounded(sizes: tuple[int, ...]) -> None:
    arguments = inputs(2, sizes)
    plain, rounded = run(*arguments), run(*arguments, fp4=True)
    assert torch.equal(rounded[2], round_index(plain[2]))
    assert not torch.equal(rounded[2], plain[2])
    for one, other in zip(rounded[:2] + rounded[3:], plain[:2] + plain[3:], strict=True):
        assert torch.equal(one, other)


def test_kernel_and_twin_agree_with_float64() -> None:
    q, projected, rotations, heads = inputs(3, SIZES[1])
    wide = q.double(), projected.double(), rotations.double(), heads._replace(kv_norm=heads.kv_norm.double())
    x = wide[0][:, : 4 * 96].view(3, 4, 96)
    x = x * (x.square().mean(2, keepdim=True) + 1e-6).rsqrt() * 96**-0.5
    cosine, sine = wide[2][:, None, 0::2], wide[2][:, None, 1::2]
    even, odd = x[..., 64::2], x[..., 65::2]
    rotated = torch.stack((even * cosine - odd * sine, even * sine + odd * cosine), -1).flatten(2)
    exact = torch.cat((x[..., :64], rotated), 2)
    for actual in (run(q, projected, rotations, heads)[0], reference(q, projected, rotations, heads)[0]):
        torch.testing.assert_close(actual.double(), exact, rtol=2e-6, atol=2e-6)


def test_bfloat16_inputs_stay_close_to_the_twin() -> None:
    q, projected, rotations, heads = inputs(2, SIZES[1], torch.bfloat16)
    actual = run(q, projected, rotations, heads)
    assert [x.dtype for x in actual] == [torch.bfloat16, torch.float32, torch.bfloat16, torch.float32]
    assert torch.equal(actual[1], actual[1].bfloat16().float())  # rounded as the others are
    for one, other in zip(actual, reference(q.float(), projected.float(), rotations, heads), strict=True):
        torch.testing.assert_close(one.float(), other, rtol=2**-7, atol=2**-10)


@pytest.mark.parametrize("fp8", [False, True])
def test_a_row_has_the_same_bits_alone_and_among_others(fp8: bool) -> None:
    q, projected, rotations, heads = inputs(4, SIZES[1])
    windows = [Window.empty(rows, 96, 32, fp8=fp8) for rows in (4, 1)]
    windows[1].positions[0] = windows[0].positions[2]
    together = windows[0].run(q, projected, rotations, heads, fp4=True)
    alone = windows[1].run(q[2:3], projected[2:3], rotations[2:3], heads, fp4=True)
    for number, (one, other) in enumerate(zip(alone, together, strict=True)):
        if fp8 and number == 1:  # a page, in which the scales follow all rows
            assert torch.equal(one[0], torch.cat((other.flatten()[2 * 128 : 3 * 128], other.flatten()[-16:-8])))
        else:
            assert torch.equal(one[0], other[2])
    assert torch.equal(windows[1].pool[0, 2018 % RING], windows[0].pool[1, 2018 % RING])


@pytest.mark.parametrize("fp8", [False, True])
def test_rows_and_windows_lie_beyond_32_bits(fp8: bool) -> None:
    q, projected, rotations, heads = inputs(3, SIZES[1])
    stride = 1 << 30
    memory = torch.frombuffer(mmap.mmap(-1, 2 * (2 * stride + 1024)), dtype=torch.bfloat16)
    far_q, far_projected = (memory.as_strided(x.shape, (stride, 1), at) for x, at in ((q, 0), (projected, 700)))
    far_q.copy_(q)
    far_projected.copy_(projected)
    near, far = (Window.empty(3, 96, 32, fp8=fp8) for _ in range(2))
    pool = torch.frombuffer(mmap.mmap(-1, 3 * (1 << 30) * near.pool.itemsize + (1 << 20)), dtype=near.pool.dtype)
    far.pool = pool.as_strided(near.pool.shape, (1 << 30, near.pool.shape[2], 1)).copy_(near.pool)
    expected = near.run(q.bfloat16(), projected.bfloat16(), rotations, heads)
    for one, other in zip(far.run(far_q, far_projected, rotations, heads), expected, strict=True):
        assert torch.equal(one, other)
    torch.testing.assert_close(far.pool, near.pool, rtol=0, atol=0, equal_nan=True)


def test_no_rows_are_no_launch() -> None:
    q, projected, rotations, heads = inputs(1, SIZES[1])
    before = sum(LAUNCHES.values())
    assert run(q[:0], projected[:0], rotations[:0], heads)[0].shape == (0, 4, 96)
    assert sum(LAUNCHES.values()) == before


def test_windows_and_index_sizes_that_do_not_fit_are_refused() -> None:
    arguments = inputs(1, SIZES[1])
    with pytest.raises(ValueError, match=r"rows of 96 elements, got torch.float32 \(2, 7, 80\)"):
        Window.empty(1, 80).run(*arguments)
    with pytest.raises(ValueError, match=r"rows of 136 elements, got torch.uint8 \(2, 7, 200\)"):
        Window.empty(1, 160, 32, fp8=True).run(*arguments)
    with pytest.raises(ValueError, match="power of two of at least 32 columns, got 16"):
        run(*inputs(1, (1, 64, 16, 2, 16)), fp4=True)
