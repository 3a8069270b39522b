"""DeepSeek-V4-Flash's true width: loading beside reading the files, and two threads beside one.

Run as `python -m agentkit_engine.benchmarks --only flash-width`: a CSA and an HCA layer with 16 experts, random FP8 and
FP4 weights, 2.9 GB on disk and in memory.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from agentkit_engine.benchmarks.errors import OutputsDifferError
from agentkit_engine.benchmarks.experts_on_disk import drop_cached_files
from agentkit_engine.benchmarks.peers import random_ids
from agentkit_engine.benchmarks.random_checkpoint import write_random_checkpoint
from agentkit_engine.benchmarks.record import Bound, Measurement
from agentkit_engine.benchmarks.timing import Median, seconds
from agentkit_engine.engine import Engine
from agentkit_engine.sampling_params import SamplingParams
from agentkit_engine.spec import ModelSpec
from agentkit_kernels.cpu import Cpu

NAME = "flash-width"
THREADS = (1, 2)
READ_BYTES = 16 << 20
"""Bytes per read of the files."""


def flash_width(spec: ModelSpec, prefilled: int, decoded: int, repeats: int) -> Iterator[Measurement]:
    """flash-width: load, prefill and decode a random checkpoint, on one thread and on two.

    Raises:
        OutputsDifferError: two threads give other ids or log-probabilities than one.
    """
    with tempfile.TemporaryDirectory(prefix="agentkit-benchmarks-") as name:
        folder = Path(name)
        size = write_random_checkpoint(folder, spec) / 1e9
        yield from _load(folder, size, repeats)
        engine = Engine.load(folder, threads=max(THREADS))
        engine.warm_up()
        yield from _threads(engine, prefilled, decoded, repeats)


def _load(folder: Path, size: float, repeats: int) -> Iterator[Measurement]:
    loads, reads = [], []
    for _ in range(repeats):
        drop_cached_files(folder)
        reads.append(size / seconds("s", lambda: _read(folder)))
        drop_cached_files(folder)
        loads.append(size / seconds("s", lambda: Engine.load(folder, threads=max(THREADS))))
    rate, disk = Median.of(loads), Median.of(reads)
    yield Measurement(
        NAME,
        f"load {size:.2g} GB of packed weights from disk, {max(THREADS)} threads",
        rate.value,
        "GB/s",
        rate.spread,
        "reading the files alone",
        disk.value,
        stretch=Bound("ratio", ">=", 0.7),
    )


def _read(folder: Path) -> None:
    buffer = bytearray(READ_BYTES)
    for path in folder.glob("*.safetensors"):
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def _threads(engine: Engine, prefilled: int, decoded: int, repeats: int) -> Iterator[Measurement]:
    scheduler = engine.scheduler
    scheduler.speculate = False
    ops = scheduler.runner.forward.ops
    assert isinstance(ops, Cpu)
    ids, answers = random_ids(engine.spec, prefilled), []
    times: dict[int, list[tuple[_Times, _Times]]] = {count: [] for count in THREADS}
    for _ in range(repeats):
        for count in THREADS:
            ops.workers.count = count
            scheduler.cache.clear()
            with engine.session() as session:
                session.append(ids)
                answer = session.generate(SamplingParams(temperature=0, max_tokens=decoded + 1))
                start = _Times.now()
                tokens = [next(answer)]
                prompted = _Times.now()
                tokens += answer
                times[count].append((prompted.since(start), _Times.now().since(prompted)))
            answers.append(tokens)
    if any(answer != answers[0] for answer in answers):
        raise OutputsDifferError("two threads give other ids or log-probabilities than one")
    for part, (what, tokens_of) in enumerate((("prefill", prefilled), ("decode", decoded))):
        for unit, clock in (("tokens/s", _Times.wall), ("tokens/CPU-s of the busiest thread", _Times.busiest)):
            one, two = (Median.of([tokens_of / clock(run[part]) for run in times[count]]) for count in THREADS)
            yield Measurement(
                NAME,
                f"{what}, {len(engine.spec.layers)} layers, prompt of {prefilled} tokens, two threads, {unit}",
                two.value,
                unit,
                two.spread,
                "the same on one thread",
                one.value,
                stretch=Bound("ratio", ">=", 1.7),
                outputs=f"{decoded + 1} ids and log-probabilities are equal in {len(answers)} runs",
            )


class _Times(NamedTuple):
    """Wall-clock seconds, and CPU seconds of all threads and of the calling thread."""

    wall_s: float
    process_s: float
    caller_s: float

    @classmethod
    def now(cls) -> _Times:
        return cls(time.perf_counter(), time.process_time(), time.thread_time())

    def since(self, start: _Times) -> _Times:
        return _Times(*(now - then for now, then in zip(self, start, strict=True)))

    def wall(self) -> float:
        return self.wall_s

    def busiest(self) -> float:
        """Return the CPU time of the busier of at most two threads: the wait on a machine with nothing else to do."""
        return max(self.caller_s, self.process_s - self.caller_s)
