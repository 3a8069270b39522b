"""Quantise and dequantise rows in plain torch: the formats of `agentkit_kernels.triton.quantize`, with the same bits.

Nothing here is differentiable.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

E4M3_MAX, E2M1_MAX, INT8_MAX = 448.0, 6.0, 127.0
ACTIVATION_GROUP, FP4_GROUP, KV_GROUP = 128, 32, 64
KV_SCALES = 8
"""Scale bytes of a key-value row; those without a group are 0."""
ACTIVATION_FLOOR = 1e-4
"""The least amax of a group of activations in the DeepSeek-V4 reference."""
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_E2M1_MIDPOINTS = (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)


def _divide(x: Tensor, by: float) -> Tensor:
    """x / by, rounded once. On a GPU torch multiplies by the rounded reciprocal of a Python number instead."""
    return x / torch.tensor(by, device=x.device)


def encode_scale(amax: Tensor, largest: float) -> Tensor:
    """Return the E8M0 byte of the least power of two s, at least 2^-126, with amax / s <= largest; 2^0 for amax 0."""
    mantissa, exponent = torch.frexp(_divide(amax, largest))
    byte = exponent - (mantissa == 0.5).int() + 127
    return torch.where(amax == 0, 127, byte.clamp(min=1)).to(torch.uint8)


def decode_scale(byte: Tensor) -> Tensor:
    """Return float32 2^(byte - 127); byte 255 is NaN."""
    return byte.contiguous().view(torch.float8_e8m0fnu).float()


def decode_e4m3(codes: Tensor) -> Tensor:
    """Return float32 from E4M3 bytes."""
    return codes.view(torch.float8_e4m3fn).float()


def _encode_e4m3(x: Tensor) -> Tensor:
    return x.clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn).view(torch.uint8)


def _grouped(x_NK: Tensor, group: int) -> Tensor:
    """Return [N, groups, group], padded with zeros."""
    padded = F.pad(x_NK.float(), (0, -x_NK.shape[1] % group))
    return padded.view(len(padded), padded.shape[1] // group, group)


def hadamard(x: Tensor) -> Tensor:
    """Return x · H / sqrt(K) for x [..., K], where H is Sylvester's matrix [[H, H], [H, -H]] and K a power of two.

    Sums and differences of columns, because the bits of a matrix product depend on its other rows.
    """
    size, half = x.shape[-1], 1
    while half < size:
        pairs = x.reshape(*x.shape[:-1], size // (2 * half), 2, half)
        first, second = pairs.unbind(-2)
        x = torch.stack((first + second, first - second), -2).reshape(x.shape)
        half *= 2
    return _divide(x, math.sqrt(size))


def quantise_fp8(
    x_NK: Tensor, *, group: int = ACTIVATION_GROUP, e8m0: bool = True, floor: float = ACTIVATION_FLOOR
) -> tuple[Tensor, Tensor]:
    """Return E4M3 codes, uint8 [N, K], and a scale per group of columns: E8M0 bytes, or float32 amax / 448."""
    x = _grouped(x_NK, group)
    amax = x.abs().amax(2).clamp(min=floor)
    scales = encode_scale(amax, E4M3_MAX) if e8m0 else torch.where(amax == 0, 1.0, _divide(amax, E4M3_MAX))
    x = x / (decode_scale(scales) if e8m0 else scales)[..., None]
    return _encode_e4m3(x).flatten(1)[:, : x_NK.shape[1]].contiguous(), scales


def dequantise_fp8(codes_NK: Tensor, scales: Tensor, *, group: int = ACTIVATION_GROUP, dtype: torch.dtype) -> Tensor:
    """Return [N, K] from the results of `quantise_fp8`."""
    factors = decode_scale(scales) if scales.dtype == torch.uint8 else scales
    size = codes_NK.shape[1]
    return (decode_e4m3(codes_NK) * factors.repeat_interleave(group, 1)[:, :size]).to(dtype)


def quantise_fp4(x_NK: Tensor) -> tuple[Tensor, Tensor]:
    """Return E2M1 codes, two in a byte (low nibble first), uint8 [N, K / 2], and E8M0 scales [N, K / 32].

    Raises:
        ValueError: K is not a multiple of 32.
    """
    if x_NK.shape[1] % FP4_GROUP:
        raise ValueError(f"FP4 needs a multiple of {FP4_GROUP} columns, got shape {tuple(x_NK.shape)}")
    x = _grouped(x_NK, FP4_GROUP)
    scales = encode_scale(x.abs().amax(2), E2M1_MAX)
    x = (x / decode_scale(scales)[..., None]).flatten(1)
    midpoints = torch.tensor(_E2M1_MIDPOINTS, device=x.device)
    below, above = (torch.bucketize(x.abs(), midpoints, right=right) for right in (False, True))
    magnitude = torch.where(below % 2 == 0, below, above)  # they differ on a midpoint only: take the even code
    codes = (magnitude + 8 * torch.signbit(x)).to(torch.uint8)
    return codes[:, 0::2] | codes[:, 1::2] << 4, scales


def dequantise_fp4(codes: Tensor, scales: Tensor, *, dtype: torch.dtype) -> Tensor:
    """Return [N, K] from the results of `quantise_fp4`."""
    table = torch.tensor((*_E2M1, *(-value for value in _E2M1)), device=codes.device)
    x = table[torch.stack((codes & 15, codes >> 4), -1).flatten(1).int()]
    return (x * decode_scale(scales).repeat_interleave(FP4_GROUP, 1)).to(dtype)


def round_activations(x: Tensor) -> Tensor:
    """Return rows [..., K] rounded to FP8 with a power of two per 128 columns, float32."""
    rows = x.flatten(0, -2)
    return dequantise_fp8(*quantise_fp8(rows), dtype=torch.float32).view(x.shape)


def round_index(x: Tensor) -> Tensor:
    """Return index queries or keys [..., C] after the Hadamard rotation, rounded to FP4, float32.

    C is a power of two and a multiple of 32.
    """
    rows = hadamard(x.float()).flatten(0, -2)
    return dequantise_fp4(*quantise_fp4(rows), dtype=torch.float32).view(x.shape)


def quantise_int8(x_NK: Tensor) -> tuple[Tensor, Tensor]:
    """Return int8 codes [N, K] and float32 scales amax / 127 [N]."""
    x = x_NK.float()
    amax = x.abs().amax(1)
    scales = torch.where(amax == 0, 1.0, _divide(amax, INT8_MAX))
    return (x / scales[:, None]).round().to(torch.int8), scales


def dequantise_int8(codes_NK: Tensor, scales_N: Tensor, *, dtype: torch.dtype) -> Tensor:
    """Return [N, K] from the results of `quantise_int8`."""
    return (codes_NK.float() * scales_N[:, None]).to(dtype)


def quantise_keys(keys_NC: Tensor) -> tuple[Tensor, Tensor]:
    """Return E4M3 codes of index keys, uint8 [N, C], and a float32 scale per key, a power of two [N, 1]."""
    codes, scales = quantise_fp8(keys_NC, group=keys_NC.shape[1])
    return codes, decode_scale(scales)


def kv_row_bytes(size: int, rotary: int) -> int:
    """Return the bytes of a key-value row of `size` columns, of which the last `rotary` stay bfloat16.

    Raises:
        ValueError: The other columns are not 1 to 8 groups of 64.
    """
    plain = size - rotary
    if plain % KV_GROUP or not 0 < plain <= KV_GROUP * KV_SCALES:
        raise ValueError(f"a key-value row needs 1 to {KV_SCALES} groups of {KV_GROUP} columns, got {plain} columns")
    return plain + 2 * rotary + KV_SCALES


def round_kv_rows(rows_NK: Tensor, *, rotary: int) -> Tensor:
    """Return rows [N, K] as `load_kv_rows` returns them after `store_kv_rows`, float32."""
    plain = dequantise_fp8(*quantise_fp8(rows_NK[:, :-rotary], group=KV_GROUP), group=KV_GROUP, dtype=torch.float32)
    return torch.cat((plain, rows_NK[:, -rotary:].bfloat16().float()), 1)


def store_kv_rows(rows_NK: Tensor, slots_N: Tensor, pages: Tensor, *, rotary: int) -> None:
    """Store rows [N, K] in pages, uint8 [pages, T, bytes of a row]: page slot // T, row slot mod T.

    A page holds the data of its T rows (E4M3 codes, then `rotary` bfloat16 values), and then their scales, one byte per
    64 codes, padded to 8 bytes with zeros. Negative slots are skipped.
    """
    used = slots_N >= 0
    plain, rotated = rows_NK[used, :-rotary], rows_NK[used, -rotary:]
    codes, scales = quantise_fp8(plain, group=KV_GROUP)
    data = torch.cat((codes, rotated.bfloat16().contiguous().view(torch.uint8)), 1)
    page, row = slots_N[used] // pages.shape[1], slots_N[used] % pages.shape[1]
    data_view, scales_view = _views(pages, data.shape[1])
    data_view[page, row] = data
    scales_view[page, row] = F.pad(scales, (0, KV_SCALES - scales.shape[1]))


def load_kv_rows(pages: Tensor, slots_N: Tensor, size: int, *, rotary: int, dtype: torch.dtype) -> Tensor:
    """Return the dequantised rows [N, K] at `slots_N`; see `store_kv_rows`."""
    plain = size - rotary
    page, row = slots_N // pages.shape[1], slots_N % pages.shape[1]
    data_view, scales_view = _views(pages, plain + 2 * rotary)
    data, scales = data_view[page, row], scales_view[page, row]
    codes = dequantise_fp8(
        data[:, :plain].contiguous(), scales[:, : plain // KV_GROUP], group=KV_GROUP, dtype=torch.float32
    )
    return torch.cat((codes, data[:, plain:].contiguous().view(torch.bfloat16).float()), 1).to(dtype)


def _views(pages: Tensor, data: int) -> tuple[Tensor, Tensor]:
    """Return the data [pages, T, data] and the scales [pages, T, 8] as views."""
    count, rows = pages.shape[:2]
    flat = pages.view(count, -1)
    return flat[:, : rows * data].view(count, rows, data), flat[:, rows * data :].view(count, rows, KV_SCALES)
