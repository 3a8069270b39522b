"""Products from packed weights: the bits of the dequantised product, for any shape, row count and split."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from agentkit_engine.weights.formats import dequantise_fp4, dequantise_fp8, quantise_fp4, quantise_fp8
from agentkit_kernels import cpu, panels
from agentkit_kernels.cpu import Floats, Ints
from agentkit_kernels.panels import BF16, F32, FP4, FP8, LANES, Int8, Panels

FORMATS = ("fp8", "fp8 with float scales", "fp4", "fp4 with float scales", "int8", "bf16")


def randoms(seed: int, *shape: int) -> Floats:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def in_panels(rows_XK: np.ndarray, outputs: int | None = None) -> np.ndarray:
    """Lay out codes or scales [E, X, K] in panels; the last panel of each matrix is padded with zeros."""
    experts, outputs, inputs = rows_XK.shape
    count = -(-outputs // LANES)
    panels_PKL = np.zeros((experts * count, inputs, LANES), rows_XK.dtype)
    for e in range(experts):
        panels.lay_out(np.ascontiguousarray(rows_XK[e]), panels_PKL, e * count * LANES)
    return panels_PKL


def pack(weight_EXK: Floats, kind: str) -> tuple[Panels, Floats]:
    """Return a stack of weights in a format, and the values it stands for."""
    weight = torch.from_numpy(weight_EXK)
    outputs = weight.shape[1]
    if kind == "bf16":
        half = weight.bfloat16()
        return BF16(in_panels(half.view(torch.uint16).numpy())), half.float().numpy()
    if kind == "int8":
        scale_EX = weight.abs().amax(-1) / 127
        codes = (weight / scale_EX[..., None]).round().to(torch.int8)
        whole = codes.float() * scale_EX[..., None]
        return Int8(in_panels(codes.numpy()), in_panels(scale_EX[..., None].numpy())), whole.numpy()
    packed, of_scale = (quantise_fp8, 128) if kind.startswith("fp8") else (quantise_fp4, 1)
    dequantise = dequantise_fp8 if kind.startswith("fp8") else dequantise_fp4
    codes_and_scales = [packed(part) for part in weight]
    codes = torch.stack([codes.view(torch.uint8) for codes, _ in codes_and_scales])
    scales = torch.stack([scale for _, scale in codes_and_scales])
    if "float" in kind:
        scales = scales.float() * 1.7
        scales_EXG = scales.repeat_interleave(of_scale, 1)[:, :outputs].numpy()
    else:
        scales_EXG = scales.view(torch.uint8).repeat_interleave(of_scale, 1)[:, :outputs].numpy()
    values = [dequantise(c.view(own.dtype), s) for c, s, (own, _) in zip(codes, scales, codes_and_scales, strict=True)]
    kind_of = FP8 if kind.startswith("fp8") else FP4
    return kind_of(in_panels(codes.numpy()), in_panels(scales_EXG)), torch.stack(values).numpy()


def product(x_NK: Floats, weight: Panels, outputs: int, starts: Ints | None = None) -> Floats:
    starts = np.array([0, len(x_NK)]) if starts is None else starts
    out_NX = np.full((len(x_NK), outputs), np.nan, np.float32)
    count = (len(starts) - 1) * -(-outputs // LANES)
    panels.multiply(x_NK, starts, weight, outputs, 0, count, out_NX, 0)
    return out_NX


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("rows", [1, 2, 3, 5, 6, 13])
def test_packed_products_have_the_bits_of_the_dequantised_product(kind: str, rows: int) -> None:
    inputs, outputs = 160, LANES + 13
    weight, values = pack(randoms(0, 1, outputs, inputs), kind)
    x = randoms(1, rows, inputs)
    found = product(x, weight, outputs)
    assert np.array_equal(found, product(x, F32(in_panels(values)), outputs))
    exact = x.astype(np.float64) @ values[0].T.astype(np.float64)
    np.testing.assert_allclose(found, exact, rtol=1e-4, atol=1e-4)


def test_an_output_is_one_chain_in_the_order_of_its_inputs() -> None:
    inputs, outputs = 3 * panels.TILE + 7, 2 * LANES + 1
    x, weight = randoms(0, 9, inputs), randoms(1, inputs, outputs)
    expected = np.empty((9, outputs), np.float32)
    cpu.multiply(x, weight, inputs, expected)
    assert np.array_equal(product(x, F32(in_panels(weight.T[None])), outputs), expected)


@settings(deadline=None, max_examples=30)
@given(rows=st.integers(0, 2 * panels.ROW_BLOCK + 5), inputs=st.integers(1, 300), outputs=st.integers(1, 2 * LANES + 1))
def test_bits_of_a_row_do_not_depend_on_the_other_rows(rows: int, inputs: int, outputs: int) -> None:
    x, (weight, _) = randoms(rows, rows, inputs), pack(randoms(inputs, 1, outputs, inputs), "bf16")
    whole = product(x, weight, outputs)
    for row in {0, rows // 2, rows - 1} if rows else ():
        assert np.array_equal(product(x[row : row + 1], weight, outputs)[0], whole[row])
    cut = rows // 3
    assert np.array_equal(np.concatenate([product(x[:cut], weight, outputs), product(x[cut:], weight, outputs)]), whole)


@pytest.mark.parametrize("kind", ["fp8", "fp4"])
def test_every_code_and_every_scale_is_exact(kind: str) -> None:
    """Weights are multiplied by 1, one at a time, with scales from the smallest to the largest."""
    codes = np.repeat(np.arange(256, dtype=np.uint8).reshape(1, 256, 1), 16, axis=2)
    if kind == "fp8":
        codes[codes & 0x7F == 0x7F] = 0  # NaN, which a loader rejects
        values = torch.from_numpy(codes[0]).view(torch.float8_e4m3fn).float().numpy()
    else:
        values = dequantise_fp4(torch.from_numpy(codes[0]), torch.ones(256, 1, dtype=torch.float32)).numpy()
    inputs = values.shape[1]
    for exponent in (0, 1, 120, 127, panels.MOST_EXPONENT):
        scales = np.full((1, 256, 1), exponent, np.uint8)
        weight = (FP8 if kind == "fp8" else FP4)(in_panels(codes), in_panels(scales))
        x = np.eye(inputs, dtype=np.float32)
        expected = values * np.float32(2.0 ** (exponent - 127))
        assert np.array_equal(product(x, weight, 256).T, expected)
        assert np.isfinite(expected).all()


@pytest.mark.parametrize("kind", FORMATS)
def test_stacked_weights_multiply_their_own_rows(kind: str) -> None:
    experts, inputs, outputs = 5, 64, LANES + 3
    weight, values = pack(randoms(3, experts, outputs, inputs), kind)
    starts = np.array([0, 2, 2, 9, 10, 14])  # the second has no rows
    x = randoms(4, 14, inputs)
    found = product(x, weight, outputs, starts)
    for e in range(experts):
        rows = slice(starts[e], starts[e + 1])
        assert np.array_equal(found[rows], product(x[rows], F32(in_panels(values[e : e + 1])), outputs))


@pytest.mark.parametrize("cut", range(1, 6))
def test_parts_of_a_product_write_their_own_columns(cut: int) -> None:
    """Panels are computed in two calls, behind a column that they must leave alone."""
    weight, _ = pack(randoms(5, 2, 3 * LANES - 1, 40), "bf16")
    x, starts = randoms(6, 7, 40), np.array([0, 3, 7])
    out = np.full((7, 3 * LANES + 1), np.nan, np.float32)
    panels.multiply(x, starts, weight, 3 * LANES - 1, 0, cut, out, 1)
    panels.multiply(x, starts, weight, 3 * LANES - 1, cut, 6, out, 1)
    assert np.array_equal(out[:, 1:-1], product(x, weight, 3 * LANES - 1, starts))
    assert np.isnan(out[:, [0, -1]]).all()


def test_rows_are_laid_out_from_any_output() -> None:
    first, rows = 3, randoms(7, LANES + 5, 130)
    laid = np.zeros((2, 130, LANES), np.float32)
    panels.lay_out(rows, laid, first)
    assert np.array_equal(laid.transpose(0, 2, 1).reshape(-1, 130)[first : first + len(rows)], rows)
    assert not laid.transpose(0, 2, 1).reshape(-1, 130)[:first].any()
