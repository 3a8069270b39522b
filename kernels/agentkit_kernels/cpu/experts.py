"""Mixture of experts. Dimension key: `agentkit_kernels.ops`; P (token, expert) pairs in the order of the experts."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from agentkit_kernels.cpu import loops
from agentkit_kernels.cpu.batch import Batch
from agentkit_kernels.cpu.linear import Stacked, by_library, empty, padded_rows
from agentkit_kernels.cpu.loops import Floats, Ints

ROWS_OF_EXPERT = 6
"""With fewer rows per expert than this on average, tokens go through their experts one at a time."""


def swiglu(gate_up: Floats, limit: float) -> Floats:
    return _swiglu(gate_up, np.ones(len(gate_up), np.float32), limit)


def experts(
    x: Floats, experts: Ints, weights: Floats, w13: Stacked, w2: Stacked, limit: float, shared: Floats, batch: Batch
) -> Floats:
    out_ND = empty(*x.shape)
    if experts.size <= ROWS_OF_EXPERT * len(w2) and w13.product.block and w2.product.block:
        loops.mix_experts(
            x, experts, weights, w13.array, w13.product.block, w2.array, w2.product.block, np.float32(limit), shared,
            out_ND,
        )  # fmt: skip
    else:
        _sort(x, experts, weights, w13, w2, limit, shared, out_ND)
    return out_ND


def _sort(
    x_ND: Floats, experts_NA: Ints, weights_NA: Floats, w13: Stacked, w2: Stacked, limit: float, shared_ND: Floats,
    out_ND: Floats,
) -> None:  # fmt: skip
    """Compute each expert on the rows routed to it, padded to the row count that the library needs."""
    count, padding = len(w2), padded_rows(1, w13.product.rows)
    most = experts_NA.size + count * (padding - 1)
    counts_E, taken, weights = np.empty(count, np.int64), np.empty(most, np.int64), np.empty(most, np.float32)
    places_NA = np.empty_like(experts_NA)
    places = loops.sort_by_expert(experts_NA, weights_NA, padding, counts_E, taken, weights, places_NA)
    counts = counts_E.tolist()
    hidden = _swiglu(_by_expert(x_ND[taken[:places]], counts, w13.all), weights[:places], limit)
    loops.sum_experts(_by_expert(hidden, counts, w2.all), places_NA, shared_ND, out_ND)


def _by_expert(rows_PK: Floats, counts: list[int], weights_KO: Sequence[Tensor]) -> Floats:
    rows = torch.split(torch.from_numpy(rows_PK), counts)
    outs = [by_library(row, weight) for row, weight in zip(rows, weights_KO, strict=True) if len(row)]
    out_PO: Floats = torch.cat(outs).numpy()
    return out_PO


def _swiglu(gate_up_NX: Floats, weights_N: Floats, limit: float) -> Floats:
    out_NI = empty(len(gate_up_NX), gate_up_NX.shape[1] // 2)
    loops.swiglu(gate_up_NX, weights_N, np.float32(limit), out_NI)
    return out_NI
