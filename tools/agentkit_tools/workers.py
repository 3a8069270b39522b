"""Threads for synchronous tools: one per call, so that no call spends its deadline waiting for a thread.

A thread cannot be killed. If a call ends before its function, the function keeps running in its thread and its result
is discarded. These threads are daemons, so they do not keep the process alive. At most `MAX_ABANDONED` of them may run.
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
    """One function in its thread. The module's `_lock` guards `ended` and `abandoned`."""

    def __init__(self) -> None:
        self.result: Any = None
        self.error: BaseException | None = None
        self.ended = self.abandoned = False


_lock = threading.Lock()
_abandoned = 0


def abandoned() -> int:
    """Return the number of running functions whose call has ended."""
    return _abandoned


async def run_in_thread(function: Callable[[], T]) -> T:
    """Run `function` in a new daemon thread and return its result or raise its exception.

    If the caller is cancelled, the function keeps running in the background.

    Raises:
        ToolError: too many abandoned functions are still running.
    """
    if _abandoned >= MAX_ABANDONED:
        raise ToolError(
            f"not run: {_abandoned} earlier calls are still running after their deadlines, which is the limit; "
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
            except RuntimeError:  # the event loop is closed
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
    """Mark the job as ended. Return whether it had been abandoned."""
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
    """Close a coroutine that is never awaited, to avoid the warning."""
    if inspect.iscoroutine(result):
        result.close()
