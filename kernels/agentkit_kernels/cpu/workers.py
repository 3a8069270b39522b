"""Threads for one backend: they share out work whose results do not depend on how it is cut.

Nothing here is process-wide. Idle workers block; they do not spin, so a second engine or another process costs no more
than its own work.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, wait
from functools import cached_property
from typing import TypeVar

T = TypeVar("T")
SHARED = 1 << 21
"""Multiply-adds from which work is shared out to several threads: they take 0.1 ms, and waking a thread 0.02."""
PIECES = 4
"""Pieces per thread of shared work, so that a thread that is held up leaves its last pieces to the others."""


def available_cores() -> int:
    """Return the number of cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Workers:
    """The calling thread and `count - 1` others.

    The others start with the first work that is shared out, and end with the interpreter or this object.
    """

    def __init__(self, count: int | None = None) -> None:
        self.count = available_cores() if count is None else count

    def each(self, function: Callable[[T], object], tasks: Iterable[T]) -> None:
        """Call `function` with every task, in this thread and the others; return when all have ended.

        Threads take the next task when they have finished one, so tasks may differ in size. After an exception no
        further task begins, and it is raised here once all threads are idle.
        """
        pending, lock = iter(tasks), threading.Lock()

        def run() -> None:
            nonlocal pending
            try:
                while True:
                    with lock:
                        task = next(pending, pending)
                    if task is pending:
                        return
                    function(task)  # type: ignore[arg-type]
            except BaseException:
                pending = iter(())
                raise

        others = [self._executor.submit(run) for _ in range(self.count - 1)]
        try:
            run()
        finally:
            wait(others)  # also after Ctrl-C: tasks may write to memory that would be reused
        for other in others:
            other.result()

    def shares(self, work: int) -> bool:
        """Return whether threads share this many multiply-adds, or operations that take as long."""
        return self.count > 1 and work >= SHARED

    def ranges(self, function: Callable[[int, int], object], count: int, work: int) -> None:
        """Call `function(first, last)` with ranges that cover `count` items, one range if `work` is too little."""
        if not self.shares(work):
            function(0, count)
            return
        step = -(-count // (PIECES * self.count))
        self.each(lambda first: function(first, min(first + step, count)), range(0, count, step))

    @cached_property
    def _executor(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(max(1, self.count - 1), thread_name_prefix="agentkit_kernels: worker")
