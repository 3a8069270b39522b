"""Memory layout of a CPU's weights.

float32 and bfloat16 weights lie inputs first, [K, X], so that a model's parameters can be views of them
(`agentkit_kernels.packing`). Packed weights lie in panels of outputs; see `panels.py`.

Dimension key: K inputs, X outputs, E experts, P panels, L lanes, G scale groups.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate, groupby
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from agentkit_kernels.cpu import loops, panels
from agentkit_kernels.cpu.loops import Floats, Weights
from agentkit_kernels.cpu.panels import LANES, Panels
from agentkit_kernels.cpu.workers import Workers
from agentkit_kernels.packed import FP8_BLOCK, MOST_EXPONENT, Packed, PackedRows

FEW = 6
"""Row count up to which `loops.multiply` reads large unpacked weights faster than `panels.multiply`; small ones: 1."""
LARGE = 1 << 19
"""Elements of a weight that is too large for the second-level cache."""
PIECE = 1 << 20
"""Bytes of codes that are read and laid out as one piece of work."""
_KINDS = {"fp8": panels.FP8, "mxfp4": panels.FP4, "int8": panels.Int8}


@dataclass(frozen=True, slots=True, eq=False)
class Matrix:
    """Weights [X, K] of one format.

    Attributes:
        unpacked: The same weights inputs first, [K, X]; None if they are packed.
        count: Number of panels.
        few: Row count up to which `loops.multiply` reads them faster than `panels.multiply`; 0 if they are packed.
    """

    inputs: int
    outputs: int
    panels: Panels
    unpacked: Weights | None = None
    count: int = field(init=False)
    few: int = field(init=False)

    def __post_init__(self) -> None:
        few = FEW if self.inputs * self.outputs > LARGE else 1
        object.__setattr__(self, "count", -(-self.outputs // LANES))
        object.__setattr__(self, "few", 0 if self.unpacked is None else few)

    @property
    def nbytes(self) -> int:
        """Bytes of codes and scales."""
        return sum(array.nbytes for array in self.panels)

    def multiply(self, x_NK: Floats, first: int, last: int, out_NX: Floats, column: int) -> None:
        """Compute the outputs of the panels `first` to `last`; `column` takes output 0."""
        if self.unpacked is not None and len(x_NK) <= self.few:
            end = min(last * LANES, self.outputs)
            loops.multiply(x_NK, self.unpacked, first * LANES, end, out_NX, column)
        else:
            panels.multiply(x_NK, self.panels, self.outputs, first, last, out_NX, column)


def as_array(weight: Tensor) -> Weights:
    """Return a weight as the kernels take it: float32, or bfloat16 as uint16, because numpy has no bfloat16."""
    array: Weights = (weight.view(torch.uint16) if weight.dtype == torch.bfloat16 else weight.float()).numpy()
    return array


def unpacked(weight_KX: Tensor) -> Matrix:
    """Return weights that lie inputs first; each panel is a view of `LANES` columns."""
    inputs, outputs = weight_KX.shape
    array = as_array(weight_KX)
    shape, item = (-(-outputs // LANES), inputs, LANES), array.itemsize
    view: Any = np.lib.stride_tricks.as_strided(array, shape, (LANES * item, outputs * item, item))
    kind = panels.BF16 if weight_KX.dtype == torch.bfloat16 else panels.F32
    return Matrix(inputs, outputs, kind(view), array)


def pack(parts: Sequence[PackedRows], workers: Workers) -> list[Matrix]:
    """Lay out packed matrices that share an input, in panels; neighbours of one format become one matrix."""
    groups = [list(group) for _, group in groupby(parts, lambda part: (part.format, part.scale_dtype))]
    return [matrix for group in groups for matrix in _laid_out(group, [None], workers)]


def pack_stack(parts: Sequence[PackedRows], workers: Workers, experts: Sequence[int] | None = None) -> list[Matrix]:
    """Lay out stacks of packed matrices that share an input: a matrix for each of `experts`, by default all.

    Raises:
        ValueError: the parts have different formats.
    """
    formats = {(part.format, part.scale_dtype) for part in parts}
    if len(formats) > 1:
        raise ValueError(f"an expert's matrices that share an input need one format, got {sorted(map(str, formats))}")
    return _laid_out(parts, range(parts[0].shape[0]) if experts is None else experts, workers)


def bytes_per_expert(parts: Sequence[PackedRows]) -> int:
    """Return the bytes of each matrix that `pack_stack` returns."""
    outputs = sum(part.shape[-2] for part in parts)
    return -(-outputs // LANES) * LANES * sum(row.nbytes for row in _arrays(parts[0].rows(0, 1, 0)))


def _laid_out(parts: Sequence[PackedRows], experts: Sequence[int | None], workers: Workers) -> list[Matrix]:
    inputs, outputs = parts[0].shape[-1], sum(part.shape[-2] for part in parts)
    step = max(1, PIECE // (FP8_BLOCK * inputs)) * FP8_BLOCK  # rows; pieces begin at a block, and at a panel
    count, ends = -(-outputs // LANES), list(accumulate(part.shape[-2] for part in parts))
    pieces = [
        (part, expert, first, place * count * LANES + end - part.shape[-2] + first)
        for place, expert in enumerate(experts)
        for part, end in zip(parts, ends, strict=True)
        for first in range(0, part.shape[-2], step)
    ]
    part, expert, _, _ = pieces[0]
    laid = [
        np.zeros((len(experts) * count, rows.shape[1], LANES), rows.dtype) for rows in _arrays(part.rows(0, 1, expert))
    ]

    def lay_out(piece: tuple[PackedRows, int | None, int, int]) -> None:
        part, expert, first, place = piece
        some = part.rows(first, min(first + step, part.shape[-2]), expert)
        for rows, panels_PKL in zip(_arrays(some), laid, strict=True):
            panels.lay_out(rows, panels_PKL, place)

    workers.each(lay_out, pieces)
    kind: Any = _KINDS[parts[0].format]
    cuts = [slice(place * count, (place + 1) * count) for place in range(len(experts))]
    return [Matrix(inputs, outputs, kind(*(panels_PKL[cut] for panels_PKL in laid))) for cut in cuts]


def _arrays(part: Packed) -> tuple[NDArray[Any], NDArray[Any]]:
    """Return codes [X, K] (FP4: [X, K / 2]) and scales [X, G]."""
    scale = part.scale if part.scale.dtype == torch.float32 else part.scale.view(torch.uint8)
    if scale.dtype == torch.uint8 and scale.numel() and int(scale.max()) > MOST_EXPONENT:
        raise ValueError(f"a scale is 2^{int(scale.max()) - 127}, expected at most 2^{MOST_EXPONENT - 127}")
    if part.format == "fp8":
        scale = scale.repeat_interleave(FP8_BLOCK, 0)[: part.shape[0]]
    elif part.format == "int8":
        scale = scale[:, None]
    codes = part.data if part.format == "int8" else part.data.view(torch.uint8)
    return codes.contiguous().numpy(), scale.contiguous().numpy()
