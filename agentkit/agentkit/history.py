"""Message histories: conversations that a new run starts from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from agentkit.checks import check_type
from agentkit.messages import AssistantMessage, Message, SystemMessage, ToolMessage, UserMessage
from agentkit.result import RunResult
from agentkit.trajectory import Trajectory

MessageHistory = Sequence[Message] | RunResult[Any] | Trajectory
"""Messages, or a run whose messages are used."""


def opening_messages(
    history: MessageHistory | None, task: UserMessage, *, system: str, output_schema: Mapping[str, Any] | None
) -> list[Message]:
    """Return the messages that a run begins with: the system prompt, the history, and the task.

    The history's own system prompt is kept; without one, `system` is used. The output schema is always that of the new
    run, which validates the answer.

    Raises:
        TypeError: `history` is not a history, or one of its items is not a message.
        ValueError: see `check_history`.
    """
    check_type("message_history", history, list | tuple | RunResult | Trajectory | None, "a list of messages, or a run")
    if isinstance(history, RunResult):
        history = history.trajectory
    messages = list(_paired(history.messages if isinstance(history, Trajectory) else history or ()))
    check_history(messages)
    if messages and isinstance(messages[0], SystemMessage):
        system = messages.pop(0).content
    head = [SystemMessage(system, output_schema)] if system or output_schema is not None else []
    return [*head, *messages, task]


def check_history(messages: Sequence[Message]) -> None:
    """Check that messages form a conversation that a model can read.

    Raises:
        TypeError: an item is not a message.
        ValueError: a system message is not the first message; an assistant turn does not follow a user message or a
            tool result; a call has no result, or a result has no call. The message has the index.
    """
    open_calls: dict[str, int] = {}  # calls without results so far, with the index of their message
    before: Message | None = None
    for index, message in enumerate(messages):
        where = f"message_history[{index}]"
        if not isinstance(message, SystemMessage | UserMessage | AssistantMessage | ToolMessage):
            raise TypeError(
                f"{where}: given {message!r:.200}, expected a SystemMessage, UserMessage, "
                "AssistantMessage or ToolMessage"
            )
        if isinstance(message, ToolMessage):
            if open_calls.pop(message.call_id, None) is None:
                raise ValueError(
                    f"{where}: the result of call {message.call_id!r}, which the turn before it does not make"
                )
        elif open_calls:
            break
        elif isinstance(message, SystemMessage) and index:
            raise ValueError(f"{where}: a system message; expected it first, at index 0")
        elif isinstance(message, AssistantMessage):
            if not isinstance(before, UserMessage | ToolMessage):
                raise ValueError(f"{where}: an assistant turn; expected a user message or tool results before it")
            open_calls = dict.fromkeys((call.id for call in message.calls), index)
            if len(open_calls) < len(message.calls):
                raise ValueError(f"{where}: two calls have the same id")
        before = message
    for call_id, index in open_calls.items():
        raise ValueError(
            f"message_history[{index}]: call {call_id!r} has no result; add a ToolMessage for it, or remove it"
        )


def _paired(messages: Sequence[Message]) -> Iterator[Message]:
    """Yield the messages, with error results of malformed calls, which are in no turn, as user messages.

    These user messages follow the results of the turn's other calls.
    """
    calls: set[str] = set()
    unpaired: list[Message] = []
    for message in messages:
        if isinstance(message, ToolMessage) and message.is_error and message.call_id not in calls:
            unpaired.append(UserMessage(message.content))
            continue
        if not isinstance(message, ToolMessage):
            yield from unpaired
            unpaired.clear()
        if isinstance(message, AssistantMessage):
            calls = {call.id for call in message.calls}
        yield message
    yield from unpaired
