"""KV compression. Dimension key: `agentkit_kernels.ops`."""

from __future__ import annotations

import numpy as np

from agentkit_kernels.cpu import loops
from agentkit_kernels.cpu.batch import Batch
from agentkit_kernels.cpu.loops import Floats
from agentkit_kernels.cpu.state import LayerState
from agentkit_kernels.ops import Compressor


def compress(projected: Floats, compressor: Compressor, batch: Batch, state: LayerState, *, fp4: bool = False) -> None:
    """See `ops.Ops`; with `fp4`, entries are rotated and rounded to FP4."""
    pool = state.compressors[compressor.prefix]
    loops.compress(
        projected, compressor.column, compressor.ape, compressor.norm, np.float32(compressor.eps),
        compressor.frequencies, batch.cu_seqlens, batch.positions_N, batch.slots_B, pool.values, pool.scores,
        batch.block_tables, pool.per_span, pool.entries, pool.scales, fp4,
    )  # fmt: skip
