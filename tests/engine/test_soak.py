"""Many sessions, many turns, too little memory and disk, random cancellations: nothing leaks, and every token is right.

It takes minutes, so it is not part of `make test`: `make test ARGS="-m slow"`.
"""

from __future__ import annotations

import gc
import random
import threading
from collections import Counter
from pathlib import Path

import anyio
import pytest
import torch

from agentkit_engine import AsyncEngine, AsyncSession, Engine, ModelSpec, SampledToken, SamplingParams
from agentkit_engine.async_engine import _Generation
from agentkit_engine.model import Decoder
from agentkit_engine.runtime import Pools, Request, Sequence
from agentkit_engine.runtime.prefix_cache import Checkpoint

from .conftest import randomize_, small_config, some_ids

SESSIONS, TURNS, AT_ONCE, HEADS = 200, 30, 24, 8
SPANS, HOST_SLOTS, DISK_BYTES = 32, 64, 4 << 20
KINDS = (AsyncSession, Checkpoint, Sequence, Request, _Generation)


def objects() -> Counter[type]:
    gc.collect()
    return Counter(type(each) for each in gc.get_objects() if issubclass(type(each), KINDS))


def held_on_disk(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


Said = list[tuple[int, SampledToken]]


async def converse(session: AsyncSession, draw: random.Random) -> Said:
    """Take thirty turns; a third of them are abandoned or cancelled, and the next one continues."""
    said: Said = []
    await session.append(some_ids(draw.randint(100, 300), draw.randrange(HEADS)))
    await session.checkpoint()
    for _ in range(TURNS):
        await session.append(some_ids(draw.randint(1, 40), draw.randrange(1 << 20)))
        ends, count, before = draw.choice(("stop", "stop", "stop", "stop", "break", "cancel")), 0, len(session)
        params = SamplingParams(
            temperature=draw.choice((0.0, 1.0)), seed=draw.randrange(9), max_tokens=draw.randint(1, 8)
        )
        last = draw.randint(1, 8)
        with anyio.CancelScope() as scope:
            generation = session.generate(params)
            try:
                async for token in generation:
                    said.append((before + count, token))
                    count += 1
                    if count == last and ends == "break":
                        break
                    if count == last and ends == "cancel":
                        scope.cancel()
            finally:
                with anyio.CancelScope(shield=True):
                    await generation.aclose()
        assert len(session) == before + count
        if draw.random() < 0.5:
            await session.park()
    return said


@pytest.mark.slow
@pytest.mark.anyio
@pytest.mark.timeout(1200)
async def test_soak(tmp_path: Path) -> None:
    spec = ModelSpec.from_config(small_config(0, 4, 128, sliding_window=48, index_topk=8))
    decoder = randomize_(Decoder(spec), torch.Generator().manual_seed(1)).eval()
    sizes = Pools(spec, slots=1, spans=1, device=torch.device("meta"))
    engine = Engine(
        decoder, name="small", dialect="v4-preview", folder=tmp_path, kv_cache_bytes=SPANS * sizes.bytes_per_span,
        host_cache_bytes=HOST_SLOTS * sizes.bytes_per_slot, cache_dir=tmp_path / "disk", cache_bytes=DISK_BYTES,
    )  # fmt: skip
    before = objects()
    told: dict[int, tuple[list[int], Said]] = {}
    free = anyio.CapacityLimiter(AT_ONCE)
    async with AsyncEngine(engine) as running:

        async def live(number: int) -> None:
            async with free, running.session(priority=number % 2) as session:
                said = await converse(session, random.Random(number))
                told[number] = list(session.token_ids), said

        async with anyio.create_task_group() as task_group:
            for number in range(SESSIONS):
                task_group.start_soon(live, number)
        assert held_on_disk(tmp_path / "disk") <= 1.5 * DISK_BYTES  # plus the file being written
    engine.scheduler.cache.clear()
    engine.flush()
    pools = engine.scheduler.pools
    assert pools.bytes_held == pools.host_bytes_held == 0
    assert pools.host is not None and min(pools.host.stats.loaded_slots, pools.host.stats.loaded_spans) > SESSIONS
    assert objects() == before
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("agentkit_engine")]
    reference = Engine(decoder, name="small", dialect="v4-preview", folder=tmp_path)
    for ids, said in told.values():
        rows = reference.logits(ids).log_softmax(-1)
        for place, token in said:
            assert (ids[place], rows[place - 1, token.id].item()) == (token.id, token.logprob)
    assert len(told) == SESSIONS and sum(len(said) for _, said in told.values()) > SESSIONS * TURNS
