"""The checkpoint number formats: every code, every scale byte, and quantisation as the inverse of decoding."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from agentkit_engine.weights.formats import (
    FP4_VALUES,
    decode_e8m0,
    dequantise_fp4,
    dequantise_fp8,
    encode_e8m0,
    quantise_fp4,
    quantise_fp8,
)


def test_every_e8m0_byte() -> None:
    every_byte = torch.arange(256, dtype=torch.uint8)
    decoded = decode_e8m0(every_byte)
    assert decoded[:255].tolist() == [2.0 ** (byte - 127) for byte in range(255)]
    assert math.isnan(decoded[255])
    as_float8 = every_byte.view(torch.float8_e8m0fnu)
    torch.testing.assert_close(decode_e8m0(as_float8), as_float8.float(), rtol=0, atol=0, equal_nan=True)
    assert encode_e8m0(decoded[:255]).view(torch.uint8).tolist() == list(range(255))


def e4m3(byte: int) -> float:
    """Return the OCP e4m3fn value of a byte, from its bits."""
    sign, exponent, mantissa = -1 if byte & 0x80 else 1, byte >> 3 & 0xF, byte & 7
    if exponent == 0xF and mantissa == 7:
        return math.nan
    return sign * (mantissa / 8 * 2**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7))


def test_every_fp8_code() -> None:
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).view(2, 128)
    decoded = dequantise_fp8(codes, torch.tensor([[130]], dtype=torch.uint8).view(torch.float8_e8m0fnu))
    expected = torch.tensor([8 * e4m3(byte) for byte in range(256)]).view(2, 128)
    torch.testing.assert_close(decoded, expected, rtol=0, atol=0, equal_nan=True)


def test_every_fp4_code_in_both_nibbles() -> None:
    packed = torch.arange(256, dtype=torch.uint8).view(torch.int8).view(4, 64)
    scale = torch.tensor([[126, 127, 128, 129]] * 4, dtype=torch.uint8).view(torch.float8_e8m0fnu)
    decoded = dequantise_fp4(packed, scale)
    for byte in range(256):
        row, column = byte // 64, 2 * (byte % 64)
        factor = 2.0 ** (column // 32 - 1)
        assert decoded[row, column] == FP4_VALUES[byte & 0xF] * factor  # low nibble: even column
        assert decoded[row, column + 1] == FP4_VALUES[byte >> 4] * factor


def test_fp8_scales_are_per_block_and_may_be_float32_or_ragged() -> None:
    weight = torch.ones(130, 200).to(torch.float8_e4m3fn)
    scale = torch.tensor([[0.3, 5.0], [7.0, 11.0]])
    decoded = dequantise_fp8(weight, scale)
    assert decoded.shape == (130, 200)
    for row, column in ((0, 0), (127, 127), (127, 128), (128, 127), (129, 199)):
        assert decoded[row, column] == scale[row // 128, column // 128]


@pytest.mark.parametrize("shape", [(128, 128), (1, 1), (130, 200), (257, 128)])
def test_fp8_error_is_bounded_and_requantising_is_exact(shape: tuple[int, int]) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1)) * 0.02
    codes, scale = quantise_fp8(weight)
    decoded = dequantise_fp8(codes, scale)
    assert codes.shape == shape and scale.shape == (-(-shape[0] // 128), -(-shape[1] // 128))
    block_max = weight.abs().max()
    assert ((decoded - weight).abs() <= weight.abs() / 16 + block_max * 2**-16).all()
    assert torch.equal(dequantise_fp8(*quantise_fp8(decoded)), decoded)
    assert torch.equal(decoded.bfloat16().float(), decoded)  # exact in bfloat16


def test_fp4_rounds_to_nearest_even() -> None:
    midpoints = [0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0]
    row = torch.tensor([[6.0, *midpoints, *[-x for x in midpoints]] + [0.0] * 17])
    decoded = dequantise_fp4(*quantise_fp4(row))
    assert decoded[0, 1:8].tolist() == [0, 1, 1, 2, 2, 4, 4]
    assert decoded[0, 8:15].tolist() == [0, -1, -1, -2, -2, -4, -4]


def test_fp4_picks_a_nearest_value_and_requantising_is_exact() -> None:
    weight = torch.randn(8, 96, generator=torch.Generator().manual_seed(2))
    packed, scale = quantise_fp4(weight)
    assert packed.shape == (8, 48) and packed.dtype == torch.int8 and scale.shape == (8, 3)
    decoded = dequantise_fp4(packed, scale)
    grid = torch.tensor(FP4_VALUES) * decode_e8m0(scale).repeat_interleave(32, 1)[..., None]
    nearest = (grid - weight[..., None]).abs().min(-1).values
    assert torch.equal((decoded - weight).abs(), nearest)
    assert torch.equal(dequantise_fp4(*quantise_fp4(decoded)), decoded)


@settings(max_examples=50, deadline=None)
@given(st.floats(min_value=2.0**-60, max_value=2.0**60, width=32))
def test_scales_are_the_smallest_power_of_two_that_fits(value: float) -> None:
    for quantise, largest in ((quantise_fp8, 448.0), (quantise_fp4, 6.0)):
        scale = decode_e8m0(quantise(torch.full((1, 32), value))[1]).item()
        assert value <= scale * largest and value > scale / 2 * largest


def test_an_all_zero_weight_stays_zero() -> None:
    zero = torch.zeros(2, 64)
    assert torch.equal(dequantise_fp8(*quantise_fp8(zero)), zero)
    assert torch.equal(dequantise_fp4(*quantise_fp4(zero)), zero)


def test_fp4_rejects_a_row_of_partial_groups() -> None:
    with pytest.raises(ValueError, match=r"multiple of 32 input columns, got shape \(2, 40\)"):
        quantise_fp4(torch.zeros(2, 40))
