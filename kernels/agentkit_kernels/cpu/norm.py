"""RMSNorm. Dimension key: `agentkit_kernels.ops`."""

from __future__ import annotations

import numpy as np

from agentkit_kernels.cpu import loops
from agentkit_kernels.cpu.linear import empty
from agentkit_kernels.cpu.loops import Floats


def rms_norm(x: Floats, weight: Floats, eps: float) -> Floats:
    out = empty(len(x), len(weight))
    loops.rms_norm(x, weight, np.float32(eps), out)
    return out
