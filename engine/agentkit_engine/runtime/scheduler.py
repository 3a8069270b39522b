"""Continuous batching: choose the sequences, token counts and memory of the next forward.

Dimension key: `runtime/__init__.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from collections.abc import Sequence as Seq
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from agentkit_engine.errors import OutOfMemoryError
from agentkit_engine.model.decoder import Decoder
from agentkit_engine.runtime import saved
from agentkit_engine.runtime.capacity import (
    KV_CACHE_BYTES,
    MemoryReader,
    pending_weights,
    plan,
    read_memory,
    within,
)
from agentkit_engine.runtime.disk_cache import DiskCache
from agentkit_engine.runtime.parallel import ParallelRunner
from agentkit_engine.runtime.prefix_cache import Keep, PrefixCache
from agentkit_engine.runtime.request import CHECKPOINT_EVERY, Request
from agentkit_engine.runtime.runner import CpuLimits, Runner
from agentkit_engine.runtime.scheduled import ScheduledTokens
from agentkit_engine.runtime.state import SPAN, KVCacheDtype, Pools, Sequence
from agentkit_engine.runtime.workers import Placement
from agentkit_engine.speculation import LONGEST
from agentkit_engine.weights.memory import GIB, available_memory

T = TypeVar("T")

MAX_NUM_BATCHED_TOKENS = 512
"""Maximum tokens per forward; bounds how long a decoding session waits for another session's prompt."""
SHORT_PROMPT = 16
"""Minimum tokens between two prompt-end checkpoints; computing fewer than this costs less than keeping a checkpoint."""


class Scheduler:
    """Owns the pools and runs the forwards of one model. Not thread-safe.

    Attributes:
        prefilled: ids that were fed and computed, counted each time.
        sampled: ids that were sampled and computed.
        drafted: draft ids that were computed; accepted ones count neither as prefilled nor as sampled.
        mtp_drafted: draft ids that came from the MTP block.
        speculate: whether to draft.
        mtp: whether the model's MTP block drafts too; always False for a model without one.
        disk: the disk cache for checkpoints, if there is one.
        capacity: what the pools of each device hold.
        steps: number of forwards.
    """

    def __init__(
        self,
        decoder: Decoder,
        *,
        kv_cache_bytes: int | None = None,
        host_cache_bytes: int = 0,
        exact: bool = True,
        backend: str = "auto",
        limits: CpuLimits | None = None,
        placement: Placement | None = None,
        kv_cache_dtype: KVCacheDtype = "auto",
        quantize_activations: bool = False,
        memory: MemoryReader | None = None,
    ) -> None:
        """`kv_cache_bytes` bounds the memory for spans; slots come on top. A CPU takes memory only as it is used.

        `host_cache_bytes` is host memory for state that the device has no room for. With a `placement` on several
        devices, each has an equal share of both. `memory` reads that of the device, by default if it is a GPU; then
        `kv_cache_bytes` is checked against what is free, or by default is what is free, on the first device.

        Raises:
            OutOfMemoryError: there is not enough memory for `kv_cache_bytes` or `host_cache_bytes`; nothing was
                allocated.
            WorkerLostError: a process of the placement did not start.
        """
        if host_cache_bytes > (left := available_memory()):
            raise OutOfMemoryError(
                f"host_cache_bytes={host_cache_bytes} needs {host_cache_bytes / GIB:.2f} GiB of host memory, and "
                f"this machine has {left / GIB:.2f} GiB; use less"
            )
        ranks = 1 if placement is None else placement.devices
        kv_cache_bytes = None if kv_cache_bytes is None else kv_cache_bytes // ranks
        host_cache_bytes //= ranks
        spec, device = decoder.spec, decoder.embed.weight.device
        sizes = Pools(spec, slots=1, spans=1, device=torch.device("meta"), kv_cache_dtype=kv_cache_dtype)
        memory = read_memory if memory is None and device.type == "cuda" else memory
        if memory is None:
            self.capacity = within(sizes, kv_cache_bytes or KV_CACHE_BYTES // ranks, host_cache_bytes)
        else:
            self.capacity = plan(
                spec,
                sizes,
                memory(device),
                batched_tokens=MAX_NUM_BATCHED_TOKENS,
                pending_bytes=pending_weights(
                    decoder, ranks=ranks, expert_cache_bytes=None if limits is None else limits.expert_cache_bytes
                ),
                kv_cache_bytes=kv_cache_bytes,
                host_cache_bytes=host_cache_bytes,
            )
        own = Pools(
            spec,
            slots=self.capacity.slots,
            spans=self.capacity.spans,
            device=device,
            kv_cache_dtype=kv_cache_dtype,
            host_slots=self.capacity.host_slots,
            host_spans=self.capacity.host_spans,
        )
        if placement is None:
            self.runner = Runner(
                decoder, own, exact=exact, backend=backend, limits=limits, quantize_activations=quantize_activations
            )
        else:
            self.runner = ParallelRunner(decoder, own, placement, exact=exact, backend=backend)
        self.pools = self.runner.pools
        self.cache = PrefixCache(self.pools)
        self.prefilled = self.sampled = self.drafted = self.mtp_drafted = 0
        self.speculate = True
        self.mtp = bool(decoder.mtp)
        self.disk: DiskCache | None = None
        self.steps = 0
        self._live: dict[Request, None] = {}
        self._positions = decoder.spec.max_position_embeddings - 1  # the longest length that leaves room for a draft id

    def step(self, requests: Seq[Request]) -> None:
        """Run one forward over the next ids of `requests`, all of which have pending ids.

        A request with nothing pending afterwards has `logits_V`.

        Raises:
            OutOfMemoryError: not even the first request fits, after all others gave up their memory.
        """
        guesses = self._mtp_drafts(requests)
        scheduled, others = self.schedule(requests, guesses)
        try:
            computed = self.runner.step(list(scheduled.values()))
        except BaseException:
            for request in scheduled:
                self.preempt(request)
            raise
        self.steps += 1
        row = 0
        for request, part in scheduled.items():
            request.last_step = self.steps
            if part.sequence.length == request.length:
                request._said, request._row, request._fresh, request._drafted = computed, row, True, part.draft
            row += 1
            if part.draft:
                row += len(part.draft)
                self.drafted += len(part.draft)
                self.mtp_drafted += request in guesses
        unsteady = set(others)
        for request, part in scheduled.items():
            if request in unsteady:
                self._account(request, len(part.ids))
            else:
                self.sampled += 1

    def schedule(
        self, requests: Seq[Request], guesses: dict[Request, int]
    ) -> tuple[dict[Request, ScheduledTokens], list[Request]]:
        """Choose the tokens of the next forward, at most `MAX_NUM_BATCHED_TOKENS`, and reserve memory for them.

        Decoding requests come first, then prompts by priority, and among equals the one that waited longest. A request
        whose prefix another is computing in this forward waits, and resumes from that state in a later step.

        Args:
            guesses: The MTP block's guess at the next id but one of a request, if it was asked.

        Returns:
            The tokens of each scheduled request, and the requests that needed memory or may need a checkpoint. Nearly
            all only add the id that they sampled last, and nearly always need neither.
        """
        scheduled: dict[Request, ScheduledTokens] = {}
        others: list[Request] = []
        spare = (MAX_NUM_BATCHED_TOKENS - len(requests)) // 2 if self.speculate else 0
        for request in requests:
            sequence, length = request.sequence, request.length
            if sequence is None or not (sequence.length + 1 == length <= sequence.steady_until) or request._fed[-1]:
                others.append(request)
                continue
            draft: Seq[int] = ()
            if spare > 0 and length < sequence.steady_until:
                most = min(spare, sequence.steady_until - length, LONGEST)
                draft = request.drafter.propose(request.ids, most, guesses.get(request))
                spare -= len(draft)
            scheduled[request] = ScheduledTokens(sequence, (request.ids.last[-1],), draft)
        if others:
            self._schedule_others(others, guesses, scheduled)
        return scheduled, others

    def _schedule_others(
        self, requests: Seq[Request], guesses: dict[Request, int], scheduled: dict[Request, ScheduledTokens]
    ) -> None:
        """Add requests to `scheduled`; those in it with a lower priority may be preempted."""
        for request in requests:
            self._check_length(request)
        left = [MAX_NUM_BATCHED_TOKENS] * self.pools.ranks
        for part in scheduled.values():
            left[part.sequence.rank] -= len(part)
        for request in sorted(_leaders(requests), key=lambda each: (each.pending != 1, -each.priority, each.last_step)):
            if max(left) <= 0:
                break
            try:
                keep = [other for other in scheduled if other.priority >= request.priority]
                chosen = self._schedule_one(request, left, keep, guesses.get(request))
            except OutOfMemoryError:
                if all(other.sequence is None for other in scheduled):
                    raise
                break
            if chosen is not None:
                scheduled[request] = chosen
                left[chosen.sequence.rank] -= len(chosen)
        for request in [each for each in scheduled if each.sequence is None]:  # it was preempted
            del scheduled[request]

    def _account(self, request: Request, count: int) -> None:
        """Account for the last `count` ids of the state, which are new, and take a checkpoint where one is due."""
        assert request.sequence is not None
        end = request.sequence.length
        fed = request.count(end - count, end, hit=False)
        self.prefilled += fed
        self.sampled += count - fed
        if request.marked(end) or (end % CHECKPOINT_EVERY == 0 and count > 1):
            self._checkpoint(request, Keep.TURN)
        elif fed and not request.jumped and not request.pending and end - request.checkpointed >= SHORT_PROMPT:
            self._checkpoint(request, Keep.PROMPT)
        request.sequence.steady_until = min(request.sequence.num_spans * SPAN, self._positions)

    def too_long(self, request: Request) -> bool:
        """Return whether the state exceeds the memory even with no other request in it."""
        return -(-request.length // SPAN) > self.pools.spans

    def _check_length(self, request: Request) -> None:
        """Refuse a request that can never fit, before any of it is computed."""
        if self.too_long(request):
            self.preempt(request)
            raise OutOfMemoryError(
                f"{request.length} ids need {-(-request.length // SPAN)} spans of memory, but there are "
                f"{self.pools.spans}; raise kv_cache_bytes"
            )

    def fits(self, requests: Seq[Request]) -> bool:
        """Return whether the states of all `requests`, with one more span each, fit into memory at once."""
        return self.pools.fits([(request.sequence, request.length) for request in requests])

    def mark(self, request: Request) -> None:
        """Take a checkpoint here, now or as soon as it is computed, for sessions that share this prefix."""
        if request.pending:
            request.mark()
        elif request.length:
            self._checkpoint(request, Keep.TURN)

    def truncate(self, request: Request, length: int) -> None:
        """Remove the ids from `length` on, and the state computed from them."""
        if length == request.length:
            return
        request.cut(length)
        sequence, kept = (
            request.sequence,
            length - 1,
        )  # the last id is computed again, because its logits were discarded
        if sequence is not None and sequence.length > kept:
            if kept >= 0 and sequence.reaches(kept):
                sequence.shorten(kept)
            else:
                self.preempt(request)

    def fork(self, request: Request) -> Request:
        """Return a request with the same ids that shares the state, if there is memory for the fork."""
        fork, sequence = request.fork(), request.sequence
        if sequence is not None:
            try:
                fork.sequence = self._room_for(lambda: self.pools.branch(sequence), keep=[request])
            except OutOfMemoryError:
                return fork
            self._live[fork], fork.last_step = None, self.steps
        return fork

    def resume(self, request: Request) -> None:
        """Restore a state for at least a part of the ids; the ids after that part become pending.

        Raises:
            OutOfMemoryError: there is no memory for the state.
        """
        if request.sequence is None and request.length:
            request.sequence = self._room_for(lambda: self._enter(request), keep=[])
            self._live[request], request.last_step = None, self.steps
            if request.pending:
                request.forget()

    def save(self, request: Request, path: Path, *, model: str) -> None:
        """Write ids and state to a file; see `saved.write`."""
        saved.write(path, list(request.ids), request.fed, request.sequence, self.pools, model=model)

    def open(self, path: Path, *, model: str) -> Request:
        """Read the request that `save` wrote, with its state.

        Raises:
            SavedSessionError, OSError: see `saved.read`.
            OutOfMemoryError: the state does not fit, after all others gave up their memory.
        """
        ids, fed, tensors, length, written = saved.read(path, model=model, pools=self.pools)
        request = Request(ids, fed)
        if length:
            request.sequence = sequence = self._room_for(self.pools.open, keep=[])
            try:
                self._room_for(lambda: self.pools.reserve(sequence, length), keep=[], rank=sequence.rank)
            except OutOfMemoryError:
                self.preempt(request)
                raise
            self.pools.write(sequence, 0, tensors)
            # the last id is computed again for its logits
            sequence.length, sequence.written = min(length, len(ids) - 1), written
            request.count(0, length, hit=True)
            self._live[request], request.last_step = None, self.steps
        return request

    def park(self, request: Request) -> None:
        """Move the state to the prefix cache, which may evict it to disk; the ids stay."""
        self._live.pop(request, None)
        request.let_go()
        sequence, request.sequence = request.sequence, None
        if sequence is None:
            return
        if sequence.length == 0:
            self.pools.close(sequence)
            return
        request.parked = parked = self.cache.add(request.ids, request.chain, sequence, Keep.TURN)

        def spill() -> None:
            if request.parked is parked:  # otherwise the ids may have changed since
                self._store(request, parked.sequence)

        parked.spill = spill

    def close(self, request: Request) -> None:
        """Leave the state to later sessions, including those of later processes."""
        self.park(request)
        if request.parked is not None and request.parked in self.cache:
            self._store(request, request.parked.sequence)

    def _set_aside(self, request: Request) -> None:
        """Let the state be evicted: to host memory if there is some, else by freeing it."""
        if self.pools.tiered:
            self.park(request)
        else:
            self.preempt(request)

    def preempt(self, request: Request) -> None:
        """Free the state. The ids stay and are recomputed with the next forward; logits that exist stay too."""
        self._live.pop(request, None)
        if request.sequence is not None:
            self.pools.close(request.sequence)
            request.sequence = None

    def logits(self, ids: Seq[int], *, chunk: int = MAX_NUM_BATCHED_TOKENS) -> Tensor:
        """Compute the logits after every id from scratch, `chunk` ids at a time: float32 [T, V]."""
        return torch.cat(list(self._logits_from_scratch(ids, chunk)))

    def logprobs(self, ids: Seq[int], *, chunk: int = MAX_NUM_BATCHED_TOKENS) -> Tensor:
        """Compute the log-probability of every id but the first, given those before it: float32 [T - 1].

        Only the logits of `chunk` ids are in memory at a time.
        """
        parts: list[Tensor] = []
        start = 1
        for logits_RV in self._logits_from_scratch(ids, chunk):
            next_ids_R1 = torch.tensor(ids[start : start + len(logits_RV)], dtype=torch.int64)[:, None]
            logprobs_RV = torch.log_softmax(logits_RV[: len(next_ids_R1)].float(), dim=1)
            parts.append(logprobs_RV.gather(1, next_ids_R1.to(logprobs_RV.device))[:, 0].cpu())
            start += len(logits_RV)
        return torch.cat(parts)

    def _logits_from_scratch(self, ids: Seq[int], chunk: int) -> Iterator[Tensor]:
        """Yield the logits after every id, `chunk` ids at a time: float32 [R, V]."""
        request = Request(ids)
        self._check_length(request)
        try:
            request.sequence = self._room_for(self.pools.open, keep=[])
            while request.pending:
                part = self._schedule_one(request, [chunk] * self.pools.ranks, keep=[])
                assert part is not None
                yield self.runner.step([part], all_rows=True).logits_RV
        finally:
            self.preempt(request)

    def _mtp_drafts(self, requests: Seq[Request]) -> dict[Request, int]:
        """Ask the MTP block once for its guesses at the next id of all requests that may draft from it."""
        asking: list[Request] = []
        streams: list[Tensor] = []
        if self.speculate and self.mtp:
            for request in requests:
                if request.guessable and request.streams_MD is not None and request.drafter.asks(request.ids):
                    asking.append(request)
                    streams.append(request.streams_MD)
        if not asking:
            return {}
        guesses = self.runner.mtp_draft(torch.stack(streams), [request.ids[-1] for request in asking])
        return dict(zip(asking, guesses, strict=True))

    def _schedule_one(
        self, request: Request, left: Seq[int], keep: Seq[Request], guess: int | None = None
    ) -> ScheduledTokens | None:
        """Return the request's next ids, with memory reserved for them; None if its rank has no tokens `left`.

        Requests other than those in `keep` may be preempted for it.
        """
        self._live.pop(request, None)
        try:
            if request.sequence is None:
                request.sequence = self._room_for(lambda: self._enter(request), keep)
            sequence = request.sequence
            if (budget := left[sequence.rank]) <= 0:
                self._live[request] = None
                return None
            end = min(sequence.length + budget, request.length, request.next_stop())
            room = min(budget - 1, self.pools.spec.max_position_embeddings - end - 1, LONGEST) if self.speculate else 0
            draft = request.draft(room, guess) if room > 0 else []
            self._room_for(lambda: self.pools.reserve(sequence, end + len(draft)), keep, rank=sequence.rank)
        except OutOfMemoryError as error:
            length = min(request.computed + max(left), request.length)
            self._set_aside(request)
            raise OutOfMemoryError(
                f"no memory for a sequence of {length} tokens beside {len(keep)} of the same step: {error}"
            ) from error
        self._live[request] = None
        return ScheduledTokens(sequence, request.ids[sequence.length : end], draft)

    def _enter(self, request: Request) -> Sequence:
        """Return a sequence with the longest prefix of the ids that the caches hold; a parked request gets its own
        back."""
        own = None if request.parked is None else self.cache.give_back(request.parked)
        request.parked = None
        if own is not None:
            return own
        sequence = self._fetch(request) or self.cache.take(request.ids, request.chain)
        if sequence is None:
            return self.pools.open()
        request.checkpointed = sequence.length
        request.count(0, sequence.length, hit=True)
        return sequence

    def _fetch(self, request: Request) -> Sequence | None:
        """Load a checkpoint from disk, if it saves more than those in memory, and leave a fork of it in the cache.

        The request gets the loaded sequence and the cache gets the fork, because the fork may fail for lack of memory.
        """
        if self.disk is None:
            return None
        found = self.cache.find(request.ids, request.chain)
        stored = self.disk.find(request.ids, request.chain, above=(found[1] if found else 0) + SHORT_PROMPT)
        sequence = None if stored is None else self.disk.load(stored, request.ids, request.chain)
        if sequence is not None:
            with suppress(OutOfMemoryError):
                self.cache.add(request.ids, request.chain, self.pools.fork(sequence), Keep.TURN)
        return sequence

    def _store(self, request: Request, sequence: Sequence) -> None:
        if self.disk is not None and sequence.length >= SHORT_PROMPT:
            self.disk.store(request.ids, request.chain, sequence)

    def _checkpoint(self, request: Request, keep: Keep) -> None:
        """Take a checkpoint of the request's state, if evicting checkpoints of at most the same worth makes room for
        it."""
        assert request.sequence is not None
        request.checkpointed = request.sequence.length
        if self.cache.holds(request.ids, request.chain, request.sequence.length):
            return
        while True:
            try:
                fork = self.pools.fork(request.sequence)
            except OutOfMemoryError:
                if not self.cache.evict(at_most=keep, rank=request.sequence.rank):
                    return
            else:
                if keep is Keep.TURN:
                    self._store(request, fork)
                self.cache.add(request.ids, request.chain, fork, keep)
                return

    def _room_for(self, take: Callable[[], T], keep: Seq[Request], *, rank: int | None = None) -> T:
        """Call `take` until it finds memory, on `rank` or on any; evict checkpoints first, then preempt requests that
        are not in `keep`.

        Works with the lowest priority are preempted first, and among equals the least recently computed one.
        """
        while True:
            try:
                return take()
            except OutOfMemoryError:
                if self.cache.evict(rank=rank):
                    continue
                others = [each for each in self._live if each not in keep and _on(each, rank)]
                if not others:
                    raise
                self._set_aside(min(others, key=lambda other: (other.priority, other.last_step)))


def _on(request: Request, rank: int | None) -> bool:
    return rank is None or (request.sequence is not None and request.sequence.rank == rank)


def _leaders(requests: Seq[Request]) -> list[Request]:
    """Drop the requests that have not begun and share a prefix with another request, which will compute it for them."""
    goals: set[bytes] = set()
    leaders = []
    for request in sorted(requests, key=lambda request: request.computed == 0):
        if request.pending > 1:
            own = request.goals()
            if request.computed == 0 and goals & own:
                continue
            goals |= own
        leaders.append(request)
    return leaders
