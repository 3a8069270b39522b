"""Attention to the window, the entries and the sink. Dimension key: `agentkit_kernels.ops`."""

from __future__ import annotations

import numpy as np

from agentkit_kernels.cpu import loops
from agentkit_kernels.cpu.batch import Batch
from agentkit_kernels.cpu.indexer import TopK
from agentkit_kernels.cpu.linear import empty
from agentkit_kernels.cpu.loops import Floats
from agentkit_kernels.cpu.state import LayerState


def attend(
    q: Floats,
    kv: Floats,
    rotations: Floats,
    sink: Floats,
    batch: Batch,
    state: LayerState,
    *,
    window: int,
    ratio: int = 0,
    topk: TopK | None = None,
) -> Floats:
    picks_NP, counts_N = topk or (np.empty((len(q), 0), np.int64), np.empty(0, np.int64))
    pool = state.compressors.get("")
    entries, per_span = (state.ring[:0, 0], 1) if pool is None else (pool.entries, pool.per_span)
    out = empty(*q.shape)
    loops.attend(
        q, kv, rotations, batch.cu_seqlens, batch.positions_N, batch.slots_B, state.ring, window, ratio, entries,
        per_span, batch.block_tables, picks_NP, counts_N, sink, out,
    )  # fmt: skip
    return out
