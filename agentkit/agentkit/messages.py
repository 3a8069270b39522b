"""Messages of a conversation as frozen dataclasses, and their conversion to OpenAI chat dicts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Final, Literal

from pydantic import ConfigDict, FailFast, Field

from agentkit_tools import ToolCall, ToolResult
from agentkit_tools.parts import ImagePart, Part, TextPart, parts_text

STRICT: Final = ConfigDict(extra="forbid", allow_inf_nan=False)
"""Validation of data read from a file: unknown keys and non-finite numbers are errors."""


@dataclass(frozen=True, slots=True)
class SystemMessage:
    """The system prompt, first in the conversation, and the JSON schema of the answer, if any."""

    content: str
    output_schema: Mapping[str, Any] | None = None
    role: Literal["system"] = "system"
    __pydantic_config__ = STRICT


@dataclass(frozen=True, slots=True)
class UserMessage:
    """A message from the user: the task, or a later request in the same session.

    `parts` is set if the message has images. `content` then has one line in place of each image, for models that do not
    read images.
    """

    content: str
    parts: tuple[Part, ...] = ()
    role: Literal["user"] = "user"
    __pydantic_config__ = STRICT


@dataclass(frozen=True, slots=True)
class AssistantMessage:
    """One turn of the model. `reasoning` is None if the turn did not think; `calls` has only the well-formed calls.

    `provider_data` is the turn as an API sent it, with signatures, encrypted reasoning and ids. It is sent
    back to the same API unchanged, and its key "api" names that API.
    """

    content: str
    reasoning: str | None = None
    calls: Annotated[tuple[ToolCall, ...], FailFast()] = ()
    provider_data: Mapping[str, Any] | None = None
    role: Literal["assistant"] = "assistant"
    __pydantic_config__ = STRICT


@dataclass(frozen=True, slots=True)
class ToolMessage:
    """The result of one call, as the model reads it. The tool messages of a turn are in call order.

    `content` and `parts` are as in `ToolResult`.
    """

    call_id: str
    name: str
    content: str
    is_error: bool = False
    parts: tuple[Part, ...] = ()
    role: Literal["tool"] = "tool"
    __pydantic_config__ = STRICT

    @classmethod
    def of(cls, result: ToolResult) -> ToolMessage:
        """Return the message that carries `result` to the model."""
        return cls(result.call_id, result.name, result.content, result.is_error, result.parts)


Message = Annotated[SystemMessage | UserMessage | AssistantMessage | ToolMessage, Field(discriminator="role")]


Prompt = str | Sequence[str | TextPart | ImagePart]
"""A user's message: a text, or texts and images in order."""


def user_message(prompt: Prompt) -> UserMessage:
    """Return the message with this content.

    Raises:
        TypeError: the prompt, or an item of it, is neither text nor an image.
    """
    if isinstance(prompt, str):
        return UserMessage(prompt)
    expected = "expected a text, or a list of texts and ImageParts"
    if not isinstance(prompt, list | tuple):
        raise TypeError(f"given {prompt!r:.200} as a task; {expected}")
    for item in prompt:
        if not isinstance(item, str | TextPart | ImagePart):
            raise TypeError(f"given {item!r:.200} in a task; {expected}")
    parts = tuple(TextPart(item) if isinstance(item, str) else item for item in prompt)
    return UserMessage(parts_text(parts), parts)


def unanswered(messages: Sequence[Message]) -> list[Message]:
    """Return the messages after the last assistant turn."""
    answered = [index for index, message in enumerate(messages) if isinstance(message, AssistantMessage)]
    return list(messages[answered[-1] + 1 if answered else 0 :])


def to_openai(message: Message) -> dict[str, Any]:
    """Return the message as the OpenAI chat dict that `agentkit_engine.chat` encodes and HTTP APIs accept."""
    match message:
        case AssistantMessage():
            shaped: dict[str, Any] = {"role": "assistant", "content": message.content}
            if message.reasoning is not None:
                shaped["reasoning_content"] = message.reasoning
            if message.calls:
                shaped["tool_calls"] = [
                    {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
                    for call in message.calls
                ]
            return shaped
        case ToolMessage():
            return {"role": "tool", "tool_call_id": message.call_id, "content": message.content}
        case SystemMessage(output_schema=schema) if schema is not None:
            return {"role": "system", "content": message.content, "response_format": schema}
        case _:
            return {"role": message.role, "content": message.content}


def to_openai_all(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Return `to_openai` of each message, in order."""
    return [to_openai(message) for message in messages]
