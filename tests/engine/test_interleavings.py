"""Concurrent sessions produce the same tokens as one that computes everything from its ids."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Sequence
from pathlib import Path

import anyio
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from agentkit_engine import AsyncEngine, AsyncSession, Engine, ModelSpec, SampledToken, SamplingParams
from agentkit_engine.model import Decoder
from agentkit_engine.runtime import Pools
from agentkit_engine.runtime.scheduled import Computed, ScheduledTokens

from .conftest import randomize_, sample_one, small_config, some_ids

SEED, MOST_TOKENS, MOST_SESSIONS = 5, 4, 5
ALL_SPANS, FEW_SPANS = 1000, 6

ACTIONS = ("append", "append", "generate", "generate", "cancel", "fork", "park", "save", "close", "checkpoint")
Step = tuple[str, int, int]


def steps(*more: str) -> st.SearchStrategy[list[Step]]:
    """Generate actions, each with a session number and a count of ids that is also used as another session's number."""
    step = st.tuples(st.sampled_from((*ACTIONS, *more)), st.integers(0, 4), st.sampled_from([1, 2, 17, 130]))
    return st.lists(step, min_size=2, max_size=12)


@pytest.fixture(scope="module")
def decoder() -> Decoder:
    spec = ModelSpec.from_config(small_config(0, 4, 128, sliding_window=48, index_topk=8))
    return randomize_(Decoder(spec), torch.Generator().manual_seed(1)).eval()


class World:
    """An engine and its sessions, and a reference engine that computes everything from scratch.

    Attributes:
        computed: ids that went through a forward, drafts excluded.
        due: ids that had to: each appended or sampled id once; a session's last one again whenever its logits may be
            gone.
        together: the most sessions that shared a forward.
    """

    def __init__(self, decoder: Decoder, spans: int, folder: Path, *, host_bytes: int = 0) -> None:
        self.decoder, self.spans, self.folder, self.host_bytes = decoder, spans, folder, host_bytes
        self.reference = Engine(decoder, name="small", dialect="v4-preview", folder=folder)
        self.sessions: list[AsyncSession] = []
        self.computed = self.due = self.together = self.lives = 0

    async def live(self, todo: Sequence[Step], first: int) -> None:
        """Take the steps. After "kill" a new engine continues with the state on disk at that moment."""
        told, left = [some_ids(first, 0)], list(todo)
        while told:
            told, left = await self._one_life(told, left)

    async def _one_life(self, told: list[list[int]], todo: list[Step]) -> tuple[list[list[int]], list[Step]]:
        engine = self._engine()
        async with AsyncEngine(engine) as running:
            self.sessions = [running.session() for _ in told]
            for session, ids in zip(self.sessions, told, strict=True):
                await session.append(ids)
                self.due += len(ids)
            for at, (action, number, amount) in enumerate(todo):
                if action == "kill":
                    self.lives += 1
                    shutil.copytree(self.folder / f"disk{self.lives - 1}", self.folder / f"disk{self.lives}")
                    return [list(session.token_ids) for session in self.sessions], todo[at + 1 :]
                await self._take(running, action, number % len(self.sessions), amount, at)
            for session in self.sessions:
                await session.close()
            await running.call(engine.scheduler.cache.clear)
            pools = engine.scheduler.pools
            assert await running.call(lambda: (pools.bytes_held, pools.host_bytes_held)) == (0, 0)
        return [], []

    async def _take(self, running: AsyncEngine, action: str, number: int, amount: int, seed: int) -> None:
        session = self.sessions[number]
        match action:
            case "append":
                await session.append(some_ids(amount, seed % 3))
                self.due += amount
            case "generate" | "cancel":
                params = SamplingParams(temperature=float(seed % 2), seed=SEED, max_tokens=MOST_TOKENS)
                gate = threading.Event()  # no forward until both have requested one
                async with anyio.create_task_group() as task_group:
                    task_group.start_soon(running.call, gate.wait)
                    await anyio.wait_all_tasks_blocked()
                    for each in dict.fromkeys((session, self.sessions[amount % len(self.sessions)])):
                        task_group.start_soon(self._say, each, params, 2 if action == "cancel" else MOST_TOKENS)
                    await anyio.wait_all_tasks_blocked()
                    gate.set()
            case "fork" if len(self.sessions) < MOST_SESSIONS:
                self.sessions += await session.fork(2)
                self.due += 1  # the id before a cancelled generation, as above
            case "park":
                await session.park()
            case "save":
                await session.save(self.folder / "saved")
                self.sessions[number] = await running.open(self.folder / "saved")
                assert self.sessions[number].token_ids == session.token_ids
                await session.close()
            case "close":
                await session.close()
                self.sessions[number] = running.session()
                await self.sessions[number].append(session.token_ids)
            case "checkpoint":
                await session.checkpoint()
            case "evict":
                await running.call(running.engine.scheduler.cache.evict)

    async def _say(self, session: AsyncSession, params: SamplingParams, count: int) -> None:
        """Sample `count` tokens, which must equal those of a fresh session with the same ids."""
        said: list[SampledToken] = []
        generation = session.generate(params)
        async for token in generation:
            said.append(token)
            if len(said) == count:
                break
        await generation.aclose()
        # the id before the first is computed again, and so may be one that was never consumed
        self.due += len(said) + 2
        begin = len(session) - len(said)
        rows = self.reference.logits(session.token_ids[:-1])[begin - 1 :]
        past = session.token_ids
        for place, (row, token) in enumerate(zip(rows, said, strict=True), begin):
            expected = sample_one(row, params, seed=SEED, position=place, past=lambda: (past, past))
            assert (token.id, token.logprob) == (expected.id, expected.logprob)

    def _engine(self) -> Engine:
        sizes = Pools(self.decoder.spec, slots=1, spans=1, device=torch.device("meta"))
        engine = Engine(
            self.decoder, name="small", dialect="v4-preview", folder=self.folder,
            kv_cache_bytes=self.spans * sizes.bytes_per_span, host_cache_bytes=self.host_bytes,
            cache_dir=self.folder / f"disk{self.lives}",
        )  # fmt: skip
        (self.folder / f"disk{self.lives}").mkdir(exist_ok=True)
        step = engine.scheduler.runner.step

        def watched(scheduled: Sequence[ScheduledTokens], *, all_rows: bool = False) -> Computed:
            self.together = max(self.together, len(scheduled))
            self.computed += sum(len(part.ids) for part in scheduled)
            return step(scheduled, all_rows=all_rows)

        engine.scheduler.runner.step = watched  # type: ignore[method-assign]
        return engine


def test_with_memory_nothing_is_computed_twice(decoder: Decoder, tmp_path_factory: pytest.TempPathFactory) -> None:
    together = 0

    @settings(max_examples=15, deadline=None)
    @given(todo=steps(), first=st.sampled_from([3, 250, 260]))
    @example(todo=[("fork", 0, 0), ("generate", 0, 1), ("generate", 1, 2)], first=3)  # two that generate together
    def live(todo: list[Step], first: int) -> None:
        nonlocal together
        world = World(decoder, ALL_SPANS, tmp_path_factory.mktemp("world"))
        anyio.run(world.live, todo, first)
        assert world.computed <= world.due
        together = max(together, world.together)

    live()
    assert together >= 2


@settings(max_examples=15, deadline=None)
@given(todo=steps("evict", "evict"), first=st.sampled_from([3, 250, 260]))
def test_with_host_memory_nothing_is_computed_twice(
    decoder: Decoder, tmp_path_factory: pytest.TempPathFactory, todo: list[Step], first: int
) -> None:
    world = World(decoder, FEW_SPANS, tmp_path_factory.mktemp("world"), host_bytes=64 << 20)
    anyio.run(world.live, todo, first)
    assert world.computed <= world.due


@settings(max_examples=15, deadline=None)
@given(todo=steps("evict", "kill"), first=st.sampled_from([3, 250, 260]))
def test_short_memory_and_kills_change_no_results(
    decoder: Decoder, tmp_path_factory: pytest.TempPathFactory, todo: list[Step], first: int
) -> None:
    anyio.run(World(decoder, FEW_SPANS, tmp_path_factory.mktemp("world")).live, todo, first)
