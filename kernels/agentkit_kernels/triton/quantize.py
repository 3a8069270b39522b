"""Quantise and dequantise rows: FP8, MXFP4, int8, and V4's 584-byte key-value row.

| format | codes | scale |
|---|---|---|
| FP8 | E4M3, at most 448 | per group of 128 columns: E8M0, or float32 amax / 448 |
| MXFP4 | E2M1, at most 6, two in a byte (low nibble first) | E8M0 per group of 32 columns |
| int8 | -127 to 127 | float32 per row: amax / 127 |
| key-value row | E4M3 for all but the R rotary columns, which stay bfloat16 | E8M0 per group of 64 columns, 8 bytes |

An E8M0 scale is the smallest power of two that brings its group within the largest code; byte b is 2^(b - 127). Codes
are rounded to nearest, ties to even. Codes are encoded and decoded with integer arithmetic, because not every GPU has
E4M3 conversions (NVIDIA before Hopper has none, AMD's gfx942 converts to another FP8), and because integers give the
same bits in Triton's interpreter.

`round_activations` rounds rows to FP8 and decodes them in one kernel, in their own dtype: bfloat16 has every E4M3 code
times a power of two in range. `round_index` rotates index queries and keys by Sylvester's Hadamard matrix and rounds
them to MXFP4, within the kernels that compute them.

Floor: each value, code and scale moved once (2 + 1 + 1 / 128 bytes per value for FP8 of bfloat16); the flops are few.

Sources: OCP Microscaling Formats 1.0; DeepSeek-V4 `inference/kernel.py`; FlashMLA (the key-value row). Twin:
`reference/quantize.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from agentkit_kernels.calls import Call, Make, Shapes, with_dtype
from agentkit_kernels.reference.quantize import ACTIVATION_FLOOR, FP4_GROUP, kv_row_bytes
from agentkit_kernels.triton.launch import launch

FP8_GROUP = 128
_COLUMNS = 4096
"""Columns of one program."""

# --- codes -------------------------------------------------------------------------------------------------------


@triton.jit
def decode_e4m3(code):
    """Return float32 from E4M3 bytes: sign, 4 bits of exponent (bias 7), 3 bits of mantissa; 0x7F is NaN."""
    code = code.to(tl.int32) & 0xFF
    magnitude = code & 0x7F
    normal = ((magnitude << 20) + (120 << 23)).to(tl.float32, bitcast=True)
    value = tl.where(magnitude < 8, magnitude.to(tl.float32) * 0.001953125, normal)
    value = tl.where(magnitude == 0x7F, float("nan"), value)
    return tl.where(code >= 0x80, -value, value)


@triton.jit
def encode_e4m3(x):
    """Return E4M3 bytes (uint8) from float32; values beyond 448 become 448."""
    bits = x.to(tl.int32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    normal = ((magnitude + 0x7FFFF + ((magnitude >> 20) & 1)) >> 20) - (120 << 3)
    # Adding 2^14, whose last bit is worth 2^-9, rounds to a multiple of the smallest E4M3 value.
    subnormal = (tl.abs(x) + 16384.0).to(tl.int32, bitcast=True) - 0x46800000
    code = tl.where(magnitude < 0x3C800000, subnormal, normal)  # 2^-6
    code = tl.where(magnitude > 0x43E00000, 0x7E, code)  # 448
    code = tl.where(magnitude > 0x7F800000, 0x7F, code)
    return (code | ((bits >> 24) & 0x80)).to(tl.uint8)


@triton.jit
def decode_e2m1(code):
    """Return float32 from the low 4 bits: sign, 2 bits of exponent (bias 1), 1 bit of mantissa."""
    code = code.to(tl.int32)
    magnitude = code & 7
    normal = ((magnitude << 22) + (126 << 23)).to(tl.float32, bitcast=True)
    value = tl.where(magnitude < 2, magnitude.to(tl.float32) * 0.5, normal)
    return tl.where((code & 8) != 0, -value, value)


@triton.jit
def encode_e2m1(x):
    """Return E2M1 codes (uint8, 0 to 15) from float32: how many midpoints between two codes a magnitude exceeds.

    A magnitude on a midpoint goes to the even code; values beyond 6 become 6.
    """
    magnitude = tl.abs(x)
    code = (magnitude > 0.25).to(tl.int32) + (magnitude >= 0.75).to(tl.int32) + (magnitude > 1.25).to(tl.int32)
    code += (magnitude >= 1.75).to(tl.int32) + (magnitude > 2.5).to(tl.int32) + (magnitude >= 3.5).to(tl.int32)
    code += (magnitude > 5.0).to(tl.int32)
    return (code | ((x.to(tl.int32, bitcast=True) >> 28) & 8)).to(tl.uint8)


@triton.jit
def decode_e8m0(byte):
    """Return float32 2^(byte - 127); byte 255 is NaN."""
    byte = byte.to(tl.int32) & 0xFF
    bits = tl.where(byte == 0, 0x00400000, byte << 23)  # 2^-127 is subnormal in float32
    return tl.where(byte == 255, float("nan"), bits.to(tl.float32, bitcast=True))


@triton.jit
def scale_byte(amax, LARGEST: tl.constexpr):
    """Return the E8M0 byte (int32) of 2^ceil(log2(amax / LARGEST)), at least 2^-126.

    The difference of two floats' bits, read as a fixed-point number with 23 fraction bits, lies between the same
    integers as the logarithm of their ratio, so no division rounds here.
    """
    largest = tl.full([], LARGEST, tl.float32).to(tl.int32, bitcast=True)
    difference = amax.to(tl.int32, bitcast=True) - largest
    return tl.maximum(((difference + 0x7FFFFF) >> 23) + 127, 1)


@triton.jit
def inverse_scale(byte):
    """Return float32 2^(127 - byte) of an E8M0 byte between 1 and 253."""
    return ((254 - byte) << 23).to(tl.float32, bitcast=True)


@triton.jit
def hadamard(x, ROWS: tl.constexpr, SIZE: tl.constexpr):
    """Return x · H / sqrt(SIZE) for x [ROWS, SIZE], float32, where H is Sylvester's matrix and SIZE a power of two.

    A step adds and subtracts neighbours, and moves the bit in which they differ to the front. After a step for each bit
    of the column, the columns are in their places again.
    """
    bits: tl.constexpr = SIZE.bit_length() - 1
    for _ in tl.static_range(bits):
        even, odd = tl.split(tl.reshape(x, (ROWS, SIZE // 2, 2)))
        x = tl.reshape(tl.permute(tl.join(even + odd, even - odd), (0, 2, 1)), (ROWS, SIZE))
    return tl.div_rn(x, tl.full(x.shape, SIZE**0.5, tl.float32))


@triton.jit
def round_index(x, ROWS: tl.constexpr, SIZE: tl.constexpr):
    """Return index queries or keys [ROWS, SIZE], float32, after the Hadamard rotation, rounded to MXFP4."""
    groups = tl.reshape(hadamard(x, ROWS, SIZE), (ROWS, SIZE // 32, 32))
    byte = scale_byte(tl.max(tl.abs(groups), axis=2), 6.0)
    rounded = decode_e2m1(encode_e2m1(groups * inverse_scale(byte)[:, :, None])) * inverse_scale(254 - byte)[:, :, None]
    return tl.reshape(rounded, (ROWS, SIZE))


def check_index_size(size: int) -> None:
    """Check that index queries and keys of `size` columns can be rounded to MXFP4.

    Raises:
        ValueError: The size is no power of two, which the Hadamard rotation needs, or less than a group.
    """
    if size % FP4_GROUP or size & (size - 1):
        raise ValueError(f"index keys in FP4 need a power of two of at least {FP4_GROUP} columns, got {size}")


# --- FP8 ---------------------------------------------------------------------------------------------------------


@triton.jit
def _quantise_fp8(
    x_ptr, codes_ptr, scales_ptr, stride_x, floor,
    SIZE: tl.constexpr, GROUP: tl.constexpr, GROUPS: tl.constexpr, E8M0: tl.constexpr,
):  # fmt: skip
    """Quantise GROUPS groups of one row."""
    row = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)
    column = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    x = tl.load(x_ptr + row * stride_x + column, mask=column < SIZE, other=0.0).to(tl.float32)
    amax = tl.maximum(tl.max(tl.abs(x), axis=1), floor)
    groups: tl.constexpr = (SIZE + GROUP - 1) // GROUP
    scales_ptr += row * groups + group
    if E8M0:
        byte = tl.where(amax == 0.0, 127, scale_byte(amax, 448.0))
        tl.store(scales_ptr, byte.to(tl.uint8), mask=group < groups)
        x *= inverse_scale(byte)[:, None]
    else:
        scale = tl.where(amax == 0.0, 1.0, tl.div_rn(amax, tl.full(amax.shape, 448.0, tl.float32)))
        tl.store(scales_ptr, scale, mask=group < groups)
        x = tl.div_rn(x, tl.broadcast_to(scale[:, None], x.shape))
    tl.store(codes_ptr + row * SIZE + column, encode_e4m3(x), mask=column < SIZE)


@triton.jit
def _dequantise_fp8(
    codes_ptr, scales_ptr, x_ptr, SIZE: tl.constexpr, GROUP: tl.constexpr, GROUPS: tl.constexpr, E8M0: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)
    column = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    groups: tl.constexpr = (SIZE + GROUP - 1) // GROUP
    scale = tl.load(scales_ptr + row * groups + group, mask=group < groups, other=0)
    if E8M0:
        scale = decode_e8m0(scale)
    code = tl.load(codes_ptr + row * SIZE + column, mask=column < SIZE, other=0)
    tl.store(x_ptr + row * SIZE + column, decode_e4m3(code) * scale[:, None], mask=column < SIZE)


@triton.jit
def _round_activations(x_ptr, out_ptr, stride_x, SIZE: tl.constexpr, GROUP: tl.constexpr, GROUPS: tl.constexpr):
    """Round GROUPS groups of one row."""
    row = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)
    column = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    x = tl.load(x_ptr + row * stride_x + column, mask=column < SIZE, other=0.0).to(tl.float32)
    byte = scale_byte(tl.maximum(tl.max(tl.abs(x), axis=1), 1e-4), 448.0)
    x = decode_e4m3(encode_e4m3(x * inverse_scale(byte)[:, None])) * inverse_scale(254 - byte)[:, None]
    tl.store(out_ptr + row * SIZE + column, x, mask=column < SIZE)


def quantise_fp8(
    x_NK: Tensor, *, group: int = FP8_GROUP, e8m0: bool = True, floor: float = ACTIVATION_FLOOR
) -> tuple[Tensor, Tensor]:
    """Quantise rows [N, K] of any float dtype to E4M3 with one scale per `group` columns.

    Args:
        group: A power of two; the last group of a row may be shorter.
        e8m0: Powers of two as bytes, instead of float32 scales amax / 448.
        floor: The least amax of a group.

    Returns:
        Codes, uint8 [N, K], and scales [N, ceil(K / group)], uint8 or float32.
    """
    rows, size = x_NK.shape
    codes = torch.empty(rows, size, dtype=torch.uint8, device=x_NK.device)
    scales = torch.empty(rows, -(-size // group), dtype=torch.uint8 if e8m0 else torch.float32, device=x_NK.device)
    grid, groups = _tiles(rows, size, group)
    launch(
        _quantise_fp8, grid, x_NK, codes, scales, x_NK.stride(0), floor, SIZE=size, GROUP=group, GROUPS=groups,
        E8M0=e8m0,
    )  # fmt: skip
    return codes, scales


def dequantise_fp8(codes_NK: Tensor, scales: Tensor, *, group: int = FP8_GROUP, dtype: torch.dtype) -> Tensor:
    """Return [N, K] from contiguous E4M3 codes [N, K] (uint8) and the scales of `quantise_fp8`."""
    rows, size = codes_NK.shape
    x = torch.empty(rows, size, dtype=dtype, device=codes_NK.device)
    grid, groups = _tiles(rows, size, group)
    e8m0 = scales.dtype == torch.uint8
    launch(_dequantise_fp8, grid, codes_NK, scales, x, SIZE=size, GROUP=group, GROUPS=groups, E8M0=e8m0)
    return x


def _tiles(rows: int, size: int, group: int) -> tuple[tuple[int, int], int]:
    """Return the grid, and how many groups one program takes."""
    groups = min(triton.next_power_of_2(-(-size // group)), max(1, _COLUMNS // group))
    return (rows, -(-size // (group * groups))), groups


def round_activations(x_NK: Tensor) -> Tensor:
    """Return rows [N, K] of any float dtype, in it, rounded to FP8 with a power of two per 128 columns."""
    rows, size = x_NK.shape
    out = torch.empty(rows, size, dtype=x_NK.dtype, device=x_NK.device)
    grid, groups = _tiles(rows, size, FP8_GROUP)
    launch(_round_activations, grid, x_NK, out, x_NK.stride(0), SIZE=size, GROUP=FP8_GROUP, GROUPS=groups)
    return out


# --- MXFP4 -------------------------------------------------------------------------------------------------------


@triton.jit
def _quantise_fp4(x_ptr, codes_ptr, scales_ptr, stride_x, SIZE: tl.constexpr, GROUPS: tl.constexpr):
    """Quantise GROUPS groups of 32 columns of one row."""
    row = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)
    column = group[:, None] * 32 + tl.arange(0, 32)[None, :]
    x = tl.load(x_ptr + row * stride_x + column, mask=column < SIZE, other=0.0).to(tl.float32)
    amax = tl.max(tl.abs(x), axis=1)
    byte = tl.where(amax == 0.0, 127, scale_byte(amax, 6.0))
    tl.store(scales_ptr + row * (SIZE // 32) + group, byte.to(tl.uint8), mask=group < SIZE // 32)
    even, odd = tl.split(tl.reshape(encode_e2m1(x * inverse_scale(byte)[:, None]), (GROUPS, 16, 2)))
    column = group[:, None] * 16 + tl.arange(0, 16)[None, :]
    tl.store(codes_ptr + row * (SIZE // 2) + column, even | (odd << 4), mask=column < SIZE // 2)


@triton.jit
def _dequantise_fp4(codes_ptr, scales_ptr, x_ptr, SIZE: tl.constexpr, GROUPS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)
    scale = decode_e8m0(tl.load(scales_ptr + row * (SIZE // 32) + group, mask=group < SIZE // 32, other=0))
    column = group[:, None] * 16 + tl.arange(0, 16)[None, :]
    code = tl.load(codes_ptr + row * (SIZE // 2) + column, mask=column < SIZE // 2, other=0)
    x = tl.reshape(tl.join(decode_e2m1(code), decode_e2m1(code >> 4)), (GROUPS, 32)) * scale[:, None]
    column = group[:, None] * 32 + tl.arange(0, 32)[None, :]
    tl.store(x_ptr + row * SIZE + column, x, mask=column < SIZE)


def quantise_fp4(x_NK: Tensor) -> tuple[Tensor, Tensor]:
    """Quantise rows [N, K] of any float dtype to MXFP4.

    Returns:
        Codes, uint8 [N, K / 2], and E8M0 scales, uint8 [N, K / 32].

    Raises:
        ValueError: K is not a multiple of 32.
    """
    rows, size = x_NK.shape
    if size % FP4_GROUP:
        raise ValueError(f"FP4 needs a multiple of {FP4_GROUP} columns, got shape {tuple(x_NK.shape)}")
    codes = torch.empty(rows, size // 2, dtype=torch.uint8, device=x_NK.device)
    scales = torch.empty(rows, size // FP4_GROUP, dtype=torch.uint8, device=x_NK.device)
    grid, groups = _tiles(rows, size, FP4_GROUP)
    launch(_quantise_fp4, grid, x_NK, codes, scales, x_NK.stride(0), SIZE=size, GROUPS=groups)
    return codes, scales


def dequantise_fp4(codes: Tensor, scales: Tensor, *, dtype: torch.dtype) -> Tensor:
    """Return [N, K] from contiguous codes [N, K / 2] and scales [N, K / 32], both uint8."""
    rows, size = codes.shape[0], 2 * codes.shape[1]
    x = torch.empty(rows, size, dtype=dtype, device=codes.device)
    grid, groups = _tiles(rows, size, FP4_GROUP)
    launch(_dequantise_fp4, grid, codes, scales, x, SIZE=size, GROUPS=groups)
    return x


# --- int8 --------------------------------------------------------------------------------------------------------


@triton.jit
def _quantise_int8(x_ptr, codes_ptr, scales_ptr, stride_x, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    amax = tl.zeros([BLOCK], tl.float32)
    for start in range(0, SIZE, BLOCK):
        column = start + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + row * stride_x + column, mask=column < SIZE, other=0.0).to(tl.float32)
        amax = tl.maximum(amax, tl.abs(x))
    largest = tl.max(amax, axis=0)
    scale = tl.where(largest == 0.0, 1.0, tl.div_rn(largest, tl.full([], 127.0, tl.float32)))
    tl.store(scales_ptr + row, scale)
    for start in range(0, SIZE, BLOCK):
        column = start + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + row * stride_x + column, mask=column < SIZE, other=0.0).to(tl.float32)
        code = tl.div_rn(x, tl.broadcast_to(scale, x.shape)) + 12582912.0 - 12582912.0  # 1.5 * 2^23: to nearest even
        tl.store(codes_ptr + row * SIZE + column, code.to(tl.int8), mask=column < SIZE)


@triton.jit
def _dequantise_int8(codes_ptr, scales_ptr, x_ptr, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    code = tl.load(codes_ptr + row * SIZE + column, mask=column < SIZE, other=0)
    tl.store(x_ptr + row * SIZE + column, code.to(tl.float32) * tl.load(scales_ptr + row), mask=column < SIZE)


def quantise_int8(x_NK: Tensor) -> tuple[Tensor, Tensor]:
    """Quantise rows [N, K] of any float dtype to int8 codes [N, K] and float32 scales [N]."""
    rows, size = x_NK.shape
    codes = torch.empty(rows, size, dtype=torch.int8, device=x_NK.device)
    scales = torch.empty(rows, dtype=torch.float32, device=x_NK.device)
    block = min(triton.next_power_of_2(size), _COLUMNS)
    launch(_quantise_int8, (rows,), x_NK, codes, scales, x_NK.stride(0), SIZE=size, BLOCK=block)
    return codes, scales


def dequantise_int8(codes_NK: Tensor, scales_N: Tensor, *, dtype: torch.dtype) -> Tensor:
    """Return [N, K] from contiguous int8 codes [N, K] and scales [N]."""
    rows, size = codes_NK.shape
    x = torch.empty(rows, size, dtype=dtype, device=codes_NK.device)
    block = min(triton.next_power_of_2(size), _COLUMNS)
    launch(_dequantise_int8, (rows, -(-size // block)), codes_NK, scales_N, x, SIZE=size, BLOCK=block)
    return x


# --- key-value rows ----------------------------------------------------------------------------------------------


@triton.jit
def store_kv_row(page_ptr, row, rows, x, SIZE: tl.constexpr, ROTARY: tl.constexpr, BLOCK: tl.constexpr):
    """Write row `row` (int64) of a page of `rows` rows; `x` is float32 [BLOCK], of which SIZE count.

    A page holds the data of all its rows, SIZE - ROTARY codes and ROTARY bfloat16 each, and then their scales, 8 bytes
    each.
    """
    plain: tl.constexpr = SIZE - ROTARY
    data: tl.constexpr = plain + 2 * ROTARY
    column = tl.arange(0, BLOCK)
    data_ptr = page_ptr + row * data
    rotary_ptr = (data_ptr + plain).to(tl.pointer_type(tl.bfloat16), bitcast=True)
    tl.store(rotary_ptr + (column - plain), x.to(tl.bfloat16), mask=(column >= plain) & (column < SIZE))

    groups = tl.reshape(x, (BLOCK // 64, 64))
    byte = scale_byte(tl.maximum(tl.max(tl.abs(groups), axis=1), 1e-4), 448.0)
    codes = tl.reshape(encode_e4m3(groups * inverse_scale(byte)[:, None]), (BLOCK,))
    tl.store(data_ptr + column, codes, mask=column < plain)
    scales_ptr = data_ptr + (rows - row) * data + row * 8  # 64-bit, as the row is
    group = tl.arange(0, BLOCK // 64)
    tl.store(scales_ptr + group, byte.to(tl.uint8), mask=group < plain // 64)
    rest = tl.arange(0, 8)
    tl.store(scales_ptr + rest, tl.zeros([8], tl.uint8), mask=rest >= plain // 64)


@triton.jit
def _store_kv_rows(
    rows_ptr, slots_ptr, pages_ptr, stride_row, stride_page,
    ROWS: tl.constexpr, SIZE: tl.constexpr, ROTARY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots_ptr + n)
    if slot >= 0:
        column = tl.arange(0, BLOCK)
        x = tl.load(rows_ptr + n * stride_row + column, mask=column < SIZE, other=0.0).to(tl.float32)
        store_kv_row(pages_ptr + slot // ROWS * stride_page, slot % ROWS, ROWS, x, SIZE, ROTARY, BLOCK)


@triton.jit
def _load_kv_rows(
    pages_ptr, slots_ptr, rows_ptr, stride_page,
    ROWS: tl.constexpr, SIZE: tl.constexpr, ROTARY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots_ptr + n)
    plain: tl.constexpr = SIZE - ROTARY
    data: tl.constexpr = plain + 2 * ROTARY
    column = tl.arange(0, BLOCK)
    page_ptr = pages_ptr + slot // ROWS * stride_page
    data_ptr = page_ptr + slot % ROWS * data
    rotary_ptr = (data_ptr + plain).to(tl.pointer_type(tl.bfloat16), bitcast=True)
    rotary = tl.load(rotary_ptr + (column - plain), mask=(column >= plain) & (column < SIZE), other=0.0)
    code = tl.load(data_ptr + column, mask=column < plain, other=0)
    scale = tl.load(page_ptr + ROWS * data + slot % ROWS * 8 + column // 64, mask=column < plain, other=0)
    x = tl.where(column < plain, decode_e4m3(code) * decode_e8m0(scale), rotary.to(tl.float32))
    tl.store(rows_ptr + n * SIZE + column, x, mask=column < SIZE)


def store_kv_rows(rows_NK: Tensor, slots_N: Tensor, pages: Tensor, *, rotary: int) -> None:
    """Quantise rows [N, K] and store row n at `slots_N`[n]: page slot // T, row slot mod T; negative slots are skipped.

    `pages` is uint8 [pages, T, `kv_row_bytes`], contiguous within a page. A page holds the data of its T rows, and then
    their scales.
    """
    rows, size = rows_NK.shape
    _check_pages(pages, size, rotary)
    launch(
        _store_kv_rows, (rows,), rows_NK, slots_N, pages, rows_NK.stride(0), pages.stride(0), ROWS=pages.shape[1],
        SIZE=size, ROTARY=rotary, BLOCK=triton.next_power_of_2(size), num_warps=1,
    )  # fmt: skip


def load_kv_rows(pages: Tensor, slots_N: Tensor, size: int, *, rotary: int, dtype: torch.dtype) -> Tensor:
    """Return the dequantised rows [N, K] at `slots_N`; see `store_kv_rows`."""
    _check_pages(pages, size, rotary)
    rows = torch.empty(len(slots_N), size, dtype=dtype, device=pages.device)
    launch(
        _load_kv_rows, (len(slots_N),), pages, slots_N, rows, pages.stride(0), ROWS=pages.shape[1], SIZE=size,
        ROTARY=rotary, BLOCK=triton.next_power_of_2(size), num_warps=1,
    )  # fmt: skip
    return rows


def _check_pages(pages: Tensor, size: int, rotary: int) -> None:
    if pages.dtype != torch.uint8 or pages.shape[2] != kv_row_bytes(size, rotary):
        raise ValueError(
            f"pages must be uint8 [pages, rows, {kv_row_bytes(size, rotary)}], got {pages.dtype} {tuple(pages.shape)}"
        )


def calls(shapes: Shapes, rows: int, make: Make) -> Iterator[Call]:
    """Yield every configuration at a model's hidden size and head size; see `agentkit_kernels.calls`."""
    size, head, rotary = shapes.hidden_size, shapes.head_dim, shapes.qk_rope_head_dim
    x = make.floats(rows, size)
    codes = make.floats(rows, size, dtype=torch.uint8)
    groups = -(-size // FP8_GROUP)
    for e8m0 in (True, False):
        name, dtype = ("E8M0", torch.uint8) if e8m0 else ("float32", torch.float32)
        scales = make.floats(rows, groups, dtype=dtype)
        moved = rows * (3 * size + groups * dtype.itemsize)
        yield Call(f"quantise FP8, {name} scales", partial(quantise_fp8, x, e8m0=e8m0), moved, 0)
        yield Call(f"dequantise FP8, {name} scales", partial(dequantise_fp8, codes, scales, dtype=x.dtype), moved, 0)
    for activations in shapes.activations:
        some = make.floats(rows, size, dtype=activations)
        rounding = partial(round_activations, some)
        yield Call(with_dtype("round activations to FP8", activations), rounding, 2 * some.nbytes, 0)
    packed = make.floats(rows, size // 2, dtype=torch.uint8)
    scales4 = make.floats(rows, size // FP4_GROUP, dtype=torch.uint8)
    moved = rows * (2 * size + size // 2 + size // FP4_GROUP)
    yield Call("quantise MXFP4", partial(quantise_fp4, x), moved, 0)
    yield Call("dequantise MXFP4", partial(dequantise_fp4, packed, scales4, dtype=x.dtype), moved, 0)
    codes8, scales8 = make.floats(rows, size, dtype=torch.int8), make.floats(rows, dtype=torch.float32)
    moved = rows * (3 * size + 4)
    yield Call("quantise int8", partial(quantise_int8, x), moved, 0)
    yield Call("dequantise int8", partial(dequantise_int8, codes8, scales8, dtype=x.dtype), moved, 0)
    pages = make.floats(-(-rows // 64), 64, kv_row_bytes(head, rotary), dtype=torch.uint8)
    slots = make.ints(range(rows))
    for activations in shapes.activations:
        kv = make.floats(rows, head, dtype=activations)
        moved = kv.nbytes + rows * (kv_row_bytes(head, rotary) + 8)
        store = partial(store_kv_rows, kv, slots, pages, rotary=rotary)
        yield Call(with_dtype("store key-value rows", activations), store, moved, 0)
        load = partial(load_kv_rows, pages, slots, head, rotary=rotary, dtype=activations)
        yield Call(with_dtype("load key-value rows", activations), load, moved, 0)
