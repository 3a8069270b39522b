"""Clamped SwiGLU: silu(min(gate, limit)) * clamp(up, -limit, limit), [N, 2 I] to [N, I].

The gate is the first half of a row. Sums are not involved, so every element is computed alone, in float32. A NaN passes
through. Source: Shazeer 2020 (arXiv:2002.05202) for SwiGLU; the DeepSeek-V4 reference for the clamps.

Floor: 4 N I bytes read and 2 N I written in bfloat16; 6 N I flops.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import triton
import triton.language as tl
from torch import Tensor

from agentkit_kernels.calls import Call, Make, Shapes, with_dtype
from agentkit_kernels.triton.launch import launch


@triton.jit
def clamped_swiglu(gate, up, limit):
    """Return float32 silu(min(gate, limit)) * clamp(up, -limit, limit) of float32 values."""
    # `tl.minimum` may drop a NaN; a comparison with one is false.
    gate = tl.where(gate > limit, limit, gate)
    up = tl.where(up > limit, limit, up)
    up = tl.where(up < -limit, -limit, up)
    decay = tl.exp(-tl.abs(gate))  # at most 1: no overflow
    return gate * tl.where(gate < 0, decay, 1.0) / (1.0 + decay) * up


@triton.jit
def _swiglu(gate_up, out, stride_n, stride_k, stride_on, limit, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < WIDTH
    gates = gate_up + row * stride_n + columns.to(tl.int64) * stride_k
    ups = gate_up + row * stride_n + (WIDTH + columns).to(tl.int64) * stride_k
    gate = tl.load(gates, mask=inside, other=0.0).to(tl.float32)
    value = clamped_swiglu(gate, tl.load(ups, mask=inside, other=0.0).to(tl.float32), limit)
    tl.store(out + row * stride_on + columns, value.to(out.dtype.element_ty), mask=inside)


def swiglu(gate_up: Tensor, limit: float) -> Tensor:
    """Return the clamped SwiGLU [N, I] of gate_up [N, 2 I], in its dtype.

    Raises:
        ValueError: The number of columns is odd.
    """
    rows, columns = gate_up.shape
    if columns % 2:
        raise ValueError(f"gate and up need an even number of columns, got shape {tuple(gate_up.shape)}")
    width = columns // 2
    out = gate_up.new_empty(rows, width)
    block = min(1024, triton.next_power_of_2(width))
    launch(
        _swiglu,
        (rows, triton.cdiv(width, block)),
        gate_up,
        out,
        gate_up.stride(0),
        gate_up.stride(1),
        out.stride(0),
        float(limit),
        WIDTH=width,
        BLOCK=block,
    )
    return out


def calls(shapes: Shapes, rows: int, make: Make) -> Iterator[Call]:
    """Yield the shared expert's activation."""
    width = shapes.moe_intermediate_size
    for activations in shapes.activations:
        x = make.floats(rows, 2 * width, dtype=activations)
        name = with_dtype("shared expert", activations)
        yield Call(name, partial(swiglu, x, 10.0), 3 * x.nbytes // 2, 6 * rows * width)
