"""x · weightᵀ for dense and packed weights: [N, K] times [X, K] is [N, X].

Weights are bfloat16 or float32 tensors, or `Packed` (`agentkit_kernels.packed`): FP8 in 128 x 128 blocks, int8 with a
scale per row, MXFP4 with a scale per 32 columns. A packed weight is decoded tile by tile in registers; no dequantised
copy exists. Products of bfloat16 rows run on tensor cores with float32 sums, since every E4M3, E2M1 and int8 code is
exact in bfloat16, as is an E2M1 code times its power of two. FP8 scales multiply the sum over a block's 128 columns,
and int8 scales the whole sum. Float32 rows or weights are multiplied in float32: NVIDIA's tensor cores would round them
to TF32, so these products do not use them, and take shorter steps.

Floor: the weight's bytes (X K for bfloat16 twice, FP8 and int8 once, MXFP4 17/32), 2 N K bytes of rows, 2 N X bytes of
results; 2 N X K flops. Few rows are bound by the weight's bytes: one row of V4-Flash's `wq_b` (32768 x 1024 in FP8)
needs 33.6 MB.

**Exactness.** K is cut into a fixed number of splits, a function of the weight's shape. A split is summed in steps of
BLOCK_K, and splits are added in order. For few rows each split has a program of its own, so that a wide GPU reads the
weight with all its multiprocessors, and a second kernel adds the splits. For many rows one program adds them as it
goes. Both do the same arithmetic on the same tile, so a row's bits do not depend on the number of rows. (A compiler may
fuse a product into the sum that follows, so nothing multiplies a split between its last step and the addition.)
`exact=False` takes a larger tile without splits for many rows in bfloat16. It decodes each weight once per 128 rows
instead of once per 32, and its sums group otherwise.

The weight is the left operand: its rows fill the 64-row side of a tensor core's tile, so few rows of x waste little.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from agentkit_kernels.calls import Call, Make, Shapes, with_dtype
from agentkit_kernels.packed import FP8_BLOCK, MXFP4_GROUP, Packed
from agentkit_kernels.triton.formats import e4m3_to_float, mxfp4_to_float, scale_to_float
from agentkit_kernels.triton.launch import INTERPRET, launch


class Tile(NamedTuple):
    """Sizes of one program's step: rows of x, outputs and inputs of the weight."""

    rows: int
    outputs: int
    inputs: int
    warps: int
    stages: int


EXACT_TILE = Tile(32, 64, 128, 4, 4)
LARGE_TILE = Tile(128, 128, 64, 8, 4)
FLOAT_INPUTS = 16
"""Inputs of one step with float32 operands: without tensor cores, a thread holds its part of a step in registers."""
FEW_ROWS = 64
"""Up to this many rows, each split of K has a program of its own."""
PROGRAMS = 256
"""Programs wanted for one row: about two for each multiprocessor of a large GPU."""


@triton.jit
def accumulate(
    total,
    x,
    weight,
    scale,
    column,
    k,
    X: tl.constexpr,
    K: tl.constexpr,
    FORMAT: tl.constexpr,
    BLOCK_X: tl.constexpr,
    BLOCK_K: tl.constexpr,
    OPERAND: tl.constexpr,
):
    """Return total [BLOCK_X, BLOCK_N] plus the product of one weight tile and x [BLOCK_K, BLOCK_N].

    `weight` [X, K] and `scale` are contiguous; the tile begins at row `column` and at column `k`. `OPERAND` is the type
    of the operands. Scales of int8 are left to the caller.
    """
    columns = column + tl.arange(0, BLOCK_X)
    inside_x = (columns < X)[:, None]
    if FORMAT == "mxfp4":
        words = k // 8 + tl.arange(0, BLOCK_K // 8)
        groups = k // 32 + tl.arange(0, BLOCK_K // 32)
        inside = inside_x
        inside_scale = inside_x
        if K % BLOCK_K != 0:
            inside = inside_x & (words < K // 8)[None, :]
            inside_scale = inside_x & (groups < K // 32)[None, :]
        codes = tl.load(weight + columns.to(tl.int64)[:, None] * (K // 8) + words[None, :], mask=inside, other=0)
        scales = tl.load(scale + columns.to(tl.int64)[:, None] * (K // 32) + groups[None, :], inside_scale, other=0)
        tile = mxfp4_to_float(codes, scales, BLOCK_X, BLOCK_K // 8)
        return tl.dot(tile.to(OPERAND), x, total, input_precision="ieee")
    ks = k + tl.arange(0, BLOCK_K)
    inside = inside_x
    if K % BLOCK_K != 0:
        inside = inside_x & (ks < K)[None, :]
    tile = tl.load(weight + columns.to(tl.int64)[:, None] * K + ks[None, :], mask=inside, other=0.0)
    if FORMAT == "fp8":
        if tile.dtype == tl.uint8:
            tile = e4m3_to_float(tile)
        block = scale_to_float(tl.load(scale + (column // 128) * ((K + 127) // 128) + k // 128))
        return total + tl.dot(tile.to(OPERAND), x, input_precision="ieee") * block
    return tl.dot(tile.to(OPERAND), x, total, input_precision="ieee")


@triton.jit
def _linear(
    x,
    weight,
    scale,
    out,
    rows,
    stride_xg,
    stride_xn,
    stride_xk,
    stride_wg,
    stride_sg,
    stride_og,
    stride_on,
    stride_os,
    X: tl.constexpr,
    K: tl.constexpr,
    FORMAT: tl.constexpr,
    SPLITS: tl.constexpr,
    SPLIT_K: tl.constexpr,
    TOGETHER: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_X: tl.constexpr,
    BLOCK_K: tl.constexpr,
    OPERAND: tl.constexpr,
):
    """One tile [BLOCK_X, BLOCK_N] of a group's result, transposed: all splits if TOGETHER, else one of them."""
    # Programs that run at the same time share weight tiles and rows of x in the cache.
    tile_n, tile_x = tl.swizzle2d(tl.program_id(0), tl.program_id(1), tl.num_programs(0), tl.num_programs(1), 8)
    group = tl.program_id(2).to(tl.int64)
    first = 0
    if not TOGETHER:
        first = (group % SPLITS).to(tl.int32)
        out += first.to(tl.int64) * stride_os
        group = group // SPLITS
    x += group * stride_xg
    weight += group * stride_wg
    scale += group * stride_sg

    column = tile_x * BLOCK_X
    ns = tile_n.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside_n = ns < rows
    x_rows = x + ns[None, :] * stride_xn
    total = tl.zeros((BLOCK_X, BLOCK_N), tl.float32)
    for split in range(first, first + (SPLITS if TOGETHER else 1)):
        part = tl.zeros((BLOCK_X, BLOCK_N), tl.float32)
        for k in range(split * SPLIT_K, min(split * SPLIT_K + SPLIT_K, K), BLOCK_K):
            ks = k + tl.arange(0, BLOCK_K)
            inside = inside_n[None, :]
            if K % BLOCK_K != 0:
                inside = inside & (ks < K)[:, None]
            values = tl.load(x_rows + ks.to(tl.int64)[:, None] * stride_xk, mask=inside, other=0.0).to(OPERAND)
            part = accumulate(part, values, weight, scale, column, k, X, K, FORMAT, BLOCK_X, BLOCK_K, OPERAND)
        total += part

    columns = column + tl.arange(0, BLOCK_X)
    if TOGETHER and FORMAT == "int8":
        total *= scale_to_float(tl.load(scale + columns, mask=columns < X, other=0))[:, None]
    inside = (columns < X)[:, None] & inside_n[None, :]
    outs = out + group * stride_og + ns[None, :] * stride_on + columns[:, None]
    tl.store(outs, total.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _add_splits(
    parts,
    scale,
    out,
    stride_ps,
    stride_pg,
    stride_pn,
    stride_sg,
    stride_og,
    stride_on,
    X: tl.constexpr,
    FORMAT: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Add the splits of one row in order, as `_linear` does when it computes them together."""
    row = tl.program_id(0).to(tl.int64)
    group = tl.program_id(2).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < X
    part = parts + group * stride_pg + row * stride_pn + columns
    total = tl.zeros((BLOCK,), tl.float32)
    for _ in tl.static_range(SPLITS):
        total += tl.load(part, mask=inside, other=0.0)
        part += stride_ps
    if FORMAT == "int8":
        total *= scale_to_float(tl.load(scale + group * stride_sg + columns, mask=inside, other=0))
    tl.store(out + group * stride_og + row * stride_on + columns, total.to(out.dtype.element_ty), mask=inside)


@dataclass(frozen=True, slots=True)
class Operand:
    """A weight [G, X, K] as kernels read it."""

    format: str
    data: Tensor
    scale: Tensor
    groups: int
    outputs: int
    inputs: int

    @property
    def strides(self) -> tuple[int, int]:
        """Elements from one group's data to the next, and from its scales to the next's."""
        return self.data.stride(0), self.scale.stride(0)

    def like(self, other: Operand) -> bool:
        """True if a kernel reads both with the same code."""
        return (self.format, self.data.dtype, self.scale.dtype, self.strides) == (
            other.format,
            other.data.dtype,
            other.scale.dtype,
            other.strides,
        )

    def narrow(self, x: Tensor) -> bool:
        """True if rows and weight are exact in bfloat16."""
        return x.dtype == torch.bfloat16 and self.data.dtype != torch.float32

    def type(self, x: Tensor) -> Any:
        """The type of the product's operands: bfloat16 where both sides are exact in it, else float32."""
        return tl.bfloat16 if self.narrow(x) and not INTERPRET else tl.float32

    def fit(self, tile: Tile, x: Tensor) -> Tile:
        """Return the tile with as many inputs as registers can hold; a step over MXFP4 has a group at least."""
        if self.narrow(x):
            return tile
        return tile._replace(inputs=MXFP4_GROUP if self.format == "mxfp4" else FLOAT_INPUTS)


def operand(weight: Tensor | Packed) -> Operand:
    """Return a weight [X, K] or [G, X, K] as kernels read it, without copying.

    Raises:
        ValueError: Its rows are not contiguous.
    """
    data, scale, number_format = (
        (weight, weight, "dense")
        if isinstance(weight, Tensor)
        else (
            weight.data,
            weight.scale,
            weight.format,
        )
    )
    outputs, inputs = weight.shape[-2:]
    lead = weight.shape[:-2]
    if not (data[(0,) * len(lead)].is_contiguous() and scale[(0,) * len(lead)].is_contiguous()):
        raise ValueError("kernels read weights whose matrices are contiguous; call .contiguous() when loading")
    if number_format == "mxfp4":
        data = data.view(torch.int32)
    if number_format == "fp8" and capability() < 89:  # other targets do not convert E4M3 themselves
        data = data.view(torch.uint8)
    if scale.dtype == torch.float8_e8m0fnu:
        scale = scale.view(torch.uint8)
    if not lead:
        data, scale = data[None], scale[None]
    return Operand(number_format, data, scale, data.shape[0], outputs, inputs)


def capability() -> int:
    """Return ten times the compute capability of the current NVIDIA target; 0 for another one, and in the
    interpreter."""
    target = None if INTERPRET else triton.runtime.driver.active.get_current_target()
    return int(target.arch) if target and target.backend == "cuda" else 0


def stages(tile: Tile) -> int:
    """Return the loads that a loop keeps in flight; AMD parts hold them in 64 KiB of shared memory or registers."""
    return tile.stages if capability() else min(tile.stages, 2)


def split_size(outputs: int, inputs: int, groups: int = 1) -> int:
    """Return the columns of one split of K: few enough to occupy a large GPU with one row, but 512 at least, so that
    the loads of a split are in flight together."""
    programs = groups * triton.cdiv(outputs, EXACT_TILE.outputs)
    wanted = triton.cdiv(PROGRAMS, programs)
    steps: int = max(EXACT_TILE.stages, triton.cdiv(inputs, wanted * EXACT_TILE.inputs))
    return steps * EXACT_TILE.inputs


def linear(x: Tensor, weight: Tensor | Packed, *, out: Tensor | None = None, exact: bool = True) -> Tensor:
    """Return x · weightᵀ.

    Args:
        x: [N, K], of any float dtype and strides.
        weight: [X, K].
        out: [N, X] whose rows are contiguous, to write to; by default a new tensor of x's dtype.
        exact: Whether a row's bits may not depend on the number of rows.

    Raises:
        ValueError: Shapes disagree, or the weight or the output is not contiguous along its rows.
    """
    if out is None:
        out = x.new_empty(x.shape[0], weight.shape[-2])
    _multiply(x[:, None], operand(weight), out[:, None], exact)
    return out


def grouped_linear(x: Tensor, weight: Tensor | Packed, *, exact: bool = True) -> Tensor:
    """Multiply each of G equal parts of a row by a matrix of its own.

    Args:
        x: [N, G, K], or [N, ...] with G * K values per row.
        weight: [G, O, K].
        exact: As in `linear`.

    Returns:
        [N, G * O], of x's dtype.

    Raises:
        ValueError: As in `linear`.
    """
    w = operand(weight)
    out = x.new_empty(x.shape[0], w.groups, w.outputs)
    _multiply(x.reshape(x.shape[0], w.groups, w.inputs), w, out, exact)
    return out.flatten(1)


def _multiply(x_NGK: Tensor, w: Operand, out_NGX: Tensor, exact: bool) -> None:
    rows = x_NGK.shape[0]
    if x_NGK.shape != (rows, w.groups, w.inputs) or out_NGX.shape != (rows, w.groups, w.outputs):
        raise ValueError(
            f"cannot multiply rows {tuple(x_NGK.shape)} by a weight {(w.groups, w.outputs, w.inputs)} into "
            f"{tuple(out_NGX.shape)}"
        )
    if out_NGX.stride(2) != 1:
        raise ValueError(f"the output's rows must be contiguous, got strides {out_NGX.stride()}")
    tile = EXACT_TILE
    size = split_size(w.outputs, w.inputs, w.groups)
    if not exact and rows > FEW_ROWS and w.narrow(x_NGK):
        tile, size = LARGE_TILE, triton.cdiv(w.inputs, LARGE_TILE.inputs) * LARGE_TILE.inputs
    tile, number = w.fit(tile, x_NGK), triton.cdiv(w.inputs, size)
    together = number == 1 or rows > FEW_ROWS
    target, stride_split = out_NGX, 0
    if not together:
        target = x_NGK.new_empty(number, rows, w.groups, w.outputs, dtype=torch.float32)
        stride_split, target = target.stride(0), target[0]
    launch(
        _linear,
        (
            triton.cdiv(rows, tile.rows),
            triton.cdiv(w.outputs, tile.outputs),
            w.groups * (1 if together else number),
        ),
        x_NGK,
        w.data,
        w.scale,
        target,
        rows,
        x_NGK.stride(1),
        x_NGK.stride(0),
        x_NGK.stride(2),
        *w.strides,
        target.stride(1),
        target.stride(0),
        stride_split,
        X=w.outputs,
        K=w.inputs,
        FORMAT=w.format,
        SPLITS=number,
        SPLIT_K=size,
        TOGETHER=together,
        BLOCK_N=tile.rows,
        BLOCK_X=tile.outputs,
        BLOCK_K=tile.inputs,
        OPERAND=w.type(x_NGK),
        num_warps=tile.warps,
        num_stages=stages(tile),
    )
    if not together:
        launch(
            _add_splits,
            (rows, triton.cdiv(w.outputs, 1024), w.groups),
            target,
            w.scale,
            out_NGX,
            stride_split,
            target.stride(1),
            target.stride(0),
            w.strides[1],
            out_NGX.stride(1),
            out_NGX.stride(0),
            X=w.outputs,
            FORMAT=w.format,
            SPLITS=number,
            BLOCK=1024,
        )


def calls(shapes: Shapes, rows: int, make: Make) -> Iterator[Call]:
    """Yield the products of an attention layer in every format, and those whose results are float32."""
    hidden, latent = shapes.hidden_size, shapes.q_lora_rank
    queries = shapes.num_attention_heads * shapes.head_dim
    group = queries // shapes.o_groups
    stacks: list[tuple[str, tuple[int, ...]]] = [
        ("latent", (latent, hidden)),
        ("query", (queries, latent)),
        ("grouped output", (shapes.o_groups, shapes.o_lora_rank, group)),
        ("output", (hidden, shapes.o_groups * shapes.o_lora_rank)),
        ("gate", (shapes.n_routed_experts, hidden)),
        ("head", (shapes.vocab_size, hidden)),
    ]
    formats = ("bfloat16", "float32", "fp8", "int8", "mxfp4")
    for number_format, activations, (name, shape) in product(formats, shapes.activations, stacks):
        logits = name in ("gate", "head")
        if logits and number_format not in ("bfloat16", "float32"):
            continue  # checkpoints do not pack them
        weight = random_weight(number_format, shape, make)
        groups, outputs, inputs = 1 if len(shape) == 2 else shape[0], shape[-2], shape[-1]
        x = make.floats(rows, groups * inputs, dtype=activations)
        out = make.floats(rows, groups * outputs, dtype=torch.float32 if logits else activations)
        multiply = partial(linear, x, weight, out=out) if groups == 1 else partial(grouped_linear, x, weight)
        for exact in (True, False) if rows > FEW_ROWS and operand(weight).narrow(x) else (True,):
            yield Call(
                with_dtype(f"{name}, {number_format}{'' if exact else ', inexact'}", activations),
                partial(multiply, exact=exact),
                weight.nbytes + x.nbytes + out.nbytes,
                2 * rows * groups * outputs * inputs,
                tensor_cores=True,
            )


def random_weight(number_format: str, shape: tuple[int, ...], make: Make) -> Tensor | Packed:
    """Return a weight of random codes, for `calls`."""
    *lead, outputs, inputs = shape
    scale = torch.float8_e8m0fnu
    if number_format == "fp8":
        blocks = (triton.cdiv(outputs, FP8_BLOCK), triton.cdiv(inputs, FP8_BLOCK))
        data = make.floats(*shape, dtype=torch.float8_e4m3fn)
        return Packed("fp8", data, make.floats(*lead, *blocks, dtype=scale), shape)
    if number_format == "mxfp4":
        data = make.floats(*lead, outputs, inputs // 2, dtype=torch.uint8)
        return Packed("mxfp4", data, make.floats(*lead, outputs, inputs // MXFP4_GROUP, dtype=scale), shape)
    if number_format == "int8":
        data = make.floats(*shape, dtype=torch.int8)
        return Packed("int8", data, make.floats(*lead, outputs, dtype=torch.float32), shape)
    return make.floats(*shape, dtype=torch.float32 if number_format == "float32" else torch.bfloat16)
