"""Matrix products on a CPU in which a row has the same bits for any number of rows and of threads.

Every output is one chain of fused multiply-adds over all inputs, in float32, whatever computes it and whatever the
weights' format: bfloat16, FP8, FP4 and int8 weights give the bits of the same values in float32.

Dimension key: N rows, K inputs, X outputs, P (token, expert) pairs, E experts.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate, groupby
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from agentkit_kernels.cpu import loops
from agentkit_kernels.cpu.batch import Batch
from agentkit_kernels.cpu.expert_store import ExpertStore, StoredStack
from agentkit_kernels.cpu.layout import Matrix, as_array, pack, pack_stack, unpacked
from agentkit_kernels.cpu.loops import Floats, Weights
from agentkit_kernels.cpu.panels import LANES
from agentkit_kernels.cpu.workers import PIECES, SHARED, Workers
from agentkit_kernels.packed import PackedRows
from agentkit_kernels.packing import packed

ALIGNED_ROWS = 32
"""Row count from which arrays are aligned to cache lines."""


def empty(rows: int, *shape: int) -> Floats:
    """Allocate float32 [rows, ..]. For many rows it is aligned to cache lines, so that few vectors cross two."""
    if rows <= ALIGNED_ROWS:
        return np.empty((rows, *shape), np.float32)
    array: Floats = torch.empty(rows, *shape).numpy()
    return array


class Job(NamedTuple):
    """The product of rows with the panels `first` to `last` of a matrix; `column` of `out` takes its output 0."""

    x: Floats
    matrix: Matrix
    first: int
    last: int
    out: Floats
    column: int = 0


def compute(jobs: Sequence[Job], workers: Workers) -> None:
    """Compute products. Threads share the panels; the bits do not depend on which thread computes which."""
    work = sum(job.x.size * (job.last - job.first) * LANES for job in jobs)
    if workers.shares(work):
        workers.each(_multiply, _pieces(jobs, work // (PIECES * workers.count)))
    else:
        for job in jobs:
            _multiply(job)


def _multiply(job: Job) -> None:
    job.matrix.multiply(job.x, job.first, job.last, job.out, job.column)


def _pieces(jobs: Sequence[Job], size: int) -> Iterator[Job]:
    """Cut jobs at panels into pieces of about `size` multiply-adds."""
    for job in jobs:
        step = max(1, size // (job.x.size * LANES))
        for first in range(job.first, job.last, step):
            yield job._replace(first=first, last=min(first + step, job.last))


class Weight:
    """Matrices that share an input, side by side; neighbours of one format are one matrix."""

    def __init__(self, parts: Sequence[Tensor | PackedRows], workers: Workers) -> None:
        self.workers = workers
        self.matrices: list[Matrix] = []
        for _, group in groupby(parts, lambda part: isinstance(part, Tensor)):
            tensors, rows = split(group)
            self.matrices += [unpacked(packed(*tensors))] if tensors else pack(rows, workers)
        *columns, self.outputs = accumulate((matrix.outputs for matrix in self.matrices), initial=0)
        self.places = list(zip(self.matrices, columns, strict=True))
        """The matrices, with the column of each one's first output."""
        self.shared_from = SHARED // (self.outputs * self.matrices[0].inputs) if workers.count > 1 else sys.maxsize
        """Row count from which threads share the product."""
        self.single = self.matrices[0].unpacked if len(self.matrices) == 1 and self.shared_from else None
        """The only matrix, inputs first, if one row is multiplied by one thread: calls cost as much as the sums."""

    def multiply(self, x_NK: Floats, out_NX: Floats, column: int = 0) -> None:
        """Multiply rows with the matrices; the results go into the columns of `out` from `column` on."""
        if len(x_NK) == 1 and self.single is not None:
            loops.multiply(x_NK, self.single, 0, self.outputs, out_NX, column)
            return
        if len(x_NK) > self.shared_from:
            jobs = [Job(x_NK, matrix, 0, matrix.count, out_NX, column + place) for matrix, place in self.places]
            compute(jobs, self.workers)
            return
        for matrix, place in self.places:
            matrix.multiply(x_NK, 0, matrix.count, out_NX, column + place)

    def multiply_groups(self, x_NGK: Floats, out_NX: Floats) -> None:
        """Multiply each of G parts of a row with as many of the only matrix's outputs."""
        [matrix] = self.matrices
        groups, size = x_NGK.shape[1], self.outputs // x_NGK.shape[1]
        x_GNK = np.ascontiguousarray(x_NGK.transpose(1, 0, 2))
        cuts = [(group * size // LANES, -(-(group + 1) * size // LANES)) for group in range(groups)]
        if size % LANES == 0:
            jobs = [Job(part, matrix, first, last, out_NX) for part, (first, last) in zip(x_GNK, cuts, strict=True)]
            compute(jobs, self.workers)
            return
        for group, (first, last) in enumerate(cuts):  # a panel may hold outputs of two groups
            some, begin = empty(len(x_NGK), (last - first) * LANES), group * size
            compute([Job(x_GNK[group], matrix, first, last, some, -first * LANES)], self.workers)
            out_NX[:, begin : begin + size] = some[:, begin - first * LANES :][:, :size]


class Stacked:
    """The matrices of all E experts; packed ones may stay in their files.

    Attributes:
        unpacked: All of them inputs first, [E, K, X], unless they are packed.
    """

    def __init__(
        self, parts: Sequence[Tensor | PackedRows], workers: Workers, store: ExpertStore | None = None
    ) -> None:
        self.workers = workers
        self.count, self.inputs = parts[0].shape[0], parts[0].shape[-1]
        self.outputs = sum(part.shape[-2] for part in parts)
        self.unpacked: Weights | None = None
        self._stored: StoredStack | None = None
        tensors, rows = split(parts)
        if tensors and rows:
            raise ValueError("an expert's matrices that share an input must all be packed, or none")
        if tensors:
            whole_EKX = packed(*tensors)
            self.unpacked = as_array(whole_EKX)
            self._experts = [unpacked(weight_KX) for weight_KX in whole_EKX]
        elif store is not None:
            self._stored = StoredStack(rows, store)
        else:
            self._experts = pack_stack(rows, workers)

    def __len__(self) -> int:
        return self.count

    def multiply(self, x_PK: Floats, counts_E: Sequence[int]) -> Floats:
        """Multiply each expert's rows, which are next to each other, with its matrix."""
        out_PX = empty(len(x_PK), self.outputs)
        rows_E = [slice(end - count, end) for end, count in zip(accumulate(counts_E), counts_E, strict=True)]

        def use(matrices: Iterable[tuple[int, Matrix]]) -> None:
            compute(
                [Job(x_PK[rows_E[e]], matrix, 0, matrix.count, out_PX[rows_E[e]]) for e, matrix in matrices],
                self.workers,
            )

        used = [expert for expert, count in enumerate(counts_E) if count]
        if self._stored is not None:
            self._stored.each(used, use)
        else:
            use((expert, self._experts[expert]) for expert in used)
        return out_PX


def split(parts: Iterable[Tensor | PackedRows]) -> tuple[list[Tensor], list[PackedRows]]:
    """Return the tensors and the packed parts."""
    parts = list(parts)
    tensors = [part for part in parts if isinstance(part, Tensor)]
    return tensors, [part for part in parts if not isinstance(part, Tensor)]


def linear(x: Floats, weight: Weight) -> Floats:
    out_NX = empty(len(x), weight.outputs)
    weight.multiply(x, out_NX)
    return out_NX


def grouped_linear(x: Floats, weight: Weight, groups: int) -> Floats:
    out_NX = empty(len(x), weight.outputs)
    weight.multiply_groups(x.reshape(len(x), groups, -1), out_NX)
    return out_NX


def embed(batch: Batch, table: Weights, streams: int) -> Floats:
    rows_ND = table[batch.ids]
    if rows_ND.dtype == np.uint16:
        rows_ND = (rows_ND.astype(np.uint32) << 16).view(np.float32)
    streams_NMD: Floats = np.repeat(rows_ND[:, None], streams, 1)
    return streams_NMD


def take(x: Floats, rows: Sequence[int]) -> Floats:
    some: Floats = x[np.array(rows)]
    return some
