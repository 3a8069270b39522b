"""Matrix products on a CPU of which a row has the same bits, however many rows there are.

Weights are float32 or bfloat16, whose products are computed in float32 too: what is held in half the memory gives the
same bits as if it had been made float32 when it was loaded.

Many rows are multiplied by a library: oneDNN, where this torch has it, which is twice as fast as its BLAS on AVX-512.
For a few rows the call alone costs more than the arithmetic; they are `cpu.multiply`'s where that gives the library's
bits, which is tried out when a model is packed.

Dimension key: N rows, K inputs, O outputs.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence as Seq

import numpy as np
import torch
from torch import Tensor

from agentkit_engine.runtime.invariance import chain_block, least_rows
from agentkit_kernels import cpu
from agentkit_kernels.cpu import Floats, Weights

logger = logging.getLogger(__name__)

FEW, FEW_OF_BF16 = 12, 32
"""Rows up to which a kernel is faster than the library, which takes float32 weights only."""
FEW_QUERIES = 16
"""Rows up to which the BLAS is faster with keys than oneDNN."""
_local = threading.local()
_ONEDNN = getattr(torch.ops.mkldnn, "_linear_pointwise", None) if torch.backends.mkldnn.enabled else None


def empty(rows: int, *shape: int) -> Floats:
    """float32 [rows, ..]; for many rows, memory that begins with a cache line, so that few vectors lie across two."""
    if rows <= FEW_OF_BF16:
        return np.empty((rows, *shape), np.float32)
    array: Floats = torch.empty(rows, *shape).numpy()
    return array


def by_library(x_NK: Tensor, weight_KO: Tensor) -> Tensor:
    """x @ weight. The weight may be a transposed view."""
    if weight_KO.dtype != torch.float32:
        weight_KO = _widened(weight_KO)
    if _ONEDNN is None:
        return torch.mm(x_NK, weight_KO)
    out_NO: Tensor = _ONEDNN(x_NK, weight_KO.t(), None, "none", [], "")
    return out_NO


def _widened(weight_KO: Tensor) -> Tensor:
    """The weight in float32, where the thread's next one will be: to copy costs less than fresh memory."""
    with torch.inference_mode(False):  # whoever comes next may not be in it
        memory = getattr(_local, "memory", None)
        if memory is None or memory.numel() < weight_KO.numel():
            memory = _local.memory = torch.empty(weight_KO.numel())
    wide_KO: Tensor = memory[: weight_KO.numel()].view(weight_KO.shape)
    return wide_KO.copy_(weight_KO)


def padded_rows(rows: int, least: int) -> int:
    """How many rows to give the library for `rows`: `least` or more, and not every number.

    It compiles each shape once, in half a millisecond.
    """
    step = 8 if rows <= 64 else 64
    return max(-(-rows // step) * step, least)


def multiply(x_NK: Floats, weight_KO: Tensor, least: int) -> Floats:
    """The library's product, of at least `least` rows."""
    rows = len(x_NK)
    if (padded := padded_rows(rows, least)) > rows:
        x_NK = np.concatenate((x_NK, np.zeros((padded - rows, x_NK.shape[1]), np.float32)))
    out_NO: Floats = by_library(torch.from_numpy(x_NK), weight_KO).numpy()
    return out_NO[:rows]


def as_array(weight: Tensor) -> Weights:
    """A weight as kernels take it: bfloat16, which numpy has no name for, or float32."""
    array: Weights = (weight.view(torch.uint16) if weight.dtype == torch.bfloat16 else weight.float()).numpy()
    return array


class Product:
    """Rows times a weight [K, O], the same bits for any number of rows once `settle` has seen to it."""

    def __init__(self, weight_KO: Tensor) -> None:
        self.weight = weight_KO
        self.array = as_array(weight_KO)
        self.few = FEW if weight_KO.dtype == torch.float32 else FEW_OF_BF16
        self.rows = 1
        """From so many rows on the library gives a row the same bits whatever the others."""
        self.block = 0
        """With which `cpu.multiply` gives those bits too; 0 where none does."""

    def __call__(self, x_NK: Floats) -> Floats:
        rows = len(x_NK)
        if not self.block or rows > self.few:
            return multiply(x_NK, self.weight, self.rows)
        out_NO = np.empty((rows, self.array.shape[1]), np.float32)
        cpu.multiply(x_NK, self.array, self.block, out_NO)
        return out_NO


class Dots:
    """Rows times keys, which are new each time, [S, C]; the same bits for any number of rows once settled."""

    def __init__(self) -> None:
        self.rows = 1
        self.few = FEW_QUERIES
        """Up to so many rows the BLAS is used: its calls cost less."""

    def __call__(self, x_XC: Floats, keys_SC: Tensor) -> Floats:
        if len(x_XC) > self.few:
            return multiply(x_XC, keys_SC.t(), self.rows)
        if len(x_XC) < self.rows:
            return self(np.pad(x_XC, ((0, self.rows - len(x_XC)), (0, 0))), keys_SC)[: len(x_XC)]
        dots_XS: Floats = torch.mm(torch.from_numpy(x_XC), keys_SC.t()).numpy()
        return dots_XS

    def settle(self, size: int, most: int, step: int) -> None:
        """See from how many rows on the library's products do not depend on the other rows, and whether the BLAS gives
        the same bits; with up to `most` keys of this size, a multiple of `step`."""
        keys_SC = torch.randn(most, size, generator=torch.Generator().manual_seed(2))
        some = [keys_SC[:count] for count in (step, most - step, most)]
        self.rows = max(least_rows([keys], by=[_library_linear], padded=padded_rows) for keys in some)
        x_XC = torch.randn(FEW_QUERIES, size, generator=torch.Generator().manual_seed(3))
        whole = by_library(x_XC, keys_SC.t())
        products = [torch.mm(x_XC[:rows], keys.t()) for rows in range(self.rows, FEW_QUERIES + 1) for keys in some]
        if not all(torch.equal(product, whole[: len(product), : product.shape[1]]) for product in products):
            self.few = 0
        if not all(torch.equal(by_library(x_XC, keys.t()), whole[:, : len(keys)]) for keys in some):
            logger.warning("index scores on this machine depend on the number of entries: results depend on the chunks")


def _library_linear(x_NK: Tensor, weight_OK: Tensor) -> Tensor:
    return by_library(x_NK, weight_OK.t())


def settle(products: Seq[Product], *, exact: bool) -> None:
    """Find out how many rows the library needs, and which of its products a kernel can do as it does."""
    if not exact:
        for product in products:
            product.block = len(product.weight)
        return
    weights = [product.weight.t() for product in products]
    rows = least_rows(weights, by=[_library_linear], padded=padded_rows)
    blocks: dict[torch.Size, int] = {}
    for product in products:
        if product.weight.shape not in blocks:
            blocks[product.weight.shape] = chain_block(product.weight, rows, by=by_library)
        product.rows, product.block = rows, blocks[product.weight.shape]
