"""The rows of one forward: all sequences, end to end. Dimension key: `agentkit_kernels.ops`."""

from __future__ import annotations

import numpy as np

from agentkit_kernels.cpu.loops import Ints
from agentkit_kernels.ops import Plan
from agentkit_kernels.trace import Trace


class Batch:
    """See `ops.Batch`."""

    def __init__(self, plan: Plan) -> None:
        self.trace: Trace | None = None
        self.ids = np.asarray(plan.ids, np.int64)
        self.tokens = len(self.ids)
        self.cu_seqlens: Ints = np.cumsum([0, *plan.lengths])
        self.slots_B = np.array(plan.slots, np.int64)
        starts = zip(plan.starts, plan.lengths, strict=True)
        self.positions_N: Ints = np.concatenate([np.arange(start, start + count) for start, count in starts])
        tables = plan.block_tables
        self.block_tables = np.zeros((len(tables), max(map(len, tables))), np.int64)
        for row, table in zip(self.block_tables, tables, strict=True):
            row[: len(table)] = table
