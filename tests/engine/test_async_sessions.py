"""Forks, parking and files under `AsyncEngine`: the same results as for a `Session`, while other sessions decode."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace

import anyio
import pytest
import torch
from anyio.lowlevel import checkpoint

from agentkit_engine import (
    AsyncEngine,
    AsyncSession,
    ContextLengthError,
    Engine,
    ModelSpec,
    OutOfMemoryError,
    SamplingParams,
    SessionBusyError,
)
from agentkit_engine.model import Decoder
from agentkit_engine.runtime import Request
from agentkit_engine.runtime.state import SPAN, Pools

from .conftest import make_random_decoder, randomize_, small_config, some_ids

pytestmark = pytest.mark.anyio
PARAMS = SamplingParams(seed=5, max_tokens=4)


@pytest.fixture(scope="module")
def engine() -> Engine:
    spec = ModelSpec.from_config(small_config(0, 4, 128, sliding_window=48, index_topk=8))
    decoder = randomize_(Decoder(spec), torch.Generator().manual_seed(1))
    return Engine(decoder, name="small", dialect="v4-preview", folder=Path("none"))


async def say(session: AsyncSession) -> list[tuple[int, float]]:
    return [(token.id, token.logprob) async for token in session.generate(PARAMS)]


def alone(engine: Engine, ids: Sequence[int]) -> list[tuple[int, float]]:
    with engine.session() as session:
        session.append(ids)
        return [(token.id, token.logprob) for token in session.generate(PARAMS)]


def short_of_memory(engine: Engine, spans: int = 4) -> Engine:
    """Return the same model with memory for a few spans."""
    sizes = Pools(engine.spec, slots=1, spans=1, device=torch.device("meta"))
    room = spans * sizes.bytes_per_span
    return Engine(engine.decoder, name="small", dialect="v4-preview", folder=Path("none"), kv_cache_bytes=room)


async def test_concurrent_forks_match_sessions_alone(engine: Engine) -> None:
    told = [some_ids(280, 0) + some_ids(20, seed) for seed in range(4)]
    expected = [alone(engine, ids) for ids in told]
    engine.scheduler.cache.clear()
    before = engine.scheduler.prefilled
    async with AsyncEngine(engine) as running, running.session() as session:
        await session.append(some_ids(280, 0))
        async for _ in session.generate(PARAMS):
            break
        forks = await session.fork(4)
        said: dict[int, list[tuple[int, float]]] = {}
        assert [fork.token_ids for fork in forks] == [session.token_ids] * 4

        async def go_on(number: int, fork: AsyncSession) -> None:
            await fork.append(some_ids(20, number))
            said[number] = await say(fork)

        async with anyio.create_task_group() as task_group:
            for number, fork in enumerate(forks):
                task_group.start_soon(go_on, number, fork)
    assert engine.scheduler.prefilled - before == 280 + 4 * 20
    first = forks[0].token_ids[280]
    for number, ids in enumerate(told):
        assert said[number] == alone(engine, [*ids[:280], first, *ids[280:]])
    assert expected[0] != expected[1]


async def test_a_parked_session_continues_where_it_stopped(engine: Engine) -> None:
    ids = some_ids(300, 1)
    expected = alone(engine, ids)
    engine.scheduler.cache.clear()
    async with AsyncEngine(engine) as running, running.session() as session:
        await session.append(ids)
        before, said = engine.scheduler.prefilled, []
        async for token in session.generate(PARAMS):
            said.append((token.id, token.logprob))
            if len(said) == 2:
                await session.park()
        assert said == expected
        assert engine.scheduler.prefilled - before == 300
        assert (session.usage.hit_tokens, session.usage.miss_tokens) == (0, 300)


async def test_a_checkpoint_serves_sessions_with_the_same_prefix(engine: Engine) -> None:
    engine.scheduler.cache.clear()
    async with AsyncEngine(engine) as running:
        for seed in (2, 3):
            async with running.session() as session:
                await session.append(some_ids(270, 9))
                await session.checkpoint()
                await session.append(some_ids(30, seed))
                assert await say(session) == alone_from_nothing(engine, session, 300)
                hits = 270 if seed == 3 else 0
                assert (session.usage.hit_tokens, session.usage.miss_tokens) == (hits, 300 - hits)


def alone_from_nothing(engine: Engine, session: AsyncSession, prompt: int) -> list[tuple[int, float]]:
    """Return the sampled ids with their log-probabilities, recomputed from the ids alone."""
    ids = session.token_ids
    rows = engine.scheduler.logits(ids[:-1])[prompt - 1 :].log_softmax(-1)
    return [(token_id, row[token_id].item()) for token_id, row in zip(ids[prompt:], rows, strict=True)]


async def test_a_saved_session_continues_in_another_block(engine: Engine, tmp_path: Path) -> None:
    async with AsyncEngine(engine) as running, running.session() as session:
        await session.append(some_ids(300, 4))
        await say(session)
        await session.save(tmp_path / "saved")
        expected, ids = await say(session), session.token_ids
    engine.scheduler.cache.clear()
    before = engine.scheduler.prefilled
    async with AsyncEngine(engine) as running:
        session = await running.open(tmp_path / "saved")
        assert await say(session) == expected
        assert session.token_ids == ids
    assert engine.scheduler.prefilled == before


async def test_forking_a_generating_session_is_refused(engine: Engine) -> None:
    async with AsyncEngine(engine) as running, running.session() as session:
        await session.append(some_ids(900, 6))
        generation = session.generate(PARAMS)
        async with anyio.create_task_group() as task_group:
            task_group.start_soon(anext, generation)
            await anyio.lowlevel.checkpoint()
            with pytest.raises(SessionBusyError):
                await session.fork()
        await generation.aclose()


async def test_pending_ids_are_computed_once_for_all_forks(engine: Engine) -> None:
    ids = some_ids(300, 11)
    expected, longer = alone(engine, ids), alone(engine, [*ids, 1])
    engine.scheduler.cache.clear()
    before = engine.scheduler.prefilled
    async with AsyncEngine(engine) as running, running.session() as session:
        await session.append(ids)
        said = [await say(fork) for fork in await session.fork(3)]
        assert said == [expected] * 3 and await say(session) == expected
    with engine.session() as alike:
        alike.append([*ids, 1])
        forks = alike.fork(2)
        assert all([(t.id, t.logprob) for t in fork.generate(PARAMS)] == longer for fork in forks)
        for fork in forks:
            fork.close()
    assert engine.scheduler.prefilled - before == 301
    async with AsyncEngine(engine) as running, running.session() as session:
        [empty] = await session.fork()
        assert not len(empty)


async def test_a_cancelled_fork_leaves_the_session_unchanged(engine: Engine) -> None:
    ids = some_ids(900, 12)
    expected = alone(engine, ids)
    engine.scheduler.cache.clear()
    async with AsyncEngine(engine) as running, running.session() as session:
        await session.append(ids)
        async with anyio.create_task_group() as task_group:
            task_group.start_soon(session.fork)
            await anyio.lowlevel.checkpoint()
            with pytest.raises(SessionBusyError):
                await session.append([1])
            task_group.cancel_scope.cancel()
        assert session.token_ids == tuple(ids)
        assert await say(session) == expected


async def test_a_fork_that_does_not_fit_raises_and_the_engine_continues(engine: Engine) -> None:
    async with AsyncEngine(short_of_memory(engine)) as running, running.session() as session:
        await session.append(some_ids(5 * 256, 13))
        with pytest.raises(OutOfMemoryError):
            await session.fork()
        async with running.session() as other:
            await other.append(some_ids(20, 14))
            assert await say(other) == alone(engine, some_ids(20, 14))


async def test_a_session_that_never_fits_fails_at_once_and_blocks_no_other(engine: Engine) -> None:
    expected = alone(engine, some_ids(20, 14))
    async with AsyncEngine(short_of_memory(engine)) as running, anyio.create_task_group() as task_group:
        busy, ended = running.session(), False

        async def talk() -> None:
            nonlocal ended
            await busy.append(some_ids(20, 15))
            async for _ in busy.generate(SamplingParams(seed=1, max_tokens=900)):
                pass
            ended = True

        task_group.start_soon(talk)
        while len(busy) < 22:
            await anyio.lowlevel.checkpoint()
        async with running.session() as long, running.session() as other:
            await long.append(some_ids(5 * SPAN, 16))
            with pytest.raises(OutOfMemoryError, match="1280 ids need 5 spans of memory, but there are 4"):
                await say(long)
            await other.append(some_ids(20, 14))
            assert await say(other) == expected
        assert not ended
        task_group.cancel_scope.cancel()


async def test_a_preempted_session_waits_until_it_fits_and_recomputes_once(engine: Engine) -> None:
    """Together the sessions outgrow memory while they decode."""
    prompts, many = {5: some_ids(700, 5), 0: some_ids(300, 0)}, SamplingParams(seed=5, max_tokens=400)
    expected: dict[int, list[int]] = {}
    for priority, ids in prompts.items():
        with engine.session() as session:
            session.append(ids)
            expected[priority] = [token.id for token in session.generate(many)]
    scarce, said = short_of_memory(engine, spans=7), dict[int, list[int]]()
    scarce.scheduler.speculate = False
    async with AsyncEngine(scarce) as running:

        async def speak(priority: int) -> None:
            async with running.session(priority=priority) as session:
                await session.append(prompts[priority])
                said[priority] = [token.id async for token in session.generate(many)]

        async with anyio.create_task_group() as task_group:
            for priority in prompts:
                task_group.start_soon(speak, priority)
    assert said == expected
    assert 1000 + 300 <= scarce.scheduler.prefilled <= 1000 + 2 * 300


async def test_forks_of_a_cancelled_call_hold_no_memory(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    fork, begun, go_on = engine.scheduler.fork, threading.Event(), threading.Event()

    def slow_fork(request: Request) -> Request:
        begun.set()
        go_on.wait(10)
        return fork(request)

    async with AsyncEngine(engine) as running:
        session = running.session()
        await session.append(some_ids(30, 17))
        await say(session)
        monkeypatch.setattr(engine.scheduler, "fork", slow_fork)
        async with anyio.create_task_group() as task_group:
            task_group.start_soon(session.fork, 3)
            assert await anyio.to_thread.run_sync(begun.wait, 10)
            task_group.cancel_scope.cancel()
            go_on.set()
    engine.scheduler.cache.clear()
    assert engine.scheduler.pools.bytes_held == 0


async def test_trio_works_too(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """trio has another name for call_soon_threadsafe."""
    token = SimpleNamespace(native_token=SimpleNamespace(run_sync_soon=asyncio.get_running_loop().call_soon_threadsafe))
    monkeypatch.setattr("agentkit_engine.async_engine.current_token", lambda: token)
    async with AsyncEngine(engine) as running, running.session() as session:
        await session.append(some_ids(20, 18))
        assert await say(session) == alone(engine, some_ids(20, 18))


async def test_two_threads_over_one_engine_take_turns(engine: Engine) -> None:
    prompts = [some_ids(200, seed) for seed in range(6)]
    expected = [alone(engine, ids) for ids in prompts]
    engine.scheduler.cache.clear()
    said: dict[int, list[tuple[int, float]]] = {}

    async def run(number: int) -> None:
        async with AsyncEngine(engine) as running, running.session() as session:
            await session.append(prompts[number])
            said[number] = await say(session)

    async with anyio.create_task_group() as task_group:
        for number in range(len(prompts)):
            task_group.start_soon(run, number)
    assert [said[number] for number in range(len(prompts))] == expected


async def test_sessions_that_do_not_fit_wait_by_priority_and_evict_no_active_session(engine: Engine) -> None:
    small = short_of_memory(engine)
    told = [some_ids(300, seed) for seed in range(4)]  # two spans each and one to continue, so they run one at a time
    expected = [alone(engine, ids) for ids in told]
    order: list[int] = []
    async with AsyncEngine(small) as running:

        async def take_turn(number: int, session: AsyncSession) -> None:
            assert await say(session) == expected[number]
            order.append(number)

        sessions = [running.session(priority=priority) for priority in (0, 0, 1, 2)]
        for session, ids in zip(sessions, told, strict=True):
            await session.append(ids)
        holder = sessions[0].generate(PARAMS)
        first = [await anext(holder)]
        async with anyio.create_task_group() as task_group:
            for number in (1, 2, 3):
                task_group.start_soon(take_turn, number, sessions[number])
            await anyio.wait_all_tasks_blocked()
            first += [token async for token in holder]
        assert [(token.id, token.logprob) for token in first] == expected[0]
    assert order == [3, 2, 1]
    assert small.scheduler.prefilled == 4 * 300  # no prompt was computed twice


async def test_a_session_whose_consumer_waits_for_one_that_does_not_fit_is_preempted(engine: Engine) -> None:
    small = short_of_memory(engine)
    async with AsyncEngine(small) as running, running.session() as outer, running.session() as inner:
        await outer.append(some_ids(300, 0))
        await inner.append(some_ids(300, 1))
        said: list[tuple[int, float]] = []
        async for token in outer.generate(PARAMS):
            if not said:
                assert await say(inner) == alone(engine, some_ids(300, 1))
            said.append((token.id, token.logprob))
    assert said == alone(engine, some_ids(300, 0))


async def test_admission_reads_the_scheduler_under_the_engines_lock(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    small, held = short_of_memory(engine), []
    for name in ("fits", "too_long"):
        look = getattr(small.scheduler, name)

        def noted(*args: object, look: Callable[..., bool] = look) -> bool:
            held.append(small.lock.locked())
            return look(*args)

        monkeypatch.setattr(small.scheduler, name, noted)
    async with AsyncEngine(small) as running, running.session() as first, running.session() as second:
        for session in (first, second):
            await session.append(some_ids(20, 1))
        async with anyio.create_task_group() as task_group:
            for session in (first, second):
                task_group.start_soon(say, session)
    assert held
    assert all(held)


async def test_a_generation_ends_at_the_last_position_and_computes_nothing_beyond(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder = make_random_decoder(ModelSpec.from_config(small_config(0, 4, max_position_embeddings=70)))
    short = Engine(decoder, name="small", dialect="v4-preview", folder=Path("none"))
    lengths: list[int] = []
    step = short.scheduler.step

    def noted(requests: Sequence[Request]) -> None:
        lengths.extend(request.length for request in requests)
        step(requests)

    monkeypatch.setattr(short.scheduler, "step", noted)
    async with AsyncEngine(short) as running, running.session() as session:
        await session.append(some_ids(60))
        with pytest.raises(ContextLengthError):
            async for _ in session.generate(SamplingParams(seed=1)):
                for _ in range(2000):  # lets the model thread run meanwhile
                    await checkpoint()
        assert len(session) == 70
    assert max(lengths) < 70  # the id at the last position is sampled and never computed
