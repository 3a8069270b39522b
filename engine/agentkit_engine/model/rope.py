"""Rotary position embedding: interleaved pairs on the last R dimensions, with YaRN frequencies if the layer has them.

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


def rotations(rope: RopeSpec, positions_T: Tensor, rotary_dim: int) -> Tensor:
    """Return the rotation of every pair at every position, as unit complex numbers [T, R/2] (complex64)."""
    angles = positions_T.float()[:, None] * frequencies(rope, rotary_dim, positions_T.device)
    return torch.polar(torch.ones_like(angles), angles)


def rotate(x: Tensor, rotations_TR: Tensor) -> Tensor:
    """Rotate the last R dimensions of `x` [B, T, ..., K] by its token's rotations [T, R/2]; the rest passes through.

    The inverse rotation is `rotate(x, rotations.conj())`. Computed in float32, returned in the dtype of `x`.
    """
    rotary_dim = 2 * rotations_TR.shape[-1]
    middle = x.dim() - 3
    rotations_T1R = rotations_TR.view(-1, *([1] * middle), rotary_dim // 2)
    plain, rotary = torch.split(x, [x.shape[-1] - rotary_dim, rotary_dim], dim=-1)
    pairs = torch.view_as_complex(rotary.float().contiguous().view(*rotary.shape[:-1], -1, 2))
    rotated = torch.view_as_real(pairs * rotations_T1R).flatten(-2)
    return torch.cat((plain, rotated.to(x.dtype)), dim=-1)
