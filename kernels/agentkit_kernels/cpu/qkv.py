"""Queries and key-value rows. Dimension key: `agentkit_kernels.ops`."""

from __future__ import annotations

import numpy as np

from agentkit_kernels.cpu import loops
from agentkit_kernels.cpu.batch import Batch
from agentkit_kernels.cpu.linear import empty
from agentkit_kernels.cpu.loops import Floats
from agentkit_kernels.cpu.state import LayerState
from agentkit_kernels.cpu.workers import Workers
from agentkit_kernels.ops import Heads

OPERATIONS = 8
"""Multiply-adds that take as long as the norm and the rotation of a value."""


def qkv(
    workers: Workers,
    q: Floats,
    projected: Floats,
    rotations: Floats,
    heads: Heads,
    batch: Batch | None = None,
    state: LayerState | None = None,
) -> tuple[Floats, Floats, Floats, Floats]:
    """See `ops.Ops`; `attend` stores the rows, so batch and state are not needed."""
    rows = len(q)
    q_NHK, kv_NK = empty(rows, heads.heads, heads.head_dim), empty(rows, heads.head_dim)
    index_NJC, weights_NJ = empty(rows, heads.index_heads, heads.index_head_dim), empty(rows, heads.index_heads)

    def some_rows(first: int, last: int) -> None:
        loops.heads(
            q, projected, heads.kv_column, heads.index_column, heads.kv_norm, rotations, np.float32(heads.eps), first,
            last, q_NHK, kv_NK, index_NJC, weights_NJ,
        )  # fmt: skip

    workers.ranges(some_rows, rows, OPERATIONS * q.size)
    return q_NHK, kv_NK, index_NJC, weights_NJ
