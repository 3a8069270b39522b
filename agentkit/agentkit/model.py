"""The seam between the loop and whatever produces tokens: `Model` opens a `ModelSession`."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Annotated, Final, Literal, Protocol, get_args

from pydantic import FailFast

from agentkit.messages import STRICT, AssistantMessage, Message
from agentkit_engine.sampling_params import SamplingParams
from agentkit_tools import Tool, ToolCall

Effort = Literal["none", "low", "high", "max"]
"""How hard the model thinks, fixed for a session: the level is text at the very start of the prompt."""

EFFORTS: Final[tuple[Effort, ...]] = get_args(Effort)

Dialect = Literal["v4-preview", "v4-0731"]
"""Which table of effort texts the checkpoint was trained with."""

SegmentKind = Literal["prompt", "sampled", "forced"]

StopReason = Literal["stop", "max_tokens", "context", "repetition"]
"""Why generation ended: the model closed its turn, the token limit or the end of the context was reached, or the turn
only repeated itself."""


@dataclass(frozen=True, slots=True)
class GenerationLimits:
    """Bounds of one turn, in tokens; None means no bound. `max_thinking_tokens` closes the thought only."""

    max_tokens: int | None = None
    max_thinking_tokens: int | None = None
    max_repeated_tokens: int | None = None


@dataclass(frozen=True, slots=True)
class TokenSegment:
    """A run of ids in the session, and how they got there.

    "prompt" ids were fed, "sampled" ids were drawn by the model, "forced" ids close a turn or a thought that was
    stopped, or are those where a grammar allowed no other. Each sampled id carries its log-probability: the log-softmax
    of the raw logits, at temperature 1. `top_logprobs` holds the most likely ids at each place where
    `SamplingParams.top_logprobs` asks for them.
    """

    kind: SegmentKind
    ids: Annotated[tuple[int, ...], FailFast()]
    logprobs: Annotated[tuple[float, ...], FailFast()] = ()
    top_logprobs: Annotated[tuple[tuple[tuple[int, float], ...], ...], FailFast()] = ()
    type: Literal["segment"] = "segment"
    __pydantic_config__ = STRICT

    def __post_init__(self) -> None:
        expected = len(self.ids) if self.kind == "sampled" else 0
        if len(self.logprobs) != expected:
            raise ValueError(
                f"a {self.kind} segment of {len(self.ids)} ids has {expected} logprobs, got {len(self.logprobs)}"
            )


@dataclass(frozen=True, slots=True)
class Usage:
    """What was used, in tokens and calls. `thinking_tokens` are part of `sampled_tokens`.

    Every id that was fed (prompts, forced ids, the history of a run that is continued) was either found in the engine's
    prefix cache or computed: `cache_hit_tokens` and `cache_miss_tokens`, both 0 where a model cannot tell.
    """

    prompt_tokens: int = 0
    cache_hit_tokens: int = 0
    cache_miss_tokens: int = 0
    sampled_tokens: int = 0
    thinking_tokens: int = 0
    forced_tokens: int = 0
    turns: int = 0
    calls: int = 0
    tool_time_s: float = 0.0
    wall_time_s: float = 0.0
    __pydantic_config__ = STRICT


@dataclass(frozen=True, slots=True)
class ReasoningDelta:
    """A piece of the thought."""

    text: str
    type: Literal["reasoning_delta"] = "reasoning_delta"


@dataclass(frozen=True, slots=True)
class TextDelta:
    """A piece of the answer text."""

    text: str
    type: Literal["text_delta"] = "text_delta"


@dataclass(frozen=True, slots=True)
class ThoughtCut:
    """The thinking budget was spent after `tokens` tokens of thought, so `</think>` was forced; the turn goes on."""

    tokens: int
    type: Literal["thought_cut"] = "thought_cut"
    __pydantic_config__ = STRICT


@dataclass(frozen=True, slots=True)
class CallReady:
    """A call is complete. `index` is its place in the turn.

    In a block that opens the answer a call is ready when its closing tag was sampled; in any other block when the turn
    has ended right after it, because until then it may be a quotation.
    """

    index: int
    call: ToolCall
    type: Literal["call_ready"] = "call_ready"
    __pydantic_config__ = STRICT


@dataclass(frozen=True, slots=True)
class CallMalformed:
    """The model tried a call that cannot be read; it gets one error result for it. `name` may not have been reached."""

    index: int
    name: str | None
    error: str
    type: Literal["call_malformed"] = "call_malformed"
    __pydantic_config__ = STRICT


@dataclass(frozen=True, slots=True)
class CallsWithdrawn:
    """The model went on with text after the block that opened its answer: its calls, from `first` on, were none."""

    first: int
    type: Literal["calls_withdrawn"] = "calls_withdrawn"
    __pydantic_config__ = STRICT


@dataclass(frozen=True, slots=True)
class Generated:
    """Generation is over: what was said, and why it ended. Always the last event of a generation."""

    message: AssistantMessage
    reason: StopReason


ModelEvent = ReasoningDelta | TextDelta | ThoughtCut | CallReady | CallMalformed | CallsWithdrawn | Generated


class History(Protocol):
    """A conversation so far: a `Trajectory`, or a session."""

    @property
    def messages(self) -> Sequence[Message]:
        """Everything said, in order, assistant turns included."""
        ...

    @property
    def segments(self) -> Sequence[TokenSegment]:
        """Every id, in order. Empty when the model is behind an API."""
        ...


class ModelSession(History, Protocol):
    """One conversation that only grows; `messages` and `segments` grow while it generates.

    `generate` leaves the session at a turn boundary however it ends: stopped by a limit, left early or cancelled, the
    turn is closed (with forced ids where there are ids), so that the conversation can always go on.
    """

    @property
    def dialect(self) -> Dialect | None:
        """The checkpoint's effort table; None when the model is behind an API."""
        ...

    @property
    def grammar_off(self) -> str | None:
        """Why calls are not held to the schemas of the tools; None when they are."""
        ...

    @property
    def usage(self) -> Usage:
        """Token counts of the session so far."""
        ...

    async def append(self, messages: Sequence[Message]) -> None:
        """Say `messages` (user messages and tool results); the model reads them at the next `generate`."""
        ...

    def generate(self, *, think: bool, limits: GenerationLimits) -> AsyncGenerator[ModelEvent, None]:
        """One turn of the model; `think` decides whether it opens with a thought. Close it when you leave early."""
        ...


class Model(Protocol):
    """Something that can hold a conversation."""

    @property
    def name(self) -> str:
        """What reports call it."""
        ...

    @property
    def sampling(self) -> SamplingParams:
        """How it is meant to be sampled; an agent's default."""
        ...

    def open(
        self, *, tools: Sequence[Tool], effort: Effort, sampling: SamplingParams, history: History | None = None
    ) -> AbstractAsyncContextManager[ModelSession]:
        """A session; with `history`, one that stands where that conversation ends."""
        ...
