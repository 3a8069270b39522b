"""What is said in a conversation: frozen, typed messages and their OpenAI-shaped dicts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Final, Literal

from pydantic import ConfigDict, FailFast, Field

from agentkit_tools import ToolCall, ToolResult

STRICT: Final = ConfigDict(extra="forbid", allow_inf_nan=False)
"""Read from a file, an unknown key is an error, and so is a number that is not finite."""


@dataclass(frozen=True, slots=True)
class SystemMessage:
    """The standing instructions, first in the conversation, and the JSON schema that the answer has to fit, if any."""

    content: str
    output_schema: Mapping[str, Any] | None = None
    role: Literal["system"] = "system"
    __pydantic_config__ = STRICT


@dataclass(frozen=True, slots=True)
class UserMessage:
    """What the user says: the task, or the next thing asked in the same session."""

    content: str
    role: Literal["user"] = "user"
    __pydantic_config__ = STRICT


@dataclass(frozen=True, slots=True)
class AssistantMessage:
    """One turn of the model. `reasoning` is None when the turn did not think; `calls` are the well-formed ones."""

    content: str
    reasoning: str | None = None
    calls: Annotated[tuple[ToolCall, ...], FailFast()] = ()
    role: Literal["assistant"] = "assistant"
    __pydantic_config__ = STRICT


@dataclass(frozen=True, slots=True)
class ToolMessage:
    """What one call gave back, as the model reads it. The messages of a turn stand in call order."""

    call_id: str
    name: str
    content: str
    is_error: bool = False
    role: Literal["tool"] = "tool"
    __pydantic_config__ = STRICT

    @classmethod
    def of(cls, result: ToolResult) -> ToolMessage:
        """The message that carries `result` to the model."""
        return cls(result.call_id, result.name, result.content, result.is_error)


Message = Annotated[SystemMessage | UserMessage | AssistantMessage | ToolMessage, Field(discriminator="role")]


def to_openai(message: Message) -> dict[str, Any]:
    """The message as the OpenAI chat dict that `agentkit_engine.chat` encodes and HTTP APIs take."""
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
    """`to_openai` of each message, in order."""
    return [to_openai(message) for message in messages]
