"""Products from packed weights: the bits of the dequantised product, for any shape, row count and split."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from agentkit_engine.weights.formats import quantise_fp4, quantise_fp8
from agentkit_kernels.cpu import loops, panels
from agentkit_kernels.cpu.layout import Matrix, pack, unpacked
from agentkit_kernels.cpu.loops import Floats
from agentkit_kernels.cpu.panels import LANES
from agentkit_kernels.cpu.workers import Workers
from agentkit_kernels.packed import E2M1, MOST_EXPONENT, Packed
from agentkit_kernels.packing import packed

FORMATS = ("fp8", "fp8 with float scales", "mxfp4", "mxfp4 with float scales", "int8")


def randoms(seed: int, *shape: int) -> Floats:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def quantised(weight_XK: Floats, kind: str) -> Packed:
    weight = torch.from_numpy(weight_XK)
    if kind == "int8":
        scale_X = weight.abs().amax(-1) / 127
        return Packed("int8", (weight / scale_X[:, None]).round().to(torch.int8), scale_X, tuple(weight.shape))
    codes, scale = quantise_fp8(weight) if kind.startswith("fp8") else quantise_fp4(weight)
    scale = scale.float() * 1.7 if "float" in kind else scale
    if kind.startswith("fp8"):
        return Packed("fp8", codes, scale, tuple(weight.shape))
    return Packed("mxfp4", codes.view(torch.uint8), scale, tuple(weight.shape))


def matrix(weight: Tensor | Packed) -> Matrix:
    if isinstance(weight, Tensor):
        return unpacked(packed(weight))
    [laid] = pack([weight], Workers(1))
    return laid


def product(x_NK: Floats, weight: Matrix) -> Floats:
    """Multiply with the panels' kernel."""
    out_NX = np.full((len(x_NK), weight.outputs), np.nan, np.float32)
    panels.multiply(x_NK, weight.panels, weight.outputs, 0, weight.count, out_NX, 0)
    return out_NX


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("rows", [1, 2, 3, 5, 6, 13])
def test_packed_products_have_the_bits_of_the_dequantised_product(kind: str, rows: int) -> None:
    inputs, outputs = 160, LANES + 13
    weight = quantised(randoms(0, outputs, inputs), kind)
    x, values = randoms(1, rows, inputs), weight.dequantise()
    found = product(x, matrix(weight))
    assert np.array_equal(found, product(x, matrix(values)))
    exact = x.astype(np.float64) @ values.T.double().numpy()
    np.testing.assert_allclose(found, exact, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_output_is_one_chain_in_the_order_of_its_inputs(dtype: torch.dtype) -> None:
    inputs, outputs = 3 * panels.TILE + 7, 2 * LANES + 1
    x, weight = randoms(0, 9, inputs), torch.from_numpy(randoms(1, outputs, inputs)).to(dtype)
    found, whole = product(x, matrix(weight)), np.full((9, outputs), np.nan, np.float32)
    unpacked_KX = matrix(weight).unpacked
    assert unpacked_KX is not None
    loops.multiply(x, unpacked_KX, 0, outputs, whole, 0)
    assert np.array_equal(found, whole)
    expected = np.zeros((9, outputs))
    for k in range(inputs):  # a product is exact in float64, whose sum is rounded twice
        expected = (expected + np.outer(x[:, k].astype(np.float64), weight[:, k].double().numpy())).astype(np.float32)
    assert (found == expected).mean() > 0.9


@settings(deadline=None, max_examples=30)
@given(rows=st.integers(0, 2 * panels.ROW_BLOCK + 5), inputs=st.integers(1, 300), outputs=st.integers(1, 2 * LANES + 1))
def test_bits_of_a_row_do_not_depend_on_the_other_rows(rows: int, inputs: int, outputs: int) -> None:
    x, weight = randoms(rows, rows, inputs), matrix(torch.from_numpy(randoms(inputs, outputs, inputs)).bfloat16())
    whole = product(x, weight)
    for row in {0, rows // 2, rows - 1} if rows else ():
        assert np.array_equal(product(x[row : row + 1], weight)[0], whole[row])
    cut = rows // 3
    assert np.array_equal(np.concatenate([product(x[:cut], weight), product(x[cut:], weight)]), whole)


@pytest.mark.parametrize("kind", ["fp8", "mxfp4"])
@pytest.mark.parametrize("exponent", [0, 1, 120, 127, MOST_EXPONENT])
def test_every_code_and_every_scale_is_exact(kind: str, exponent: int) -> None:
    """Weights are multiplied by 1, one at a time, with scales from the smallest to the largest."""
    codes = torch.arange(256, dtype=torch.uint8)[:, None].repeat(1, 16)
    scales = torch.full((2, 1) if kind == "fp8" else (256, 1), exponent, dtype=torch.uint8).view(torch.float8_e8m0fnu)
    if kind == "fp8":
        codes[(codes & 0x7F) == 0x7F] = 0  # NaN, which a loader rejects
        weight = Packed("fp8", codes.view(torch.float8_e4m3fn), scales, (256, 16))
        values = codes.view(torch.float8_e4m3fn).float().numpy()
    else:
        weight = Packed("mxfp4", codes, scales, (256, 32))
        values = np.array(E2M1, np.float32)[np.stack((codes & 15, codes >> 4), -1).reshape(256, 32)]
    expected = values * np.float32(2.0 ** (exponent - 127))
    assert np.isfinite(expected).all()
    assert np.array_equal(product(np.eye(values.shape[1], dtype=np.float32), matrix(weight)).T, expected)
    assert np.array_equal(weight.dequantise().numpy(), expected)


def test_a_scale_out_of_range_is_refused() -> None:
    weight = quantised(randoms(0, 3, 32), "mxfp4")
    weight.scale.view(torch.uint8)[1] = MOST_EXPONENT + 1
    with pytest.raises(ValueError, match=r"a scale is 2\^114, expected at most 2\^113"):
        matrix(weight)


@pytest.mark.parametrize("cut", range(4))
def test_parts_of_a_product_write_their_own_columns(cut: int) -> None:
    """Panels are computed in two calls, behind a column that they must leave alone."""
    weight = matrix(quantised(randoms(5, 3 * LANES - 1, 32), "mxfp4"))
    out = np.full((7, 3 * LANES + 1), np.nan, np.float32)
    x = randoms(6, 7, 32)
    panels.multiply(x, weight.panels, 3 * LANES - 1, 0, cut, out, 1)
    panels.multiply(x, weight.panels, 3 * LANES - 1, cut, 3, out, 1)
    assert np.array_equal(out[:, 1:-1], product(x, weight))
    assert np.isnan(out[:, [0, -1]]).all()


def test_rows_are_laid_out_from_any_output() -> None:
    first, rows = 3, randoms(7, LANES + 5, 130)
    laid = np.zeros((2, 130, LANES), np.float32)
    panels.lay_out(rows, laid, first)
    found = laid.transpose(0, 2, 1).reshape(-1, 130)
    assert np.array_equal(found[first : first + len(rows)], rows)
    assert not found[:first].any() and not found[first + len(rows) :].any()
