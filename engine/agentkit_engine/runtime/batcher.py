"""Continuous batching: which sequences take part in the next forward, with how many tokens, in which memory.

A `Work` is the computation of one session: its ids, and the state computed from them so far. State is only ever
derived from ids, so it can be dropped whenever memory is short and computed again; because forwards are the same bits
whatever their batch, nobody can tell. For the same reason a work may take up what another one left in the prefix cache.

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
"""Most tokens of one forward: what a decoding session may have to wait for another's prompt."""
SLOTS = 64
"""Sequences that can be live at once at least; a session that finds no slot takes that of whoever waited longest."""
CHECKPOINTS = 192
"""Slots beyond these, for checkpoints, as far as a quarter of the memory for spans would hold them."""
CHECKPOINT_EVERY = 8192
"""Tokens of a long prompt between two checkpoints."""
SHORT_PROMPT = 16
"""The end of a prompt gets no checkpoint this close behind another: to compute the tokens between costs less."""


@dataclass(frozen=True, slots=True)
class PromptUsage:
    """What became of the ids that were fed, once each: found in the prefix cache, or computed."""

    hit_tokens: int = 0
    miss_tokens: int = 0


class Work:
    """One session's ids and what is computed of them.

    Attributes:
        ids: every id, computed or not.
        length: how many they are.
        priority: works of a higher one have their prompts computed first, and keep their state longer.
        last_step: when it last took part in a forward.
        checkpointed: the length at which a checkpoint was last taken or taken up.
        jumped: the ids fed last were forced by a grammar, not a prompt.
        parked: what the state became when it was given up for a while.
    """

    def __init__(self, ids: Seq[int] = (), fed: Seq[int] | None = None, *, priority: int = 0) -> None:
        """`fed` has a 1 for each id that was fed, a 0 for each that was sampled; by default all were fed."""
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
        self._said: Computed | None = None  # what said what follows the last id, or that one itself
        self._row = 0
        self._fresh = False  # whether that is what follows the last id
        self._drafted: Seq[int] = ()  # the ids of the rows after this one
        self._fed = bytearray(b"\1" * len(self.ids) if fed is None else fed)
        self._marks: list[int] = []
        self._counted = self._hits = self._misses = 0

    @property
    def logits_V(self) -> Tensor | None:
        """The logits after the last id, once everything is computed."""
        return self._said.logits_RV[self._row] if self._fresh and self._said is not None else None

    @property
    def streams_MD(self) -> Tensor | None:
        """The residual streams of which `logits_V` was made, or what the last id was sampled from."""
        return None if self._said is None else self._said.streams_RMD[self._row]

    @property
    def usage(self) -> PromptUsage:
        """Of the ids that were fed, not sampled."""
        return PromptUsage(self._hits, self._misses)

    @property
    def computed(self) -> int:
        return 0 if self.sequence is None else self.sequence.length

    @property
    def fed(self) -> bytes:
        """For each id a 1 when it was fed, a 0 when it was sampled."""
        return bytes(self._fed)

    def past(self) -> tuple[list[int], list[int]]:
        """Every id, and those that were sampled."""
        return list(self.ids), [token_id for token_id, fed in zip(self.ids, self._fed, strict=True) if not fed]

    @property
    def pending(self) -> int:
        """How many ids the next forwards have to take in before there are logits."""
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
        """Append a sampled id, or one that a grammar forced. Where it was drafted, its state and the logits after it
        are there already.
        """
        self.ids.append(token_id)
        self.length += 1
        self._fed.append(forced)
        self.jumped = forced
        self._fresh = False
        if not self._drafted:
            if forced:
                self._said = None
            return
        first, self._drafted = self._drafted[0], self._drafted[1:]
        if first != token_id or self.sequence is None:
            self._drafted = ()
            self._said = None if forced else self._said
            return
        self.drafter.accepted()
        self.sequence.length += 1
        self.count(self.sequence.length - 1, self.sequence.length, hit=False)
        self._row, self._fresh = self._row + 1, True

    @property
    def guessable(self) -> bool:
        """Whether the last id was sampled and is all that is pending."""
        return self.pending == 1 and not self._fed[-1]

    def draft(self, most: int, first: int | None = None) -> list[int]:
        """Guesses at the ids to come, `first` being the MTP block's at the next one, if it was asked."""
        return self.drafter.propose(self.ids, most, first) if self.guessable else []

    def mark(self) -> None:
        """Have a checkpoint taken at this length, once it is computed."""
        self._marks.append(self.length)
        if self.sequence is not None:
            self.sequence.steady_until = 0

    def marked(self, length: int) -> bool:
        return length in self._marks

    def next_stop(self) -> int:
        """Where the next forward has to end at the latest, so that a checkpoint can be taken there."""
        long = (self.computed // CHECKPOINT_EVERY + 1) * CHECKPOINT_EVERY
        return min((mark for mark in self._marks if mark > self.computed), default=long)

    def goals(self) -> set[bytes]:
        """What will be found in the cache once this is computed: hashes of the ids up to each mark, and of all ids."""
        lengths = {mark for mark in self._marks if mark > self.computed} | {self.length}
        return {self.chain.key(self.ids, length) for length in lengths}

    def cut(self, length: int) -> None:
        """Forget the ids from `length` on."""
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
        """Account for the ids from `start` to `end`, now part of the state; how many of them were fed."""
        news = sum(self._fed[max(start, self._counted) : end])
        self._counted = max(self._counted, end)
        if hit:
            self._hits += news
        else:
            self._misses += news
        return sum(self._fed[start:end])

    def fork(self) -> Work:
        """The same ids, without the state."""
        fork = Work(self.ids, self._fed, priority=self.priority)
        fork._said, fork._row, fork._fresh, fork.chain = self._said, self._row, self._fresh, self.chain.copy()
        fork._counted, fork.checkpointed = self._counted, self.checkpointed
        fork.drafter = self.drafter.fork(self.ids)
        return fork

    def forget(self) -> None:
        """Hold nothing of the last forward."""
        self._said, self._fresh, self._drafted = None, False, ()

    def let_go(self) -> None:
        """Hold no more of the last forward than goes on without a state."""
        if self._said is not None:
            self._said, self._row = self._said.only(self._row) if self._fresh else None, 0
        self._drafted = ()


class Batcher:
    """Owns the pools and runs the forwards of one model. One thread at a time.

    Attributes:
        prefilled: ids that were fed and went through a forward, each time they did.
        sampled: ids that were sampled and went through a forward.
        drafted: ids that were guessed and went through a forward; those that were right count as neither.
        foreseen: of these, ids that the MTP block guessed.
        speculate: whether to guess.
        mtp: whether the model's MTP block guesses too; never where there is none.
        disk: where checkpoints that are worth keeping are also stored and looked for, if anywhere.
        steps: forwards.
    """

    def __init__(self, decoder: Decoder, *, state_bytes: int, exact: bool = True, compiled: bool | None = None) -> None:
        """`state_bytes` bounds what spans may take, slots come on top; on a CPU memory is taken as it is used."""
        device = decoder.embed.weight.device
        sizes = Pools(decoder.spec, slots=1, spans=1, device=torch.device("meta"))
        spans = max(1, min(state_bytes // max(1, sizes.bytes_per_span), 1 << 20))
        slots = SLOTS + min(CHECKPOINTS, state_bytes // 4 // sizes.bytes_per_slot)
        self.pools = Pools(decoder.spec, slots=slots, spans=spans, device=device)
        self.cache = PrefixCache(self.pools)
        self.runner = Runner(decoder, self.pools, exact=exact, compiled=compiled)
        self.prefilled = self.sampled = self.drafted = self.foreseen = 0
        self.speculate = True
        self.mtp = bool(decoder.mtp)
        self.disk: DiskCache | None = None
        self.steps = 0
        self._live: dict[Work, None] = {}
        self._positions = decoder.spec.max_position_embeddings - 1  # up to here there is room for a guess

    def advance(self, works: Seq[Work]) -> None:
        """One forward over the next ids of `works`, all of which have pending ones.

        Those that decode come first; then prompts, by priority, and then the one that waited longest first, until
        `TOKEN_BUDGET` is spent. Whoever has nothing pending afterwards has its `logits_V`. A work that begins with what
        another one is just computing waits, and takes it up in a later step.

        Raises:
            OutOfMemoryError: not even the first of them fits into the memory that others can give up.
        """
        firsts = self._foresee(works)
        chosen, segments, others = self._steady(works, firsts)
        steady = len(chosen)
        if others:
            self._choose(others, firsts, chosen, segments)
            if any(work.sequence is None for work in chosen):  # they had to give way
                steady = sum(work.sequence is not None for work in chosen[:steady])
                kept = [pair for pair in zip(chosen, segments, strict=True) if pair[0].sequence is not None]
                chosen, segments = [work for work, _ in kept], [segment for _, segment in kept]
        try:
            computed = self.runner.step(segments)
        except BaseException:
            for work in chosen:
                self.drop(work)
            raise
        self.steps += 1
        row = 0
        for work, segment in zip(chosen, segments, strict=True):
            work.last_step = self.steps
            draft = segment.draft
            if segment.sequence.length == work.length:
                work._said, work._row, work._fresh, work._drafted = computed, row, True, draft
            row += 1
            if draft:
                row += len(draft)
                self.drafted += len(draft)
                self.foreseen += work in firsts
        self.sampled += steady
        if others:
            for work, segment in zip(chosen[steady:], segments[steady:], strict=True):
                self._account(work, len(segment.ids))

    def _steady(self, works: Seq[Work], firsts: dict[Work, int]) -> tuple[list[Work], list[Segment], list[Work]]:
        """Those that take in the id they sampled last, and need no memory for it and leave no checkpoint: what nearly
        all of them do nearly always. And the others.
        """
        chosen: list[Work] = []
        segments: list[Segment] = []
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
            chosen.append(work)
            segments.append(Segment(sequence, (work.ids.last[-1],), draft))
        return chosen, segments, others

    def _choose(self, works: Seq[Work], firsts: dict[Work, int], chosen: list[Work], segments: list[Segment]) -> None:
        """Add to `chosen` and `segments` what else goes into this forward; lower priorities may have to give way."""
        for work in works:
            self._check_length(work)
        budget = TOKEN_BUDGET - sum(map(len, segments))
        for work in sorted(_leaders(works), key=lambda work: (work.pending != 1, -work.priority, work.last_step)):
            if budget <= 0:
                break
            try:
                keep = [other for other in chosen if other.priority >= work.priority]
                segment = self._segment(work, budget, keep, first=firsts.get(work))
            except OutOfMemoryError:
                if all(other.sequence is None for other in chosen):
                    raise
                break
            segments.append(segment)
            chosen.append(work)
            budget -= len(segment)

    def _account(self, work: Work, count: int) -> None:
        """Count the last `count` ids of its state, which are new, and leave a checkpoint where one is wanted."""
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
        """Whether its state would not even fit into memory alone."""
        return -(-work.length // SPAN) > self.pools.spans

    def _check_length(self, work: Work) -> None:
        """Refuse what is too long before any of it is computed in vain."""
        if self.too_long(work):
            self.drop(work)
            raise OutOfMemoryError(
                f"{work.length} ids need {-(-work.length // SPAN)} spans of memory, and there are {self.pools.spans}; "
                "raise state_bytes"
            )

    def fits(self, works: Seq[Work]) -> bool:
        """Whether the state of all these fits into memory at once, with a span more for each."""
        held: set[int] = set()
        missing = 0
        for work in works:
            spans = [] if work.sequence is None else work.sequence.spans
            held.update(spans)
            missing += max(0, -(-work.length // SPAN) + 1 - len(spans))
        return len(held) + missing <= self.pools.spans and len(works) <= self.pools.slots

    def mark(self, work: Work) -> None:
        """Have a checkpoint taken here, now or once it is computed, for sessions that begin with these ids."""
        if work.pending:
            work.mark()
        elif work.length:
            self._checkpoint(work, Keep.TURN)

    def truncate(self, work: Work, length: int) -> None:
        """Forget the ids from `length` on, and what was computed of them."""
        if length == work.length:
            return
        work.cut(length)
        sequence, kept = work.sequence, length - 1  # the last one is computed again: its logits are gone
        if sequence is not None and sequence.length > kept:
            if kept >= 0 and sequence.reaches(kept):
                sequence.shorten(kept)
            else:
                self.drop(work)

    def fork(self, work: Work) -> Work:
        """A second work with the same ids, sharing the state as far as there is room for a fork of it."""
        fork, sequence = work.fork(), work.sequence
        if sequence is not None:
            try:
                fork.sequence = self._room_for(lambda: self.pools.fork(sequence), keep=[work])
            except OutOfMemoryError:
                return fork
            self._live[fork], fork.last_step = None, self.steps
        return fork

    def resume(self, work: Work) -> None:
        """Have a state again, if only of some of the ids: then what follows them is pending, whatever was said of it.

        Raises:
            OutOfMemoryError: there is no room for it.
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
        """The work that `save` wrote, with its state.

        Raises:
            SavedSessionError, OSError: see `saved.read`.
            OutOfMemoryError: the state does not fit into the memory that others can give up.
        """
        ids, fed, tensors, length, written = saved.read(path, model=model, layout=saved.layout(self.pools))
        work = Work(ids, fed)
        if length:
            work.sequence = sequence = self._room_for(self.pools.open, keep=[])
            try:
                self._room_for(lambda: self.pools.reserve(sequence, length), keep=[])
            except OutOfMemoryError:
                self.drop(work)
                raise
            saved.restore(self.pools, sequence, tensors)
            sequence.length, sequence.written = min(length, len(ids) - 1), written  # the last id again, for its logits
            work.count(0, length, hit=True)
            self._live[work], work.last_step = None, self.steps
        return work

    def park(self, work: Work) -> None:
        """Give the state up to the prefix cache, where it stays while there is room, and then to disk; the ids stay."""
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
            if work.parked is parked:  # else its ids may be others by now
                self._store(work, parked.sequence)

        parked.spill = spill

    def close(self, work: Work) -> None:
        """Leave the state to the sessions that come, those of later processes included."""
        self.park(work)
        if work.parked is not None and work.parked in self.cache:
            self._store(work, work.parked.sequence)

    def drop(self, work: Work) -> None:
        """Free the state; the ids stay, and are computed again when the next ones are. So do logits that are there."""
        self._live.pop(work, None)
        if work.sequence is not None:
            self.pools.close(work.sequence)
            work.sequence = None

    def logits(self, ids: Seq[int], *, chunk: int = TOKEN_BUDGET) -> Tensor:
        """The logits after every id, float32 [T, V], computed from scratch, `chunk` ids at a time."""
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

    def _foresee(self, works: Seq[Work]) -> dict[Work, int]:
        """The MTP block's guesses, in one pass for all of `works` whose guesses it may begin."""
        asking: list[Work] = []
        streams: list[Tensor] = []
        if self.speculate and self.mtp:
            for work in works:
                if work.guessable and work.streams_MD is not None and work.drafter.asks(work.ids):
                    asking.append(work)
                    streams.append(work.streams_MD)
        if not asking:
            return {}
        guesses = self.runner.foresee(torch.stack(streams), [work.ids[-1] for work in asking])
        return dict(zip(asking, guesses, strict=True))

    def _segment(self, work: Work, budget: int, keep: Seq[Work], first: int | None = None) -> Segment:
        """The work's next ids, at most `budget`, with room for them; others than `keep` may lose their state for it."""
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
        """A sequence that holds as many of the ids as the cache knows; where the work was parked, its own."""
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
        """A checkpoint from disk, if one saves more than those in the cache, and a fork of it for others.

        The work gets what was loaded, not the fork: taking the fork could fail for want of memory that it holds itself.
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
        """Leave a checkpoint of the work's state, if there is room but for what is worth less."""
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
        """What `take` gives, once there is memory for it: first checkpoints go, then the state of works but `keep`.

        Of these, those of the lowest priority go first, and among equals the one that was not computed for longest.
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
    """The works but those not yet begun whose goal is also another one's."""
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
