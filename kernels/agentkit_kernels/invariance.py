"""Find the number of rows from which a matrix product gives each row the same bits, whatever rows stand beside it.

A library uses different kernels, with different orders of summation, for few rows and for many. No library documents
where that ends, so it is probed with the shapes of the model's own weights when a model is packed.

Dimension key: N rows, K inputs, O outputs.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

logger = logging.getLogger(__name__)

Multiply = Callable[[Tensor, Tensor], Tensor]
Padded = Callable[[int, int], int]

CANDIDATES = (8, 16, 32)
"""Row counts to try."""
MOST = 512
"""Row count of the product that others are compared with: a full forward."""
OUTPUTS = 4096
"""Maximum number of outputs to probe; the head of a large vocabulary would take seconds."""


def least_rows(
    weights: Iterable[Tensor],
    *,
    candidates: Sequence[int] = CANDIDATES,
    by: Sequence[Multiply] | None = None,
    padded: Padded | None = None,
) -> int:
    """Return the smallest row count from which all products with `weights`, each [O, K], give each row the same bits.

    `by` lists the functions that compute the products; by default torch's linear and its batched product. If they
    only ever get certain row counts, `padded` maps a row count to the one they get, and no others are tried. If even
    the largest of the `candidates` does not suffice, a warning says that results depend on the batch.
    """
    shapes = {weight.shape: weight for weight in weights}
    for rows in candidates:
        if all(_holds(weight[:OUTPUTS], rows, by or (F.linear, _batched), padded) for weight in shapes.values()):
            return rows
    logger.warning("matrix products on this machine depend on their number of rows: results depend on the batch")
    return max(candidates)


def _holds(weight_OK: Tensor, rows: int, by: Sequence[Multiply], padded: Padded | None) -> bool:
    generator = torch.Generator().manual_seed(0)
    x_NK = torch.randn(MOST, weight_OK.shape[1], generator=generator).to(weight_OK.device)
    whole_NO = by[0](x_NK, weight_OK)
    counts = [rows, rows + 1, rows + 7, 2 * rows, 2 * rows + 17, 65, 127, 128, 449]
    if padded is not None:
        counts = [padded(count, rows) for count in counts]
    places = [
        slice(start, start + count) for count in dict.fromkeys(counts) for start in (0, 5) if start + count <= MOST
    ]
    return all(torch.equal(multiply(x_NK[some], weight_OK), whole_NO[some]) for some in places for multiply in by)


def _batched(x_NK: Tensor, weight_OK: Tensor) -> Tensor:
    return torch.bmm(x_NK[None], weight_OK.mT[None])[0]
