"""One torch thread for the thread that computes, and no side effect on any other.

torch keeps a thread count per OS thread, and a process-wide default that a thread takes over on its first torch call.
`torch.set_num_threads` changes both, so a plain call would leave one thread to every thread the process starts later.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from functools import cached_property
from typing import TypeVar

import torch

T = TypeVar("T")


@contextmanager
def one_thread() -> Iterator[None]:
    """Let torch use one thread in the calling thread; other threads, later ones too, keep their count."""
    count = torch.get_num_threads()
    _use_one_thread(count)
    try:
        yield
    finally:
        torch.set_num_threads(count)


def _use_one_thread(count: int) -> None:
    """Set this thread's count to one, and leave `count` as the default of threads to come."""
    torch.get_num_threads()  # the first call in a thread takes the default over, and would do so later
    torch.set_num_threads(1)
    restore_default = threading.Thread(target=torch.set_num_threads, args=(count,))
    restore_default.start()
    restore_default.join()


class OneThread:
    """Runs functions with one torch thread: here if that is the caller's count, else in a thread made for it."""

    def __call__(self, function: Callable[[], T]) -> T:
        """Return what `function` returns; a caller that is interrupted still waits until it has ended."""
        if torch.get_num_threads() == 1:
            return function()
        future = self._executor.submit(function)
        try:
            return future.result()
        finally:
            wait([future])  # after Ctrl-C: memory must not be given to others while it is written

    @cached_property
    def _executor(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(
            1,
            thread_name_prefix="agentkit_engine: forward",
            initializer=_use_one_thread,
            initargs=(torch.get_num_threads(),),
        )
