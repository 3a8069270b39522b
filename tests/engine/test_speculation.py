"""Guesses change how many forwards there are, and nothing else."""

from __future__ import annotations

from pathlib import Path

import anyio
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from agentkit_engine import AsyncEngine, Engine, ModelSpec, SamplingParams
from agentkit_engine.model import Decoder
from agentkit_engine.runtime import Work
from agentkit_engine.speculation import LONGEST, PATIENCE, Drafter

from .conftest import randomize_, small_config


def make_engine() -> Engine:
    spec = ModelSpec.from_config(small_config(0, 4, 128, sliding_window=48, index_topk=8))
    decoder = randomize_(Decoder(spec), torch.Generator().manual_seed(1))
    return Engine(decoder, name="small", dialect="v4-preview", folder=Path("none"))


@pytest.fixture(scope="module")
def engine() -> Engine:
    return make_engine()


def said(engine: Engine, ids: list[int], params: SamplingParams, *, speculate: bool) -> list[tuple[int, float]]:
    engine.batcher.cache.clear()
    engine.batcher.speculate = speculate
    with engine.session() as session:
        session.append(ids)
        return [(token.id, token.logprob) for token in session.generate(params)]


REPEATING = [1, 2, 3, 4, 5, 6, 7, 8, 9] * 6


@pytest.mark.parametrize("temperature", [0, 0.05, 1])
@pytest.mark.parametrize("ids", [REPEATING, [*range(1, 90), 5, 6, 7, 8]])
def test_the_same_bits_with_and_without(engine: Engine, ids: list[int], temperature: float) -> None:
    params = SamplingParams(temperature=temperature, seed=3, max_tokens=60)
    expected = said(engine, ids, params, speculate=False)
    assert said(engine, ids, params, speculate=True) == expected
    last = expected[len(expected) // 2][0]
    stopped = SamplingParams(temperature=temperature, seed=3, max_tokens=60, stop_ids=frozenset([last]))
    first = [token_id for token_id, _ in expected].index(last)
    assert said(engine, ids, stopped, speculate=True) == expected[: first + 1]


def test_what_repeats_takes_fewer_forwards(engine: Engine) -> None:
    params, steps = SamplingParams(temperature=0, logit_bias={5: 1e6}, max_tokens=200), []
    for speculate in (False, True):
        before = engine.batcher.steps
        assert [token_id for token_id, _ in said(engine, REPEATING, params, speculate=speculate)] == [5] * 200
        steps.append(engine.batcher.steps - before)
    assert steps[0] == 200
    assert steps[1] < 200 / LONGEST + 10


def test_after_right_and_wrong_guesses_a_session_can_be_shortened_forked_and_saved(
    engine: Engine, tmp_path: Path
) -> None:
    """At every token of a generation that guesses."""
    engine.batcher.speculate = True
    params = SamplingParams(temperature=0, max_tokens=40)
    rest = SamplingParams(temperature=0, max_tokens=3)
    with engine.session() as session:
        session.append(REPEATING)
        for count, _ in enumerate(session.generate(params)):
            if count % 3 == 0:
                (fork,) = session.fork()
                session.save(tmp_path / "saved")
                for other in (fork, engine.open(tmp_path / "saved")):
                    ids = list(other.token_ids)
                    tokens = [token.id for token in other.generate(rest)]
                    rows = engine.logits([*ids, *tokens[:-1]])[-3:]
                    assert tokens == rows.argmax(-1).tolist()
                    other.close()


@pytest.mark.anyio
async def test_many_sessions_guess_in_the_same_forwards() -> None:
    engine = make_engine()
    params = SamplingParams(temperature=0, max_tokens=60)
    prompts = [[seed, *REPEATING[seed:], 50 + seed, *REPEATING[:20]] for seed in range(5)]
    expected = [said(engine, ids, params, speculate=False) for ids in prompts]
    engine.batcher.cache.clear()
    engine.batcher.speculate = True
    got: dict[int, list[tuple[int, float]]] = {}

    async def run(running: AsyncEngine, number: int) -> None:
        async with running.session() as session:
            await session.append(prompts[number])
            got[number] = [(token.id, token.logprob) async for token in session.generate(params)]

    async with AsyncEngine(engine) as running, anyio.create_task_group() as task_group:
        for number in range(len(prompts)):
            task_group.start_soon(run, running, number)
    assert [got[number] for number in range(len(prompts))] == expected
    assert engine.batcher.drafted > 0


def test_only_what_was_sampled_is_guessed_on(engine: Engine) -> None:
    work = Work(REPEATING)
    assert work.draft(4) == []  # a prompt is pending
    while work.logits_V is None:
        engine.batcher.advance([work])
    work.push(1)
    assert work.draft(4)
    work.extend([2])
    assert work.draft(4) == []


def test_the_length_follows_what_was_right() -> None:
    drafter, ids = Drafter(), [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12] * 2
    sizes = []
    for _ in range(4):
        draft = drafter.propose(ids, 100)
        sizes.append(len(draft))
        ids = [*ids, *draft]
        for _ in draft:
            drafter.accepted()
    assert sizes == [2, 4, LONGEST, LONGEST]
    assert ids == [number % 12 + 1 for number in range(24 + sum(sizes))]
    drafter.propose(ids, 100)
    assert [len(drafter.propose(ids, 100)) for _ in range(PATIENCE + 2)] == [0] * PATIENCE + [1, 0]  # all were wrong


@given(st.lists(st.lists(st.integers(0, 3), max_size=6), max_size=8), st.integers(0, 5))
def test_a_guess_is_what_followed_the_last_time(pieces: list[list[int]], most: int) -> None:
    drafter, ids = Drafter(), []
    for piece in pieces:
        ids += piece
        draft = drafter.propose(ids, most)
        assert len(draft) <= most
        if draft:
            drafter.accepted()
            ends = [n for n in (4, 2) if any(ids[i : i + n] == ids[-n:] for i in range(len(ids) - n))]
            n = ends[0]
            last = max(i for i in range(len(ids) - n) if ids[i : i + n] == ids[-n:])
            follows = ids[last + n :]
            assert draft == [follows[index % len(follows)] for index in range(len(draft))]
