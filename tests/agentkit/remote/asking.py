"""Asking a provider for a turn, and reading what it streams."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import aclosing
from typing import Any

from agentkit import UserMessage
from agentkit.messages import Message
from agentkit.models.remote.provider import (
    CallChunk,
    Delta,
    Provider,
    ReasoningChunk,
    StreamFinished,
    TextChunk,
    ToolSpec,
    TurnRequest,
)
from agentkit_engine.sampling_params import SamplingParams

USER = UserMessage("hello")


def ask(*messages: Message, tools: Sequence[ToolSpec] = (), think: bool = True, **fields: Any) -> TurnRequest:
    return TurnRequest(
        messages or (USER,),
        tools,
        think=think,
        effort=fields.pop("effort", "high"),
        sampling=fields.pop("sampling", SamplingParams()),
        max_tokens=fields.pop("max_tokens", None),
        max_thinking_tokens=fields.pop("max_thinking_tokens", None),
        **fields,
    )


async def drained(provider: Provider, request: TurnRequest) -> tuple[list[Delta], StreamFinished]:
    async with aclosing(provider.stream(request)) as stream:
        deltas = [delta async for delta in stream]
    finished = deltas.pop()
    assert isinstance(finished, StreamFinished)
    return deltas, finished


def text_of(deltas: Sequence[Delta]) -> str:
    return "".join(delta.text for delta in deltas if isinstance(delta, TextChunk))


def calls_of(deltas: Sequence[Delta]) -> dict[int, tuple[str | None, str | None, str]]:
    calls: dict[int, tuple[str | None, str | None, str]] = {}
    for delta in deltas:
        if isinstance(delta, CallChunk):
            id, name, arguments = calls.get(delta.index, (None, None, ""))
            calls[delta.index] = (delta.id or id, delta.name or name, arguments + delta.arguments)
    return calls


def reasoning_of(deltas: Sequence[Delta]) -> str:
    return "".join(delta.text for delta in deltas if isinstance(delta, ReasoningChunk))
