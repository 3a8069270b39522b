"""Which turns think: the effort is fixed for a session, but whether a turn thinks is one token and may change."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from agentkit.messages import Message, ToolMessage, UserMessage
from agentkit.model import EFFORTS, Effort

Thinking = Literal["always", "never", "auto"]

ThinkingPolicy = Callable[[list[Message]], bool]
"""Decides from the messages the turn answers (the user's, or the results of the last turn) whether it thinks."""


def always(news: list[Message]) -> bool:
    """Every turn thinks."""
    return True


def never(news: list[Message]) -> bool:
    """No turn thinks."""
    return False


def auto(news: list[Message]) -> bool:
    """Think when the user has spoken and after any failed result; answer directly on routine steps."""
    return any(isinstance(m, UserMessage) or (isinstance(m, ToolMessage) and m.is_error) for m in news)


POLICIES: dict[Thinking, ThinkingPolicy] = {"always": always, "never": never, "auto": auto}


def thinking_policy(thinking: Thinking | ThinkingPolicy, effort: Effort) -> ThinkingPolicy:
    """The policy of that name, or the caller's own; effort "none" never thinks.

    Raises:
        ValueError: no policy or effort has that name.
    """
    if effort not in EFFORTS:
        raise ValueError(f"effort must be one of {', '.join(EFFORTS)}, got {effort!r}")
    if not callable(thinking) and not (isinstance(thinking, str) and thinking in POLICIES):
        raise ValueError(f"thinking must be one of {', '.join(POLICIES)} or a function, got {thinking!r}")
    if effort == "none":
        return never
    return thinking if callable(thinking) else POLICIES[thinking]
