"""Index scores, and the exact top-k of each query's entries without a matrix of scores in memory.

    score(n, w) = sum_j weight[n, j] * relu(q[n, j] · key_w)

A query at position t chooses `top_k` of its (t + 1) // ratio entries; ties go to the lowest entry, and a NaN counts as
infinity, so that the logits show it. Source: DeepSeek-V3.2 (arXiv:2512.02556). Twin: `reference/indexer.py`.

Keys are read through block tables: entry w is in row w mod E of span `block_tables[b, w // E]`, where E is the number
of entries per span. They are bf16 or fp32 rows of C values, or C codes in E4M3 (uint8) with a float32 scale per row.
Queries may be E4M3 codes too; the scale of a head is then part of its weight.

Algorithm. Scores become unsigned integers in the same order. A program computes the scores of `SPLIT` entries in
registers, finds the lowest score that belongs to the best `top_k` bit by bit, and writes the best as candidates, in the
order of the entries. `_merge_kernel` merges `FAN` lists of candidates into one in the same way, until one is left.
Splits are independent, so one query with many entries fills a GPU; a query with few entries ends its other programs at
once. The choice is exact, so it does not depend on the division into splits; a score is one product of fixed shape.

Floor: each query's keys once; 2 * J * (C + 1) flops per query and entry. At Flash, 8192 entries of one sequence take
1.1 MB in 8 bits and 135 MFLOP. Candidates add 8 * top_k bytes per split, at Flash a fortieth of its keys in bf16.
Dimension key: `ops.py`; W entries, P chosen entries.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from agentkit_kernels.calls import Call, Make, Shapes
from agentkit_kernels.triton.formats import e4m3_to_float
from agentkit_kernels.triton.launch import INTERPRET, launch

FAN = 8
"""Lists of candidates that one program merges."""


@triton.jit
def _ordered(scores):
    """Map float32 scores to uint32 of the same order, above 0; NaN becomes infinity, and -0.0 becomes 0.0."""
    scores = tl.where(scores == scores, scores, float("inf"))
    bits = tl.where(scores == 0.0, 0.0, scores).to(tl.uint32, bitcast=True)
    return tl.where(bits >> 31 != 0, bits ^ 0xFFFFFFFF, bits | 0x80000000)


@triton.jit
def _best(keys, top_k):
    """Return 1 for the `top_k` highest of these keys, the first among equals, else 0; keys of 0 are absent.

    The threshold is found from its highest bit down: it is the largest number that at least `top_k` keys reach.
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
    return above + tl.where(tl.cumsum(equal, 0) <= room, equal, 0)


@triton.jit
def _scan_kernel(
    q_ptr, weights_ptr, positions_ptr, sequences_ptr, tables_ptr, entries_ptr, scales_ptr, best_ptr, best_index_ptr,
    J, C, RATIO, top_k, S, stride_qn, stride_qj, stride_wn, stride_tb, stride_es, stride_er, stride_ss,
    PER_SPAN: tl.constexpr, FP8_Q: tl.constexpr, FP8: tl.constexpr, SPLIT: tl.constexpr,
    BLOCK_J: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """Program (row, split): the candidates of one split."""
    n = tl.program_id(0).to(tl.int64)
    t, b = tl.load(positions_ptr + n), tl.load(sequences_ptr + n)
    visible = tl.where(b >= 0, (t + 1) // RATIO, 0).to(tl.int32)
    low = tl.program_id(1) * SPLIT
    if (visible <= top_k) | (low >= visible):  # all entries are chosen, or there are none here
        return
    b = tl.maximum(b, 0)
    j, c = tl.arange(0, BLOCK_J), tl.arange(0, BLOCK_C)
    q_mask = (j < J)[:, None] & (c < C)[None, :]
    q = tl.load(q_ptr + n * stride_qn + j[:, None].to(tl.int64) * stride_qj + c[None, :], mask=q_mask, other=0)
    if FP8_Q:
        q = e4m3_to_float(q).to(tl.bfloat16)
    weights = tl.load(weights_ptr + n * stride_wn + j, mask=j < J, other=0.0).to(tl.float32)
    TILES: tl.constexpr = SPLIT // BLOCK_S
    tile = tl.arange(0, TILES)
    scores = tl.zeros([TILES, BLOCK_S], tl.float32)
    for i in range(tl.minimum(TILES, tl.cdiv(visible - low, BLOCK_S))):
        first = low + i * BLOCK_S
        w = first + tl.arange(0, BLOCK_S)
        seen = w < visible
        if PER_SPAN % BLOCK_S == 0:  # these entries lie in one span, so that their addresses are consecutive
            span = tl.load(tables_ptr + b * stride_tb + first // PER_SPAN)
            row = first % PER_SPAN + tl.arange(0, BLOCK_S).to(tl.int64)
        else:
            span = tl.load(tables_ptr + b * stride_tb + w // PER_SPAN, mask=seen, other=0)
            row = (w % PER_SPAN).to(tl.int64)
        page_ptr = entries_ptr + span * stride_es
        rows = tl.load(
            (page_ptr + row * stride_er)[:, None] + c[None, :], mask=seen[:, None] & (c < C)[None, :], other=0
        )
        if FP8:
            rows = e4m3_to_float(rows)
        if INTERPRET:  # the interpreter's product of bfloat16 is wrong
            dots = tl.dot(q.to(tl.float32), tl.trans(rows.to(tl.float32)), input_precision="ieee")
        else:
            dots = tl.dot(q, tl.trans(rows.to(q.dtype)), input_precision="ieee")
        some = tl.sum(tl.where(dots < 0.0, 0.0, dots) * weights[:, None], 0)  # NaN is kept
        if FP8 and PER_SPAN % BLOCK_S == 0:  # without a mask, threads load several scales at once
            some = some * tl.load(scales_ptr + span * stride_ss + row)
        elif FP8:
            some = some * tl.load(scales_ptr + span * stride_ss + row, mask=seen, other=0.0)
        scores = tl.where((tile == i)[:, None], some[None, :], scores)
    position = tl.arange(0, SPLIT)
    keys = tl.where(low + position < visible, _ordered(tl.reshape(scores, [SPLIT])), 0)
    best = _best(keys, top_k)
    at = (n * S + tl.program_id(1)) * top_k + tl.cumsum(best, 0) - 1
    tl.store(best_ptr + at, keys.to(tl.int32, bitcast=True), mask=best > 0)
    tl.store(best_index_ptr + at, low + position, mask=best > 0)


@triton.jit
def _merge_kernel(
    positions_ptr, sequences_ptr, best_ptr, best_index_ptr, out_ptr, out_index_ptr, counts_ptr,
    RATIO, top_k, S, S_OUT, list_entries,
    FAN: tl.constexpr, LAST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program (row, group of FAN lists): the best candidates of the group; with LAST, the result of the row.

    List s holds the best of the entries [s, s + 1) * `list_entries`.
    """
    n = tl.program_id(0).to(tl.int64)
    t, b = tl.load(positions_ptr + n), tl.load(sequences_ptr + n)
    visible = tl.where(b >= 0, (t + 1) // RATIO, 0)
    x = tl.arange(0, BLOCK)
    if visible <= top_k:
        if LAST:
            tl.store(out_index_ptr + n * top_k + x, x, mask=x < visible)
            tl.store(counts_ptr + n, visible)
        return
    first = tl.program_id(1).to(tl.int64) * FAN
    if first * list_entries >= visible:
        return
    s = first + x // top_k
    present = tl.minimum(tl.maximum(visible - s * list_entries, 0), list_entries)  # entries that list s is drawn from
    real = (x < FAN * top_k) & (s < S) & (x % top_k < present)
    at = (n * S + first) * top_k + x
    keys = tl.where(real, tl.load(best_ptr + at, mask=real, other=0).to(tl.uint32, bitcast=True), 0)
    index = tl.load(best_index_ptr + at, mask=real, other=0)
    best = _best(keys, top_k)
    at = (n * S_OUT + tl.program_id(1)) * top_k + tl.cumsum(best, 0) - 1
    tl.store(out_index_ptr + at, index, mask=best > 0)
    if LAST:
        tl.store(counts_ptr + n, top_k.to(tl.int64))
    else:
        tl.store(out_ptr + at, keys.to(tl.int32, bitcast=True), mask=best > 0)


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
        q: [N, J, C], rotated; rows and heads may have any stride. uint8 for E4M3 codes.
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
    device = q.device
    counts = torch.empty(rows, dtype=torch.int64, device=device)
    split = max(128, 4 * triton.next_power_of_2(top_k))
    lists = max(1, triton.cdiv(spans * per_span, split))
    keys, indices = torch.empty(2, rows, lists, top_k, dtype=torch.int32, device=device)
    launch(
        _scan_kernel, (rows, lists),
        q, weights, positions, sequences, block_tables, entries, entries if key_scales is None else key_scales,
        keys, indices,
        heads, size, ratio, top_k, lists, q.stride(0), q.stride(1), weights.stride(0), block_tables.stride(0),
        entries.stride(0), entries.stride(1), 0 if key_scales is None else key_scales.stride(0),
        PER_SPAN=per_span, FP8_Q=q.dtype == torch.uint8, FP8=key_scales is not None, SPLIT=split,
        BLOCK_J=max(16, triton.next_power_of_2(heads)), BLOCK_C=max(16, triton.next_power_of_2(size)), BLOCK_S=64,
        INTERPRET=INTERPRET, num_warps=4,
    )  # fmt: skip
    covered = split
    while True:
        groups = triton.cdiv(lists, FAN)
        out_keys, out_indices = torch.empty(2, rows, groups, top_k, dtype=torch.int32, device=device)
        launch(
            _merge_kernel, (rows, groups),
            positions, sequences, keys, indices, out_keys, out_indices, counts,
            ratio, top_k, lists, groups, covered,
            FAN=FAN, LAST=groups == 1, BLOCK=triton.next_power_of_2(FAN * top_k), num_warps=4,
        )  # fmt: skip
        keys, indices, lists, covered = out_keys, out_indices, groups, covered * FAN
        if lists == 1:
            return indices[:, 0], counts


def calls(shapes: Shapes, rows: int, make: Make) -> Iterator[Call]:
    """Yield both formats of keys, for `rows` queries of one sequence; see `agentkit_kernels.calls`."""
    heads, size, top_k, ratio, per_span = shapes.index_n_heads, shapes.index_head_dim, shapes.index_topk, 4, 64
    visible = 16 * top_k
    spans = -(-visible // per_span)
    for fp8 in (False, True):
        dtype = torch.uint8 if fp8 else torch.bfloat16
        q = make.floats(rows, heads, size, dtype=dtype)
        weights = make.floats(rows, heads, dtype=torch.float32)
        positions = make.ints([ratio * visible - 1] * rows)
        sequences = make.ints([0] * rows)
        tables = make.ints(range(spans)).view(1, spans)
        entries = make.floats(spans, per_span, size, dtype=dtype)
        scales = make.floats(spans, per_span, dtype=torch.float32) if fp8 else None
        run = partial(index_topk, q, weights, positions, sequences, tables, entries, scales, ratio=ratio, top_k=top_k)
        moved = visible * (size * dtype.itemsize + 4 * fp8) + rows * (
            heads * (size * dtype.itemsize + 4) + 16 + 4 * top_k + 8
        )
        flops = 2 * rows * visible * heads * (size + 1)
        yield Call(f"{'FP8' if fp8 else 'bf16'} queries and keys", run, moved, flops, tensor_cores=True)
