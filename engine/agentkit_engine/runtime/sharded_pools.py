"""The pools of all ranks of an engine on several devices (`parallel.py`), as rank 0 sees them."""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as Seq

import torch
from torch import Tensor

from agentkit_engine.runtime.state import SPAN, Pools, Sequence
from agentkit_engine.runtime.workers import Worker, Workers


class RemotePools(Pools):
    """The bookkeeping of a worker's pools. Changes to their rows go with the next call to the worker."""

    def __init__(self, own: Pools, worker: Worker, workers: Workers) -> None:
        """`own` are the pools of rank 0, which are as large. Host memory is that of this process."""
        super().__init__(
            own.spec,
            slots=own.slots,
            spans=own.spans,
            device=torch.device("meta"),
            kv_cache_dtype=own.kv_cache_dtype,
            rank=worker.rank,
            host_slots=own.host_slots,
            host_spans=own.host_spans,
        )
        self._worker, self._workers = worker, workers

    def clear_slot(self, slot: int) -> None:
        self._worker.changes.append(("clear_slot", slot))

    def clear_span(self, span: int) -> None:
        self._worker.changes.append(("clear_span", span))

    def copy_slot(self, source: int, target: int) -> None:
        self._worker.changes.append(("copy_slot", source, target))

    def copy_span(self, source: int, target: int) -> None:
        self._worker.changes.append(("copy_span", source, target))

    def write_rows(self, slot: int, spans: Seq[int], tensors: Mapping[str, Tensor]) -> None:
        self._worker.changes.append(("write_rows", slot, list(spans), dict(tensors)))

    def rows_at(self, slot: int | None, spans: Seq[int]) -> dict[str, Tensor]:
        """See `Pools.rows_at`; the copies are in this process.

        Raises:
            WorkerLostError: a worker failed, now or before.
        """
        with self._workers.talk():
            self._worker.call("read_rows", slot, list(spans))
            rows: dict[str, Tensor] = self._worker.receive()
        return rows


class ShardedPools(Pools):
    """The pools of all ranks. `slots` and `spans` are those of one rank, which bounds the length of a sequence."""

    def __init__(self, shards: Seq[Pools]) -> None:
        own = shards[0]
        super().__init__(
            own.spec,
            slots=own.slots,
            spans=own.spans,
            device=torch.device("meta"),
            kv_cache_dtype=own.kv_cache_dtype,
        )
        self.shards, self.ranks = shards, len(shards)

    @property
    def free_slots(self) -> int:
        return sum(shard.free_slots for shard in self.shards)

    @property
    def free_spans(self) -> int:
        return sum(shard.free_spans for shard in self.shards)

    @property
    def bytes_held(self) -> int:
        return sum(shard.bytes_held for shard in self.shards)

    @property
    def tiered(self) -> bool:
        return self.shards[0].tiered

    @property
    def host_bytes_held(self) -> int:
        return sum(shard.host_bytes_held for shard in self.shards)

    def open(self) -> Sequence:
        return min(self.shards, key=_load).open()

    def fork(self, source: Sequence) -> Sequence:
        return self.shards[source.rank].fork(source)

    def branch(self, source: Sequence) -> Sequence:
        """Return a fork on the least loaded rank, which may be another one."""
        here = self.shards[source.rank]
        there = min(self.shards, key=lambda shard: (_load(shard), shard is not here))
        if there is here:
            return here.fork(source)
        branch = there.open()
        try:
            there.reserve(branch, source.length)
            there.write(branch, 0, here.read(source, 0, -(-source.length // SPAN)))
        except BaseException:
            there.close(branch)
            raise
        branch.length, branch.written = source.length, source.written
        return branch

    def fits(self, needs: Seq[tuple[Sequence | None, int]]) -> bool:
        shares = [[need for need in needs if need[0] is not None and need[0].rank == s.rank] for s in self.shards]
        for need in [need for need in needs if need[0] is None]:
            room = [share for share, shard in zip(shares, self.shards, strict=True) if shard.fits([*share, need])]
            if not room:
                return False
            min(room, key=len).append(need)
        return all(shard.fits(share) for share, shard in zip(shares, self.shards, strict=True))

    def reserve(self, sequence: Sequence, length: int) -> None:
        self.shards[sequence.rank].reserve(sequence, length)

    def close(self, sequence: Sequence) -> None:
        self.shards[sequence.rank].close(sequence)

    def may_demote(self, sequence: Sequence) -> bool:
        return self.shards[sequence.rank].may_demote(sequence)

    def demote(self, sequence: Sequence) -> bool:
        return self.shards[sequence.rank].demote(sequence)

    def promote(self, sequence: Sequence) -> None:
        self.shards[sequence.rank].promote(sequence)

    def read(self, sequence: Sequence, first: int, last: int, *, tail: bool = True) -> dict[str, Tensor]:
        return self.shards[sequence.rank].read(sequence, first, last, tail=tail)

    def write(self, sequence: Sequence, first: int, tensors: Mapping[str, Tensor]) -> None:
        self.shards[sequence.rank].write(sequence, first, tensors)


def _load(pools: Pools) -> float:
    """Return the part of the pools in use, of slots or of spans."""
    return 1 - min(pools.free_slots / pools.slots, pools.free_spans / pools.spans)
