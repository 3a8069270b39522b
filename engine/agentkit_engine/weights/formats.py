"""Number formats of the official checkpoints: decoding to float32 and encoding from it.

* E8M0 scale: byte b is 2^(b - 127); 255 is NaN.
* FP8 block: float8 e4m3 values (at most 448) with one scale per 128 x 128 block; the scale multiplies.
* FP4 row: float4 e2m1 codes, two in a byte along the input dimension (low nibble = even index), with one E8M0 scale
  per 32 consecutive values of a row.

The product of an e4m3 or e2m1 value and a power of two is exact in bfloat16 unless it is out of range.
Dimension key: O output rows, I input columns.
Source: DeepSeek-V4 `inference/kernel.py` and `convert.py`; OCP Microscaling Formats 1.0.
"""

from __future__ import annotations

import torch
from torch import Tensor

from agentkit_kernels.packed import Packed

FP8_BLOCK = 128
FP4_GROUP = 32
FP8_MAX = 448.0
FP4_MAX = 6.0

FP4_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
"""Values of the 16 e2m1 codes; bit 3 is the sign."""

_FP4_MIDPOINTS = (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)


def decode_e8m0(scale: Tensor) -> Tensor:
    """Return float32 powers of two from E8M0 bytes (uint8 or float8_e8m0fnu) of any shape; byte 255 becomes NaN."""
    exponent = scale.view(torch.uint8).to(torch.int32)
    value = (exponent << 23).view(torch.float32)
    value = torch.where(exponent == 0, 2.0**-127, value)  # exponent bits 0 mean a subnormal: its value is 2^-127
    return torch.where(exponent == 255, float("nan"), value)


def encode_e8m0(scale: Tensor) -> Tensor:
    """Return float8_e8m0fnu from float32 powers of two between 2^-127 and 2^127."""
    return (torch.frexp(scale).exponent + 126).to(torch.uint8).view(torch.float8_e8m0fnu)


def dequantise_fp8(weight_OI: Tensor, scale: Tensor) -> Tensor:
    """Return float32 [O, I] from e4m3 [O, I] and scales [ceil(O/128), ceil(I/128)] (E8M0 or a float dtype)."""
    rows, columns = weight_OI.shape
    scale_OI = _decode_scale(scale).repeat_interleave(FP8_BLOCK, 0)[:rows].repeat_interleave(FP8_BLOCK, 1)[:, :columns]
    return weight_OI.float() * scale_OI


def quantise_fp8(weight_OI: Tensor) -> tuple[Tensor, Tensor]:
    """Return e4m3 [O, I] and E8M0 scales [ceil(O/128), ceil(I/128)].

    Each scale is the smallest power of two that brings its block within 448.
    """
    rows, columns = weight_OI.shape
    grid_rows, grid_columns = -(-rows // FP8_BLOCK), -(-columns // FP8_BLOCK)
    padded = weight_OI.new_zeros(grid_rows * FP8_BLOCK, grid_columns * FP8_BLOCK, dtype=torch.float32)
    padded[:rows, :columns] = weight_OI
    blocks = padded.view(grid_rows, FP8_BLOCK, grid_columns, FP8_BLOCK)
    scale = _power_of_two_scale(blocks.abs().amax((1, 3)), FP8_MAX)
    scaled = (blocks / scale[:, None, :, None]).clamp(-FP8_MAX, FP8_MAX).view_as(padded)[:rows, :columns]
    return scaled.to(torch.float8_e4m3fn).contiguous(), encode_e8m0(scale)


def dequantise_fp4(packed: Tensor, scale: Tensor) -> Tensor:
    """Return float32 [O, I] from bytes [O, I/2] (int8 or uint8) and scales [O, I/32] (E8M0 or a float dtype)."""
    codes = packed.view(torch.uint8).to(torch.int32)
    table = torch.tensor(FP4_VALUES, device=packed.device)
    weight_OI = table[torch.stack((codes & 0xF, codes >> 4), dim=-1)].flatten(-2)
    return weight_OI * _decode_scale(scale).repeat_interleave(FP4_GROUP, -1)


def quantise_fp4(weight_OI: Tensor) -> tuple[Tensor, Tensor]:
    """Return int8 [O, I/2] and E8M0 scales [O, I/32], rounded to nearest even.

    Each scale is the smallest power of two that brings its group within 6.

    Raises:
        ValueError: I is not a multiple of 32.
    """
    rows, columns = weight_OI.shape
    if columns % FP4_GROUP:
        raise ValueError(f"FP4 needs a multiple of {FP4_GROUP} input columns, got shape {tuple(weight_OI.shape)}")
    groups = weight_OI.float().view(rows, columns // FP4_GROUP, FP4_GROUP)
    scale = _power_of_two_scale(groups.abs().amax(-1), FP4_MAX)
    scaled = (groups / scale[..., None]).view(rows, columns)
    midpoints = torch.tensor(_FP4_MIDPOINTS, device=weight_OI.device)
    below, above = (torch.bucketize(scaled.abs(), midpoints, right=right) for right in (False, True))
    magnitude = torch.where(below % 2 == 0, below, above)  # they differ only on a midpoint: take the even code
    codes = (magnitude + 8 * torch.signbit(scaled)).to(torch.uint8)
    return (codes[:, 0::2] | codes[:, 1::2] << 4).view(torch.int8), encode_e8m0(scale)


def quantise_int8(weight_OI: Tensor) -> Packed:
    """Return int8 values with one float32 scale per row, which maps the row's largest magnitude to 127."""
    weight_OI = weight_OI.float()
    scale = weight_OI.abs().amax(-1) / 127
    scale = torch.where(scale == 0, 1.0, scale)
    codes = (weight_OI / scale[:, None]).round_().clamp_(-127, 127).to(torch.int8)
    return Packed("int8", codes, scale, tuple(weight_OI.shape))


def _decode_scale(scale: Tensor) -> Tensor:
    return decode_e8m0(scale) if scale.dtype == torch.float8_e8m0fnu else scale.float()


def _power_of_two_scale(amax: Tensor, largest: float) -> Tensor:
    """Return 2^ceil(log2(amax / largest)), computed from the float's exponent; 1 where `amax` is zero."""
    mantissa, exponent = torch.frexp(amax / largest)
    scale = torch.ldexp(torch.ones_like(amax), exponent - (mantissa == 0.5).int())
    return torch.where(amax == 0, 1.0, scale).clamp(min=2.0**-126)
