"""Sessions: append-only ids whose state can be dropped at any point, and sampling that depends only on ids and seed."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import anyio
import pytest
import torch
from anyio import lowlevel

from agentkit_engine import (
    AsyncEngine,
    AsyncSession,
    ContextLengthError,
    Engine,
    EngineClosedError,
    ModelSpec,
    SampledToken,
    SamplingParams,
    SessionBusyError,
    SessionClosedError,
    SessionEmptyError,
    TokenIdError,
)
from agentkit_engine.model import Decoder, initialize_
from agentkit_engine.model.forward import ExpertLayer, Rotations
from agentkit_engine.runtime import ScheduledTokens
from agentkit_engine.runtime.scheduled import Computed
from agentkit_kernels.cpu.batch import Batch
from agentkit_kernels.cpu.loops import Floats

from .conftest import some_ids

pytestmark = pytest.mark.anyio

VOCAB = 96
POSITIONS = 900
SPEC = ModelSpec.from_config(
    {
        "model_type": "deepseek_v4",
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "num_hidden_layers": 3,
        "num_hash_layers": 1,
        "num_nextn_predict_layers": 0,
        "compress_ratios": [0, 4, 128],
        "num_attention_heads": 4,
        "head_dim": 16,
        "qk_rope_head_dim": 8,
        "q_lora_rank": 16,
        "o_groups": 2,
        "o_lora_rank": 8,
        "sliding_window": 16,
        "index_n_heads": 16,
        "index_head_dim": 16,
        "index_topk": 512,
        "hc_mult": 4,
        "hc_sinkhorn_iters": 20,
        "hc_eps": 1e-6,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "routed_scaling_factor": 1.5,
        "swiglu_limit": 10.0,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "compress_rope_theta": 160000.0,
        "rope_scaling": {
            "type": "yarn",
            "factor": 16.0,
            "original_max_position_embeddings": 65536,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
        },
        "max_position_embeddings": POSITIONS,
        "bos_token_id": 0,
        "eos_token_id": 1,
    }
)


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="module")
def engine() -> Engine:
    decoder = initialize_(Decoder(SPEC), torch.Generator().manual_seed(5), std=0.3)
    return Engine(decoder, name="random", dialect="v4-preview", folder=Path("/nonexistent"))


def alone(engine: Engine, ids: Sequence[int], params: SamplingParams) -> list[SampledToken]:
    with engine.session() as session:
        session.append(ids)
        return list(session.generate(params))


@pytest.mark.parametrize(
    "bad",
    [
        *({"temperature": -1.0}, {"temperature": math.nan}, {"top_p": 0.0}, {"top_p": 1.1}, {"max_tokens": 0}),
        *({"top_k": 0}, {"min_p": 1.1}, {"min_p": -0.1}, {"repetition_penalty": 0.0}, {"presence_penalty": math.inf}),
        *({"frequency_penalty": math.nan}, {"top_logprobs": -1}, {"logit_bias": {-1: 1.0}}),
        *({"logit_bias": {1: math.inf}}, {"stop": ("",)}, {"stop": "text"}, {"stop": (1,)}),
    ],
)
def test_sampling_params_outside_their_range(bad: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(bad))):
        SamplingParams(**bad)


# --- sessions ------------------------------------------------------------------------------------------------------


def test_penalties_use_the_sessions_own_past(engine: Engine) -> None:
    with engine.session() as session:
        session.append([1, 2, 3])
        params = SamplingParams(temperature=0, frequency_penalty=1e9, max_tokens=30)
        ids = [token.id for token in session.generate(params)]
    assert len(set(ids)) == 30


@pytest.mark.parametrize("chunks", [[700], [1] * 7 + [693], [128, 129, 127, 316], [512, 188], [3, 5, 600, 92]])
def test_chunked_append_equals_whole(engine: Engine, chunks: list[int]) -> None:
    ids = some_ids(700)
    expected = torch.log_softmax(engine.logits(ids)[-1], 0)
    with engine.session() as session:
        rest = ids
        for size in chunks:
            session.append(rest[:size])
            rest = rest[size:]
        tokens = list(session.generate(SamplingParams(temperature=0, max_tokens=1)))
    assert tokens[0].id == int(expected.argmax())
    assert tokens[0].logprob == pytest.approx(float(expected[tokens[0].id]), abs=1e-4)


def test_logprobs_can_be_recomputed_from_the_ids_alone(engine: Engine) -> None:
    with engine.session() as session:
        session.append(some_ids(600))
        first = list(session.generate(SamplingParams(seed=1, max_tokens=40, temperature=1.3, top_p=0.9)))
        session.append(some_ids(30, seed=2))
        second = list(session.generate(SamplingParams(seed=1, max_tokens=40)))
        ids = session.token_ids
    assert list(ids[600:640]) == [token.id for token in first] and list(ids[670:]) == [token.id for token in second]
    logprobs = torch.log_softmax(engine.logits(ids), -1)
    scored = engine.logprobs(ids)
    assert torch.equal(scored, logprobs[:-1].gather(1, torch.tensor(ids[1:])[:, None])[:, 0])
    assert [token.logprob for token in first] == scored[599:639].tolist()
    assert torch.equal(engine.scheduler.logprobs(ids, chunk=7), scored) and engine.logprobs([5]).shape == (0,)
    for start, tokens in ((600, first), (670, second)):
        for offset, token in enumerate(tokens):
            assert token.logprob == pytest.approx(float(logprobs[start + offset - 1, token.id]), abs=1e-4)


def test_the_sampled_id_is_in_the_list_when_it_is_yielded(engine: Engine) -> None:
    with engine.session() as session:
        session.append([3])
        for count, token in enumerate(session.generate(SamplingParams(seed=4, max_tokens=5)), start=2):
            assert session.token_ids[-1] == token.id and len(session) == len(session.token_ids) == count


def test_seeds(engine: Engine) -> None:
    ids = some_ids(20)
    params = SamplingParams(seed=11, max_tokens=30)
    assert alone(engine, ids, params) == alone(engine, ids, params)
    assert alone(engine, ids, params) != alone(engine, ids, dataclasses.replace(params, seed=12))
    unseeded = dataclasses.replace(params, seed=None)
    assert alone(engine, ids, unseeded) != alone(engine, ids, unseeded)


def test_splitting_generate_calls_changes_nothing(engine: Engine) -> None:
    ids, params = some_ids(20), SamplingParams(seed=11, max_tokens=24)
    with engine.session() as session:
        session.append(ids)
        pieces = [list(session.generate(dataclasses.replace(params, max_tokens=n))) for n in (1, 7, 16)]
    assert [token for piece in pieces for token in piece] == alone(engine, ids, params)


def test_greedy_follows_the_argmax(engine: Engine) -> None:
    ids = some_ids(20)
    tokens = alone(engine, ids, SamplingParams(temperature=0, max_tokens=8))
    logits = engine.logits(ids + [token.id for token in tokens])
    assert [token.id for token in tokens] == logits[19:-1].argmax(-1).tolist()


def test_a_stop_id_is_yielded_kept_and_ends_the_generation(engine: Engine) -> None:
    params = SamplingParams(seed=11, max_tokens=30)
    free = [token.id for token in alone(engine, some_ids(20), params)]
    stop = free[6]
    stopped = alone(engine, some_ids(20), dataclasses.replace(params, stop_token_ids=frozenset({stop})))
    assert [token.id for token in stopped] == free[: free.index(stop) + 1]


def test_ids_appended_between_two_tokens_are_used(engine: Engine) -> None:
    with engine.session() as session:
        session.append([3, 4])
        tokens = session.generate(SamplingParams(temperature=0))
        first = next(tokens)
        session.append([9, 8])
        second = next(tokens)
        assert session.token_ids == (3, 4, first.id, 9, 8, second.id)
    assert second.id == int(engine.logits([3, 4, first.id, 9, 8])[-1].argmax())


@pytest.mark.parametrize("bad", [-1, VOCAB, 10**9])
def test_ids_outside_the_vocabulary(engine: Engine, bad: int) -> None:
    session = engine.session()
    with pytest.raises(TokenIdError, match=rf"token id {bad} \(at index 1\) is outside the vocabulary 0\.\.95"):
        session.append([1, bad])
    assert session.token_ids == ()
    with pytest.raises(TokenIdError):
        engine.logits([bad])


def test_more_ids_than_positions(engine: Engine) -> None:
    session = engine.session()
    with pytest.raises(ContextLengthError, match="0 ids in the session and 901 more exceed the model's 900 positions"):
        session.append([1] * 901)
    session.append(some_ids(898))
    tokens = session.generate(SamplingParams(seed=0))
    assert len([next(tokens), next(tokens)]) == 2
    with pytest.raises(ContextLengthError, match="900 ids in the session and 1 more"):
        next(tokens)
    with pytest.raises(ContextLengthError, match="901 ids exceed the model's 900 positions"):
        engine.logits([1] * 901)


def test_use_after_close_and_before_the_first_id(engine: Engine) -> None:
    session = engine.session()
    with pytest.raises(SessionEmptyError, match="append at least one id"):
        session.generate()
    for score in (engine.logits, engine.logprobs):
        with pytest.raises(ValueError, match="at least one token id"):
            score([])
    session.append([5])
    session.close()
    session.close()
    assert session.token_ids == (5,)
    with pytest.raises(SessionClosedError):
        session.append([5])
    with pytest.raises(SessionClosedError):
        session.generate()


POISON = 66


@pytest.fixture
def poisoned(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> Engine:
    """Return an engine whose forward raises on an appended (not a sampled) id 66, after every layer wrote its state."""
    last, call = engine.scheduler.runner.forward.layers[-1], ExpertLayer.__call__
    assert isinstance(last, ExpertLayer)

    def raise_on_poison(layer: ExpertLayer, x: Floats, rotations: Rotations, batch: Batch) -> Any:
        prompts = [batch.ids[low:high] for low, high in pairwise(batch.cu_seqlens) if high - low > 1]
        if layer is last and any(POISON in ids for ids in prompts):
            raise RuntimeError("poison")
        return call(layer, x, rotations, batch)

    monkeypatch.setattr(ExpertLayer, "__call__", raise_on_poison)
    return engine


def test_a_failed_step_changes_no_ids_and_can_be_repeated(poisoned: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    params = SamplingParams(seed=3, max_tokens=6)
    with poisoned.session() as session:
        session.append([5, 6, 7])
        list(session.generate(params))
        session.append([POISON, 8])
        before = session.token_ids
        for _ in range(2):
            with pytest.raises(RuntimeError, match="poison"):
                list(session.generate(params))
            assert session.token_ids == before
        monkeypatch.undo()
        found = list(session.generate(params))
    expected = alone(poisoned, before, params)
    assert [token.id for token in found] == [token.id for token in expected]
    for token, other in zip(found, expected, strict=True):
        assert token.logprob == pytest.approx(other.logprob, abs=1e-4)


# --- async ---------------------------------------------------------------------------------------------------------


async def collect(session: AsyncSession, params: SamplingParams) -> list[SampledToken]:
    return [token async for token in session.generate(params)]


async def test_interleaved_sessions_match_sessions_alone(engine: Engine) -> None:
    prompts = [some_ids(3), some_ids(640, seed=2), some_ids(40, seed=3), some_ids(129, seed=4)]
    params = [SamplingParams(seed=n, max_tokens=12 + n, top_p=1 - n / 10) for n in range(4)]
    expected = [alone(engine, ids, p) for ids, p in zip(prompts, params, strict=True)]
    found: list[list[SampledToken]] = [[] for _ in prompts]
    order: list[int] = []

    async def run(index: int, running: AsyncEngine) -> None:
        async with running.session() as session:
            await session.append(prompts[index])
            async for token in session.generate(params[index]):
                found[index].append(token)
                order.append(index)
            assert session.token_ids == (*prompts[index], *(token.id for token in found[index]))

    async with AsyncEngine(engine) as running, anyio.create_task_group() as tasks:
        for index in range(len(prompts)):
            tasks.start_soon(run, index, running)
    assert found == expected  # ids and log-probabilities, bit for bit
    first_end = min(len(order) - 1 - order[::-1].index(index) for index in range(4))
    assert set(order[: first_end + 1]) == {0, 1, 2, 3}  # all had started before the first was done


async def test_a_long_append_does_not_block_other_sessions(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("agentkit_engine.runtime.scheduler.MAX_NUM_BATCHED_TOKENS", 16)
    order: list[str] = []
    async with AsyncEngine(engine) as running:
        long, short = running.session(), running.session()
        await long.append(some_ids(320))  # 20 steps before its first token
        await short.append(some_ids(2))

        async def run(name: str, session: AsyncSession, count: int) -> None:
            async for _ in session.generate(SamplingParams(max_tokens=count)):
                order.append(name)  # noqa: PERF401 - when each token arrives is the point

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(run, "long", long, 1)
            tasks.start_soon(run, "short", short, 30)
    assert 10 <= order.index("long") <= 25


async def test_a_cancelled_consumer_leaves_no_unseen_id_and_can_continue(engine: Engine) -> None:
    params = SamplingParams(seed=9, max_tokens=40)
    expected = alone(engine, some_ids(10), params)
    async with AsyncEngine(engine) as running:
        session = running.session()
        await session.append(some_ids(10))
        seen: list[SampledToken] = []
        with anyio.CancelScope() as scope:
            async for token in session.generate(params):
                seen.append(token)
                if len(seen) == 5:
                    while not (session._generation and session._generation.inbox):
                        await lowlevel.checkpoint()  # until the model is ahead
                    scope.cancel()
        assert len(seen) == 5 and session.token_ids[10:] == tuple(token.id for token in seen)
        seen += await collect(session, dataclasses.replace(params, max_tokens=35))
    assert seen == expected


async def test_cancellation_stops_a_long_prefill_and_frees_the_thread(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("agentkit_engine.runtime.scheduler.MAX_NUM_BATCHED_TOKENS", 2)
    steps = 0
    step = engine.scheduler.runner.step

    def counted(scheduled: Sequence[ScheduledTokens]) -> Computed:
        nonlocal steps
        steps += 1
        return step(scheduled)

    monkeypatch.setattr(engine.scheduler.runner, "step", counted)
    async with AsyncEngine(engine) as running:
        session, other = running.session(), running.session()
        await session.append(some_ids(800))
        await other.append([1])
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(collect, session, SamplingParams(max_tokens=1))
            await collect(other, SamplingParams(max_tokens=5))
            tasks.cancel_scope.cancel()
        assert steps < 30 and len(session.token_ids) == 800
        await session.close()


async def test_an_exception_in_a_step_reaches_that_session_only(poisoned: Engine) -> None:
    params = SamplingParams(seed=2, max_tokens=10)
    expected = alone(poisoned, [4, 5], params)
    found: list[SampledToken] = []
    half_way = anyio.Event()

    async def run_good(session: AsyncSession) -> None:
        async for token in session.generate(params):
            found.append(token)
            if len(found) == 5:
                half_way.set()

    async with AsyncEngine(poisoned) as running, anyio.create_task_group() as tasks:
        good, bad = running.session(), running.session()
        await good.append([4, 5])
        await bad.append([7, POISON])
        tasks.start_soon(run_good, good)
        await half_way.wait()
        with pytest.raises(RuntimeError, match="poison"):
            await collect(bad, params)
        assert bad.token_ids == (7, POISON)
    assert found == expected


async def test_a_second_task_on_a_session_is_refused(engine: Engine) -> None:
    async with AsyncEngine(engine) as running:
        session = running.session()
        await session.append(some_ids(600))
        results: list[str] = []

        async def drive() -> None:
            try:
                results.append(str(len(await collect(session, SamplingParams(max_tokens=2)))))
            except SessionBusyError:
                results.append("busy")

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(drive)
            tasks.start_soon(drive)
            await lowlevel.checkpoint()
            with pytest.raises(SessionBusyError, match="one task drives a session"):
                await session.append([1])
        assert sorted(results) == ["2", "busy"]


async def test_closing_a_session_during_its_step_ends_the_generation(engine: Engine) -> None:
    async with AsyncEngine(engine) as running:
        session = running.session()
        await session.append(some_ids(600))
        outcome: list[str] = []

        async def drive() -> None:
            try:
                await collect(session, SamplingParams())
            except SessionClosedError:
                outcome.append("closed")

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(drive)
            await lowlevel.checkpoint()
            await session.close()
        assert outcome == ["closed"] and len(session.token_ids) == 600


async def test_leaving_the_block_ends_everything(engine: Engine) -> None:
    outcome: list[str] = []

    async def drive(session: AsyncSession) -> None:
        try:
            await collect(session, SamplingParams())
        except (EngineClosedError, SessionClosedError) as error:
            outcome.append(type(error).__name__)

    async with anyio.create_task_group() as tasks, AsyncEngine(engine) as running:
        sessions = [running.session() for _ in range(3)]
        for session in sessions:
            await session.append(some_ids(500))
            tasks.start_soon(drive, session)
        await lowlevel.checkpoint()
    assert len(outcome) == 3
    for use in (running.session, lambda: sessions[0]._check_can_generate()):
        with pytest.raises((EngineClosedError, SessionClosedError)):
            use()
    with pytest.raises(SessionClosedError):
        await sessions[0].append([1])


async def test_an_engine_is_usable_again_after_its_block(engine: Engine) -> None:
    running = AsyncEngine(engine)
    for _ in range(2):
        async with running:
            ids = some_ids(9)
            assert torch.equal(await running.logits(ids), engine.logits(ids))


async def test_cancelling_the_block_from_outside_ends_it(engine: Engine) -> None:
    with anyio.CancelScope() as scope:
        async with AsyncEngine(engine) as running:
            session = running.session()
            await session.append([1, 2])
            async for _ in session.generate(SamplingParams()):
                scope.cancel()
    assert scope.cancelled_caught


async def test_an_error_in_the_block_is_not_wrapped(engine: Engine) -> None:
    with pytest.raises(KeyError, match="mine"):
        async with AsyncEngine(engine) as running:
            await collect_one(running)
            raise KeyError("mine")


async def collect_one(running: AsyncEngine) -> None:
    async with running.session() as session:
        await session.append([1])
        await collect(session, SamplingParams(max_tokens=1))
