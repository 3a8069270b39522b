"""Index scores, and the exact top-k of each query's entries without a matrix of scores in memory.

    score(n, w) = sum_j weight[n, j] * relu(q[n, j] · key_w)

A query at position t chooses `top_k` of its (t + 1) // ratio entries; ties go to the lowest entry, and a NaN counts as
infinity, so that the logits show it. Source: DeepSeek-V3.2 (arXiv:2512.02556). Twin: `reference/indexer.py`.

Keys are read through block tables: entry w is in row w mod E of span `block_tables[b, w // E]`, where E is the number
of entries per span. They are bf16 or fp32 rows of C values, or C codes in E4M3 (uint8) with a float32 scale per row.

Scores become unsigned integers in the same order. `_best` finds the lowest score that belongs to the best `top_k` of a
list bit by bit, and keeps the best in the order of the entries, so that the first of equals is chosen.

Decoding, up to `FEW_ROWS` rows: a program of `_index_scan` computes the scores of `SPLIT` entries in registers and
writes the best as candidates. Splits are independent, so one query with many entries fills a GPU.

Prefill: a program of `_index_stream` reads the keys once for `QUERIES` rows. Each row has a buffer of `SPLIT`
candidates. An entry above the row's threshold is appended; a full buffer is reduced to its best `top_k`, and the lowest
of them becomes the threshold. That takes 8 * SPLIT bytes per row and part, 16 KiB at Flash, whatever the length of the
context; of random scores, about top_k * ln(entries / top_k) are appended. The rows of a program may belong to several
sequences: those of one are read together. Where programs are few, they divide the entries in up to `FAN` parts.

`_index_merge` merges `FAN` lists of candidates into one, until one is left. The choice is exact, so it does not depend
on this division. A score is a product of fixed shape over a tile of `BLOCK_S` keys, by the same code in both kernels: a
row chooses the same entries whatever the number of rows. Grids depend on shapes only; lengths are read on the device.

Floor: each sequence's keys once, the queries once; 2 * J * (C + 1) flops per query and entry. At Flash, 8192 entries of
one sequence take 1.1 MB in 8 bits and 135 MFLOP per query. Candidates add 8 * top_k bytes per split when decoding, at
Flash a fortieth of its keys in bf16, and the buffer in prefill, as many bytes as a query has in bf16.
Dimension key: `ops.py`; W entries, P chosen entries, S lists of candidates per row.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from itertools import product

import torch
import triton
import triton.language as tl
from torch import Tensor

from agentkit_kernels.calls import Call, Make, Shapes, with_dtype
from agentkit_kernels.triton.formats import e4m3_to_float
from agentkit_kernels.triton.launch import INTERPRET, launch

FAN = 8
"""Lists of candidates that one program merges."""
FEW_ROWS = 32
"""Up to this many rows are scanned in independent splits."""
QUERIES = 2
"""Rows for which a program of prefill reads the keys once."""
PROGRAMS = 512
"""Programs of prefill that fill a large GPU."""
BLOCK_S = 64
"""Keys of one tile."""


@triton.jit
def _ordered(scores):
    """Map float32 scores to uint32 of the same order, above 0; NaN becomes infinity, and -0.0 becomes 0.0."""
    scores = tl.where(scores == scores, scores, float("inf"))
    bits = tl.where(scores == 0.0, 0.0, scores).to(tl.uint32, bitcast=True)
    return tl.where(bits >> 31 != 0, bits ^ 0xFFFFFFFF, bits | 0x80000000)


@triton.jit
def _best(keys, top_k):
    """Return 1 for the `top_k` highest of these keys, the first among equals, else 0; and the lowest of them.

    Keys of 0 are absent. The lowest is found from its highest bit down: it is the largest number that at least `top_k`
    keys reach, and 0 if there are fewer.
    """
    threshold = tl.zeros([1], tl.uint32)
    bit = tl.full([1], 0x80000000, tl.uint32)
    for _ in range(32):
        enough = tl.sum((keys >= (threshold | bit)).to(tl.int32), 0) >= top_k
        threshold = tl.where(enough, threshold | bit, threshold)
        bit = bit >> 1
    above = ((keys > threshold) & (keys > 0)).to(tl.int32)
    equal = ((keys == threshold) & (keys > 0)).to(tl.int32)
    room = top_k - tl.sum(above, 0)
    return above + tl.where(tl.cumsum(equal, 0) <= room, equal, 0), threshold


@triton.jit
def _query(
    q_ptr, weights_ptr, n, J, C, stride_qn, stride_qj, stride_wn,
    BLOCK_J: tl.constexpr, BLOCK_C: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """Return the heads of row n [BLOCK_J, BLOCK_C], and their weights."""
    j, c = tl.arange(0, BLOCK_J), tl.arange(0, BLOCK_C)
    mask = (j < J)[:, None] & (c < C)[None, :]
    q = tl.load(q_ptr + n * stride_qn + j[:, None].to(tl.int64) * stride_qj + c[None, :], mask=mask, other=0)
    if INTERPRET:  # the interpreter's product of bfloat16 is wrong
        q = q.to(tl.float32)
    return q, tl.load(weights_ptr + n * stride_wn + j, mask=j < J, other=0.0).to(tl.float32)


@triton.jit
def _keys(
    table_ptr, entries_ptr, scales_ptr, first, end, C, stride_es, stride_er, stride_ss, TYPE: tl.constexpr,
    PER_SPAN: tl.constexpr, FP8: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """Return the keys of the tile of entries at `first` [BLOCK_S, BLOCK_C], 0 from `end` on, and their scales."""
    s, c = tl.arange(0, BLOCK_S), tl.arange(0, BLOCK_C)
    seen = first + s < end
    if PER_SPAN % BLOCK_S == 0:  # these entries lie in one span, so that their addresses are consecutive
        span = tl.load(table_ptr + first // PER_SPAN)
        row = first % PER_SPAN + s.to(tl.int64)
    else:
        span = tl.load(table_ptr + (first + s) // PER_SPAN, mask=seen, other=0)
        row = ((first + s) % PER_SPAN).to(tl.int64)
    at = (entries_ptr + span * stride_es + row * stride_er)[:, None] + c[None, :]
    keys = tl.load(at, mask=seen[:, None] & (c < C)[None, :], other=0)
    scales = tl.full([BLOCK_S], 1.0, tl.float32)
    if FP8:
        keys = e4m3_to_float(keys)
        if PER_SPAN % BLOCK_S == 0:  # without a mask, threads load several scales at once
            scales = tl.load(scales_ptr + span * stride_ss + row)
        else:
            scales = tl.load(scales_ptr + span * stride_ss + row, mask=seen, other=0.0)
    return keys.to(TYPE), scales


@triton.jit
def _scores(keys, scales, q, weights):
    """Return one query's scores of a tile of keys [BLOCK_S]; NaN is kept."""
    dots = tl.dot(keys, tl.trans(q), input_precision="ieee")
    return tl.sum(tl.where(dots < 0.0, 0.0, dots) * weights[None, :], 1) * scales


@triton.jit
def _index_scan(
    q_ptr, weights_ptr, positions_ptr, sequences_ptr, tables_ptr, entries_ptr, scales_ptr,
    best_ptr, best_index_ptr, counts_ptr,
    J, C, RATIO, top_k, S, stride_qn, stride_qj, stride_wn, stride_tb, stride_es, stride_er, stride_ss,
    PER_SPAN: tl.constexpr, FP8: tl.constexpr, SPLIT: tl.constexpr,
    BLOCK_J: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """Program (row, split): the candidates of one split."""
    n = tl.program_id(0).to(tl.int64)
    t, b = tl.load(positions_ptr + n), tl.load(sequences_ptr + n)
    visible = tl.where(b >= 0, (t + 1) // RATIO, 0).to(tl.int32)
    low = tl.program_id(1) * SPLIT
    end = tl.minimum(low + SPLIT, visible)
    out = n * S + tl.program_id(1)
    position = tl.arange(0, SPLIT)
    if (visible <= top_k) | (
        low >= visible
    ):  # all entries are chosen, and they are in the first split; or none is here
        tl.store(best_ptr + out * top_k + position, 1, mask=low + position < visible)
        tl.store(best_index_ptr + out * top_k + position, position, mask=low + position < visible)
        tl.store(counts_ptr + out, tl.maximum(end - low, 0).to(tl.int64))
        return
    q, weights = _query(q_ptr, weights_ptr, n, J, C, stride_qn, stride_qj, stride_wn, BLOCK_J, BLOCK_C, INTERPRET)
    table_ptr = tables_ptr + b * stride_tb
    TILES: tl.constexpr = SPLIT // BLOCK_S
    tile = tl.arange(0, TILES)
    scores = tl.zeros([TILES, BLOCK_S], tl.float32)
    for i in range(tl.cdiv(end - low, BLOCK_S)):
        keys, scales = _keys(
            table_ptr, entries_ptr, scales_ptr, low + i * BLOCK_S, end, C, stride_es, stride_er, stride_ss, q.dtype,
            PER_SPAN, FP8, BLOCK_C, BLOCK_S,
        )  # fmt: skip
        scores = tl.where((tile == i)[:, None], _scores(keys, scales, q, weights)[None, :], scores)
    ordered = tl.where(low + position < end, _ordered(tl.reshape(scores, [SPLIT])), 0)
    best, _ = _best(ordered, top_k)
    at = out * top_k + tl.cumsum(best, 0) - 1
    tl.store(best_ptr + at, ordered.to(tl.int32, bitcast=True), mask=best > 0)
    tl.store(best_index_ptr + at, low + position, mask=best > 0)
    tl.store(counts_ptr + out, tl.sum(best, 0).to(tl.int64))


@triton.jit
def _reduce(
    buffer_ptr, buffer_index_ptr, held, threshold, starts, best_ptr, best_index_ptr, outs, top_k,
    QUERIES: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """Write the best of each row's buffer at `outs`, which may be `starts`; return their numbers and the thresholds."""
    rows, x = tl.arange(0, QUERIES), tl.arange(0, SPLIT)
    # bar.sync on NVIDIA, s_barrier on AMD; both order the global accesses of one program.
    tl.debug_barrier()  # other threads have written what is read here
    for i in range(QUERIES):
        count = tl.sum(tl.where(rows == i, held, 0), 0)
        at = tl.sum(tl.where(rows == i, starts, 0), 0) + x
        keys = tl.load(buffer_ptr + at, mask=x < count, other=0)
        best, lowest = _best(keys.to(tl.uint32, bitcast=True), top_k)
        index = tl.load(buffer_index_ptr + at, mask=x < count, other=0)
        tl.debug_barrier()  # all have been read
        at = tl.sum(tl.where(rows == i, outs, 0), 0) + tl.cumsum(best, 0) - 1
        tl.store(best_ptr + at, keys, mask=best > 0)
        tl.store(best_index_ptr + at, index, mask=best > 0)
        held = tl.where(rows == i, tl.minimum(count, top_k), held)
        threshold = tl.where(rows == i, lowest, threshold)
    return held, threshold


@triton.jit
def _index_stream(
    q_ptr, weights_ptr, positions_ptr, sequences_ptr, tables_ptr, entries_ptr, scales_ptr,
    buffer_ptr, buffer_index_ptr, best_ptr, best_index_ptr, counts_ptr,
    N, J, C, RATIO, top_k, S, stride_qn, stride_qj, stride_wn, stride_tb, stride_es, stride_er, stride_ss,
    PER_SPAN: tl.constexpr, FP8: tl.constexpr, SPLIT: tl.constexpr, QUERIES: tl.constexpr,
    BLOCK_J: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """Program (QUERIES rows, part): the candidates of these rows among one of S parts of their entries."""
    n0, part = tl.program_id(0).to(tl.int64) * QUERIES, tl.program_id(1)
    rows, s = tl.arange(0, QUERIES), tl.arange(0, BLOCK_S)
    n = n0 + rows
    t = tl.load(positions_ptr + n, mask=n < N, other=0)
    b = tl.load(sequences_ptr + n, mask=n < N, other=-1)
    visible = tl.where(b >= 0, (t + 1) // RATIO, 0).to(tl.int32)
    outs = n * S + part
    whole = visible <= tl.where(part == 0, top_k, -1)  # all entries are chosen
    for first in range(0, top_k, BLOCK_S):
        chosen = (whole & (first < visible))[None, :] & ((first + s)[:, None] < visible[None, :])
        at = outs[None, :] * top_k + (first + s)[:, None]
        tl.store(best_ptr + at, 1, mask=chosen)
        tl.store(best_index_ptr + at, (first + s)[:, None], mask=chosen)

    q, weights = (), ()  # type: tuple[Tensor, ...], tuple[Tensor, ...]
    for i in tl.static_range(QUERIES):
        heads, of_heads = _query(
            q_ptr, weights_ptr, tl.minimum(n0 + i, N - 1), J, C, stride_qn, stride_qj, stride_wn,
            BLOCK_J, BLOCK_C, INTERPRET,
        )  # fmt: skip
        q += (heads,)
        weights += (of_heads,)
    held = tl.zeros([QUERIES], tl.int32)
    threshold = tl.zeros([QUERIES], tl.uint32)
    starts = outs * SPLIT
    for leader in range(QUERIES):  # the rows of its sequence, unless an earlier row has led them
        owner = tl.load(sequences_ptr + tl.minimum(n0 + leader, N - 1))
        led = tl.sum(((b == owner) & (rows < leader)).to(tl.int32), 0) > 0
        limits = tl.where((b == owner) & (visible > top_k) & (led == 0), visible, 0)
        end = tl.max(limits, 0)
        size = tl.cdiv(tl.cdiv(end, BLOCK_S), S) * BLOCK_S
        low, end = part * size, tl.minimum((part + 1) * size, end)
        table_ptr = tables_ptr + tl.maximum(owner, 0) * stride_tb
        for first in range(low, end, BLOCK_S):
            keys, scales = _keys(
                table_ptr, entries_ptr, scales_ptr, first, end, C, stride_es, stride_er, stride_ss, q[0].dtype,
                PER_SPAN, FP8, BLOCK_C, BLOCK_S,
            )  # fmt: skip
            scores = tl.zeros([BLOCK_S, QUERIES], tl.float32)
            for i in tl.static_range(QUERIES):
                some = _scores(keys, scales, q[i], weights[i])
                scores = tl.where((rows == i)[None, :], some[:, None], scores)
            ordered = tl.where((first + s)[:, None] < limits[None, :], _ordered(scores), 0)
            better = (ordered > threshold[None, :]).to(tl.int32)
            at = (starts + held)[None, :] + tl.cumsum(better, 0) - 1
            tl.store(buffer_ptr + at, ordered.to(tl.int32, bitcast=True), mask=better > 0)
            tl.store(buffer_index_ptr + at, (first + s)[:, None], mask=better > 0)
            held += tl.sum(better, 0)
            if tl.max(held, 0) > SPLIT - BLOCK_S:
                held, threshold = _reduce(
                    buffer_ptr, buffer_index_ptr, held, threshold, starts, buffer_ptr, buffer_index_ptr, starts, top_k,
                    QUERIES, SPLIT,
                )  # fmt: skip
    held, _ = _reduce(
        buffer_ptr, buffer_index_ptr, held, threshold, starts, best_ptr, best_index_ptr, outs * top_k, top_k,
        QUERIES, SPLIT,
    )  # fmt: skip
    tl.store(counts_ptr + outs, tl.where(whole, visible, held).to(tl.int64), mask=n < N)


@triton.jit
def _index_merge(
    best_ptr, best_index_ptr, counts_ptr, out_ptr, out_index_ptr, out_counts_ptr, top_k, S, S_OUT,
    FAN: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Program (row, group of FAN lists): the best candidates of the group, in the order of their entries."""
    n = tl.program_id(0).to(tl.int64)
    s = tl.program_id(1) * FAN + tl.arange(0, FAN)
    x = tl.arange(0, BLOCK_K)
    present = tl.load(counts_ptr + n * S + s, mask=s < S, other=0)
    real = x[None, :] < present[:, None]
    at = (n * S + s)[:, None] * top_k + x[None, :]
    keys = tl.reshape(tl.load(best_ptr + at, mask=real, other=0), [FAN * BLOCK_K])
    index = tl.reshape(tl.load(best_index_ptr + at, mask=real, other=0), [FAN * BLOCK_K])
    best = (keys != 0).to(tl.int32)
    if tl.sum(present, 0) > top_k:
        best, _ = _best(keys.to(tl.uint32, bitcast=True), top_k)
    out = n * S_OUT + tl.program_id(1)
    at = out * top_k + tl.cumsum(best, 0) - 1
    if S_OUT > 1:
        tl.store(out_ptr + at, keys, mask=best > 0)
    tl.store(out_index_ptr + at, index, mask=best > 0)
    tl.store(out_counts_ptr + out, tl.sum(best, 0).to(tl.int64))


def index_topk(
    q: Tensor,
    weights: Tensor,
    positions: Tensor,
    sequences: Tensor,
    block_tables: Tensor,
    entries: Tensor,
    key_scales: Tensor | None = None,
    *,
    ratio: int,
    top_k: int,
) -> tuple[Tensor, Tensor]:
    """Choose each query's best entries; see `Ops.index_topk`.

    Args:
        q: [N, J, C], rotated; rows and heads may have any stride.
        weights: [N, J], scaled.
        positions: int64 [N].
        sequences: int64 [N], the sequence of each row; negative for padding, which chooses nothing.
        block_tables: int64 [B, spans per sequence].
        entries: Keys [spans, entries per span, C]; uint8 for E4M3 codes.
        key_scales: float32 [spans, entries per span], with E4M3 keys.
        ratio: Tokens per entry.
        top_k: At least 1.

    Returns:
        Indices, int32 [N, top_k] in increasing order, and how many of them are valid, int64 [N].

    Raises:
        ValueError: The shapes do not fit together.
    """
    rows, heads, size = q.shape
    spans, per_span = block_tables.shape[1], entries.shape[1]
    if entries.shape[2] != size or entries.stride(2) != 1:
        raise ValueError(f"index keys need contiguous rows of {size} elements, got {tuple(entries.shape)}")
    if (entries.dtype == torch.uint8) != (key_scales is not None and key_scales.stride(1) == 1):
        raise ValueError(f"E4M3 keys, and only they, need contiguous rows of scales; the keys are {entries.dtype}")
    if top_k < 1:
        raise ValueError(f"top_k must be at least 1, got {top_k}")
    split = max(2 * BLOCK_S, 4 * triton.next_power_of_2(top_k))
    if rows <= FEW_ROWS:
        kernel, lists = _index_scan, max(1, triton.cdiv(spans * per_span, split))
        grid, more = (rows, lists), {}
    else:
        tiles = triton.cdiv(rows, QUERIES)
        kernel, lists = _index_stream, _parts(tiles, spans * per_span, split)
        grid, more = (tiles, lists), {"QUERIES": QUERIES}
    keys, indices, counts = _lists(q, lists, top_k)
    streamed = (*torch.empty(2, rows, lists, split, dtype=torch.int32, device=q.device),) if more else ()
    launch(
        kernel, grid,
        q, weights, positions, sequences, block_tables, entries, entries if key_scales is None else key_scales,
        *streamed, keys, indices, counts, *((rows,) if more else ()),
        heads, size, ratio, top_k, lists, q.stride(0), q.stride(1), weights.stride(0), block_tables.stride(0),
        entries.stride(0), entries.stride(1), 0 if key_scales is None else key_scales.stride(0),
        PER_SPAN=per_span, FP8=key_scales is not None, SPLIT=split,
        BLOCK_J=max(16, triton.next_power_of_2(heads)), BLOCK_C=max(16, triton.next_power_of_2(size)), BLOCK_S=BLOCK_S,
        INTERPRET=INTERPRET, num_warps=4, **more,
    )  # fmt: skip
    while lists > 1:
        groups = triton.cdiv(lists, FAN)
        merged = _lists(q, groups, top_k)
        launch(
            _index_merge, (rows, groups), keys, indices, counts, *merged, top_k, lists, groups,
            FAN=FAN, BLOCK_K=triton.next_power_of_2(top_k), num_warps=4,
        )  # fmt: skip
        (keys, indices, counts), lists = merged, groups
    return indices[:, 0], counts[:, 0]


def _parts(tiles: int, entries: int, split: int) -> int:
    """Return the parts that prefill divides up to `entries` entries in: enough to fill a GPU, and none too short."""
    return max(1, min(FAN, PROGRAMS // tiles, entries // (4 * split)))


def _lists(q: Tensor, lists: int, top_k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return memory for lists of candidates: their keys and indices [N, S, top_k], and their numbers [N, S]."""
    keys, indices = torch.empty(2, len(q), lists, top_k, dtype=torch.int32, device=q.device)
    return keys, indices, torch.empty(len(q), lists, dtype=torch.int64, device=q.device)


def calls(shapes: Shapes, rows: int, make: Make) -> Iterator[Call]:
    """Yield both formats of keys, for `rows` queries of one sequence; see `agentkit_kernels.calls`."""
    heads, size, top_k, ratio, per_span = shapes.index_n_heads, shapes.index_head_dim, shapes.index_topk, 4, 64
    visible = 16 * top_k
    spans = -(-visible // per_span)
    for fp8, activations in product((False, True), shapes.activations):
        dtype = torch.uint8 if fp8 else torch.float32
        q = make.floats(rows, heads, size, dtype=activations)
        weights = make.floats(rows, heads, dtype=torch.float32)
        positions = make.ints([ratio * visible - 1] * rows)
        sequences = make.ints([0] * rows)
        tables = make.ints(range(spans)).view(1, spans)
        entries = make.floats(spans, per_span, size, dtype=dtype)
        scales = make.floats(spans, per_span, dtype=torch.float32) if fp8 else None
        run = partial(index_topk, q, weights, positions, sequences, tables, entries, scales, ratio=ratio, top_k=top_k)
        moved = visible * (size * dtype.itemsize + 4 * fp8) + q.nbytes + rows * (4 * heads + 16 + 4 * top_k + 8)
        flops = 2 * rows * visible * heads * (size + 1)
        name = with_dtype(f"{'FP8' if fp8 else 'float32'} keys", activations)
        yield Call(name, run, moved, flops, tensor_cores=True)
