"""One torch thread for the computing thread, without side effects on other threads.

torch keeps a thread count per OS thread, and a process-wide default that a thread adopts on its first torch call.
`torch.set_num_threads` changes both. So it is called once, when a computing thread starts, and the default is restored.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from functools import cached_property
from typing import TypeVar

import torch

T = TypeVar("T")


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
        return ThreadPoolExecutor(1, "agentkit_engine: forward", _use_one_thread, (torch.get_num_threads(),))


def _use_one_thread(default: int) -> None:
    """Set this thread's count to one, and the count of threads that start later to `default`."""
    torch.get_num_threads()  # adopt the default now, so that the first torch call does not do so later
    torch.set_num_threads(1)
    restore = threading.Thread(target=torch.set_num_threads, args=(default,))
    restore.start()
    restore.join()
