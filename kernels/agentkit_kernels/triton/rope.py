"""Rotary position embedding: interleaved pairs on the last R columns (Su et al. 2021, arXiv:2104.09864).

A pair (a, b) at position t becomes (a cos - b sin, a sin + b cos) of the angle t * frequency. The angle is a float32
product, as in the DeepSeek-V4 reference: its rounding error grows with the position, and every implementation must
make the same one. `tl.cos` and `tl.sin` are those of CUDA's and ROCm's device libraries, which reduce an angle of any
size exactly; the hardware's fast ones would be useless at a million radians.

`rotations` computes all cosines and sines once per forward. Floor per row: 8 bytes read, 4 R written, R / 2 flops.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from agentkit_kernels.calls import Call, Make, Shapes
from agentkit_kernels.triton.launch import launch

_BLOCK = 256


@triton.jit
def turn(position, frequency):
    """Return cosine and sine, float32, of float32(position) * frequency."""
    angle = position.to(tl.float32) * frequency
    return tl.cos(angle), tl.sin(angle)


@triton.jit
def pairs_of(SIZE: tl.constexpr, ROTARY: tl.constexpr, BLOCK: tl.constexpr):
    """Return, for each of the BLOCK / 2 pairs of a row of SIZE columns, its number among the rotary pairs, and whether
    it is one."""
    pair = tl.arange(0, BLOCK // 2) - (SIZE - ROTARY) // 2
    return pair, (pair >= 0) & (pair < ROTARY // 2)


@triton.jit
def rotations_of(rotations_ptr, SIZE: tl.constexpr, ROTARY: tl.constexpr, BLOCK: tl.constexpr):
    """Load the cosine and the sine of each pair of a row, 1 and 0 for pairs that are not rotated."""
    pair, rotary = pairs_of(SIZE, ROTARY, BLOCK)
    cosine = tl.load(rotations_ptr + 2 * pair, mask=rotary, other=1.0)
    return cosine, tl.load(rotations_ptr + 2 * pair + 1, mask=rotary, other=0.0)


@triton.jit
def rotate(x, cosine, sine, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Rotate the pairs of x [ROWS, BLOCK], float32, by cosine and sine [BLOCK / 2]."""
    even, odd = tl.split(tl.reshape(x, (ROWS, BLOCK // 2, 2)))
    cosine, sine = cosine[None, :], sine[None, :]
    return tl.reshape(tl.join(even * cosine - odd * sine, even * sine + odd * cosine), (ROWS, BLOCK))


@triton.jit
def _rotations(positions_ptr, frequencies_ptr, out_ptr, count, PAIRS: tl.constexpr, BLOCK: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    position = tl.load(positions_ptr + place // PAIRS, mask=place < count, other=0)
    cosine, sine = turn(position, tl.load(frequencies_ptr + place % PAIRS, mask=place < count, other=0.0))
    tl.store(out_ptr + 2 * place, cosine, mask=place < count)
    tl.store(out_ptr + 2 * place + 1, sine, mask=place < count)


def rotations(positions_N: Tensor, frequencies: Tensor) -> Tensor:
    """Return cosine and sine of every pair's angle, interleaved: float32 [N, R].

    Args:
        positions_N: int64, at least 0.
        frequencies: Radians per position, float32 [R / 2].
    """
    pairs = len(frequencies)
    out = torch.empty(len(positions_N), 2 * pairs, dtype=torch.float32, device=positions_N.device)
    count = len(positions_N) * pairs
    launch(
        _rotations, (-(-count // _BLOCK),), positions_N, frequencies, out, count, PAIRS=pairs, BLOCK=_BLOCK
    )  # fmt: skip
    return out


def calls(shapes: Shapes, rows: int, make: Make) -> Iterator[Call]:
    """Yield the rotations of a forward."""
    pairs = shapes.qk_rope_head_dim // 2
    positions, frequencies = make.ints(range(rows)), make.floats(pairs, dtype=torch.float32)
    moved = positions.nbytes + frequencies.nbytes + rows * pairs * 8
    yield Call("rotations", partial(rotations, positions, frequencies), moved, rows * pairs)
