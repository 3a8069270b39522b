"""Sparse attention over a sliding window and compressed entries, with a sink per head and one softmax over both.

All heads share one key-value row per token (MQA), which is both key and value:

    s_j = q_h · row_j                      (q is scaled by K^-0.5 before)
    p_j = exp(s_j - M) / (exp(sink_h - M) + sum_i exp(s_i - M))
    o_h = inverse RoPE(sum_j p_j * row_j)  at the position of the query

A query at position t sees the rows of the last `window` tokens, and compressed entries: those that the indexer chose
(CSA), or all (t + 1) // ratio (HCA). Source: the DeepSeek-V4 reference. Splits over keys follow Flash-Decoding
(Dao et al. 2023).

Keys. Window rows of this forward come from `kv`, older ones from the ring, in which token t has row t mod ring. Entry w
is in row w mod E of the span `block_tables[b, w // E]`, where E is the number of entries per span. Rows are in bf16 or
fp32, or in 8 bits: uint8 [pages, rows, X] holds first the data of all rows of a page, for each row K - R codes in E4M3
and R values in bf16, and then their scales, for each row an E8M0 byte per 64 codes, padded to 8. At Flash a row takes
448 + 128 + 8 = 584 bytes. The data comes first so that each row starts at a multiple of 16 bytes.

Splits. The window and the entries are divided into splits of `SPLIT` keys, counted from the query backwards and from
entry (or choice) 0 upwards. Splits are computed apart and then merged in order, so the sum of a row has one order for
every batch. `decode=True` computes each split in its own program and merges them in a second kernel. `decode=False`
does both in one program per row, without partial results in memory. Both run the same operations in the same order and
give the same bits for a row; tests compare them. A window alone is one split, and needs no partial results.

The window. `qkv` stores the rows of short forwards. Those of longer ones replace rows that their queries read, so a
kernel of its own stores them at the end.

Floor: every distinct row once, queries and result once; 4 * K flops per head and key. At Flash, decoding a row over
640 keys of 584 bytes moves 0.37 MB of keys and 0.13 MB of queries and result for 84 MFLOP.

Dimension key: `ops.py`; S splits.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial
from itertools import product
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from agentkit_kernels.calls import Call, Make, Shapes, with_dtype
from agentkit_kernels.ops import QUERY_BLOCK
from agentkit_kernels.reference.quantize import KV_GROUP, KV_SCALES, kv_row_bytes
from agentkit_kernels.triton.formats import e4m3_to_float
from agentkit_kernels.triton.launch import INTERPRET, launch

SPLIT = 128
"""Keys per split."""
GROUP, SCALE_BYTES = tl.constexpr(KV_GROUP), tl.constexpr(KV_SCALES)


@triton.jit
def _read_rows(
    row_ptr, scale_ptr, seen, P: tl.constexpr, R: tl.constexpr, FP8: tl.constexpr, ALIGN: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_R: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """Read the rows at these addresses: P plain and R rotary values, zero where a row is not `seen`."""
    p, r = tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_R)
    plain = tl.load(row_ptr[:, None] + p[None, :], mask=seen[:, None] & (p < P)[None, :], other=0)
    rotary_mask = seen[:, None] & (r < R)[None, :]
    if FP8:
        rotary_ptr = tl.multiple_of((row_ptr + P).to(tl.pointer_type(tl.uint16), bitcast=True), ALIGN)
        bits = tl.load(rotary_ptr[:, None] + r[None, :], mask=rotary_mask, other=0).to(tl.uint32) << 16
        rotary = bits.to(tl.float32, bitcast=True)
        g = tl.arange(0, BLOCK_P // GROUP)
        scales = tl.load(scale_ptr[:, None] + g[None, :], mask=seen[:, None] & (g < P // GROUP)[None, :], other=0)
        # The quantiser writes no scale of 2^-127, and marks a NaN by its codes.
        factors = (scales.to(tl.uint32) << 23).to(tl.float32, bitcast=True).to(DTYPE)
        values = tl.reshape(e4m3_to_float(plain).to(DTYPE), [plain.shape[0], BLOCK_P // GROUP, GROUP])
        plain = tl.reshape(values * factors[:, :, None], [plain.shape[0], BLOCK_P])  # exact in bfloat16
    else:
        rotary = tl.load(row_ptr[:, None] + P + r[None, :], mask=rotary_mask, other=0)
    return plain, rotary


@triton.jit
def _product(a, b, DTYPE: tl.constexpr, INTERPRET: tl.constexpr):
    if INTERPRET:  # the interpreter's product of bfloat16 is wrong
        return tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    return tl.dot(a.to(DTYPE), b.to(DTYPE), input_precision="ieee")


@triton.jit
def _merge(m, total, plain, rotary, m_new, total_new, plain_new, rotary_new):
    """Add a split's maximum, sum and weighted rows to those of the splits before it."""
    most = tl.maximum(m, m_new)
    old, new = tl.exp(m - most), tl.exp(m_new - most)
    total = tl.fma(total, old, total_new * new)
    plain = tl.fma(plain, tl.broadcast_to(old[:, None], plain.shape), plain_new * new[:, None])
    rotary = tl.fma(rotary, tl.broadcast_to(old[:, None], rotary.shape), rotary_new * new[:, None])
    return most, total, plain, rotary


@triton.jit
def _finish(
    m, total, plain, rotary, n, h, out_ptr, sink_ptr, rotations_ptr, H, stride_rn,
    P: tl.constexpr, R: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Add the sink, divide, rotate back by the position of the query, and store."""
    sink = tl.load(sink_ptr + h, mask=h < H, other=0.0).to(tl.float32)
    most = tl.maximum(m, sink)
    scale = tl.exp(m - most)
    total = tl.fma(total, scale, tl.exp(sink - most))
    plain = plain * scale[:, None] / total[:, None]
    rotary = rotary * scale[:, None] / total[:, None]
    i = tl.arange(0, BLOCK_R // 2)
    cos = tl.load(rotations_ptr + n * stride_rn + 2 * i, mask=i < R // 2, other=0.0)[None, :]
    sin = tl.load(rotations_ptr + n * stride_rn + 2 * i + 1, mask=i < R // 2, other=0.0)[None, :]
    even, odd = tl.split(tl.reshape(rotary, [rotary.shape[0], BLOCK_R // 2, 2]))
    rotary = tl.reshape(tl.join(even * cos + odd * sin, odd * cos - even * sin), rotary.shape)
    p, r = tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_R)
    at = out_ptr + (n * H + h)[:, None] * (P + R)
    DTYPE: tl.constexpr = out_ptr.dtype.element_ty
    tl.store(at + p[None, :], plain.to(DTYPE), mask=(h < H)[:, None] & (p < P)[None, :])
    tl.store(at + P + r[None, :], rotary.to(DTYPE), mask=(h < H)[:, None] & (r < R)[None, :])


@triton.jit
def _count_keys(n, t, b, counts_ptr, WINDOW: tl.constexpr, RATIO: tl.constexpr, CHOSEN: tl.constexpr):
    """Return how many window rows and entries a row attends to; none if it is padding (`b` is negative)."""
    near = tl.where(b >= 0, tl.minimum(t + 1, WINDOW), 0).to(tl.int32)
    far = tl.zeros_like(near)
    if CHOSEN:
        far = tl.where(b >= 0, tl.load(counts_ptr + n), 0).to(tl.int32)
    elif RATIO:
        far = tl.where(b >= 0, (t + 1) // RATIO, 0).to(tl.int32)
    return near, far


@triton.jit
def _attend_kernel(
    q_ptr, kv_ptr, window_ptr, entries_ptr, rotations_ptr, sink_ptr,
    positions_ptr, sequences_ptr, cu_seqlens_ptr, slots_ptr, tables_ptr, topk_ptr, counts_ptr,
    out_ptr, part_ptr, part_m_ptr, part_total_ptr,
    N, H, S, ring,
    stride_qn, stride_qh, stride_kn, stride_ws, stride_wr, stride_es, stride_er, stride_rn, stride_tb, stride_pn,
    P: tl.constexpr, R: tl.constexpr, FP8: tl.constexpr, ALIGN: tl.constexpr, PER_SPAN: tl.constexpr,
    WINDOW: tl.constexpr, RATIO: tl.constexpr, CHOSEN: tl.constexpr, WHOLE: tl.constexpr, SPLIT: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_R: tl.constexpr,
    INTERPRET: tl.constexpr,
):  # fmt: skip
    """Program (row, block of heads, split): one split, or with WHOLE all splits and the result of the row."""
    n = tl.program_id(0).to(tl.int64)
    h = tl.program_id(1).to(tl.int64) * BLOCK_H + tl.arange(0, BLOCK_H)
    t, b = tl.load(positions_ptr + n), tl.load(sequences_ptr + n)
    near, far = _count_keys(n, t, b, counts_ptr, WINDOW, RATIO, CHOSEN)
    NEAR_SPLITS: tl.constexpr = (WINDOW + SPLIT - 1) // SPLIT
    splits = tl.where(b >= 0, NEAR_SPLITS + tl.cdiv(far, SPLIT), 0)
    first, stop = 0, splits
    if not WHOLE:
        first = tl.program_id(2)
        if first >= splits:
            return
        stop = first + 1
    b = tl.maximum(b, 0)
    first_row, slot = tl.load(cu_seqlens_ptr + b), tl.load(slots_ptr + b)
    ring_now = (t % ring).to(tl.int32)
    p, r = tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_R)
    at = q_ptr + n * stride_qn + h[:, None] * stride_qh
    q_plain = tl.load(at + p[None, :], mask=(h < H)[:, None] & (p < P)[None, :], other=0.0)
    q_rotary = tl.load(at + P + r[None, :], mask=(h < H)[:, None] & (r < R)[None, :], other=0.0)
    DTYPE: tl.constexpr = q_ptr.dtype.element_ty
    READ: tl.constexpr = tl.float32 if INTERPRET else DTYPE  # the interpreter's products of bfloat16 are wrong

    m = tl.full([BLOCK_H], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_H], tl.float32)
    plain = tl.zeros([BLOCK_H, BLOCK_P], tl.float32)
    rotary = tl.zeros([BLOCK_H, BLOCK_R], tl.float32)
    for split in range(first, stop):
        in_window = split < NEAR_SPLITS
        low = tl.where(in_window, split, split - NEAR_SPLITS) * SPLIT
        high = tl.minimum(low + SPLIT, tl.where(in_window, near, far))
        own_high = tl.where(in_window, n - first_row + 1, 0)  # older window rows are in the ring
        far_high = tl.where(in_window, 0, high)
        m_split = tl.full([BLOCK_H], float("-inf"), tl.float32)
        total_split = tl.zeros([BLOCK_H], tl.float32)
        plain_split = tl.zeros([BLOCK_H, BLOCK_P], tl.float32)
        rotary_split = tl.zeros([BLOCK_H, BLOCK_R], tl.float32)
        for start in range(low, high, BLOCK_S):
            i = start + tl.arange(0, BLOCK_S)
            seen = i < high
            own = i < own_high
            page_ptr = tl.where(own, kv_ptr, window_ptr + slot * stride_ws)
            row = tl.where(own, (n - i).to(tl.int32), tl.where(i <= ring_now, ring_now - i, ring_now - i + ring))
            page_rows, stride = tl.where(own, N, ring), tl.where(own, stride_kn, stride_wr)
            if RATIO:
                entry = i
                if CHOSEN:
                    entry = tl.load(topk_ptr + n * stride_pn + i, mask=i < far_high, other=0)
                span = tl.load(tables_ptr + b * stride_tb + entry // PER_SPAN, mask=i < far_high, other=0)
                page_ptr = tl.where(in_window, page_ptr, entries_ptr + span * stride_es)
                row = tl.where(in_window, row, entry % PER_SPAN)
                page_rows, stride = tl.where(in_window, page_rows, PER_SPAN), tl.where(in_window, stride, stride_er)
            row = row.to(tl.int64)
            if FP8:
                stride = P + 2 * R
            row_ptr = tl.multiple_of(page_ptr + row * stride, ALIGN)  # the choice between pools hides the alignment
            scale_ptr = row_ptr
            if FP8:
                scale_ptr += (page_rows - row) * stride + row * SCALE_BYTES
            row_plain, row_rotary = _read_rows(row_ptr, scale_ptr, seen, P, R, FP8, ALIGN, BLOCK_P, BLOCK_R, READ)
            row_plain, row_rotary = row_plain.to(DTYPE), row_rotary.to(DTYPE)
            scores = _product(q_rotary, tl.trans(row_rotary), DTYPE, INTERPRET)
            scores += _product(q_plain, tl.trans(row_plain), DTYPE, INTERPRET)
            scores = tl.where(seen[None, :], scores, float("-inf"))
            most = tl.maximum(m_split, tl.max(scores, 1))
            old = tl.exp(m_split - most)
            mass = tl.exp(scores - most[:, None])
            total_split = total_split * old + tl.sum(mass, 1)
            plain_split = plain_split * old[:, None] + _product(mass, row_plain, DTYPE, INTERPRET)
            rotary_split = rotary_split * old[:, None] + _product(mass, row_rotary, DTYPE, INTERPRET)
            m_split = most
        if WHOLE:
            m, total, plain, rotary = _merge(m, total, plain, rotary, m_split, total_split, plain_split, rotary_split)
        else:
            m, total, plain, rotary = m_split, total_split, plain_split, rotary_split

    if WHOLE:
        _finish(m, total, plain, rotary, n, h, out_ptr, sink_ptr, rotations_ptr, H, stride_rn, P, R, BLOCK_P, BLOCK_R)
    else:
        at = (n * S + first) * H + h
        tl.store(part_m_ptr + at, m, mask=h < H)
        tl.store(part_total_ptr + at, total, mask=h < H)
        at = part_ptr + at[:, None] * (BLOCK_P + BLOCK_R)
        tl.store(at + p[None, :], plain, mask=(h < H)[:, None])
        tl.store(at + BLOCK_P + r[None, :], rotary, mask=(h < H)[:, None])


@triton.jit
def _merge_kernel(
    rotations_ptr, sink_ptr, positions_ptr, sequences_ptr, counts_ptr, out_ptr, part_ptr, part_m_ptr, part_total_ptr,
    H, S, stride_rn, P: tl.constexpr, R: tl.constexpr, WINDOW: tl.constexpr, RATIO: tl.constexpr,
    CHOSEN: tl.constexpr, SPLIT: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Program (row, head): merge the splits in order."""
    n = tl.program_id(0).to(tl.int64)
    h = tl.program_id(1).to(tl.int64) + tl.arange(0, 1)
    t, b = tl.load(positions_ptr + n), tl.load(sequences_ptr + n)
    _, far = _count_keys(n, t, b, counts_ptr, WINDOW, RATIO, CHOSEN)
    splits = tl.where(b >= 0, (WINDOW + SPLIT - 1) // SPLIT + tl.cdiv(far, SPLIT), 0)
    p, r = tl.arange(0, BLOCK_P)[None, :], tl.arange(0, BLOCK_R)[None, :]
    m = tl.full([1], float("-inf"), tl.float32)
    total = tl.zeros([1], tl.float32)
    plain = tl.zeros([1, BLOCK_P], tl.float32)
    rotary = tl.zeros([1, BLOCK_R], tl.float32)
    for split in range(splits):
        at = (n * S + split) * H + h
        m_split, total_split = tl.load(part_m_ptr + at), tl.load(part_total_ptr + at)
        at = part_ptr + at[:, None] * (BLOCK_P + BLOCK_R)
        plain_split, rotary_split = tl.load(at + p), tl.load(at + BLOCK_P + r)
        m, total, plain, rotary = _merge(m, total, plain, rotary, m_split, total_split, plain_split, rotary_split)
    _finish(m, total, plain, rotary, n, h, out_ptr, sink_ptr, rotations_ptr, H, stride_rn, P, R, BLOCK_P, BLOCK_R)


@triton.jit
def _store_kernel(
    kv_ptr, window_ptr, positions_ptr, sequences_ptr, cu_seqlens_ptr, slots_ptr,
    N, ring, stride_kn, stride_ws, stride_wr,
    P: tl.constexpr, R: tl.constexpr, FP8: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Store a row in its window ring, unless it is padding or a later row of this forward would replace it."""
    n = tl.program_id(0).to(tl.int64)
    t, b = tl.load(positions_ptr + n), tl.load(sequences_ptr + n)
    kept = (b >= 0) & (n + ring >= tl.load(cu_seqlens_ptr + tl.maximum(b, 0) + 1))
    slot, row = tl.load(slots_ptr + tl.maximum(b, 0)), t % ring
    SIZE: tl.constexpr = P + 2 * R if FP8 else P + R  # the rotary values of an FP8 row take two bytes each
    size = tl.where(kept, SIZE, 0)
    from_ptr, to_ptr = kv_ptr + n * stride_kn, window_ptr + slot * stride_ws + row * stride_wr
    for low in range(0, SIZE, BLOCK_P):
        x = low + tl.arange(0, BLOCK_P)
        tl.store(to_ptr + x, tl.load(from_ptr + x, mask=x < size), mask=x < size)
    if FP8:
        x = tl.arange(0, SCALE_BYTES)
        size = tl.where(kept, SCALE_BYTES, 0)
        scales = tl.load(kv_ptr + N * stride_kn + n * SCALE_BYTES + x, mask=x < size)
        tl.store(window_ptr + slot * stride_ws + ring * stride_wr + row * SCALE_BYTES + x, scales, mask=x < size)


def _num_warps(block_p: int) -> int:
    """Return the fewest warps with which the tiles of one program fit into registers: AMD's waves have twice as
    many."""
    amd = not INTERPRET and triton.runtime.driver.active.get_current_target().backend == "hip"
    return 8 if block_p > 64 and not amd else 4


def attend(
    q: Tensor,
    kv: Tensor,
    rotations: Tensor,
    sink: Tensor,
    positions: Tensor,
    sequences: Tensor,
    cu_seqlens: Tensor,
    slots: Tensor,
    window_pool: Tensor,
    *,
    window: int,
    ratio: int = 0,
    entries: Tensor | None = None,
    block_tables: Tensor | None = None,
    topk: tuple[Tensor, Tensor] | None = None,
    decode: bool,
    stored: bool = False,
) -> Tensor:
    """Attend, then store the rows in the window: [N, H, K], in the dtype of `q`; see `Ops.attend`.

    Args:
        q: [N, H, K], rotated and scaled; its rows and heads may have any stride.
        kv: Rows of this forward in the format of `window_pool`: [N, K], or uint8 [N, X] as one page of N rows.
        rotations: float32 [N, R], cosines and sines of each query's position, interleaved.
        sink: [H].
        positions: int64 [N].
        sequences: int64 [N], the sequence of each row; negative for padding, whose result is zero.
        cu_seqlens: int64 [B + 1], first row of each sequence.
        slots: int64 [B].
        window_pool: [slots, ring, K], or uint8 [slots, ring, X].
        window: Tokens that a query sees, itself included.
        ratio: Tokens per entry; 0 for no entries.
        entries: [spans, entries per span, K], or uint8 [spans, entries per span, X].
        block_tables: int64 [B, spans per sequence].
        topk: Chosen entries [N, P], and how many of them are valid [N]; None for all entries in a query's past.
        decode: True for few rows: if there are several splits, they run in parallel, with float32 partial results
            [N, S, H, K] in memory.
        stored: Whether the rows are in the window already, where they have replaced none that a query reads.

    Raises:
        ValueError: The rows' formats or sizes do not fit together.
    """
    rows, heads, size = q.shape
    rotary, ring = rotations.shape[1], window_pool.shape[1]
    fp8 = window_pool.dtype == torch.uint8
    width = kv_row_bytes(size, rotary) if fp8 else size
    pools = [kv, window_pool] if entries is None else [kv, window_pool, entries]
    for pool in pools:
        if pool.dtype != window_pool.dtype or pool.shape[-1] != width or pool.stride(-1) != 1:
            raise ValueError(
                f"rows, window and entries must have the same dtype and rows of {width} contiguous elements, "
                f"got {pool.dtype} {tuple(pool.shape)}; the window is {window_pool.dtype}"
            )
    if fp8 and not all(pool.stride(-2) == width for pool in pools):
        raise ValueError("FP8 pages must be contiguous, because their scales follow the last row")
    if (ratio > 0) != (entries is not None and block_tables is not None):
        raise ValueError(f"entries and block tables are needed with a ratio, and only then; the ratio is {ratio}")
    entries = window_pool if entries is None else entries
    tables = slots[:, None] if block_tables is None else block_tables
    topk_indices, counts = topk if topk is not None else (positions[:, None], positions)
    out = torch.empty(rows, heads, size, dtype=q.dtype, device=q.device)
    most = 0
    if ratio:
        most = topk_indices.shape[1] if topk is not None else tables.shape[1] * entries.shape[1]
    splits = triton.cdiv(window, SPLIT) + triton.cdiv(most, SPLIT)
    decode = decode and splits > 1  # a single split needs no partial results
    plain = size - rotary
    block_p = max(GROUP.value if fp8 else 16, triton.next_power_of_2(plain))
    block_r = max(16, triton.next_power_of_2(rotary))
    block_h = block_s = 16  # larger tiles spill registers at a head size of 512
    kept = splits if decode else 0
    part = torch.empty(rows, kept, heads, block_p + block_r, dtype=torch.float32, device=q.device)
    part_m, part_total = torch.empty(2, rows, kept, heads, dtype=torch.float32, device=q.device)
    row_stride = plain + 2 * rotary if fp8 else 0
    kv_stride, window_stride = row_stride or kv.stride(0), row_stride or window_pool.stride(1)
    entry_stride = row_stride or entries.stride(1)
    strides = (kv_stride, window_pool.stride(0), window_stride, entries.stride(0), entry_stride)
    align = math.gcd(16, *(stride * kv.element_size() for stride in strides), *(pool.data_ptr() for pool in pools))
    sizes: dict[str, Any] = {"P": plain, "R": rotary, "BLOCK_P": block_p}
    keys = {"WINDOW": window, "RATIO": ratio, "CHOSEN": topk is not None, "SPLIT": SPLIT, "BLOCK_R": block_r}
    launch(
        _attend_kernel, (rows, triton.cdiv(heads, block_h), splits if decode else 1),
        q, kv, window_pool, entries, rotations, sink,
        positions, sequences, cu_seqlens, slots, tables, topk_indices, counts,
        out, part, part_m, part_total,
        rows, heads, splits, ring,
        q.stride(0), q.stride(1), kv_stride, window_pool.stride(0), window_stride,
        entries.stride(0), entry_stride, rotations.stride(0), tables.stride(0),
        topk_indices.stride(0),
        ALIGN=align, PER_SPAN=entries.shape[1], WHOLE=not decode, BLOCK_H=block_h, BLOCK_S=block_s, INTERPRET=INTERPRET,
        FP8=fp8, num_warps=_num_warps(block_p), num_stages=2, **sizes, **keys,
    )  # fmt: skip
    if decode:
        launch(
            _merge_kernel, (rows, heads), rotations, sink, positions, sequences, counts, out, part, part_m, part_total,
            heads, splits, rotations.stride(0), num_warps=max(1, block_p // 256), **sizes, **keys,
        )  # fmt: skip
    if not stored:
        launch(
            _store_kernel, (rows,),
            kv, window_pool, positions, sequences, cu_seqlens, slots,
            rows, ring, kv_stride, window_pool.stride(0), window_stride, FP8=fp8, num_warps=1, **sizes,
        )  # fmt: skip
    return out


def calls(shapes: Shapes, rows: int, make: Make) -> Iterator[Call]:
    """Calls with `rows` rows: sequences that decode one token each, and one sequence that is prefilled."""
    size, rotary, heads = shapes.head_dim, shapes.qk_rope_head_dim, shapes.num_attention_heads
    ring = shapes.sliding_window + QUERY_BLOCK
    for decode in (True, False):
        sequences = rows if decode else 1
        for kind, ratio, seen in (("window", 0, 0), ("chosen", 4, shapes.index_topk), ("all", 128, 2 * SPLIT)):
            per_span = 256 // ratio if ratio else 1
            spans = -(-seen // per_span)
            end = max(ratio * seen, shapes.sliding_window + rows)
            for fp8, activations in product((False, True), shapes.activations):
                dtype, width = (torch.uint8, kv_row_bytes(size, rotary)) if fp8 else (torch.float32, size)
                q = make.floats(rows, heads, size, dtype=activations)
                kv = make.floats(rows, width, dtype=dtype)
                rotations = make.floats(rows, rotary, dtype=torch.float32)
                sink = make.floats(heads, dtype=torch.float32)
                positions = make.ints([end - 1] * rows if decode else range(end - rows, end))
                ids = make.ints(range(rows) if decode else [0] * rows)
                cu_seqlens = make.ints(range(rows + 1) if decode else [0, rows])
                slots = make.ints(range(sequences))
                pool = make.floats(sequences, ring, width, dtype=dtype)
                options: dict[str, Any] = {}
                if ratio:
                    options["entries"] = make.floats(sequences * spans, per_span, width, dtype=dtype)
                    options["block_tables"] = make.ints(range(sequences * spans)).view(sequences, spans)
                if kind == "chosen":
                    chosen = make.ints([*range(seen)] * rows, dtype=torch.int32).view(rows, seen)
                    options["topk"] = (chosen, make.ints([seen] * rows))
                run = partial(
                    attend, q, kv, rotations, sink, positions, ids, cu_seqlens, slots, pool,
                    window=shapes.sliding_window, ratio=ratio, decode=decode, stored=decode, **options,
                )  # fmt: skip
                distinct = sequences * (shapes.sliding_window + seen) + (0 if decode else rows - 1)
                moved = (distinct + (0 if decode else rows)) * width * dtype.itemsize + 2 * q.nbytes
                flops = 4 * size * heads * rows * (shapes.sliding_window + seen)
                name = f"{'decode' if decode else 'prefill'}, {kind}, {'FP8' if fp8 else 'float32'} rows"
                yield Call(with_dtype(name, activations), run, moved, flops, tensor_cores=True)
