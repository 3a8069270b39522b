"""The interface between a conversation behind an API and the client of one API.

A `Provider` turns one request into a stream of deltas. It handles only the wire format: it does not know turns or
retries, and runs no tools. `RemoteSession` (in `session.py`) owns the conversation: it retries, maps tool names,
validates what arrives and builds the assistant message.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from agentkit.messages import Message
from agentkit.model import Effort
from agentkit_engine.sampling_params import SamplingParams

StreamEnd = Literal["stop", "max_tokens", "context", "refused"]
"""The reason that the API gives for the end of a turn: the model was done (calls included), the turn's token limit or
the context window was reached, or the provider's filter stopped the turn."""


@dataclass(frozen=True, slots=True)
class ToolSpec:
    """A tool as it is sent: the name fits the API's rules, and `parameters` is a JSON schema."""

    name: str
    description: str
    parameters: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class TurnRequest:
    """Everything that one turn needs. `messages` is the whole conversation, with tool names as they are sent."""

    messages: Sequence[Message]
    tools: Sequence[ToolSpec]
    think: bool
    effort: Effort
    sampling: SamplingParams
    max_tokens: int | None
    max_thinking_tokens: int | None


@dataclass(frozen=True, slots=True)
class ReasoningChunk:
    """A chunk of reasoning, or of the API's summary of it."""

    text: str


@dataclass(frozen=True, slots=True)
class TextChunk:
    """A chunk of the answer."""

    text: str


@dataclass(frozen=True, slots=True)
class CallChunk:
    """A chunk of call number `index` of the turn. The first chunk of a call has its `id` and `name`."""

    index: int
    arguments: str = ""
    id: str | None = None
    name: str | None = None


@dataclass(frozen=True, slots=True)
class TokenCounts:
    """Token counts of one request, as the API bills them.

    `input_tokens` includes `cache_hit_tokens` and `cache_write_tokens`; `output_tokens` includes `reasoning_tokens`.
    """

    input_tokens: int = 0
    cache_hit_tokens: int = 0
    cache_write_tokens: int = 0
    output_tokens: int = 0
    reasoning_tokens: int = 0


@dataclass(frozen=True, slots=True)
class TokenIds:
    """Token ids that the endpoint reports: the ids of the whole prompt, and the sampled ids with log-probabilities.

    Some endpoints report only one of the two lists; the other is then empty.
    """

    prompt: tuple[int, ...] = ()
    sampled: tuple[int, ...] = ()
    logprobs: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class StreamFinished:
    """The last item of a complete stream. `provider_data` is for `AssistantMessage.provider_data`."""

    end: StreamEnd
    usage: TokenCounts
    provider_data: Mapping[str, Any] | None = None
    token_ids: TokenIds | None = None


Delta = ReasoningChunk | TextChunk | CallChunk | StreamFinished


class TransientError(Exception):
    """A request failed with an error that may pass: 408, 409, 429, 5xx, a timeout, a broken or incomplete stream.

    Attributes:
        retry_after_s: Seconds to wait that the server asks for; None if it asks for none.
        status: The HTTP status; None without a response.
        reason: What happened, in one line, without the key.
    """

    def __init__(self, reason: str, *, retry_after_s: float | None = None, status: int | None = None) -> None:
        super().__init__(reason)
        self.reason = reason
        self.retry_after_s = retry_after_s
        self.status = status


class Provider(Protocol):
    """The client of one API. It never retries a request."""

    @property
    def api(self) -> str:
        """The name of the wire format: "openai-chat", "openai-responses" or "anthropic"."""
        ...

    @property
    def host(self) -> str:
        """The host that prompts are sent to, with its port if that is not the default port."""
        ...

    @property
    def efforts(self) -> tuple[Effort, ...]:
        """The efforts that the model has."""
        ...

    @property
    def max_tools(self) -> int | None:
        """The maximum number of tools in a request; None without a limit."""
        ...

    def check_sampling(self, sampling: SamplingParams) -> None:
        """Refuse sampling parameters that the API does not have. A field with its default value is not sent.

        Raises:
            ModelOptionError: the message names the field, and what the API has instead.
        """
        ...

    def stream(self, request: TurnRequest) -> AsyncGenerator[Delta, None]:
        """Send the request and yield its deltas; the last one is `StreamFinished`.

        Closing the generator closes the connection.

        Raises:
            TransientError: the same request may succeed later.
            ContextFullError: the conversation does not fit into the model's context.
            ApiKeyError: the key is missing, wrong or not allowed.
            UnknownModelError: the API does not have the model.
            ApiError: the request failed for another reason that a retry cannot fix.
        """
        ...

    async def aclose(self) -> None:
        """Close the client's connections."""
        ...
