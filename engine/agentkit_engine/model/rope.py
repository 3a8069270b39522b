"""Rotary frequencies, with YaRN if the layer has it.

Sources: Su et al. 2021, arXiv:2104.09864; Peng et al. 2023 (YaRN), arXiv:2309.00071.
Dimension key: `model/__init__.py`.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

from agentkit_engine.spec import RopeSpec


@lru_cache(maxsize=64)
@torch.inference_mode(False)
def frequencies(rope: RopeSpec, rotary_dim: int, device: torch.device) -> Tensor:
    """Return the radians per position of each pair, float32 [R/2].

    With `rope.factor` above 1, slow pairs are interpolated (divided by the factor), fast ones are kept, and those
    between the two correction dimensions are blended linearly. This applies at every position, not only in long
    contexts.
    """
    exponents = torch.arange(0, rotary_dim, 2, dtype=torch.float32) / rotary_dim
    freqs = 1.0 / rope.theta**exponents
    if rope.factor != 1.0:

        def correction_dim(rotations: float) -> float:
            wavelengths = rope.original_max_position_embeddings / (rotations * 2 * math.pi)
            return rotary_dim * math.log(wavelengths) / (2 * math.log(rope.theta))

        low = max(math.floor(correction_dim(rope.beta_fast)), 0)
        high = min(math.ceil(correction_dim(rope.beta_slow)), rotary_dim - 1)
        ramp = (torch.arange(rotary_dim // 2, dtype=torch.float32) - low) / max(high - low, 0.001)
        keep = 1 - ramp.clamp(0, 1)
        freqs = freqs / rope.factor * (1 - keep) + freqs * keep
    return freqs.to(device)
