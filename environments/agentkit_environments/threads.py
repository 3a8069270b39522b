"""Blocking work in a worker thread that is notified of cancellation."""

from __future__ import annotations

import os
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

import anyio
import anyio.lowlevel
import anyio.to_thread

T = TypeVar("T")


async def run_cancellable(
    function: Callable[[int], T],
    limiter: anyio.CapacityLimiter,
    meanwhile: Callable[[], Coroutine[Any, Any, None]] | None = None,
) -> T:
    """Run `function(cancel_fd)` in a worker thread and return its result. Run `meanwhile()` beside it, until it ends.

    When the caller is cancelled, `cancel_fd` becomes readable (end of file). The function should then stop its work and
    return soon; the cancellation continues after that.
    """
    cancel_read, cancel_write = os.pipe()
    result: list[T] = []
    error: list[Exception] = []

    async def close_on_cancel() -> None:
        try:
            await anyio.sleep_forever()
        finally:
            os.close(cancel_write)

    try:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(close_on_cancel)
            if meanwhile is not None:
                tasks.start_soon(meanwhile)
            await anyio.lowlevel.checkpoint()
            try:
                result.append(await anyio.to_thread.run_sync(function, cancel_read, limiter=limiter))
            except Exception as exc:  # raised below, outside the group, to avoid wrapping it in one
                error.append(exc)
            tasks.cancel_scope.cancel()
    finally:
        os.close(cancel_read)
    await anyio.lowlevel.checkpoint_if_cancelled()
    if error:
        raise error[0]
    return result[0]
