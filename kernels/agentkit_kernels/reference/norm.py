"""RMSNorm. Source: Zhang and Sennrich 2019, arXiv:1910.07467."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from agentkit_kernels.reference.linear import Columns, columns


def rms_norm(x: Tensor | Columns, weight: Tensor, eps: float) -> Tensor:
    """y = weight * x / sqrt(mean(x²) + eps), over the first `len(weight)` columns."""
    size = weight.shape[0]
    return F.rms_norm(columns(x, 0, size), (size,), weight.float(), eps)
