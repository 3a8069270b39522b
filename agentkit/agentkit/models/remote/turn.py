"""Convert the deltas of one streamed turn to events and, at its end, to calls and a message."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from agentkit.messages import AssistantMessage
from agentkit.model import CallMalformed, CallReady, ReasoningDelta, TextDelta
from agentkit.models.remote import dsml
from agentkit.models.remote.names import ToolNames
from agentkit.models.remote.provider import CallChunk, Delta, ReasoningChunk, StreamFinished, TextChunk
from agentkit.repetition import IN_CALLS, is_due, repeats
from agentkit_tools import ToolCall


@dataclass(slots=True)
class _Call:
    id: str = ""
    name: str = ""
    arguments: list[str] = field(default_factory=list)


class RemoteTurn:
    """Collects the deltas of one turn.

    Attributes:
        finished: The last item of the stream; None before the end.
        chunks: Number of chunks of reasoning, text and arguments so far. Servers send about one token in each.
    """

    def __init__(
        self, number: int, *, think: bool, tools: Sequence[Mapping[str, Any]], names: ToolNames, taken_ids: set[str]
    ) -> None:
        self.finished: StreamFinished | None = None
        self.chunks = 0
        self._number = number
        self._think = think
        self._tools = tools
        self._names = names
        self._taken_ids = taken_ids
        self._reasoning: list[str] = []
        self._text = ""
        self._shown = 0  # characters of the text that were passed on; the rest may be calls in DSML
        self._calls: dict[int, _Call] = {}
        self._numbers: dict[str, int] = {}  # a number for each distinct chunk, in place of token ids
        self._texts: list[str] = []
        self._said: list[int] = []

    def add(self, delta: Delta) -> Iterator[ReasoningDelta | TextDelta]:
        """Take the next delta, and yield the events to show."""
        match delta:
            case ReasoningChunk(text):
                self._count(text)
                self._reasoning.append(text)
                yield ReasoningDelta(text)
            case TextChunk(text):
                self._count(text)
                self._text += text
                yield from self._show(dsml.shown_length(self._text, self._shown))
            case CallChunk():
                call = self._calls.setdefault(delta.index, _Call())
                call.id = delta.id or call.id
                call.name = delta.name or call.name
                if delta.arguments:
                    self._count(delta.arguments)
                    call.arguments.append(delta.arguments)
            case StreamFinished():
                self.finished = delta

    def repeats(self, bound: int | None) -> bool:
        """Return whether the last `bound` chunks only repeat themselves."""
        if bound is None or not is_due(len(self._said), bound):
            return False
        return repeats(
            self._said, bound * IN_CALLS if self._calls else bound, lambda number: self._texts[number].encode()
        )

    def end(self) -> tuple[AssistantMessage, list[TextDelta | CallReady | CallMalformed]]:
        """Return the message of the complete turn, and the events that were held back until its end."""
        assert self.finished is not None
        calls: list[CallReady | CallMalformed] = []
        data = self.finished.provider_data
        if self.finished.end != "refused":
            calls = [
                CallReady(position, self._call(position, self._calls[index]))
                for position, index in enumerate(sorted(self._calls))
            ]
            if not calls and self._shown < len(self._text):
                before, calls = dsml.split_calls(self._text, turn=self._number, tools=self._tools)
                if any(isinstance(call, CallReady) for call in calls):
                    self._text, data = before, None
        held = list(self._show(len(self._text)))
        ready = tuple(event.call for event in calls if isinstance(event, CallReady))
        self._taken_ids.update(call.id for call in ready)
        return AssistantMessage(_whole(self._text), self._thought, ready, data), [*held, *calls]

    def stopped(self) -> AssistantMessage | None:
        """Return the message of a turn that was stopped early, without its calls; None if the turn is empty."""
        if not (self._text or self._reasoning):
            return None
        return AssistantMessage(_whole(self._text), self._thought)

    @property
    def _thought(self) -> str | None:
        return _whole("".join(self._reasoning)) if self._think or self._reasoning else None

    def _call(self, position: int, call: _Call) -> ToolCall:
        call_id = call.id if call.id and call.id not in self._taken_ids else f"call_{self._number}_{position}"
        self._taken_ids.add(call_id)
        return ToolCall(call_id, self._names.ours(call.name), _whole("".join(call.arguments)) or "{}")

    def _show(self, end: int) -> Iterator[TextDelta]:
        if end > self._shown:
            start, self._shown = self._shown, end
            yield TextDelta(self._text[start:end])

    def _count(self, text: str) -> None:
        self.chunks += 1
        if text not in self._numbers:
            self._numbers[text] = len(self._texts)
            self._texts.append(text)
        self._said.append(self._numbers[text])


def _whole(text: str) -> str:
    """Join the two UTF-16 halves of characters that arrived in separate chunks; a half alone becomes U+FFFD."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text
