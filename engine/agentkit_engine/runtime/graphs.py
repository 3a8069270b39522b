"""Decoding steps as CUDA graphs: one launch replays the kernels of a whole forward.

Launching a step's kernels from Python takes longer than the kernels. A graph repeats launches with the same addresses,
grids and arguments, so a step to be replayed must keep all of them: a captured forward reads its plan from buffers at
fixed addresses, and nothing on the host depends on the length of a sequence.

**Buckets.** There is a graph for each number of rows in `BUCKETS`; a step uses the smallest that holds its rows. The
rest is padding: rows of no sequence, for which no kernel stores anything. A row is one new token, or one id of a draft.

**Capacities.** Grids, and the memory for partial results, also depend on the columns of the block tables. There is a
graph for each number of spans that is `SPANS` times a power of `GROWTH`. Kernels launch programs for the whole
capacity, and those beyond a sequence's length return at once. When a sequence outgrows a capacity, the next one's graph
is used.

**What a step copies.** One page-locked tensor of integers to the device: ids, positions, slots and row offsets. A block
table stays on the device, and is copied again when a sequence gets a span or another sequence takes its row. Logits and
streams of live rows are copied out of the graph's memory, because the next replay overwrites it.

Graphs are captured when they are first needed, and share one memory pool. Prompts and steps of more rows, or of longer
drafts, than a graph holds are launched from Python, with the same bits: a row's bits do not depend on the batch, and
kernels choose by shapes what no bit depends on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from collections.abc import Sequence as Seq
from typing import Any, Protocol

import torch
from torch import Tensor

from agentkit_engine.model.forward import Computed, Forward
from agentkit_engine.speculation import LONGEST
from agentkit_kernels.ops import Plan

BUCKETS = (1, 2, 4, 8, 16, 32, 64)
"""Rows of the captured forwards."""
SPANS, GROWTH = 16, 4
"""Least spans of a captured block table, and the ratio of one capacity to the one before it."""
_ROWS_OF_ONE = 1 + LONGEST
"""Most rows of one sequence in a captured forward: its id, and a draft."""

Capture = Callable[[Callable[[], Computed]], tuple[Callable[[], None], Computed]]
"""Records what a function does on a device; returns a function that repeats it, and the result, which it overwrites."""


class FixedBatch(Protocol):
    """A batch at a fixed address, whose plan can be written again."""

    def write(self, plan: Plan) -> None:
        """Copy a plan of at most as many rows to the device, without its block tables."""


class BlockTables(Protocol):
    """Block tables at a fixed address."""

    rows: Tensor

    def write(self, tables: Seq[Seq[int]]) -> None:
        """Hold these spans for the first sequences."""


class FixedOps(Protocol):
    """Operations whose kernels take lengths from the device, so that they can be captured."""

    def fixed_batch(self, rows: int, block_tables: Tensor, longest: int) -> FixedBatch:
        """Return a batch of as many rows as sequences, each of at most `longest` rows, without a plan."""

    def fixed_block_tables(self, sequences: int, spans: int) -> BlockTables:
        """Return block tables of empty sequences."""


class CudaCapture:
    """Captures CUDA graphs, or HIP graphs on AMD; see `Capture`."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool: Any = None  # memory that all graphs share

    def __call__(self, function: Callable[[], Computed]) -> tuple[Callable[[], None], Computed]:
        """Run `function` once to compile its kernels, and capture the second run. It must not wait for the device."""
        with torch.cuda.device(self._device):
            side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                function()
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                computed = function()
        self._pool = self._pool or graph.pool()
        return graph.replay, computed


class Graphs:
    """The captured forwards of one model."""

    def __init__(
        self,
        forward: Forward,
        ops: FixedOps,
        capture: Capture,
        *,
        spans: int,
        buckets: Seq[int] = BUCKETS,
        least_spans: int = SPANS,
    ) -> None:
        """`spans` is the most that a sequence can have.

        Raises:
            ValueError: The buckets do not increase from at least 1.
        """
        if not buckets or [*buckets] != sorted({*buckets}) or buckets[0] < 1:
            raise ValueError(f"buckets of rows must increase, and be at least 1, got {[*buckets]}")
        self.buckets, self.capacities = tuple(buckets), tuple(_capacities(least_spans, spans))
        self._forward, self._ops, self._capture = forward, ops, capture
        self._tables = ops.fixed_block_tables(self.buckets[-1], self.capacities[-1])
        self._captured: dict[tuple[int, int], _Captured] = {}

    def __call__(self, plan: Plan) -> Computed | None:
        """Compute a step and return the output of all its rows; None if it has to be launched from Python."""
        rows, spans = len(plan.ids), max(map(len, plan.block_tables), default=0)
        if not 0 < rows <= self.buckets[-1] or max(plan.lengths) > _ROWS_OF_ONE or spans > self.capacities[-1]:
            return None
        bucket = next(size for size in self.buckets if size >= rows)
        capacity = next(size for size in self.capacities if size >= spans)
        captured = self._captured.get((bucket, capacity))
        if captured is None:
            captured = self._captured[bucket, capacity] = self._record(bucket, capacity)
        self._tables.write(plan.block_tables)
        captured.batch.write(plan)
        captured.replay()
        return Computed(*(rows_of[:rows].clone() for rows_of in captured.computed))

    def _record(self, bucket: int, capacity: int) -> _Captured:
        tables = self._tables.rows[:bucket, :capacity]
        batch = self._ops.fixed_batch(bucket, tables, min(bucket, _ROWS_OF_ONE))
        batch.write(Plan((), (), ()))  # nothing but padding, so that capturing stores nothing
        return _Captured(batch, *self._capture(lambda: self._forward.compute(batch)))


class _Captured:
    """A forward that can be replayed over what its batch holds."""

    def __init__(self, batch: FixedBatch, replay: Callable[[], None], computed: Computed) -> None:
        self.batch, self.replay, self.computed = batch, replay, computed


def _capacities(least: int, most: int) -> Iterator[int]:
    """Yield growing numbers of spans, up to exactly `most`."""
    while least < most:
        yield least
        least *= GROWTH
    yield most
