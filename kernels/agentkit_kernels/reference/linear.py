"""Matrix products, and the lookup of rows. Dimension key: `agentkit_kernels.ops`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from agentkit_kernels.ops import Array
from agentkit_kernels.packed import Packed
from agentkit_kernels.reference.batch import Batch, pad_rows


class Weight(NamedTuple):
    """Matrices [.., X, K] that share an input. The parameters themselves, so that training sees every change; packed
    ones are dequantised in every product."""

    parts: tuple[Tensor | Packed, ...]
    detached: tuple[Tensor | Packed, ...] = ()
    dtype: torch.dtype = torch.float32  # of the factors; the product is float32


def product(x: Tensor, part: Tensor | Packed, dtype: torch.dtype) -> Tensor:
    """Return x · partᵀ in float32, of factors rounded to `dtype`."""
    return F.linear(x.to(dtype), values(part).to(dtype)).float()


def values(part: Tensor | Packed) -> Tensor:
    """Return weights in float32."""
    return part.float() if isinstance(part, Tensor) else part.dequantise()


def each_expert(stack: Tensor | Packed) -> Sequence[Tensor | Packed]:
    """Return the matrices of a stack."""
    if isinstance(stack, Tensor):
        return stack.unbind()
    return [stack.rows(0, stack.shape[1], expert) for expert in range(stack.shape[0])]


class Columns(NamedTuple):
    """The product with several matrices, side by side; training would spend a tenth of its time on joining and
    splitting them."""

    parts: tuple[Tensor, ...]


def columns(x: Tensor | Columns, first: int, count: int) -> Tensor:
    """Return `count` columns from `first` on; they lie in a single part."""
    if isinstance(x, Tensor):
        return x[:, first : first + count]
    for part in x.parts:
        if first < part.shape[1]:
            return part[:, first : first + count] if (first, count) != (0, part.shape[1]) else part
        first -= part.shape[1]
    raise IndexError(f"there is no column {first} behind the {len(x.parts)} parts of a product")


def linear(x: Tensor, weight: Weight) -> Array:
    """Return a tensor, or `Columns` for several matrices."""
    outs = [product(x, part, weight.dtype) for part in weight.parts]
    outs += [product(x.detach(), part, weight.dtype) for part in weight.detached]
    return outs[0] if len(outs) == 1 else Columns(tuple(outs))


def grouped_linear(x: Tensor, weight: Weight, groups: int) -> Tensor:
    parts, matrices = x.flatten(1).chunk(groups, dim=-1), values(weight.parts[0]).chunk(groups)
    return torch.cat([product(part, matrix, weight.dtype) for part, matrix in zip(parts, matrices, strict=True)], -1)


def embed(batch: Batch, table: Tensor, streams: int) -> Tensor:
    return F.embedding(batch.ids, table).float().unsqueeze(1).repeat(1, streams, 1)


def take(x: Tensor, rows: Sequence[int]) -> Tensor:
    return pad_rows(x[torch.tensor(rows, device=x.device)])
