"""The engine's work around its forwards: a scheduler step, and a turn appended to a long session.

Benchmark functions follow the contract in `registry.py`. The model computes nothing here (`null_model.py`).
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import anyio

from agentkit_engine.async_engine import AsyncEngine, AsyncSession
from agentkit_engine.benchmarks.errors import OutputsDifferError
from agentkit_engine.benchmarks.null_model import NullRunner
from agentkit_engine.benchmarks.peers import long_text, random_ids
from agentkit_engine.benchmarks.random_checkpoint import random_decoder, tiny_v4
from agentkit_engine.benchmarks.record import Bound, Measurement
from agentkit_engine.benchmarks.timing import Median, seconds
from agentkit_engine.chat import encode_continuation_ids, encode_ids
from agentkit_engine.engine import Engine
from agentkit_engine.runtime import Request, Scheduler
from agentkit_engine.runtime.state import SPAN
from agentkit_engine.sampling_params import SamplingParams

UNIFORM_US = {1: 1.2, 16: 8.6, 64: 31.0, 256: 121.0}
"""Microseconds per step of nano-vllm's scheduler, by batch size; the targets derive from these. They come from an
earlier run on two cores, because nano-vllm is not on PyPI."""


class PageScheduler:
    """Minimal continuous batching with one kind of page: a queue, a free list and block tables."""

    def __init__(self, lengths: Sequence[int], pages: int) -> None:
        self.lengths = list(lengths)
        self.tables: list[list[int]] = [[] for _ in lengths]
        self._free = deque(range(pages))
        self._running = deque(range(len(lengths)))
        for index, length in enumerate(lengths):
            self._reserve(index, length)

    def step(self) -> list[tuple[int, int]]:
        """Lengthen every sequence by one token and return the (sequence, position) pairs."""
        scheduled = []
        for _ in range(len(self._running)):
            index = self._running.popleft()
            position = self.lengths[index]
            self._reserve(index, position + 1)
            self.lengths[index] = position + 1
            scheduled.append((index, position))
            self._running.append(index)
        return scheduled

    def _reserve(self, index: int, length: int) -> None:
        table = self.tables[index]
        while len(table) * SPAN < length:
            table.append(self._free.popleft())


def step(batches: Sequence[int], steps: int, repeats: int) -> Iterator[Measurement]:
    """scheduler: one step with every session decoding: scheduling, memory and bookkeeping."""
    decoder = random_decoder(tiny_v4())
    for batch in batches:
        scheduler = Scheduler(decoder, kv_cache_bytes=2 << 30)
        lengths = [64 + 37 * index % 960 for index in range(batch)]
        peer = PageScheduler(lengths, pages=batch * (1 + (1024 + (repeats + 1) * steps) // SPAN))
        ours_us, theirs_us = _step_both(scheduler, peer, steps, repeats)
        published = UNIFORM_US.get(batch)
        yield Measurement(
            "scheduler",
            f"scheduler step, {batch} sessions decoding, null model",
            ours_us.value,
            "us/step",
            ours_us.spread,
            "one kind of page: queue, free list and block tables, nothing shared, no checkpoints",
            theirs_us.value,
            higher_is_better=False,
            target=Bound("value", "<=", 2 * published) if published else None,
            stretch=Bound("value", "<=", min(published, batch)) if published else None,
            outputs="the same positions in a step, the same number of pages afterwards",
        )


def _step_both(scheduler: Scheduler, peer: PageScheduler, steps: int, repeats: int) -> tuple[Median, Median]:
    """Return the microseconds per step on both sides, with sequences of the same lengths."""
    scheduler.runner = runner = NullRunner(scheduler.pools)
    scheduler.speculate = False  # the peer has no drafts
    requests = [Request(random_ids(scheduler.pools.spec, length, seed=length)) for length in peer.lengths]
    while waiting := [request for request in requests if request.logits_V is None]:
        scheduler.step(waiting)

    def ours() -> None:
        for request in requests:
            request.push(0)
        scheduler.step(requests)

    runner.first = None
    ours()
    assert runner.first is not None
    if sorted(at for at, _ in runner.first[1]) != sorted(at for _, at in peer.step()):
        raise OutputsDifferError(f"the schedulers chose different positions in a step of {len(requests)} sequences")

    def microseconds(step: Callable[[], object]) -> Median:
        return Median.of([1e6 * seconds("s", lambda: [step() for _ in range(steps)]) / steps for _ in range(repeats)])

    ours_us, theirs_us = microseconds(ours), microseconds(peer.step)
    held = [request.sequence.num_spans if request.sequence else 0 for request in requests]
    if held != [len(table) for table in peer.tables]:
        raise OutputsDifferError(f"the schedulers hold {held} and {[*map(len, peer.tables)]} pages for the same tokens")
    return ours_us, theirs_us


def append(length: int, repeats: int) -> Iterator[Measurement]:
    """append-turn: time from a new message to the first forward with its tokens, in a long session of `tiny`."""
    tokens, ours_ms, theirs_ms = anyio.run(_append, length, repeats)
    ours, theirs = Median.of(ours_ms), Median.of(theirs_ms)
    yield Measurement(
        "append-turn",
        f"turn appended to a session of {tokens} tokens, from message to first scheduled chunk",
        ours.value,
        "ms",
        ours.spread,
        "the whole conversation encoded again and found in the prefix cache by its ids",
        theirs.value,
        higher_is_better=False,
        target=Bound("value", "<=", 5),
        stretch=Bound("value", "<=", 0.5),
        outputs="the same tokens, and the same of them in the chunk",
    )


async def _append(length: int, repeats: int) -> tuple[int, list[float], list[float]]:
    """Return the session's length, and the milliseconds of each repeat on both sides."""
    engine = Engine.load("tiny")
    tokenizer = engine.tokenizer
    engine.scheduler.runner = runner = NullRunner(engine.scheduler.pools, favourite=tokenizer.eos_id)
    conversation: list[dict[str, Any]] = [{"role": "user", "content": long_text(length, tokenizer)}]
    ours_ms: list[float] = []
    theirs_ms: list[float] = []
    async with AsyncEngine(engine) as running, running.session() as session:
        await session.append(encode_ids(conversation, tokenizer=tokenizer))
        await _next(session)
        tokens = len(session)
        for turn in range(repeats + 1):
            said = {"role": "user", "content": f"And what follows for case {turn}? Say it in one line, and why."}
            conversation += [{"role": "assistant", "content": ""}, said]

            runner.first, start = None, time.perf_counter()
            async with running.session() as stateless:
                await stateless.append(encode_ids(conversation, tokenizer=tokenizer))
                await _next(stateless)
                theirs = runner.first
                expected = stateless.token_ids
            assert theirs is not None
            theirs_ms.append(1e3 * (theirs[0] - start))

            runner.first, start = None, time.perf_counter()
            await session.append(encode_continuation_ids([said], tokenizer=tokenizer, think=False))
            await _next(session)
            ours = runner.first
            assert ours is not None
            ours_ms.append(1e3 * (ours[0] - start))
            if (ours[1], session.token_ids) != (theirs[1], expected):
                raise OutputsDifferError(
                    f"turn {turn} was appended as {ours[1]}, but encoding the whole conversation gives {theirs[1]}"
                )
    return tokens, ours_ms[1:], theirs_ms[1:]  # without the warm-up turn


async def _next(session: AsyncSession) -> None:
    """Compute everything appended and sample the end of the turn."""
    async for _ in session.generate(SamplingParams(temperature=0, max_tokens=1)):
        pass
