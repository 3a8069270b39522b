"""How many rows a matrix product needs on this machine, so that a row's bits do not depend on the rows beside it.

A library takes other kernels for few rows than for many, with other orders of summation. No library promises from where
on that ends, so it is tried out, with the shapes of the model's own weights, when a model is packed.

Dimension key: N rows, K inputs, O outputs.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

logger = logging.getLogger(__name__)

CANDIDATES = (8, 16, 32)
"""Numbers of rows to try; 8 rows of the four mHC streams are the fewest whose element-wise functions are `LANES`."""
BLOCKS = (128, 192, 256, 384, 512)
"""Inputs that libraries are known to sum in one chain, beside all and half of them."""
OUTPUTS = 4096
"""Of a larger weight, as many outputs are tried: the head of a large vocabulary would take seconds."""


def least_rows(weights: Iterable[Tensor], *, at_least: int = 0) -> int:
    """The fewest rows from which on all products with `weights`, each [O, K], give each row the same bits.

    Where even the most that are tried do not suffice there is a warning, and results depend on the batch.
    """
    shapes = {weight.shape: weight for weight in weights}
    for rows in CANDIDATES:
        if rows >= at_least and all(_holds(weight[:OUTPUTS], rows) for weight in shapes.values()):
            return rows
    logger.warning("matrix products on this machine depend on their number of rows: results depend on the batch")
    return max(CANDIDATES)


def _holds(weight_OK: Tensor, rows: int) -> bool:
    generator = torch.Generator().manual_seed(0)
    x_NK = torch.randn(132, weight_OK.shape[1], generator=generator).to(weight_OK.device)
    whole_NO = F.linear(x_NK, weight_OK)
    counts = (rows, rows + 1, rows + 7, 2 * rows, 65, 127)
    for some in (slice(start, start + count) for count in counts for start in (0, 5)):
        product, batched = F.linear(x_NK[some], weight_OK), torch.bmm(x_NK[None, some], weight_OK.mT[None])[0]
        if not (torch.equal(product, whole_NO[some]) and torch.equal(batched, whole_NO[some])):
            return False
    return True


def chain_block(weight_KO: Tensor, rows: int) -> int:
    """With which block `cpu.multiply` gives the bits that the library gives for `rows` rows and more; 0 with none.

    A library that sums a block of inputs in one chain, and adds the blocks' sums in order, is met; MKL is one.
    """
    from agentkit_kernels import cpu

    weight_KO = weight_KO[:, :OUTPUTS].contiguous()
    inputs, outputs = weight_KO.shape
    x_NK = torch.randn(rows, inputs, generator=torch.Generator().manual_seed(1))
    expected, out_NO = torch.mm(x_NK, weight_KO).numpy(), np.empty((rows, outputs), np.float32)
    for block in dict.fromkeys((inputs, max(1, inputs // 2), *BLOCKS)):
        cpu.multiply(x_NK.numpy(), weight_KO.numpy(), block, out_NO)
        if np.array_equal(out_NO, expected):
            return block
    return 0
