"""Replay a record: force its ids through the model, and compare everything that follows from them.

Prompts are encoded again from the recorded messages, turns are parsed again from their ids, and the log-probability of
each sampled id is computed again. Tool results are taken from the record; no tool runs. A replay therefore shows
whether a record fits a model, a version of the engine or of the chat encoding, and whether it was changed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile, zip_longest
from pathlib import Path
from typing import Any, Final, Literal

from pydantic_core import to_jsonable_python

from agentkit.checks import check_type
from agentkit.errors import ReplayError
from agentkit.events import CallFinished, Compacted, MessageAdded, Outcome, TurnStarted
from agentkit.messages import AssistantMessage, Message, ToolMessage
from agentkit.model import CallMalformed, CallReady, CallsWithdrawn, TokenSegment
from agentkit.models.embedded import EmbeddedModel
from agentkit.models.tokens import model_event, parsed_message, prompt_ids
from agentkit.trajectory import Trajectory
from agentkit_engine import chat
from agentkit_engine.chat import EncodeError, StreamParser
from agentkit_tools import ToolResult

TOLERANCE: Final = 1e-3
"""Largest difference of log-probabilities that counts as equal. The same machine and options give the same bits."""
SHOWN: Final = 40
"""Maximum number of characters of a text that a difference shows."""


@dataclass(frozen=True, slots=True)
class Difference:
    """The first place at which a replay differs from the record.

    Attributes:
        kind: "token", an id of a prompt; "logprob", the log-probability of a sampled id; or "byte", a byte of a text.
        turn: The number of the turn, from 0.
        position: The index of the token in the conversation at that time, or of the byte in the text in UTF-8.
        recorded: What the record has.
        replayed: What the replay has instead.
        what: A description of the place.
    """

    kind: Literal["token", "logprob", "byte"]
    turn: int
    position: int
    recorded: str
    replayed: str
    what: str

    def __str__(self) -> str:
        place = f"turn {self.turn + 1}, {self.kind if self.kind == 'byte' else 'token'} {self.position}"
        return f"{place} ({self.what}): recorded {self.recorded}, replayed {self.replayed}"


@dataclass(frozen=True, slots=True)
class Replay:
    """The result of a replay. The counts end at the difference, if there is one.

    Attributes:
        turns, tokens, sampled: Numbers of turns and ids that were compared, and of those ids that were sampled.
        max_logprob_error: The largest difference between a recorded and a replayed log-probability.
        difference: The first difference; None if the record replays.
    """

    turns: int
    tokens: int
    sampled: int
    max_logprob_error: float
    difference: Difference | None

    @property
    def same(self) -> bool:
        """True if nothing differs."""
        return self.difference is None


def replay(
    trajectory: Trajectory | str | Path, model: EmbeddedModel | str | Path, *, tolerance: float = TOLERANCE
) -> Replay:
    """Replay a record on a model in this process, and stop at the first difference.

    The whole record is one prefill for the model, which must not be running (`async with`) at the same time.

    Args:
        trajectory: The record, or its file.
        model: The model, its name or its folder.
        tolerance: Largest difference of two log-probabilities that count as equal.

    Raises:
        TypeError: `model` is not a model in this process.
        ReplayError: the record has no ids of a model in this process, or messages that cannot be encoded.
        TrajectoryError: see `Trajectory.load`.
        EngineError: see `EmbeddedModel` and `Engine.logprobs`.
    """
    check_type("replay(model)", model, EmbeddedModel | str | Path, "an EmbeddedModel, a model's name or a folder")
    if not isinstance(trajectory, Trajectory):
        trajectory = Trajectory.load(trajectory)
    check_replayable(trajectory)
    return _Replayer(trajectory, model if isinstance(model, EmbeddedModel) else EmbeddedModel(model), tolerance).run()


def check_replayable(trajectory: Trajectory) -> None:
    """Raise ReplayError if the record is of a model behind an API."""
    if trajectory.header.dialect is None:
        raise ReplayError(
            f"the record is of {trajectory.header.model}, a model behind an API, whose ids cannot be computed again; "
            "give the record of a model in this process"
        )


class _Differs(Exception):
    def __init__(self, difference: Difference) -> None:
        self.difference = difference


class _Replayer:
    """One pass over the records of a trajectory."""

    def __init__(self, trajectory: Trajectory, model: EmbeddedModel, tolerance: float) -> None:
        self.trajectory = trajectory
        self.header = trajectory.header
        self.engine = model.engine
        self.tokenizer = model.tokenizer
        self.vocab_size = min(self.engine.spec.vocab_size, self.tokenizer.vocab_size)
        self.tolerance = tolerance
        self.tools = list(self.header.tools)
        self.turn = 0
        self.history = 0  # turns of a message history
        self.position = 0  # number of ids compared since the conversation began or was compacted
        self.compared = 0  # number of ids compared before that
        self.sampled = 0
        self.error = 0.0
        self.think = False
        self.unread: list[Message] = []
        self.said: list[TokenSegment] = []  # of the turn in progress
        self.events: list[CallReady | CallMalformed | CallsWithdrawn] = []  # of the turn in progress
        self.results: dict[str, ToolResult] = {}  # of the last turn's calls
        self.last: Message | None = None
        self.parts = _parts(trajectory)
        self._logprobs: list[float] | None = None

    def run(self) -> Replay:
        difference = None
        try:
            for record in self.trajectory.records:
                self._compare(record)
        except _Differs as found:
            difference = found.difference
        return Replay(self.turn, self.compared + self.position, self.sampled, self.error, difference)

    def _compare(self, record: object) -> None:
        match record:
            case TurnStarted():
                self.think = record.think
                self.events, self.results = [], {}
            case TokenSegment(kind="prompt"):
                self._prompt(record)
            case TokenSegment():
                self._generated(record)
            case CallReady() | CallMalformed() | CallsWithdrawn():
                self.events.append(record)
            case CallFinished():
                self.results[record.result.call_id] = record.result
            case MessageAdded(AssistantMessage() as message) if self.said:
                self._turn(message)
            case MessageAdded(message):
                if self.turn and isinstance(message, ToolMessage):
                    self._result(message)
                self.history += isinstance(message, AssistantMessage)
                self.unread.append(message)
                self.last = message
            case Compacted():
                self._compacted(record)
            case Outcome():
                self._outcome(record)

    def _prompt(self, segment: TokenSegment) -> None:
        assert self.header.dialect is not None
        try:
            ids = prompt_ids(
                self.unread,
                first=not self.position,
                think=self.think,
                tools=self.tools,
                effort=self.header.effort,
                dialect=self.header.dialect,
                tokenizer=self.tokenizer,
            )
        except EncodeError as exc:
            raise ReplayError(f"the messages before turn {self.turn + 1} of the record are no prompt: {exc}") from exc
        self.unread.clear()
        for was, now in zip_longest(segment.ids, ids):
            if was != now:
                raise self._differs("token", self.position, self._shown(was), self._shown(now), "in a prompt")
            self.position += 1

    def _generated(self, segment: TokenSegment) -> None:
        for index, token_id in enumerate(segment.ids):
            if token_id >= self.vocab_size:
                size = f"an id below {self.vocab_size}"
                raise self._differs("token", self.position, str(token_id), size, "not in the vocabulary")
            if segment.logprobs:
                self._logprob(token_id, segment.logprobs[index])
            self.position += 1
            self.sampled += segment.kind == "sampled"
        self.said.append(segment)

    def _logprob(self, token_id: int, was: float) -> None:
        if self._logprobs is None:
            self._logprobs = [0.0, *self.engine.logprobs(self._ids_of_the_vocabulary()).tolist()]
        now = self._logprobs[self.position]
        error = abs(was - now)
        if not error <= self.tolerance:  # also if one is NaN
            what = f"log-probability of the sampled id {self._shown(token_id)}"
            raise self._differs("logprob", self.position, f"{was:.6g}", f"{now:.6g}", what)
        self.error = max(self.error, error)

    def _ids_of_the_vocabulary(self) -> list[int]:
        """Return the ids of the conversation up to the first that the model does not have."""
        return list(takewhile(lambda token_id: token_id < self.vocab_size, self.parts[0]))

    def _compacted(self, compacted: Compacted) -> None:
        """Go on with the conversation that compaction has left, whose ids begin anew."""
        self.parts.pop(0)
        self.unread[:] = compacted.messages
        self.compared, self.position, self._logprobs = self.compared + self.position, 0, None

    def _turn(self, message: AssistantMessage) -> None:
        """Compare a turn's message and calls with what its ids say."""
        count = len(self.events)  # fewer than the ids have, if the turn was stopped
        parses = [(said, events[:count]) for said, events in self._parses()]
        if (message, self.events) not in parses:
            said, events = parses[0]
            self._same_text("the message", message, said)
            self._same_text("the calls", self.events, events)
        self.said.clear()
        self.last = message
        self.turn += 1

    def _parses(self) -> Iterator[tuple[AssistantMessage, list[Any]]]:
        """Yield what the turn's ids say: if the model ended the turn, if it was stopped, and if the caller left.

        A turn that was stopped ends with forced ids that close it. But a grammar may also have forced the last id.
        """
        ids = [token_id for segment in self.said for token_id in segment.ids]
        endings = [(len(ids), False)]
        if self.said[-1].kind == "forced":
            closed_thought = (self.tokenizer.control_id("</think>"), self.tokenizer.eos_id)
            endings.insert(0, (len(ids) - (2 if self.said[-1].ids == closed_thought else 1), True))
        for end, stopped in endings:
            parser = StreamParser(
                self.think,
                tokenizer=self.tokenizer,
                turn=self.history + self.turn,
                tools=self.tools,
                calls=bool(self.tools),
                ends_after_block=self.header.grammar_off is None,
            )
            events = parser.feed(ids[:end])
            last = parser.finish(stopped=stopped)
            yield parsed_message(parser.message, self.think), _calls([*events, *last])
            if unheard := {event.id for event in last if isinstance(event, chat.CallReady)}:
                yield parsed_message(parser.message, self.think, unheard=unheard), _calls(events)

    def _result(self, message: ToolMessage) -> None:
        result = self.results.get(message.call_id)
        expected = None if result is None else ToolMessage.of(result)
        if message != expected:
            self._same_text(f"the result of {message.call_id}", message, expected)

    def _outcome(self, outcome: Outcome) -> None:
        if outcome.answer is None or self.header.sampling.output_schema is not None:
            return
        final = next((result.content for result in self.results.values() if result.final), None)
        said = final if outcome.status == "submitted" else self.last.content if self.last is not None else None
        if outcome.answer != said:
            self._same_text("the answer", outcome.answer, said)

    def _same_text(self, what: str, was: object, now: object) -> None:
        """Raise a difference at the first byte at which the texts in two values differ, if they do."""
        before, after = dict(_texts(was)), dict(_texts(now))
        for place in before | after:
            old, new = before.get(place, b""), after.get(place, b"")
            if old != new:
                changed = (index for index, (a, b) in enumerate(zip(old, new, strict=False)) if a != b)
                at = next(changed, min(len(old), len(new)))
                start = max(0, at - SHOWN // 2)
                was_there, is_there = (
                    repr(text[start : start + SHOWN].decode("utf-8", "replace")) for text in (old, new)
                )
                raise self._differs("byte", at, was_there, is_there, f"{what}{place}")

    def _differs(
        self, kind: Literal["token", "logprob", "byte"], position: int, was: str, now: str, what: str
    ) -> _Differs:
        return _Differs(Difference(kind, self.turn, position, was, now, what))

    def _shown(self, token_id: int | None) -> str:
        if token_id is None:
            return "no token"
        text = self.tokenizer.decode([token_id]) if token_id < self.vocab_size else "?"
        return f"{token_id} {text!r:.{SHOWN}}"


def _parts(trajectory: Trajectory) -> list[list[int]]:
    """Return the ids of the conversation up to each compaction, and those after the last."""
    parts: list[list[int]] = [[]]
    for record in trajectory.records:
        if isinstance(record, Compacted):
            parts.append([])
        elif isinstance(record, TokenSegment):
            parts[-1] += record.ids
    return parts


def _calls(events: Sequence[chat.ParseEvent]) -> list[Any]:
    shown = map(model_event, events)
    return [event for event in shown if isinstance(event, CallReady | CallMalformed | CallsWithdrawn)]


def _texts(value: object, place: str = "") -> Iterator[tuple[str, bytes]]:
    """Yield the place and the bytes of each text, number and so on inside a value."""
    value = to_jsonable_python(value) if not place else value
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _texts(inner, f"{place}.{key}")
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from _texts(inner, f"{place}[{index}]")
    else:
        yield place, str(value).encode("utf-8", "surrogatepass")
