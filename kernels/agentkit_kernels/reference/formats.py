"""Dequantise packed weights in plain torch; the formats are in `agentkit_kernels.packed`."""

from __future__ import annotations

import torch
from torch import Tensor

from agentkit_kernels.packed import FP8_BLOCK, MXFP4_GROUP, Packed

E2M1_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
"""Values of the 16 E2M1 codes; bit 3 is the sign."""


def dequantise(weight: Packed) -> Tensor:
    """Return the float32 matrices [..., X, K] that a packed weight represents."""
    scale = decode_scale(weight.scale)
    if weight.format == "fp8":
        rows, columns = weight.shape[-2:]
        scale = scale.repeat_interleave(FP8_BLOCK, -2)[..., :rows, :]
        scale = scale.repeat_interleave(FP8_BLOCK, -1)[..., :columns]
        return weight.data.float() * scale
    if weight.format == "mxfp4":
        return decode_e2m1(weight.data) * scale.repeat_interleave(MXFP4_GROUP, -1)
    return weight.data.float() * scale[..., None]


def decode_e2m1(data: Tensor) -> Tensor:
    """Return float32 [..., K] from bytes [..., K/2] of two E2M1 codes, the even column in the low half."""
    codes = data.to(torch.int32)
    table = torch.tensor(E2M1_VALUES, device=data.device)
    return table[torch.stack((codes & 0xF, codes >> 4), dim=-1)].flatten(-2)


def decode_scale(scale: Tensor) -> Tensor:
    """Return float32 scales from float8_e8m0fnu, whose code b is 2^(b - 127) and 255 is NaN, or from floats."""
    if scale.dtype != torch.float8_e8m0fnu:
        return scale.float()
    exponent = scale.view(torch.uint8).to(torch.int32)
    bits = torch.where(exponent == 0, 0x00400000, exponent << 23)  # 2^-127 is subnormal
    return torch.where(exponent == 255, 0x7FC00000, bits).view(torch.float32)
