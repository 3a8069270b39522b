"""State that the device has no room for moves to host memory and comes back: the same bits, each span once, no leak.

The device here is a CPU whose pools are tiny.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from agentkit_engine import Engine, ModelSpec, OutOfMemoryError, SamplingParams, Session
from agentkit_engine.model import Decoder
from agentkit_engine.runtime import Pools, Sequence
from agentkit_engine.runtime.host_tier import HostTier
from agentkit_engine.runtime.prefix_cache import IdChain, Keep, PrefixCache
from agentkit_engine.runtime.state import ROLLBACK, SPAN, Rows

from .conftest import make_random_decoder, small_config, some_ids

CPU = torch.device("cpu")
SPEC = ModelSpec.from_config(small_config(0, 4, 128, sliding_window=48, index_topk=8))
ROWS = [
    [Rows("token", "span", SPAN, 1, torch.int32), Rows("pair", "span", SPAN // 2, 3, torch.uint8)],
    [Rows("stamp", "slot", 2, 1, torch.int32, fill=7), Rows("flag", "slot", 1, 1, torch.bool)],
]
"""One row per token and one per two tokens, of a size that aligns nothing; and two kinds of rows per slot."""
PARAMS = SamplingParams(temperature=0, max_tokens=3)


def make_pools(*, slots: int = 4, spans: int = 6, host_slots: int = 6, host_spans: int = 8) -> Pools:
    return Pools(SPEC, device=CPU, rows=ROWS, slots=slots, spans=spans, host_slots=host_slots, host_spans=host_spans)


def host_of(pools: Pools) -> HostTier:
    assert pools.host is not None
    return pools.host


def append(pools: Pools, sequence: Sequence, values: list[int]) -> None:
    """Do what a forward does: reserve, write a row per token and the slot, grow."""
    pools.reserve(sequence, sequence.length + len(values))
    tokens, pairs = pools.entries
    for value in values:
        span, row = divmod(sequence.length, SPAN)
        tokens[sequence.spans[span], row, 0] = value
        pairs[sequence.spans[span], row // 2] = value % 251
        sequence.length += 1
    sequence.written = max(sequence.written, sequence.length)
    pools.tails[0][sequence.slot, 0] = values[-1]


def contents(pools: Pools, sequence: Sequence) -> tuple[list[int], int]:
    """Return the row of each token, checked against the other kind of rows, and the slot's stamp."""
    rows = pools.read(sequence, 0, -(-sequence.length // SPAN))
    values = rows["entries.0"].flatten()[: sequence.length] if sequence.length else torch.empty(0)
    if sequence.length % 2 == 0 and sequence.length:
        assert torch.equal(rows["entries.1"].reshape(-1, 3)[: sequence.length // 2, 0], (values[1::2] % 251).byte())
    stamp = rows["tail.0"].flatten().tolist()
    assert stamp[1] == 7 and rows["tail.1"].dtype == torch.bool
    return values.tolist(), stamp[0]


class Tiers(RuleBasedStateMachine):
    """Random operations on pools with few places, against a list of values per sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.pools = make_pools()
        self.live: list[tuple[Sequence, list[int], int]] = []
        self.values = iter(range(1, 1 << 30))

    def _take(self, data: st.DataObject, *, on_host: bool | None = None) -> int | None:
        some = [at for at, (each, _, _) in enumerate(self.live) if on_host is None or each.on_host == on_host]
        return data.draw(st.sampled_from(some)) if some else None

    @rule()
    def open(self) -> None:
        before = self.pools.free_slots
        try:
            self.live.append((self.pools.open(), [], 7))
        except OutOfMemoryError:
            assert before == 0

    @rule(data=st.data(), count=st.sampled_from([1, 3, 200, SPAN, 300]))
    def extend(self, data: st.DataObject, count: int) -> None:
        if (at := self._take(data, on_host=False)) is None:
            return
        sequence, values, _ = self.live[at]
        news = [next(self.values) for _ in range(count)]
        try:
            append(self.pools, sequence, news)
        except OutOfMemoryError:
            return
        self.live[at] = (sequence, values + news, news[-1])

    @rule(data=st.data(), count=st.integers(1, ROLLBACK))
    def shorten(self, data: st.DataObject, count: int) -> None:
        if (at := self._take(data, on_host=False)) is None:
            return
        sequence, values, stamp = self.live[at]
        if sequence.length >= count and sequence.reaches(sequence.length - count):
            sequence.shorten(sequence.length - count)
            self.live[at] = (sequence, values[: len(values) - count], stamp)

    @rule(data=st.data())
    def fork(self, data: st.DataObject) -> None:
        if (at := self._take(data)) is None:
            return
        source, values, stamp = self.live[at]
        try:
            fork = self.pools.branch(source)
        except OutOfMemoryError:
            return
        assert not fork.on_host and fork.written == source.written
        self.live.append((fork, values, stamp))

    @rule(data=st.data())
    def demote(self, data: st.DataObject) -> None:
        if (at := self._take(data, on_host=False)) is None:
            return
        sequence, host = self.live[at][0], host_of(self.pools)
        roomy = host.slots.free > 0 and host.spans.free >= -(-sequence.length // SPAN)
        slots = self.pools.free_slots
        moved = self.pools.demote(sequence)
        assert moved == sequence.on_host and self.pools.free_slots == slots + moved
        assert moved or not roomy
        assert self.pools.may_demote(sequence) or not moved

    @rule(data=st.data())
    def promote(self, data: st.DataObject) -> None:
        if (at := self._take(data, on_host=True)) is None:
            return
        sequence = self.live[at][0]
        roomy = self.pools.free_slots > 0 and self.pools.free_spans >= sequence.num_spans
        try:
            self.pools.promote(sequence)
        except OutOfMemoryError:
            assert not roomy
        else:
            assert not sequence.on_host

    @precondition(lambda self: len(self.live) > 2)
    @rule(data=st.data())
    def close(self, data: st.DataObject) -> None:
        at = self._take(data)
        assert at is not None
        self.pools.close(self.live.pop(at)[0])

    @invariant()
    def every_sequence_has_its_rows(self) -> None:
        for sequence, values, stamp in self.live:
            assert contents(self.pools, sequence) == (values, stamp)

    @invariant()
    def places_in_use_are_those_of_the_sequences(self) -> None:
        host = host_of(self.pools)
        for places, kept, on_host in ((self.pools._spans, "spans", False), (host.spans, "spans", True)):
            held = [span for each, _, _ in self.live if each.on_host == on_host for span in getattr(each, kept)]
            assert places.holders == {span: held.count(span) for span in held}
            assert places.used == len(set(held))
        assert self.pools._slots.used == sum(not each.on_host for each, _, _ in self.live)
        assert host.slots.used == sum(each.on_host for each, _, _ in self.live)

    @invariant()
    def pairs_have_the_same_bytes(self) -> None:
        host = host_of(self.pools)
        assert host._device_of == {there: here for here, there in host._host_of.items()}
        for here, there in host._host_of.items():
            assert self.pools._spans.holders[here] and host.spans.holders[there]
            ours, theirs = self.pools.read_rows(None, [here]), host.read(None, [there])
            assert all(torch.equal(rows, theirs[name]) for name, rows in ours.items())

    def teardown(self) -> None:
        for sequence, _, _ in self.live:
            self.pools.close(sequence)
        host = host_of(self.pools)
        assert self.pools.bytes_held == self.pools.host_bytes_held == 0
        assert not host._host_of and not host._device_of


Tiers.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
test_random_moves_change_no_row_and_leak_nothing = Tiers.TestCase


def filled(pools: Pools, length: int) -> Sequence:
    sequence = pools.open()
    append(pools, sequence, list(range(1, length + 1)))
    return sequence


def test_a_span_shared_by_forks_moves_once_in_each_direction() -> None:
    pools = make_pools()
    stats = host_of(pools).stats
    source = filled(pools, 2 * SPAN + 10)
    forks = [source, pools.fork(source), pools.fork(source)]
    assert all(map(pools.demote, forks))
    assert (stats.stored_slots, stats.stored_spans) == (3, 2 + 3)  # each has an open span of its own
    assert pools.bytes_held == 0
    for fork in forks:
        pools.promote(fork)
    assert (stats.loaded_slots, stats.loaded_spans) == (3, 2 + 3)
    assert pools.host_bytes_held == 0
    assert forks[0].spans[:2] == forks[1].spans[:2] == forks[2].spans[:2]
    for fork in forks:
        assert contents(pools, fork) == ([*range(1, 2 * SPAN + 11)], 2 * SPAN + 10)


def test_a_fork_of_a_sequence_in_host_memory_leaves_it_there_and_is_not_copied_again() -> None:
    pools = make_pools()
    stats = host_of(pools).stats
    source = filled(pools, 2 * SPAN)
    assert pools.demote(source)
    fork = pools.branch(source)
    assert source.on_host and not fork.on_host
    append(pools, fork, [1000])
    assert pools.demote(fork)
    assert stats.stored_spans == 2 + 1  # the full spans were still there
    assert contents(pools, source)[0] == [*range(1, 2 * SPAN + 1)]
    assert contents(pools, fork)[0] == [*range(1, 2 * SPAN + 1), 1000]


def test_a_span_that_is_written_again_is_copied_again() -> None:
    pools = make_pools()
    source = filled(pools, 2 * SPAN)
    assert pools.demote(source)
    fork = pools.branch(source)
    fork.shorten(2 * SPAN - 5)
    append(pools, fork, [9] * 5)
    assert pools.demote(fork)
    assert host_of(pools).stats.stored_spans == 3
    assert contents(pools, source)[0][-5:] == [508, 509, 510, 511, 512]
    assert contents(pools, fork)[0][-5:] == [9] * 5


def test_a_move_that_does_not_fit_changes_nothing() -> None:
    pools = make_pools(slots=2, spans=3, host_slots=2, host_spans=2)
    large = filled(pools, 2 * SPAN + 1)
    assert not pools.may_demote(large) and not pools.demote(large)
    pools.close(large)
    small = filled(pools, SPAN + 1)
    assert pools.may_demote(small) and pools.demote(small)
    blocker = filled(pools, 2 * SPAN)
    with pytest.raises(OutOfMemoryError, match="2 spans are in host memory, and 1 of 3 are free"):
        pools.promote(small)
    assert small.on_host and (pools.free_slots, pools.free_spans) == (1, 1)
    assert not pools.demote(blocker) and not blocker.on_host
    pools.close(blocker)
    pools.promote(small)
    assert contents(pools, small)[0] == [*range(1, SPAN + 2)]


@pytest.mark.parametrize("method", ["store", "load"])
@pytest.mark.parametrize("after", [0, 1])
def test_a_copy_that_fails_changes_nothing(method: str, after: int, monkeypatch: pytest.MonkeyPatch) -> None:
    pools = make_pools()
    host = host_of(pools)
    sequence = filled(pools, SPAN + 1)
    if method == "load":
        assert pools.demote(sequence)
    before = (pools.bytes_held, pools.host_bytes_held, dict(host._host_of))
    copy, calls = getattr(host, method), iter(range(9))

    def failing(*arguments: object) -> object:
        if next(calls) == after:
            raise RuntimeError("the device is gone")
        return copy(*arguments)

    monkeypatch.setattr(host, method, failing)
    with pytest.raises(RuntimeError, match="the device is gone"):
        (pools.demote if method == "store" else pools.promote)(sequence)
    monkeypatch.undo()
    assert (pools.bytes_held, pools.host_bytes_held, host._host_of) == before
    assert contents(pools, sequence)[0] == [*range(1, SPAN + 2)]


def test_host_memory_keeps_the_checkpoints_of_the_highest_value() -> None:
    pools = make_pools(host_slots=1)
    cache, ids = PrefixCache(pools), some_ids(3 * SPAN)

    def add(length: int, keep: Keep) -> None:
        cache.add(ids, IdChain(), filled(pools, length), keep)

    def kept() -> list[int]:
        return [length for length in (5, 10, 15, 20) if cache.holds(ids, IdChain(), length)]

    add(5, Keep.PROMPT)
    add(10, Keep.TURN)
    assert cache.evict() and kept() == [5, 10]  # 5 moves
    assert cache.evict() and kept() == [10]  # 10 takes its place
    add(15, Keep.PROMPT)
    assert cache.evict() and kept() == [10]
    add(20, Keep.TURN)
    assert cache.evict() and kept() == [20]
    assert pools.bytes_held == 0 and not cache.evict() and len(cache) == 1
    found = cache.take([*ids[:20], 7], IdChain())
    assert found is not None and (found.length, found.on_host) == (20, False)


def test_a_checkpoint_that_is_added_again_is_on_the_device() -> None:
    pools = make_pools()
    cache, ids = PrefixCache(pools), some_ids(SPAN)
    first = cache.add(ids, IdChain(), filled(pools, 10), Keep.TURN)
    assert cache.evict() and first.sequence.on_host
    assert cache.add(ids, IdChain(), filled(pools, 10), Keep.TURN) is first and not first.sequence.on_host
    assert pools.host_bytes_held == 0 and len(cache) == 1
    assert cache.evict() and first.sequence.on_host


def test_without_host_memory_nothing_moves() -> None:
    pools = make_pools(host_slots=0, host_spans=0)
    sequence = filled(pools, 5)
    assert not pools.tiered and not pools.may_demote(sequence) and not pools.demote(sequence)
    pools.promote(sequence)  # it is on the device
    assert pools.host_bytes_held == 0


# The same through the engine.


@pytest.fixture(scope="module")
def decoder() -> Decoder:
    return make_random_decoder(SPEC)


def make_engine(decoder: Decoder, *, spans: int, host_spans: int = 0, cache_dir: Path | None = None) -> Engine:
    sizes = Pools(decoder.spec, slots=1, spans=1, device=torch.device("meta"))
    host = 0
    if host_spans:
        host = max(host_spans * sizes.bytes_per_span * 4 // 3, 4 * host_spans * sizes.bytes_per_slot)
    engine = Engine(
        decoder, name="small", dialect="v4-preview", folder=Path("none"), cache_dir=cache_dir,
        kv_cache_bytes=spans * sizes.bytes_per_span, host_cache_bytes=host,
    )  # fmt: skip
    engine.scheduler.speculate = False
    return engine


def say(session: Session) -> list[tuple[int, float]]:
    return [(token.id, token.logprob) for token in session.generate(PARAMS)]


def converse(
    engine: Engine, *, sessions: int = 6, turns: int = 3
) -> Iterator[tuple[list[int], list[tuple[int, float]]]]:
    """Let agents take turns, each parked while the others speak; yield each one's ids and what it said."""
    opened = [engine.session() for _ in range(sessions)]
    said: list[list[tuple[int, float]]] = [[] for _ in opened]
    for turn in range(turns):
        for number, session in enumerate(opened):
            session.append(some_ids(250 if turn == 0 else 20, 10 * number + turn))
            said[number] += say(session)
            session.park()
    for number, session in enumerate(opened):
        yield list(session.token_ids), said[number]
        assert session.usage.miss_tokens == 250 + 20 * (turns - 1) or not engine.scheduler.pools.tiered
        session.close()


def test_parked_sessions_come_back_from_host_memory_without_being_computed(decoder: Decoder) -> None:
    roomy = make_engine(decoder, spans=100)
    expected = list(converse(roomy))
    tiered = make_engine(decoder, spans=4, host_spans=20)
    assert list(converse(tiered)) == expected
    stats = host_of(tiered.scheduler.pools).stats
    assert tiered.scheduler.prefilled == roomy.scheduler.prefilled == 6 * 290
    assert stats.loaded_slots >= 2 * 6 - 2  # of a turn each
    small = make_engine(decoder, spans=4)
    assert list(converse(small)) == expected
    assert small.scheduler.prefilled > 2 * 6 * 290  # what host memory saves
    for engine in (tiered, small):
        engine.scheduler.cache.clear()
        assert engine.scheduler.pools.bytes_held == engine.scheduler.pools.host_bytes_held == 0


def test_waiting_live_sessions_are_evicted_to_host_memory_and_come_back(decoder: Decoder) -> None:
    """None is parked, so none is a checkpoint when memory runs out."""
    engine, reference = make_engine(decoder, spans=4, host_spans=20), make_engine(decoder, spans=100)
    with engine.session() as first, engine.session() as second, engine.session() as third:
        generations = []
        for seed, session in enumerate((first, second, third)):
            session.append(some_ids(300, seed))
            generations.append(session.generate(SamplingParams(temperature=0, max_tokens=6)))
        said: list[list[int]] = [[], [], []]
        for _ in range(6):
            for number, generation in enumerate(generations):
                said[number].append(next(generation).id)
        assert engine.scheduler.prefilled == 900
        for seed, ids in enumerate(said):
            with reference.session() as other:
                other.append(some_ids(300, seed))
                assert ids == [token.id for token in other.generate(SamplingParams(temperature=0, max_tokens=6))]


def test_a_prefix_in_host_memory_serves_new_sessions_and_is_copied_once(decoder: Decoder) -> None:
    engine = make_engine(decoder, spans=8, host_spans=20)
    head = some_ids(2 * SPAN, 1)
    with engine.session() as session:
        session.append(head)
        session.checkpoint()
        say(session)
    while engine.scheduler.cache.evict():
        pass
    assert engine.scheduler.pools.bytes_held == 0
    before = host_of(engine.scheduler.pools).stats.loaded_spans
    with engine.session() as one, engine.session() as two:
        for seed, session in enumerate((one, two)):
            session.append(head + some_ids(20, seed + 5))
            say(session)
            assert (session.usage.hit_tokens, session.usage.miss_tokens) == (2 * SPAN, 20)
    assert host_of(engine.scheduler.pools).stats.loaded_spans - before == 2


def test_a_full_host_memory_drops_the_least_recently_used_state_to_disk(decoder: Decoder, tmp_path: Path) -> None:
    engine = make_engine(decoder, spans=2, host_spans=2, cache_dir=tmp_path)
    sessions = [engine.session() for _ in range(6)]  # two fit into host memory
    for seed, session in enumerate(sessions):
        session.append(some_ids(200, seed))
        say(session)
        session.park()
    engine.flush()
    disk = engine.scheduler.disk
    assert disk is not None and disk.stats.written_bytes > 0
    prefilled = engine.scheduler.prefilled
    reference = make_engine(decoder, spans=100)
    for session in reversed(sessions):
        with reference.session() as other:
            other.append(session.token_ids)
            assert say(session) == say(other)
        session.park()
        engine.flush()
    assert disk.stats.loaded > 0 and host_of(engine.scheduler.pools).stats.loaded_slots > 0
    assert engine.scheduler.prefilled == prefilled


def test_a_session_in_host_memory_can_be_saved_forked_and_closed(decoder: Decoder, tmp_path: Path) -> None:
    engine = make_engine(decoder, spans=8, host_spans=20)
    session = engine.session()
    session.append(some_ids(300, 1))
    say(session)
    session.park()
    while engine.scheduler.cache.evict():
        pass
    [fork] = session.fork()
    assert engine.scheduler.prefilled == 300
    session.park()
    while engine.scheduler.cache.evict():
        pass
    session.close()
    expected = say(fork)
    fork.close()
    reference = make_engine(decoder, spans=100)
    with reference.session() as other:
        other.append(session.token_ids)
        assert say(other) == expected


def test_logits_from_scratch_evict_to_host_memory_too(decoder: Decoder) -> None:
    engine = make_engine(decoder, spans=3, host_spans=10)
    with engine.session() as session:
        session.append(some_ids(500, 1))
        say(session)
        session.park()
        rows = engine.logits(some_ids(600, 2))
        assert torch.equal(rows, make_engine(decoder, spans=100).logits(some_ids(600, 2)))
        say(session)
        assert session.usage.miss_tokens == 500
