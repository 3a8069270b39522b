"""Rotary position embedding. Dimension key: `agentkit_kernels.ops`."""

from __future__ import annotations

from agentkit_kernels.cpu import loops
from agentkit_kernels.cpu.batch import Batch
from agentkit_kernels.cpu.linear import empty
from agentkit_kernels.cpu.loops import Floats


def rotations(batch: Batch, frequencies: Floats) -> Floats:
    out = empty(batch.tokens, 2 * len(frequencies))
    loops.rotations(batch.positions_N, frequencies, out)
    return out
