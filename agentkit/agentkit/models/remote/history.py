"""Convert a conversation to a form that every API accepts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from agentkit.messages import AssistantMessage, Message, ToolMessage, UserMessage
from agentkit.models.remote.names import ToolNames
from agentkit_tools import TextPart, ToolCall
from agentkit_tools.model_texts import ERROR
from agentkit_tools.parts import Part


def sendable(messages: Sequence[Message], names: ToolNames) -> list[Message]:
    """Return the conversation with tool names as they are sent, changed where an API would refuse it.

    Each call has exactly one result, right after its turn. A result without a call, such as the result of a malformed
    call, becomes a user message. A turn that was stopped before it said anything is left out, and consecutive
    user messages become one.
    """
    sent: list[Message] = []
    waiting: dict[str, ToolCall] = {}
    loose: list[ToolMessage] = []

    def end_turn() -> None:
        for call in waiting.values():
            text = ERROR.format(message="the call has no result: it was stopped")
            sent.append(ToolMessage(call.id, names.sent(call.name), text, is_error=True))
        waiting.clear()
        for result in loose:
            _add_user(sent, UserMessage(result.content, result.parts))
        loose.clear()

    for message in messages:
        match message:
            case ToolMessage() if message.call_id in waiting:
                call = waiting.pop(message.call_id)
                sent.append(replace(message, name=names.sent(call.name)))
            case ToolMessage():
                loose.append(message)
            case AssistantMessage():
                end_turn()
                if message.content or message.calls or message.provider_data:
                    calls = tuple(replace(call, name=names.sent(call.name)) for call in message.calls)
                    sent.append(replace(message, calls=calls))
                    waiting.update((call.id, call) for call in message.calls)
            case UserMessage():
                end_turn()
                _add_user(sent, message)
            case _:
                sent.append(message)
    end_turn()
    return sent


def _add_user(sent: list[Message], message: UserMessage) -> None:
    if not (sent and isinstance(last := sent[-1], UserMessage)):
        sent.append(message)
        return
    parts = (*_parts(last), *_parts(message)) if last.parts or message.parts else ()
    sent[-1] = UserMessage(f"{last.content}\n\n{message.content}", parts)


def _parts(message: UserMessage) -> tuple[Part, ...]:
    return message.parts or (TextPart(message.content),)
