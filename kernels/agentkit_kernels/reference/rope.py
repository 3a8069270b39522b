"""Rotary position embedding: interleaved pairs on the last R dimensions. Source: Su et al. 2021, arXiv:2104.09864."""

from __future__ import annotations

import torch
from torch import Tensor

from agentkit_kernels.reference.batch import Batch


def rotations(batch: Batch, frequencies: Tensor) -> Tensor:
    return rotations_at(batch.positions, frequencies)


def rotations_at(positions_N: Tensor, frequencies: Tensor) -> Tensor:
    """Return cosine and sine of every pair's angle, interleaved: float32 [N, R]. The angle is a float32 product."""
    angles = positions_N.float()[:, None] * frequencies
    return torch.stack((angles.cos(), angles.sin()), dim=-1).flatten(1)


def rotate(x: Tensor, rotations_NR: Tensor, *, inverse: bool = False) -> Tensor:
    """Rotate the last R dimensions of `x` [N, ..., K] by its row's rotations; the rest passes through."""
    rotary = rotations_NR.shape[-1]
    turns = torch.view_as_complex(rotations_NR.view(len(rotations_NR), *[1] * (x.dim() - 2), -1, 2))
    plain, rest = torch.split(x, [x.shape[-1] - rotary, rotary], dim=-1)
    pairs = torch.view_as_complex(rest.clone(memory_format=torch.contiguous_format).view(*rest.shape[:-1], -1, 2))
    rotated = torch.view_as_real(pairs * (turns.conj_physical() if inverse else turns)).flatten(-2)
    return torch.cat((plain, rotated), dim=-1)
