"""Forks, parking and files under `AsyncEngine`: the same as for a `Session`, while others decode."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import anyio
import pytest
import torch

from agentkit_engine import AsyncEngine, AsyncSession, Engine, ModelSpec, SamplingParams, SessionBusyError
from agentkit_engine.model import Decoder

from .conftest import randomize_, small_config

pytestmark = pytest.mark.anyio
PARAMS = SamplingParams(seed=5, max_tokens=4)


@pytest.fixture(scope="module")
def engine() -> Engine:
    spec = ModelSpec.from_config(small_config(0, 4, 128, sliding_window=48, index_topk=8))
    decoder = randomize_(Decoder(spec), torch.Generator().manual_seed(1))
    return Engine(decoder, name="small", dialect="v4-preview", folder=Path("none"))


def some_ids(count: int, seed: int) -> list[int]:
    ids: list[int] = torch.randint(0, 96, (count,), generator=torch.Generator().manual_seed(seed)).tolist()
    return ids


async def say(session: AsyncSession) -> list[tuple[int, float]]:
    return [(token.id, token.logprob) async for token in session.generate(PARAMS)]


def alone(engine: Engine, ids: Sequence[int]) -> list[tuple[int, float]]:
    with engine.session() as session:
        session.append(ids)
        return [(token.id, token.logprob) for token in session.generate(PARAMS)]


async def test_forks_go_on_side_by_side_each_as_if_alone(engine: Engine) -> None:
    told = [some_ids(280, 0) + some_ids(20, seed) for seed in range(4)]
    expected = [alone(engine, ids) for ids in told]
    engine.batcher.cache.clear()
    before = engine.batcher.prefilled
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
    assert engine.batcher.prefilled - before == 280 + 4 * 20
    first = forks[0].token_ids[280]
    for number, ids in enumerate(told):
        assert said[number] == alone(engine, [*ids[:280], first, *ids[280:]])
    assert expected[0] != expected[1]


async def test_a_parked_session_goes_on_where_it_stopped(engine: Engine) -> None:
    ids = some_ids(300, 1)
    expected = alone(engine, ids)
    engine.batcher.cache.clear()
    async with AsyncEngine(engine) as running, running.session() as session:
        await session.append(ids)
        before, said = engine.batcher.prefilled, []
        async for token in session.generate(PARAMS):
            said.append((token.id, token.logprob))
            if len(said) == 2:
                await session.park()
        assert said == expected
        assert engine.batcher.prefilled - before == 300
        assert (session.usage.hit_tokens, session.usage.miss_tokens) == (0, 300)


async def test_a_checkpoint_serves_sessions_that_begin_alike(engine: Engine) -> None:
    engine.batcher.cache.clear()
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
    """What was sampled, with its log-probabilities computed once more from the ids alone."""
    ids = session.token_ids
    rows = engine.batcher.logits(ids[:-1])[prompt - 1 :].log_softmax(-1)
    return [(token_id, row[token_id].item()) for token_id, row in zip(ids[prompt:], rows, strict=True)]


async def test_a_session_in_a_file_goes_on_in_another_block(engine: Engine, tmp_path: Path) -> None:
    async with AsyncEngine(engine) as running, running.session() as session:
        await session.append(some_ids(300, 4))
        await say(session)
        await session.save(tmp_path / "saved")
        expected, ids = await say(session), session.token_ids
    engine.batcher.cache.clear()
    before = engine.batcher.prefilled
    async with AsyncEngine(engine) as running:
        session = await running.open(tmp_path / "saved")
        assert await say(session) == expected
        assert session.token_ids == ids
    assert engine.batcher.prefilled == before


async def test_a_session_at_work_is_not_forked(engine: Engine) -> None:
    async with AsyncEngine(engine) as running, running.session() as session:
        await session.append(some_ids(900, 6))
        generation = session.generate(PARAMS)
        async with anyio.create_task_group() as task_group:
            task_group.start_soon(anext, generation)
            await anyio.lowlevel.checkpoint()
            with pytest.raises(SessionBusyError):
                await session.fork()
        await generation.aclose()


async def test_two_threads_over_one_engine_take_turns(engine: Engine) -> None:
    prompts = [some_ids(200, seed) for seed in range(6)]
    expected = [alone(engine, ids) for ids in prompts]
    engine.batcher.cache.clear()
    said: dict[int, list[tuple[int, float]]] = {}

    async def run(number: int) -> None:
        async with AsyncEngine(engine) as running, running.session() as session:
            await session.append(prompts[number])
            said[number] = await say(session)

    async with anyio.create_task_group() as task_group:
        for number in range(len(prompts)):
            task_group.start_soon(run, number)
    assert [said[number] for number in range(len(prompts))] == expected
