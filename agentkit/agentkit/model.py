"""The interface between the agent loop and a source of tokens: a `Model` opens `ModelSession`s."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterable, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, fields, replace
from typing import Annotated, Final, Literal, Protocol, get_args

from pydantic import FailFast

from agentkit.messages import STRICT, AssistantMessage, Message
from agentkit_engine.sampling_params import SamplingParams
from agentkit_tools import Tool, ToolCall

Effort = Literal["none", "low", "high", "max"]
"""Reasoning effort, fixed for a session because the level is text at the start of the prompt."""

EFFORTS: Final[tuple[Effort, ...]] = get_args(Effort)

Dialect = Literal["v4-preview", "v4-0731"]
"""The set of effort prompts that the checkpoint was trained with."""

SegmentKind = Literal["prompt", "sampled", "forced"]

StopReason = Literal["stop", "max_tokens", "context", "repetition", "refused"]
"""The reason a generation ended: the model ended its turn, `max_tokens` was reached, the context is full, the turn only
repeated itself, or the API's filter stopped it."""


@dataclass(frozen=True, slots=True)
class GenerationLimits:
    """Limits of one turn, in tokens; None means no limit. `max_thinking_tokens` closes only the thinking block."""

    max_tokens: int | None = None
    max_thinking_tokens: int | None = None
    max_repeated_tokens: int | None = None


@dataclass(frozen=True, slots=True)
class TokenSegment:
    """Consecutive token ids of a session that have the same origin.

    "prompt" ids are input. "sampled" ids were drawn by the model. "forced" ids close a turn or thinking block that was
    stopped, or are the only ids that a grammar allowed. Each sampled id has a log-probability: the log-softmax of the
    raw logits, at temperature 1. A server behind an API may report ids without them; `logprobs` is then empty.
    `top_logprobs` has the most likely ids at each position, if `SamplingParams.top_logprobs` asks for them.

    `restart` marks a prompt that does not continue the ids before it, because a server rendered the conversation
    again from the start: the session's ids begin with this segment.
    """

    kind: SegmentKind
    ids: Annotated[tuple[int, ...], FailFast()]
    logprobs: Annotated[tuple[float, ...], FailFast()] = ()
    top_logprobs: Annotated[tuple[tuple[tuple[int, float], ...], ...], FailFast()] = ()
    restart: bool = False
    type: Literal["segment"] = "segment"
    __pydantic_config__ = STRICT

    def __post_init__(self) -> None:
        if self.logprobs and not (self.kind == "sampled" and len(self.logprobs) == len(self.ids)):
            expected = f"{len(self.ids)} logprobs or none" if self.kind == "sampled" else "no logprobs"
            raise ValueError(f"a {self.kind} segment of {len(self.ids)} ids needs {expected}, got {len(self.logprobs)}")
        if self.restart and self.kind != "prompt":
            raise ValueError(f"only a prompt can begin the ids anew, got restart=True on a {self.kind} segment")


@dataclass(frozen=True, slots=True)
class Usage:
    """Token, call and time counts. `sampled_tokens` includes `thinking_tokens`.

    Every input id (prompts, forced ids, the history of a continued run) was either found in the engine's prefix
    cache (`cache_hit_tokens`) or computed (`cache_miss_tokens`). Both are 0 if the model does not report them. An API
    receives the whole conversation in every turn, so its `prompt_tokens` are the sum over the turns.
    `cache_write_tokens` are the computed tokens that the API charges for storing in its cache.

    `cost_usd` is the price of the tokens in US dollars; None if the price of any of them is unknown, or if the model
    runs in this process. `subagents` is the usage of all agents that ran inside calls, which the other fields do not
    include.
    """

    prompt_tokens: int = 0
    cache_hit_tokens: int = 0
    cache_miss_tokens: int = 0
    sampled_tokens: int = 0
    thinking_tokens: int = 0
    forced_tokens: int = 0
    cache_write_tokens: int = 0
    cost_usd: float | None = None
    turns: int = 0
    calls: int = 0
    tool_time_s: float = 0.0
    wall_time_s: float = 0.0
    subagents: Usage | None = None
    __pydantic_config__ = STRICT

    @property
    def total(self) -> Usage:
        """The usage including all sub-agents. The times are only those of the run itself."""
        if self.subagents is None:
            return self
        both = total_usage([replace(self, subagents=None), self.subagents.total])
        return replace(both, tool_time_s=self.tool_time_s, wall_time_s=self.wall_time_s)


def total_cost(costs: Iterable[float | None]) -> float | None:
    """Return the sum of costs in US dollars; None if any cost is unknown."""
    total = 0.0
    for cost in costs:
        if cost is None:
            return None
        total += cost
    return total


def total_usage(parts: Iterable[Usage]) -> Usage:
    """Return the usage of several runs together. A part without tokens costs nothing."""
    parts = list(parts)
    sums = {
        field.name: sum(getattr(part, field.name) for part in parts)
        for field in fields(Usage)
        if field.name not in ("cost_usd", "subagents")
    }
    billed = [part.cost_usd for part in parts if part.cost_usd is not None or part.prompt_tokens or part.sampled_tokens]
    below = [part.subagents for part in parts if part.subagents is not None]
    return Usage(
        **sums,
        cost_usd=total_cost(billed) if billed else None,
        subagents=total_usage(below) if below else None,
    )


@dataclass(frozen=True, slots=True)
class ReasoningDelta:
    """A piece of reasoning text."""

    text: str
    type: Literal["reasoning_delta"] = "reasoning_delta"


@dataclass(frozen=True, slots=True)
class TextDelta:
    """A piece of answer text."""

    text: str
    type: Literal["text_delta"] = "text_delta"


@dataclass(frozen=True, slots=True)
class ThoughtCut:
    """`</think>` was forced after `tokens` tokens because the thinking budget was spent; the turn continues."""

    tokens: int
    type: Literal["thought_cut"] = "thought_cut"
    __pydantic_config__ = STRICT


@dataclass(frozen=True, slots=True)
class Retried:
    """The request for a turn failed and is sent again after `wait_s` seconds. Discard what the turn has streamed.

    `attempt` counts the failed requests of the turn from 1.
    """

    attempt: int
    reason: str
    wait_s: float
    type: Literal["retried"] = "retried"
    __pydantic_config__ = STRICT


@dataclass(frozen=True, slots=True)
class CallReady:
    """A call is complete. `index` is its position in the turn.

    A call in a block that opens the answer is ready once its closing tag is sampled. A call in any other block may be a
    quotation, so it is ready only once the turn has ended right after the block.
    """

    index: int
    call: ToolCall
    type: Literal["call_ready"] = "call_ready"
    __pydantic_config__ = STRICT


@dataclass(frozen=True, slots=True)
class CallMalformed:
    """A call that could not be parsed; it gets one error result. `name` is None if it was not generated yet."""

    index: int
    name: str | None
    error: str
    type: Literal["call_malformed"] = "call_malformed"
    __pydantic_config__ = STRICT


@dataclass(frozen=True, slots=True)
class CallsWithdrawn:
    """The model wrote text after the block that opened its answer, so the calls from index `first` on do not count."""

    first: int
    type: Literal["calls_withdrawn"] = "calls_withdrawn"
    __pydantic_config__ = STRICT


@dataclass(frozen=True, slots=True)
class Generated:
    """The last event of every generation: the assistant message, and the reason the generation ended."""

    message: AssistantMessage
    reason: StopReason


ModelEvent = ReasoningDelta | TextDelta | ThoughtCut | Retried | CallReady | CallMalformed | CallsWithdrawn | Generated


class History(Protocol):
    """A conversation so far: a `Trajectory` or a session."""

    @property
    def messages(self) -> Sequence[Message]:
        """All messages in order, including assistant turns; those that compaction has left, if there was one."""
        ...

    @property
    def segments(self) -> Sequence[TokenSegment]:
        """The token ids of the conversation in order; empty if the model is behind an API."""
        ...

    @property
    def turns(self) -> int:
        """Number of turns so far, including those that compaction has left out."""
        ...


class ModelSession(History, Protocol):
    """An append-only conversation, until it is restarted; `messages` and `segments` grow during generation.

    `generate` always leaves the session at a turn boundary. If it is stopped by a limit, left early or cancelled, it
    closes the turn (with forced ids, if the model works on ids), so the conversation can always be continued.
    """

    @property
    def dialect(self) -> Dialect | None:
        """The checkpoint's effort dialect; None if the model is behind an API."""
        ...

    @property
    def grammar_off(self) -> str | None:
        """The reason why calls are not constrained to the tools' schemas; None if they are."""
        ...

    @property
    def usage(self) -> Usage:
        """Token counts of the session so far."""
        ...

    @property
    def context_window(self) -> int | None:
        """Maximum number of tokens of the conversation; None if it is not known."""
        ...

    @property
    def context_tokens(self) -> int:
        """Number of tokens of the next prompt; behind an API, an estimate."""
        ...

    async def restart(self, messages: Sequence[Message]) -> None:
        """Replace the whole conversation between two turns. The number of turns and the usage go on."""
        ...

    async def append(self, messages: Sequence[Message]) -> None:
        """Add user messages and tool results; the model reads them at the next `generate`.

        The first messages of a session may be a whole conversation, with assistant turns.
        """
        ...

    async def prefill(self, messages: Sequence[Message]) -> None:
        """Compute the beginning of the next prompt, which begins with `messages`. They are appended only later.

        It may be cancelled. A session whose model is behind an API does nothing.
        """
        ...

    def generate(self, *, think: bool, limits: GenerationLimits) -> AsyncGenerator[ModelEvent, None]:
        """Generate one turn, with a thinking block if `think` is set. Close the generator to leave early."""
        ...


class Model(Protocol):
    """A source of conversations."""

    @property
    def name(self) -> str:
        """Name shown in reports."""
        ...

    @property
    def sampling(self) -> SamplingParams:
        """The model's recommended sampling parameters; the default of `Agent`."""
        ...

    def open(
        self, *, tools: Sequence[Tool], effort: Effort, sampling: SamplingParams, history: History | None = None
    ) -> AbstractAsyncContextManager[ModelSession]:
        """Open a session; with `history`, one that continues at the end of that conversation."""
        ...
