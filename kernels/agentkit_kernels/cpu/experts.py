"""Mixture of experts. Dimension key: `agentkit_kernels.ops`; P (token, expert) pairs in the order of the experts."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from agentkit_kernels.cpu import loops
from agentkit_kernels.cpu.batch import Batch
from agentkit_kernels.cpu.linear import Stacked, empty
from agentkit_kernels.cpu.loops import Floats, Ints
from agentkit_kernels.cpu.workers import Workers

SINGLE = 1 << 20
"""Elements per expert and matrix up to which a few tokens go through unpacked experts one at a time, in one call."""
FEW_PAIRS = 16
"""(token, expert) pairs that count as few."""
OPERATIONS = 16
"""Multiply-adds that take as long as SwiGLU's exponential and division."""


def swiglu(workers: Workers, gate_up: Floats, limit: float) -> Floats:
    return _swiglu(workers, gate_up, np.ones(len(gate_up), np.float32), limit)


def experts(
    x: Floats,
    experts: Ints,
    weights: Floats,
    w13: Stacked,
    w2: Stacked,
    limit: float,
    shared: Floats,
    batch: Batch,
    *,
    cast: Callable[[Floats], Floats] | None = None,
) -> Floats:
    """See `ops.Ops`; `cast` rounds the inputs of packed matrices."""
    out_ND = empty(*x.shape)
    small = w13.inputs * w13.outputs <= SINGLE
    if small and experts.size <= FEW_PAIRS and w13.unpacked is not None and w2.unpacked is not None:
        loops.mix_experts(x, experts, weights, w13.unpacked, w2.unpacked, np.float32(limit), shared, out_ND)
        return out_ND
    counts_E, rows_P, sorted_P = np.empty(len(w2), np.int64), np.empty(experts.size, np.int64), empty(experts.size)
    places_NA = np.empty_like(experts)
    loops.sort_by_expert(experts, weights, counts_E, rows_P, sorted_P, places_NA)
    counts: list[int] = counts_E.tolist()
    hidden = _swiglu(w13.workers, w13.multiply((cast(x) if cast else x)[rows_P], counts), sorted_P, limit)
    loops.sum_experts(w2.multiply(cast(hidden) if cast else hidden, counts), places_NA, shared, out_ND)
    return out_ND


def _swiglu(workers: Workers, gate_up_NX: Floats, weights_N: Floats, limit: float) -> Floats:
    out_NI = empty(len(gate_up_NX), gate_up_NX.shape[1] // 2)

    def some_rows(first: int, last: int) -> None:
        loops.swiglu(gate_up_NX, weights_N, np.float32(limit), first, last, out_NI)

    workers.ranges(some_rows, len(out_NI), OPERATIONS * out_NI.size)
    return out_NI
