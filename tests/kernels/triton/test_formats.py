"""Every code of the packed formats, decoded in kernels and by the twin."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl

from agentkit_kernels.packed import Packed
from agentkit_kernels.reference.formats import E2M1_VALUES, decode_scale, dequantise
from agentkit_kernels.triton.formats import e2m1_to_float, e4m3_to_float, scale_to_float

CODES = torch.arange(256, dtype=torch.uint8)


@triton.jit  # type: ignore[untyped-decorator]
def _decode(codes, out, FORMAT: tl.constexpr, SIZE: tl.constexpr):  # type: ignore[no-untyped-def]
    offsets = tl.arange(0, SIZE)
    code = tl.load(codes + offsets)
    if FORMAT == "e4m3":
        value = e4m3_to_float(code)
    elif FORMAT == "e2m1":
        value = e2m1_to_float(code)
    else:
        value = scale_to_float(code)
    tl.store(out + offsets, value)


def _decoded(codes: torch.Tensor, number_format: str) -> torch.Tensor:
    out = torch.full((len(codes),), 7.0)
    _decode[(1,)](codes, out, FORMAT=number_format, SIZE=len(codes))
    return out


def _assert_same_bits(result: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(result, expected, rtol=0, atol=0, equal_nan=True)
    numbers = ~expected.isnan()
    assert torch.equal(result[numbers].view(torch.int32), expected[numbers].view(torch.int32))


def test_every_e4m3_code_decodes_as_in_torch() -> None:
    _assert_same_bits(_decoded(CODES, "e4m3"), CODES.view(torch.float8_e4m3fn).float())


def test_every_e2m1_code_decodes_to_its_value_whatever_the_high_bits() -> None:
    _assert_same_bits(_decoded(CODES, "e2m1"), torch.tensor(E2M1_VALUES).repeat(16))


def test_every_e8m0_code_is_a_power_of_two_or_nan() -> None:
    expected = torch.ldexp(torch.ones(256, dtype=torch.float64), torch.arange(256) - 127).float()
    expected[255] = float("nan")
    _assert_same_bits(_decoded(CODES, "scale"), expected)
    _assert_same_bits(decode_scale(CODES.view(torch.float8_e8m0fnu)), expected)


def test_float_scales_pass_through() -> None:
    scales = torch.randn(16)
    assert torch.equal(_decoded(scales, "scale"), scales)


def test_fp8_blocks_that_end_early_use_their_own_scales() -> None:
    data = torch.ones(130, 200).to(torch.float8_e4m3fn)
    weight = dequantise(Packed("fp8", data, torch.tensor([[1.0, 2.0], [4.0, 8.0]]), (130, 200)))
    assert weight[127, 127] == 1 and weight[127, 128] == 2 and weight[128, 127] == 4 and weight[129, 199] == 8


def test_mxfp4_reads_the_even_column_from_the_low_half() -> None:
    data = torch.full((1, 1, 16), 0x72, dtype=torch.uint8)
    weight = dequantise(Packed("mxfp4", data, torch.full((1, 1, 1), 0.5), (1, 1, 32)))
    assert weight[0, 0, 0] == 0.5 and weight[0, 0, 1] == 3.0


def test_int8_scales_rows() -> None:
    data = torch.tensor([[1, -2], [3, -128]], dtype=torch.int8)
    weight = dequantise(Packed("int8", data, torch.tensor([0.5, 2.0]), (2, 2)))
    assert weight.tolist() == [[0.5, -1.0], [6.0, -256.0]]


@pytest.mark.parametrize(
    ("number_format", "data", "scale", "shape"),
    [
        ("mxfp4", torch.zeros(1, 24, dtype=torch.uint8), torch.ones(1, 2), (1, 48)),
        ("fp8", torch.zeros(4, 8).to(torch.float8_e4m3fn), torch.ones(1, 2), (4, 8)),
        ("fp8", torch.zeros(4, 8, dtype=torch.uint8), torch.ones(1, 1), (4, 8)),
        ("int8", torch.zeros(4, 8, dtype=torch.int8), torch.ones(4, dtype=torch.float64), (4, 8)),
        ("int8", torch.zeros(4, 9, dtype=torch.int8), torch.ones(4), (4, 8)),
    ],
)
def test_a_packed_weight_of_a_wrong_shape_or_dtype_is_refused(
    number_format: str, data: torch.Tensor, scale: torch.Tensor, shape: tuple[int, int]
) -> None:
    with pytest.raises(ValueError, match=r"mxfp4|fp8|int8|scales"):
        Packed(number_format, data, scale, shape)  # type: ignore[arg-type]
