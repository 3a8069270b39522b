"""Policies that decide which turns think. The effort is fixed for a session, but thinking is one token per turn."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from agentkit.messages import Message, ToolMessage, UserMessage
from agentkit.model import EFFORTS, Effort

Thinking = Literal["always", "never", "auto"]

ThinkingPolicy = Callable[[list[Message]], bool]
"""A function from the messages that a turn answers (the user's, or the last turn's results) to whether it thinks."""


def always(news: list[Message]) -> bool:
    """Think in every turn."""
    return True


def never(news: list[Message]) -> bool:
    """Think in no turn."""
    return False


def auto(news: list[Message]) -> bool:
    """Think after user messages and failed results; answer directly otherwise."""
    return any(isinstance(m, UserMessage) or (isinstance(m, ToolMessage) and m.is_error) for m in news)


POLICIES: dict[Thinking, ThinkingPolicy] = {"always": always, "never": never, "auto": auto}


def thinking_policy(thinking: Thinking | ThinkingPolicy, effort: Effort) -> ThinkingPolicy:
    """Return the policy with that name, or the given function. Effort "none" never thinks.

    Raises:
        ValueError: the policy or effort is unknown.
    """
    if effort not in EFFORTS:
        raise ValueError(f"effort must be one of {', '.join(EFFORTS)}, got {effort!r}")
    if not callable(thinking) and not (isinstance(thinking, str) and thinking in POLICIES):
        raise ValueError(f"thinking must be one of {', '.join(POLICIES)} or a function, got {thinking!r}")
    if effort == "none":
        return never
    return thinking if callable(thinking) else POLICIES[thinking]
