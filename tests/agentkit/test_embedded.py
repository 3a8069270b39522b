"""The embedded engine in the loop: a random model generates garbage, and the record is still exact."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import anyio
import pytest
import torch

from agentkit import DEFAULT_SYSTEM, Agent, EmbeddedModel, Limits, SamplingParams, Trajectory, tool
from agentkit.model import Effort
from agentkit.models.tokens import rebuild_token_ids
from agentkit_engine import AsyncEngine, AsyncSession, Engine
from agentkit_engine.chat import EncodeError, Tokenizer, encode_ids
from agentkit_engine.model.decoder import Decoder, initialize_
from agentkit_engine.spec import ModelSpec
from agentkit_environments import Environment

pytestmark = pytest.mark.anyio
MAX_LENGTH = 2048


class WatchedEngine(AsyncEngine):
    """An engine that keeps the sessions it opened, to compare their ids with the record."""

    def __init__(self, engine: Engine) -> None:
        super().__init__(engine)
        self.opened: list[AsyncSession] = []

    def session(self, *, priority: int = 0) -> AsyncSession:
        self.opened.append(super().session(priority=priority))
        return self.opened[-1]


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> Engine:
    folder = tmp_path_factory.mktemp("random")
    config = {
        "model_type": "deepseek_v4", "vocab_size": tokenizer.vocab_size, "hidden_size": 32, "num_hidden_layers": 3,
        "num_nextn_predict_layers": 0, "compress_ratios": [0, 4, 128], "num_hash_layers": 1, "num_attention_heads": 2,
        "head_dim": 16, "qk_rope_head_dim": 8, "q_lora_rank": 16, "o_groups": 1, "o_lora_rank": 16,
        "sliding_window": 64, "index_n_heads": 2, "index_head_dim": 16, "index_topk": 4, "hc_mult": 2,
        "hc_sinkhorn_iters": 5, "hc_eps": 1e-6, "n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2,
        "moe_intermediate_size": 16, "routed_scaling_factor": 1.5, "swiglu_limit": 10.0, "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0, "compress_rope_theta": 160000.0, "max_position_embeddings": MAX_LENGTH,
        "bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id,
        "rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512, "beta_fast": 32.0,
                         "beta_slow": 1.0},
    }  # fmt: skip
    decoder = initialize_(Decoder(ModelSpec.from_config(config)), torch.Generator().manual_seed(0), std=0.1)
    engine = Engine(decoder, name="random", dialect="v4-preview", folder=folder)
    engine.__dict__["tokenizer"] = tokenizer
    return engine


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def assert_exact(trajectory: Trajectory, engine: Engine, session_ids: list[int]) -> None:
    """Check that the ids equal the engine's, and that prompts and log-probabilities can be recomputed from the
    record."""
    ids = trajectory.token_ids
    assert ids == session_ids
    assert rebuild_token_ids(trajectory, engine.tokenizer) == ids
    logprobs = engine.logits(ids).log_softmax(-1)
    for place, (recorded, mask) in enumerate(zip(trajectory.logprobs, trajectory.loss_mask, strict=True)):
        assert (recorded is not None) == bool(mask)
        if recorded is not None:
            assert recorded == pytest.approx(logprobs[place - 1, ids[place]].item(), abs=1e-4)


@pytest.mark.parametrize("seed", range(2))
async def test_the_record_has_the_ids_of_the_session(
    engine: Engine, environment: Environment, tmp_path: Path, seed: int
) -> None:
    async with WatchedEngine(engine) as watched:
        agent = Agent(
            EmbeddedModel(watched),
            [],
            sampling=SamplingParams(seed=seed),
            limits=Limits(max_tokens=40, max_thinking_tokens_per_turn=12),
        )
        path = tmp_path / "t.jsonl"
        result = await agent.run("Say something.", environment=environment, trajectory=path)
        assert_exact(Trajectory.load(path), engine, list(watched.opened[0].token_ids))
        result = await result.continue_("Say more.")
        assert_exact(Trajectory.load(path), engine, list(watched.opened[1].token_ids))
        assert result.trajectory.header.model == "random"


async def test_a_seed_repeats_a_run_and_runs_share_the_model(engine: Engine, environment: Environment) -> None:
    ids: list[list[int]] = []
    async with EmbeddedModel(engine) as model:

        async def run() -> None:
            agent = Agent(model, [], sampling=SamplingParams(seed=7), limits=Limits(max_tokens=12))
            ids.append((await agent.run("Say something.", environment=environment)).trajectory.token_ids)

        async with anyio.create_task_group() as task_group:
            for _ in range(4):
                task_group.start_soon(run)
    assert ids == [ids[0]] * 4


async def test_concurrent_runs_of_a_model_that_was_not_entered(engine: Engine, environment: Environment) -> None:
    ids: list[list[int]] = []
    agent = Agent(EmbeddedModel(engine), [], sampling=SamplingParams(seed=7), limits=Limits(max_tokens=12))

    async def run() -> None:
        ids.append((await agent.run("Say something.", environment=environment)).trajectory.token_ids)

    async with anyio.create_task_group() as task_group:
        task_group.start_soon(run)
        task_group.start_soon(run)
    assert ids == [ids[0]] * 2


async def test_a_session_is_parked_while_its_tools_run(environment: Environment) -> None:
    """A tool can free all memory while it runs, and the run continues with the same ids."""

    async def run(*, away: bool) -> tuple[list[int], list[int]]:
        held = []
        async with AsyncEngine(Engine.load("tiny")) as running:
            scheduler = running.engine.scheduler

            @tool
            async def get_weather(city: str) -> str:
                """Return the weather of a city."""
                if away:
                    await running.call(scheduler.cache.clear)
                held.append(scheduler.pools.bytes_held)
                return "sunny, 21 degrees"

            agent = Agent(EmbeddedModel(running), [get_weather], sampling=SamplingParams(temperature=0))
            result = await agent.run("What is the weather in Paris?", environment=environment)
        return result.trajectory.token_ids, held

    (ids, held), (ids_away, held_away) = await run(away=False), await run(away=True)
    assert ids == ids_away
    assert held and min(held) > 0 and held_away == [0] * len(held)


@pytest.mark.parametrize(
    ("effort", "says", "opens"),
    [
        ("none", "", "</think>"),
        ("low", "", "<think>"),
        ("high", "Reasoning Effort: Absolute maximum", "<think>"),
        ("max", "Reasoning Effort: Beyond maximum", "<think>"),
    ],
)
async def test_an_effort_is_text_at_the_start_of_the_session(
    engine: Engine, environment: Environment, effort: Effort, says: str, opens: str
) -> None:
    newer = Engine(engine.decoder, name="newer", dialect="v4-0731", folder=engine.folder)
    newer.__dict__["tokenizer"] = engine.tokenizer
    async with WatchedEngine(newer) as watched:
        agent = Agent(EmbeddedModel(watched), [], effort=effort, limits=Limits(max_tokens=2))
        trajectory = (await agent.run("Q", environment=environment)).trajectory
        ids = list(watched.opened[0].token_ids)
    said = [{"role": "system", "content": DEFAULT_SYSTEM}, {"role": "user", "content": "Q"}]
    prompt = encode_ids(said, tokenizer=newer.tokenizer, effort=effort, dialect="v4-0731")
    assert ids[: len(prompt)] == prompt == list(trajectory.segments[0].ids)
    text = newer.tokenizer.decode(prompt)
    assert text.startswith(f"<｜begin▁of▁sentence｜>{says or DEFAULT_SYSTEM}")
    assert text.endswith(f"<｜Assistant｜>{opens}")
    assert (trajectory.header.dialect, trajectory.header.effort) == ("v4-0731", effort)
    assert_exact(trajectory, newer, ids)


async def test_an_effort_missing_from_the_dialect_is_refused(engine: Engine, environment: Environment) -> None:
    agent = Agent(EmbeddedModel(engine), [], effort="low")
    with pytest.raises(EncodeError, match="'low' does not exist in dialect 'v4-preview'; it has none, high, max"):
        await agent.run("Q", environment=environment)


async def test_a_full_context_ends_the_run(engine: Engine, environment: Environment) -> None:
    agent = Agent(EmbeddedModel(engine), [], sampling=SamplingParams(seed=1), system="", thinking="always")
    prompt = "x" * (MAX_LENGTH - 20)
    result = await agent.run(prompt, environment=environment)
    if result.status == "limit":
        assert result.limit == "context"
        assert len(result.trajectory.token_ids) <= MAX_LENGTH
    result = await agent.run("x" * MAX_LENGTH, environment=environment)
    assert (result.limit, result.trajectory.token_ids, result.usage.turns) == ("context", [], 0)


async def test_cancelling_stops_generation_and_leaves_a_complete_record(
    engine: Engine, environment: Environment, tmp_path: Path
) -> None:
    """The run is cancelled between two tokens, at the tenth event."""
    path = tmp_path / "t.jsonl"
    async with WatchedEngine(engine) as watched:
        agent = Agent(EmbeddedModel(watched), [], sampling=SamplingParams(seed=3), thinking="always")
        with anyio.CancelScope() as scope:
            stream = agent.stream("Say something.", environment=environment, trajectory=path)
            count = 0
            async for _ in stream:
                count += 1
                if count == 10:
                    scope.cancel()
        trajectory = Trajectory.load(path)
        assert trajectory.outcome is not None and trajectory.outcome.status == "cancelled"
        assert_exact(trajectory, engine, list(watched.opened[0].token_ids))
        assert trajectory.segments[-1].kind == "forced"
