"""The quantisers give the bits of their torch twins, which round as float64 arithmetic does."""

from __future__ import annotations

import mmap

import pytest
import torch
from torch import Tensor

from agentkit_kernels.reference import quantize as reference
from agentkit_kernels.triton import quantize as triton
from agentkit_kernels.triton.launch import LAUNCHES

SHAPES = [(1, 1), (3, 127), (2, 128), (5, 129), (2, 4097)]


def rows(count: int, size: int, seed: int = 0) -> Tensor:
    """Values over many binades, with zeros, negative zeros and a group of zeros."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, size, generator=generator) * torch.exp2(torch.randn(count, size, generator=generator) * 6)
    x[0, :128] = 0.0
    x[-1, ::7] = -0.0
    return x


def within(x: Tensor) -> Tensor:
    """The same values as columns 3 to 3 + K of wider rows, surrounded by NaN."""
    wide = torch.full((x.shape[0], x.shape[1] + 16), torch.nan, dtype=x.dtype)
    wide[:, 3 : 3 + x.shape[1]] = x
    return wide[:, 3 : 3 + x.shape[1]]


def assert_same(actual: Tensor, expected: Tensor) -> None:
    assert actual.dtype == expected.dtype
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("e8m0", [True, False])
@pytest.mark.parametrize(("count", "size"), SHAPES)
def test_fp8_rows_have_the_bits_of_the_twin(count: int, size: int, e8m0: bool) -> None:
    x = rows(count, size)
    expected = reference.quantise_fp8(x, e8m0=e8m0)
    before = LAUNCHES["_quantise_fp8"]
    actual = triton.quantise_fp8(within(x), e8m0=e8m0)
    assert LAUNCHES["_quantise_fp8"] == before + 1
    for one, other in zip(actual, expected, strict=True):
        assert_same(one, other)
    for dtype in (torch.float32, torch.bfloat16):
        restored = triton.dequantise_fp8(*actual, dtype=dtype)
        torch.testing.assert_close(
            restored, reference.dequantise_fp8(*expected, dtype=dtype), rtol=0 if dtype == torch.float32 else 2**-7,
            atol=0,
        )  # fmt: skip


@pytest.mark.parametrize("group", [32, 64])
def test_fp8_groups_may_be_smaller_and_have_no_floor(group: int) -> None:
    x = rows(2, 200) * 1e-6
    for one, other in zip(
        triton.quantise_fp8(x, group=group, floor=0.0), reference.quantise_fp8(x, group=group, floor=0.0), strict=True
    ):
        assert_same(one, other)


@pytest.mark.parametrize(("count", "size"), [(1, 32), (3, 96), (2, 4128)])
def test_fp4_rows_have_the_bits_of_the_twin(count: int, size: int) -> None:
    x = rows(count, size)
    x[0, :32] = torch.tensor([*reference._E2M1_MIDPOINTS, 6.0, 7.0, -0.25, -0.75, -5.0, *([0.0] * 20)])
    expected = reference.quantise_fp4(x)
    actual = triton.quantise_fp4(within(x))
    for one, other in zip(actual, expected, strict=True):
        assert_same(one, other)
    restored = triton.dequantise_fp4(*actual, dtype=torch.float32)
    assert_same(restored, reference.dequantise_fp4(*expected, dtype=torch.float32))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("count", "size"), SHAPES)
def test_rounded_activations_are_those_of_the_twin(count: int, size: int, dtype: torch.dtype) -> None:
    x = rows(count, size).to(dtype)
    before = LAUNCHES["_round_activations"]
    actual = triton.round_activations(within(x))
    assert LAUNCHES["_round_activations"] == before + 1
    assert actual.dtype == dtype
    assert_same(actual.float(), reference.round_activations(x))  # exact in bfloat16
    assert_same(triton.round_activations(actual), actual)
    few = x * 2.0**-20  # groups below the floor
    assert_same(triton.round_activations(few).float(), reference.round_activations(few))
    assert torch.equal(triton.round_activations(x[-1:]), actual[-1:])


def test_a_nan_among_activations_stays_one() -> None:
    x = rows(2, 256)
    x[1, 5] = torch.nan
    rounded = triton.round_activations(x)
    assert rounded.isnan().nonzero().tolist() == [[1, 5]]


@pytest.mark.parametrize(("count", "size"), SHAPES)
def test_int8_rows_have_the_bits_of_the_twin(count: int, size: int) -> None:
    x = rows(count, size)
    x[-1, :] = torch.arange(size) % 255 / 2.0  # halves: ties between two codes
    x[-1, 0] = 127.0
    expected = reference.quantise_int8(x)
    actual = triton.quantise_int8(within(x))
    for one, other in zip(actual, expected, strict=True):
        assert_same(one, other)
    assert_same(
        triton.dequantise_int8(*actual, dtype=torch.float32), reference.dequantise_int8(*expected, dtype=torch.float32)
    )


def test_all_256_codes_of_e4m3_and_all_scales_are_decoded() -> None:
    codes = torch.arange(256, dtype=torch.uint8).repeat(2, 1)
    scales = torch.full((2, 2), 127, dtype=torch.uint8)
    restored = triton.dequantise_fp8(codes, scales, dtype=torch.float32)
    assert_same(restored, codes.view(torch.float8_e4m3fn).float())
    assert_same(triton.quantise_fp8(restored[:, :127], floor=0.0)[0], codes[:, :127])
    every = torch.arange(256, dtype=torch.uint8).view(256, 1)
    one = torch.full((256, 1), 0x38, dtype=torch.uint8)
    assert_same(
        triton.dequantise_fp8(one, every, dtype=torch.float32), every.view(torch.float8_e8m0fnu).float()
    )  # fmt: skip


@pytest.mark.parametrize("largest", [448.0, 6.0])
def test_a_scale_changes_just_above_a_power_of_two_times_the_largest_code(largest: float) -> None:
    edges = largest * torch.exp2(torch.arange(-20.0, 20.0))
    amax = torch.stack((edges.nextafter(torch.tensor(0.0)), edges, edges.nextafter(torch.tensor(torch.inf))), 1)
    x = torch.zeros(40 * 3, 32)
    x[:, 5] = -amax.flatten()
    scales = (triton.quantise_fp8(x, group=32, floor=0.0) if largest == 448.0 else triton.quantise_fp4(x))[1]
    exponents = torch.arange(-20, 20).repeat_interleave(3) + torch.tensor([0, 0, 1]).repeat(40)
    assert_same(scales.flatten().int() - 127, exponents.int())


def test_the_twins_round_to_the_nearest_code() -> None:
    x = rows(4, 256).double()
    codes, scales = reference.quantise_fp8(x, floor=0.0)
    every = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
    every = every[every.isfinite()]
    scaled = x / reference.decode_scale(scales).double().repeat_interleave(128, 1)
    nearest = (scaled[..., None] - every).abs().amin(-1)
    error = (reference.decode_e4m3(codes).double() - scaled).abs()
    assert bool((error <= nearest * (1 + 1e-6)).all())
    restored = reference.dequantise_fp4(*reference.quantise_fp4(x), dtype=torch.float64)
    largest = x.view(4, -1, 32).abs().amax(2).repeat_interleave(32, 1)
    assert bool(((restored - x).abs() <= largest / 4).all())  # half of the widest gap, 2, of codes up to at least 3
    codes8, scales8 = reference.quantise_int8(x)
    assert bool(((codes8.double() * scales8.double()[:, None] - x).abs() <= scales8[:, None] * 0.5001).all())


@pytest.mark.parametrize(("size", "rotary"), [(512, 64), (96, 32)])
@pytest.mark.parametrize("per_page", [1, 5])
def test_key_value_rows_have_the_bytes_of_the_twin(size: int, rotary: int, per_page: int) -> None:
    x = rows(6, size).bfloat16()
    slots = torch.tensor([7, 3, -1, 0, 11, 4])
    shape = (12, per_page, reference.kv_row_bytes(size, rotary))
    assert size != 512 or shape[2] == 584
    actual, expected = torch.full(shape, 0xAB, dtype=torch.uint8), torch.full(shape, 0xAB, dtype=torch.uint8)
    triton.store_kv_rows(within(x), slots, actual, rotary=rotary)
    reference.store_kv_rows(x, slots, expected, rotary=rotary)
    assert_same(actual, expected)
    used = slots[slots >= 0]
    restored = triton.load_kv_rows(actual, used, size, rotary=rotary, dtype=torch.float32)
    assert_same(restored, reference.load_kv_rows(expected, used, size, rotary=rotary, dtype=torch.float32))
    assert_same(restored[:, -rotary:], x[slots >= 0, -rotary:].float())


def test_key_value_pages_lie_beyond_32_bits() -> None:
    size, rotary, stride = 96, 32, 1 << 30
    row = reference.kv_row_bytes(size, rotary)
    memory = torch.frombuffer(mmap.mmap(-1, 3 * stride + row), dtype=torch.uint8)
    pages = memory.as_strided((4, 1, row), (stride, row, 1))
    x = rows(1, size)
    triton.store_kv_rows(x, torch.tensor([3]), pages, rotary=rotary)
    restored = triton.load_kv_rows(pages, torch.tensor([3]), size, rotary=rotary, dtype=torch.float32)
    torch.testing.assert_close(restored, x, rtol=2**-3, atol=1e-2 * float(x.abs().max()))


def test_rows_lie_beyond_32_bits() -> None:
    stride = 1 << 30
    memory = torch.frombuffer(mmap.mmap(-1, 4 * (2 * stride + 64)), dtype=torch.float32)
    x = memory.as_strided((3, 64), (stride, 1)).copy_(rows(3, 64))
    for quantise in (triton.quantise_fp8, triton.quantise_fp4, triton.quantise_int8):
        for far, near in zip(quantise(x), quantise(x.clone()), strict=True):
            assert torch.equal(far, near)
    assert torch.equal(triton.round_activations(x), triton.round_activations(x.clone()))


def test_the_hadamard_twin_is_sylvesters_matrix() -> None:
    eye = torch.eye(8, dtype=torch.float64)
    matrix = reference.hadamard(eye) * 8**0.5
    signs = torch.tensor([[(-1.0) ** (i & j).bit_count() for j in range(8)] for i in range(8)], dtype=torch.float64)
    torch.testing.assert_close(matrix, signs)
    torch.testing.assert_close(reference.hadamard(reference.hadamard(eye)), eye)


def test_no_rows_are_no_launch() -> None:
    before = sum(LAUNCHES.values())
    empty = torch.empty(0, 96)
    assert triton.dequantise_fp8(*triton.quantise_fp8(empty), dtype=torch.float32).shape == (0, 96)
    assert triton.dequantise_fp4(*triton.quantise_fp4(empty), dtype=torch.float32).shape == (0, 96)
    assert triton.dequantise_int8(*triton.quantise_int8(empty), dtype=torch.float32).shape == (0, 96)
    assert triton.round_activations(empty).shape == (0, 96)
    assert sum(LAUNCHES.values()) == before


def test_shapes_that_a_format_lacks_are_refused() -> None:
    with pytest.raises(ValueError, match=r"multiple of 32 columns, got shape \(2, 40\)"):
        triton.quantise_fp4(torch.zeros(2, 40))
    with pytest.raises(ValueError, match="1 to 8 groups of 64 columns, got 32 columns"):
        reference.kv_row_bytes(64, 32)
    with pytest.raises(ValueError, match=r"uint8 \[pages, rows, 136\], got torch.uint8 \(1, 2, 584\)"):
        triton.store_kv_rows(
            torch.zeros(1, 96), torch.tensor([0]), torch.zeros(1, 2, 584, dtype=torch.uint8), rotary=32
        )
