"""Attention to the window, the entries and the sink. Dimension key: `agentkit_kernels.ops`."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import numpy as np

from agentkit_kernels.cpu import loops
from agentkit_kernels.cpu.batch import Batch
from agentkit_kernels.cpu.indexer import TopK
from agentkit_kernels.cpu.linear import empty
from agentkit_kernels.cpu.loops import Floats, Ints
from agentkit_kernels.cpu.state import LayerState
from agentkit_kernels.cpu.workers import Workers
from agentkit_kernels.ops import QUERY_BLOCK


def attend(
    workers: Workers,
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
    out, heads = empty(*q.shape), q.shape[1]

    def some_heads(cu_seqlens: Ints, sequences: slice, first: int, last: int) -> None:
        loops.attend(
            q, kv, rotations, cu_seqlens, batch.positions_N, batch.slots_B[sequences], state.ring, window, ratio,
            entries, per_span, batch.block_tables[sequences], picks_NP, counts_N, sink, first, last, out,
        )  # fmt: skip

    if not workers.shares(work := q.size * window):
        some_heads(batch.cu_seqlens, slice(None), 0, heads)
        return out
    for cu_seqlens, sequences in blocks(batch):

        def share(first: int, last: int, rows: Ints = cu_seqlens, some: slice = sequences) -> None:
            some_heads(rows, some, first, last)

        workers.ranges(share, heads, work)
    return out


def blocks(batch: Batch) -> Iterator[tuple[Ints, slice]]:
    """Yield row bounds [B + 1] and sequences that threads can compute side by side.

    Each thread stores all of these rows in the rings, and a ring has room for one block more than the window. So a
    sequence has at most `QUERY_BLOCK` rows.
    """
    bounds = batch.cu_seqlens.tolist()
    if max(last - first for first, last in pairwise(bounds)) <= QUERY_BLOCK:
        yield batch.cu_seqlens, slice(None)
        return
    for sequence, (first, last) in enumerate(pairwise(bounds)):
        for low in range(first, last, QUERY_BLOCK):
            yield np.array([low, min(low + QUERY_BLOCK, last)]), slice(sequence, sequence + 1)
