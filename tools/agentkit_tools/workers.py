"""Threads for synchronous tools: one per call, so that no call waits for a thread while its deadline runs.

A thread cannot be killed. A function that outlives its call keeps its thread until it returns, and the call's result is
lost. Such threads are daemons, which never keep the process alive, and at most `MAX_ABANDONED` of them may run.
"""

from __future__ import annotations

import contextvars
import inspect
import threading
from collections.abc import Callable
from typing import Any, TypeVar, cast

import anyio
import anyio.from_thread
import anyio.lowlevel

from agentkit_tools.errors import ToolError

MAX_ABANDONED = 256


T = TypeVar("T")


class _Job:
    """One function in its thread. `lock` orders its end and its being abandoned."""

    def __init__(self) -> None:
        self.result: Any = None
        self.error: BaseException | None = None
        self.ended = self.abandoned = False


_lock = threading.Lock()
_abandoned = 0


def abandoned() -> int:
    """The number of functions that still run although nobody waits for them."""
    return _abandoned


async def run_in_thread(function: Callable[[], T]) -> T:
    """Return what `function` returns, or raise what it raises, in a daemon thread of its own.

    When the caller is cancelled, the function goes on unobserved.

    Raises:
        ToolError: too many abandoned functions are still running.
    """
    if _abandoned >= MAX_ABANDONED:
        raise ToolError(
            f"not run: {_abandoned} earlier calls are still running past their deadlines, which is the most allowed; "
            "wait for them to end"
        )
    job, done, token = _Job(), anyio.Event(), anyio.lowlevel.current_token()
    context = contextvars.copy_context()

    def work() -> None:
        try:
            job.result = context.run(function)
        except BaseException as error:
            job.error = error
        if not _end(job):
            try:
                anyio.from_thread.run_sync(done.set, token=token)
            except RuntimeError:  # the event loop closed meanwhile: nobody waits
                _discard(job.result)

    threading.Thread(target=work, name="agentkit: tool", daemon=True).start()
    try:
        await done.wait()
    except BaseException:
        _abandon(job)
        raise
    if job.error is not None:
        raise job.error
    return cast(T, job.result)


def _end(job: _Job) -> bool:
    """Note the end of a job. Returns whether it was abandoned before."""
    global _abandoned
    with _lock:
        job.ended = True
        if job.abandoned:
            _abandoned -= 1
    if job.abandoned:
        _discard(job.result)
    return job.abandoned


def _abandon(job: _Job) -> None:
    global _abandoned
    with _lock:
        job.abandoned = not job.ended
        if job.abandoned:
            _abandoned += 1
    if not job.abandoned:
        _discard(job.result)


def _discard(result: Any) -> None:
    """Close a coroutine that nobody is going to await, which would warn."""
    if inspect.iscoroutine(result):
        result.close()
