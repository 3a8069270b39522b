"""The residual streams between two sub-layers, mHC (Xie et al. 2025, arXiv:2512.24880; the DeepSeek-V4 reference).

M streams of D values per row. A sub-layer's output y is written to all of them, and the next sub-layer's input is read:

    X'_k = post_k * y + sum_j comb[j, k] * X_j                     write
    mix  = fn · X' / rms(X')                                       X' as one vector of M * D values
    pre  = sigmoid(mix_pre * scale_0 + base_pre) + eps
    post = 2 * sigmoid(mix_post * scale_1 + base_post)
    comb = sinkhorn(mix_comb * scale_2 + base_comb)                an M x M matrix, nearly doubly stochastic
    x    = RMSNorm(sum_j pre_j * X'_j)                             read

`fn` has (2 + M) * M = 24 outputs for 16,384 inputs at V4-Flash. Each output needs the whole row before anything can be
read, so a boundary takes two kernels:

1. `_write_and_mix` takes 16 rows and a slab of columns of all streams. It writes the new streams, and the slab's part
   of the 24 products and of the sum of squares. One row alone is spread over 32 programs.
2. `_read` takes one row, sums the parts in a fixed order, and reads the streams again, from the L2 cache if they fit.

The slabs depend on D alone, so a row has the same bits in every batch, and with streams written by `hc_post`.

Floor: the streams read and written once, y, x and `fn`: 128 KiB of bfloat16 streams and 16 KiB of y and x per two rows
at V4-Flash, 1.5 MiB of `fn`. The second reading and the parts (4 KiB written and read per row) come on top. 0.9 MFLOP
per row; the products are float32, on tensor cores as three TF32 products on NVIDIA, as they are on AMD.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from agentkit_kernels.calls import Call, Make, Shapes, with_dtype
from agentkit_kernels.ops import HyperConnection, HyperHead
from agentkit_kernels.triton.launch import INTERPRET, launch

_ROWS = 16
"""Rows of a tile, the least of a tensor core."""
_SLAB = 128
"""Columns of each stream that a program takes."""
_TILE, _MIX_TILE = 64, 32
"""Columns of each stream that it takes at once; with products, more would not fit in the registers."""


@triton.jit
def _write_and_mix(
    streams_ptr, y_ptr, mixing_ptr, out_ptr, fn_ptr, parts_ptr, rows, stride_y,
    M: tl.constexpr, D: tl.constexpr, OUTPUTS: tl.constexpr, PADDED: tl.constexpr, SLABS: tl.constexpr,
    ROWS: tl.constexpr, SLAB: tl.constexpr, TILE: tl.constexpr, WRITE: tl.constexpr, MIX: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Write one slab of ROWS rows' new streams, and its part of their products with `fn` and of their squares."""
    row = tl.program_id(1).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    output = tl.arange(0, PADDED)
    products = tl.zeros([ROWS, PADDED], tl.float32)
    squares = tl.zeros([ROWS, TILE], tl.float32)
    weights = ()
    if WRITE:
        for i in tl.static_range(M + M * M):
            weight = tl.load(mixing_ptr + row * (M + M * M) + i, mask=row < rows, other=0.0)
            weights = weights + (weight[:, None],)  # type: ignore[assignment]  # noqa: RUF005
    for start in range(0, SLAB, TILE):
        column = tl.program_id(0) * SLAB + start + tl.arange(0, TILE)
        inside = (row[:, None] < rows) & (column[None, :] < D)
        place = row[:, None] * (M * D) + column[None, :]
        streams = ()
        for j in tl.static_range(M):
            stream = tl.load(streams_ptr + place + j * D, mask=inside, other=0.0).to(tl.float32)
            streams = streams + (stream,)  # type: ignore[assignment]  # noqa: RUF005
        if WRITE:
            y = tl.load(y_ptr + row[:, None] * stride_y + column[None, :], mask=inside, other=0.0).to(tl.float32)
        for k in tl.static_range(M):
            stream = streams[k]
            if WRITE:
                stream = weights[k] * y
                for j in tl.static_range(M):
                    stream += weights[M + j * M + k] * streams[j]
                rounded = stream.to(out_ptr.dtype.element_ty)
                tl.store(out_ptr + place + k * D, rounded, mask=inside)
                stream = rounded.to(tl.float32)
            if MIX:
                fn_place = output[None, :] * (M * D) + k * D + column[:, None]
                fn_inside = (output[None, :] < OUTPUTS) & (column[:, None] < D)
                fn = tl.load(fn_ptr + fn_place, mask=fn_inside, other=0.0).to(tl.float32)
                products = tl.dot(stream, fn, products, input_precision=PRECISION)
                squares += stream * stream
    if MIX:
        parts = tl.where(output[None, :] == OUTPUTS, tl.sum(squares, axis=1)[:, None], products)
        parts_place = (row[:, None] * SLABS + tl.program_id(0)) * PADDED + output[None, :]
        tl.store(parts_ptr + parts_place, parts, mask=(row[:, None] < rows) & (output[None, :] <= OUTPUTS))


@triton.jit
def _total(parts_ptr, SLABS: tl.constexpr, SLABS_PADDED: tl.constexpr, PADDED: tl.constexpr):
    """Sum the slabs' parts of one output, a scalar."""
    slab = tl.arange(0, SLABS_PADDED)
    return tl.sum(tl.load(parts_ptr + slab * PADDED, mask=slab < SLABS, other=0.0), axis=0)


@triton.jit
def _read(
    streams_ptr, parts_ptr, base_ptr, scale_ptr, norm_ptr, x_ptr, mixing_ptr, norm_eps, eps,
    M: tl.constexpr, D: tl.constexpr, OUTPUTS: tl.constexpr, PADDED: tl.constexpr, SLABS: tl.constexpr,
    SLABS_PADDED: tl.constexpr, BLOCK: tl.constexpr, ITERATIONS: tl.constexpr,
):  # fmt: skip
    """Sum one row's parts, read its streams, and, if there are ITERATIONS, compute the weights of the next write."""
    row = tl.program_id(0).to(tl.int64)
    parts_ptr += row * (SLABS * PADDED)
    squares = _total(parts_ptr + OUTPUTS, SLABS, SLABS_PADDED, PADDED)
    inverse_rms = tl.rsqrt(squares / (M * D) + norm_eps)

    column = tl.arange(0, BLOCK)
    x = tl.zeros([BLOCK], tl.float32)
    for j in tl.static_range(M):
        logit = _total(parts_ptr + j, SLABS, SLABS_PADDED, PADDED) * inverse_rms * tl.load(scale_ptr)
        pre = tl.sigmoid(logit + tl.load(base_ptr + j)) + eps
        stream = tl.load(streams_ptr + (row * M + j) * D + column, mask=column < D, other=0.0)
        x += pre * stream.to(tl.float32)
    norm = tl.load(norm_ptr + column, mask=column < D, other=0.0).to(tl.float32)
    x = x * tl.rsqrt(tl.sum(x * x, axis=0) / D + norm_eps) * norm
    tl.store(x_ptr + row * D + column, x, mask=column < D)

    if ITERATIONS > 0:
        mixing_ptr += row * (M + M * M)
        slab = tl.arange(0, SLABS_PADDED)
        m = tl.arange(0, M)
        inside = slab[:, None] < SLABS
        post = tl.load(parts_ptr + slab[:, None] * PADDED + M + m[None, :], mask=inside, other=0.0)
        post = tl.sum(post, axis=0) * inverse_rms * tl.load(scale_ptr + 1) + tl.load(base_ptr + M + m)
        tl.store(mixing_ptr + m, 2.0 * tl.sigmoid(post))

        entry = 2 * M + m[:, None] * M + m[None, :]
        comb = tl.load(parts_ptr + slab[:, None, None] * PADDED + entry[None], mask=inside[:, :, None], other=0.0)
        comb = tl.sum(comb, axis=0) * inverse_rms * tl.load(scale_ptr + 2) + tl.load(base_ptr + entry)
        comb = tl.exp(comb - tl.max(comb, axis=1)[:, None])
        comb = comb / tl.sum(comb, axis=1)[:, None] + eps
        comb = comb / (tl.sum(comb, axis=0)[None, :] + eps)
        for _ in range(ITERATIONS - 1):
            comb = comb / (tl.sum(comb, axis=1)[:, None] + eps)
            comb = comb / (tl.sum(comb, axis=0)[None, :] + eps)
        tl.store(mixing_ptr + M + m[:, None] * M + m[None, :], comb)


def hc_pre(streams: Tensor, hc: HyperConnection, *, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return a sub-layer's normed input, and the weights for writing its output back.

    Args:
        streams: [N, M, D], contiguous, any float dtype; M is a power of two.
        hc: Its `fn` is a contiguous tensor [(2 + M) * M, M * D].
        dtype: Of the input.

    Returns:
        The input [N, D], and post (M values) and comb (M x M, row-major) of each row, float32 [N, M + M * M].
    """
    _, parts = _mix(streams, None, None, hc.fn)
    return _input(streams, parts, hc, dtype, hc.iterations)


def hc_post(streams: Tensor, y: Tensor, mixing: Tensor) -> Tensor:
    """Return the streams [N, M, D] after writing y [N, D] with the weights of `hc_pre`."""
    return _mix(streams, y, mixing, None)[0]


def hc_post_pre(
    streams: Tensor, y: Tensor, mixing: Tensor, hc: HyperConnection, *, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the new streams, and the input and the weights of the next sub-layer: `hc_post`, then `hc_pre`."""
    streams, parts = _mix(streams, y, mixing, hc.fn)
    return streams, *_input(streams, parts, hc, dtype, hc.iterations)


def hc_head(streams: Tensor, head: HyperHead, *, dtype: torch.dtype) -> Tensor:
    """Return the normed input of the head [N, D]; `head.fn` is a contiguous tensor [M, M * D]."""
    _, parts = _mix(streams, None, None, head.fn)
    return _input(streams, parts, head, dtype, 0)[0]


def _mix(streams: Tensor, y: Tensor | None, mixing: Tensor | None, fn: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the new streams (the same ones without `y`), and the parts of their products with `fn`: float32 [N, slabs,
    outputs, then the squares, then padding]."""
    rows, size, dim = streams.shape
    outputs = 0 if fn is None else fn.shape[0]
    slab = min(_SLAB, max(16, triton.next_power_of_2(dim)))
    slabs, padded = -(-dim // slab), max(16, triton.next_power_of_2(outputs + 1))
    out = streams if y is None else torch.empty_like(streams)
    parts = streams.new_empty((rows, slabs, padded) if outputs else (0,), dtype=torch.float32)
    tile = min(slab, _TILE if fn is None else _MIX_TILE)
    launch(
        _write_and_mix, (slabs, -(-rows // _ROWS)), streams, y, mixing, out, fn, parts, rows,
        0 if y is None else y.stride(0), M=size, D=dim, OUTPUTS=outputs, PADDED=padded, SLABS=slabs, ROWS=_ROWS,
        SLAB=slab, TILE=tile, WRITE=y is not None, MIX=fn is not None, PRECISION=_precision(),
        num_warps=2 if y is None else 4, num_stages=2,
    )  # fmt: skip
    return out, parts


def _input(
    streams: Tensor, parts: Tensor, hc: HyperConnection | HyperHead, dtype: torch.dtype, iterations: int
) -> tuple[Tensor, Tensor]:
    rows, size, dim = streams.shape
    x = torch.empty(rows, dim, dtype=dtype, device=streams.device)
    mixing = torch.empty(rows, size + size * size, dtype=torch.float32, device=streams.device)
    block, slabs = triton.next_power_of_2(dim), parts.shape[1]
    launch(
        _read, (rows,), streams, parts, hc.base, hc.scale, hc.norm, x, mixing, hc.norm_eps, hc.eps, M=size, D=dim,
        OUTPUTS=hc.fn.shape[0], PADDED=parts.shape[2], SLABS=slabs, SLABS_PADDED=triton.next_power_of_2(slabs),
        BLOCK=block, ITERATIONS=iterations, num_warps=8 if block > 1024 else 4,
    )  # fmt: skip
    return x, mixing


def _precision() -> str:
    """Three TF32 products are as precise as one float32 product, which NVIDIA's tensor cores do not have."""
    if INTERPRET or triton.runtime.driver.active.get_current_target().backend != "cuda":
        return "ieee"
    return "tf32x3"


def calls(shapes: Shapes, rows: int, make: Make) -> Iterator[Call]:
    """Yield every configuration; see `agentkit_kernels.calls`."""
    size, dim = shapes.hc_mult, shapes.hidden_size
    outputs, weights = (2 + size) * size, size + size * size
    vector = partial(make.floats, dtype=torch.float32)
    fn, base, scale, norm = vector(outputs, size * dim), vector(outputs), vector(3), vector(dim)
    hc = HyperConnection(fn, base, scale, norm, 1e-6, 1e-6, shapes.hc_sinkhorn_iters)
    head_fn, head_base, head_scale = vector(size, size * dim), vector(size), vector(1)
    head = HyperHead(head_fn, head_base, head_scale, norm, 1e-6, 1e-6)
    mixing = vector(rows, weights)
    for dtype in shapes.activations:
        streams, y = make.floats(rows, size, dim, dtype=dtype), make.floats(rows, dim, dtype=dtype)
        name = partial(with_dtype, dtype=dtype)
        row, vectors = dim * y.itemsize, 4 * (outputs + 3 + dim)
        write, mix = 2 * dim * size * (size + 1), 2 * dim * size * (outputs + 2)
        pre = fn.nbytes + vectors + rows * (row + 4 * weights)
        post = rows * (row + 4 * weights) + 2 * streams.nbytes
        read = partial(hc_pre, streams, hc, dtype=dtype)
        yield Call(name("hc_pre"), read, streams.nbytes + pre, rows * mix, True)
        yield Call(name("hc_post"), partial(hc_post, streams, y, mixing), post, rows * write)
        run = partial(hc_post_pre, streams, y, mixing, hc, dtype=dtype)
        yield Call(name("hc_post_pre"), run, post + pre, rows * (write + mix), True)
        moved = streams.nbytes + head_fn.nbytes + 4 * (size + 1 + dim) + rows * row
        flops = rows * 2 * dim * size * (size + 2)
        yield Call(name("hc_head"), partial(hc_head, streams, head, dtype=dtype), moved, flops, True)
