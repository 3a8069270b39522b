"""The place in a record at which a run goes on without a new message: an interrupted run, or a fork.

A fork goes on at the end of its record, which it shares with another run. An interrupted run goes on after its last
complete turn. A turn that was interrupted is done again, unless a call of a tool that is not read-only had started.
Such a call may have had effects, so the turn is kept, and calls without a recorded result get an error result that says
so. If such a turn had also changed files, and these are lost, the model is told. A turn without calls ends a run, so it
is complete only with the outcome.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import takewhile
from typing import Final

from pydantic_core import to_jsonable_python

from agentkit.errors import ResumeError
from agentkit.events import (
    CallFinished,
    CallStarted,
    LimitName,
    LimitReached,
    MessageAdded,
    Outcome,
    Record,
    TurnFinished,
    TurnStarted,
)
from agentkit.messages import AssistantMessage, Message, SystemMessage, ToolMessage, UserMessage, unanswered
from agentkit.model import CallMalformed, CallReady, CallsWithdrawn, SegmentKind, TokenSegment, Usage, total_usage
from agentkit.trajectory import Header, Trajectory, messages_of
from agentkit_tools import BUILTINS, Tool, ToolCall, ToolResult
from agentkit_tools.model_texts import ERROR

UNKNOWN: Final = (
    "outcome unknown: the run was interrupted while this call was running, and it may have done all, some or none of "
    "its work; check that before making the call again"
)
NOT_STARTED: Final = "not run: the run was interrupted before this call started; make it again if it is still needed"
FILES_RESTORED: Final = (
    "The run was interrupted during the turn above and goes on in a new sandbox, with the files from before that turn: "
    "what its calls changed there is lost."
)
BROKEN_OFF: Final = ("cancelled", "error")
"""Statuses of runs that can be resumed."""

NOTHING: Final = Usage()


@dataclass(frozen=True, slots=True)
class ResumePoint:
    """The place in a record at which a run goes on.

    Attributes:
        length: Number of records to keep.
        news: Messages that the next turn answers, if `results` is empty.
        retried: True if an answer did not fit the output schema, so that the model got its second try.
        shared: Usage of the turns that a fork shares with the run it was forked from.
        spent: Usage of the run as far as it is recorded: without the thinking tokens and the cost of an open turn.
        results: Results of the last turn's calls, in call order; empty if the next step is to ask the model.
        unrecorded: Those of the results that the record does not have.
        unread: Call ids of those results that are not in the conversation yet.
        turn_open: True if the last turn has no `TurnFinished`.
        limit: The limit that had already ended the run, if any.
        is_fork: True if the run begins here, as a fork.
        files_restored: True if the environment lacks the effects of the last turn, and the model must be told.
    """

    length: int
    news: list[Message]
    retried: bool
    shared: Usage
    spent: Usage = NOTHING
    results: list[ToolResult] = field(default_factory=list)
    unrecorded: list[ToolResult] = field(default_factory=list)
    unread: set[str] = field(default_factory=set)
    turn_open: bool = False
    limit: LimitName | None = None
    is_fork: bool = False
    files_restored: bool = False


def fork_point(trajectory: Trajectory) -> ResumePoint:
    """Return the end of the record of a fork, which ends before a turn that is to be generated."""
    records = trajectory.records
    outcomes = [place for place, record in enumerate(records) if isinstance(record, Outcome)]
    run = records[outcomes[-1] + 1 if outcomes else 0 :]
    return ResumePoint(len(records), _news(run), _is_retried(run), _usage(run), is_fork=True)


def interrupted_run(
    trajectory: Trajectory, tools: Mapping[str, Tool], *, world_turns: int | None = None
) -> ResumePoint:
    """Return where the last run of a record goes on.

    Args:
        trajectory: The record.
        tools: The agent's tools by name.
        world_turns: Number of turns of the session whose effects the environment has, 0 for a new one; None for all.
            The run then goes on before the first other turn that may have changed the environment. If that is the last
            one, and has also started a call with effects outside the environment, the run goes on after it.

    Raises:
        ResumeError: the run has ended, has no turn yet or no message to answer, or a call that may have had effects
            outside the environment would be made twice.
    """
    records = trajectory.records
    end = len(records)
    cut_off = records[-1] if records and isinstance(records[-1], Outcome) else None
    if cut_off is not None:
        if cut_off.status not in BROKEN_OFF:
            raise ResumeError(f"the run has ended with status {cut_off.status!r}, so there is nothing to resume")
        end -= 1
    start = 1 + max((place for place in range(end) if isinstance(records[place], Outcome)), default=-1)
    turns = [place for place in range(start, end) if isinstance(records[place], TurnStarted)]
    if not turns:
        raise ResumeError("the record has no turn of the run yet, so there is nothing to resume; start the run again")
    at_turn = _forked_at(trajectory.header)
    paid = _last_usage(records[start:end], at_turn)
    files_restored = False
    if world_turns is not None and (lost := _first_change(records[:end], tools, world_turns)) is not None:
        elsewhere = _effect_elsewhere(records[lost:end], tools)
        files_restored = elsewhere is not None and lost == turns[-1] and _Turn(records[lost:end], tools).goes_on
        if elsewhere is not None and not files_restored:
            raise ResumeError(
                f"the sandbox of the run is gone, and doing its turns again would repeat a call of {elsewhere}, which "
                "may have effects outside it; pass the environment with the files of the run, or start the run again"
            )
        if lost < start:
            raise ResumeError("calls of an earlier run of the session have changed files, and its sandbox is gone")
        if not files_restored:
            turns = [place for place in turns if place < lost]
            end, cut_off = lost, None
    last = turns[-1] if turns else end
    turn = _Turn(records[last:end], tools)
    length = end if turn.is_kept else last
    usage = _last_usage(records[start:length], at_turn)
    if turn.is_kept and turn.finished is None:
        usage = total_usage([usage, turn.usage]) if cut_off is None else cut_off.usage
    if paid.cost_usd is not None and (usage.cost_usd is not None or not usage.turns):  # turns done again cost twice
        usage = replace(usage, cost_usd=max(paid.cost_usd, usage.cost_usd or 0.0))
    results = turn.results if turn.is_kept and not turn.answered else []
    unread = {result.call_id for result in results} - turn.read
    _check_asks(messages_of(records[:length]), has_results=bool(unread))
    return ResumePoint(
        length,
        _news(records[start:length]),
        _is_retried(records[start:length]),
        shared=_usage(
            [each for each in records[start:length] if isinstance(each, TurnFinished) and each.turn < at_turn]
        ),
        spent=usage,
        results=results,
        unrecorded=[result for result in results if result.call_id not in turn.recorded],
        unread=unread,
        turn_open=bool(results) and turn.finished is None,
        limit=turn.limit if results else None,
        files_restored=files_restored,
    )


def _check_asks(messages: Sequence[Message], *, has_results: bool) -> None:
    """Raise ResumeError if the next turn would answer nothing: neither results of calls nor a message."""
    waiting = unanswered(messages)
    if not has_results and (not waiting or isinstance(waiting[-1], SystemMessage)):
        raise ResumeError("the record has no message that the next turn would answer; start the run again")


def _news(run: Sequence[Record]) -> list[Message]:
    """Return the messages that the next turn answers."""
    return unanswered([each.message for each in run if isinstance(each, MessageAdded)])


def _is_retried(run: Sequence[Record]) -> bool:
    """Return True if a user message follows a turn of the run."""
    turns = [place for place, record in enumerate(run) if isinstance(record, TurnStarted)]
    later = run[turns[0] :] if turns else ()
    return any(
        isinstance(each, MessageAdded) and each.message.role == "user" and not _tells_of_files(each) for each in later
    )


def _usage(run: Sequence[Record]) -> Usage:
    """Return the usage of the turns of a run. A fork begins with turns of other runs, and counts its own from 1."""
    parts: list[Usage] = []
    for record in run:
        if isinstance(record, TurnFinished):
            if parts and record.usage.turns > parts[-1].turns:
                parts.pop()
            parts.append(record.usage)
    return total_usage(parts)


def _last_usage(run: Sequence[Record], at_turn: int) -> Usage:
    """Return the usage after the last turn from `at_turn` on."""
    usages = [each.usage for each in run if isinstance(each, TurnFinished) and each.turn >= at_turn]
    return usages[-1] if usages else NOTHING


def _forked_at(header: Header) -> int:
    """Return the first turn that a fork does not share with the run it was forked from; 0 for other runs."""
    at_turn = header.metadata.get("at_turn", 0) if "forked_from" in header.metadata else 0
    return at_turn if isinstance(at_turn, int) else 0


def _first_change(records: Sequence[Record], tools: Mapping[str, Tool], world_turns: int) -> int | None:
    """Return the index of the `TurnStarted` of the first turn from `world_turns` on that may have changed the
    environment; None if there is none. A turn whose changes are known to be lost has changed nothing."""
    begun, first = -1, None
    for place, record in enumerate(records):
        if isinstance(record, TurnStarted):
            begun = place if record.turn >= world_turns else -1
        elif first is None and begun >= 0 and _changes_files(record, tools):
            first = begun
        elif first == begun and _tells_of_files(record):
            first = None
    return first


def _tells_of_files(record: Record) -> bool:
    return isinstance(record, MessageAdded) and record.message == UserMessage(FILES_RESTORED)


def last_turn_changes_files(records: Sequence[Record], tools: Mapping[str, Tool]) -> bool:
    """Return True if a call of the last turn may have changed the environment."""
    turn = takewhile(lambda record: not isinstance(record, TurnStarted), reversed(records))
    return any(_changes_files(record, tools) for record in turn)


def _changes_files(record: Record, tools: Mapping[str, Tool]) -> bool:
    if not isinstance(record, CallStarted):
        return False
    tool = tools.get(record.call.name)
    return tool is None or (tool.needs_environment and not tool.read_only)


def _effect_elsewhere(records: Sequence[Record], tools: Mapping[str, Tool]) -> str | None:
    """Return the name of the first tool that was called and may have effects outside the environment."""
    for record in records:
        tool = tools.get(record.call.name) if isinstance(record, CallStarted) else None
        if tool is None or tool is BUILTINS["submit"] or tool.needs_environment or tool.read_only:
            continue
        return tool.name
    return None


def has_changes_of_all(trajectory: Trajectory, tools: Mapping[str, Tool], world_turns: int) -> bool:
    """Return True if no turn but the first `world_turns` of the session may have changed the environment."""
    return _first_change(trajectory.records, tools, world_turns) is None


def check_settings(was: Header, now: Header) -> None:
    """Compare the settings of a record with those of the agent that resumes it.

    Raises:
        ResumeError: one of them differs; the message names it.
    """
    for name in ("model", "dialect", "effort", "thinking", "sampling", "tools"):
        old, new = (to_jsonable_python(getattr(header, name)) for header in (was, now))
        if old == new:
            continue
        if name == "sampling":
            name, old, new = next((key, old[key], new[key]) for key in old if old[key] != new[key])
        if name == "tools":
            old, new = ([tool["function"]["name"] for tool in tools] for tools in (old, new))
            if old == new:
                raise ResumeError(
                    "the run was started with other definitions of its tools; resume it with the same tools"
                )
        raise ResumeError(f"the run was started with {name} {old!r}, given {new!r}; resume it with the same settings")


class _Turn:
    """The records of the last turn of a run."""

    def __init__(self, records: Sequence[Record], tools: Mapping[str, Tool]) -> None:
        self.message: AssistantMessage | None = None
        self.finished: TurnFinished | None = None
        self.limit: LimitName | None = None
        self.answered = False  # a user message follows
        self.read: set[str] = set()  # ids of the calls whose results are in the conversation
        tokens = Counter[SegmentKind]()
        started: set[str] = set()
        has_effects = False
        calls: dict[int, ToolCall] = {}
        results: dict[str, ToolResult] = {}
        for record in records:
            match record:
                case TurnStarted():  # the first record
                    number = record.turn
                case MessageAdded(AssistantMessage() as message):
                    self.message = message
                case MessageAdded(ToolMessage() as message):
                    self.read.add(message.call_id)
                case MessageAdded(UserMessage()):
                    self.answered = True
                case TokenSegment():
                    tokens[record.kind] += len(record.ids)
                case CallReady():
                    calls[record.index] = record.call
                case CallMalformed():
                    calls[record.index] = ToolCall(f"call_{number}_{record.index}", record.name or "", "")
                case CallsWithdrawn():
                    calls.clear()
                    started.clear()
                case CallStarted():
                    started.add(record.call.id)
                    tool = tools.get(record.call.name)
                    has_effects = has_effects or tool is None or not tool.read_only
                case CallFinished():
                    results[record.result.call_id] = record.result
                case TurnFinished():
                    self.finished = record
                case LimitReached():
                    self.limit = record.limit
        self.recorded = set(results)
        self.results = [results.get(call.id) or _lost(call, started) for _, call in sorted(calls.items())]
        self.is_kept = self.message is not None and (
            self.answered or has_effects or (self.finished is not None and bool(self.results))
        )
        self.goes_on = self.is_kept and not any(result.final for result in self.results)
        self.usage = Usage(
            prompt_tokens=tokens["prompt"],
            sampled_tokens=tokens["sampled"],
            forced_tokens=tokens["forced"],
            turns=1,
            calls=len(self.results),
        )


def _lost(call: ToolCall, started: Collection[str]) -> ToolResult:
    reason = UNKNOWN if call.id in started else NOT_STARTED
    return ToolResult(call.id, call.name, ERROR.format(message=reason), is_error=True)
