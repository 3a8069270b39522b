"""Sessions resume from each other's state: the same bits, no token computed twice, and the order of eviction."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from agentkit_engine import Engine, ModelSpec, NonFiniteLogitsError, SamplingParams, SavedSessionError
from agentkit_engine.model import Decoder
from agentkit_engine.runtime import Batcher, Pools, Work
from agentkit_engine.runtime.batcher import CHECKPOINT_EVERY, SHORT_PROMPT
from agentkit_engine.runtime.prefix_cache import IdChain
from agentkit_engine.runtime.state import SPAN

from .conftest import randomize_, small_config, some_ids

VOCAB = 96
GREEDY = SamplingParams(temperature=0, max_tokens=3)


@pytest.fixture(scope="module")
def decoder() -> Decoder:
    spec = ModelSpec.from_config(small_config(0, 4, 128, sliding_window=48, index_topk=8))
    return randomize_(Decoder(spec), torch.Generator().manual_seed(1)).eval()


@pytest.fixture
def batcher(decoder: Decoder) -> Batcher:
    return Batcher(decoder, kv_cache_bytes=64 << 20)


@pytest.fixture
def engine(decoder: Decoder) -> Engine:
    return Engine(decoder, name="small", dialect="v4-preview", folder=Path("none"))


def run(batcher: Batcher, ids: Sequence[int], *, mark: int | None = None) -> tuple[Work, Tensor]:
    work = Work(ids[:mark])
    if mark is not None:
        work.mark()
        work.extend(ids[mark:])
    while work.logits_V is None:
        batcher.advance([work])
    return work, work.logits_V


HEADS = (1, 100, SPAN - 1, SPAN, SPAN + 1, 300)


@pytest.mark.parametrize("head", HEADS)
def test_a_marked_prefix_is_computed_once_for_all(batcher: Batcher, head: int) -> None:
    first = some_ids(head, 0) + some_ids(40, 1)
    run(batcher, first, mark=head)
    assert batcher.prefilled == head + 40
    for seed in (2, 3):
        ids = some_ids(head, 0) + some_ids(40, seed)
        work, logits_V = run(batcher, ids)
        assert torch.equal(logits_V, batcher.logits(ids)[-1])
        assert (work.usage.hit_tokens, work.usage.miss_tokens) == (head, 40)
    assert batcher.prefilled == head + 3 * 40


def test_sessions_that_start_together_compute_their_prefix_once(batcher: Batcher) -> None:
    works = [Work(), Work(), Work()]
    for work, seed in zip(works, (1, 2, 2), strict=True):
        work.extend(some_ids(600, 0))
        work.mark()
        work.extend(some_ids(40, seed))
    while waiting := [work for work in works if work.logits_V is None]:
        batcher.advance(waiting)
    assert batcher.prefilled == 600 + 40 + 40 + 1  # the last id of the second of two equal prompts is computed again
    for work in works:
        assert torch.equal(torch.as_tensor(work.logits_V), batcher.logits(work.ids)[-1])


def test_sessions_do_not_wait_for_one_that_has_left(batcher: Batcher) -> None:
    leader, follower = Work(some_ids(700, 0)), Work(some_ids(700, 0))
    batcher.advance([leader, follower])
    assert (leader.computed, follower.computed) == (512, 0)
    batcher.drop(leader)
    while follower.logits_V is None:
        batcher.advance([follower])
    assert torch.equal(follower.logits_V, batcher.logits(follower.ids)[-1])


def test_a_closed_session_can_be_continued(batcher: Batcher) -> None:
    ids = some_ids(290, 0)
    work, _ = run(batcher, ids)
    work.push(5)
    batcher.advance([work])
    batcher.park(work)
    longer = [*ids, 5, *some_ids(20, 1)]
    again, logits_V = run(batcher, longer)
    assert torch.equal(logits_V, batcher.logits(longer)[-1])
    assert (again.usage.hit_tokens, again.usage.miss_tokens) == (291, 20)
    assert (batcher.prefilled, batcher.sampled) == (290 + 20, 1)


def test_the_same_prompt_again_costs_one_token(batcher: Batcher) -> None:
    ids = some_ids(300, 0)
    _, expected = run(batcher, ids)
    work, logits_V = run(batcher, ids)
    assert torch.equal(logits_V, expected)
    assert (work.usage.hit_tokens, work.usage.miss_tokens) == (299, 1)


def test_a_session_that_diverges_a_few_tokens_back_reuses_the_rest(batcher: Batcher) -> None:
    ids = some_ids(300, 0)
    run(batcher, ids)
    other = [*ids[:298], (ids[298] + 1) % VOCAB, 3]
    work, logits_V = run(batcher, other)
    assert torch.equal(logits_V, batcher.logits(other)[-1])
    assert work.usage.hit_tokens == 298
    far = [*ids[:280], (ids[280] + 1) % VOCAB]  # the rings do not reach back that far
    work, logits_V = run(batcher, far)
    assert torch.equal(logits_V, batcher.logits(far)[-1])
    assert work.usage.hit_tokens == 0


def test_a_shared_span_is_copied_before_it_is_written(batcher: Batcher) -> None:
    """A session shortened into a span that it shares with a fork writes into a copy."""
    ids = some_ids(SPAN + 2, 0)
    work, _ = run(batcher, ids)
    fork = batcher.fork(work)
    batcher.truncate(work, SPAN - 1)
    work.extend(some_ids(60, 7))
    while work.logits_V is None:
        batcher.advance([work])
    assert torch.equal(torch.as_tensor(work.logits_V), batcher.logits(work.ids)[-1])
    fork.extend(some_ids(60, 8))
    while fork.logits_V is None:
        batcher.advance([fork])
    assert torch.equal(torch.as_tensor(fork.logits_V), batcher.logits(fork.ids)[-1])


def test_a_fork_costs_a_slot_and_a_span(batcher: Batcher) -> None:
    work, _ = run(batcher, some_ids(3 * SPAN + 9, 0))
    batcher.cache.clear()
    before = batcher.pools.bytes_held
    forks = [batcher.fork(work) for _ in range(4)]
    assert batcher.pools.bytes_held - before == 4 * (batcher.pools.bytes_per_slot + batcher.pools.bytes_per_span)
    for fork in (*forks, work):
        batcher.drop(fork)
    assert batcher.pools.bytes_held == 0


def test_a_parked_session_gets_its_own_state_back(batcher: Batcher) -> None:
    work, _ = run(batcher, some_ids(300, 0))
    batcher.cache.clear()
    before = batcher.pools.bytes_held
    batcher.park(work)
    assert (len(batcher.cache), work.computed, batcher.pools.bytes_held) == (1, 0, before)
    work.extend(some_ids(3, 1))
    batcher.advance([work])
    assert len(batcher.cache) == 0 and batcher.pools.bytes_held == before
    assert batcher.prefilled == 303 and work.usage.hit_tokens == 0


def test_parked_state_found_by_another_session_serves_both(batcher: Batcher) -> None:
    ids = some_ids(300, 0)
    work, _ = run(batcher, ids)
    fork = batcher.fork(work)
    batcher.cache.clear()
    for each in (work, fork):
        batcher.park(each)
    finder, _ = run(batcher, [*ids, 7])
    for each in (work, fork):
        each.extend([9])
        batcher.advance([each])
        assert torch.equal(torch.as_tensor(each.logits_V), batcher.logits([*ids, 9])[-1])
    assert batcher.prefilled == 300 + 3 and finder.usage.hit_tokens == 300


def test_a_parked_session_that_is_cut_and_diverges_is_not_found_under_its_old_ids(batcher: Batcher) -> None:
    work, _ = run(batcher, some_ids(300, 0))
    batcher.cache.clear()
    batcher.park(work)
    batcher.truncate(work, 290)
    work.extend(some_ids(40, 1))
    batcher.advance([work])
    assert torch.equal(torch.as_tensor(work.logits_V), batcher.logits(work.ids)[-1])


def test_parked_sessions_are_evicted_when_memory_is_short_and_resume_unchanged(decoder: Decoder) -> None:
    batcher = Batcher(decoder, kv_cache_bytes=1)
    batcher = Batcher(decoder, kv_cache_bytes=4 * batcher.pools.bytes_per_span)
    ids = some_ids(300, 0)
    work, _ = run(batcher, ids)
    batcher.park(work)
    run(batcher, some_ids(800, 1))  # takes all four spans
    work.extend([9])
    while work.logits_V is None:
        batcher.advance([work])
    assert torch.equal(torch.as_tensor(work.logits_V), Batcher(decoder, kv_cache_bytes=64 << 20).logits([*ids, 9])[-1])
    assert batcher.prefilled == 800 + 300 + 301


def test_long_prompts_leave_intermediate_checkpoints(batcher: Batcher) -> None:
    ids = some_ids(CHECKPOINT_EVERY + 300, 0)
    run(batcher, ids)
    assert [batcher.cache.holds(ids, IdChain(), n) for n in (CHECKPOINT_EVERY, len(ids))] == [True, True]


def test_the_least_valuable_checkpoint_is_evicted_first(decoder: Decoder) -> None:
    """Ends of prompts are evicted first, least recently used first, then turn ends; a branch's end goes before its
    prefix."""
    batcher = Batcher(decoder, kv_cache_bytes=64 << 20)
    cache = batcher.cache
    head, a, b = some_ids(SPAN, 0), some_ids(SHORT_PROMPT, 1), some_ids(SHORT_PROMPT, 2)
    work, _ = run(batcher, head + a, mark=len(head))  # the head, and the end of the prompt
    batcher.park(work)  # the end of the prompt is now the end of a turn
    run(batcher, head + b)
    run(batcher, some_ids(SHORT_PROMPT, 3))
    run(batcher, head + a)  # a use of it, and of the head
    kept = {"head": head, "turn a": head + a, "prompt b": head + b, "prompt c": some_ids(SHORT_PROMPT, 3)}
    order = []
    while cache.evict():
        gone = [name for name, ids in kept.items() if not cache.holds(ids, IdChain(), len(ids))]
        order += [name for name in gone if name not in order]
    assert order == ["prompt b", "prompt c", "turn a", "head"]


def test_checkpoints_never_cost_a_session_its_state(decoder: Decoder) -> None:
    sizes = Pools(decoder.spec, slots=1, spans=1, device=torch.device("meta"))
    batcher = Batcher(decoder, kv_cache_bytes=4 * sizes.bytes_per_span)
    works = [run(batcher, some_ids(2 * SPAN, seed))[0] for seed in range(2)]
    assert [work.computed for work in works] == [2 * SPAN, 2 * SPAN]
    run(batcher, some_ids(SPAN, 5))
    assert sorted(work.computed for work in works) == [0, 2 * SPAN]  # only a session that requests memory gets it


def test_equal_spans_of_different_prompts_are_not_confused(batcher: Batcher) -> None:
    block = some_ids(SPAN, 0)
    run(batcher, block + block)
    work, logits_V = run(batcher, some_ids(SPAN, 1) + block)
    assert work.usage.hit_tokens == 0
    assert torch.equal(logits_V, batcher.logits(work.ids)[-1])


def test_a_failed_session_leaves_no_checkpoint(decoder: Decoder) -> None:
    engine = Engine(copy.deepcopy(decoder), name="small", dialect="v4-preview", folder=Path("none"))
    unembedding = engine.batcher.runner.forward.unembedding
    with engine.session() as session:
        session.append([1, 2, 3])
        unembedding.array[:] = torch.nan
        with pytest.raises(NonFiniteLogitsError):
            next(session.generate())
    assert len(engine.batcher.cache) == 0


def test_nothing_is_computed_twice_while_there_is_memory(engine: Engine) -> None:
    with engine.session() as session:
        session.append(some_ids(200, 0))
        session.checkpoint()
        list(session.generate(GREEDY))
        forks = session.fork(3)
        for number, fork in enumerate(forks):
            fork.append(some_ids(30, number + 1))
            fork.park()
            list(fork.generate(GREEDY))
            fork.close()
    assert engine.batcher.prefilled == 200 + 3 * 30
    assert engine.batcher.sampled <= 3 + 3 * 3


def test_a_checkpoint_can_be_requested_at_any_time(engine: Engine) -> None:
    """If nothing is left to compute, it is taken at once."""
    with engine.session() as session:
        session.append(some_ids(40, 0))
        for _ in session.generate(SamplingParams(temperature=0, max_tokens=6)):
            session.checkpoint()
            with engine.session() as other:
                other.append([*session.token_ids, 1])
                next(other.generate(GREEDY))
                assert other.usage.miss_tokens <= 2  # the id sampled last is computed by the next step
            engine.batcher.drop(session._request)


def test_a_saved_session_continues_without_prefill(engine: Engine, decoder: Decoder, tmp_path: Path) -> None:
    with engine.session() as session:
        session.append(some_ids(700, 0))
        list(session.generate(GREEDY))
        session.save(tmp_path / "session")
        expected = [(token.id, token.logprob) for token in session.generate(GREEDY)]
    later = Engine(decoder, name="small", dialect="v4-preview", folder=Path("none"))
    opened = later.open(tmp_path / "session")
    assert [(token.id, token.logprob) for token in opened.generate(GREEDY)] == expected
    assert later.batcher.prefilled == 0
    assert opened.token_ids == session.token_ids


def test_a_session_that_was_never_computed_can_be_saved(engine: Engine, tmp_path: Path) -> None:
    with engine.session() as session:
        session.append([1, 2, 3])
        session.save(tmp_path / "session")
    assert engine.open(tmp_path / "session").token_ids == (1, 2, 3)


def test_a_file_that_is_not_a_saved_session_is_rejected(engine: Engine, tmp_path: Path) -> None:
    path = tmp_path / "session"
    with engine.session() as session:
        session.append(some_ids(40, 0))
        next(session.generate(GREEDY))
        session.save(path)
    whole = path.read_bytes()
    path.write_bytes(whole[:-7])
    with pytest.raises(SavedSessionError, match="not a whole safetensors file"):
        engine.open(path)
    path.write_bytes(whole[:-7] + b"\x01" * 7)
    with pytest.raises(SavedSessionError, match="does not match its checksum"):
        engine.open(path)
    path.write_bytes(whole.replace(b"agentkit-session/1", b"agentkit-session/2"))
    with pytest.raises(SavedSessionError, match="format is 'agentkit-session/2', expected 'agentkit-session/1'"):
        engine.open(path)
    path.write_bytes(whole)
    spec = ModelSpec.from_config(small_config(0, 4, 128, sliding_window=48, index_topk=8))
    other = Engine(
        randomize_(Decoder(spec), torch.Generator().manual_seed(2)).eval(),
        name="small",
        dialect="v4-preview",
        folder=Path("none"),
    )
    with pytest.raises(SavedSessionError, match=r"model is '\w+', expected"):
        other.open(path)
    with pytest.raises(FileNotFoundError):
        engine.open(tmp_path / "nothing")


def test_eviction_frees_unshared_memory(batcher: Batcher) -> None:
    work, _ = run(batcher, some_ids(SPAN + SHORT_PROMPT, 0), mark=SPAN)
    batcher.drop(work)
    assert len(batcher.cache) == 2
    batcher.cache.clear()
    assert batcher.pools.bytes_held == 0
