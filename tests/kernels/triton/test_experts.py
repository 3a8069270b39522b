"""Mixture of experts against its formula in float64, on even and uneven choices of experts."""

from __future__ import annotations

import mmap
from collections.abc import Sequence
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from agentkit_kernels.calls import FLASH, TINY, Shapes
from agentkit_kernels.ops import Plan
from agentkit_kernels.packed import Format, Packed
from agentkit_kernels.reference import Reference
from agentkit_kernels.reference.formats import dequantise
from agentkit_kernels.triton.experts import (
    EXACT_TILE,
    FEW_PAIRS,
    LARGE_TILE,
    _grouped_in_turn,
    calls,
    combine,
    experts,
    group,
)
from agentkit_kernels.triton.launch import LAUNCHES

EXPERTS, ACTIVE, LIMIT = 6, 2, 1.5
FORMATS: tuple[Format | None, ...] = (None, "fp8", "mxfp4", "int8")


def stack(number_format: Format | None, outputs: int, inputs: int) -> Tensor | Packed:
    shape = (EXPERTS, outputs, inputs)
    if number_format is None:
        return torch.randn(shape) / 4
    if number_format == "int8":
        data = torch.randint(-128, 128, shape, dtype=torch.int8)
        return Packed("int8", data, torch.rand(EXPERTS, outputs) / 256, shape)
    if number_format == "fp8":
        data, scales = torch.randn(shape).to(torch.float8_e4m3fn), (EXPERTS, -(-outputs // 128), -(-inputs // 128))
    else:
        data = torch.randint(0, 256, (EXPERTS, outputs, inputs // 2), dtype=torch.uint8)
        scales = (EXPERTS, outputs, inputs // 32)
    scale = torch.randint(123, 126, scales, dtype=torch.uint8).view(torch.float8_e8m0fnu)
    return Packed(number_format, data, scale, shape)


def weights(number_format: Format | None, width: int, size: int) -> tuple[Tensor | Packed, ...]:
    return stack(number_format, width, size), stack(number_format, width, size), stack(number_format, size, width)


def dense(weight: Tensor | Packed) -> Tensor:
    return (dequantise(weight) if isinstance(weight, Packed) else weight).double()


def formula(
    x: Tensor,
    chosen: Tensor,
    routing: Tensor,
    w1: Tensor | Packed,
    w3: Tensor | Packed,
    w2: Tensor | Packed,
    shared: Tensor,
) -> Tensor:
    out = torch.zeros(x.shape, dtype=torch.float64)
    for a in range(chosen.shape[1]):
        gate, up = (torch.einsum("nd,nid->ni", x.double(), dense(w)[chosen[:, a]]) for w in (w1, w3))
        hidden = F.silu(gate.clamp(max=LIMIT)) * up.clamp(-LIMIT, LIMIT) * routing[:, a, None].double()
        out += torch.einsum("ni,ndi->nd", hidden, dense(w2)[chosen[:, a]])
    return (out + shared.double()).float()


def choice(rows: int) -> Tensor:
    """Return distinct experts for each row; expert 3 has no rows."""
    return torch.stack([torch.tensor([0, 1, 2, 4, 5])[torch.randperm(5)[:ACTIVE]] for _ in range(rows)])


def assert_experts(rows: int, chosen: Tensor, number_format: Format | None, width: int, size: int) -> None:
    x, routing, shared = torch.randn(rows, size), torch.rand(chosen.shape), torch.randn(rows, size)
    w1, w3, w2 = weights(number_format, width, size)
    result = experts(x, chosen, routing, w1, w3, w2, LIMIT, shared)
    torch.testing.assert_close(result, formula(x, chosen, routing, w1, w3, w2, shared), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("number_format", FORMATS)
@pytest.mark.parametrize("rows", [1, 7, FEW_PAIRS // ACTIVE + 1])
def test_experts_match_float64(number_format: Format | None, rows: int) -> None:
    assert_experts(rows, choice(rows), number_format, width=96, size=160)


@pytest.mark.parametrize(("width", "size"), [(33, 70), (1, 5), (129, 129)])
@pytest.mark.parametrize("rows", [3, 65])
def test_sizes_around_tile_edges_match(width: int, size: int, rows: int) -> None:
    assert_experts(rows, choice(rows), None, width, size)


@pytest.mark.parametrize("rows", [31, 32, 33, 64, 129])
def test_all_rows_of_one_expert_match(rows: int) -> None:
    assert_experts(rows, torch.tensor([[3, 5]]).repeat(rows, 1), None, width=32, size=48)


def test_bfloat16_rows_match() -> None:
    rows, chosen = 40, choice(40)
    x, routing, shared = torch.randn(rows, 64).bfloat16(), torch.rand(rows, ACTIVE), torch.randn(rows, 64).bfloat16()
    w1, w3, w2 = weights("mxfp4", 96, 64)[:3]
    result = experts(x, chosen, routing, w1, w3, w2, LIMIT, shared)
    assert result.dtype == torch.bfloat16
    torch.testing.assert_close(result.float(), formula(x, chosen, routing, w1, w3, w2, shared), rtol=2**-6, atol=0.1)


@pytest.mark.parametrize("number_format", FORMATS)
def test_a_row_has_the_same_bits_alone_and_among_others(number_format: Format | None) -> None:
    rows = FEW_PAIRS // ACTIVE + 3
    x, chosen, routing, shared = torch.randn(rows, 160), choice(rows), torch.rand(rows, ACTIVE), torch.randn(rows, 160)
    w1, w3, w2 = weights(number_format, 32, 160)
    together = experts(x, chosen, routing, w1, w3, w2, LIMIT, shared)
    for start, end in pairwise([0, 1, 6]):
        part = slice(start, end)
        alone = experts(x[part], chosen[part], routing[part], w1, w3, w2, LIMIT, shared[part])
        assert torch.equal(alone, together[part])


def test_experts_match_the_reference_backend() -> None:
    rows = 32  # the reference pads a forward to a multiple of this
    reference = Reference()
    x, routing, shared = torch.randn(rows, 96), torch.rand(rows, ACTIVE), torch.randn(rows, 96)
    w1, w3, w2 = (torch.randn(EXPERTS, *shape) / 4 for shape in ((33, 96), (33, 96), (96, 33)))
    chosen = choice(rows)
    batch = reference.batch(Plan([0] * rows, [rows], [0], [0], [[0]]))
    expected = reference.experts(x, chosen, routing, reference.stack(w1, w3), reference.stack(w2), LIMIT, shared, batch)
    torch.testing.assert_close(experts(x, chosen, routing, w1, w3, w2, LIMIT, shared), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("number_format", FORMATS)
def test_inexact_tiles_match(number_format: Format | None) -> None:
    rows = EXACT_TILE.rows * EXPERTS // ACTIVE + 1
    chosen = choice(rows)
    assert group(chosen, EXPERTS, exact=False).tile is LARGE_TILE
    x, routing, shared = torch.randn(rows, 96).bfloat16(), torch.rand(rows, ACTIVE), torch.randn(rows, 96)
    w1, w3, w2 = (one.bfloat16() if isinstance(one, Tensor) else one for one in weights(number_format, 64, 96))
    result = experts(x, chosen, routing, w1, w3, w2, LIMIT, shared, exact=False)
    torch.testing.assert_close(result, formula(x, chosen, routing, w1, w3, w2, shared), rtol=2**-6, atol=0.1)


@pytest.mark.parametrize("number", [5, 8, 256])
@pytest.mark.parametrize("rows", [22, 43, 128, 1500])
def test_pairs_are_sorted_stably_and_cut_into_tiles(rows: int, number: int) -> None:
    chosen = (torch.rand(rows, 3) ** 3 * number).long()
    groups = group(chosen, number)
    flat = chosen.flatten()
    assert torch.equal(groups.order, flat.argsort(stable=True))
    expected: list[list[int]] = []
    counts = torch.bincount(flat, minlength=number).tolist()
    for expert, count in enumerate(counts):
        place, tile = sum(counts[:expert]), EXACT_TILE.rows
        expected += [[expert, place + first, min(tile, count - first)] for first in range(0, count, tile)]
    table = groups.table.tolist()
    assert table[: len(expected)] == expected
    assert [rows for _, _, rows in table[len(expected) :]] == [0] * (groups.tiles - len(expected))


def test_few_pairs_launch_no_sorting() -> None:
    before = LAUNCHES.total()
    groups = group(torch.zeros(FEW_PAIRS // 2, 2, dtype=torch.int64), EXPERTS)
    assert groups.direct and groups.tiles == FEW_PAIRS and LAUNCHES.total() == before


def test_views_are_read_in_place() -> None:
    rows = 5
    fused = torch.full((rows, 200), torch.nan)
    x, shared = fused[:, 3:67].copy_(torch.randn(rows, 64)), fused[:, 99:163].copy_(torch.randn(rows, 64))
    chosen, routing = choice(2 * rows)[::2], torch.rand(ACTIVE, rows).t()
    w1, w3, w2 = weights(None, 32, 64)
    result = experts(x, chosen, routing, w1, w3, w2, LIMIT, shared)
    torch.testing.assert_close(result, formula(x, chosen, routing, w1, w3, w2, shared), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rows", [3, FEW_PAIRS])
def test_other_experts_weights_and_rows_do_not_leak(rows: int) -> None:
    w1, w3, w2 = (torch.randn(EXPERTS, *shape) for shape in ((33, 70), (33, 70), (70, 33)))
    for weight in (w1, w3, w2):
        weight[[0, 3, 5]] = torch.nan
    chosen = torch.tensor([[4, 1], [1, 2]]).repeat(rows, 1)[:rows]
    x, routing, shared = torch.randn(rows, 70), torch.rand(rows, ACTIVE), torch.randn(rows, 70)
    x[1, 69] = torch.nan
    result = experts(x, chosen, routing, w1, w3, w2, LIMIT, shared)
    assert result[1].isnan().all()
    others = torch.arange(rows) != 1
    expected = formula(x, chosen, routing, w1, w3, w2, shared)
    torch.testing.assert_close(result[others], expected[others], rtol=1e-4, atol=1e-4)


def test_experts_are_added_in_the_order_of_their_choice() -> None:
    rows = torch.tensor([[1e8], [-1e8], [1.0], [1.0], [1e8], [-1e8]])
    shared = torch.zeros(2, 1)
    assert combine(rows, shared).tolist() == [[1.0], [0.0]]


def test_no_rows_launch_nothing() -> None:
    before = LAUNCHES.total()
    none = torch.empty(0, 64)
    chosen = torch.empty(0, ACTIVE, dtype=torch.int64)
    w1, w3, w2 = weights(None, 32, 64)
    assert experts(none, chosen, torch.empty(0, ACTIVE), w1, w3, w2, LIMIT, none).shape == (0, 64)
    assert LAUNCHES.total() == before


@pytest.mark.parametrize("rows", [2, FEW_PAIRS])
def test_addresses_are_64_bit(rows: int) -> None:
    stride = 2**31 // (EXPERTS - 2) + 64
    memory = torch.frombuffer(mmap.mmap(-1, 4 * (EXPERTS * stride)), dtype=torch.float32)  # pages appear when written
    w1 = memory.as_strided((EXPERTS, 4, 64), (stride, 64, 1)).copy_(torch.randn(EXPERTS, 4, 64))
    w3 = memory[1024:].as_strided((EXPERTS, 4, 64), (stride, 64, 1)).copy_(torch.randn(EXPERTS, 4, 64))
    w2 = memory[2048:].as_strided((EXPERTS, 64, 4), (stride, 4, 1)).copy_(torch.randn(EXPERTS, 64, 4))
    chosen = torch.tensor([[5, 4]]).repeat(rows, 1)
    x, routing, shared = torch.randn(rows, 64), torch.rand(rows, ACTIVE), torch.randn(rows, 64)
    result = experts(x, chosen, routing, w1, w3, w2, LIMIT, shared)
    torch.testing.assert_close(result, formula(x, chosen, routing, w1, w3, w2, shared), rtol=1e-4, atol=1e-4)


def test_weights_that_disagree_are_refused() -> None:
    x, chosen, routing = torch.randn(2, 64), choice(2), torch.rand(2, ACTIVE)
    w1, w3, w2 = weights(None, 32, 64)
    with pytest.raises(ValueError, match="one format"):
        experts(x, chosen, routing, w1, stack("fp8", 32, 64), w2, LIMIT, x)
    with pytest.raises(ValueError, match=r"w2 \[E, D, I\]"):
        experts(x, chosen, routing, w1, w3, w1, LIMIT, x)


def test_calls_group_as_the_kernels_do() -> None:
    real = _Real()
    listed = _grouped_in_turn(70, 5, True, real)
    groups = group(listed.experts, 5)
    assert (groups.tile, groups.tiles, groups.direct) == (listed.tile, listed.tiles, listed.direct)
    assert torch.equal(groups.order, listed.order)
    used = listed.table[:, 2] > 0
    assert torch.equal(groups.table[used], listed.table[used]) and not groups.table[~used, 2].any()


class _Real:
    """Tensors in memory."""

    def floats(self, *shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.randn(shape).to(dtype)

    def ints(self, values: Sequence[int] | range, dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.tensor(values, dtype=dtype)


class _Meta:
    """Tensors without memory."""

    def floats(self, *shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.empty(*shape, dtype=dtype, device="meta")

    def ints(self, values: Sequence[int] | range, dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.empty(len(values), dtype=dtype, device="meta")


@pytest.mark.parametrize("shapes", [FLASH, TINY])
def test_calls_count_the_bytes_of_the_chosen_experts(shapes: Shapes) -> None:
    of = {call.name: call for call in calls(shapes, 1, _Meta())}
    active, values = shapes.num_experts_per_tok, shapes.moe_intermediate_size * shapes.hidden_size
    assert of["down, mxfp4"].bytes - of["down, bfloat16"].bytes == active * (values * 17 // 32 - 2 * values)
