"""What a caller sees while a run goes on. All but the deltas and `RunFinished` are also lines of the trajectory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from agentkit.messages import STRICT, Message
from agentkit.model import (
    CallMalformed,
    CallReady,
    CallsWithdrawn,
    ReasoningDelta,
    TextDelta,
    ThoughtCut,
    TokenSegment,
    Usage,
)
from agentkit_tools import ToolCall, ToolResult

if TYPE_CHECKING:
    from agentkit.result import RunResult

LimitName = Literal[
    "max_turns", "max_tokens", "max_tokens_per_turn", "wall_time_s", "tool_time_s", "context", "repetition"
]
"""A limit that ends a run: a field of `Limits` ("repetition" is `max_repeated_tokens`), or the context window."""

Status = Literal["submitted", "answered", "no_answer", "invalid_output", "limit", "cancelled", "error"]
"""How a run ended: by `submit`, by a turn with text and without calls, by a turn with neither (it ended inside its
thought, or said nothing), by an answer that does not fit its schema, by a limit, from outside, or by the machine's
failure."""


@dataclass(frozen=True, slots=True)
class TurnStarted:
    """The model is asked; `think` says whether the turn opens with a thought. Turns count from 0 over the session."""

    turn: int
    think: bool
    type: Literal["turn_started"] = "turn_started"
    __pydantic_config__ = STRICT


@dataclass(frozen=True, slots=True)
class MessageAdded:
    """A message entered the conversation."""

    message: Message
    type: Literal["message"] = "message"
    __pydantic_config__ = STRICT


@dataclass(frozen=True, slots=True)
class CallStarted:
    """A call began to run; `early` when the model was still generating."""

    call: ToolCall
    early: bool = False
    type: Literal["call_started"] = "call_started"
    __pydantic_config__ = STRICT


@dataclass(frozen=True, slots=True)
class CallFinished:
    """A call has its result; these come in the order in which the calls finish."""

    result: ToolResult
    type: Literal["call_finished"] = "call_finished"
    __pydantic_config__ = STRICT


@dataclass(frozen=True, slots=True)
class TurnFinished:
    """The turn is over, its calls included; `usage` is the run's so far."""

    turn: int
    usage: Usage
    type: Literal["turn_finished"] = "turn_finished"
    __pydantic_config__ = STRICT


@dataclass(frozen=True, slots=True)
class LimitReached:
    """A limit ends the run."""

    limit: LimitName
    type: Literal["limit_reached"] = "limit_reached"
    __pydantic_config__ = STRICT


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a run ended. `answer` is what `submit` was given, else the final text.

    `error` is the machine's failure, or why there is no answer or an invalid one, which then is not in `answer`.
    """

    status: Status
    answer: str | None
    usage: Usage
    limit: LimitName | None = None
    error: str | None = None
    type: Literal["outcome"] = "outcome"
    __pydantic_config__ = STRICT


@dataclass(frozen=True, slots=True)
class RunFinished:
    """The last event of a run that was not cancelled and did not fail."""

    result: RunResult
    type: Literal["run_finished"] = "run_finished"


Record = (
    TurnStarted
    | TokenSegment
    | MessageAdded
    | ThoughtCut
    | CallReady
    | CallMalformed
    | CallsWithdrawn
    | CallStarted
    | CallFinished
    | TurnFinished
    | LimitReached
    | Outcome
)
"""What a trajectory is made of."""

Event = Record | ReasoningDelta | TextDelta | RunFinished
