"""One torch thread for the computing thread, without side effects on other threads.

torch keeps a thread count per OS thread, and a process-wide default that a thread adopts on its first torch call.
`torch.set_num_threads` changes both, so a plain call would also limit all threads that the process starts later.
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
    """Let torch use one thread in the calling thread; other threads, including later ones, keep their count."""
    count = torch.get_num_threads()
    _use_one_thread(count)
    try:
        yield
    finally:
        torch.set_num_threads(count)


def _use_one_thread(count: int) -> None:
    """Set this thread's count to one and the default for new threads to `count`."""
    torch.get_num_threads()  # adopt the default now, so that the first torch call does not do so later
    torch.set_num_threads(1)
    restore_default = threading.Thread(target=torch.set_num_threads, args=(count,))
    restore_default.start()
    restore_default.join()


class OneThread:
    """Runs functions with one torch thread: in the caller's thread if it has that count, else in a dedicated one."""

    def __call__(self, function: Callable[[], T]) -> T:
        """Return the result of `function`; a caller that is interrupted still waits for it to end."""
        if torch.get_num_threads() == 1:
            return function()
        future = self._executor.submit(function)
        try:
            return future.result()
        finally:
            wait([future])  # after Ctrl-C: the function may still be writing to memory that would be reused

    @cached_property
    def _executor(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(
            1,
            thread_name_prefix="agentkit_engine: forward",
            initializer=_use_one_thread,
            initargs=(torch.get_num_threads(),),
        )
