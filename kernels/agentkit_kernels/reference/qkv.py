"""Queries and key-value rows. Dimension key: `agentkit_kernels.ops`."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from agentkit_kernels.ops import Heads
from agentkit_kernels.reference.norm import rms_norm
from agentkit_kernels.reference.rope import rotate


def qkv(q: Tensor, projected: Tensor, rotations: Tensor, heads: Heads) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows, size, index_size = len(q), heads.head_dim, heads.index_head_dim
    main, index = torch.split(q, [heads.heads * size, heads.index_heads * index_size], dim=-1)
    q_NHK = F.rms_norm(main.view(rows, heads.heads, size), (size,), eps=heads.eps)
    kv_NK = rms_norm(projected[:, heads.kv_column : heads.kv_column + size], heads.kv_norm, heads.eps)
    q_NHK, kv_NK = rotate(q_NHK, rotations) * size**-0.5, rotate(kv_NK, rotations)
    weights_NJ = projected[:, heads.index_column : heads.index_column + heads.index_heads]
    if not heads.index_heads:
        return q_NHK, kv_NK, index.view(rows, 0, index_size), weights_NJ
    index_NJC = rotate(index.view(rows, heads.index_heads, index_size), rotations)
    return q_NHK, kv_NK, index_NJC, weights_NJ * (index_size * heads.index_heads) ** -0.5
