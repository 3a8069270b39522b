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
from agentkit_engine.runtime import Batcher, Pools, Work
from agentkit_engine.runtime.batcher import SLOTS, TOKEN_BUDGET
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
def batcher(decoder: Decoder, backend: str) -> Batcher:
    return Batcher(decoder, kv_cache_bytes=64 << 20, backend=backend)


def test_logits_equal_the_twins(decoder: Decoder, batcher: Batcher) -> None:
    ids = some_ids(600, 0)
    with torch.inference_mode():
        expected = decoder(torch.tensor([ids]))[0]
    assert float((batcher.logits(ids) - expected).abs().max()) < 1e-4


@pytest.mark.parametrize("chunk", [1, 3, 16, 127, 128, 129, 256, 511])
def test_every_chunking_gives_the_same_bits(batcher: Batcher, backend: str, chunk: int) -> None:
    ids = some_ids(300 if backend == "reference" and chunk < 16 else 600, 0)
    assert torch.equal(batcher.logits(ids, chunk=chunk), batcher.logits(ids))


def test_a_prefix_around_the_ratio_has_the_same_bits_alone(batcher: Batcher) -> None:
    """Also before the first entry."""
    ids = some_ids(9, 9)
    whole = batcher.logits(ids)
    for length in (1, 2, 3, 4, 5, 7, 8):
        assert torch.equal(batcher.logits(ids[:length]), whole[:length])
        assert torch.equal(batcher.logits(ids[:length], chunk=1), whole[:length])


class Session:
    """A sequence appended in pieces; checks each row of logits against a single forward over all ids."""

    def __init__(self, ids: Sequence[int], expected_TV: Tensor) -> None:
        self.ids, self.expected_TV = ids, expected_TV
        self.work = Work()

    def feed(self, count: int) -> None:
        self.work.extend(self.ids[len(self.work.ids) : len(self.work.ids) + count])

    def check(self) -> None:
        if self.work.logits_V is not None:
            assert torch.equal(self.work.logits_V, self.expected_TV[len(self.work.ids) - 1])


@pytest.fixture(scope="module")
def sessions(batcher: Batcher) -> list[tuple[list[int], Tensor]]:
    return [(ids := some_ids(330, seed), batcher.logits(ids)) for seed in range(3)]


ACTIONS = ("feed", "feed", "feed", "wait", "drop", "shorten", "park", "fork")


@settings(max_examples=12, deadline=None)
@given(data=st.data())
def test_random_schedules_give_the_same_bits(
    batcher: Batcher, sessions: list[tuple[list[int], Tensor]], data: st.DataObject
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
                        batcher.drop(session.work)
                    case "park":
                        batcher.park(session.work)
                    case "fork" if len(live) < 6:
                        live.append(Session(session.ids, session.expected_TV))
                        live[-1].work = batcher.fork(session.work)
                    case "shorten" if len(session.work.ids) > 1:
                        batcher.truncate(session.work, len(session.work.ids) - 1)
            works = [session.work for session in live if session.work.ids and session.work.logits_V is None]
            if works:
                batcher.advance(works)
            for session in live:
                session.check()
        for session in live:
            session.feed(1)
            while session.work.logits_V is None:
                batcher.advance([session.work])
            session.check()
    finally:
        for session in live:
            batcher.drop(session.work)
    batcher.cache.clear()
    assert batcher.pools.bytes_held == 0


def test_short_memory_changes_no_results(decoder: Decoder) -> None:
    sizes = Pools(decoder.spec, slots=1, spans=1, device=torch.device("meta"))
    batcher = Batcher(decoder, kv_cache_bytes=3 * sizes.bytes_per_span)
    works = [Work() for _ in range(4)]
    for seed, work in enumerate(works):
        work.extend(some_ids(300, seed))  # two spans each: only one of the four fits
    expected = [batcher.logits(work.ids)[-1] for work in works]
    for _ in range(2):
        while waiting := [work for work in works if work.logits_V is None]:
            batcher.advance(waiting)
            assert batcher.pools.bytes_held <= 3 * sizes.bytes_per_span + SLOTS * sizes.bytes_per_slot
        for work, logits_V in zip(works, expected, strict=True):
            assert work.logits_V is not None
            assert torch.equal(work.logits_V, logits_V)
            last = work.ids[-1]
            batcher.truncate(work, len(work.ids) - 1)
            work.extend([last])


def test_a_sequence_that_can_never_fit_is_an_error_and_frees_its_memory(decoder: Decoder) -> None:
    sizes = Pools(decoder.spec, slots=1, spans=1, device=torch.device("meta"))
    engine = Engine(
        decoder, name="small", dialect="v4-preview", folder=Path("none"), kv_cache_bytes=2 * sizes.bytes_per_span
    )
    with engine.session() as session:
        session.append(some_ids(2 * SPAN + 1, 0))
        with pytest.raises(OutOfMemoryError, match="513 ids need 3 spans of memory, but there are 2; raise"):
            next(session.generate())
        assert engine.batcher.pools.bytes_held == engine.batcher.steps == 0
    with engine.session() as session:
        session.append(some_ids(2 * SPAN - 1, 0))
        assert len(list(session.generate(SamplingParams(max_tokens=1)))) == 1


def test_more_sessions_than_slots(decoder: Decoder) -> None:
    sizes = Pools(decoder.spec, slots=1, spans=1, device=torch.device("meta"))
    batcher = Batcher(decoder, kv_cache_bytes=400 * sizes.bytes_per_span)
    works = [Work() for _ in range(batcher.pools.slots + 3)]
    for index, work in enumerate(works):
        work.extend([index % VOCAB, 1])
    while waiting := [work for work in works if work.logits_V is None]:
        batcher.advance(waiting)
    assert batcher.pools.free_slots == 0
    for index in (0, len(works) - 1):
        assert torch.equal(torch.as_tensor(works[index].logits_V), batcher.logits([index % VOCAB, 1])[-1])
    for work in works:
        batcher.drop(work)


def test_a_non_finite_sequence_does_not_affect_others(decoder: Decoder, backend: str) -> None:
    """This holds in the same forward, and for a sequence that gets its slot and spans afterwards."""
    poison = 7
    ids = [token_id if token_id != poison else 8 for token_id in [3, *some_ids(299, 0)]]
    decoder = copy.deepcopy(decoder)
    decoder.embed.weight.data[poison] = torch.nan
    batcher = Batcher(decoder, kv_cache_bytes=64 << 20, backend=backend)
    expected = batcher.logits(ids)
    healthy, ill = Work(), Work()
    ill.extend([poison] * 300)
    batcher.advance([ill])  # first, so that it gets the lowest ids
    healthy.extend(ids[:130])
    ill.extend([poison])
    batcher.advance([ill, healthy])
    assert ill.logits_V is not None and not bool(ill.logits_V.isfinite().any())
    assert healthy.logits_V is not None and torch.equal(healthy.logits_V, expected[129])
    batcher.drop(ill)
    batcher.drop(healthy)
    assert torch.equal(batcher.logits(ids), expected)


def test_bytes_held_counts_spans_and_slots(batcher: Batcher) -> None:
    work = Work()
    work.extend(some_ids(SPAN + 1, 0))
    while work.pending:
        batcher.advance([work])
    batcher.cache.clear()
    spec, pools = batcher.pools.spec, batcher.pools
    per_span = sum(
        4 * SPAN // layer.compress_ratio * (spec.head_dim + (layer.attention == "csa") * spec.index_head_dim)
        for layer in spec.layers
        if layer.compress_ratio
    )
    assert pools.bytes_per_span == per_span
    assert pools.bytes_held == 2 * per_span + pools.bytes_per_slot
    batcher.drop(work)
    assert pools.bytes_held == 0


def test_prompts_of_a_higher_priority_come_first_and_decoding_continues(decoder: Decoder) -> None:
    batcher = Batcher(decoder, kv_cache_bytes=64 << 20)
    talking, low, high = Work(), Work(priority=1), Work(priority=2)
    talking.extend(some_ids(20, 0))
    batcher.advance([talking])
    low.extend(some_ids(2 * TOKEN_BUDGET, 1))
    high.extend(some_ids(2 * TOKEN_BUDGET, 2))
    seen = []
    while low.logits_V is None or high.logits_V is None:
        talking.extend([1])
        batcher.advance([work for work in (talking, low, high) if work.pending])
        assert talking.logits_V is not None
        seen.append((low.computed, high.computed))
    assert seen == [(0, 511), (0, 1022), (509, 1024), (1020, 1024), (1024, 1024)]
    for work in (talking, low, high):
        batcher.drop(work)


def test_when_memory_is_short_the_lowest_priority_loses_its_state(decoder: Decoder) -> None:
    sizes = Pools(decoder.spec, slots=1, spans=1, device=torch.device("meta"))
    batcher = Batcher(decoder, kv_cache_bytes=4 * sizes.bytes_per_span)
    works = [Work(priority=priority) for priority in (2, 1, 3)]
    for seed, work in enumerate(works):  # two spans each: only two of the three fit
        work.extend(some_ids(300, seed))
        batcher.advance([work])
    assert [work.computed for work in works] == [300, 0, 300]
    assert works[1].fork().priority == 1
    for work in works:
        batcher.drop(work)


def test_fits_counts_shared_spans_once(decoder: Decoder) -> None:
    sizes = Pools(decoder.spec, slots=1, spans=1, device=torch.device("meta"))
    batcher = Batcher(decoder, kv_cache_bytes=8 * sizes.bytes_per_span)
    work = Work()
    work.extend(some_ids(3 * SPAN, 0))
    while work.pending:
        batcher.advance([work])
    forks = [batcher.fork(work) for _ in range(5)]
    assert batcher.fits(forks) and not batcher.fits([*forks, work])  # three shared spans, and one more for each
    fresh = Work()
    fresh.extend(some_ids(3 * SPAN, 1))
    assert batcher.fits([work, fresh]) and not batcher.fits([work, forks[0], fresh])
    for other in (work, *forks):
        batcher.drop(other)
