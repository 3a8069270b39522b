"""OpenAI's Responses API, without stored responses: each request has the whole conversation, with encrypted reasoning.

Source: https://developers.openai.com/api/reference/responses. The guide "Reasoning" has the efforts of each model.
"""

from __future__ import annotations

import re
from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, Final, Literal

from agentkit.errors import ApiError, ModelOptionError
from agentkit.messages import AssistantMessage, SystemMessage, ToolMessage, UserMessage
from agentkit.model import Effort
from agentkit.models.remote.connection import TIMEOUT_S, Connection, drain, refuse_sampling, turn_limit, wire_id
from agentkit.models.remote.provider import (
    CallChunk,
    Delta,
    ReasoningChunk,
    StreamEnd,
    StreamFinished,
    TextChunk,
    TokenCounts,
    TurnRequest,
)
from agentkit.models.remote.schemas import SentSchema, openai_output, openai_tool
from agentkit_engine.sampling_params import SamplingParams
from agentkit_tools import TextPart
from agentkit_tools.parts import Part

MAX_TOOLS: Final = 128
ANSWER: Final = "answer"
"""The name of the schema of an answer."""
MIN_OUTPUT_TOKENS: Final = 16
"""The smallest `max_output_tokens` that the API accepts."""

_ALL: Final = ("none", "low", "medium", "high", "xhigh", "max")
_Samples = Literal["always", "without_reasoning", "never"]
_FAMILIES: Final[tuple[tuple[str, tuple[str, ...], _Samples], ...]] = (
    (r"gpt-3|gpt-4|chatgpt-4|gpt-5[.0-9]*-chat", (), "always"),
    (r"o\d|codex-mini", ("low", "medium", "high"), "never"),
    (r"gpt-5-pro", ("high",), "never"),
    (r"gpt-5\.[1-5]-pro", ("medium", "high", "xhigh"), "never"),
    (r"gpt-5(\.1)?-codex(?!-max)", ("low", "medium", "high"), "never"),
    (r"gpt-5\.\d-codex", ("low", "medium", "high", "xhigh"), "never"),
    (r"gpt-5(?!\.)", ("minimal", "low", "medium", "high"), "never"),
    (r"gpt-5\.1", ("none", "low", "medium", "high"), "without_reasoning"),
    (r"gpt-5\.[2-5]", ("none", "low", "medium", "high", "xhigh"), "without_reasoning"),
    (r"gpt-6(\.\d+)?-astra", ("low", "medium", "high", "xhigh", "max"), "never"),
    (r"gpt-[56]", _ALL, "never"),
)
"""For models whose name starts with the pattern: their efforts, and when they accept a temperature."""
_OURS: Final[dict[Effort, tuple[str, ...]]] = {
    "none": ("none", "minimal"),
    "low": ("low",),
    "high": ("high",),
    "max": ("max", "xhigh"),
}
"""The API's efforts for each of ours; the first one that the model has is used."""


class OpenAIResponses:
    """The client of one model. It connects with its first request, and again after `aclose`.

    If reasoning cannot be turned off, a turn without thinking has the lowest effort. A model that never reasons accepts
    the efforts "none" and "high" (an agent's default), which then mean the same.
    """

    api: Final = "openai-responses"
    max_tools: Final = MAX_TOOLS

    def __init__(
        self,
        model: str,
        *,
        base_url: str = "https://api.openai.com/v1",
        api_key: str | None = None,
        timeout_s: float = TIMEOUT_S,
        like: OpenAIResponses | None = None,
    ) -> None:
        """Create a client.

        Args:
            model: The model's name at the API.
            base_url: The API's URL.
            api_key: The key. Default: the environment's `OPENAI_API_KEY`.
            timeout_s: Seconds without data from the API after which a request fails.
            like: Another client of the model; both share what they learn about it.

        Raises:
            MissingDependencyError, ApiKeyError, ValueError: see `Connection`.
        """
        self._connection = Connection(
            "openai", model=model, base_url=base_url, api_key=api_key, variable="OPENAI_API_KEY", timeout_s=timeout_s
        )
        self._model = model
        self._efforts, self._samples = _family(model)
        # features that the API has refused: "summary", and names of strict schemas
        self._refused: set[str] = set() if like is None else like._refused
        self.host = self._connection.host
        self.efforts: tuple[Effort, ...] = tuple(self._efforts) or ("none", "high")

    def check_sampling(self, sampling: SamplingParams) -> None:
        """See `Provider.check_sampling`."""
        has = frozenset() if self._samples == "never" else frozenset({"temperature", "top_p"})
        refuse_sampling(sampling, f"{self._model} at {self.host}", has=has)

    async def stream(self, request: TurnRequest) -> AsyncGenerator[Delta, None]:
        """See `Provider.stream`. A schema that the API refuses is sent again without strictness.

        Raises:
            ModelOptionError: the model lacks the effort, or accepts no temperature while it reasons.
        """
        verbatim = True
        while True:
            body, tools, output = self._body(request, verbatim=verbatim)
            reader = _Reader(self._connection, {name: tool for name, tool in tools.items() if tool.mapping}, output)
            try:
                async with aclosing(self._connection.events("/responses", body)) as events:
                    async for event in events:
                        for delta in reader.read(event):
                            yield delta
                        if reader.end is not None:
                            await drain(events)
            except ApiError as error:
                if reader.begun or error.status != 400:
                    raise
                if verbatim and "encrypted" in str(error):  # reasoning of another account cannot be read
                    verbatim = False
                elif not self._learn(str(error)):
                    raise
                continue
            for delta in reader.rest({"api": self.api, "model": self._model}):
                yield delta
            return

    async def aclose(self) -> None:
        """See `Provider.aclose`."""
        await self._connection.aclose()

    def _learn(self, said: str) -> bool:
        """Record what the API refuses; return True if it was not known before."""
        found = set(re.findall(r"[Ii]nvalid schema for \w+ '([^']+)'", said))
        if re.search(r"reasoning.summar", said):
            found.add("summary")
        is_new = not found <= self._refused
        self._refused |= found
        return is_new

    def _body(
        self, request: TurnRequest, *, verbatim: bool
    ) -> tuple[dict[str, Any], dict[str, SentSchema], SentSchema | None]:
        """Return the request, and the schemas of its tools and answer as they are sent."""
        tools = {
            tool.name: openai_tool(tool.parameters, strict=tool.name not in self._refused) for tool in request.tools
        }
        schema = request.sampling.output_schema
        output = None if schema is None else openai_output(schema, strict=ANSWER not in self._refused)
        reasoning = self._reasoning(request)
        system = [message.content for message in request.messages if isinstance(message, SystemMessage)]
        limit = turn_limit(request)
        body: dict[str, Any] = {
            "model": self._model,
            "input": [item for message in request.messages for item in self._items(message, verbatim=verbatim)],
            "store": False,
            "stream": True,
            **({"instructions": "\n\n".join(system)} if any(system) else {}),
            **({"reasoning": reasoning, "include": ["reasoning.encrypted_content"]} if reasoning else {}),
            **({"max_output_tokens": max(limit, MIN_OUTPUT_TOKENS)} if limit is not None else {}),
            **self._sampling(request.sampling, reasoning),
        }
        if tools:
            body["parallel_tool_calls"] = True
            body["tools"] = [
                {
                    "type": "function",
                    "name": tool.name,
                    "description": tool.description,
                    "parameters": tools[tool.name].schema,
                    "strict": tools[tool.name].strict,
                }
                for tool in request.tools
            ]
        if output is not None:
            answer = {"type": "json_schema", "name": ANSWER, "schema": output.schema, "strict": output.strict}
            body["text"] = {"format": answer}
        return body, tools, output

    def _reasoning(self, request: TurnRequest) -> dict[str, str]:
        """Return the field `reasoning`, which is empty for a model that does not reason."""
        if request.effort not in self.efforts:
            raise ModelOptionError(f"{self._model} has no effort {request.effort!r}; it has {', '.join(self.efforts)}")
        if not self._efforts:
            return {}
        effort = self._efforts[request.effort] if request.think else next(iter(self._efforts.values()))
        summary = {} if effort == "none" or "summary" in self._refused else {"summary": "auto"}
        return {"effort": effort, **summary}

    def _sampling(self, sampling: SamplingParams, reasoning: Mapping[str, str]) -> dict[str, float]:
        default = SamplingParams()
        given = {
            name: getattr(sampling, name)
            for name in ("temperature", "top_p")
            if getattr(sampling, name) != getattr(default, name)
        }
        if given and self._samples == "without_reasoning" and reasoning.get("effort") != "none":
            raise ModelOptionError(f'{self._model} takes {", ".join(given)} only with effort "none"; leave it out')
        return given

    def _items(self, message: object, *, verbatim: bool) -> Iterator[dict[str, Any]]:
        """Yield the input items for a message."""
        match message:
            case UserMessage():
                content = _content(message.parts) if message.parts else message.content
                yield {"type": "message", "role": "user", "content": content}
            case ToolMessage():
                output = _content(message.parts) if message.parts else message.content
                yield {"type": "function_call_output", "call_id": wire_id(message.call_id), "output": output}
            case AssistantMessage():
                match message.provider_data:
                    case {"api": self.api, "model": self._model, "output": list(output)} if verbatim and _call_ids(
                        output
                    ) == [call.id for call in message.calls]:
                        for item in output:  # the API refuses null fields, although it sends them
                            yield {key: value for key, value in item.items() if value is not None}
                        return
                if message.content:
                    yield {"type": "message", "role": "assistant", "content": message.content}
                for call in message.calls:
                    named = {"call_id": wire_id(call.id), "name": call.name, "arguments": call.arguments}
                    yield {"type": "function_call", **named}


@dataclass(slots=True)
class _Call:
    index: int
    id: str
    name: str
    arguments: str = ""


class _Reader:
    """Turns the events of one response into deltas.

    Attributes:
        begun: True if the response has begun.
        end: The reason for the end of the response; None before the end.
    """

    def __init__(self, connection: Connection, mapped: Mapping[str, SentSchema], output: SentSchema | None) -> None:
        self.begun = False
        self.end: StreamEnd | None = None
        self._connection = connection
        self._mapped = mapped  # tools whose arguments have to be complete before they can be mapped back
        self._output = output
        self._items: dict[int, dict[str, Any]] = {}
        self._calls: dict[int, _Call] = {}
        self._texts: dict[int, str] = {}
        self._thought = False
        self._refused = False
        self._usage: Mapping[str, Any] = {}

    def read(self, event: Mapping[str, Any]) -> Iterator[Delta]:
        """Yield the deltas of one event."""
        self.begun = True
        match event:
            case {"type": "response.output_item.added", "output_index": int(at), "item": {"type": str()} as item}:
                if item["type"] == "function_call":
                    yield self._begin_call(at, event, item)
                elif item["type"] == "reasoning" and self._thought:
                    yield ReasoningChunk("\n\n")
                    self._thought = False
            case {"type": "response.output_item.done", "output_index": int(at), "item": {"type": str()} as item}:
                self._items[at] = item
                if item["type"] == "function_call":
                    yield from self._end_call(at, event, item)
            case {"type": "response.function_call_arguments.delta", "output_index": int(at), "delta": str(piece)} if (
                at in self._calls
            ):
                call = self._calls[at]
                call.arguments += piece
                if call.name not in self._mapped:
                    yield CallChunk(call.index, piece)
            case {"type": "response.output_text.delta", "output_index": int(at), "delta": str(text)}:
                yield from self._text(at, text)
            case {"type": "response.refusal.delta", "output_index": int(at), "delta": str(text)}:
                self._refused = True
                yield from self._text(at, text)
            case {
                "type": "response.reasoning_summary_text.delta" | "response.reasoning_text.delta",
                "delta": str(text),
            }:
                self._thought = True
                yield ReasoningChunk(text)
            case {"type": "response.reasoning_summary_part.added"} if self._thought:
                yield ReasoningChunk("\n\n")
            case {"type": "response.completed" | "response.incomplete", "response": dict(response)}:
                self._usage = response["usage"] if isinstance(response.get("usage"), dict) else {}
                self.end = self._reason(response)
            case {"type": "response.failed", "response": dict(response)}:
                raise self._failure(response.get("error"))
            case {"type": "error"}:
                raise self._failure(event)
            case {"type": str(kind)} if kind not in _READ:
                pass  # an event for another kind of tool, or one that repeats earlier deltas
            case _:
                raise self._connection.malformed(event)

    def rest(self, data: Mapping[str, Any]) -> Iterator[Delta]:
        """Yield the deltas that were held back, then the end. Raises TransientError if the stream broke off."""
        if self.end is None:
            raise self._connection.incomplete() if self.begun else self._connection.empty()
        for at, call in self._calls.items():
            if at not in self._items:  # the turn was cut off inside the call
                named = {"call_id": call.id, "name": call.name, "arguments": call.arguments}
                self._items[at] = {"type": "function_call", **named}
                if call.name in self._mapped:
                    yield CallChunk(call.index, call.arguments)
        if self._output is not None and self._texts:
            yield TextChunk(self._output.restored(self._texts[max(self._texts)]))
        items = [item for _, item in sorted(self._items.items())]
        while items and items[-1]["type"] == "reasoning":
            items.pop()  # the API refuses reasoning at the end
        yield StreamFinished(self.end, _counts(self._usage), {**data, "output": items})

    def _begin_call(self, at: int, event: Mapping[str, Any], item: Mapping[str, Any]) -> CallChunk:
        match item:
            case {"call_id": str(call_id), "name": str(name)} if call_id and at not in self._calls:
                call = self._calls[at] = _Call(len(self._calls), call_id, name)
                return CallChunk(call.index, id=call_id, name=name)
        raise self._connection.malformed(event)

    def _end_call(self, at: int, event: Mapping[str, Any], item: Mapping[str, Any]) -> Iterator[CallChunk]:
        if at not in self._calls:
            yield self._begin_call(at, event, item)
        call, arguments = self._calls[at], item.get("arguments")
        if not isinstance(arguments, str):
            raise self._connection.malformed(event)
        if call.name in self._mapped:
            yield CallChunk(call.index, self._mapped[call.name].restored(arguments))
        elif not call.arguments:
            yield CallChunk(call.index, arguments)

    def _text(self, at: int, text: str) -> Iterator[TextChunk]:
        """Yield a chunk of message `at`. With a schema, the answer is the last message, held until it is complete."""
        begins = at not in self._texts
        if self._output is None:
            yield TextChunk(f"\n\n{text}" if begins and self._texts else text)
        self._texts[at] = self._texts.get(at, "") + text

    def _reason(self, response: Mapping[str, Any]) -> StreamEnd:
        details = response.get("incomplete_details")
        reason = details.get("reason") if isinstance(details, dict) else None
        if self._refused or reason == "content_filter":
            return "refused"
        return "max_tokens" if reason == "max_output_tokens" else "stop"

    def _failure(self, error: object) -> Exception:
        """Return the exception for the error of an event. An error without a code is transient."""
        found = error if isinstance(error, dict) else {}
        code, message = found.get("code"), found.get("message")
        kinds = frozenset({code if isinstance(code, str) else "server_error"})
        return self._connection.failure(message if isinstance(message, str) else "the response failed", kinds=kinds)


_READ: Final = {
    "error",
    "response.completed",
    "response.failed",
    "response.function_call_arguments.delta",
    "response.incomplete",
    "response.output_item.added",
    "response.output_item.done",
    "response.output_text.delta",
    "response.reasoning_summary_text.delta",
    "response.reasoning_text.delta",
    "response.refusal.delta",
}


def _family(model: str) -> tuple[dict[Effort, str], _Samples]:
    """Return the API's effort for each of ours that the model has, and when the model accepts a temperature."""
    name = model.removeprefix("ft:")
    known = (family[1:] for family in _FAMILIES if re.match(family[0], name))
    efforts, samples = next(known, (_ALL, "always"))  # if a new model lacks one of them, the API says so
    found = {ours: next((name for name in names if name in efforts), None) for ours, names in _OURS.items()}
    return {ours: name for ours, name in found.items() if name is not None}, samples


def _call_ids(items: Sequence[Mapping[str, Any]]) -> list[object]:
    return [item.get("call_id") for item in items if item.get("type") == "function_call"]


def _content(parts: Sequence[Part]) -> list[dict[str, Any]]:
    return [
        {"type": "input_text", "text": part.text}
        if isinstance(part, TextPart)
        else {"type": "input_image", "detail": "auto", "image_url": f"data:{part.media_type};base64,{part.data}"}
        for part in parts
    ]


def _counts(usage: Mapping[str, Any]) -> TokenCounts:
    details = {key: usage[key] if isinstance(usage.get(key), dict) else {} for key in (_INPUT, _OUTPUT)}

    def count(value: object) -> int:
        return value if isinstance(value, int) else 0

    return TokenCounts(
        input_tokens=count(usage.get("input_tokens")),
        cache_hit_tokens=count(details[_INPUT].get("cached_tokens")),
        cache_write_tokens=count(details[_INPUT].get("cache_write_tokens")),
        output_tokens=count(usage.get("output_tokens")),
        reasoning_tokens=count(details[_OUTPUT].get("reasoning_tokens")),
    )


_INPUT: Final = "input_tokens_details"
_OUTPUT: Final = "output_tokens_details"
