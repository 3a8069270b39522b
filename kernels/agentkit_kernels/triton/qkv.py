"""Queries and the key-value row of an attention layer, from the products of the query latent and of the layer's input.

    q[h]     = rope(q[h] / rms(q[h])) * K^-0.5                 per head, without a weight
    kv       = rope(RMSNorm(kv))
    index[j] = rope(index[j])
    w[j]     = w[j] * (J * C)^-0.5

All in one launch. A program takes a few heads, a few index heads, or the key-value row; the sizes decide which, so a
row has the same bits in every batch.

Floor: each value read and written once (at V4-Flash with bfloat16, 132 KiB read and 132 KiB written per row), and the
rotations. Source: the DeepSeek-V4 reference. Dimension key: `agentkit_kernels.ops`.
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
from agentkit_kernels.ops import Heads
from agentkit_kernels.triton.launch import launch
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
def _key_value(x_ptr, norm_ptr, out_ptr, rotations_ptr, eps, K: tl.constexpr, R: tl.constexpr, BLOCK: tl.constexpr):
    """Norm and rotate one key-value row."""
    cosine, sine = rotations_of(rotations_ptr, K, R, BLOCK)
    column = tl.arange(0, BLOCK)[None, :]
    x = tl.load(x_ptr + column, mask=column < K, other=0.0).to(tl.float32)
    norm = tl.load(norm_ptr + column, mask=column < K, other=0.0).to(tl.float32)
    x = x * tl.rsqrt(tl.sum(x * x, axis=1) / K + eps)[:, None] * norm
    tl.store(out_ptr + column, rotate(x, cosine, sine, 1, BLOCK), mask=column < K)


@triton.jit
def _index_heads(
    x_ptr, weights_ptr, out_ptr, out_weights_ptr, rotations_ptr, first, WEIGHT_SCALE: tl.constexpr,
    J: tl.constexpr, C: tl.constexpr, R: tl.constexpr, HEADS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Rotate the index heads of one row from number `first` on, and scale their weights."""
    cosine, sine = rotations_of(rotations_ptr, C, R, BLOCK)
    head, column = first + tl.arange(0, HEADS), tl.arange(0, BLOCK)
    inside = (head[:, None] < J) & (column[None, :] < C)
    place = head[:, None] * C + column[None, :]
    x = tl.load(x_ptr + place, mask=inside, other=0.0).to(tl.float32)
    weight = tl.load(weights_ptr + head, mask=head < J, other=0.0).to(tl.float32) * WEIGHT_SCALE
    tl.store(out_ptr + place, rotate(x, cosine, sine, HEADS, BLOCK), mask=inside)
    tl.store(out_weights_ptr + head, weight, mask=head < J)


@triton.jit
def _qkv(
    q_ptr, projected_ptr, rotations_ptr, norm_ptr, out_q_ptr, out_kv_ptr, out_index_ptr, out_weights_ptr,
    stride_q, stride_projected, kv_column, index_column, eps,
    H: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr, HEADS: tl.constexpr,
    J: tl.constexpr, C: tl.constexpr, INDEX_BLOCK: tl.constexpr, INDEX_HEADS: tl.constexpr,
    R: tl.constexpr, SCALE: tl.constexpr, WEIGHT_SCALE: tl.constexpr,
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
        _key_value(projected_ptr + kv_column, norm_ptr, out_kv_ptr + row * K, rotations_ptr, eps, K, R, BLOCK)
    elif J > 0:
        _index_heads(
            q_ptr + H * K, projected_ptr + index_column, out_index_ptr + row * (J * C), out_weights_ptr + row * J,
            rotations_ptr, (part - parts - 1) * INDEX_HEADS, WEIGHT_SCALE, J, C, R, INDEX_HEADS, INDEX_BLOCK,
        )  # fmt: skip


def qkv(q: Tensor, projected: Tensor, rotations: Tensor, heads: Heads) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Norm and rotate a layer's queries, its key-value row and its index queries.

    Args:
        q: [N, H * K + J * C], rows of any stride.
        projected: [N, X], rows of any stride.
        rotations: float32 [N, R], contiguous.
        heads: Sizes and columns.

    Returns:
        Queries [N, H, K], rows [N, K] and index queries [N, J, C] in the dtype of `q`, and index weights [N, J],
        float32.
    """
    rows, (count, size, index_heads, index_size) = len(q), _sizes(heads)
    out_q = torch.empty(rows, count, size, dtype=q.dtype, device=q.device)
    out_kv = torch.empty(rows, size, dtype=q.dtype, device=q.device)
    out_index = torch.empty(rows, index_heads, index_size, dtype=q.dtype, device=q.device)
    out_weights = torch.empty(rows, index_heads, dtype=torch.float32, device=q.device)
    block, index_block = triton.next_power_of_2(size), triton.next_power_of_2(max(2, index_size))
    some = max(1, min(_VALUES // block, triton.next_power_of_2(count)))
    index_some = max(1, min(_VALUES // index_block, triton.next_power_of_2(max(1, index_heads))))
    launch(
        _qkv, (rows, -(-count // some) + 1 + -(-index_heads // index_some)), q, projected, rotations, heads.kv_norm,
        out_q, out_kv, out_index, out_weights, q.stride(0), projected.stride(0), heads.kv_column, heads.index_column,
        heads.eps, H=count, K=size, BLOCK=block, HEADS=some, J=index_heads, C=index_size, INDEX_BLOCK=index_block,
        INDEX_HEADS=index_some, R=rotations.shape[1], SCALE=size**-0.5,
        WEIGHT_SCALE=max(1, index_heads * index_size) ** -0.5,
    )  # fmt: skip
    return out_q, out_kv, out_index, out_weights


def _sizes(heads: Heads) -> tuple[int, int, int, int]:
    return heads.heads, heads.head_dim, heads.index_heads, heads.index_head_dim


def calls(shapes: Shapes, rows: int, make: Make) -> Iterator[Call]:
    """Yield a layer without an indexer, and one with it."""
    size, rotary = shapes.head_dim, shapes.qk_rope_head_dim
    norm = make.floats(size, dtype=torch.float32)
    rotations = make.floats(rows, rotary, dtype=torch.float32)
    plain = Heads(shapes.num_attention_heads, size, shapes.q_lora_rank, norm, 1e-6)
    index = plain._replace(
        index_heads=shapes.index_n_heads, index_head_dim=shapes.index_head_dim,
        index_column=shapes.q_lora_rank + size,
    )  # fmt: skip
    for (name, heads), activations in product((("window", plain), ("index", index)), shapes.activations):
        values, index_values = heads.heads * size, heads.index_heads * heads.index_head_dim
        q = make.floats(rows, values + index_values, dtype=activations)
        projected = make.floats(rows, shapes.q_lora_rank + size + heads.index_heads, dtype=activations)
        read = values + size + index_values + heads.index_heads
        moved = rows * ((2 * read - heads.index_heads) * q.itemsize + 4 * (heads.index_heads + rotary))
        flops = rows * 8 * (values + size + index_values)
        run = partial(qkv, q, projected, rotations, heads)
        yield Call(with_dtype(name, activations), run, moved + norm.nbytes, flops)
