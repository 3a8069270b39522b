"""Queries and the key-value row of an attention layer, from the products of the query latent and of the layer's input.

    q[h]     = rope(q[h] / rms(q[h])) * K^-0.5                 per head, without a weight
    kv       = rope(RMSNorm(kv))                               quantised and stored in the format of the window's pool
    index[j] = rope(index[j])                                  with FP4, rotated by Hadamard's matrix and rounded
    w[j]     = w[j] * (J * C)^-0.5

All in one launch. A program takes a few heads, a few index heads, or the key-value row; the sizes decide which, so a
row has the same bits in every batch.

The key-value row is rounded to the dtype of the activations, then to the pool's format, and written to the rows of this
forward, from which `attend` reads it. A forward of at most QUERY_BLOCK tokens per sequence also writes it to its place
in the window: the ring has as many rows more than the window, so no query of the forward needs the row that it
replaces. `attend` stores the rows of a longer forward when it has read the old ones.

Floor: each value read and written once (at V4-Flash with bfloat16, 132 KiB read and 132 KiB written per row), and the
rotations; 8 flops per value. Source: the DeepSeek-V4 reference. Twins: `reference/qkv.py` and, for formats,
`reference/quantize.py`. Dimension key: `agentkit_kernels.ops`.
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
from agentkit_kernels.ops import QUERY_BLOCK, Heads
from agentkit_kernels.reference.quantize import kv_row_bytes
from agentkit_kernels.triton.launch import launch
from agentkit_kernels.triton.quantize import check_index_size, round_index, store_kv_row
from agentkit_kernels.triton.rope import rotate, rotations_of

_VALUES = 4096
"""Values of one program, of as many heads as they fill."""


@triton.jit
def _heads(
    x_ptr, out_ptr, rotations_ptr, first, eps, SCALE: tl.constexpr,
    H: tl.constexpr, K: tl.constexpr, R: tl.constexpr, HEADS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Norm, rotate and scale the heads of one row from number `first` on."""
    cosine, sine = rotations_of(rotations_ptr, K, R, BLOCK)
    head, column = first + tl.arange(0, HEADS), tl.arange(0, BLOCK)
    inside = (head[:, None] < H) & (column[None, :] < K)
    place = head[:, None] * K + column[None, :]
    x = tl.load(x_ptr + place, mask=inside, other=0.0).to(tl.float32)
    x *= tl.rsqrt(tl.sum(x * x, axis=1) / K + eps)[:, None]
    tl.store(out_ptr + place, rotate(x, cosine, sine, HEADS, BLOCK) * SCALE, mask=inside)


@triton.jit
def _key_value(
    x_ptr, norm_ptr, out_ptr, pool_ptr, rotations_ptr, positions_ptr, sequences_ptr, slots_ptr, row, rows, ring, eps,
    stride_slot, stride_row, K: tl.constexpr, R: tl.constexpr, BLOCK: tl.constexpr, FP8: tl.constexpr,
    STORE: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """Norm and rotate one key-value row, and write it to the rows of the forward and, with STORE, to its window."""
    cosine, sine = rotations_of(rotations_ptr, K, R, BLOCK)
    column = tl.arange(0, BLOCK)[None, :]
    x = tl.load(x_ptr + column, mask=column < K, other=0.0).to(tl.float32)
    norm = tl.load(norm_ptr + column, mask=column < K, other=0.0).to(tl.float32)
    x = x * tl.rsqrt(tl.sum(x * x, axis=1) / K + eps)[:, None] * norm
    x = tl.reshape(rotate(x, cosine, sine, 1, BLOCK), (BLOCK,)).to(DTYPE).to(tl.float32)
    column = tl.arange(0, BLOCK)
    if FP8:
        store_kv_row(out_ptr, row, rows, x, K, R, BLOCK)
    else:
        tl.store(out_ptr + row * K + column, x, mask=column < K)
    if STORE:
        sequence = tl.load(sequences_ptr + row)
        if sequence >= 0:
            place = tl.load(positions_ptr + row) % ring
            pool_ptr += tl.load(slots_ptr + sequence) * stride_slot
            if FP8:
                store_kv_row(pool_ptr, place, ring, x, K, R, BLOCK)
            else:
                tl.store(pool_ptr + place * stride_row + column, x, mask=column < K)


@triton.jit
def _index_heads(
    x_ptr, weights_ptr, out_ptr, out_weights_ptr, rotations_ptr, first, WEIGHT_SCALE: tl.constexpr,
    J: tl.constexpr, C: tl.constexpr, R: tl.constexpr, HEADS: tl.constexpr, BLOCK: tl.constexpr, FP4: tl.constexpr,
):  # fmt: skip
    """Rotate the index heads of one row from number `first` on, round them with FP4, and scale their weights."""
    cosine, sine = rotations_of(rotations_ptr, C, R, BLOCK)
    head, column = first + tl.arange(0, HEADS), tl.arange(0, BLOCK)
    inside = (head[:, None] < J) & (column[None, :] < C)
    place = head[:, None] * C + column[None, :]
    x = tl.load(x_ptr + place, mask=inside, other=0.0).to(tl.float32)
    weight = tl.load(weights_ptr + head, mask=head < J, other=0.0).to(tl.float32) * WEIGHT_SCALE
    x = rotate(x, cosine, sine, HEADS, BLOCK)
    if FP4:
        x = round_index(x, HEADS, BLOCK)
    tl.store(out_ptr + place, x, mask=inside)
    tl.store(out_weights_ptr + head, weight, mask=head < J)


@triton.jit
def _qkv(
    q_ptr, projected_ptr, rotations_ptr, norm_ptr, positions_ptr, sequences_ptr, slots_ptr,
    out_q_ptr, out_kv_ptr, pool_ptr, out_index_ptr, out_weights_ptr,
    rows, ring, stride_q, stride_projected, stride_slot, stride_row, kv_column, index_column, eps,
    H: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr, HEADS: tl.constexpr,
    J: tl.constexpr, C: tl.constexpr, INDEX_BLOCK: tl.constexpr, INDEX_HEADS: tl.constexpr,
    R: tl.constexpr, SCALE: tl.constexpr, WEIGHT_SCALE: tl.constexpr,
    FP8: tl.constexpr, STORE: tl.constexpr, FP4: tl.constexpr,
):  # fmt: skip
    """Compute one part of a row: HEADS heads, then the key-value row, then INDEX_HEADS index heads each."""
    row = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    q_ptr += row * stride_q
    projected_ptr += row * stride_projected
    rotations_ptr += row * R
    parts: tl.constexpr = (H + HEADS - 1) // HEADS
    if part < parts:
        _heads(q_ptr, out_q_ptr + row * (H * K), rotations_ptr, part * HEADS, eps, SCALE, H, K, R, HEADS, BLOCK)
    elif part == parts:
        _key_value(
            projected_ptr + kv_column, norm_ptr, out_kv_ptr, pool_ptr, rotations_ptr, positions_ptr, sequences_ptr,
            slots_ptr, row, rows, ring, eps, stride_slot, stride_row, K, R, BLOCK, FP8, STORE,
            out_q_ptr.dtype.element_ty,
        )  # fmt: skip
    elif J > 0:
        _index_heads(
            q_ptr + H * K, projected_ptr + index_column, out_index_ptr + row * (J * C), out_weights_ptr + row * J,
            rotations_ptr, (part - parts - 1) * INDEX_HEADS, WEIGHT_SCALE, J, C, R, INDEX_HEADS, INDEX_BLOCK, FP4,
        )  # fmt: skip


def qkv(
    q: Tensor,
    projected: Tensor,
    rotations: Tensor,
    heads: Heads,
    positions: Tensor,
    sequences: Tensor,
    slots: Tensor,
    window_pool: Tensor,
    *,
    store: bool,
    fp4: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Norm and rotate a layer's queries, its key-value row and its index queries.

    Args:
        q: [N, H * K + J * C], rows of any stride.
        projected: [N, X], rows of any stride.
        rotations: float32 [N, R], contiguous.
        heads: Sizes and columns.
        positions: int64 [N].
        sequences: int64 [N], the sequence of each row; negative for padding, which is not stored in the window.
        slots: int64 [B].
        window_pool: [slots, ring, K], or uint8 pages [slots, ring, X] of key-value rows (`quantize.py`).
        store: Whether rows are stored in the window, and not by `attend`.
        fp4: Rotate index queries by Hadamard's matrix and round them to MXFP4, as `compress` does with the keys.

    Returns:
        Queries [N, H, K] in the dtype of `q`; rows in the format of the pool, [N, K], or uint8 [N, X] as one page of N
        rows; index queries [N, J, C] in the dtype of `q`; and index weights [N, J], float32.

    Raises:
        ValueError: The pool has another row size, or C does not suit `fp4`.
    """
    rows, (count, size, index_heads, index_size) = len(q), _sizes(heads)
    fp8 = window_pool.dtype == torch.uint8
    width = kv_row_bytes(size, rotations.shape[1]) if fp8 else size
    if window_pool.shape[2] != width or window_pool.stride(2) != 1 or (fp8 and window_pool.stride(1) != width):
        raise ValueError(
            f"the window needs contiguous rows of {width} elements, got {window_pool.dtype} {tuple(window_pool.shape)}"
        )
    if fp4:
        check_index_size(index_size)
    out_q = torch.empty(rows, count, size, dtype=q.dtype, device=q.device)
    out_kv = torch.empty(rows, width, dtype=window_pool.dtype, device=q.device)
    out_index = torch.empty(rows, index_heads, index_size, dtype=q.dtype, device=q.device)
    out_weights = torch.empty(rows, index_heads, dtype=torch.float32, device=q.device)
    block, index_block = triton.next_power_of_2(size), triton.next_power_of_2(max(2, index_size))
    some = max(1, min(_VALUES // block, triton.next_power_of_2(count)))
    index_some = max(1, min(_VALUES // index_block, triton.next_power_of_2(max(1, index_heads))))
    launch(
        _qkv, (rows, -(-count // some) + 1 + -(-index_heads // index_some)), q, projected, rotations, heads.kv_norm,
        positions, sequences, slots, out_q, out_kv, window_pool, out_index, out_weights, rows, window_pool.shape[1],
        q.stride(0), projected.stride(0), window_pool.stride(0), window_pool.stride(1), heads.kv_column,
        heads.index_column, heads.eps, H=count, K=size, BLOCK=block, HEADS=some, J=index_heads, C=index_size,
        INDEX_BLOCK=index_block, INDEX_HEADS=index_some, R=rotations.shape[1], SCALE=size**-0.5,
        WEIGHT_SCALE=max(1, index_heads * index_size) ** -0.5, FP8=fp8, STORE=store, FP4=fp4,
    )  # fmt: skip
    return out_q, out_kv, out_index, out_weights


def _sizes(heads: Heads) -> tuple[int, int, int, int]:
    return heads.heads, heads.head_dim, heads.index_heads, heads.index_head_dim


def calls(shapes: Shapes, rows: int, make: Make) -> Iterator[Call]:
    """Yield a layer without an indexer, one with it, and one that rounds index queries, with both formats of rows. More
    rows than QUERY_BLOCK are one sequence's, and not stored."""
    size, rotary = shapes.head_dim, shapes.qk_rope_head_dim
    norm = make.floats(size, dtype=torch.float32)
    rotations = make.floats(rows, rotary, dtype=torch.float32)
    plain = Heads(shapes.num_attention_heads, size, shapes.q_lora_rank, norm, 1e-6)
    index = plain._replace(
        index_heads=shapes.index_n_heads, index_head_dim=shapes.index_head_dim,
        index_column=shapes.q_lora_rank + size,
    )  # fmt: skip
    store = rows <= QUERY_BLOCK
    positions, slots = make.ints([77] * rows), make.ints(range(rows))
    kinds = (("window", plain, False), ("index", index, False), ("index, FP4", index, True))
    for (kind, heads, fp4), fp8, activations in product(kinds, (False, True), shapes.activations):
        dtype, width = (torch.uint8, kv_row_bytes(size, rotary)) if fp8 else (torch.float32, size)
        pool = make.floats(rows if store else 1, shapes.sliding_window + QUERY_BLOCK, width, dtype=dtype)
        values, index_values = heads.heads * size, heads.index_heads * heads.index_head_dim
        q = make.floats(rows, values + index_values, dtype=activations)
        projected = make.floats(rows, shapes.q_lora_rank + size + heads.index_heads, dtype=activations)
        read = (values + size + index_values + heads.index_heads) * q.itemsize + 4 * rotary
        written = (values + index_values) * q.itemsize + 4 * heads.index_heads + width * dtype.itemsize
        moved = rows * (read + written + store * (width * dtype.itemsize + 24)) + norm.nbytes
        flops = rows * 8 * (values + size + index_values)
        run = partial(
            qkv, q, projected, rotations, heads, positions, slots, slots, pool, store=store, fp4=fp4
        )  # fmt: skip
        yield Call(with_dtype(f"{kind}, {'FP8' if fp8 else 'float32'} rows", activations), run, moved, flops)
