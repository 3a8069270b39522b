"""Continuous batching: choose the sequences, token counts and memory of the next forward.

A `Work` is the computation of one session: its ids and the state computed from them so far. State derives from ids
alone, so the batcher may drop it when memory is short and compute it again later. Forwards give the same bits in any
batch, so the session cannot tell. For the same reason a work may start from another work's state in the prefix cache.

Dimension key: `runtime/__init__.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Seq
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from agentkit_engine.errors import OutOfMemoryError
from agentkit_engine.ids import Ids
from agentkit_engine.model.decoder import Decoder
from agentkit_engine.runtime import saved
from agentkit_engine.runtime.disk_cache import DiskCache
from agentkit_engine.runtime.prefix_cache import Checkpoint, IdChain, Keep, PrefixCache
from agentkit_engine.runtime.runner import Runner
from agentkit_engine.runtime.segments import Computed, Segment
from agentkit_engine.runtime.state import SPAN, Pools, Sequence
from agentkit_engine.speculation import LONGEST, Drafter

T = TypeVar("T")

TOKEN_BUDGET = 512
"""Maximum tokens per forward; bounds how long a decoding session waits for another session's prompt."""
SLOTS = 64
"""Minimum number of live sequences. When no slot is free, the least recently used session loses its slot."""
CHECKPOINTS = 192
"""Additional slots for checkpoints, limited to a quarter of the memory for spans."""
CHECKPOINT_EVERY = 8192
"""Tokens between two checkpoints within a long prompt."""
SHORT_PROMPT = 16
"""Minimum tokens between two prompt-end checkpoints; computing fewer than this costs less than keeping a checkpoint."""


@dataclass(frozen=True, slots=True)
class PromptUsage:
    """Prompt tokens found in the prefix cache and prompt tokens computed; each token counts once."""

    hit_tokens: int = 0
    miss_tokens: int = 0


class Work:
    """The ids of one session and the state computed from them.

    Attributes:
        ids: all ids, computed or not.
        length: number of ids.
        priority: works with a higher priority are prefilled first and keep their state longer.
        last_step: the step in which the work last took part in a forward.
        checkpointed: the length at which a checkpoint was last taken or resumed from.
        jumped: whether a grammar forced the ids that were fed last.
        parked: the checkpoint that holds the state while the session is parked.
    """

    def __init__(self, ids: Seq[int] = (), fed: Seq[int] | None = None, *, priority: int = 0) -> None:
        """`fed` holds 1 for each id that was fed and 0 for each that was sampled; by default all ids were fed."""
        self.ids = ids.fork() if isinstance(ids, Ids) else Ids(ids)
        self.length = len(self.ids)
        self.priority = priority
        self.sequence: Sequence | None = None
        self.last_step = -1
        self.chain = IdChain()
        self.checkpointed = 0
        self.jumped = False
        self.parked: Checkpoint | None = None
        self.drafter = Drafter()
        self._said: Computed | None = None  # output of the forward that computed the last id, or sampled it
        self._row = 0
        self._fresh = False  # whether that row holds the logits after the last id
        self._drafted: Seq[int] = ()  # draft ids of the rows after this one
        self._fed = bytearray(b"\1" * len(self.ids) if fed is None else fed)
        self._marks: list[int] = []
        self._counted = self._hits = self._misses = 0

    @property
    def logits_V(self) -> Tensor | None:
        """Logits after the last id; None while ids are pending."""
        return self._said.logits_RV[self._row] if self._fresh and self._said is not None else None

    @property
    def streams_MD(self) -> Tensor | None:
        """Residual streams behind `logits_V`, or those from which the last id was sampled."""
        return None if self._said is None else self._said.streams_RMD[self._row]

    @property
    def usage(self) -> PromptUsage:
        """Cache hits and misses among the ids that were fed."""
        return PromptUsage(self._hits, self._misses)

    @property
    def computed(self) -> int:
        return 0 if self.sequence is None else self.sequence.length

    @property
    def fed(self) -> bytes:
        """1 for each id that was fed, 0 for each that was sampled."""
        return bytes(self._fed)

    def past(self) -> tuple[list[int], list[int]]:
        """All ids, and the sampled ones among them."""
        return list(self.ids), [token_id for token_id, fed in zip(self.ids, self._fed, strict=True) if not fed]

    @property
    def pending(self) -> int:
        """Number of ids that still have to be computed before there are logits."""
        return self.length - self.computed

    def extend(self, ids: Seq[int]) -> None:
        """Append ids that are fed."""
        if ids:
            self.ids.extend(ids)
            self.length += len(ids)
            self._fed += b"\1" * len(ids)
            self.jumped = False
            self.forget()

    def push(self, token_id: int, *, forced: bool = False) -> None:
        """Append an id that was sampled or that a grammar forced. If it was the next draft id, its state and the logits
        after it are already computed.
        """
        self.ids.append(token_id)
        self.length += 1
        self._fed.append(forced)
        self.jumped = forced
        drafted, self._drafted = self._drafted, ()
        self._fresh = self.sequence is not None and bool(drafted) and drafted[0] == token_id
        if self.sequence is not None and self._fresh:
            self.drafter.accepted()
            self.sequence.length += 1
            self.count(self.sequence.length - 1, self.sequence.length, hit=False)
            self._row, self._drafted = self._row + 1, drafted[1:]
        elif forced:
            self._said = None

    @property
    def guessable(self) -> bool:
        """True if a single id is pending and that id was sampled."""
        return self.pending == 1 and not self._fed[-1]

    def draft(self, most: int, first: int | None = None) -> list[int]:
        """Draft up to `most` ids; `first` is the MTP block's guess at the next id, if it was asked."""
        return self.drafter.propose(self.ids, most, first) if self.guessable else []

    def mark(self) -> None:
        """Request a checkpoint at the current length, once it is computed."""
        self._marks.append(self.length)
        if self.sequence is not None:
            self.sequence.steady_until = 0

    def marked(self, length: int) -> bool:
        return length in self._marks

    def next_stop(self) -> int:
        """The length at which the next forward has to end at the latest, so that a checkpoint can be taken there."""
        long = (self.computed // CHECKPOINT_EVERY + 1) * CHECKPOINT_EVERY
        return min((mark for mark in self._marks if mark > self.computed), default=long)

    def goals(self) -> set[bytes]:
        """Hashes under which the cache will find this work once it is computed: one per mark, and one for all ids."""
        lengths = {mark for mark in self._marks if mark > self.computed} | {self.length}
        return {self.chain.key(self.ids, length) for length in lengths}

    def cut(self, length: int) -> None:
        """Remove the ids from `length` on."""
        self.ids.cut(length)
        self.length = length
        del self._fed[length:]
        self.chain.cut(length)
        self.forget()
        self._marks = [mark for mark in self._marks if mark <= length]
        self._counted, self.checkpointed = min(self._counted, length), min(self.checkpointed, length)
        if self.parked is not None and self.parked.sequence.length >= length:
            self.parked = None

    def count(self, start: int, end: int, *, hit: bool) -> int:
        """Count the ids from `start` to `end`, which are now part of the state; return how many of them were fed."""
        news = sum(self._fed[max(start, self._counted) : end])
        self._counted = max(self._counted, end)
        if hit:
            self._hits += news
        else:
            self._misses += news
        return sum(self._fed[start:end])

    def fork(self) -> Work:
        """Return a work with the same ids and no state."""
        fork = Work(self.ids, self._fed, priority=self.priority)
        fork._said, fork._row, fork._fresh, fork.chain = self._said, self._row, self._fresh, self.chain.copy()
        fork._counted, fork.checkpointed = self._counted, self.checkpointed
        fork.drafter = self.drafter.fork(self.ids)
        return fork

    def forget(self) -> None:
        """Discard the output of the last forward."""
        self._said, self._fresh, self._drafted = None, False, ()

    def let_go(self) -> None:
        """Keep only this work's row of the last forward, and free the rest of the batch."""
        if self._said is not None:
            self._said, self._row = self._said.only(self._row) if self._fresh else None, 0
        self._drafted = ()


class Batcher:
    """Owns the pools and runs the forwards of one model. Not thread-safe.

    Attributes:
        prefilled: ids that were fed and computed, counted each time.
        sampled: ids that were sampled and computed.
        drafted: draft ids that were computed; accepted ones count neither as prefilled nor as sampled.
        mtp_drafted: draft ids that came from the MTP block.
        speculate: whether to draft.
        mtp: whether the model's MTP block drafts too; always False for a model without one.
        disk: the disk cache for checkpoints, if there is one.
        steps: number of forwards.
    """

    def __init__(self, decoder: Decoder, *, kv_cache_bytes: int, exact: bool = True, backend: str = "auto") -> None:
        """`kv_cache_bytes` bounds the memory for spans; slots come on top. A CPU takes memory only as it is used."""
        device = decoder.embed.weight.device
        sizes = Pools(decoder.spec, slots=1, spans=1, device=torch.device("meta"))
        spans = max(1, min(kv_cache_bytes // max(1, sizes.bytes_per_span), 1 << 20))
        slots = SLOTS + min(CHECKPOINTS, kv_cache_bytes // 4 // sizes.bytes_per_slot)
        self.pools = Pools(decoder.spec, slots=slots, spans=spans, device=device)
        self.cache = PrefixCache(self.pools)
        self.runner = Runner(decoder, self.pools, exact=exact, backend=backend)
        self.prefilled = self.sampled = self.drafted = self.mtp_drafted = 0
        self.speculate = True
        self.mtp = bool(decoder.mtp)
        self.disk: DiskCache | None = None
        self.steps = 0
        self._live: dict[Work, None] = {}
        self._positions = decoder.spec.max_position_embeddings - 1  # the longest length that leaves room for a draft id

    def advance(self, works: Seq[Work]) -> None:
        """Run one forward over the next ids of `works`, all of which have pending ids.

        Decoding works come first, then prompts by priority, and among equals the one that waited longest, until
        `TOKEN_BUDGET` is spent. A work with nothing pending afterwards has `logits_V`. A work whose prefix another work
        is computing in this forward waits, and resumes from that state in a later step.

        Raises:
            OutOfMemoryError: not even the first work fits, after all others gave up their memory.
        """
        firsts = self._mtp_drafts(works)
        chosen, others = self._steady(works, firsts)
        if others:
            self._choose(others, firsts, chosen)
        try:
            computed = self.runner.step(list(chosen.values()))
        except BaseException:
            for work in chosen:
                self.drop(work)
            raise
        self.steps += 1
        row = 0
        for work, segment in chosen.items():
            work.last_step = self.steps
            if segment.sequence.length == work.length:
                work._said, work._row, work._fresh, work._drafted = computed, row, True, segment.draft
            row += 1
            if segment.draft:
                row += len(segment.draft)
                self.drafted += len(segment.draft)
                self.mtp_drafted += work in firsts
        unsteady = set(others)
        for work in chosen:
            if work in unsteady:
                self._account(work, len(chosen[work].ids))
            else:
                self.sampled += 1

    def _steady(self, works: Seq[Work], firsts: dict[Work, int]) -> tuple[dict[Work, Segment], list[Work]]:
        """Split off the works that add the id they sampled last and need neither memory nor a checkpoint for it. Nearly
        all works are of this kind nearly always.

        Returns:
            The segments of these works, and the remaining works.
        """
        chosen: dict[Work, Segment] = {}
        others: list[Work] = []
        spare = (TOKEN_BUDGET - len(works)) // 2 if self.speculate else 0
        for work in works:
            sequence, length = work.sequence, work.length
            if sequence is None or not (sequence.length + 1 == length <= sequence.steady_until) or work._fed[-1]:
                others.append(work)
                continue
            draft: Seq[int] = ()
            if spare > 0 and length < sequence.steady_until:
                most = min(spare, sequence.steady_until - length, LONGEST)
                draft = work.drafter.propose(work.ids, most, firsts.get(work))
                spare -= len(draft)
            chosen[work] = Segment(sequence, (work.ids.last[-1],), draft)
        return chosen, others

    def _choose(self, works: Seq[Work], firsts: dict[Work, int], chosen: dict[Work, Segment]) -> None:
        """Add the other works of this forward to `chosen`; works in it with a lower priority may be preempted."""
        for work in works:
            self._check_length(work)
        budget = TOKEN_BUDGET - sum(map(len, chosen.values()))
        for work in sorted(_leaders(works), key=lambda work: (work.pending != 1, -work.priority, work.last_step)):
            if budget <= 0:
                break
            try:
                keep = [other for other in chosen if other.priority >= work.priority]
                chosen[work] = self._segment(work, budget, keep, first=firsts.get(work))
            except OutOfMemoryError:
                if all(other.sequence is None for other in chosen):
                    raise
                break
            budget -= len(chosen[work])
        for work in [work for work in chosen if work.sequence is None]:  # it was preempted
            del chosen[work]

    def _account(self, work: Work, count: int) -> None:
        """Account for the last `count` ids of the state, which are new, and take a checkpoint where one is due."""
        assert work.sequence is not None
        end = work.sequence.length
        fed = work.count(end - count, end, hit=False)
        self.prefilled += fed
        self.sampled += count - fed
        if work.marked(end) or (end % CHECKPOINT_EVERY == 0 and count > 1):
            self._checkpoint(work, Keep.TURN)
        elif fed and not work.jumped and not work.pending and end - work.checkpointed >= SHORT_PROMPT:
            self._checkpoint(work, Keep.PROMPT)
        work.sequence.steady_until = min(work.sequence.num_spans * SPAN, self._positions)

    def too_long(self, work: Work) -> bool:
        """Return whether the state exceeds the memory even with no other work in it."""
        return -(-work.length // SPAN) > self.pools.spans

    def _check_length(self, work: Work) -> None:
        """Refuse a work that can never fit, before any of it is computed."""
        if self.too_long(work):
            self.drop(work)
            raise OutOfMemoryError(
                f"{work.length} ids need {-(-work.length // SPAN)} spans of memory, but there are {self.pools.spans}; "
                "raise kv_cache_bytes"
            )

    def fits(self, works: Seq[Work]) -> bool:
        """Return whether the states of all `works`, with one more span each, fit into memory at once."""
        held: set[int] = set()
        missing = 0
        for work in works:
            spans = [] if work.sequence is None else work.sequence.spans
            held.update(spans)
            missing += max(0, -(-work.length // SPAN) + 1 - len(spans))
        return len(held) + missing <= self.pools.spans and len(works) <= self.pools.slots

    def mark(self, work: Work) -> None:
        """Take a checkpoint here, now or as soon as it is computed, for sessions that share this prefix."""
        if work.pending:
            work.mark()
        elif work.length:
            self._checkpoint(work, Keep.TURN)

    def truncate(self, work: Work, length: int) -> None:
        """Remove the ids from `length` on, and the state computed from them."""
        if length == work.length:
            return
        work.cut(length)
        sequence, kept = work.sequence, length - 1  # the last id is computed again, because its logits were discarded
        if sequence is not None and sequence.length > kept:
            if kept >= 0 and sequence.reaches(kept):
                sequence.shorten(kept)
            else:
                self.drop(work)

    def fork(self, work: Work) -> Work:
        """Return a work with the same ids that shares the state, if there is memory for the fork."""
        fork, sequence = work.fork(), work.sequence
        if sequence is not None:
            try:
                fork.sequence = self._room_for(lambda: self.pools.fork(sequence), keep=[work])
            except OutOfMemoryError:
                return fork
            self._live[fork], fork.last_step = None, self.steps
        return fork

    def resume(self, work: Work) -> None:
        """Restore a state for at least a part of the ids; the ids after that part become pending.

        Raises:
            OutOfMemoryError: there is no memory for the state.
        """
        if work.sequence is None and work.length:
            work.sequence = self._room_for(lambda: self._enter(work), keep=[])
            self._live[work], work.last_step = None, self.steps
            if work.pending:
                work.forget()

    def save(self, work: Work, path: Path, *, model: str) -> None:
        """Write ids and state to a file; see `saved.write`."""
        saved.write(path, list(work.ids), work.fed, work.sequence, self.pools, model=model)

    def open(self, path: Path, *, model: str) -> Work:
        """Read the work that `save` wrote, with its state.

        Raises:
            SavedSessionError, OSError: see `saved.read`.
            OutOfMemoryError: the state does not fit, after all others gave up their memory.
        """
        ids, fed, tensors, length, written = saved.read(path, model=model, pools=self.pools)
        work = Work(ids, fed)
        if length:
            work.sequence = sequence = self._room_for(self.pools.open, keep=[])
            try:
                self._room_for(lambda: self.pools.reserve(sequence, length), keep=[])
            except OutOfMemoryError:
                self.drop(work)
                raise
            saved.restore(self.pools, sequence, tensors)
            # the last id is computed again for its logits
            sequence.length, sequence.written = min(length, len(ids) - 1), written
            work.count(0, length, hit=True)
            self._live[work], work.last_step = None, self.steps
        return work

    def park(self, work: Work) -> None:
        """Move the state to the prefix cache, which may evict it to disk; the ids stay."""
        self._live.pop(work, None)
        work.let_go()
        sequence, work.sequence = work.sequence, None
        if sequence is None:
            return
        if sequence.length == 0:
            self.pools.close(sequence)
            return
        work.parked = parked = self.cache.add(work.ids, work.chain, sequence, Keep.TURN)

        def spill() -> None:
            if work.parked is parked:  # otherwise the ids may have changed since
                self._store(work, parked.sequence)

        parked.spill = spill

    def close(self, work: Work) -> None:
        """Leave the state to later sessions, including those of later processes."""
        self.park(work)
        if work.parked is not None and work.parked in self.cache:
            self._store(work, work.parked.sequence)

    def drop(self, work: Work) -> None:
        """Free the state. The ids stay and are recomputed with the next forward; logits that exist stay too."""
        self._live.pop(work, None)
        if work.sequence is not None:
            self.pools.close(work.sequence)
            work.sequence = None

    def logits(self, ids: Seq[int], *, chunk: int = TOKEN_BUDGET) -> Tensor:
        """Compute the logits after every id from scratch, `chunk` ids at a time: float32 [T, V]."""
        work = Work(ids)
        self._check_length(work)
        try:
            work.sequence = self._room_for(self.pools.open, keep=[])
            rows = []
            while work.pending:
                segment = self._segment(work, chunk, keep=[])
                rows.append(self.runner.step([segment], all_rows=True).logits_RV)
            return torch.cat(rows)
        finally:
            self.drop(work)

    def _mtp_drafts(self, works: Seq[Work]) -> dict[Work, int]:
        """Ask the MTP block once for its guesses at the next id of all works that may draft from it."""
        asking: list[Work] = []
        streams: list[Tensor] = []
        if self.speculate and self.mtp:
            for work in works:
                if work.guessable and work.streams_MD is not None and work.drafter.asks(work.ids):
                    asking.append(work)
                    streams.append(work.streams_MD)
        if not asking:
            return {}
        guesses = self.runner.mtp_draft(torch.stack(streams), [work.ids[-1] for work in asking])
        return dict(zip(asking, guesses, strict=True))

    def _segment(self, work: Work, budget: int, keep: Seq[Work], first: int | None = None) -> Segment:
        """Return the segment of the work's next ids, at most `budget`, with memory reserved for them.

        Works other than those in `keep` may be preempted for it.
        """
        self._live.pop(work, None)
        try:
            if work.sequence is None:
                work.sequence = self._room_for(lambda: self._enter(work), keep)
            sequence = work.sequence
            end = min(sequence.length + budget, work.length, work.next_stop())
            room = min(budget - 1, self.pools.spec.max_position_embeddings - end - 1, LONGEST) if self.speculate else 0
            draft = work.draft(room, first) if room > 0 else []
            self._room_for(lambda: self.pools.reserve(sequence, end + len(draft)), keep)
        except OutOfMemoryError as error:
            length = min(work.computed + budget, work.length)
            self.drop(work)
            raise OutOfMemoryError(
                f"no memory for a sequence of {length} tokens beside {len(keep)} of the same step: {error}"
            ) from error
        self._live[work] = None
        return Segment(sequence, work.ids[sequence.length : end], draft)

    def _enter(self, work: Work) -> Sequence:
        """Return a sequence with the longest prefix of the ids that the caches hold; a parked work gets its own
        back."""
        parked, work.parked = work.parked, None
        if parked is not None and (own := self.cache.give_back(parked)) is not None:
            return own
        sequence = self._fetch(work) or self.cache.take(work.ids, work.chain)
        if sequence is None:
            return self.pools.open()
        work.checkpointed = sequence.length
        work.count(0, sequence.length, hit=True)
        return sequence

    def _fetch(self, work: Work) -> Sequence | None:
        """Load a checkpoint from disk, if it saves more than those in memory, and leave a fork of it in the cache.

        The work gets the loaded sequence and the cache gets the fork, because the fork may fail for lack of memory.
        """
        if self.disk is None:
            return None
        found = self.cache.find(work.ids, work.chain)
        stored = self.disk.find(work.ids, work.chain, above=(found[1] if found else 0) + SHORT_PROMPT)
        sequence = None if stored is None else self.disk.load(stored, work.ids, work.chain)
        if sequence is not None:
            with suppress(OutOfMemoryError):
                self.cache.add(work.ids, work.chain, self.pools.fork(sequence), Keep.TURN)
        return sequence

    def _store(self, work: Work, sequence: Sequence) -> None:
        if self.disk is not None and sequence.length >= SHORT_PROMPT:
            self.disk.store(work.ids, work.chain, sequence)

    def _checkpoint(self, work: Work, keep: Keep) -> None:
        """Take a checkpoint of the work's state, if evicting checkpoints of at most the same worth makes room for
        it."""
        assert work.sequence is not None
        work.checkpointed = work.sequence.length
        if self.cache.holds(work.ids, work.chain, work.sequence.length):
            return
        while True:
            try:
                fork = self.pools.fork(work.sequence)
            except OutOfMemoryError:
                if not self.cache.evict(at_most=keep):
                    return
            else:
                if keep is Keep.TURN:
                    self._store(work, fork)
                self.cache.add(work.ids, work.chain, fork, keep)
                return

    def _room_for(self, take: Callable[[], T], keep: Seq[Work]) -> T:
        """Call `take` until it finds memory; evict checkpoints first, then preempt works other than those in `keep`.

        Works with the lowest priority are preempted first, and among equals the least recently computed one.
        """
        while True:
            try:
                return take()
            except OutOfMemoryError:
                if self.cache.evict():
                    continue
                others = [other for other in self._live if other not in keep]
                if not others:
                    raise
                self.drop(min(others, key=lambda other: (other.priority, other.last_step)))


def _leaders(works: Seq[Work]) -> list[Work]:
    """Drop the works that have not begun and share a prefix with another work, which will compute it for them."""
    goals: set[bytes] = set()
    leaders = []
    for work in sorted(works, key=lambda work: work.computed == 0):
        if work.pending > 1:
            own = work.goals()
            if work.computed == 0 and goals & own:
                continue
            goals |= own
        leaders.append(work)
    return leaders
