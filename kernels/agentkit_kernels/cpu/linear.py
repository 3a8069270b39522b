"""Matrix products on a CPU in which a row has the same bits for any number of rows.

Weights are float32 or bfloat16; products of both are computed in float32. So bfloat16 weights take half the memory and
give the same bits as if they had been widened to float32 when they were loaded.

A library multiplies many rows: oneDNN where this torch has it, which on AVX-512 is twice as fast as torch's BLAS. For a
few rows the call alone costs more than the arithmetic; `loops.multiply` computes them if it gives the library's bits,
which is probed when a model is packed.

Dimension key: N rows, K inputs, O outputs.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from agentkit_kernels.cpu import loops
from agentkit_kernels.cpu.batch import Batch
from agentkit_kernels.cpu.loops import Floats, Weights
from agentkit_kernels.invariance import OUTPUTS, least_rows

logger = logging.getLogger(__name__)

FEW, FEW_OF_BF16 = 12, 32
"""Row counts up to which the kernel is faster than the library, which takes float32 weights only."""
FEW_QUERIES = 16
"""Row count up to which the BLAS multiplies keys faster than oneDNN."""
BLOCKS = (128, 192, 256, 384, 512, 768, 1024)
"""Block sizes that libraries are known to sum in one chain, besides all inputs and half of them."""
_local = threading.local()
_ONEDNN = getattr(torch.ops.mkldnn, "_linear_pointwise", None) if torch.backends.mkldnn.enabled else None


def empty(rows: int, *shape: int) -> Floats:
    """Allocate float32 [rows, ..]. For many rows it is aligned to cache lines, so that few vectors cross two."""
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
    """Return the weight in float32, in memory that the thread's next call reuses: copying costs less than fresh
    memory."""
    with torch.inference_mode(False):  # later users of this memory may not be in inference mode
        memory = getattr(_local, "memory", None)
        if memory is None or memory.numel() < weight_KO.numel():
            memory = _local.memory = torch.empty(weight_KO.numel())
    wide_KO: Tensor = memory[: weight_KO.numel()].view(weight_KO.shape)
    return wide_KO.copy_(weight_KO)


def padded_rows(rows: int, least: int) -> int:
    """Return the row count to give the library for `rows`: at least `least`, and one of few values.

    The library compiles each shape once, which takes half a millisecond.
    """
    step = 8 if rows <= 64 else 64
    return max(-(-rows // step) * step, least)


def multiply(x_NK: Floats, weight_KO: Tensor, least: int) -> Floats:
    """Multiply with the library, padding to at least `least` rows."""
    rows = len(x_NK)
    if (padded := padded_rows(rows, least)) > rows:
        x_NK = np.concatenate((x_NK, np.zeros((padded - rows, x_NK.shape[1]), np.float32)))
    out_NO: Floats = by_library(torch.from_numpy(x_NK), weight_KO).numpy()
    return out_NO[:rows]


def as_array(weight: Tensor) -> Weights:
    """Return a weight as the kernels take it: float32, or bfloat16 as uint16, because numpy has no bfloat16."""
    array: Weights = (weight.view(torch.uint16) if weight.dtype == torch.bfloat16 else weight.float()).numpy()
    return array


class Product:
    """The product of rows with a weight [K, O]; after `settle`, with the same bits for any number of rows."""

    def __init__(self, weight_KO: Tensor) -> None:
        self.weight = weight_KO
        self.array = as_array(weight_KO)
        self.few = FEW if weight_KO.dtype == torch.float32 else FEW_OF_BF16
        self.rows = 1
        """From this row count on, the library gives a row the same bits whatever the other rows."""
        self.block = 0
        """The block size with which `loops.multiply` gives those bits too; 0 if none does."""

    def __call__(self, x_NK: Floats) -> Floats:
        rows = len(x_NK)
        if not self.block or rows > self.few:
            return multiply(x_NK, self.weight, self.rows)
        out_NO = np.empty((rows, self.array.shape[1]), np.float32)
        loops.multiply(x_NK, self.array, self.block, out_NO)
        return out_NO


class Dots:
    """The product of rows with keys [S, C], which differ in each call; after `settle`, with the same bits for any
    number of rows."""

    def __init__(self) -> None:
        self.rows = 1
        self.few = FEW_QUERIES
        """Up to this row count the BLAS is used, whose calls cost less."""

    def __call__(self, x_XC: Floats, keys_SC: Tensor) -> Floats:
        if len(x_XC) > self.few:
            return multiply(x_XC, keys_SC.t(), self.rows)
        if len(x_XC) < self.rows:
            return self(np.pad(x_XC, ((0, self.rows - len(x_XC)), (0, 0))), keys_SC)[: len(x_XC)]
        dots_XS: Floats = torch.mm(torch.from_numpy(x_XC), keys_SC.t()).numpy()
        return dots_XS

    def settle(self, size: int, most: int, step: int) -> None:
        """Probe the row count from which the library's products do not depend on the other rows, and whether the
        BLAS gives the same bits, with up to `most` keys of this size, a multiple of `step`."""
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


def settle(products: Sequence[Product], *, exact: bool) -> None:
    """Probe the row count that the library needs, and the products that a kernel can compute with the same bits."""
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


def chain_block(weight_KO: Tensor, rows: int, *, by: Callable[[Tensor, Tensor], Tensor]) -> int:
    """Return the block size with which `loops.multiply` gives the bits of `by` for `rows` rows and more; 0 if none.

    This covers libraries that sum each block of inputs in one chain and add the blocks in order, as oneDNN and MKL do.
    """
    weight_KO = weight_KO[:, :OUTPUTS].float().contiguous()
    inputs, outputs = weight_KO.shape
    x_NK = torch.randn(rows, inputs, generator=torch.Generator().manual_seed(1))
    expected, out_NO = by(x_NK, weight_KO).numpy(), np.empty((rows, outputs), np.float32)
    for block in dict.fromkeys((inputs, max(1, inputs // 2), *BLOCKS)):
        loops.multiply(x_NK.numpy(), weight_KO.numpy(), block, out_NO)
        if np.array_equal(out_NO, expected):
            return block
    return 0


class Stacked:
    """The matrices [E, K, O] of all experts."""

    def __init__(self, weights_EKO: Tensor) -> None:
        self.array = as_array(weights_EKO)
        self.all = weights_EKO.unbind()
        self.product = Product(weights_EKO[0])  # all experts have the same shape

    def __len__(self) -> int:
        return len(self.all)


def linear(x: Floats, weight: Product) -> Floats:
    return weight(x)


def grouped_linear(x: Floats, weights: Sequence[Product]) -> Floats:
    parts_GNX = np.ascontiguousarray(x.reshape(len(x), len(weights), -1).transpose(1, 0, 2))
    return np.concatenate([weight(part) for weight, part in zip(weights, parts_GNX, strict=True)], 1)


def embed(batch: Batch, table: Weights, streams: int) -> Floats:
    rows_ND = table[batch.ids]
    if rows_ND.dtype == np.uint16:
        rows_ND = (rows_ND.astype(np.uint32) << 16).view(np.float32)
    streams_NMD: Floats = np.repeat(rows_ND[:, None], streams, 1)
    return streams_NMD


def take(x: Floats, rows: Sequence[int]) -> Floats:
    some: Floats = x[np.array(rows)]
    return some
