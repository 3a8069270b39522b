"""RMSNorm (Zhang and Sennrich 2019, arXiv:1910.07467): y = weight * x / sqrt(mean(x^2) + eps).

One program per row, computed in float32 and rounded once. Floor: the row read and written once, 4 bytes per bfloat16
value; 4 flops per value.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from itertools import product

import torch
import triton
import triton.language as tl
from torch import Tensor

from agentkit_kernels.calls import Call, Make, Shapes, with_dtype
from agentkit_kernels.triton.launch import launch


@triton.jit
def _rms_norm(x_ptr, weight_ptr, out_ptr, stride_x, eps, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + row * stride_x + column, mask=column < SIZE, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + column, mask=column < SIZE, other=0.0).to(tl.float32)
    y = x * tl.rsqrt(tl.sum(x * x, axis=0) / SIZE + eps) * weight
    tl.store(out_ptr + row * SIZE + column, y, mask=column < SIZE)


def rms_norm(x: Tensor, weight_K: Tensor, eps: float) -> Tensor:
    """Norm the first K columns of the rows x [..., X], whose last dimension is contiguous: [..., K]."""
    rows, size = x.reshape(-1, x.shape[-1]), len(weight_K)
    out = torch.empty(*x.shape[:-1], size, dtype=x.dtype, device=x.device)
    block = triton.next_power_of_2(size)
    launch(
        _rms_norm, (len(rows),), rows, weight_K, out, rows.stride(0), eps, SIZE=size, BLOCK=block,
        num_warps=min(8, max(1, block // 512)),
    )  # fmt: skip
    return out


def calls(shapes: Shapes, rows: int, make: Make) -> Iterator[Call]:
    """Yield the norm of the query latent, a view of a wider row, and of whole rows."""
    sizes = (("query latent", shapes.q_lora_rank), ("hidden", shapes.hidden_size))
    for (name, size), activations in product(sizes, shapes.activations):
        wide = make.floats(rows, size + shapes.head_dim, dtype=activations)
        weight = make.floats(size, dtype=torch.float32)
        moved = rows * 2 * size * wide.itemsize + weight.nbytes
        yield Call(with_dtype(name, activations), partial(rms_norm, wide, weight, 1e-6), moved, rows * 4 * size)
