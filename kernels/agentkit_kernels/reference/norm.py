"""RMSNorm. Source: Zhang and Sennrich 2019, arXiv:1910.07467."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """y = weight * x / sqrt(mean(x²) + eps), over the first `len(weight)` columns."""
    size = weight.shape[0]
    return F.rms_norm(x[..., :size], (size,), weight.float(), eps)
