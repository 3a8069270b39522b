"""Mixture of experts: each token's A of E routed experts, weighted, plus the shared one: [N, D] to [N, D].

    out = sum_a w2[e_a] · (weight_a * swiglu(w1[e_a] · x, w3[e_a] · x)) + shared

1. `group` sorts the (token, expert) pairs by expert, stably, and cuts each expert's pairs into tiles of rows.
2. `gate_up` multiplies each tile by its expert's w1 and w3; SwiGLU and the routing weight are its epilogue.
3. `down` multiplies by w2, and writes each row at its pair's place.
4. `combine` sums a token's rows in the order of its choice, in float32, adds the shared expert, and casts once.

A few pairs need no sorting: each is a tile of one row, and reads its expert's weights alone. The host never waits for
the device: tiles are launched for the most that E experts can need, and those beyond the last return at once.

**Exactness.** A tile's rows are computed alike whatever their number, and nothing is split, so a row's bits depend
neither on the other rows nor on the sorting. `exact=False` takes larger tiles for many rows. There are no atomics: a
pair's place is the number of pairs before it, counted by comparison.

Floor of a decoding step: the bytes of the chosen experts' weights. One token of V4-Flash reads 6 x 3 x 2048 x 4096
MXFP4 values: 80.2 MB per layer. Many rows are bound by 6 N A D I flops.

Weights are those of `linear`: bfloat16, float32, or `Packed` stacks [E, X, K].
Source: the DeepSeek-V4 reference; Gale et al. 2022 (MegaBlocks, arXiv:2211.15841) for grouped products.
Dimension key: N tokens, A active experts, E experts, D hidden size, I expert width, P = N A pairs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from agentkit_kernels.calls import Call, Make, Shapes, with_dtype
from agentkit_kernels.packed import Packed
from agentkit_kernels.triton.formats import scale_to_float
from agentkit_kernels.triton.launch import launch
from agentkit_kernels.triton.linear import Operand, Tile, accumulate, capability, operand, random_weight, stages
from agentkit_kernels.triton.swiglu import clamped_swiglu

EXACT_TILE = Tile(rows=32, outputs=64, inputs=128, warps=4, stages=3)
LARGE_TILE = Tile(rows=128, outputs=64, inputs=64, warps=8, stages=3)
FEW_PAIRS = 64
"""Up to this many pairs are not sorted."""
PAIRS = 128
"""Pairs that one program counts and places."""


@triton.jit
def _count(experts, counts, pairs, BLOCK: tl.constexpr, EXPERTS: tl.constexpr):
    """Count each expert's pairs within one block of pairs."""
    block = tl.program_id(0).to(tl.int64)
    offsets = block * BLOCK + tl.arange(0, BLOCK)
    expert = tl.load(experts + offsets, mask=offsets < pairs, other=-1).to(tl.int32)
    columns = tl.arange(0, EXPERTS)
    count = tl.sum((expert[:, None] == columns[None, :]).to(tl.int32), axis=0)
    tl.store(counts + block * EXPERTS + columns, count)


@triton.jit
def _offsets(counts, places, starts, totals, blocks, CHUNK: tl.constexpr, EXPERTS: tl.constexpr):
    """Turn each block's counts into the place of its first pair of each expert. One program."""
    columns = tl.arange(0, EXPERTS)
    chunk = tl.arange(0, CHUNK)
    total = tl.zeros((EXPERTS,), tl.int32)
    for first in range(0, blocks, CHUNK):
        at = counts + (first + chunk).to(tl.int64)[:, None] * EXPERTS + columns[None, :]
        total += tl.sum(tl.load(at, mask=(first + chunk < blocks)[:, None], other=0), axis=0)
    start = tl.cumsum(total, axis=0) - total
    tl.store(starts + columns, start)
    tl.store(totals + columns, total)
    for first in range(0, blocks, CHUNK):
        at = (first + chunk).to(tl.int64)[:, None] * EXPERTS + columns[None, :]
        inside = (first + chunk < blocks)[:, None]
        count = tl.load(counts + at, mask=inside, other=0)
        tl.store(places + at, start[None, :] + tl.cumsum(count, axis=0) - count, mask=inside)
        start += tl.sum(count, axis=0)


@triton.jit
def _place(
    experts,
    places,
    starts,
    totals,
    order,
    table,
    pairs,
    tiles,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
    TILES: tl.constexpr,
    EXPERTS: tl.constexpr,
):
    """Write one block's pairs in sorted order, and one block of the table of tiles: expert, first place, rows."""
    block = tl.program_id(0).to(tl.int64)
    offsets = block * BLOCK + tl.arange(0, BLOCK)
    inside = offsets < pairs
    expert = tl.load(experts + offsets, mask=inside, other=-1).to(tl.int32)
    earlier = tl.arange(0, BLOCK)[None, :] < tl.arange(0, BLOCK)[:, None]
    others = tl.trans(tl.broadcast_to(expert[:, None], (BLOCK, BLOCK)))
    rank = tl.sum((earlier & (others == expert[:, None])).to(tl.int32), axis=1)
    place = tl.load(places + block * EXPERTS + expert, mask=inside, other=0) + rank
    tl.store(order + place, offsets, mask=inside)

    columns = tl.arange(0, EXPERTS)
    start = tl.load(starts + columns)
    total = tl.load(totals + columns)
    number = (total + TILE - 1) // TILE
    end = tl.cumsum(number, axis=0)
    tile = (block * TILES + tl.arange(0, TILES)).to(tl.int32)
    # A tile's expert is the only one whose tiles begin at or before it and end after it; no expert, no rows.
    its = ((end - number)[None, :] <= tile[:, None]) & (tile[:, None] < end[None, :])
    done = (tile[:, None] - (end - number)[None, :]) * TILE
    at = table + tile.to(tl.int64) * 3
    tl.store(at, tl.sum(tl.where(its, columns[None, :], 0), axis=1), mask=tile < tiles)
    tl.store(at + 1, tl.sum(tl.where(its, start[None, :] + done, 0), axis=1), mask=tile < tiles)
    rows = tl.sum(tl.where(its, total[None, :] - done, 0), axis=1)
    tl.store(at + 2, tl.minimum(rows, TILE), mask=tile < tiles)


@triton.jit
def _tile(experts, table, tile, DIRECT: tl.constexpr):
    """Return a tile's expert, first place and rows."""
    if DIRECT:
        expert, start, rows = tl.load(experts + tile).to(tl.int64), tile, tl.full((), 1, tl.int32)
    else:
        at = table + tile * 3
        expert, start, rows = tl.load(at).to(tl.int64), tl.load(at + 1).to(tl.int64), tl.load(at + 2)
    return expert, start, rows


@triton.jit
def _gate_up(
    x,
    experts,
    weights,
    order,
    table,
    w1,
    s1,
    w3,
    s3,
    hidden,
    stride_xn,
    stride_xk,
    stride_we,
    stride_se,
    limit,
    ACTIVE: tl.constexpr,
    X: tl.constexpr,
    K: tl.constexpr,
    FORMAT: tl.constexpr,
    DIRECT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_X: tl.constexpr,
    BLOCK_K: tl.constexpr,
    OPERAND: tl.constexpr,
):
    """hidden[place] = routing weight * swiglu(w1 · x, w3 · x), for one tile of rows and BLOCK_X hidden columns."""
    # Programs of one tile of rows run together: an expert's weights come from memory once for all its tiles.
    across: tl.constexpr = (X + BLOCK_X - 1) // BLOCK_X
    column = (tl.program_id(0) % across) * BLOCK_X
    expert, start, rows = _tile(experts, table, (tl.program_id(0) // across).to(tl.int64), DIRECT)
    if rows == 0:
        return
    ns = tl.arange(0, BLOCK_N)
    inside_n = ns < rows
    places = start + ns
    pairs = places
    if not DIRECT:
        pairs = tl.load(order + places, mask=inside_n, other=0)
    x_rows = x + (pairs // ACTIVE)[None, :] * stride_xn
    w1 += expert * stride_we
    w3 += expert * stride_we
    s1 += expert * stride_se
    s3 += expert * stride_se

    gate = tl.zeros((BLOCK_X, BLOCK_N), tl.float32)
    up = tl.zeros((BLOCK_X, BLOCK_N), tl.float32)
    for k in range(0, K, BLOCK_K):
        ks = k + tl.arange(0, BLOCK_K)
        inside = inside_n[None, :]
        if K % BLOCK_K != 0:
            inside = inside & (ks < K)[:, None]
        values = tl.load(x_rows + ks.to(tl.int64)[:, None] * stride_xk, mask=inside, other=0.0).to(OPERAND)
        gate = accumulate(gate, values, w1, s1, column, k, X, K, FORMAT, BLOCK_X, BLOCK_K, OPERAND)
        up = accumulate(up, values, w3, s3, column, k, X, K, FORMAT, BLOCK_X, BLOCK_K, OPERAND)

    columns = column + tl.arange(0, BLOCK_X)
    if FORMAT == "int8":
        gate *= scale_to_float(tl.load(s1 + columns, mask=columns < X, other=0))[:, None]
        up *= scale_to_float(tl.load(s3 + columns, mask=columns < X, other=0))[:, None]
    weight = tl.load(weights + pairs, mask=inside_n, other=0.0).to(tl.float32)
    value = clamped_swiglu(gate, up, limit) * weight[None, :]
    inside = (columns < X)[:, None] & inside_n[None, :]
    tl.store(hidden + places[None, :] * X + columns[:, None], value.to(hidden.dtype.element_ty), mask=inside)


@triton.jit
def _down(
    hidden,
    experts,
    order,
    table,
    w2,
    s2,
    out,
    stride_we,
    stride_se,
    X: tl.constexpr,
    K: tl.constexpr,
    FORMAT: tl.constexpr,
    DIRECT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_X: tl.constexpr,
    BLOCK_K: tl.constexpr,
    OPERAND: tl.constexpr,
):
    """out[pair] = w2 · hidden[place], for one tile of rows and BLOCK_X output columns."""
    across: tl.constexpr = (X + BLOCK_X - 1) // BLOCK_X
    column = (tl.program_id(0) % across) * BLOCK_X
    expert, start, rows = _tile(experts, table, (tl.program_id(0) // across).to(tl.int64), DIRECT)
    if rows == 0:
        return
    ns = tl.arange(0, BLOCK_N)
    inside_n = ns < rows
    places = start + ns
    w2 += expert * stride_we
    s2 += expert * stride_se
    total = tl.zeros((BLOCK_X, BLOCK_N), tl.float32)
    for k in range(0, K, BLOCK_K):
        ks = k + tl.arange(0, BLOCK_K)
        inside = inside_n[None, :]
        if K % BLOCK_K != 0:
            inside = inside & (ks < K)[:, None]
        values = tl.load(hidden + places[None, :] * K + ks[:, None], mask=inside, other=0.0).to(OPERAND)
        total = accumulate(total, values, w2, s2, column, k, X, K, FORMAT, BLOCK_X, BLOCK_K, OPERAND)
    columns = column + tl.arange(0, BLOCK_X)
    if FORMAT == "int8":
        total *= scale_to_float(tl.load(s2 + columns, mask=columns < X, other=0))[:, None]
    pairs = places
    if not DIRECT:
        pairs = tl.load(order + places, mask=inside_n, other=0)
    inside = (columns < X)[:, None] & inside_n[None, :]
    tl.store(out + pairs[None, :] * X + columns[:, None], total.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _combine(rows, shared, out, stride_sn, stride_sk, X: tl.constexpr, ACTIVE: tl.constexpr, BLOCK: tl.constexpr):
    """Sum one token's rows in order, then the shared expert's."""
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < X
    total = tl.zeros((BLOCK,), tl.float32)
    for active in tl.static_range(ACTIVE):
        total += tl.load(rows + (token * ACTIVE + active) * X + columns, mask=inside, other=0.0).to(tl.float32)
    at = shared + token * stride_sn + columns.to(tl.int64) * stride_sk
    total += tl.load(at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + token * X + columns, total.to(out.dtype.element_ty), mask=inside)


@dataclass(frozen=True, slots=True)
class Groups:
    """The (token, expert) pairs of a forward, grouped into tiles of one expert each.

    Attributes:
        experts: Each pair's expert, int64 [P].
        order: The pairs sorted by expert, int64 [P]; unused if `direct`.
        table: Expert, first place in `order`, and number of rows of each tile, int32 [tiles, 3]; unused if `direct`.
        tiles: The most tiles that there can be; those beyond the last have no rows.
        tile: The sizes of a tile.
        direct: Whether each pair is a tile of its own.
    """

    experts: Tensor
    order: Tensor
    table: Tensor
    tiles: int
    tile: Tile
    direct: bool


def group(experts_NA: Tensor, number: int, *, exact: bool = True) -> Groups:
    """Group pairs by expert, in the order of the tokens within an expert.

    Args:
        experts_NA: Each token's experts, int64 [N, A], all within `number`.
        number: How many experts there are.
        exact: Whether a row's bits may not depend on the number of rows.
    """
    experts = experts_NA.reshape(-1)
    pairs = len(experts)
    tile, tiles = _tiles(pairs, number, exact)
    if pairs <= FEW_PAIRS:
        return Groups(experts, experts, experts, tiles, tile, direct=True)
    padded = triton.next_power_of_2(number)
    blocks = triton.cdiv(pairs, PAIRS)
    counts, places = experts.new_empty(2, blocks, padded, dtype=torch.int32)
    starts, totals = experts.new_empty(2, padded, dtype=torch.int32)
    order = torch.empty_like(experts)
    table = experts.new_empty(tiles, 3, dtype=torch.int32)
    launch(_count, (blocks,), experts, counts, pairs, BLOCK=PAIRS, EXPERTS=padded)
    chunk = max(32, 2048 // padded)  # four counts or more per thread
    launch(_offsets, (1,), counts, places, starts, totals, blocks, CHUNK=chunk, EXPERTS=padded, num_warps=8)
    launch(
        _place,
        (max(blocks, triton.cdiv(tiles, 32)),),
        experts,
        places,
        starts,
        totals,
        order,
        table,
        pairs,
        tiles,
        TILE=tile.rows,
        BLOCK=PAIRS,
        TILES=32,
        EXPERTS=padded,
    )
    return Groups(experts, order, table, tiles, tile, direct=False)


def _tiles(pairs: int, number: int, exact: bool) -> tuple[Tile, int]:
    """Return the sizes of a tile, and the most tiles that there can be."""
    large = not exact and pairs > EXACT_TILE.rows * number and not _before_hopper()
    tile = LARGE_TILE if large else EXACT_TILE
    return tile, min(pairs, (pairs + number * (tile.rows - 1)) // tile.rows) if pairs > FEW_PAIRS else pairs


def _before_hopper() -> bool:
    """True if both operands of a product are in registers, beside the sums."""
    return 0 < capability() < 90


def _fit(tile: Tile, weight: Operand) -> Tile:
    """Return the tile for a weight: with loads as wide for MXFP4, which has two codes in a byte, and with twice the
    warps where decoding FP8 takes more registers than half of them have."""
    if tile is LARGE_TILE and weight.format == "mxfp4":
        return tile._replace(inputs=2 * tile.inputs)
    return tile._replace(warps=8) if weight.format == "fp8" and _before_hopper() else tile


def _multiply(kernel: Any, groups: Groups, weight: Operand, x: Tensor, *args: Any, **options: int) -> None:
    """Launch a kernel over all tiles of rows `x` and all columns of a weight."""
    tile = weight.fit(_fit(groups.tile, weight), x)
    launch(
        kernel, (groups.tiles * triton.cdiv(weight.outputs, tile.outputs),), x, *args,
        X=weight.outputs, K=weight.inputs, FORMAT=weight.format, DIRECT=groups.direct, OPERAND=weight.type(x),
        BLOCK_N=tile.rows, BLOCK_X=tile.outputs, BLOCK_K=tile.inputs, num_warps=tile.warps, num_stages=stages(tile),
        **options,
    )  # fmt: skip


def gate_up(x: Tensor, groups: Groups, weights: Tensor, w1: Operand, w3: Operand, limit: float, active: int) -> Tensor:
    """Return routing weight * swiglu(w1 · x, w3 · x) [P, I] of each pair, sorted by expert."""
    hidden = x.new_empty(len(groups.experts), w1.outputs)
    _multiply(
        _gate_up, groups, w1, x, groups.experts, weights, groups.order, groups.table,
        w1.data, w1.scale, w3.data, w3.scale, hidden, x.stride(0), x.stride(1), *w1.strides, limit, ACTIVE=active,
    )  # fmt: skip
    return hidden


def down(hidden: Tensor, groups: Groups, w2: Operand) -> Tensor:
    """Return w2 · hidden [P, D], in the order of the pairs."""
    out = hidden.new_empty(len(hidden), w2.outputs)
    _multiply(
        _down, groups, w2, hidden, groups.experts, groups.order, groups.table, w2.data, w2.scale, out, *w2.strides
    )
    return out


def combine(rows: Tensor, shared: Tensor) -> Tensor:
    """Sum the rows [N * A, D] of each token in order, in float32, and `shared` [N, D]: [N, D] in its dtype."""
    tokens, size = shared.shape
    out = shared.new_empty(tokens, size)
    block = min(1024, triton.next_power_of_2(size))
    launch(
        _combine,
        (tokens, triton.cdiv(size, block)),
        rows,
        shared,
        out,
        *shared.stride(),
        X=size,
        ACTIVE=len(rows) // max(1, tokens),
        BLOCK=block,
    )
    return out


def experts(
    x: Tensor,
    experts_NA: Tensor,
    weights_NA: Tensor,
    w1: Tensor | Packed,
    w3: Tensor | Packed,
    w2: Tensor | Packed,
    limit: float,
    shared: Tensor,
    *,
    exact: bool = True,
    cast: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Sum each token's weighted experts, in the order of its choice, and `shared`.

    Args:
        x: [N, D], of any strides.
        experts_NA: Each token's experts, int64 [N, A].
        weights_NA: Their weights, of any float dtype [N, A].
        w1: The gates' matrices [E, I, D].
        w3: The matrices of the values that they gate [E, I, D], in the same format.
        w2: The output matrices [E, D, I].
        limit: The clamp of `swiglu`.
        shared: The shared expert's output [N, D].
        exact: Whether a row's bits may not depend on the number of rows.
        cast: Rounds the inputs of both products.

    Returns:
        [N, D], in the dtype of `shared`.

    Raises:
        ValueError: The weights' shapes or formats disagree, or a matrix is not contiguous.
    """
    gates, ups, downs = operand(w1), operand(w3), operand(w2)
    size = (gates.groups, gates.outputs, x.shape[1])
    if not (
        (gates.groups, gates.outputs, gates.inputs) == (ups.groups, ups.outputs, ups.inputs) == size
        and (downs.groups, downs.inputs, downs.outputs) == size
        and gates.like(ups)
    ):
        raise ValueError(
            f"rows {tuple(x.shape)} need w1 and w3 [E, I, D] of one format and w2 [E, D, I], got "
            f"{tuple(w1.shape)}, {tuple(w3.shape)} and {tuple(w2.shape)}"
        )
    groups = group(experts_NA, gates.groups, exact=exact or not gates.narrow(x))
    rows = x if cast is None else cast(x)
    hidden = gate_up(rows, groups, weights_NA.reshape(-1), gates, ups, limit, experts_NA.shape[1])
    return combine(down(hidden if cast is None else cast(hidden), groups, downs), shared)


def calls(shapes: Shapes, rows: int, make: Make) -> Iterator[Call]:
    """Yield the four steps in every format, with experts chosen in turn."""
    hidden, width, number = shapes.hidden_size, shapes.moe_intermediate_size, shapes.n_routed_experts
    active = shapes.num_experts_per_tok
    pairs = rows * active
    weights = make.floats(pairs, dtype=torch.float32)
    formats = ["bfloat16", "fp8", "mxfp4", "int8"]
    if torch.float32 in shapes.activations:
        formats.append("float32")
    used = min(pairs, number)
    for exact in (True, False):
        groups = _grouped_in_turn(pairs, number, exact, make)
        if not exact and groups.tile is EXACT_TILE:
            return
        name = "" if exact else ", inexact"
        if not groups.direct:
            bytes_ = 8 * 2 * pairs + 12 * groups.tiles
            yield Call(f"group{name}", partial(group, groups.experts, number, exact=exact), bytes_, 0)
        for number_format, activations in product(formats, shapes.activations):
            x, inner = (make.floats(*shape, dtype=activations) for shape in ((rows, hidden), (pairs, width)))
            w1, w3 = (operand(random_weight(number_format, (number, width, hidden), make)) for _ in range(2))
            w2 = operand(random_weight(number_format, (number, hidden, width), make))
            if not (exact or w1.narrow(x)):
                continue
            yield Call(
                with_dtype(f"gate and up, {number_format}{name}", activations),
                partial(gate_up, x, groups, weights, w1, w3, 10.0, active),
                2 * used * _matrix_bytes(w1) + x.nbytes + inner.nbytes + pairs * (4 + 8),
                4 * pairs * hidden * width,
                tensor_cores=True,
            )
            yield Call(
                with_dtype(f"down, {number_format}{name}", activations),
                partial(down, inner, groups, w2),
                used * _matrix_bytes(w2) + inner.nbytes + pairs * (hidden * x.itemsize + 8),
                2 * pairs * hidden * width,
                tensor_cores=True,
            )
        for activations in shapes.activations if exact else ():
            outer, shared = (make.floats(count, hidden, dtype=activations) for count in (pairs, rows))
            moved = outer.nbytes + 2 * shared.nbytes
            yield Call(with_dtype("combine", activations), partial(combine, outer, shared), moved, pairs * hidden)


def _matrix_bytes(weight: Operand) -> int:
    """Bytes of one expert's matrix, with its scales."""
    return weight.data[0].nbytes + (0 if weight.format == "dense" else weight.scale[0].nbytes)


def _grouped_in_turn(pairs: int, number: int, exact: bool, make: Make) -> Groups:
    """Return what `group` gives if pair p has the expert p modulo `number`, without a launch."""
    tile, tiles = _tiles(pairs, number, exact)
    experts = make.ints([pair % number for pair in range(pairs)])
    if pairs <= FEW_PAIRS:
        return Groups(experts, experts, experts, tiles, tile, direct=True)
    table: list[int] = []
    order: list[int] = []
    for expert in range(number):
        mine = range(expert, pairs, number)
        for first in range(0, len(mine), tile.rows):
            table += [expert, len(order) + first, min(tile.rows, len(mine) - first)]
        order += mine
    table += [0] * (3 * tiles - len(table))
    return Groups(experts, make.ints(order), make.ints(table, torch.int32).view(tiles, 3), tiles, tile, direct=False)
