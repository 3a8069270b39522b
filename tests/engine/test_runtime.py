"""The fast path has the twin's logits, and the same bits in any batch and with any amount of memory."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from agentkit_engine import Engine, ModelSpec, OutOfMemoryError, SamplingParams
from agentkit_engine.model import Decoder
from agentkit_engine.runtime import Pools, Request, Scheduler
from agentkit_engine.runtime.capacity import SLOTS
from agentkit_engine.runtime.scheduler import MAX_NUM_BATCHED_TOKENS
from agentkit_engine.runtime.state import SPAN

from .conftest import randomize_, small_config, some_ids

VOCAB = 96
SPECS = {
    "v4": ModelSpec.from_config(small_config(0, 4, 128, 4, sliding_window=48, index_topk=8)),
    "all entries fit": ModelSpec.from_config(small_config(4, 128, index_topk=128)),
    "heads that fill a product": ModelSpec.from_config(small_config(0, 4, num_attention_heads=16, o_groups=4)),
}


@pytest.fixture(scope="module", params=SPECS)
def decoder(request: pytest.FixtureRequest) -> Decoder:
    return randomize_(Decoder(SPECS[request.param]), torch.Generator().manual_seed(1)).eval()


@pytest.fixture(scope="module", params=["cpu", "reference"])
def backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def scheduler(decoder: Decoder, backend: str) -> Scheduler:
    return Scheduler(decoder, kv_cache_bytes=64 << 20, backend=backend)


def test_logits_equal_the_twins(decoder: Decoder, scheduler: Scheduler) -> None:
    ids = some_ids(600, 0)
    with torch.inference_mode():
        expected = decoder(torch.tensor([ids]))[0]
    assert float((scheduler.logits(ids) - expected).abs().max()) < 1e-4


@pytest.mark.parametrize("chunk", [1, 3, 16, 127, 128, 129, 256, 511])
def test_every_chunking_gives_the_same_bits(scheduler: Scheduler, backend: str, chunk: int) -> None:
    ids = some_ids(200 if backend == "reference" and chunk < 16 else 600, 0)
    assert torch.equal(scheduler.logits(ids, chunk=chunk), scheduler.logits(ids))


def test_a_prefix_around_the_ratio_has_the_same_bits_alone(scheduler: Scheduler) -> None:
    """Also before the first entry."""
    ids = some_ids(9, 9)
    whole = scheduler.logits(ids)
    for length in (1, 2, 3, 4, 5, 7, 8):
        assert torch.equal(scheduler.logits(ids[:length]), whole[:length])
        assert torch.equal(scheduler.logits(ids[:length], chunk=1), whole[:length])


class Session:
    """A sequence appended in pieces; checks each row of logits against a single forward over all ids."""

    def __init__(self, ids: Sequence[int], expected_TV: Tensor) -> None:
        self.ids, self.expected_TV = ids, expected_TV
        self.request = Request()

    def feed(self, count: int) -> None:
        self.request.extend(self.ids[len(self.request.ids) : len(self.request.ids) + count])

    def check(self) -> None:
        if self.request.logits_V is not None:
            assert torch.equal(self.request.logits_V, self.expected_TV[len(self.request.ids) - 1])


@pytest.fixture(scope="module")
def sessions(scheduler: Scheduler) -> list[tuple[list[int], Tensor]]:
    return [(ids := some_ids(330, seed), scheduler.logits(ids)) for seed in range(3)]


ACTIONS = ("feed", "feed", "feed", "wait", "drop", "shorten", "park", "fork")


@settings(max_examples=12, deadline=None)
@given(data=st.data())
def test_random_schedules_give_the_same_bits(
    scheduler: Scheduler, sessions: list[tuple[list[int], Tensor]], data: st.DataObject
) -> None:
    """Sessions join, append, wait, shorten by a token, fork, park, lose their state and continue, in any batch."""
    live = [Session(*session) for session in sessions]
    try:
        for _ in range(data.draw(st.integers(1, 8), "steps")):
            for session in live.copy():
                match data.draw(st.sampled_from(ACTIONS), "action"):
                    case "feed":
                        session.feed(data.draw(st.sampled_from([1, 1, 2, 5, 64, 130]), "count"))
                    case "drop":
                        scheduler.preempt(session.request)
                    case "park":
                        scheduler.park(session.request)
                    case "fork" if len(live) < 6:
                        live.append(Session(session.ids, session.expected_TV))
                        live[-1].request = scheduler.fork(session.request)
                    case "shorten" if len(session.request.ids) > 1:
                        scheduler.truncate(session.request, len(session.request.ids) - 1)
            requests = [session.request for session in live if session.request.ids and session.request.logits_V is None]
            if requests:
                scheduler.step(requests)
            for session in live:
                session.check()
        for session in live:
            session.feed(1)
            while session.request.logits_V is None:
                scheduler.step([session.request])
            session.check()
    finally:
        for session in live:
            scheduler.preempt(session.request)
    scheduler.cache.clear()
    assert scheduler.pools.bytes_held == 0


def test_short_memory_changes_no_results(decoder: Decoder) -> None:
    sizes = Pools(decoder.spec, slots=1, spans=1, device=torch.device("meta"))
    scheduler = Scheduler(decoder, kv_cache_bytes=3 * sizes.bytes_per_span)
    requests = [Request() for _ in range(4)]
    for seed, request in enumerate(requests):
        request.extend(some_ids(300, seed))  # two spans each: only one of the four fits
    expected = [scheduler.logits(request.ids)[-1] for request in requests]
    for _ in range(2):
        while waiting := [request for request in requests if request.logits_V is None]:
            scheduler.step(waiting)
            assert scheduler.pools.bytes_held <= 3 * sizes.bytes_per_span + SLOTS * sizes.bytes_per_slot
        for request, logits_V in zip(requests, expected, strict=True):
            assert request.logits_V is not None
            assert torch.equal(request.logits_V, logits_V)
            last = request.ids[-1]
            scheduler.truncate(request, len(request.ids) - 1)
            request.extend([last])


def test_a_sequence_that_can_never_fit_is_an_error_and_frees_its_memory(decoder: Decoder) -> None:
    sizes = Pools(decoder.spec, slots=1, spans=1, device=torch.device("meta"))
    engine = Engine(
        decoder, name="small", dialect="v4-preview", folder=Path("none"), kv_cache_bytes=2 * sizes.bytes_per_span
    )
    with engine.session() as session:
        session.append(some_ids(2 * SPAN + 1, 0))
        with pytest.raises(OutOfMemoryError, match="513 ids need 3 spans of memory, but there are 2; raise"):
            next(session.generate())
        assert engine.scheduler.pools.bytes_held == engine.scheduler.steps == 0
    with engine.session() as session:
        session.append(some_ids(2 * SPAN - 1, 0))
        assert len(list(session.generate(SamplingParams(max_tokens=1)))) == 1


def test_more_sessions_than_slots(decoder: Decoder) -> None:
    sizes = Pools(decoder.spec, slots=1, spans=1, device=torch.device("meta"))
    scheduler = Scheduler(decoder, kv_cache_bytes=400 * sizes.bytes_per_span)
    requests = [Request() for _ in range(scheduler.pools.slots + 3)]
    for index, request in enumerate(requests):
        request.extend([index % VOCAB, 1])
    while waiting := [request for request in requests if request.logits_V is None]:
        scheduler.step(waiting)
    assert scheduler.pools.free_slots == 0
    for index in (0, len(requests) - 1):
        assert torch.equal(torch.as_tensor(requests[index].logits_V), scheduler.logits([index % VOCAB, 1])[-1])
    for request in requests:
        scheduler.preempt(request)


def test_a_non_finite_sequence_does_not_affect_others(decoder: Decoder, backend: str) -> None:
    """This holds in the same forward, and for a sequence that gets its slot and spans afterwards."""
    poison = 7
    ids = [token_id if token_id != poison else 8 for token_id in [3, *some_ids(299, 0)]]
    decoder = copy.deepcopy(decoder)
    decoder.embed.weight.data[poison] = torch.nan
    scheduler = Scheduler(decoder, kv_cache_bytes=64 << 20, backend=backend)
    expected = scheduler.logits(ids)
    healthy, ill = Request(), Request()
    ill.extend([poison] * 300)
    scheduler.step([ill])  # first, so that it gets the lowest ids
    healthy.extend(ids[:130])
    ill.extend([poison])
    scheduler.step([ill, healthy])
    assert ill.logits_V is not None and not bool(ill.logits_V.isfinite().any())
    assert healthy.logits_V is not None and torch.equal(healthy.logits_V, expected[129])
    scheduler.preempt(ill)
    scheduler.preempt(healthy)
    assert torch.equal(scheduler.logits(ids), expected)


def test_bytes_held_counts_spans_and_slots(scheduler: Scheduler) -> None:
    request = Request()
    request.extend(some_ids(SPAN + 1, 0))
    while request.pending:
        scheduler.step([request])
    scheduler.cache.clear()
    spec, pools = scheduler.pools.spec, scheduler.pools
    per_span = sum(
        4 * SPAN // layer.compress_ratio * (spec.head_dim + (layer.attention == "csa") * spec.index_head_dim)
        for layer in spec.layers
        if layer.compress_ratio
    )
    assert pools.bytes_per_span == per_span
    assert pools.bytes_held == 2 * per_span + pools.bytes_per_slot
    scheduler.preempt(request)
    assert pools.bytes_held == 0


def test_prompts_of_a_higher_priority_come_first_and_decoding_continues(decoder: Decoder) -> None:
    scheduler = Scheduler(decoder, kv_cache_bytes=64 << 20)
    talking, low, high = Request(), Request(priority=1), Request(priority=2)
    talking.extend(some_ids(20, 0))
    scheduler.step([talking])
    low.extend(some_ids(2 * MAX_NUM_BATCHED_TOKENS, 1))
    high.extend(some_ids(2 * MAX_NUM_BATCHED_TOKENS, 2))
    seen = []
    while low.logits_V is None or high.logits_V is None:
        talking.extend([1])
        scheduler.step([request for request in (talking, low, high) if request.pending])
        assert talking.logits_V is not None
        seen.append((low.computed, high.computed))
    assert seen == [(0, 511), (0, 1022), (509, 1024), (1020, 1024), (1024, 1024)]
    for request in (talking, low, high):
        scheduler.preempt(request)


def test_when_memory_is_short_the_lowest_priority_loses_its_state(decoder: Decoder) -> None:
    sizes = Pools(decoder.spec, slots=1, spans=1, device=torch.device("meta"))
    scheduler = Scheduler(decoder, kv_cache_bytes=4 * sizes.bytes_per_span)
    requests = [Request(priority=priority) for priority in (2, 1, 3)]
    for seed, request in enumerate(requests):  # two spans each: only two of the three fit
        request.extend(some_ids(300, seed))
        scheduler.step([request])
    assert [request.computed for request in requests] == [300, 0, 300]
    assert requests[1].fork().priority == 1
    for request in requests:
        scheduler.preempt(request)


def test_fits_counts_shared_spans_once(decoder: Decoder) -> None:
    sizes = Pools(decoder.spec, slots=1, spans=1, device=torch.device("meta"))
    scheduler = Scheduler(decoder, kv_cache_bytes=8 * sizes.bytes_per_span)
    request = Request()
    request.extend(some_ids(3 * SPAN, 0))
    while request.pending:
        scheduler.step([request])
    forks = [scheduler.fork(request) for _ in range(5)]
    assert scheduler.fits(forks) and not scheduler.fits([*forks, request])  # three shared spans, and one more for each
    fresh = Request()
    fresh.extend(some_ids(3 * SPAN, 1))
    assert scheduler.fits([request, fresh]) and not scheduler.fits([request, forks[0], fresh])
    for other in (request, *forks):
        scheduler.preempt(other)
