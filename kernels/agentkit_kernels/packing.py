"""Memory layout of weights for products on a CPU: inputs first, and weights that share an input side by side.

A model's parameters become views of the packed weights, so memory holds each weight once. A checkpoint's weights are
read straight into place (`lay_out`); all others are moved when they are packed.

Dimension key: E experts, K inputs, O outputs of one parameter, X outputs of all parameters side by side.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

SLACK = 64
"""Elements of memory behind a weight, which kernels may read with its last outputs."""


def packed(*parts_OK: Tensor) -> Tensor:
    """Pack weights side by side: [K, X], or [E, K, X] for weights [E, O, K]. Parameters become views of the result.

    The result is bfloat16 if all parts are, else float32.
    """
    if (whole_KX := _whole(parts_OK)) is not None:
        return whole_KX
    whole_KX, places_OK = _side_by_side(parts_OK)
    for part_OK, place_OK in zip(parts_OK, places_OK, strict=True):
        place_OK.copy_(part_OK.detach())
        if isinstance(part_OK, nn.Parameter) and part_OK.dtype == whole_KX.dtype:
            part_OK.data = place_OK
    return whole_KX


def lay_out(parts_OK: Sequence[Tensor]) -> None:
    """Allocate uninitialised parameters where `packed` expects them."""
    for part_OK, place_OK in zip(parts_OK, _side_by_side(parts_OK)[1], strict=True):
        if part_OK.dtype == place_OK.dtype:
            part_OK.data = place_OK


def _side_by_side(parts_OK: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """Allocate memory for weights, and return it with each weight's place in it, [.., O, K]."""
    *experts, _, inputs = parts_OK[0].shape
    outputs = [part_OK.shape[-2] for part_OK in parts_OK]
    dtype = torch.bfloat16 if all(part_OK.dtype == torch.bfloat16 for part_OK in parts_OK) else torch.float32
    shape = (*experts, inputs, sum(outputs))
    whole_KX = torch.zeros(SLACK + math.prod(shape), dtype=dtype)[:-SLACK].view(shape)
    return whole_KX, [columns_KO.mT for columns_KO in torch.split(whole_KX, outputs, -1)]


def _whole(parts_OK: Sequence[Tensor]) -> Tensor | None:
    """Return the [.., K, X] tensor of which the parts are views, if they fill all of it."""
    *experts, _, inputs = parts_OK[0].shape
    width = sum(part_OK.shape[-2] for part_OK in parts_OK)
    strides = (*[inputs * width for _ in experts], width, 1)
    place, dtype = parts_OK[0].data_ptr(), parts_OK[0].dtype
    for part_OK in parts_OK:
        if part_OK.dtype != dtype or part_OK.mT.stride() != strides or part_OK.data_ptr() != place:
            return None
        place += part_OK.itemsize * part_OK.shape[-2]
    behind = parts_OK[0].untyped_storage().nbytes() // dtype.itemsize - parts_OK[0].storage_offset()
    if behind < math.prod(experts) * inputs * width + SLACK:
        return None
    return parts_OK[0].detach().as_strided((*experts, inputs, width), strides)
