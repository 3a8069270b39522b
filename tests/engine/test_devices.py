"""An engine on several devices, here processes on one CPU, gives the same bits as one process, and fails as a whole."""

from __future__ import annotations

import math
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import anyio
import pytest
import torch
from safetensors.torch import load_file, save_file

from agentkit_engine import (
    AsyncEngine,
    AsyncSession,
    CheckpointError,
    Engine,
    ModelSpec,
    OutOfMemoryError,
    SamplingParams,
    Session,
    WorkerLostError,
)
from agentkit_engine.engine import read_decoder
from agentkit_engine.runtime.expert_parallel import experts_of
from agentkit_engine.runtime.parallel import ParallelRunner
from agentkit_engine.runtime.sharded_pools import ShardedPools
from agentkit_engine.runtime.state import SPAN, Pools
from agentkit_engine.runtime.workers import Placement
from agentkit_engine.weights.export import export_checkpoint

from .conftest import make_random_decoder, small_config, some_ids

SPEC = ModelSpec.from_config(
    small_config(0, 4, 128, mtp=True, sliding_window=48, n_routed_experts=7, num_experts_per_tok=3)
)
"""Every kind of layer, and experts that cannot be divided equally."""
PARAMS = SamplingParams(seed=5, max_tokens=6)
CITY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
WEATHER = {"type": "function", "function": {"name": "get_weather", "parameters": CITY}}
Said = list[tuple[int, float]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "random"
    export_checkpoint(make_random_decoder(SPEC), folder, format="official")
    return folder


@pytest.fixture(scope="module", params=["2, cpu", "4, reference"])
def pair(request: pytest.FixtureRequest, folder: Path) -> Iterator[tuple[Engine, Engine]]:
    """The same model in one process and in several: the packaged one, and a random one with packed weights."""
    devices, backend = request.param.split(", ")
    model = "tiny" if backend == "cpu" else folder
    many = Engine.load(model, devices=int(devices), backend=backend)
    yield Engine.load(model, backend=backend), many
    many.close()


@pytest.fixture
def two(folder: Path) -> Iterator[Engine]:
    """An engine on two devices that a test may break."""
    engine = Engine.load(folder, devices=2, backend="reference")
    yield engine
    engine.close()


def runner_of(engine: Engine) -> ParallelRunner:
    runner = engine.scheduler.runner
    assert isinstance(runner, ParallelRunner)
    return runner


def shards_of(engine: Engine) -> Sequence[Pools]:
    pools = engine.scheduler.pools
    assert isinstance(pools, ShardedPools)
    return pools.shards


def rank_of(session: Session | AsyncSession) -> int:
    sequence = session._request.sequence
    assert sequence is not None
    return sequence.rank


def say(session: Session, **generate: Any) -> Said:
    return [(token.id, token.logprob) for token in session.generate(PARAMS, **generate)]


def alone(engine: Engine, ids: Sequence[int]) -> Said:
    """The tokens after `ids` in one process, computed without any earlier state."""
    engine.scheduler.cache.clear()
    with engine.session() as session:
        session.append(ids)
        return say(session)


@asynccontextmanager
async def sessions(engine: Engine, prompts: Sequence[Sequence[int]]) -> AsyncIterator[list[AsyncSession]]:
    async with AsyncEngine(engine) as running:
        opened = [running.session() for _ in prompts]
        for session, ids in zip(opened, prompts, strict=True):
            await session.append(ids)
        yield opened


async def said_together(opened: Sequence[AsyncSession]) -> list[Said]:
    said: list[Said] = [[] for _ in opened]

    async def listen(session: AsyncSession, into: Said) -> None:
        async for token in session.generate(PARAMS):
            into.append((token.id, token.logprob))

    async with anyio.create_task_group() as task_group:
        for session, into in zip(opened, said, strict=True):
            task_group.start_soon(listen, session, into)
    return said


@pytest.mark.anyio
async def test_concurrent_sessions_and_forks_have_the_bits_of_one_process(pair: tuple[Engine, Engine]) -> None:
    one, many = pair
    prompts = [some_ids(length, seed) for seed, length in enumerate((1, 270, 37, 130, 5))]
    async with sessions(many, prompts) as opened:
        assert await said_together(opened) == [alone(one, ids) for ids in prompts]
        assert {rank_of(session) for session in opened} == set(range(len(shards_of(many))))
        forks = await opened[1].fork(4)
        for number, fork in enumerate(forks):
            await fork.append(some_ids(10, seed=number))
        before = many.scheduler.prefilled
        told = [fork.token_ids for fork in forks]
        said = await said_together(forks)
        assert many.scheduler.prefilled - before == 40
        assert len({rank_of(fork) for fork in forks}) > 1
    assert said == [alone(one, ids) for ids in told]


def test_a_long_prompt_has_the_logits_of_one_process(pair: tuple[Engine, Engine]) -> None:
    one, many = pair
    ids = some_ids(600)  # more than one forward
    assert torch.equal(many.logits(ids), one.logits(ids))


def test_a_prefix_on_another_device_is_copied(pair: tuple[Engine, Engine]) -> None:
    one, many = pair
    many.scheduler.cache.clear()
    prefix, ranks = some_ids(300, seed=8), set()
    with many.session() as first, many.session() as second:
        for seed, session in enumerate((first, second)):
            session.append(prefix)
            session.checkpoint()
            session.append(some_ids(20, seed))
            expected = alone(one, session.token_ids)
            assert say(session) == expected
            ranks.add(rank_of(session))
        assert second.usage.hit_tokens == 300
    assert len(ranks) == 2


def test_a_saved_session_moves_between_one_process_and_several(pair: tuple[Engine, Engine], tmp_path: Path) -> None:
    one, many = pair
    said = []
    for number, (writer, reader) in enumerate([(one, many), (many, one), (many, many)]):
        with writer.session() as session:
            session.append(some_ids(290, seed=3))
            first = say(session)
            session.save(tmp_path / str(number))
        with reader.open(tmp_path / str(number)) as opened:
            said.append(first + say(opened))
            assert opened.usage.miss_tokens == 0
    assert said == [said[0]] * 3


@pytest.mark.parametrize("pair", ["2, cpu"], indirect=True)  # the packaged model, which has a tokenizer
def test_a_constrained_generation_has_the_bits_of_one_process(pair: tuple[Engine, Engine]) -> None:
    one, many = pair
    calls = []
    for engine in (one, many):
        with engine.session() as session:
            session.append(engine.tokenizer.encode("<｜User｜>Weather in Paris?<｜Assistant｜></think>"))
            grammar = engine.grammars.calls([WEATHER], required=True)
            calls.append(list(session.generate(replace(PARAMS, max_tokens=30), grammar=grammar)))
    assert [repr(token) for token in calls[1]] == [repr(token) for token in calls[0]]  # NaN differs from NaN
    assert any(token.forced for token in calls[0]) and not all(token.forced for token in calls[0])


def test_bfloat16_weights_have_the_bits_of_one_process(folder: Path) -> None:
    one, many = (Engine.load(folder, devices=n, backend="reference", dtype="bfloat16") for n in (1, 2))
    assert torch.equal(many.logits(some_ids(40)), one.logits(some_ids(40)))
    many.close()


@pytest.mark.anyio
async def test_a_killed_process_fails_every_session_and_the_block_ends(two: Engine) -> None:
    prompts = [some_ids(20, seed) for seed in range(3)]
    async with sessions(two, prompts) as opened:
        assert all(await said_together(opened))
        [worker] = runner_of(two).workers.each
        worker.process.kill()
        worker.process.wait()
        for session in opened:
            with pytest.raises(WorkerLostError, match="the process of rank 1 ended with exit code -9; load the model"):
                [token async for token in session.generate(PARAMS)]
    with two.session() as later, pytest.raises(WorkerLostError):
        later.append([1])
        say(later)


def test_a_process_that_hangs_is_given_up(folder: Path) -> None:
    small = Engine.load(folder, backend="reference")
    placement = Placement(2, folder, torch.device("cpu"), None, timeout_s=3.0)
    engine = Engine(
        small.decoder, name="small", dialect="v4-preview", folder=folder, backend="reference", placement=placement
    )
    with engine.session() as session:
        session.append(some_ids(20))
        said = say(session)
        [worker] = runner_of(engine).workers.each
        worker.process.send_signal(signal.SIGSTOP)
        with pytest.raises(WorkerLostError, match=r"a forward on several devices failed: .*[Tt]imed? ?out"):
            say(session)
    assert said and worker.process.poll() == -signal.SIGKILL


def test_a_process_that_cannot_load_the_model_says_why(folder: Path) -> None:
    small = Engine.load(folder, backend="reference")
    placement = Placement(2, folder / "nowhere", torch.device("cpu"), None)
    engine = Engine(small.decoder, name="small", dialect="v4-preview", folder=folder, placement=placement)
    with pytest.raises(WorkerLostError, match=r"(?s)rank 1 failed:.*nowhere/config\.json: missing"):
        _ = engine.scheduler


def test_the_processes_end_with_the_first_one(folder: Path, wait_until: Any) -> None:
    script = (
        "import os, sys; from agentkit_engine import Engine; "
        f"engine = Engine.load({str(folder)!r}, devices=2, backend='reference'); "
        "print(engine.scheduler.runner.workers.each[0].process.pid, flush=True); os.kill(os.getpid(), 9)"
    )
    ended = subprocess.run([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, check=False)
    assert ended.returncode == -signal.SIGKILL
    stat = Path("/proc", ended.stdout.strip(), "stat")
    wait_until(lambda: not stat.exists() or stat.read_text().split(")")[1].split()[0] == "Z", "the worker's end")


def test_a_worker_reads_only_its_own_experts(tmp_path: Path) -> None:
    export_checkpoint(make_random_decoder(SPEC), tmp_path / "whole", format="fp32")
    weights = tmp_path / "whole" / "model.safetensors"
    tensors = load_file(weights)
    tensors["layers.1.ffn.experts.0.w2.weight"].fill_(math.nan)
    save_file(tensors, weights)
    device = torch.device("cpu")
    with pytest.raises(CheckpointError, match=r"layers\.1\.ffn\.experts\.0\.w2\.weight: found NaN"):
        read_decoder(tmp_path / "whole", device=device, backend="reference", dtype=None)
    read, _ = read_decoder(
        tmp_path / "whole", device=device, backend="reference", dtype=None, experts=experts_of(1, 2, 7)
    )
    whole = make_random_decoder(SPEC).state_dict()
    for name, found in read.state_dict().items():
        own = slice(3, 7) if ".experts." in name and "shared" not in name else slice(None)
        assert torch.equal(found[own], whole[name][own]), name


def test_parked_sessions_of_every_device_come_back_from_host_memory(folder: Path) -> None:
    one = Engine.load(folder, backend="reference")
    sizes = Pools(SPEC, slots=1, spans=1, device=torch.device("meta"))
    many = Engine(
        one.decoder, name="small", dialect="v4-preview", folder=folder, backend="reference",
        kv_cache_bytes=2 * 2 * sizes.bytes_per_span, host_cache_bytes=2 * 40 * sizes.bytes_per_slot,
        placement=Placement(2, folder, torch.device("cpu"), None),
    )  # fmt: skip
    opened = [many.session() for _ in range(6)]
    for turn in range(2):
        for seed, session in enumerate(opened):
            session.append(some_ids(200 if turn == 0 else 20, 10 * seed + turn))
            ids = session.token_ids
            assert say(session) == alone(one, ids)
            session.park()
    assert many.scheduler.prefilled == 6 * 220
    for shard in shards_of(many):
        assert shard.host is not None and shard.host.stats.loaded_slots > 0
    for session in opened:
        session.close()
    many.scheduler.cache.clear()
    assert many.scheduler.pools.bytes_held == many.scheduler.pools.host_bytes_held == 0
    many.close()


def test_each_process_has_its_threads_and_its_share_of_the_memory_for_experts(folder: Path) -> None:
    one = Engine.load(folder, backend="cpu")
    many = Engine.load(folder, devices=2, backend="cpu", threads=1, expert_cache_bytes=100_001)
    ops = runner_of(many).parallel
    assert (ops.workers.count, ops.expert_store.capacity) == (1, 50_000)
    assert torch.equal(many.logits(some_ids(60)), one.logits(some_ids(60)))
    assert 0 < ops.expert_store.held <= 50_000 and ops.expert_store.read_bytes > 0
    many.close()
    with pytest.raises(WorkerLostError, match="expert_cache_bytes must hold at least one expert's matrix"):
        Engine.load(folder, devices=2, backend="cpu", expert_cache_bytes=200)


def local_shards(count: int, *, slots: int = 4, spans: int = 2) -> ShardedPools:
    device = torch.device("cpu")
    return ShardedPools([Pools(SPEC, slots=slots, spans=spans, device=device, rank=rank) for rank in range(count)])


def test_sequences_open_where_most_memory_is_free_and_copies_hold_the_same_rows() -> None:
    pools = local_shards(2)
    first, second = pools.open(), pools.open()
    assert (first.rank, second.rank) == (0, 1)
    pools.reserve(first, SPAN + 1)
    assert pools.open().rank == 1
    first.length = first.written = SPAN + 1
    shard = pools.shards[0]
    for rows in (*shard.tails, *shard.entries):
        rows.uniform_(generator=torch.Generator().manual_seed(len(rows)))
    copy = pools.branch(first)
    assert (copy.rank, copy.length, copy.written) == (1, SPAN + 1, SPAN + 1)
    kept, copied = pools.read(first, 0, 2), pools.read(copy, 0, 2)
    assert kept.keys() == copied.keys() and all(torch.equal(kept[name], copied[name]) for name in kept)
    with pytest.raises(OutOfMemoryError, match="0 of 2 are free"):
        pools.reserve(copy, 2 * SPAN + 1)


def test_sequences_fit_only_if_each_fits_on_one_device() -> None:
    pools = local_shards(2, spans=4)
    assert pools.fits([(None, SPAN), (None, SPAN), (None, SPAN), (None, SPAN)])
    assert pools.fits([(None, 3 * SPAN), (None, 3 * SPAN)])
    assert not pools.fits([(None, 2 * SPAN), (None, 2 * SPAN), (None, SPAN)])  # 8 spans, but 3, 3 and 2 of 4 and 4
    sequence = pools.open()
    pools.reserve(sequence, 3 * SPAN)
    assert pools.fits([(sequence, 3 * SPAN), (None, 3 * SPAN)])
    assert not pools.fits([(sequence, 3 * SPAN), (None, 3 * SPAN), (None, 1)])
