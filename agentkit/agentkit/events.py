"""Events of a run. All are also records of the trajectory, except the deltas, `CallOutput`, `SubagentEvent` and
`RunFinished`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import FailFast

from agentkit.messages import STRICT, Message
from agentkit.model import (
    CallMalformed,
    CallReady,
    CallsWithdrawn,
    ReasoningDelta,
    Retried,
    TextDelta,
    ThoughtCut,
    TokenSegment,
    Usage,
)
from agentkit_environments import OutputStream
from agentkit_tools import ToolCall, ToolResult

if TYPE_CHECKING:
    from agentkit.result import RunResult

LimitName = Literal[
    "max_turns",
    "max_tokens",
    "max_tokens_per_turn",
    "max_cost_usd",
    "wall_time_s",
    "tool_time_s",
    "context",
    "repetition",
]
"""A limit that ends a run: a field of `Limits` ("repetition" is `max_repeated_tokens`), a `CostBudget`
("max_cost_usd"), or the context window."""

Status = Literal["submitted", "answered", "no_answer", "invalid_output", "limit", "cancelled", "error"]
"""The reason a run ended. Described at `RunResult.status`, except for two that have no result: "cancelled" from
outside, and "error" for an infrastructure failure."""


@dataclass(frozen=True, slots=True)
class TurnStarted:
    """A turn begins, with a thinking block if `think` is set. Turns count from 0 over the session."""

    turn: int
    think: bool
    type: Literal["turn_started"] = "turn_started"
    __pydantic_config__ = STRICT


@dataclass(frozen=True, slots=True)
class MessageAdded:
    """A message was added to the conversation."""

    message: Message
    type: Literal["message"] = "message"
    __pydantic_config__ = STRICT


@dataclass(frozen=True, slots=True)
class CallDecided:
    """The agent's approvals decided on a call of the tool `name`. `asked` means that a human was asked.

    `policy` is the name of the policy that decided; None if no policy did, which approves the call. `arguments` is the
    JSON text that the model wrote. `modified` is the JSON text of the changed arguments that the call runs with, if
    any. `reason` is the reason of a refusal.
    """

    call_id: str
    name: str
    decision: Literal["approved", "modified", "refused"]
    policy: str | None
    arguments: str
    modified: str | None = None
    reason: str | None = None
    asked: bool = False
    type: Literal["call_decided"] = "call_decided"
    __pydantic_config__ = STRICT


@dataclass(frozen=True, slots=True)
class CallStarted:
    """A call started to run; `early` means while the model was still generating."""

    call: ToolCall
    early: bool = False
    type: Literal["call_started"] = "call_started"
    __pydantic_config__ = STRICT


@dataclass(frozen=True, slots=True)
class CallOutput:
    """New output of a running call: what its command has written, or what a tool has passed to
    `ToolContext.emit_output`.

    All texts of a command's stream together are what is kept of it: at most 1 MiB, cut in the middle if it was longer.
    The result that the model reads may have less.
    """

    call_id: str
    stream: OutputStream
    text: str
    type: Literal["call_output"] = "call_output"


@dataclass(frozen=True, slots=True)
class CallFinished:
    """A call has its result. These events are in the order in which the calls finish."""

    result: ToolResult
    type: Literal["call_finished"] = "call_finished"
    __pydantic_config__ = STRICT


@dataclass(frozen=True, slots=True)
class SubagentStarted:
    """A call of the tool `name` started a sub-agent. `trajectory_id` is in the header of the sub-agent's record.

    `file` is the name of the record, in the folder of this one; None if the record is only in memory.
    """

    call_id: str
    name: str
    trajectory_id: str
    file: str | None = None
    type: Literal["subagent_started"] = "subagent_started"
    __pydantic_config__ = STRICT


@dataclass(frozen=True, slots=True)
class SubagentFinished:
    """The sub-agent that a call ran has ended."""

    call_id: str
    outcome: Outcome
    type: Literal["subagent_finished"] = "subagent_finished"
    __pydantic_config__ = STRICT


@dataclass(frozen=True, slots=True)
class SubagentEvent:
    """An event of a sub-agent. It is a record of the sub-agent's trajectory, not of this one."""

    call_id: str
    event: Event
    type: Literal["subagent_event"] = "subagent_event"


@dataclass(frozen=True, slots=True)
class TurnFinished:
    """A turn and its calls are finished; `usage` is the run's usage so far."""

    turn: int
    usage: Usage
    type: Literal["turn_finished"] = "turn_finished"
    __pydantic_config__ = STRICT


@dataclass(frozen=True, slots=True)
class Compacted:
    """The conversation was compacted, between two turns: from here on it has only `messages`.

    What was replaced stays in the records before this one. `cleared` has the ids of the calls whose results were
    cleared, and `turns_left_out` is the number of turns that were left out. `turns` is the number of turns of the
    session so far. `tokens_before` and `tokens_after` count the next prompt; behind an API, they are estimates.
    """

    messages: Annotated[tuple[Message, ...], FailFast()]
    turns: int
    cleared: Annotated[tuple[str, ...], FailFast()]
    turns_left_out: int
    tokens_before: int
    tokens_after: int
    type: Literal["compacted"] = "compacted"
    __pydantic_config__ = STRICT


@dataclass(frozen=True, slots=True)
class LimitReached:
    """A limit ends the run."""

    limit: LimitName
    type: Literal["limit_reached"] = "limit_reached"
    __pydantic_config__ = STRICT


@dataclass(frozen=True, slots=True)
class Outcome:
    """The outcome of a run. `answer` is the argument of `submit`, or else the final text.

    `error` is the infrastructure failure, or the reason why there is no answer or an invalid one. An invalid answer is
    not in `answer`.
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
    """The last event of a run that was neither cancelled nor failed."""

    result: RunResult[Any]
    type: Literal["run_finished"] = "run_finished"


Record = (
    TurnStarted
    | TokenSegment
    | MessageAdded
    | ThoughtCut
    | Retried
    | CallReady
    | CallMalformed
    | CallsWithdrawn
    | CallDecided
    | CallStarted
    | CallFinished
    | SubagentStarted
    | SubagentFinished
    | TurnFinished
    | Compacted
    | LimitReached
    | Outcome
)
"""A record of a trajectory."""

Event = Record | ReasoningDelta | TextDelta | CallOutput | SubagentEvent | RunFinished
