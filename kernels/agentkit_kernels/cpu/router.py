"""The router. Dimension key: `agentkit_kernels.ops`."""

from __future__ import annotations

import numpy as np

from agentkit_kernels.cpu import loops
from agentkit_kernels.cpu.batch import Batch
from agentkit_kernels.cpu.linear import empty
from agentkit_kernels.cpu.loops import Floats, Ints
from agentkit_kernels.ops import Router


def route(logits: Floats, router: Router, batch: Batch) -> tuple[Ints, Floats]:
    weights_NA = empty(len(logits), router.active)
    chosen = router.table is not None
    experts_NA = router.table[batch.ids] if router.table is not None else np.empty(weights_NA.shape, np.int64)
    bias = np.zeros(logits.shape[1], np.float32) if router.bias is None else router.bias
    loops.route(logits, bias, np.float32(router.scale), chosen, experts_NA, weights_NA)
    return experts_NA, weights_NA
