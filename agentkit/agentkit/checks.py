"""Checks for mistakes of the caller: constructor arguments, and blocking calls in an event loop."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable
from types import UnionType
from typing import TypeVar

import anyio

from agentkit.errors import RunningLoopError

T = TypeVar("T")


def check_type(name: str, value: object, types: type | UnionType, expected: str) -> None:
    """Refuse a value that is not an instance of `types`.

    Raises:
        TypeError: the message has `name`, `expected` and the value.
    """
    if not isinstance(value, types):
        hint = f"; pass an instance: {value.__name__}()" if isinstance(value, type) else ""
        raise TypeError(f"{name} must be {expected}, got {value!r}{hint}")


M = TypeVar("M")


def check_model(model: M) -> M:
    """Return the model if an agent can run on it.

    Raises:
        TypeError: it is not a model; an engine must be wrapped in an `EmbeddedModel`.
    """
    rooms = {base.__module__.partition(".")[0] for base in type(model).__mro__}
    if "agentkit_engine" in rooms or not all(hasattr(model, name) for name in ("name", "sampling", "open")):
        hint = "such as EmbeddedModel(engine)" if "agentkit_engine" in rooms else 'a checkpoint folder, or "tiny"'
        raise TypeError(f"Agent(model=...) must be a model, {hint}; got {model!r}")
    return model


def check_positive(name: str, value: object, *, whole: bool, none: bool = False) -> None:
    """Refuse values that are not positive, finite numbers (`whole`: integers; bools are refused); `none` allows None.

    Raises:
        TypeError: the value is not such a number.
        ValueError: the value is zero, negative, infinite or NaN.
    """
    if value is None and none:
        return
    or_none = " or None" if none else ""
    if isinstance(value, bool) or not isinstance(value, int if whole else int | float):
        raise TypeError(f"{name} must be a {'whole ' if whole else ''}number{or_none}, got {value!r}")
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"{name} must be positive{or_none}, got {value!r}{'; None means no limit' if none else ''}")


def run_blocking(start: Callable[[], Awaitable[T]], *, instead: str) -> T:
    """Run the awaitable that `start` returns in a new event loop.

    Raises:
        RunningLoopError: an event loop is already running in this thread; the message names `instead`.
    """
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return anyio.run(start)
    raise RunningLoopError(
        f"cannot block, because an event loop is already running in this thread (as in a notebook); use `{instead}`"
    )
