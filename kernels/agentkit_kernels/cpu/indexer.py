"""The indexer's choice of entries. Dimension key: `agentkit_kernels.ops`."""

from __future__ import annotations

import numpy as np

from agentkit_kernels.cpu import panels
from agentkit_kernels.cpu.batch import Batch
from agentkit_kernels.cpu.loops import Floats, Ints
from agentkit_kernels.cpu.state import LayerState
from agentkit_kernels.cpu.workers import Workers

TopK = tuple[Ints, Ints]
"""Each query's entries in increasing order, [N, P], and their number [N]."""


def index_topk(
    workers: Workers, index_q: Floats, index_weights: Floats, batch: Batch, state: LayerState, *, ratio: int, top_k: int
) -> TopK:
    pool = state.compressors["index_"]
    picks_NP = np.empty((batch.tokens, 2 * top_k + panels.LANES), np.int64)
    counts_N = np.empty(batch.tokens, np.int64)
    visible_N = (batch.positions_N + 1) // ratio

    def some_queries(first: int, last: int) -> None:
        panels.choose(
            index_q, index_weights, batch.cu_seqlens, visible_N, batch.block_tables, pool.per_span, pool.entries,
            pool.scales, top_k, first, last, picks_NP, counts_N,
        )  # fmt: skip

    workers.ranges(some_queries, batch.tokens, index_q.size * int(visible_N.max(initial=0)))
    return picks_NP, counts_N
