"""The rows of a forward, in groups of sequences that have the same positions. Dimension key: `agentkit_kernels.ops`,
and T tokens of each of the B sequences of a group."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from agentkit_kernels.ops import QUERY_BLOCK, Plan
from agentkit_kernels.trace import Trace

ROWS = 32
"""The number of rows is padded to a multiple of this. From this row count on, a matrix product gives a row the same
bits whatever its neighbours (`invariance.py`), and element-wise functions fill whole vectors: scalar code would compute
the last few values, and its exponential differs from the vector code's."""
SCORE_BUDGET = 1 << 22
"""Query blocks shrink in long contexts, so that B * U * (length of the context) stays below this."""


@dataclass(frozen=True, slots=True)
class Block:
    """Tokens of a group whose attention is computed together.

    They share products with all rows and entries up to `end`, the next multiple of `QUERY_BLOCK`, and what a query must
    not see is masked. So the shapes of the products depend on positions only, and not on the cut into forwards.
    """

    tokens: slice
    positions: Tensor
    end: int


class Group:
    """B sequences with the same start and the same number of new tokens T."""

    def __init__(self, plan: Plan, first: int, last: int, row: int, device: torch.device) -> None:
        self.sequences, self.tokens, self.start = last - first, plan.lengths[first], plan.starts[first]
        self.end = self.start + self.tokens
        self.rows = slice(row, row + self.sequences * self.tokens)
        self.positions = torch.arange(self.start, self.end, device=device)
        self.slots_B = torch.tensor(plan.slots[first:last], dtype=torch.int64, device=device)
        tables = plan.block_tables[first:last]
        most = max(map(len, tables), default=0)
        padded = [[*table, *[0] * (most - len(table))] for table in tables]
        self.block_tables = torch.tensor(padded, dtype=torch.int64, device=device)
        size = QUERY_BLOCK
        while size > 1 and size * self.sequences * self.end > SCORE_BUDGET:
            size //= 2
        bounds = [0, *range(size - self.start % size, self.tokens, size), self.tokens]
        self.blocks = [
            Block(slice(low, high), self.positions[low:high], -(-(self.start + high) // QUERY_BLOCK) * QUERY_BLOCK)
            for low, high in itertools.pairwise(bounds)
        ]

    def take(self, rows: Tensor) -> Tensor:
        """Return this group's part of a forward's rows, a view [B, T, ...]."""
        return rows[self.rows].view(self.sequences, self.tokens, *rows.shape[1:])


class Batch:
    """See `ops.Batch`."""

    def __init__(self, plan: Plan, device: torch.device) -> None:
        self.trace: Trace | None = plan.trace
        self.groups: list[Group] = []
        row = first = 0
        for _, alike in itertools.groupby(zip(plan.starts, plan.lengths, strict=True)):
            last = first + len(list(alike))
            self.groups.append(Group(plan, first, last, row, device))
            row, first = self.groups[-1].rows.stop, last
        self.tokens = row
        self.ids = pad_rows(torch.as_tensor(plan.ids, dtype=torch.int64).to(device))
        self.positions = pad_rows(torch.cat([group.positions.repeat(group.sequences) for group in self.groups]))

    def gather(self, parts_BTX: list[Tensor]) -> Tensor:
        """Return the rows of all groups, end to end and padded: the inverse of `Group.take`."""
        flat = [part.flatten(0, 1) for part in parts_BTX]
        return pad_rows(flat[0] if len(flat) == 1 else torch.cat(flat))


def pad_rows(x: Tensor) -> Tensor:
    """Append zeros up to a multiple of `ROWS` rows."""
    missing = -len(x) % ROWS
    return F.pad(x, (*[0] * (2 * x.dim() - 1), missing)) if missing else x
