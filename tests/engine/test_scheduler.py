"""Memory, eviction and preemption in the scheduler, and the fast path of sessions that only decode."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from agentkit_engine import Engine, ModelSpec, SamplingParams
from agentkit_engine.model import Decoder
from agentkit_engine.runtime import Computed, Pools, Request, ScheduledTokens, Scheduler
from agentkit_engine.runtime.state import SPAN

from .conftest import randomize_, small_config, some_ids


@pytest.fixture(scope="module")
def decoder() -> Decoder:
    spec = ModelSpec.from_config(small_config(0, 4, 128, sliding_window=48, index_topk=8))
    return randomize_(Decoder(spec), torch.Generator().manual_seed(1)).eval()


def scheduler_of(decoder: Decoder, spans: int) -> Scheduler:
    sizes = Pools(decoder.spec, slots=1, spans=1, device=torch.device("meta"))
    scheduler = Scheduler(decoder, kv_cache_bytes=spans * sizes.bytes_per_span)
    scheduler.speculate = False
    return scheduler


def computed(scheduler: Scheduler, ids: Sequence[int], *, priority: int = 0) -> Request:
    request = Request(ids, priority=priority)
    while request.logits_V is None:
        scheduler.step([request])
    return request


def test_a_higher_priority_that_needs_a_span_preempts_decoding_sessions(decoder: Decoder) -> None:
    scheduler = scheduler_of(decoder, 4)
    high, low = computed(scheduler, some_ids(250, 1), priority=5), computed(scheduler, some_ids(2 * SPAN + 4, 2))
    scheduler.cache.clear()
    for step in range(300):
        for request in (high, low):
            if request.logits_V is not None:
                request.push(3 + step % 50)
        scheduler.step([request for request in (high, low) if request.pending])
        assert high.logits_V is not None, step
    assert low.length < 2 * SPAN + 4 + 300  # it had to wait
    scheduler.preempt(high)
    while low.logits_V is None:
        scheduler.step([low])
    assert torch.equal(low.logits_V, scheduler.logits(list(low.ids))[-1])


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
        request = session._request
        assert engine.scheduler.cache.holds(request.ids, request.chain, length)


def test_decoding_after_a_cut_does_not_change_spans_shared_with_a_fork(decoder: Decoder) -> None:
    scheduler = scheduler_of(decoder, 100)
    request = computed(scheduler, some_ids(SPAN - 6, 0))
    for token_id in range(3, 15):  # past the end of the span
        request.push(token_id)
        scheduler.step([request])
    fork = scheduler.fork(request)
    scheduler.truncate(request, SPAN - 2)
    scheduler.step([request])
    for token_id in range(60, 75):
        request.push(token_id)
        scheduler.step([request])
    fork.push(7)
    scheduler.step([fork])
    assert torch.equal(torch.as_tensor(fork.logits_V), scheduler.logits(list(fork.ids))[-1])


def test_drafts_stay_within_the_models_positions(decoder: Decoder) -> None:
    spec = ModelSpec.from_config(small_config(0, 4, max_position_embeddings=70))
    scheduler = scheduler_of(randomize_(Decoder(spec), torch.Generator().manual_seed(1)).eval(), 10)
    scheduler.speculate, step = True, scheduler.runner.step
    ends, drafted = [], []

    def watched(scheduled: Sequence[ScheduledTokens], *, all_rows: bool = False) -> Computed:
        ends.append(max(part.sequence.length + len(part) for part in scheduled))
        drafted.append(len(scheduled[0].draft))
        return step(scheduled, all_rows=all_rows)

    scheduler.runner.step = watched  # type: ignore[method-assign]
    request = computed(scheduler, [5, 6, 7, 8] * 14)
    while request.length < 70:
        request.push([5, 6, 7, 8][request.length % 4])
        if request.logits_V is None:
            scheduler.step([request])
    assert max(ends) <= 70 and max(drafted) > 1


def test_new_forks_are_not_evicted_first(decoder: Decoder) -> None:
    scheduler = scheduler_of(decoder, 400)
    idle = [computed(scheduler, some_ids(3, seed)) for seed in range(scheduler.pools.slots - 3)]
    parent = computed(scheduler, some_ids(20, 99))
    scheduler.cache.clear()
    forks = [scheduler.fork(parent) for _ in range(6)]
    assert all(fork.sequence is not None for fork in forks)
    lost = [request.sequence is None for request in idle]
    assert sum(lost) == 4 and all(lost[:4])  # the least recently used ones


def test_forks_of_a_session_that_lost_its_state_share_one_computation(decoder: Decoder) -> None:
    engine = Engine(decoder, name="small", dialect="v4-preview", folder=Path("none"))
    with engine.session() as session:
        session.append(some_ids(300, 0))
        session.fork(0)
        engine.scheduler.preempt(session._request)  # as when memory is short
        engine.scheduler.cache.clear()
        before = engine.scheduler.prefilled
        for seed, fork in enumerate(session.fork(3)):
            list(fork.generate(SamplingParams(temperature=1, seed=seed, max_tokens=2)))
        assert engine.scheduler.prefilled - before == 300
        session.park()
        list(session.fork()[0].generate(SamplingParams(max_tokens=2)))
        assert engine.scheduler.prefilled - before == 300


def test_a_session_without_state_keeps_only_its_own_logits(decoder: Decoder) -> None:
    scheduler = scheduler_of(decoder, 100)
    requests = [Request(some_ids(10, seed)) for seed in range(4)]
    scheduler.step(requests)
    for request in requests:
        logits_V = request.logits_V
        assert logits_V is not None and logits_V.untyped_storage().nbytes() == 4 * logits_V.nbytes
        scheduler.park(request)
        kept_V = request.logits_V
        assert kept_V is not None and torch.equal(kept_V, logits_V)
        assert kept_V.untyped_storage().nbytes() == kept_V.nbytes
    requests[0].push(1)
    scheduler.park(requests[0])
    assert requests[0].logits_V is requests[0].streams_MD is None


@pytest.mark.parametrize("ahead", [6, 9, 12])
@pytest.mark.parametrize("back", [2, 5, 8, 11])
@pytest.mark.parametrize("length", [130, 251, 300])
def test_a_fork_of_a_session_that_was_shortened_can_be_shortened_too(
    decoder: Decoder, ahead: int, back: int, length: int
) -> None:
    """The rings hold rows of ids that were cut. A fork must know it, or it takes them for its own rows."""
    scheduler = scheduler_of(decoder, 100)
    ids = some_ids(length, length)
    request = computed(scheduler, ids)
    for token_id in some_ids(ahead, ahead):
        request.push(token_id)
        scheduler.step([request])
    scheduler.truncate(request, length)
    fork = scheduler.fork(request)
    scheduler.truncate(fork, length - back)
    scheduler.cache.clear()
    fork.extend(some_ids(12, 7))  # completes entries that pool rows from before the cut
    rows = []
    while fork.pending:
        scheduler.step([fork])
        rows.append(fork.logits_V)
    assert torch.equal(torch.as_tensor(rows[-1]), scheduler.logits(list(fork.ids))[-1])


def test_a_lower_priority_does_not_take_memory_that_a_higher_one_waits_for(decoder: Decoder) -> None:
    scheduler = scheduler_of(decoder, 3)
    middle = computed(scheduler, some_ids(200, 1), priority=3)
    scheduler.cache.clear()
    middle.extend(some_ids(100, 2))  # needs a second span, but the highest priority takes the other two
    high, low = Request(some_ids(300, 3), priority=5), Request(some_ids(50, 4), priority=1)
    scheduler.step([low, middle, high])
    assert (high.computed, middle.computed, low.computed) == (300, 0, 0)


def test_the_last_tokens_are_cut_without_computing_the_others_again(decoder: Decoder) -> None:
    scheduler = scheduler_of(decoder, 10)
    request = computed(scheduler, some_ids(100, 1))
    scheduler.truncate(request, 97)
    assert request.pending == 1


def test_a_short_session_can_be_cut_to_nothing(decoder: Decoder) -> None:
    scheduler = scheduler_of(decoder, 10)
    request = computed(scheduler, some_ids(5, 1))
    scheduler.truncate(request, 0)
    assert (request.length, request.computed) == (0, 0)
    request.extend(some_ids(20, 2))
    scheduler.step([request])
    assert torch.equal(torch.as_tensor(request.logits_V), scheduler.logits(some_ids(20, 2))[-1])


def test_a_cut_forgets_the_checkpoints_requested_behind_it_and_no_others(decoder: Decoder) -> None:
    scheduler = scheduler_of(decoder, 10)
    request = Request(some_ids(60, 1))
    scheduler.mark(request)
    request.extend(some_ids(30, 2))
    scheduler.mark(request)
    scheduler.truncate(request, 70)
    request.extend(some_ids(50, 3))
    while request.pending:
        scheduler.step([request])
    assert [length for length in (60, 70, 90) if scheduler.cache.holds(request.ids, request.chain, length)] == [60]


@pytest.mark.parametrize("drafted", [False, True])
@pytest.mark.parametrize("forced", [False, True])
def test_the_mtp_block_drafts_from_what_a_token_was_sampled_from(decoder: Decoder, drafted: bool, forced: bool) -> None:
    """Also where the draft turned out wrong; but no forward led to an id that a grammar forced."""
    scheduler = scheduler_of(decoder, 10)
    request = computed(scheduler, some_ids(20, 1))
    streams_MD = torch.as_tensor(request.streams_MD).clone()
    request._drafted = (7, 8) if drafted else ()
    request.push(9, forced=forced)
    assert request.logits_V is None
    if forced:
        assert request.streams_MD is None
    else:
        assert torch.equal(torch.as_tensor(request.streams_MD), streams_MD)
