"""Memory, eviction and preemption in the batcher, and the fast path of sessions that only decode."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from agentkit_engine import Engine, ModelSpec, SamplingParams
from agentkit_engine.model import Decoder
from agentkit_engine.runtime import Batcher, Computed, Pools, Segment, Work
from agentkit_engine.runtime.state import SPAN

from .conftest import randomize_, small_config, some_ids


@pytest.fixture(scope="module")
def decoder() -> Decoder:
    spec = ModelSpec.from_config(small_config(0, 4, 128, sliding_window=48, index_topk=8))
    return randomize_(Decoder(spec), torch.Generator().manual_seed(1)).eval()


def batcher_of(decoder: Decoder, spans: int) -> Batcher:
    sizes = Pools(decoder.spec, slots=1, spans=1, device=torch.device("meta"))
    batcher = Batcher(decoder, kv_cache_bytes=spans * sizes.bytes_per_span)
    batcher.speculate = False
    return batcher


def computed(batcher: Batcher, ids: Sequence[int], *, priority: int = 0) -> Work:
    work = Work(ids, priority=priority)
    while work.logits_V is None:
        batcher.advance([work])
    return work


def test_a_higher_priority_that_needs_a_span_preempts_decoding_sessions(decoder: Decoder) -> None:
    batcher = batcher_of(decoder, 4)
    high, low = computed(batcher, some_ids(250, 1), priority=5), computed(batcher, some_ids(2 * SPAN + 4, 2))
    batcher.cache.clear()
    for step in range(300):
        for work in (high, low):
            if work.logits_V is not None:
                work.push(3 + step % 50)
        batcher.advance([work for work in (high, low) if work.pending])
        assert high.logits_V is not None, step
    assert low.length < 2 * SPAN + 4 + 300  # it had to wait
    batcher.drop(high)
    while low.logits_V is None:
        batcher.advance([low])
    assert torch.equal(low.logits_V, batcher.logits(list(low.ids))[-1])


def test_a_checkpoint_can_be_taken_between_two_decoded_tokens(decoder: Decoder) -> None:
    engine = Engine(decoder, name="small", dialect="v4-preview", folder=Path("none"))
    with engine.session() as session:
        session.append(some_ids(40, 0))
        said = session.generate(SamplingParams(temperature=0, max_tokens=20))
        for _ in range(5):
            next(said)
        session.checkpoint()
        length = len(session)
        for _ in range(5):
            next(said)
        work = session._request
        assert engine.batcher.cache.holds(work.ids, work.chain, length)


def test_decoding_after_a_cut_does_not_change_spans_shared_with_a_fork(decoder: Decoder) -> None:
    batcher = batcher_of(decoder, 100)
    work = computed(batcher, some_ids(SPAN - 6, 0))
    for token_id in range(3, 15):  # past the end of the span
        work.push(token_id)
        batcher.advance([work])
    fork = batcher.fork(work)
    batcher.truncate(work, SPAN - 2)
    batcher.advance([work])
    for token_id in range(60, 75):
        work.push(token_id)
        batcher.advance([work])
    fork.push(7)
    batcher.advance([fork])
    assert torch.equal(torch.as_tensor(fork.logits_V), batcher.logits(list(fork.ids))[-1])


def test_drafts_stay_within_the_models_positions(decoder: Decoder) -> None:
    spec = ModelSpec.from_config(small_config(0, 4, max_position_embeddings=70))
    batcher = batcher_of(randomize_(Decoder(spec), torch.Generator().manual_seed(1)).eval(), 10)
    batcher.speculate, step = True, batcher.runner.step
    ends, drafted = [], []

    def watched(segments: Sequence[Segment], *, all_rows: bool = False) -> Computed:
        ends.append(max(segment.sequence.length + len(segment) for segment in segments))
        drafted.append(len(segments[0].draft))
        return step(segments, all_rows=all_rows)

    batcher.runner.step = watched  # type: ignore[method-assign]
    work = computed(batcher, [5, 6, 7, 8] * 14)
    while work.length < 70:
        work.push([5, 6, 7, 8][work.length % 4])
        if work.logits_V is None:
            batcher.advance([work])
    assert max(ends) <= 70 and max(drafted) > 1


def test_new_forks_are_not_evicted_first(decoder: Decoder) -> None:
    batcher = batcher_of(decoder, 400)
    idle = [computed(batcher, some_ids(3, seed)) for seed in range(batcher.pools.slots - 3)]
    parent = computed(batcher, some_ids(20, 99))
    batcher.cache.clear()
    forks = [batcher.fork(parent) for _ in range(6)]
    assert all(fork.sequence is not None for fork in forks)
    lost = [work.sequence is None for work in idle]
    assert sum(lost) == 4 and all(lost[:4])  # the least recently used ones


def test_forks_of_a_session_that_lost_its_state_share_one_computation(decoder: Decoder) -> None:
    engine = Engine(decoder, name="small", dialect="v4-preview", folder=Path("none"))
    with engine.session() as session:
        session.append(some_ids(300, 0))
        session.fork(0)
        engine.batcher.drop(session._request)  # as when memory is short
        engine.batcher.cache.clear()
        before = engine.batcher.prefilled
        for seed, fork in enumerate(session.fork(3)):
            list(fork.generate(SamplingParams(temperature=1, seed=seed, max_tokens=2)))
        assert engine.batcher.prefilled - before == 300
        session.park()
        list(session.fork()[0].generate(SamplingParams(max_tokens=2)))
        assert engine.batcher.prefilled - before == 300


def test_a_session_without_state_keeps_only_its_own_logits(decoder: Decoder) -> None:
    batcher = batcher_of(decoder, 100)
    works = [Work(some_ids(10, seed)) for seed in range(4)]
    batcher.advance(works)
    for work in works:
        logits_V = work.logits_V
        assert logits_V is not None and logits_V.untyped_storage().nbytes() == 4 * logits_V.nbytes
        batcher.park(work)
        kept_V = work.logits_V
        assert kept_V is not None and torch.equal(kept_V, logits_V)
        assert kept_V.untyped_storage().nbytes() == kept_V.nbytes
    works[0].push(1)
    batcher.park(works[0])
    assert works[0].logits_V is works[0].streams_MD is None


@pytest.mark.parametrize("ahead", [6, 9, 12])
@pytest.mark.parametrize("back", [2, 5, 8, 11])
@pytest.mark.parametrize("length", [130, 251, 300])
def test_a_fork_of_a_session_that_was_shortened_can_be_shortened_too(
    decoder: Decoder, ahead: int, back: int, length: int
) -> None:
    """The rings hold rows of ids that were cut. A fork must know it, or it takes them for its own rows."""
    batcher = batcher_of(decoder, 100)
    ids = some_ids(length, length)
    work = computed(batcher, ids)
    for token_id in some_ids(ahead, ahead):
        work.push(token_id)
        batcher.advance([work])
    batcher.truncate(work, length)
    fork = batcher.fork(work)
    batcher.truncate(fork, length - back)
    batcher.cache.clear()
    fork.extend(some_ids(12, 7))  # completes entries that pool rows from before the cut
    rows = []
    while fork.pending:
        batcher.advance([fork])
        rows.append(fork.logits_V)
    assert torch.equal(torch.as_tensor(rows[-1]), batcher.logits(list(fork.ids))[-1])


def test_a_lower_priority_does_not_take_memory_that_a_higher_one_waits_for(decoder: Decoder) -> None:
    batcher = batcher_of(decoder, 3)
    middle = computed(batcher, some_ids(200, 1), priority=3)
    batcher.cache.clear()
    middle.extend(some_ids(100, 2))  # needs a second span, but the highest priority takes the other two
    high, low = Work(some_ids(300, 3), priority=5), Work(some_ids(50, 4), priority=1)
    batcher.advance([low, middle, high])
    assert (high.computed, middle.computed, low.computed) == (300, 0, 0)


def test_the_last_tokens_are_cut_without_computing_the_others_again(decoder: Decoder) -> None:
    batcher = batcher_of(decoder, 10)
    work = computed(batcher, some_ids(100, 1))
    batcher.truncate(work, 97)
    assert work.pending == 1


def test_a_short_session_can_be_cut_to_nothing(decoder: Decoder) -> None:
    batcher = batcher_of(decoder, 10)
    work = computed(batcher, some_ids(5, 1))
    batcher.truncate(work, 0)
    assert (work.length, work.computed) == (0, 0)
    work.extend(some_ids(20, 2))
    batcher.advance([work])
    assert torch.equal(torch.as_tensor(work.logits_V), batcher.logits(some_ids(20, 2))[-1])


def test_a_cut_forgets_the_checkpoints_requested_behind_it_and_no_others(decoder: Decoder) -> None:
    batcher = batcher_of(decoder, 10)
    work = Work(some_ids(60, 1))
    batcher.mark(work)
    work.extend(some_ids(30, 2))
    batcher.mark(work)
    batcher.truncate(work, 70)
    work.extend(some_ids(50, 3))
    while work.pending:
        batcher.advance([work])
    assert [length for length in (60, 70, 90) if batcher.cache.holds(work.ids, work.chain, length)] == [60]


@pytest.mark.parametrize("drafted", [False, True])
@pytest.mark.parametrize("forced", [False, True])
def test_the_mtp_block_drafts_from_what_a_token_was_sampled_from(decoder: Decoder, drafted: bool, forced: bool) -> None:
    """Also where the draft turned out wrong; but no forward led to an id that a grammar forced."""
    batcher = batcher_of(decoder, 10)
    work = computed(batcher, some_ids(20, 1))
    streams_MD = torch.as_tensor(work.streams_MD).clone()
    work._drafted = (7, 8) if drafted else ()
    work.push(9, forced=forced)
    assert work.logits_V is None
    if forced:
        assert work.streams_MD is None
    else:
        assert torch.equal(torch.as_tensor(work.streams_MD), streams_MD)
