"""Anthropic's Messages API.

Source: https://platform.claude.com/docs/en/api/messages. The guides "Thinking", "Effort" and "Models overview" say what
each model accepts.
"""

from __future__ import annotations

import json
import re
from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Any, Final, Literal

from agentkit.errors import ApiError, ModelOptionError
from agentkit.messages import AssistantMessage, Message, SystemMessage, ToolMessage, UserMessage
from agentkit.model import Effort
from agentkit.models.remote.connection import TIMEOUT_S, Connection, drain, refuse_sampling, turn_limit, wire_id
from agentkit.models.remote.names import arguments_object
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
from agentkit.models.remote.schemas import SentSchema, anthropic_output, anthropic_tool
from agentkit_engine.sampling_params import SamplingParams
from agentkit_tools import TextPart
from agentkit_tools.parts import Part

MIN_BUDGET: Final = 1_024
BUDGETS: Final[dict[Effort, int]] = {"low": 4_096, "high": 16_384, "max": 32_000}
"""Thinking tokens for each effort, for models that take a budget instead of an effort."""
MAX_PAUSES: Final = 16
INTERLEAVED: Final = "interleaved-thinking-2025-05-14"
"""The beta that lets a model with a thinking budget think between its calls. Other models do not need it."""
CACHED: Final = {"cache_control": {"type": "ephemeral"}}

_ENDS: Final[dict[str, StreamEnd]] = {
    "max_tokens": "max_tokens",
    "model_context_window_exceeded": "context",
    "refusal": "refused",
}


@dataclass(frozen=True, slots=True)
class _Family:
    """The parameters that the models of one generation accept.

    `thinking` is the way to turn thinking on; None if the models never think. `off` is the type that turns it off; None
    if it cannot be turned off.
    """

    thinking: Literal["budget", "adaptive"] | None
    off: Literal["disabled", "between_tools"] | None
    max_tokens: int
    version: tuple[int, int] | None = None


@dataclass(slots=True)
class _Known:
    """Facts that the clients of one model share. `refused` has the features that the API has refused: "format" and
    "display"."""

    family: _Family
    refused: set[str]


class Anthropic:
    """The client of one model. It connects with its first request, and again after `aclose`.

    If thinking cannot be turned off, a turn without thinking has the lowest effort. A model that never thinks accepts
    the efforts "none" and "high" (an agent's default), which then mean the same.

    The API caches the prefix of the conversation up to each of the last two user messages for five minutes.
    """

    api: Final = "anthropic"
    max_tools: Final = None

    def __init__(
        self,
        model: str,
        *,
        base_url: str = "https://api.anthropic.com",
        api_key: str | None = None,
        timeout_s: float = TIMEOUT_S,
        like: Anthropic | None = None,
    ) -> None:
        """Create a client.

        Args:
            model: The model's name at the API.
            base_url: The API's URL, with or without `/v1` at its end.
            api_key: The key. Default: the environment's `ANTHROPIC_API_KEY`.
            timeout_s: Seconds without data from the API after which a request fails.
            like: Another client of the model; both share what they learn about it.

        Raises:
            MissingDependencyError, ApiKeyError, ValueError: see `Connection`.
        """
        self._connection = Connection(
            "anthropic",
            model=model,
            base_url=base_url.rstrip("/").removesuffix("/v1"),
            api_key=api_key,
            variable="ANTHROPIC_API_KEY",
            timeout_s=timeout_s,
        )
        self._model = model
        self._known: _Known = _Known(_family(model), set()) if like is None else like._known
        self.host = self._connection.host
        self.efforts: tuple[Effort, ...] = ("none", "high")
        if self._known.family.thinking is not None:
            self.efforts = (*(("none",) if self._known.family.off else ()), "low", "high", "max")

    def check_sampling(self, sampling: SamplingParams) -> None:
        """See `Provider.check_sampling`. Version 2026-10-21 of the API has no temperature, `top_p` or `top_k`."""
        refuse_sampling(sampling, f"the API of {self.host}", has=frozenset({"stop"}))

    async def stream(self, request: TurnRequest) -> AsyncGenerator[Delta, None]:
        """See `Provider.stream`. A turn that the API pauses is continued.

        Raises:
            ModelOptionError: the model lacks the effort.
        """
        tools = {tool.name: anthropic_tool(tool.parameters) for tool in request.tools}
        mapped = {name: tool for name, tool in tools.items() if tool.mapping}
        schema = request.sampling.output_schema
        output = None if schema is None else anthropic_output(schema)
        reader = _Reader(self._connection, mapped, output, holds_text=schema is not None)
        pauses = 0
        while True:
            body, headers = self._body(request, tools, output, reader.content)
            try:
                async with aclosing(self._connection.events("/v1/messages", body, headers)) as events:
                    async for event in events:
                        for delta in reader.read(event):
                            yield delta
                        if reader.stopped:
                            await drain(events)
            except ApiError as error:
                if reader.begun or error.status != 400 or not self._learn(str(error)):
                    raise
                continue
            if not reader.stopped or reader.stop_reason != "pause_turn" or pauses == MAX_PAUSES:
                break
            pauses += 1
        for delta in reader.rest({"api": self.api, "model": self._model}):
            yield delta

    async def aclose(self) -> None:
        """See `Provider.aclose`."""
        await self._connection.aclose()

    def _learn(self, said: str) -> bool:
        """Record what the API refuses; return True if it was not known before."""
        family, refused = self._known.family, set(self._known.refused)
        if most := re.search(r"max_tokens: \d+ > (\d+)", said):
            family = replace(family, max_tokens=int(most[1]))
        if re.search(r"thinking\.type\.enabled\W+is not supported", said):
            family = replace(family, thinking="adaptive")
        if re.search(r"thinking\.type\.(disabled|between_tools)\W+is not supported", said):
            family = replace(family, off=None)
        features = {"format": r"output_config\.format|output_format", "display": r"thinking\S*display"}
        refused |= {feature for feature, pattern in features.items() if re.search(pattern, said)}
        is_new = (family, refused) != (self._known.family, self._known.refused)
        self._known.family, self._known.refused = family, refused
        return is_new

    def _body(
        self,
        request: TurnRequest,
        tools: Mapping[str, SentSchema],
        output: SentSchema | None,
        said: Sequence[Mapping[str, Any]],
    ) -> tuple[dict[str, Any], dict[str, str]]:
        """Return the body and headers of the request that continues the conversation; `said` is the turn so far."""
        max_tokens = min(turn_limit(request) or self._known.family.max_tokens, self._known.family.max_tokens)
        thinking, effort = self._thinking(request, max_tokens)
        body: dict[str, Any] = {
            "model": self._model,
            "max_tokens": max_tokens,
            "messages": self._messages(request.messages),
            "stream": True,
            **({"thinking": thinking} if thinking else {}),
            **({"stop_sequences": list(request.sampling.stop)} if request.sampling.stop else {}),
        }
        if said:
            body["messages"].append({"role": "assistant", "content": list(said)})
        system = [message.content for message in request.messages if isinstance(message, SystemMessage)]
        config: dict[str, Any] = {"effort": effort} if effort else {}
        if request.sampling.output_schema is not None:
            if output is None or "format" in self._known.refused:
                asked = json.dumps(request.sampling.output_schema, ensure_ascii=False)
                system.append(f"Answer with JSON that matches this schema, and with nothing else:\n{asked}")
            else:
                config["format"] = {"type": "json_schema", "schema": output.schema}
        if config:
            body["output_config"] = config
        if request.tools:
            body["tools"] = [
                {"name": tool.name, "description": tool.description, "input_schema": tools[tool.name].schema}
                for tool in request.tools
            ]
        blocks = [_text(text) for text in system if text.strip()]
        if blocks:
            body["system"] = blocks
        if blocks or request.tools:  # tools come first in the prompt, so the end of the system prompt caches both
            (blocks or body["tools"])[-1] |= CACHED
        interleaved = request.tools and thinking.get("type") == "enabled" and self._known.family.version is not None
        return body, {"anthropic-beta": INTERLEAVED} if interleaved else {}

    def _thinking(self, request: TurnRequest, max_tokens: int) -> tuple[dict[str, Any], str | None]:
        """Return the field `thinking`, and the API's effort if the model takes one."""
        if request.effort not in self.efforts:
            raise ModelOptionError(f"{self._model} has no effort {request.effort!r}; it has {', '.join(self.efforts)}")
        match self._known.family.thinking:
            case None:
                return {}, None
            case "budget":
                thinks = request.think and not self._in_turn_without_thinking(request.messages)
                budget = min(BUDGETS[request.effort], max_tokens // 2) if thinks else 0
                if request.max_thinking_tokens is not None:
                    budget = min(budget, request.max_thinking_tokens)
                if budget < MIN_BUDGET:
                    return {"type": "disabled"}, None
                return {"type": "enabled", "budget_tokens": budget}, None
            case "adaptive" if request.think or self._known.family.off is None:
                version = self._known.family.version
                shown = (version is None or version >= (4, 7)) and "display" not in self._known.refused
                display = {"display": "summarized"} if shown else {}  # newer models show nothing by default
                return {"type": "adaptive", **display}, request.effort if request.think else "low"
            case _:
                # no model takes the effort "max" while it does not think
                effort = {"none": None, "low": "low"}.get(request.effort, "high")
                return {"type": self._known.family.off}, effort

    def _in_turn_without_thinking(self, messages: Sequence[Message]) -> bool:
        """Return True if the model answers tool results of a turn that did not think. Claude cannot start there."""
        turns = [index for index, message in enumerate(messages) if isinstance(message, AssistantMessage)]
        if self._known.family.version is None or not turns:
            return False
        [last, *news] = messages[turns[-1] :]
        answers = any(isinstance(message, ToolMessage) for message in news)  # a user message may follow them
        return answers and self._blocks(last)[0]["type"] not in ("thinking", "redacted_thinking")

    def _messages(self, messages: Sequence[Message]) -> list[dict[str, Any]]:
        """Return the messages with alternating roles. A user message begins with the results of the previous turn."""
        sent: list[dict[str, Any]] = []
        for message in messages:
            blocks = self._blocks(message)
            role = "assistant" if isinstance(message, AssistantMessage) else "user"
            if blocks and sent and sent[-1]["role"] == role:
                sent[-1]["content"] += blocks
            elif blocks:
                sent.append({"role": role, "content": blocks})
        users = [message["content"] for message in sent if message["role"] == "user"]
        for content in users:
            content.sort(key=lambda block: block["type"] != "tool_result")
        for content in users[-2:]:  # the ends of the prefixes that this turn reads and writes
            content[-1] |= CACHED
        return sent

    def _blocks(self, message: Message) -> list[dict[str, Any]]:
        match message:
            case UserMessage():
                return _content(message.parts or (TextPart(message.content),)) or [_text("(empty message)")]
            case ToolMessage():
                result: dict[str, Any] = {"type": "tool_result", "tool_use_id": wire_id(message.call_id)}
                result["content"] = _content(message.parts or (TextPart(message.content),)) or "(no output)"
                return [{**result, "is_error": True} if message.is_error else result]
            case AssistantMessage():
                match message.provider_data:
                    case {"api": self.api, "model": self._model, "content": list(content)} if [
                        block.get("id") for block in content if block.get("type") == "tool_use"
                    ] == [call.id for call in message.calls]:
                        return [_as_sent(block) for block in content]
                calls = [
                    {
                        "type": "tool_use",
                        "id": wire_id(call.id),
                        "name": call.name,
                        "input": arguments_object(call.arguments),
                    }
                    for call in message.calls
                ]
                return [*_content([TextPart(message.content)]), *calls]
        return []


class _Reader:
    """Turns the events of one turn into deltas. A turn that pauses has several responses.

    Attributes:
        begun: True if the response has begun.
        stopped: True if the response is complete.
        stop_reason: The API's reason for the end of the response.
    """

    def __init__(
        self, connection: Connection, mapped: Mapping[str, SentSchema], output: SentSchema | None, *, holds_text: bool
    ) -> None:
        self.begun = False
        self.stopped = False
        self.stop_reason: str | None = None
        self._connection = connection
        self._mapped = mapped  # tools whose arguments have to be complete before they can be mapped back
        self._output = output
        self._holds_text = holds_text  # the answer is the last text, which may have to be mapped back
        self._blocks: list[dict[str, Any]] = []
        self._open: dict[int, dict[str, Any]] = {}  # blocks of this response that have not ended, by their index
        self._arguments: dict[str, str] = {}  # the text that the model wrote, by the id of the call
        self._indices: dict[str, int] = {}  # positions of the calls, by their id
        self._usage: dict[str, Any] = {}
        self._counts = TokenCounts()

    @property
    def content(self) -> list[dict[str, Any]]:
        """The blocks so far, in the form that the API accepts in a later request: without empty text, and without
        thinking that was cut off or ends the turn."""
        kept = [
            block
            for block in self._blocks
            if not (block["type"] == "text" and not block["text"].strip())
            and not (block["type"] == "thinking" and not block.get("signature"))
        ]
        while kept and kept[-1]["type"] in ("thinking", "redacted_thinking"):
            kept.pop()
        return kept

    def read(self, event: Mapping[str, Any]) -> Iterator[Delta]:
        """Yield the deltas of one event."""
        self.begun = True
        match event:
            case {"type": "message_start", "message": dict(message)}:
                self.stopped, self.stop_reason, self._open = False, None, {}
                self._usage = _present(message.get("usage"))
            case {"type": "content_block_start", "index": int(at), "content_block": {"type": str()} as block}:
                yield from self._begin(at, event, dict(block))
            case {"type": "content_block_delta", "index": int(at), "delta": {"type": str()} as delta} if (
                at in self._open
            ):
                yield from self._extend(self._open[at], event, delta)
            case {"type": "content_block_stop", "index": int(at)} if at in self._open:
                yield from self._end(self._open.pop(at))
            case {"type": "message_delta", "delta": {"stop_reason": str(reason)}}:
                self.stop_reason = reason
                self._usage |= _present(event.get("usage"))
            case {"type": "message_delta", "delta": dict()}:
                self._usage |= _present(event.get("usage"))
            case {"type": "message_stop"} if self.stop_reason is not None:
                for block in self._open.values():
                    yield from self._end(block)
                self._counts = _sum(self._counts, _counts(self._usage))
                self.stopped = True
            case {"type": str(kind)} if kind not in _READ:
                pass  # an event of a later version of the API
            case _:
                raise self._connection.malformed(event)

    def rest(self, data: Mapping[str, Any]) -> Iterator[Delta]:
        """Yield the deltas that were held back, then the end. Raises TransientError if the stream broke off."""
        if not self.stopped:
            raise self._connection.incomplete() if self.begun else self._connection.empty()
        if self._holds_text and (texts := [block["text"] for block in self._blocks if block["type"] == "text"]):
            yield TextChunk(texts[-1] if self._output is None else self._output.restored(texts[-1]))
        end = _ENDS.get(self.stop_reason or "", "stop")
        yield StreamFinished(end, self._counts, {**data, "content": self.content})

    def _begin(self, at: int, event: Mapping[str, Any], block: dict[str, Any]) -> Iterator[Delta]:
        before = self._blocks[-1]["type"] if self._blocks else None
        match block:
            case {"type": "text", "text": str(text)}:
                apart = before not in (None, "text") and any(one["type"] == "text" for one in self._blocks)
                if (text or apart) and not self._holds_text:
                    yield TextChunk("\n\n" * apart + text)
            case {"type": "thinking", "thinking": str(text)}:
                apart = any(one.get("thinking") for one in self._blocks)
                if text or apart:
                    yield ReasoningChunk("\n\n" * apart + text)
            case {"type": "tool_use", "id": str(call_id), "name": str(name)} if call_id not in self._indices:
                self._indices[call_id] = len(self._indices)
                self._arguments[call_id] = ""
                yield CallChunk(self._indices[call_id], id=call_id, name=name)
            case {"type": "text" | "thinking" | "tool_use"}:
                raise self._connection.malformed(event)
        self._blocks.append(block)
        self._open[at] = block

    def _extend(self, block: dict[str, Any], event: Mapping[str, Any], delta: Mapping[str, Any]) -> Iterator[Delta]:
        match block["type"], delta:
            case "text", {"type": "text_delta", "text": str(text)}:
                block["text"] += text
                if not self._holds_text:
                    yield TextChunk(text)
            case "text", {"type": "citations_delta", "citation": citation}:
                block["citations"] = [*(block.get("citations") or ()), citation]
            case "thinking", {"type": "thinking_delta", "thinking": str(text)}:
                block["thinking"] += text
                yield ReasoningChunk(text)
            case "thinking", {"type": "signature_delta", "signature": str(signature)}:
                block["signature"] = signature
            case "tool_use", {"type": "input_json_delta", "partial_json": str(piece)}:
                self._arguments[block["id"]] += piece
                if piece and block["name"] not in self._mapped:
                    yield CallChunk(self._indices[block["id"]], piece)
            case _, {"type": str(kind)} if kind not in _DELTAS:
                pass
            case _:
                raise self._connection.malformed(event)

    def _end(self, block: dict[str, Any]) -> Iterator[Delta]:
        if block["type"] != "tool_use":
            return
        call_id, name = block["id"], block["name"]
        written = self._arguments[call_id]
        arguments = written or json.dumps(block.get("input") or {}, ensure_ascii=False)
        block["input"] = arguments_object(arguments)
        if name in self._mapped:
            yield CallChunk(self._indices[call_id], self._mapped[name].restored(arguments))
        elif not written:
            yield CallChunk(self._indices[call_id], arguments)


_READ: Final = {
    "content_block_delta",
    "content_block_start",
    "content_block_stop",
    "message_delta",
    "message_start",
    "message_stop",
}
_DELTAS: Final = {"citations_delta", "input_json_delta", "signature_delta", "text_delta", "thinking_delta"}


def _family(model: str) -> _Family:
    """Return the family of a model, from the product line and version in its name."""
    found = re.search(r"claude-(?P<line>[a-z]+)-(?P<major>\d)(?:-(?P<minor>\d{1,2}))?(?!\d)", model) or re.search(
        r"claude-(?P<major>\d)(?:-(?P<minor>\d))?-(?P<line>[a-z]+)", model
    )
    if found is None:
        if "claude-mythos" in model:
            return _Family("adaptive", None, 128_000)
        return _Family("budget", "disabled", 32_000)  # another server that speaks the protocol
    line, version = found["line"], (int(found["major"]), int(found["minor"] or 0))
    if version < (3, 7):
        return _Family(None, None, 4_096, version)
    if version <= (4, 5):
        return _Family("budget", "disabled", 32_000 if line == "opus" and version < (4, 5) else 64_000, version)
    if version == (4, 6):
        return _Family("adaptive", "disabled", 128_000 if line == "opus" else 64_000, version)
    if line in ("fable", "mythos") or (line == "opus" and version >= (5, 5)):
        return _Family("adaptive", None, 128_000, version)
    off: Literal["disabled", "between_tools"] = "disabled"
    if line == "sonnet" and version >= (5, 5):
        off = "between_tools"
    return _Family("adaptive", off, 128_000, version)


def _as_sent(block: Mapping[str, Any]) -> dict[str, Any]:
    """Return a block from a response in the form that the API accepts in a request."""
    kept = {key: value for key, value in block.items() if value is not None}
    return {**kept, "id": wire_id(kept["id"])} if kept.get("type") == "tool_use" else kept


def _text(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}


def _content(parts: Sequence[Part]) -> list[dict[str, Any]]:
    """Return the parts as blocks, without blank text, which the API refuses."""
    return [
        _text(part.text)
        if isinstance(part, TextPart)
        else {"type": "image", "source": {"type": "base64", "media_type": part.media_type, "data": part.data}}
        for part in parts
        if not isinstance(part, TextPart) or part.text.strip()
    ]


def _present(usage: object) -> dict[str, Any]:
    return {key: value for key, value in usage.items() if value is not None} if isinstance(usage, dict) else {}


def _counts(usage: Mapping[str, Any]) -> TokenCounts:
    """Return the counts of one response. The API counts cached input tokens separately."""

    def count(key: str, counts: Mapping[str, Any] = usage) -> int:
        value = counts.get(key)
        return value if isinstance(value, int) else 0

    hits, writes = count("cache_read_input_tokens"), count("cache_creation_input_tokens")
    details = usage.get("output_tokens_details")
    thought = count("thinking_tokens", details) if isinstance(details, dict) else 0
    return TokenCounts(count("input_tokens") + hits + writes, hits, writes, count("output_tokens"), thought)


def _sum(one: TokenCounts, other: TokenCounts) -> TokenCounts:
    return TokenCounts(
        one.input_tokens + other.input_tokens,
        one.cache_hit_tokens + other.cache_hit_tokens,
        one.cache_write_tokens + other.cache_write_tokens,
        one.output_tokens + other.output_tokens,
        one.reasoning_tokens + other.reasoning_tokens,
    )
