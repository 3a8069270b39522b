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
from agentkit_engine.runtime import Pools, Request, Scheduler
from agentkit_engine.runtime.prefix_cache import IdChain
from agentkit_engine.runtime.request import CHECKPOINT_EVERY
from agentkit_engine.runtime.scheduler import SHORT_PROMPT
from agentkit_engine.runtime.state import SPAN

from .conftest import randomize_, small_config, some_ids

VOCAB = 96
GREEDY = SamplingParams(temperature=0, max_tokens=3)


@pytest.fixture(scope="module")
def decoder() -> Decoder:
    spec = ModelSpec.from_config(small_config(0, 4, 128, sliding_window=48, index_topk=8))
    return randomize_(Decoder(spec), torch.Generator().manual_seed(1)).eval()


@pytest.fixture
def scheduler(decoder: Decoder) -> Scheduler:
    return Scheduler(decoder, kv_cache_bytes=64 << 20)


@pytest.fixture
def engine(decoder: Decoder) -> Engine:
    return Engine(decoder, name="small", dialect="v4-preview", folder=Path("none"))


def run(scheduler: Scheduler, ids: Sequence[int], *, mark: int | None = None) -> tuple[Request, Tensor]:
    request = Request(ids[:mark])
    if mark is not None:
        request.mark()
        request.extend(ids[mark:])
    while request.logits_V is None:
        scheduler.step([request])
    return request, request.logits_V


HEADS = (1, 100, SPAN - 1, SPAN, SPAN + 1, 300)


@pytest.mark.parametrize("head", HEADS)
def test_a_marked_prefix_is_computed_once_for_all(scheduler: Scheduler, head: int) -> None:
    first = some_ids(head, 0) + some_ids(40, 1)
    run(scheduler, first, mark=head)
    assert scheduler.prefilled == head + 40
    for seed in (2, 3):
        ids = some_ids(head, 0) + some_ids(40, seed)
        request, logits_V = run(scheduler, ids)
        assert torch.equal(logits_V, scheduler.logits(ids)[-1])
        assert (request.usage.hit_tokens, request.usage.miss_tokens) == (head, 40)
    assert scheduler.prefilled == head + 3 * 40


def test_sessions_that_start_together_compute_their_prefix_once(scheduler: Scheduler) -> None:
    requests = [Request(), Request(), Request()]
    for request, seed in zip(requests, (1, 2, 2), strict=True):
        request.extend(some_ids(600, 0))
        request.mark()
        request.extend(some_ids(40, seed))
    while waiting := [request for request in requests if request.logits_V is None]:
        scheduler.step(waiting)
    assert scheduler.prefilled == 600 + 40 + 40 + 1  # the last id of the second of two equal prompts is computed again
    for request in requests:
        assert torch.equal(torch.as_tensor(request.logits_V), scheduler.logits(request.ids)[-1])


def test_sessions_do_not_wait_for_one_that_has_left(scheduler: Scheduler) -> None:
    leader, follower = Request(some_ids(700, 0)), Request(some_ids(700, 0))
    scheduler.step([leader, follower])
    assert (leader.computed, follower.computed) == (512, 0)
    scheduler.preempt(leader)
    while follower.logits_V is None:
        scheduler.step([follower])
    assert torch.equal(follower.logits_V, scheduler.logits(follower.ids)[-1])


def test_a_closed_session_can_be_continued(scheduler: Scheduler) -> None:
    ids = some_ids(290, 0)
    request, _ = run(scheduler, ids)
    request.push(5)
    scheduler.step([request])
    scheduler.park(request)
    longer = [*ids, 5, *some_ids(20, 1)]
    again, logits_V = run(scheduler, longer)
    assert torch.equal(logits_V, scheduler.logits(longer)[-1])
    assert (again.usage.hit_tokens, again.usage.miss_tokens) == (291, 20)
    assert (scheduler.prefilled, scheduler.sampled) == (290 + 20, 1)


def test_the_same_prompt_again_costs_one_token(scheduler: Scheduler) -> None:
    ids = some_ids(300, 0)
    _, expected = run(scheduler, ids)
    request, logits_V = run(scheduler, ids)
    assert torch.equal(logits_V, expected)
    assert (request.usage.hit_tokens, request.usage.miss_tokens) == (299, 1)


def test_a_session_that_diverges_a_few_tokens_back_reuses_the_rest(scheduler: Scheduler) -> None:
    ids = some_ids(300, 0)
    run(scheduler, ids)
    other = [*ids[:298], (ids[298] + 1) % VOCAB, 3]
    request, logits_V = run(scheduler, other)
    assert torch.equal(logits_V, scheduler.logits(other)[-1])
    assert request.usage.hit_tokens == 298
    far = [*ids[:280], (ids[280] + 1) % VOCAB]  # the rings do not reach back that far
    request, logits_V = run(scheduler, far)
    assert torch.equal(logits_V, scheduler.logits(far)[-1])
    assert request.usage.hit_tokens == 0


def test_a_shared_span_is_copied_before_it_is_written(scheduler: Scheduler) -> None:
    """A session shortened into a span that it shares with a fork writes into a copy."""
    ids = some_ids(SPAN + 2, 0)
    request, _ = run(scheduler, ids)
    fork = scheduler.fork(request)
    scheduler.truncate(request, SPAN - 1)
    request.extend(some_ids(60, 7))
    while request.logits_V is None:
        scheduler.step([request])
    assert torch.equal(torch.as_tensor(request.logits_V), scheduler.logits(request.ids)[-1])
    fork.extend(some_ids(60, 8))
    while fork.logits_V is None:
        scheduler.step([fork])
    assert torch.equal(torch.as_tensor(fork.logits_V), scheduler.logits(fork.ids)[-1])


def test_a_fork_costs_a_slot_and_a_span(scheduler: Scheduler) -> None:
    request, _ = run(scheduler, some_ids(3 * SPAN + 9, 0))
    scheduler.cache.clear()
    before = scheduler.pools.bytes_held
    forks = [scheduler.fork(request) for _ in range(4)]
    assert scheduler.pools.bytes_held - before == 4 * (scheduler.pools.bytes_per_slot + scheduler.pools.bytes_per_span)
    for fork in (*forks, request):
        scheduler.preempt(fork)
    assert scheduler.pools.bytes_held == 0


def test_a_parked_session_gets_its_own_state_back(scheduler: Scheduler) -> None:
    request, _ = run(scheduler, some_ids(300, 0))
    scheduler.cache.clear()
    before = scheduler.pools.bytes_held
    scheduler.park(request)
    assert (len(scheduler.cache), request.computed, scheduler.pools.bytes_held) == (1, 0, before)
    request.extend(some_ids(3, 1))
    scheduler.step([request])
    assert len(scheduler.cache) == 0 and scheduler.pools.bytes_held == before
    assert scheduler.prefilled == 303 and request.usage.hit_tokens == 0


def test_parked_state_found_by_another_session_serves_both(scheduler: Scheduler) -> None:
    ids = some_ids(300, 0)
    request, _ = run(scheduler, ids)
    fork = scheduler.fork(request)
    scheduler.cache.clear()
    for each in (request, fork):
        scheduler.park(each)
    finder, _ = run(scheduler, [*ids, 7])
    for each in (request, fork):
        each.extend([9])
        scheduler.step([each])
        assert torch.equal(torch.as_tensor(each.logits_V), scheduler.logits([*ids, 9])[-1])
    assert scheduler.prefilled == 300 + 3 and finder.usage.hit_tokens == 300


def test_a_parked_session_that_is_cut_and_diverges_is_not_found_under_its_old_ids(scheduler: Scheduler) -> None:
    request, _ = run(scheduler, some_ids(300, 0))
    scheduler.cache.clear()
    scheduler.park(request)
    scheduler.truncate(request, 290)
    request.extend(some_ids(40, 1))
    scheduler.step([request])
    assert torch.equal(torch.as_tensor(request.logits_V), scheduler.logits(request.ids)[-1])


def test_parked_sessions_are_evicted_when_memory_is_short_and_resume_unchanged(decoder: Decoder) -> None:
    scheduler = Scheduler(decoder, kv_cache_bytes=1)
    scheduler = Scheduler(decoder, kv_cache_bytes=4 * scheduler.pools.bytes_per_span)
    ids = some_ids(300, 0)
    request, _ = run(scheduler, ids)
    scheduler.park(request)
    run(scheduler, some_ids(800, 1))  # takes all four spans
    request.extend([9])
    while request.logits_V is None:
        scheduler.step([request])
    assert torch.equal(
        torch.as_tensor(request.logits_V), Scheduler(decoder, kv_cache_bytes=64 << 20).logits([*ids, 9])[-1]
    )
    assert scheduler.prefilled == 800 + 300 + 301


def test_long_prompts_leave_intermediate_checkpoints(scheduler: Scheduler) -> None:
    ids = some_ids(CHECKPOINT_EVERY + 300, 0)
    run(scheduler, ids)
    assert [scheduler.cache.holds(ids, IdChain(), n) for n in (CHECKPOINT_EVERY, len(ids))] == [True, True]


def test_the_least_valuable_checkpoint_is_evicted_first(decoder: Decoder) -> None:
    """Ends of prompts are evicted first, least recently used first, then turn ends; a branch's end goes before its
    prefix."""
    scheduler = Scheduler(decoder, kv_cache_bytes=64 << 20)
    cache = scheduler.cache
    head, a, b = some_ids(SPAN, 0), some_ids(SHORT_PROMPT, 1), some_ids(SHORT_PROMPT, 2)
    request, _ = run(scheduler, head + a, mark=len(head))  # the head, and the end of the prompt
    scheduler.park(request)  # the end of the prompt is now the end of a turn
    run(scheduler, head + b)
    run(scheduler, some_ids(SHORT_PROMPT, 3))
    run(scheduler, head + a)  # a use of it, and of the head
    kept = {"head": head, "turn a": head + a, "prompt b": head + b, "prompt c": some_ids(SHORT_PROMPT, 3)}
    order = []
    while cache.evict():
        gone = [name for name, ids in kept.items() if not cache.holds(ids, IdChain(), len(ids))]
        order += [name for name in gone if name not in order]
    assert order == ["prompt b", "prompt c", "turn a", "head"]


def test_a_prompt_that_sessions_share_outlives_the_ends_of_older_turns(decoder: Decoder) -> None:
    """The second session finds the first one's prompt, although its own memory has to come from the cache."""
    sizes = Pools(decoder.spec, slots=1, spans=1, device=torch.device("meta"))
    scheduler = Scheduler(decoder, kv_cache_bytes=4 * sizes.bytes_per_span)
    turn, ids = some_ids(100, 0), some_ids(SPAN + 40, 1)
    scheduler.park(run(scheduler, turn)[0])  # one span
    run(scheduler, ids)  # three: two of the session, and one of the checkpoint at the end of its prompt
    run(scheduler, ids)
    assert scheduler.prefilled == len(turn) + len(ids) + 1
    assert [scheduler.cache.holds(each, IdChain(), len(each)) for each in (turn, ids)] == [False, True]


def test_checkpoints_never_cost_a_session_its_state(decoder: Decoder) -> None:
    sizes = Pools(decoder.spec, slots=1, spans=1, device=torch.device("meta"))
    scheduler = Scheduler(decoder, kv_cache_bytes=4 * sizes.bytes_per_span)
    requests = [run(scheduler, some_ids(2 * SPAN, seed))[0] for seed in range(2)]
    assert [request.computed for request in requests] == [2 * SPAN, 2 * SPAN]
    run(scheduler, some_ids(SPAN, 5))
    assert sorted(request.computed for request in requests) == [
        0,
        2 * SPAN,
    ]  # only a session that requests memory gets it


def test_equal_spans_of_different_prompts_are_not_confused(scheduler: Scheduler) -> None:
    block = some_ids(SPAN, 0)
    run(scheduler, block + block)
    request, logits_V = run(scheduler, some_ids(SPAN, 1) + block)
    assert request.usage.hit_tokens == 0
    assert torch.equal(logits_V, scheduler.logits(request.ids)[-1])


def test_a_failed_session_leaves_no_checkpoint(decoder: Decoder) -> None:
    engine = Engine(copy.deepcopy(decoder), name="small", dialect="v4-preview", folder=Path("none"))
    unembedding = engine.scheduler.runner.forward.unembedding
    with engine.session() as session:
        session.append([1, 2, 3])
        unembedding.single[:] = torch.nan
        with pytest.raises(NonFiniteLogitsError):
            next(session.generate())
    assert len(engine.scheduler.cache) == 0


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
    assert engine.scheduler.prefilled == 200 + 3 * 30
    assert engine.scheduler.sampled <= 3 + 3 * 3


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
            engine.scheduler.preempt(session._request)


def test_a_saved_session_continues_without_prefill(engine: Engine, decoder: Decoder, tmp_path: Path) -> None:
    with engine.session() as session:
        session.append(some_ids(700, 0))
        list(session.generate(GREEDY))
        session.save(tmp_path / "session")
        expected = [(token.id, token.logprob) for token in session.generate(GREEDY)]
    later = Engine(decoder, name="small", dialect="v4-preview", folder=Path("none"))
    opened = later.open(tmp_path / "session")
    assert [(token.id, token.logprob) for token in opened.generate(GREEDY)] == expected
    assert later.scheduler.prefilled == 0
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


def test_eviction_frees_unshared_memory(scheduler: Scheduler) -> None:
    request, _ = run(scheduler, some_ids(SPAN + SHORT_PROMPT, 0), mark=SPAN)
    scheduler.preempt(request)
    assert len(scheduler.cache) == 2
    scheduler.cache.clear()
    assert scheduler.pools.bytes_held == 0
