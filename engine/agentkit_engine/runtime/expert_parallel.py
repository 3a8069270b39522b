"""Expert parallelism: the operations of one rank, whose `experts` are spread over all ranks.

Each rank holds E / W experts and computes everything else for its own rows. In each layer the ranks gather all rows
with their routes (all-gather), each computes the (row, expert) pairs of its experts, and sends the outputs back to the
ranks of the rows (all-to-all). A rank sums its rows' experts in the order of their choice, so the bits are those of one
process: an operation's row does not depend on its neighbours (`agentkit_kernels.ops`).

Each row goes to every rank. With A experts per token it would be needed by A of them at most, so this costs nothing
extra up to W = A + 1, and saves an exchange of counts: the number of rows is part of the plan.

Rows travel as bytes through host memory, so any dtype and any device will do.

Dimension key: `agentkit_kernels.ops`, and W ranks, P (row, expert) pairs.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from agentkit_kernels.ops import Array, Batch, Ops, Plan, Weight
from agentkit_kernels.packed import Format, Packed, PackedRows

if TYPE_CHECKING:
    from torch.distributed import ProcessGroupGloo


def experts_of(rank: int, ranks: int, experts: int) -> range:
    """Return the experts of a rank: an equal share, in order."""
    return range(experts * rank // ranks, experts * (rank + 1) // ranks)


@dataclass(frozen=True, slots=True)
class SomeExperts:
    """The experts from `first` on of a packed stack [E, X, K], as `PackedRows`."""

    whole: PackedRows
    first: int
    count: int

    @property
    def format(self) -> Format:
        return self.whole.format

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.count, *self.whole.shape[1:])

    @property
    def scale_dtype(self) -> torch.dtype:
        return self.whole.scale_dtype

    @property
    def nbytes(self) -> int:
        return self.whole.nbytes * self.count // self.whole.shape[0]

    def rows(self, first: int, last: int, expert: int | None = None) -> Packed:
        """See `PackedRows`."""
        assert expert is not None
        return self.whole.rows(first, last, self.first + expert)

    def __getitem__(self, rows: slice) -> PackedRows:
        raise TypeError("a stack is no matrix")


class ExpertParallel:
    """A backend's operations, `ops.Ops`, with `stack` and `experts` over a process group.

    Attributes:
        counts: Rows of each rank in the current forward, equal on all ranks.
    """

    def __init__(
        self, ops: Ops, group: ProcessGroupGloo, *, experts: int, active: int, hidden_size: int, dtype: torch.dtype
    ) -> None:
        """`dtype` is that of the backend's rows."""
        self._ops, self._rank = ops, group.rank()
        self._group: Any = group  # torch's type stubs lack its methods for single tensors
        self._active, self._hidden_size, self._dtype = active, hidden_size, dtype
        shares = [experts_of(rank, group.size(), experts) for rank in range(group.size())]
        self._own = shares[self._rank]
        self._owners_E = torch.repeat_interleave(torch.tensor([len(share) for share in shares]))
        self.counts: Seq[int] = ()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._ops, name)

    def stack(self, *parts_EXK: Tensor | PackedRows) -> Weight:
        """Pack this rank's experts only."""
        first, last = self._own.start, self._own.stop
        return self._ops.stack(
            *(
                part[first:last] if isinstance(part, Tensor) else SomeExperts(part, first, last - first)
                for part in parts_EXK
            )
        )

    def experts(
        self,
        x: Array,
        experts: Array,
        weights: Array,
        w13: Weight,
        w2: Weight,
        limit: float,
        shared: Array,
        batch: Batch,
    ) -> Array:
        """See `ops.Ops`; all ranks call this or `serve` at the same time."""
        ops, rows = self._ops, batch.tokens
        x_ND, experts_NA, weights_NA, shared_ND = (ops.tensor(each)[:rows] for each in (x, experts, weights, shared))
        out_NAD = self._exchange(x_ND, experts_NA, weights_NA, w13, w2, limit).to(x_ND.device)
        if ops.name == "triton":  # sums in float32, and rounds once
            from agentkit_kernels.triton.experts import combine

            return combine(out_NAD.flatten(0, 1), shared_ND)
        out_ND = out_NAD[:, 0]
        for choice in range(1, self._active):
            out_ND = out_ND + out_NAD[:, choice]
        return ops.array(out_ND + shared_ND, batch)

    def serve(self, w13: Weight, w2: Weight, limit: float) -> None:
        """Take part in a layer of a forward in which this rank has no rows."""
        none_NA = torch.empty(0, self._active, dtype=torch.int64)
        x_ND = torch.empty(0, self._hidden_size, dtype=self._dtype)
        self._exchange(x_ND, none_NA, none_NA.float(), w13, w2, limit)

    def _exchange(
        self, x_ND: Tensor, experts_NA: Tensor, weights_NA: Tensor, w13: Weight, w2: Weight, limit: float
    ) -> Tensor:
        """Return the output of each of this rank's rows from each of its experts, [N, A, D] on the host."""
        x, experts, weights = self._gather(x_ND, experts_NA, weights_NA.float())
        owners, own = self._owners_E[experts], self._owners_E[experts_NA.cpu()].flatten()
        rows_P, choices_P = (owners == self._rank).nonzero(as_tuple=True)
        out_PD = torch.empty(0, self._hidden_size, dtype=self._dtype)
        if len(rows_P):
            mine = experts[rows_P, choices_P, None] - self._own.start
            out_PD = self._multiply(x[rows_P], mine, weights[rows_P, choices_P, None], w13, w2, limit)
        ends = torch.tensor(self.counts).cumsum(0)
        sent = torch.bincount(torch.searchsorted(ends, rows_P, right=True), minlength=len(self.counts)).tolist()
        received = torch.bincount(own, minlength=len(self.counts)).tolist()
        back_PD = torch.empty(len(own), self._hidden_size, dtype=self._dtype)
        self._group.alltoall_base(_bytes(back_PD), _bytes(out_PD), received, sent).wait()
        order = own.argsort(stable=True)
        return torch.empty_like(back_PD).index_copy_(0, order, back_PD).view(len(x_ND), self._active, self._hidden_size)

    def _multiply(
        self, x_PD: Tensor, experts_P1: Tensor, weights_P1: Tensor, w13: Weight, w2: Weight, limit: float
    ) -> Tensor:
        """Return the outputs of this rank's experts, each row with one expert."""
        ops, count = self._ops, len(x_PD)
        batch = ops.batch(Plan([0] * count, [count], [0], [0], [()]))
        device = getattr(ops, "device", torch.device("cpu"))
        x, nothing = (ops.array(rows.to(device), batch) for rows in (x_PD, torch.zeros_like(x_PD)))
        routes = experts_P1.to(device), weights_P1.to(device)
        experts, weights = (part.numpy() for part in routes) if ops.name == "cpu" else routes
        return ops.tensor(ops.experts(x, experts, weights, w13, w2, limit, nothing, batch))[:count].cpu()

    def _gather(self, *columns: Tensor) -> list[Tensor]:
        """Return the rows of all ranks, in the order of the ranks, on the host."""
        rows = torch.cat([_bytes(column.cpu()) for column in columns], 1)
        most, width = max(self.counts), rows.shape[1]
        padded = torch.zeros(most, width, dtype=torch.uint8)
        padded[: len(rows)] = rows
        every = torch.empty(len(self.counts) * most, width, dtype=torch.uint8)
        self._group._allgather_base(every, padded).wait()
        every = torch.cat([part[:count] for part, count in zip(torch.split(every, most), self.counts, strict=True)])
        parts = torch.split(every, [column.shape[1] * column.itemsize for column in columns], 1)
        gathered = [torch.empty(len(every), column.shape[1], dtype=column.dtype) for column in columns]
        for whole, part in zip(gathered, parts, strict=True):
            _bytes(whole).copy_(part)
        return gathered


def _bytes(rows_NX: Tensor) -> Tensor:
    return rows_NX.contiguous().view(torch.uint8)
