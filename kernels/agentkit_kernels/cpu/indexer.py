"""The indexer's choice of entries: products with tiles of keys, and a streaming top-k.

Dimension key: `agentkit_kernels.ops`; S keys of a tile.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import numpy as np
from torch import Tensor

from agentkit_kernels.cpu import loops
from agentkit_kernels.cpu.batch import Batch
from agentkit_kernels.cpu.linear import Dots, empty
from agentkit_kernels.cpu.loops import Floats, Ints
from agentkit_kernels.cpu.state import LayerState, Pool

SCORED_ENTRIES = 2048
"""Index keys per product; tiles start at the first key."""
SCORE_TILE = 1 << 18
"""Maximum number of per-head index scores held at once (1 MiB), so that they stay in the processor's cache."""
COLUMNS = 64
"""The number of index keys in a product is a multiple of this."""

TopK = tuple[Ints, Ints]
"""Each query's entries in increasing order, [N, P], and their number [N]."""


def index_topk(
    index_q: Floats, index_weights: Floats, batch: Batch, state: LayerState, dots: Dots, *, ratio: int, top_k: int
) -> TopK:
    pool, heads = state.compressors["index_"], index_q.shape[1]
    visible_N = (batch.positions_N + 1) // ratio
    counts_N = np.minimum(visible_N, top_k)
    room = 2 * top_k + loops.TOGETHER
    picks_NP, best_NP = np.empty((batch.tokens, room), np.int64), empty(batch.tokens, room)
    least_N = np.full(batch.tokens, -np.inf, np.float32)
    for sequence, (low, high) in enumerate(pairwise(batch.cu_seqlens.tolist())):
        most = int(visible_N[high - 1])
        if most <= top_k:
            picks_NP[low:high, :top_k] = np.arange(top_k)
            continue
        counts_N[low:high] = 0
        for entry, keys_SC in _tiles(pool, batch, sequence, most):
            together = max(1, SCORE_TILE // (len(keys_SC) * heads))
            for some in (slice(first, min(first + together, high)) for first in range(low, high, together)):
                dots_XS = dots(index_q[some].reshape(-1, index_q.shape[2]), keys_SC)
                loops.choose(
                    dots_XS.reshape(-1, heads, len(keys_SC)), index_weights[some], entry, visible_N[some], top_k,
                    best_NP[some], picks_NP[some], counts_N[some], least_N[some],
                )  # fmt: skip
        loops.finish(top_k, best_NP[low:high], picks_NP[low:high], counts_N[low:high])
    return picks_NP, counts_N


def _tiles(pool: Pool, batch: Batch, sequence: int, count: int) -> Iterator[tuple[int, Tensor]]:
    """Yield the first `count` index keys of a sequence in tiles: the number of the first entry, and the keys [S, C].

    Consecutive spans are not copied. The last tile may hold further keys, up to a multiple of `COLUMNS`.
    """
    per_span = pool.per_span
    spans_of_tile = SCORED_ENTRIES // per_span
    needed = -(-count // per_span)
    for first in range(0, needed, spans_of_tile):
        spans = batch.spans[sequence][first : min(first + spans_of_tile, needed)]
        entries = min(len(spans) * per_span, -(-(count - first * per_span) // COLUMNS) * COLUMNS)
        some = slice(spans[0], spans[0] + len(spans)) if batch.consecutive[sequence] else list(spans)
        keys_SC = pool.spans[some]
        yield first * per_span, keys_SC.flatten(0, 1)[:entries]
