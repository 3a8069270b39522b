"""Check that a library's matrix product gives each row the same bits, whatever rows stand beside it.

A library uses different kernels, with different orders of summation, for few rows and for many. No library documents
where that ends, so it is probed with the shapes of the model's own weights when a model is packed.

Products without a weight (attention, index scores, mHC and its Sinkhorn steps) are not probed: their shapes come with a
forward. Positions alone decide them (`reference/batch.py`), so only a row's place can matter;
`tests/engine/test_one_forward.py` compares whole forwards for that.

Dimension key: N rows, K inputs, O outputs.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

logger = logging.getLogger(__name__)

MOST = 512
"""Row count of the product that others are compared with: a full forward."""
OUTPUTS = 4096
"""Maximum number of outputs to probe; the head of a large vocabulary would take seconds."""


def check_products(weights: Iterable[Tensor], rows: int) -> bool:
    """Return whether products of at least `rows` rows with each of `weights`, [O, K], give each row the same bits.

    If they do not, a warning says that results depend on the batch.
    """
    shapes = {weight.shape: weight for weight in weights}
    exact = all(_is_exact(weight[:OUTPUTS], rows) for weight in shapes.values())
    if not exact:
        logger.warning("matrix products on this machine depend on their number of rows: results depend on the batch")
    return exact


def _is_exact(weight_OK: Tensor, rows: int) -> bool:
    x_NK = torch.randn(MOST, weight_OK.shape[1], generator=torch.Generator().manual_seed(0)).to(weight_OK.device)
    whole_NO = F.linear(x_NK, weight_OK)
    counts = {rows, rows + 1, rows + 7, 2 * rows, 2 * rows + 17, 65, 127, 128, 449}
    places = [slice(start, start + count) for count in counts for start in (0, 5) if start + count <= MOST]
    return all(
        torch.equal(product, whole_NO[some])
        for some in places
        for product in (F.linear(x_NK[some], weight_OK), torch.bmm(x_NK[None, some], weight_OK.mT[None])[0])
    )
