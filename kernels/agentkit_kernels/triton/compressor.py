"""KV compression: RATIO tokens become one entry, an average of their rows with a gate per channel.

    a[t]     = scores[t] + ape[t mod ratio]
    entry[w] = rope(RMSNorm(sum_t softmax_t(a[t]) * values[t]), w * ratio)      softmax per channel

HCA (ratio 128) pools the rows of window w. CSA (ratio 4) has rows of two series, 2 * K wide: entry w pools the first
half of the rows of window w - 1 and the second half of those of window w. Windows are aligned to absolute positions.

A window's rows come from this forward (`projected`) or from earlier ones, which left them in the pools of open rows,
with `ape` already added: token t in row t mod open rows. There are two kinds of programs:

1. One takes one completed entry, for prefill and decode alike. The grid has room for every entry that the forward may
   complete, N / ratio + B, and each program finds its sequence from the lengths on the device. So tokens that complete
   nothing cost nothing, and the grid does not depend on positions. Rows are pooled with a running maximum and sum, 8 at
   a time, so that a window of 128 rows needs few registers.
2. The other stores one of the last rows of a sequence. In a short forward, such as a decoding step, it replaces a row
   that no entry pools any more, so one launch has both kinds; else a second launch follows the first.

A row's bits do not depend on the forward that computed it if the pools are float32.

Entries are stored through block tables, as they are, as 584-byte key-value rows, or as E4M3 index keys with a float32
scale (a power of two) each. With FP4, index keys are rotated by Hadamard's matrix and rounded to MXFP4 before. See
`quantize.py` for the formats.

Floor: the projected values and scores read once (4 KiB per token for CSA, 2 KiB for HCA and 1 KiB for index keys, with
bfloat16), entries written once; 6 flops per value pooled. Source: the DeepSeek-V4 reference. Dimension key: `ops.py`.
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
from agentkit_kernels.ops import Compressor
from agentkit_kernels.reference.quantize import kv_row_bytes
from agentkit_kernels.triton.launch import launch
from agentkit_kernels.triton.quantize import (
    check_index_size,
    encode_e4m3,
    inverse_scale,
    round_index,
    scale_byte,
    store_kv_row,
)
from agentkit_kernels.triton.rope import pairs_of, rotate, turn

_TILE, _SEQUENCES = 8, 64
"""Rows pooled at once, and sequences searched at once."""
_PLAIN, _KV_ROW, _INDEX_KEY = 0, 1, 2


@triton.jit
def _find(cu_seqlens_ptr, starts_ptr, entry, sequences, RATIO: tl.constexpr, CHUNK: tl.constexpr):
    """Return the sequence that completes the forward's entry number `entry`, and the entry's number among those of this
    sequence; the sequence is `sequences` if the forward completes fewer entries."""
    sequence = 0
    earlier = 0
    completed = 0
    for first in range(0, sequences, CHUNK):
        b = first + tl.arange(0, CHUNK)
        inside = b < sequences
        start = tl.load(starts_ptr + b, mask=inside, other=0)
        low = tl.load(cu_seqlens_ptr + b, mask=inside, other=0)
        length = tl.load(cu_seqlens_ptr + b + 1, mask=inside, other=0) - low
        count = ((start + length) // RATIO - start // RATIO).to(tl.int32)
        done = inside & (completed + tl.cumsum(count, axis=0) <= entry)
        sequence += tl.sum(done.to(tl.int32), axis=0)
        earlier += tl.sum(tl.where(done, count, 0), axis=0)
        completed += tl.sum(count, axis=0)
    return sequence, entry - earlier


@triton.jit
def _entry(
    projected_ptr, ape_ptr, norm_ptr, frequencies_ptr, cu_seqlens_ptr, starts_ptr, slots_ptr, tables_ptr, values_ptr,
    scores_ptr, entries_ptr, scales_ptr,
    program, sequences, stride_projected, stride_slot, stride_table, stride_span, column, eps,
    RATIO: tl.constexpr, SERIES: tl.constexpr, K: tl.constexpr, R: tl.constexpr, OPEN: tl.constexpr,
    PER_SPAN: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr, FP4: tl.constexpr,
    FORMAT: tl.constexpr,
):  # fmt: skip
    """Pool, norm, rotate and store one completed entry."""
    width: tl.constexpr = SERIES * K
    sequence, number = _find(cu_seqlens_ptr, starts_ptr, program, sequences, RATIO, CHUNK)
    if sequence < sequences:
        start = tl.load(starts_ptr + sequence)
        window = start // RATIO + number
        projected_ptr += (tl.load(cu_seqlens_ptr + sequence) - start) * stride_projected + column
        slot = tl.load(slots_ptr + sequence) * stride_slot
        k = tl.arange(0, BLOCK)
        most = tl.full([BLOCK], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK], tl.float32)
        pooled = tl.zeros([BLOCK], tl.float32)
        for first in range(0, SERIES * RATIO, TILE):
            row = first + tl.arange(0, TILE)
            token = (window - (SERIES - 1)) * RATIO + row
            x = (row // RATIO * K)[:, None] + k[None, :]  # the rows of each window use the next series
            new = (token >= start)[:, None] & (k < K)[None, :]
            old = ((token >= 0) & (token < start))[:, None] & (k < K)[None, :]
            new_place = token[:, None] * stride_projected + x
            old_place = slot + (token % OPEN)[:, None] * width + x
            ape = tl.load(ape_ptr + (row % RATIO)[:, None] * width + x, mask=new, other=0.0).to(tl.float32)
            score = tl.load(projected_ptr + new_place + width, mask=new, other=0.0).to(tl.float32) + ape
            score = tl.where(new, score, tl.load(scores_ptr + old_place, mask=old, other=0.0).to(tl.float32))
            score = tl.where((token >= 0)[:, None], score, float("-inf"))
            value = tl.load(projected_ptr + new_place, mask=new, other=0.0).to(tl.float32)
            value = tl.where(new, value, tl.load(values_ptr + old_place, mask=old, other=0.0).to(tl.float32))

            higher = tl.maximum(most, tl.max(score, axis=0))
            mass = tl.exp(score - higher[None, :])
            rescale = tl.exp(most - higher)
            total = total * rescale + tl.sum(mass, axis=0)
            pooled = pooled * rescale + tl.sum(mass * value, axis=0)
            most = higher
        entry = pooled / total
        norm = tl.load(norm_ptr + k, mask=k < K, other=0.0).to(tl.float32)
        entry = entry * tl.rsqrt(tl.sum(entry * entry, axis=0) / K + eps) * norm
        pair, rotary = pairs_of(K, R, BLOCK)
        cosine, sine = turn(window * RATIO, tl.load(frequencies_ptr + pair, mask=rotary, other=0.0))
        entry = rotate(entry[None, :], cosine, sine, 1, BLOCK)
        if FP4:
            entry = round_index(entry, 1, BLOCK)

        span = tl.load(tables_ptr + sequence.to(tl.int64) * stride_table + window // PER_SPAN)
        entries_ptr += span * stride_span
        place = window % PER_SPAN
        entry = tl.reshape(entry, (BLOCK,))
        if FORMAT == 0:
            tl.store(entries_ptr + place * K + k, entry, mask=k < K)
        elif FORMAT == 1:
            store_kv_row(entries_ptr, place, PER_SPAN, entry, K, R, BLOCK)
        else:
            byte = scale_byte(tl.maximum(tl.max(tl.abs(entry), axis=0), 1e-4), 448.0)
            tl.store(entries_ptr + place * K + k, encode_e4m3(entry * inverse_scale(byte)), mask=k < K)
            tl.store(scales_ptr + span * PER_SPAN + place, inverse_scale(254 - byte))


@triton.jit
def _open_row(
    projected_ptr, ape_ptr, cu_seqlens_ptr, starts_ptr, slots_ptr, values_ptr, scores_ptr,
    sequence, back, stride_projected, stride_slot, column,
    RATIO: tl.constexpr, WIDTH: tl.constexpr, OPEN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Store one of the last OPEN rows of a sequence, counted from its end."""
    low, high = tl.load(cu_seqlens_ptr + sequence), tl.load(cu_seqlens_ptr + sequence + 1)
    n = high - 1 - back
    if n >= low:
        token = tl.load(starts_ptr + sequence) + n - low
        x = tl.arange(0, BLOCK)
        projected_ptr += n * stride_projected + column
        value = tl.load(projected_ptr + x, mask=x < WIDTH, other=0.0)
        score = tl.load(projected_ptr + WIDTH + x, mask=x < WIDTH, other=0.0).to(tl.float32)
        score += tl.load(ape_ptr + token % RATIO * WIDTH + x, mask=x < WIDTH, other=0.0).to(tl.float32)
        place = tl.load(slots_ptr + sequence) * stride_slot + token % OPEN * WIDTH + x
        tl.store(values_ptr + place, value, mask=x < WIDTH)
        tl.store(scores_ptr + place, score, mask=x < WIDTH)


@triton.jit
def _compress(
    projected_ptr, ape_ptr, norm_ptr, frequencies_ptr, cu_seqlens_ptr, starts_ptr, slots_ptr, tables_ptr, values_ptr,
    scores_ptr, entries_ptr, scales_ptr,
    entries, rows, sequences, stride_projected, stride_slot, stride_table, stride_span, column, eps,
    RATIO: tl.constexpr, SERIES: tl.constexpr, K: tl.constexpr, R: tl.constexpr, OPEN: tl.constexpr,
    PER_SPAN: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr, OPEN_BLOCK: tl.constexpr, CHUNK: tl.constexpr,
    FP4: tl.constexpr, FORMAT: tl.constexpr,
):  # fmt: skip
    """The first `entries` programs compute an entry each, the others store an open row each, up to `rows` of a
    sequence."""
    program = tl.program_id(0)
    if program < entries:
        _entry(
            projected_ptr, ape_ptr, norm_ptr, frequencies_ptr, cu_seqlens_ptr, starts_ptr, slots_ptr, tables_ptr,
            values_ptr, scores_ptr, entries_ptr, scales_ptr,
            program, sequences, stride_projected, stride_slot, stride_table, stride_span, column, eps,
            RATIO, SERIES, K, R, OPEN, PER_SPAN, TILE, BLOCK, CHUNK, FP4, FORMAT,
        )  # fmt: skip
    else:
        _open_row(
            projected_ptr, ape_ptr, cu_seqlens_ptr, starts_ptr, slots_ptr, values_ptr, scores_ptr,
            (program - entries) // rows, (program - entries) % rows, stride_projected, stride_slot, column,
            RATIO, SERIES * K, OPEN, OPEN_BLOCK,
        )  # fmt: skip


def compress(
    projected: Tensor,
    compressor: Compressor,
    cu_seqlens: Tensor,
    starts: Tensor,
    slots: Tensor,
    block_tables: Tensor,
    longest: int,
    values: Tensor,
    scores: Tensor,
    entries: Tensor,
    *,
    key_scales: Tensor | None = None,
    fp4: bool = False,
) -> None:
    """Store every entry that this forward's tokens complete, and the last open rows of each sequence.

    Args:
        projected: [N, X], rows of any stride; `compressor.column` is that of the values, and the scores follow.
        compressor: Its parameters, contiguous.
        cu_seqlens: int64 [B + 1], the first row of each sequence, and the number of rows that are tokens.
        starts: int64 [B], the position of each sequence's first new token.
        slots: int64 [B].
        block_tables: int64 [B, spans].
        longest: An upper bound of the number of new tokens of any sequence.
        values: Open rows [slots, rows, X], contiguous within a slot; at least one window, and two with `overlap`.
        scores: The same shape and strides.
        entries: [spans, entries per span, K] of a float dtype; uint8 E4M3 codes of index keys [spans, entries per span,
            K] with `key_scales`, float32 [spans, entries per span]; or pages of key-value rows (`quantize.py`).
        key_scales: Of index keys in FP8.
        fp4: Rotate entries by Hadamard's matrix and round them to MXFP4, as `qkv` does with index queries.

    Raises:
        ValueError: the entries have none of these formats, there are too few open rows, or K does not suit `fp4`.
    """
    size, width = len(compressor.norm), compressor.ape.shape[1]
    series, rotary = width // size, 2 * len(compressor.frequencies)
    format = _format(entries, size, rotary, key_scales)
    if values.shape[1] < series * compressor.ratio or values.stride() != scores.stride():
        raise ValueError(
            f"an entry pools {series * compressor.ratio} rows, but the pools have {values.shape[1]} open rows with "
            f"strides {values.stride()} and {scores.stride()}"
        )
    if fp4:
        check_index_size(size)
    sequences, block = len(slots), triton.next_power_of_2(size)
    count, open_rows = (len(projected) // compressor.ratio + sequences if sequences else 0), values.shape[1]
    rows = min(longest, open_rows)
    # New rows replace those of tokens before start + longest - open rows, and entries pool none before this one.
    short = longest <= open_rows - series * compressor.ratio + 1
    for entries_of, rows_of in [(count, rows)] if short else [(count, 0), (0, rows)]:
        launch(
            _compress, (entries_of + sequences * rows_of,), projected, compressor.ape, compressor.norm,
            compressor.frequencies, cu_seqlens, starts, slots, block_tables, values, scores, entries, key_scales,
            entries_of, max(1, rows_of), sequences, projected.stride(0), values.stride(0), block_tables.stride(0),
            entries.stride(0), compressor.column, compressor.eps, RATIO=compressor.ratio, SERIES=series, K=size,
            R=rotary, OPEN=open_rows, PER_SPAN=entries.shape[1], TILE=_TILE, BLOCK=block,
            OPEN_BLOCK=triton.next_power_of_2(width), CHUNK=_SEQUENCES, FP4=fp4, FORMAT=format,
            num_warps=max(1, min(8, block // 64)),
        )  # fmt: skip


def _format(entries: Tensor, size: int, rotary: int, key_scales: Tensor | None) -> int:
    if entries.dtype.is_floating_point and entries.shape[2] == size and key_scales is None:
        return _PLAIN
    if entries.dtype == torch.uint8 and key_scales is None and entries.shape[2] == kv_row_bytes(size, rotary):
        return _KV_ROW
    if entries.dtype == torch.uint8 and key_scales is not None and entries.shape[2] == size:
        return _INDEX_KEY
    raise ValueError(
        f"no format of entries of {size} columns: {entries.dtype} {tuple(entries.shape)} with"
        f"{'out' if key_scales is None else ''} scales"
    )


def calls(shapes: Shapes, rows: int, make: Make) -> Iterator[Call]:
    """Yield each compressor and format, prefilling one sequence and decoding one token of each, which completes an
    entry."""
    rotary, head, index = shapes.qk_rope_head_dim, shapes.head_dim, shapes.index_head_dim
    column = shapes.q_lora_rank + head + shapes.index_n_heads
    kinds = (("CSA", 4, head, 2), ("HCA", 128, head, 1), ("index keys", 4, index, 2))
    for (kind, ratio, size, series), activations in product(kinds, shapes.activations):
        width, per_span, open_rows = series * size, 256 // ratio, series * ratio + 12
        vector = partial(make.floats, dtype=torch.float32)
        parameters = Compressor(
            "", column, ratio, series == 2, vector(ratio, width), vector(size), 1e-6, vector(rotary // 2)
        )  # fmt: skip
        projected = make.floats(rows, column + 2 * width, dtype=activations)
        for phase in ("prefill", "decode"):
            sequences, longest = (1, rows) if phase == "prefill" else (rows, 1)
            completed = rows // ratio if phase == "prefill" else rows
            starts = make.ints([0 if phase == "prefill" else 3 * ratio - 1] * sequences)
            cu_seqlens = make.ints([0, rows] if phase == "prefill" else range(rows + 1))
            spans = -(-(rows if phase == "prefill" else 3 * ratio) // 256)
            tables = make.ints(range(1, sequences * spans + 1)).view(sequences, spans)
            values, scores = (vector(sequences, open_rows, width) for _ in range(2))
            stored = min(longest, open_rows) * sequences
            pooled = completed * (series * ratio - 1) * size if phase == "decode" else 0  # the new row is projected
            moved = rows * 2 * width * projected.itemsize + stored * width * 8 + pooled * 8
            ape = parameters.ape if phase == "prefill" else parameters.ape[:1]  # all rows decode the same position
            moved += ape.nbytes + parameters.norm.nbytes
            flops = completed * series * ratio * size * 6
            slots = make.ints(range(sequences))
            run = partial(
                compress, projected, parameters, cu_seqlens, starts, slots, tables, longest, values, scores
            )  # fmt: skip
            shape = (sequences * spans + 1, per_span)
            name = with_dtype(f"{phase}, {kind}", activations)
            rounded = (False, True) if kind == "index keys" else (False,)
            for fp4 in rounded:
                label, run_entries = f"{name}{', FP4' if fp4 else ''}", partial(run, fp4=fp4)
                plain = partial(run_entries, vector(*shape, size))
                yield Call(f"{label}, float32", plain, moved + completed * size * 4, flops)
                if kind == "index keys":
                    keys, key_scales = make.floats(*shape, size, dtype=torch.uint8), vector(*shape)
                    in_fp8 = partial(run_entries, keys, key_scales=key_scales)
                    yield Call(f"{label}, FP8", in_fp8, moved + completed * (size + 4), flops)
            if kind != "index keys":
                row = kv_row_bytes(size, rotary)
                pages = make.floats(*shape, row, dtype=torch.uint8)
                yield Call(f"{name}, key-value rows", partial(run, pages), moved + completed * row, flops)
