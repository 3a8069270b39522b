"""A model that follows a script, through the same token path as the embedded engine.

Used for oracle trajectories and tests: turns are encoded to exactly the ids that the engine would have sampled.
"""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, get_args

from anyio.lowlevel import checkpoint

import agentkit_engine
from agentkit.checks import check_type
from agentkit.messages import Message
from agentkit.model import Dialect, Effort, History, ModelSession
from agentkit.models.tokens import TokenizedSession
from agentkit_engine.chat import Tokenizer, encode_completion_ids
from agentkit_engine.sampling_params import SamplingParams
from agentkit_tools import Tool


@dataclass(frozen=True, slots=True)
class AssistantTurn:
    """One scripted turn: reasoning (used only if the turn thinks), text, and calls as (name, arguments)."""

    reasoning: str | None = None
    content: str = ""
    calls: Sequence[tuple[str, Mapping[str, Any]]] = ()


@cache
def packaged_tokenizer() -> Tokenizer:
    """Return the tokenizer of the packaged model `tiny`; does not import torch."""
    return Tokenizer.from_dir(Path(agentkit_engine.__file__).parent / "tiny")


Policy = Callable[[Sequence[Message], bool], AssistantTurn | Sequence[int]]
"""A function of the messages and whether the turn thinks; returns a turn, or raw ids that no turn encodes to."""


class ScriptedModel:
    """A `Model` that takes every turn from `policy(messages, think)`."""

    def __init__(
        self,
        policy: Policy,
        tokenizer: Tokenizer | None = None,
        *,
        name: str = "scripted",
        dialect: Dialect = "v4-preview",
    ) -> None:
        """Create a model that generates the turns of `policy`, encoded with `tokenizer` (default: that of `tiny`).

        Raises:
            TypeError, ValueError: an argument is of the wrong type, or the dialect is unknown.
        """
        if not callable(policy):
            raise TypeError(f"ScriptedModel(policy) must be a function of (messages, think), got {policy!r}")
        check_type("ScriptedModel(tokenizer=...)", tokenizer, Tokenizer | None, "a Tokenizer or None")
        if dialect not in get_args(Dialect):
            raise ValueError(f"dialect must be one of {', '.join(get_args(Dialect))}, got {dialect!r}")
        self.name = name
        self.sampling = SamplingParams()
        self.tokenizer = tokenizer or packaged_tokenizer()
        self._policy = policy
        self._dialect: Dialect = dialect

    @asynccontextmanager
    async def open(
        self, *, tools: Sequence[Tool], effort: Effort, sampling: SamplingParams, history: History | None = None
    ) -> AsyncIterator[ModelSession]:
        """See `Model.open`; sampling has no effect on a script."""
        tokens = ScriptedTokens(self._policy, self.tokenizer)
        session = TokenizedSession(tokens, self.tokenizer, tools=tools, effort=effort, dialect=self._dialect)
        tokens.messages = session.messages
        if history is not None:
            await session.restore(history)
        yield session


class ScriptedToken(NamedTuple):
    """A scripted token id, with probability 1."""

    id: int
    logprob: float = 0.0
    top: tuple[tuple[int, float], ...] = ()
    forced: bool = False


class ScriptedTokens:
    """A `TokenSession` that samples the policy's turns with probability 1."""

    max_length = None
    cache_usage = (0, 0)

    def __init__(self, policy: Policy, tokenizer: Tokenizer) -> None:
        self.token_ids: list[int] = []
        self.messages: Sequence[Message] = ()
        self._policy = policy
        self._tokenizer = tokenizer
        self._think = tokenizer.control_id("<think>")
        self._think_end = tokenizer.control_id("</think>")
        self._rest: Iterator[int] = iter(())
        self._end = -1  # length of the session when the last id was taken from `_rest`

    async def append(self, ids: Sequence[int], /) -> None:
        """Feed ids."""
        self.token_ids.extend(ids)

    async def clear(self) -> None:
        """Remove all ids."""
        self.token_ids.clear()
        self._end = -1

    async def checkpoint(self) -> None:
        """Do nothing: there is no state to keep."""

    async def keep(self) -> None:
        """Do nothing: there is no state to keep."""

    async def prefill(self) -> None:
        """Do nothing: there is nothing to compute."""

    async def park(self) -> None:
        """Do nothing: there is no memory to free."""

    async def generate(self, *, max_tokens: int | None) -> AsyncGenerator[ScriptedToken, None]:
        """Yield the ids of the policy's turn; after a forced `</think>`, the rest of the turn after its reasoning."""
        await checkpoint()
        if self._end == len(self.token_ids) - 1 and self.token_ids[-1] == self._think_end:
            for token_id in self._rest:
                if token_id == self._think_end:
                    break
        else:
            self._rest = iter(self._turn_ids(think=self.token_ids[-1] == self._think))
        for count, token_id in enumerate(self._rest, start=1):
            self.token_ids.append(token_id)
            self._end = len(self.token_ids)
            yield ScriptedToken(token_id)
            if count == max_tokens:
                return

    def _turn_ids(self, *, think: bool) -> Sequence[int]:
        turn = self._policy(self.messages, think)
        if not isinstance(turn, AssistantTurn):
            return turn
        message = {
            "role": "assistant",
            "content": turn.content,
            "reasoning_content": turn.reasoning or "",
            "tool_calls": [
                {"type": "function", "function": {"name": name, "arguments": json.dumps(arguments, ensure_ascii=False)}}
                for name, arguments in turn.calls
            ],
        }
        return encode_completion_ids(message, tokenizer=self._tokenizer, think=think)
