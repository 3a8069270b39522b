"""Products with dense and packed weights against float64, and a row alone against the same row among others."""

from __future__ import annotations

import mmap
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from agentkit_kernels.calls import FLASH, TINY, Shapes
from agentkit_kernels.packed import Format, Packed
from agentkit_kernels.reference.formats import dequantise
from agentkit_kernels.triton.launch import LAUNCHES, launch
from agentkit_kernels.triton.linear import (
    EXACT_TILE,
    FEW_ROWS,
    _linear,
    calls,
    grouped_linear,
    linear,
    operand,
    split_size,
)

FORMATS: tuple[Format, ...] = ("fp8", "mxfp4", "int8")
MAP_NORESERVE = 0x4000  # on Linux, and in `mmap` from Python 3.13 on: more than the machine's memory can be mapped


def random_packed(number_format: Format, *shape: int, float_scale: bool = False) -> Packed:
    """Return a packed weight of random codes, whose values have about unit size."""
    *lead, outputs, inputs = shape
    if number_format == "int8":
        data = torch.randint(-128, 128, shape, dtype=torch.int8)
        return Packed(number_format, data, torch.rand(*lead, outputs) / 64, shape)
    if number_format == "fp8":
        data = torch.randn(shape).to(torch.float8_e4m3fn)
        scales = (*lead, -(-outputs // 128), -(-inputs // 128))
    else:
        data = torch.randint(0, 256, (*lead, outputs, inputs // 2), dtype=torch.uint8)
        scales = (*lead, outputs, inputs // 32)
    scale = torch.randint(124, 129, scales, dtype=torch.uint8).view(torch.float8_e8m0fnu)
    return Packed(number_format, data, torch.rand(scales) if float_scale else scale, shape)


def product(x: Tensor, weight: Tensor | Packed) -> Tensor:
    dense = dequantise(weight) if isinstance(weight, Packed) else weight
    return (x.double() @ dense.double().mT).float()


def assert_product(result: Tensor, x: Tensor, weight: Tensor | Packed) -> None:
    # The interpreter truncates when it stores bfloat16: one unit in the last of 8 bits.
    rtol, atol = (2**-7, 2e-2) if result.dtype == torch.bfloat16 else (1e-5, 1e-4)
    torch.testing.assert_close(result.float(), product(x, weight), rtol=rtol, atol=atol)


@pytest.mark.parametrize("rows", [1, 7, 17, 33, FEW_ROWS, FEW_ROWS + 1])
@pytest.mark.parametrize(("outputs", "inputs"), [(1, 256), (5, 130), (96, 33), (130, 600)])
def test_dense_product_matches_float64(rows: int, outputs: int, inputs: int) -> None:
    x, weight = torch.randn(rows, inputs), torch.randn(outputs, inputs)
    assert_product(linear(x, weight), x, weight)


@pytest.mark.parametrize("number_format", FORMATS)
@pytest.mark.parametrize(("rows", "outputs", "inputs"), [(1, 96, 256), (7, 130, 160), (33, 5, 672), (65, 70, 1120)])
@pytest.mark.parametrize("float_scale", [False, True])
def test_packed_product_matches_the_dequantised_one(
    number_format: Format, rows: int, outputs: int, inputs: int, float_scale: bool
) -> None:
    weight = random_packed(number_format, outputs, inputs, float_scale=float_scale)
    x = torch.randn(rows, inputs)
    assert_product(linear(x, weight), x, weight)


def test_fp8_columns_that_end_within_a_tile_match() -> None:
    weight, x = random_packed("fp8", 70, 1290), torch.randn(3, 1290)
    assert_product(linear(x, weight), x, weight)


@pytest.mark.parametrize("number_format", [None, *FORMATS])
def test_bfloat16_rows_match(number_format: Format | None) -> None:
    x = torch.randn(9, 320).bfloat16()
    weight = random_packed(number_format, 70, 320) if number_format else torch.randn(70, 320).bfloat16()
    result = linear(x, weight)
    assert result.dtype == torch.bfloat16
    assert_product(result, x, weight)


def test_bfloat16_rows_keep_a_float32_weight_in_float32() -> None:
    x, weight = torch.randn(4, 128).bfloat16(), torch.randn(8, 128)
    out = torch.empty(4, 8)
    linear(x, weight, out=out)
    assert_product(out, x, weight)


@pytest.mark.parametrize("number_format", [None, *FORMATS])
@pytest.mark.parametrize("inputs", [192, 1184])
def test_a_row_has_the_same_bits_alone_and_among_others(number_format: Format | None, inputs: int) -> None:
    weight = random_packed(number_format, 70, inputs) if number_format else torch.randn(70, inputs)
    x = torch.randn(FEW_ROWS + 2, inputs)
    together = linear(x, weight)
    for start, end in pairwise([0, 1, 34, FEW_ROWS + 2]):
        assert torch.equal(linear(x[start:end], weight), together[start:end])


@pytest.mark.parametrize("number_format", [None, *FORMATS])
def test_inexact_products_of_many_rows_match(number_format: Format | None) -> None:
    weight = random_packed(number_format, 140, 224) if number_format else torch.randn(140, 224).bfloat16()
    x = torch.randn(130, 224).bfloat16()
    assert_product(linear(x, weight, exact=False), x, weight)


@pytest.mark.parametrize("number_format", [None, *FORMATS])
def test_float32_operands_have_one_tile(number_format: Format | None) -> None:
    weight = operand(random_packed(number_format, 70, 64) if number_format else torch.randn(70, 64))
    narrow, wide = torch.zeros(1, 64, dtype=torch.bfloat16), torch.zeros(1, 64)
    assert weight.fit(EXACT_TILE, narrow).inputs == (128 if number_format else 16)
    assert weight.fit(EXACT_TILE, wide).inputs == (32 if number_format == "mxfp4" else 16)
    dense, x = torch.randn(70, 64), torch.randn(FEW_ROWS + 1, 64)
    assert torch.equal(linear(x, dense, exact=False), linear(x, dense))


def test_views_of_fused_projections_are_read_and_written_in_place() -> None:
    fused, weight = torch.full((9, 500), torch.nan), torch.randn(40, 100)
    x = fused[:, 37:137].copy_(torch.randn(9, 100))
    out = torch.full((9, 90), torch.nan)
    linear(x, weight, out=out[:, 20:60])
    assert_product(out[:, 20:60], x, weight)
    assert out[:, :20].isnan().all() and out[:, 60:].isnan().all()
    assert_product(linear(x.t().contiguous().t(), weight), x, weight)


@pytest.mark.parametrize("number_format", [None, *FORMATS])
def test_memory_around_a_weight_and_its_rows_does_not_leak(number_format: Format | None) -> None:
    def padded(values: Tensor) -> Tensor:
        size = values.nbytes
        memory = torch.full((size + 8192,), 255, dtype=torch.uint8)  # NaN in every float format
        memory[4096 : 4096 + size] = values.reshape(-1).view(torch.uint8)
        return memory[4096 : 4096 + size].view(values.dtype).view(values.shape)

    weight: Tensor | Packed
    if number_format:
        packed = random_packed(number_format, 70, 1184)
        weight = Packed(number_format, padded(packed.data), padded(packed.scale), packed.shape)
    else:
        weight = padded(torch.randn(70, 1184))
    x = padded(torch.randn(5, 1184))
    assert_product(linear(x, weight), x, weight)


def test_a_nan_reaches_its_own_row_only() -> None:
    x, weight = torch.randn(5, 200), torch.randn(7, 200)
    x[2, 199] = torch.nan
    result = linear(x, weight)
    assert result[2].isnan().all() and not result[[0, 1, 3, 4]].isnan().any()


def test_no_rows_launch_nothing() -> None:
    before = LAUNCHES.total()
    assert linear(torch.empty(0, 64), torch.randn(5, 64)).shape == (0, 5)
    assert grouped_linear(torch.empty(0, 64), torch.randn(2, 5, 32)).shape == (0, 10)
    assert LAUNCHES.total() == before


@pytest.mark.parametrize("number_format", [None, *FORMATS])
@pytest.mark.parametrize("rows", [3, FEW_ROWS + 1])
def test_grouped_product_multiplies_each_part_by_its_own_matrix(number_format: Format | None, rows: int) -> None:
    weight = random_packed(number_format, 3, 70, 160) if number_format else torch.randn(3, 70, 160)
    x = torch.randn(rows, 480)
    dense = dequantise(weight) if isinstance(weight, Packed) else weight
    expected = torch.einsum("ngk,gok->ngo", x.view(rows, 3, 160).double(), dense.double()).flatten(1).float()
    torch.testing.assert_close(grouped_linear(x, weight), expected, rtol=1e-5, atol=1e-4)


def far(values: Tensor, *strides: int) -> Tensor:
    """Return values at these strides; memory appears where it is written."""
    last = sum((size - 1) * stride for size, stride in zip(values.shape, strides, strict=True))
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE
    memory = torch.frombuffer(mmap.mmap(-1, values.itemsize * (last + 1), flags=flags), dtype=values.dtype)
    return memory.as_strided(values.shape, strides).copy_(values)


def test_rows_and_results_lie_beyond_32_bits() -> None:
    stride = 1 << 30
    x, weight = torch.randn(3, 64), torch.randn(5, 64)
    assert_product(linear(far(x, stride, 1), weight), x, weight)
    x, weight = torch.randn(2, 3), torch.randn(5, 3)
    assert_product(linear(far(x, 1, stride), weight), x, weight)
    x, weight = torch.randn(3, 600), torch.randn(5, 600)  # two splits
    out = far(torch.zeros(3, 5), stride, 1)
    assert_product(linear(x, weight, out=out), x, weight)


def test_matrices_of_a_stack_lie_beyond_32_bits() -> None:
    stride, x, weight = 1 << 30, torch.randn(2, 1800), random_packed("int8", 3, 5, 600)  # two splits
    apart = Packed("int8", far(weight.data, stride, 600, 1), far(weight.scale, stride, 1), weight.shape)
    assert torch.equal(grouped_linear(x, apart), grouped_linear(x, weight))


@pytest.mark.parametrize("number_format", [None, "mxfp4"])
def test_rows_of_a_weight_lie_beyond_32_bits(number_format: Format | None) -> None:
    """The kernel is told of 2^30 inputs, and that the first 32 are the only split."""
    x, inputs, outputs = torch.randn(2, 32), 1 << 30, 65 if number_format else 3  # scales are fewer by 32
    packed, dense = random_packed("mxfp4", outputs, 32), torch.randn(outputs, 32).bfloat16()
    weight = far(packed.data.view(torch.int32), inputs // 8, 1) if number_format else far(dense, inputs, 1)
    scale = far(packed.scale.view(torch.uint8), inputs // 32, 1) if number_format else weight
    out = torch.empty(2, outputs)
    launch(
        _linear, (1, 1, 1), x, weight, scale, out, 2, 0, 32, 1, 0, 0, 0, outputs, 0, X=outputs, K=inputs,
        FORMAT=number_format or "dense", SPLITS=1, SPLIT_K=32, TOGETHER=True, BLOCK_N=16, BLOCK_X=128, BLOCK_K=32,
        OPERAND=operand(dense).type(x),
    )  # fmt: skip
    assert_product(out, x, packed if number_format else dense)


def test_a_wrong_shape_or_layout_is_refused() -> None:
    with pytest.raises(ValueError, match="cannot multiply rows"):
        linear(torch.randn(3, 65), torch.randn(5, 64))
    with pytest.raises(ValueError, match="contiguous"):
        linear(torch.randn(3, 64), torch.randn(64, 5).t())
    with pytest.raises(ValueError, match="contiguous"):
        linear(torch.randn(3, 64), torch.randn(5, 64), out=torch.empty(5, 3).t())


def test_splits_cover_all_columns_in_whole_tiles() -> None:
    assert split_size(32768, 1024) == 1024
    for outputs, inputs in [(1024, 4096), (512, 4096), (5, 130), (24, 16384)]:
        size = split_size(outputs, inputs)
        assert size % 128 == 0 and size >= 512


class _Meta:
    """Tensors without memory."""

    def floats(self, *shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.empty(*shape, dtype=dtype, device="meta")

    def ints(self, values: object, dtype: torch.dtype = torch.int64) -> Tensor:
        raise NotImplementedError


@pytest.mark.parametrize("shapes", [FLASH, TINY])
def test_calls_count_the_bytes_of_packed_weights(shapes: Shapes) -> None:
    of = {call.name: call for call in calls(shapes, 1, _Meta())}
    weight = shapes.q_lora_rank * shapes.hidden_size
    rows = 2 * (shapes.q_lora_rank + shapes.hidden_size)
    assert of["latent, bfloat16"].bytes == 2 * weight + rows
    assert of["latent, mxfp4"].bytes == weight * 17 // 32 + rows
    assert of["latent, fp8"].bytes == weight + -(-weight // 128**2) + rows
