"""Compaction: make room in a full context window, at a turn boundary, without asking the model.

First the results of all but the latest calls are cleared. Each is replaced by a notice with the file that has its text,
so that the model can read it again. If that is not enough, the oldest turns are left out. The system prompt, the user's
messages and the latest turns always stay as they are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

from agentkit.checks import check_positive
from agentkit.errors import ModelOptionError
from agentkit.events import Compacted
from agentkit.messages import AssistantMessage, Message, SystemMessage, ToolMessage, UserMessage
from agentkit_tools.output import spill

if TYPE_CHECKING:
    from agentkit.run import Run

NEARLY_FULL: Final = 0.8
"""The part of the context window at which it is compacted by default."""
ENOUGH: Final = 0.75
"""The part of the limit below which clearing results must bring the conversation; else turns are left out, too."""
MAX_MESSAGES: Final = 1000
"""Messages that clearing results may leave; else turns are left out, too. `Compacted` is one line of the record."""
MIN_CLEARED: Final = 200
"""Characters of the shortest result that is cleared; the notice in its place takes up to about 80."""
CLEARED: Final = "[This result was cleared to make room{where}.]"
LEFT_OUT: Final = "[Earlier turns were left out here to make room.]"


@dataclass(frozen=True, slots=True)
class Compaction:
    """When a conversation is compacted, and what of it stays."""

    at_tokens: int | None = None
    """Tokens of the next prompt from which on it is compacted. Default: 80 % of the model's context window. It must be
    given for a model whose window is not known, which is one behind an API without `context_tokens`."""
    keep_turns: int = 3
    """The latest turns, which stay as they are."""

    def limit(self, window: int | None) -> int:
        """Return the number of tokens from which on a conversation with this context window is compacted.

        Raises:
            ModelOptionError: neither `at_tokens` nor the window is known.
        """
        bounds = [self.at_tokens, None if window is None else int(NEARLY_FULL * window)]
        if not (known := [bound for bound in bounds if bound is not None]):
            raise ModelOptionError(
                "the model's context window is not known, so there is no telling when it is nearly full; give "
                "Compaction(at_tokens=...), or RemoteModel(context_tokens=...)"
            )
        return min(known)

    def __post_init__(self) -> None:
        check_positive("Compaction(at_tokens=...)", self.at_tokens, whole=True, none=True)
        check_positive("Compaction(keep_turns=...)", self.keep_turns, whole=True)


async def make_room(run: Run, compaction: Compaction) -> None:
    """Compact the conversation of a run if its next prompt nearly fills the context, and record that.

    Raises:
        ModelOptionError: see `Compaction.limit`.
        SandboxLostError: the sandbox is lost.
    """
    session, keep_turns = run.session, compaction.keep_turns
    limit, before = compaction.limit(session.context_window), session.context_tokens
    if before < limit:
        return
    files = {
        result.call_id: await spill(result.content, run.context) for result in old_results(session.messages, keep_turns)
    }
    if files:
        await session.restart(with_results_cleared(session.messages, files))
    left_out = 0
    if session.context_tokens >= ENOUGH * limit or len(session.messages) > MAX_MESSAGES:
        shorter = with_turns_left_out(session.messages, keep_turns)
        left_out = _count(session.messages) - _count(shorter)
        if left_out:
            await session.restart(shorter)
    if files or left_out:
        run.note_compaction(
            Compacted(tuple(session.messages), session.turns, tuple(files), left_out, before, session.context_tokens)
        )


def old_results(messages: Sequence[Message], keep_turns: int) -> list[ToolMessage]:
    """Return the results of all but the latest turns, without short ones."""
    results = [message for message in messages[: _latest(messages, keep_turns)] if isinstance(message, ToolMessage)]
    return [each for each in results if each.parts or len(each.content) >= MIN_CLEARED]


def with_results_cleared(messages: Sequence[Message], files: Mapping[str, str | None]) -> list[Message]:
    """Return the messages with a notice in place of the results of the calls in `files`, by id, and their files."""
    return [
        replace(message, content=_cleared(files[message.call_id]), parts=())
        if isinstance(message, ToolMessage) and message.call_id in files
        else message
        for message in messages
    ]


def with_turns_left_out(messages: Sequence[Message], keep_turns: int) -> list[Message]:
    """Return the messages without all but the latest turns. A notice precedes these."""
    latest = _latest(messages, keep_turns)
    notice = UserMessage(LEFT_OUT)
    asked = [
        message
        for message in messages[:latest]
        if isinstance(message, SystemMessage | UserMessage) and message != notice
    ]
    return [*asked, notice, *messages[latest:]] if _count(messages[:latest]) else list(messages)


def _count(messages: Sequence[Message]) -> int:
    """Return the number of turns."""
    return sum(isinstance(message, AssistantMessage) for message in messages)


def _latest(messages: Sequence[Message], keep_turns: int) -> int:
    """Return the place of the first of the latest turns."""
    turns = [place for place, message in enumerate(messages) if isinstance(message, AssistantMessage)]
    return turns[-keep_turns] if len(turns) > keep_turns else 0


def _cleared(path: str | None) -> str:
    return CLEARED.format(where="" if path is None else f"; see {path}")
