"""Clocks: CPU-seconds on one thread, wall-clock seconds on two."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch

from agentkit_engine.runtime.scheduler import Scheduler
from agentkit_kernels.cpu.backend import Cpu

Clock = Literal["CPU-s", "s"]
CLOCKS: tuple[tuple[Clock, int, str], ...] = (("CPU-s", 1, "one thread"), ("s", 2, "two threads"))
"""Each clock with its number of threads: CPU time measures the work, wall time the user's wait."""


@contextmanager
def threads(count: int, *schedulers: Scheduler) -> Iterator[None]:
    """Let torch and the engines of `schedulers` use `count` threads inside the block."""
    workers = [ops.workers for each in schedulers if isinstance(ops := each.runner.forward.ops, Cpu)]
    before = torch.get_num_threads(), [each.count for each in workers]
    torch.set_num_threads(count)
    for each in workers:
        each.count = count
    try:
        yield
    finally:
        torch.set_num_threads(before[0])
        for each, own in zip(workers, before[1], strict=True):
            each.count = own


def seconds(clock: Clock, work: Callable[[], object]) -> float:
    """Return how long `work` takes: seconds of CPU time over all threads, or of wall time."""
    now = time.process_time if clock == "CPU-s" else time.perf_counter
    start = now()
    work()
    return now() - start


@dataclass(frozen=True, slots=True)
class Median:
    """The median of repeated measurements; `spread` is (max - min) / median."""

    value: float
    spread: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Median:
        """Return the median of at least one value."""
        value = statistics.median(values)
        return cls(value, (max(values) - min(values)) / value)
