"""Continuous batching: which sequences take part in the next forward, with how many tokens, in which memory.

A `Work` is the computation of one session: its ids, and the state computed from them so far. State is only ever
derived from ids, so it can be dropped whenever memory is short and computed again; because forwards are the same bits
whatever their batch, nobody can tell.

Dimension key: `runtime/__init__.py`.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq

import torch
from torch import Tensor

from agentkit_engine.errors import OutOfMemoryError
from agentkit_engine.model.decoder import Decoder
from agentkit_engine.runtime.runner import Runner, Segment
from agentkit_engine.runtime.state import ROLLBACK, Pools, Sequence

TOKEN_BUDGET = 512
"""Most tokens of one forward: what a decoding session may have to wait for another's prompt."""
SLOTS = 64
"""Sequences that can be live at once; when more sessions are open, the one that waited longest is computed again."""


class Work:
    """One session's ids and what is computed of them.

    Attributes:
        ids: every id, computed or not.
        logits_V: the logits after the last id, once everything is computed.
    """

    def __init__(self) -> None:
        self.ids: list[int] = []
        self.logits_V: Tensor | None = None
        self.sequence: Sequence | None = None
        self.last_step = -1

    @property
    def computed(self) -> int:
        return 0 if self.sequence is None else self.sequence.length

    @property
    def pending(self) -> int:
        """How many ids the next forwards have to take in before there are logits."""
        return len(self.ids) - self.computed

    def extend(self, ids: Seq[int]) -> None:
        self.ids += ids
        if ids:
            self.logits_V = None


class Batcher:
    """Owns the pools and runs the forwards of one model. One thread at a time."""

    def __init__(self, decoder: Decoder, *, state_bytes: int) -> None:
        """`state_bytes` bounds what spans may take; on a CPU memory is taken as it is used."""
        device = decoder.embed.weight.device
        sizes = Pools(decoder.spec, slots=1, spans=1, device=torch.device("meta"))
        spans = max(1, min(state_bytes // max(1, sizes.bytes_per_span), 1 << 20))
        self.pools = Pools(decoder.spec, slots=SLOTS, spans=spans, device=device)
        self.runner = Runner(decoder, self.pools)
        self._steps = 0
        self._live: dict[Work, None] = {}  # least recently used first

    def advance(self, works: Seq[Work]) -> None:
        """One forward over the next ids of `works`, all of which have pending ones.

        Those with a single pending id come first; then prompts, the one that waited longest first, until
        `TOKEN_BUDGET` is spent. Whoever has nothing pending afterwards has its `logits_V`.

        Raises:
            OutOfMemoryError: not even the first of them fits into the memory that others can give up.
        """
        turn = sorted(works, key=lambda work: (work.pending != 1, work.last_step))
        segments: list[Segment] = []
        chosen: list[Work] = []
        budget = TOKEN_BUDGET
        for work in turn:
            count = min(work.pending, budget)
            if count == 0:
                break
            try:
                sequence = self._make_room(work, count, keep=chosen)
            except OutOfMemoryError:
                if not chosen:
                    raise
                break
            segments.append(Segment(sequence, work.ids[sequence.length : sequence.length + count]))
            chosen.append(work)
            budget -= count
        try:
            logits = self.runner.step(segments)
        except BaseException:
            for work in chosen:
                self.drop(work)
            raise
        self._steps += 1
        for work, logits_V in zip(chosen, logits, strict=True):
            work.last_step = self._steps
            work.logits_V = None if work.pending else logits_V

    def truncate(self, work: Work, length: int) -> None:
        """Forget the ids from `length` on, and what was computed of them."""
        if length == len(work.ids):
            return
        del work.ids[length:]
        work.logits_V = None
        sequence, kept = work.sequence, length - 1  # the last one is computed again: its logits are gone
        if sequence is not None and sequence.length > kept:
            if kept >= 0 and sequence.written - kept <= ROLLBACK:
                sequence.length = kept
            else:
                self.drop(work)

    def drop(self, work: Work) -> None:
        """Free the state; the ids stay, and are computed again when the next ones are. So do logits that are there."""
        self._live.pop(work, None)
        if work.sequence is not None:
            self.pools.close(work.sequence)
            work.sequence = None

    def logits(self, ids: Seq[int], *, chunk: int = TOKEN_BUDGET) -> Tensor:
        """The logits after every id, float32 [T, V], computed from scratch, `chunk` ids at a time."""
        work = Work()
        work.extend(ids)
        try:
            rows = []
            while work.pending:
                count = min(work.pending, chunk)
                sequence = self._make_room(work, count, keep=[])
                segment = Segment(sequence, ids[sequence.length : sequence.length + count])
                rows.append(self.runner.step([segment], all_rows=True))
            return torch.cat(rows)
        finally:
            self.drop(work)

    def _make_room(self, work: Work, count: int, *, keep: Seq[Work]) -> Sequence:
        """The work's sequence with room for `count` more ids, dropping the state of others but `keep` if need be."""
        self._live.pop(work, None)
        self._live[work] = None
        while True:
            try:
                if work.sequence is None:
                    work.sequence = self.pools.open()
                self.pools.reserve(work.sequence, work.sequence.length + count)
                return work.sequence
            except OutOfMemoryError as error:
                victim = next((other for other in self._live if other is not work and other not in keep), None)
                if victim is None:
                    length = work.computed + count
                    self.drop(work)
                    raise OutOfMemoryError(
                        f"no memory for a sequence of {length} tokens beside {len(keep)} of the same step: {error}"
                    ) from error
                self.drop(victim)
