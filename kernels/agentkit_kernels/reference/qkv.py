"""Queries and key-value rows. Dimension key: `agentkit_kernels.ops`."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from agentkit_kernels.ops import Heads
from agentkit_kernels.reference.batch import Batch
from agentkit_kernels.reference.linear import Columns, columns
from agentkit_kernels.reference.norm import rms_norm
from agentkit_kernels.reference.rope import rotate
from agentkit_kernels.reference.state import LayerState


def qkv(
    q: Tensor | Columns,
    projected: Tensor | Columns,
    rotations: Tensor,
    heads: Heads,
    batch: Batch | None = None,
    state: LayerState | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `ops.Ops`; `attend` stores the rows, so batch and state are not needed."""
    size, index_size = heads.head_dim, heads.index_head_dim
    q_NHK = columns(q, 0, heads.heads * size).reshape(len(rotations), heads.heads, size)
    q_NHK = rotate(F.rms_norm(q_NHK, (size,), eps=heads.eps), rotations) * size**-0.5
    kv = columns(projected, heads.kv_column, size)
    kv_NK = rotate(rms_norm(kv, heads.kv_norm, heads.eps), rotations)
    if not heads.index_heads:
        return q_NHK, kv_NK, kv.new_empty(len(kv), 0, index_size), kv.new_empty(len(kv), 0)
    index_q = columns(q, heads.heads * size, heads.index_heads * index_size)
    index_NJC = rotate(index_q.reshape(len(rotations), heads.index_heads, index_size), rotations)
    weights_NJ = columns(projected, heads.index_column, heads.index_heads)
    return q_NHK, kv_NK, index_NJC, weights_NJ * (index_size * heads.index_heads) ** -0.5
