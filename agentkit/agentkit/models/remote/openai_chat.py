"""Chat Completions, the protocol that DeepSeek, vLLM, SGLang, llama.cpp and most other servers speak.

Sources: https://platform.openai.com/docs/api-reference/chat and, for DeepSeek, https://api-docs.deepseek.com.

Servers differ in the fields that they support. A field that the server's documentation has is always sent. A field that
only some servers support is left out once the server refuses it.
"""

from __future__ import annotations

import json
import re
from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from math import isfinite
from typing import Any, Final, Literal

from agentkit.errors import ApiError, ContextFullError, ModelOptionError, UnknownModelError
from agentkit.messages import AssistantMessage, SystemMessage, ToolMessage, UserMessage
from agentkit.model import EFFORTS, Effort
from agentkit.models.remote.connection import Connection, refuse_sampling, turn_limit
from agentkit.models.remote.names import arguments_object
from agentkit.models.remote.provider import (
    CallChunk,
    Delta,
    ReasoningChunk,
    StreamEnd,
    StreamFinished,
    TextChunk,
    TokenCounts,
    TokenIds,
    TransientError,
    TurnRequest,
)
from agentkit.models.remote.resolve import NO_KEY, Endpoint, key_variable
from agentkit.models.remote.schemas import openai_tool
from agentkit.output import ANSWER_AGAIN
from agentkit_engine.chat.tokens import THINK, THINK_END
from agentkit_engine.sampling_params import SamplingParams
from agentkit_tools import ImagePart, TextPart
from agentkit_tools.parts import Part

MAX_TOOLS: Final = 128
MAX_LESSONS: Final = 12
REASONING_KEYS: Final = ("reasoning_content", "reasoning")
REASONING: Final = "messages.reasoning"
"""The entry of `Server.refused` for the reasoning of earlier turns."""

Dialect = Literal["deepseek", "thinking", "enable_thinking", "hosted", "own"]
"""The request fields that turn thinking on and off.

"deepseek" and "thinking": `thinking: {"type": ...}`, with or without DeepSeek's other rules; "enable_thinking": that
field; "hosted": only `reasoning_effort`; "own", for self-hosted servers: variables of the chat template.
"""

SWITCHES: Final = ("thinking", "enable_thinking")
"""Dialects without efforts."""

_HOSTS: Final[Mapping[str, Dialect]] = {
    "deepseek.com": "deepseek",
    "moonshot.ai": "thinking",
    "moonshot.cn": "thinking",
    "z.ai": "thinking",
    "bigmodel.cn": "thinking",
    "aliyuncs.com": "enable_thinking",
    **dict.fromkeys(
        (
            *("azure.com", "cerebras.ai", "fireworks.ai", "googleapis.com", "groq.com", "mistral.ai", "nvidia.com"),
            *("openai.com", "openrouter.ai", "together.ai", "together.xyz", "x.ai"),
        ),
        "hosted",
    ),
}
OPTIONAL: Final = (
    "stream_options",
    "reasoning_effort",
    "chat_template_kwargs",
    "return_token_ids",
    "logprobs",
    "response_format",
    "seed",
    "tool_choice",
)
"""Fields that are left out once a server refuses them. None of them changes what the agent may do."""

_CONTEXT: Final = re.compile(
    r"context.?(length|window|size)|maximum context|exceed.{0,20}context|prompt is too long|longer than the model"
    r"|too many tokens",
    re.IGNORECASE,
)
_UNKNOWN_MODEL: Final = re.compile(
    r"model.{0,80}(not|n't) exist|model.{0,80}not found|(unknown|invalid|no such) model|not a valid model",
    re.IGNORECASE | re.DOTALL,
)
_NO_TOOLS: Final = re.compile(
    r"(not|n't) (currently )?(support|allow|have|accept).{0,30}(tool|function)"
    r"|(tool|function).{0,40}((not|n't|un) ?support|enable-auto-tool-choice|tool-call-parser)|--jinja",
    re.IGNORECASE | re.DOTALL,
)
_NO_CREDIT: Final = re.compile(r"insufficient.?(quota|balance|credit|funds)|credit balance", re.IGNORECASE)
_LASTING: Final = re.compile(r"invalid_request|invalid request|authentication|permission", re.IGNORECASE)
_SIZE: Final = re.compile(r"context length (?:is only|is|of) (\d+)")
_PROMPT: Final = re.compile(r"(\d+) (?:input tokens|tokens from the input|in the messages)|contains (\d+)")
MIN_ROOM: Final = 256
"""If a refused conversation leaves fewer tokens than this for a turn, the context counts as full."""
_MOST: Final = re.compile(
    r"(?:at most|less than or equal to|maximum(?: allowed)?(?: value)?(?: is| of)?|\[\d+,"
    r"|greater than [a-z_=]*=) ?(\d+)"
)
_BAD_EFFORT: Final = re.compile(r"reasoning.?effort.{0,120}(value|input should be|one of|expected)", re.I | re.DOTALL)


@dataclass(slots=True)
class Server:
    """Facts about one endpoint that its clients have learned and share."""

    refused: set[str] = field(default_factory=set)
    max_tokens: int | None = None
    """The largest token limit of a turn that the server accepts; None if it is not known."""
    max_tokens_field: str = "max_tokens"


class OpenAIChat:
    """The client of one model."""

    api = "openai-chat"

    def __init__(self, endpoint: Endpoint, server: Server) -> None:
        """Create a client. It connects with its first request.

        Raises:
            MissingDependencyError: the SDK is not installed.
        """
        self.host = endpoint.host
        self.dialect = _dialect(endpoint)
        self.max_tools = None if self.dialect == "own" else MAX_TOOLS
        # some models only turn thinking on or off; "high" is an agent's default
        self.efforts: tuple[Effort, ...] = ("none", "high") if self.dialect in SWITCHES else EFFORTS
        self._model = endpoint.model
        self._server = server
        self._connection = _ChatConnection(endpoint)

    def check_sampling(self, sampling: SamplingParams) -> None:
        """See `Provider.check_sampling`."""
        has = {*_SAMPLING, "stop"}
        if self.dialect != "deepseek":
            has.add("logit_bias")
        if self.dialect == "own":
            has.update(_OWN_SAMPLING)
        refuse_sampling(sampling, f"the API of {self.host}", has=frozenset(has))

    async def stream(self, request: TurnRequest) -> AsyncGenerator[Delta, None]:
        """See `Provider.stream`."""
        room: int | None = None  # tokens left in the context, once an error has said so
        left_out: set[str] = set()
        for _ in range(MAX_LESSONS):
            body = {name: value for name, value in self._body(request, room).items() if name not in left_out}
            limit = body.get(self._server.max_tokens_field)
            reader = _Reader(limit, room)
            try:
                async with aclosing(self._connection.events("/chat/completions", body)) as chunks:
                    async for chunk in chunks:
                        for delta in reader.read(chunk):
                            yield delta
                if not reader.begun:
                    raise self._connection.empty()
                self._server.refused |= left_out
                for delta in reader.end(self.api):
                    yield delta
                return
            except _WholeAnswerError as answer:
                for delta in (*reader.read(answer.body), *reader.end(self.api)):
                    yield delta
                return
            except ContextFullError as error:
                room = _room(str(error), limit)
                if room is None:
                    raise
            except ApiError as error:
                if reader.begun or error.status not in (400, 404, 422):
                    raise
                if not self._learn(str(error), body):  # the error may be about a field that it does not name
                    if left_out or error.status == 404 or _NO_TOOLS.search(str(error)):
                        raise
                    left_out = {name for name in OPTIONAL if name in body}
            except UnknownModelError as error:
                raise UnknownModelError(f"{error}{await self._available()}") from error
        raise ApiError(f"{self.host} refuses one field after the other; is it an OpenAI-compatible API?")

    async def aclose(self) -> None:
        """See `Provider.aclose`."""
        await self._connection.aclose()

    def _learn(self, said: str, body: Mapping[str, Any]) -> bool:
        """Adapt later requests if the error names a field that can be changed or left out; return True if it does."""
        server, name = self._server, "max_tokens" if "max_tokens" in body else "max_completion_tokens"
        sent = body.get(name)
        if sent is not None and name == "max_tokens" and re.search(r"use ['\"`]?max_completion_tokens", said, re.I):
            server.max_tokens_field = "max_completion_tokens"
            return True
        if sent is not None and "max" in said and (found := _MOST.search(said)) and 0 < int(found[1]) < sent:
            server.max_tokens = int(found[1])
            return True
        if self.dialect != "deepseek" and re.search(r"\breasoning(_content|_details)?\b", said):
            known = REASONING in server.refused
            server.refused.add(REASONING)
            if not known:
                return True
        if "reasoning_effort" in body and _BAD_EFFORT.search(said):
            raise ModelOptionError(f"{self.host} does not have the effort {body['reasoning_effort']!r}: {said}")
        named = {each for each in OPTIONAL if each in body and each in said}
        server.refused |= named
        return bool(named)

    async def _available(self) -> str:
        """Return a clause with some of the API's models; an empty text if the API does not list them."""
        names = await self._connection.models()
        if not names:
            return ""
        more = f" and {len(names) - 8} more" if len(names) > 8 else ""
        return f"; it has {', '.join(names[:8])}{more}"

    def _body(self, request: TurnRequest, room: int | None) -> dict[str, Any]:
        body: dict[str, Any] = {
            "model": self._model,
            "messages": self._messages(request),
            "stream": True,
            "stream_options": {"include_usage": True},
            **self._thinking(request),
            **self._sampling(request.sampling),
        }
        if request.tools:
            body["tools"] = [
                {
                    "type": "function",
                    "function": {"name": tool.name, "description": tool.description, "parameters": tool.parameters},
                }
                for tool in request.tools
            ]
        limits = [limit for limit in (turn_limit(request), self._server.max_tokens, room) if limit is not None]
        if limits:
            body[self._server.max_tokens_field] = min(limits)
        if (schema := request.sampling.output_schema) is not None:
            again = request.messages[-1].role == "user" and request.messages[-1].content.endswith(ANSWER_AGAIN)
            forbids_calls = bool(request.tools) and self.dialect == "own"  # there, the format also constrains calls
            if again and forbids_calls:
                body["tool_choice"] = "none"
            if again or not forbids_calls:
                as_json = self.dialect == "deepseek"
                body["response_format"] = {"type": "json_object"} if as_json else _answer_format(schema)
        if self.dialect == "own":
            body |= {"return_token_ids": True, "logprobs": True}
        return {name: value for name, value in body.items() if name not in self._server.refused}

    def _thinking(self, request: TurnRequest) -> dict[str, Any]:
        """Return the fields that turn thinking on or off."""
        effort = {"reasoning_effort": request.effort} if request.think else {}
        switch = {"type": "enabled" if request.think else "disabled"}
        match self.dialect:
            case "deepseek":
                return {"thinking": switch, **effort}
            case "thinking":
                return {"thinking": switch}
            case "enable_thinking":
                budget = {"thinking_budget": request.max_thinking_tokens} if request.max_thinking_tokens else {}
                return {"enable_thinking": request.think, **budget}
            case "hosted":  # only "none" turns reasoning off; other turns without thinking send nothing
                return {"reasoning_effort": "none"} if request.effort == "none" else effort
            case "own":
                template = {"thinking": request.think, "enable_thinking": request.think}
                return {"chat_template_kwargs": template, **effort}

    def _sampling(self, sampling: SamplingParams) -> dict[str, Any]:
        default = SamplingParams()
        names = [*_SAMPLING, *_OWN_SAMPLING]
        if self.dialect != "deepseek":
            names.append("seed")
        fields = {name: getattr(sampling, name) for name in names if getattr(sampling, name) != getattr(default, name)}
        if "stop_token_ids" in fields:
            fields["stop_token_ids"] = sorted(sampling.stop_token_ids)
        if sampling.stop:
            fields["stop"] = list(sampling.stop)
        if sampling.logit_bias:
            fields["logit_bias"] = {
                str(token_id): max(-100.0, value) for token_id, value in sampling.logit_bias.items()
            }
        return fields

    def _messages(self, request: TurnRequest) -> list[dict[str, Any]]:
        sent: list[dict[str, Any]] = []
        images: list[Part] = []  # from the tool results since the last turn; tool messages have only text
        for message in request.messages:
            if images and not isinstance(message, ToolMessage):
                sent.append(_user(images))
                images = []
            match message:
                case UserMessage(parts=parts) if parts and self.dialect != "deepseek":
                    sent.append(_user(parts))
                case ToolMessage():
                    sent.append({"role": "tool", "tool_call_id": message.call_id, "content": message.content})
                    shown = [part for part in message.parts if isinstance(part, ImagePart)]
                    if shown and self.dialect != "deepseek":
                        images += [TextPart(f"Images in the result of {message.call_id}:"), *shown]
                case AssistantMessage(content="", calls=()):
                    pass  # the turn has only reasoning, and servers refuse empty turns
                case AssistantMessage():
                    sent.append(self._assistant(message, has_tools=bool(request.tools)))
                case SystemMessage(output_schema=schema) if schema is not None:
                    asked = f"Answer with JSON that matches this schema:\n{json.dumps(schema, ensure_ascii=False)}"
                    sent.append({"role": "system", "content": "\n\n".join(filter(None, (message.content, asked)))})
                case _:
                    sent.append({"role": message.role, "content": message.content})
        if images:
            sent.append(_user(images))
        return sent

    def _assistant(self, message: AssistantMessage, *, has_tools: bool) -> dict[str, Any]:
        """Return a turn of the model. Its reasoning is sent back if the turn has calls. DeepSeek requires the reasoning
        of every turn if the conversation has tools."""
        own = message.provider_data if message.provider_data and message.provider_data.get("api") == self.api else {}
        sent: dict[str, Any] = {"role": "assistant", "content": message.content or None}
        if message.calls:
            extras: Sequence[Mapping[str, Any]] = own.get("calls") or [{}] * len(message.calls)
            sent["tool_calls"] = [
                {
                    **extra,
                    "id": call.id,
                    "type": "function",
                    "function": {"name": call.name, "arguments": _valid_arguments(call.arguments)},
                }
                for call, extra in zip(message.calls, extras, strict=False)
            ]
        if self.dialect == "deepseek":
            if has_tools:
                sent["reasoning_content"] = message.reasoning or ""
        elif message.calls and REASONING not in self._server.refused:
            if message.reasoning:
                sent[own.get("reasoning_key", "reasoning_content")] = message.reasoning
            if "reasoning_details" in own:
                sent["reasoning_details"] = own["reasoning_details"]
        return sent


_SAMPLING: Final = ("temperature", "top_p", "presence_penalty", "frequency_penalty")
_OWN_SAMPLING: Final = ("top_k", "min_p", "repetition_penalty", "stop_token_ids")
"""Sampling parameters that servers of open models support."""


class _WholeAnswerError(Exception):
    """The server ignored `stream` and sent the whole answer."""

    def __init__(self, body: dict[str, Any]) -> None:
        super().__init__()
        self.body = body


class _ChatConnection(Connection):
    def __init__(self, endpoint: Endpoint) -> None:
        super().__init__(
            "openai",
            model=endpoint.model,
            base_url=endpoint.base_url,
            api_key=endpoint.api_key or NO_KEY,
            variable=key_variable(endpoint.provider),
            timeout_s=endpoint.timeout_s,
        )

    def failure(
        self,
        detail: str,
        *,
        kinds: frozenset[str],
        status: int | None = None,
        retry_after_s: float | None = None,
        request_id: str | None = None,
    ) -> Exception:
        """See `Connection.failure`. This also recognises the error messages of many other servers."""
        usual = super().failure(detail, kinds=kinds, status=status, retry_after_s=retry_after_s, request_id=request_id)
        coded = f"{' '.join(kinds)} {detail}"
        if status in (401, 403, 413):
            return usual
        if _CONTEXT.search(coded):
            return ContextFullError(str(usual))
        if _NO_CREDIT.search(coded) or status == 402:
            return ApiError(f"{usual}; the account has no credit left", status=status)
        if status in (400, 404, 422) and _UNKNOWN_MODEL.search(coded):
            return UnknownModelError(f"{self.host} has no model {self.model!r}")
        if status is not None and _NO_TOOLS.search(coded):
            return ApiError(
                f"{usual}; choose a model that calls tools (vLLM: start it with --enable-auto-tool-choice and "
                "--tool-call-parser)",
                status=status,
            )
        if status is None and type(usual) is ApiError and not _LASTING.search(coded):
            return TransientError(str(usual))
        return usual

    async def models(self) -> list[str]:
        """Return the names of the API's models; an empty list if it does not answer within five seconds."""
        try:
            listed = await self._client().get("/models", cast_to=object, options={"timeout": 5.0})
            return sorted(str(each["id"]) for each in listed["data"])
        except Exception:  # the error that is being reported matters more
            return []

    async def _refuse_other_content(self, response: Any) -> None:
        if "json" in response.headers.get("content-type", ""):
            try:
                body = json.loads(await response.aread())
            except ValueError:
                body = None
            if isinstance(body, dict) and isinstance(body.get("choices"), list):
                raise _WholeAnswerError(body)
            if isinstance(body, dict) and body.get("error"):
                raise self.failure(str(body["error"]), kinds=frozenset(), status=None)
        await super()._refuse_other_content(response)


@dataclass(slots=True)
class _Call:
    id: str | None = None
    name: str = ""
    announced: bool = False
    extra: dict[str, Any] = field(default_factory=dict)


class _Reader:
    """Collects the chunks of one answer, in all the forms that servers send."""

    def __init__(self, max_tokens: int | None, room: int | None) -> None:
        self.begun = False
        self._max_tokens = max_tokens
        self._fills_context = max_tokens is None or max_tokens == room
        self._calls: list[_Call] = []
        self._by_index: dict[int, int] = {}
        self._finish: str | None = None
        self._usage: Mapping[str, Any] | None = None
        self._complete = False
        self._reasoning_key: str | None = None
        self._details: list[Any] = []
        self._chunks = 0
        self._thoughts = 0
        self._refusal = False
        self._inline: Literal["start", "thought", "after", "answer"] = "start"
        self._held = ""  # the end of the text so far, if it may belong to a tag
        self._prompt_ids: tuple[int, ...] = ()
        self._ids: list[int] = []
        self._logprobs: list[float] = []

    def read(self, chunk: Mapping[str, Any]) -> Iterator[Delta]:
        """Read a chunk or a whole completion, and yield its deltas."""
        self.begun = True
        usage = chunk.get("usage")
        if isinstance(usage, dict):
            self._usage = usage
        self._prompt_ids = _ids(chunk.get("prompt_token_ids")) or self._prompt_ids
        choices = chunk.get("choices")
        if not isinstance(choices, list):
            return
        if not choices:
            self._complete = self._complete or self._usage is not None
            return
        choice = _object(choices[0])
        self._prompt_ids = _ids(choice.get("prompt_token_ids")) or self._prompt_ids
        self._ids += _ids(choice.get("token_ids"))
        self._logprobs += _logprobs(choice.get("logprobs"))
        if choice.get("finish_reason"):
            self._finish = str(choice["finish_reason"])
            self._complete = True
        message = _object(choice.get("delta") or choice.get("message"))
        for key in REASONING_KEYS:
            if thought := _string(message.get(key)):
                self._reasoning_key = self._reasoning_key or key
                yield self._thought(thought)
                break
        if isinstance(message.get("reasoning_details"), list):
            self._details += message["reasoning_details"]
        yield from self._content(message.get("content"))
        if refusal := _string(message.get("refusal")):
            self._refusal = True
            yield TextChunk(refusal)
        pieces = message.get("tool_calls")
        for piece in pieces if isinstance(pieces, list) else ():
            yield from self._call(_object(piece))

    def end(self, api: str) -> Iterator[Delta]:
        """Yield the last deltas and the end. Raises TransientError if the stream broke off."""
        if not self._complete:
            raise TransientError("the stream ended before the turn")
        if self._finish in ("insufficient_system_resource", "network_error", "error", "abort"):
            raise TransientError(f"the API stopped the turn: {self._finish}")
        if self._held:
            yield self._thought(self._held) if self._inline == "thought" else TextChunk(self._held)
        for index, call in enumerate(self._calls):
            if not call.announced:
                yield CallChunk(index, "", call.id, call.name)
        data: dict[str, Any] = {"api": api}
        if self._reasoning_key is not None:
            data["reasoning_key"] = self._reasoning_key
        if self._details:
            data["reasoning_details"] = self._details
        if any(call.extra for call in self._calls):
            data["calls"] = [call.extra for call in self._calls]
        ids = TokenIds(self._prompt_ids, tuple(self._ids), tuple(self._logprobs)) if self._ids else None
        counts = self._counts()
        yield StreamFinished(self._end(counts), counts, data if len(data) > 1 else None, ids)

    def _end(self, counts: TokenCounts) -> StreamEnd:
        if self._refusal or self._finish == "content_filter":
            return "refused"
        if self._finish == "model_length":
            return "context"
        if self._finish == "length":
            cut = self._max_tokens is not None and self._usage is not None and counts.output_tokens < self._max_tokens
            return "context" if self._fills_context or cut else "max_tokens"
        return "stop"

    def _counts(self) -> TokenCounts:
        """Return the usage. If the server does not report it, each chunk counts as one token."""
        usage = self._usage
        if usage is None:
            output = len(self._ids) or self._chunks
            return TokenCounts(len(self._prompt_ids), 0, 0, output, min(self._thoughts, output))
        details, thought = _object(usage.get("prompt_tokens_details")), _object(usage.get("completion_tokens_details"))
        read, output = _count(usage.get("prompt_tokens")), _count(usage.get("completion_tokens"))
        hits = (details.get("cached_tokens"), usage.get("prompt_cache_hit_tokens"), usage.get("cached_tokens"))
        reasoning = thought.get("reasoning_tokens")
        return TokenCounts(
            input_tokens=read,
            cache_hit_tokens=min(read, max(map(_count, hits))),
            cache_write_tokens=_count(details.get("cache_write_tokens")),
            output_tokens=output,
            reasoning_tokens=min(self._thoughts if reasoning is None else _count(reasoning), output),
        )

    def _thought(self, text: str) -> ReasoningChunk:
        self._chunks += 1
        self._thoughts += 1
        return ReasoningChunk(text)

    def _content(self, content: object) -> Iterator[Delta]:
        """Yield the content: text, or a list of parts as from Mistral."""
        if isinstance(content, str):
            yield from self._text(content)
        elif isinstance(content, list):
            for part in content:
                match part:
                    case {"type": "text", "text": str(text)}:
                        yield from self._text(text)
                    case {"type": "thinking", "thinking": str(text)}:
                        yield self._thought(text)
                    case {"type": "thinking", "thinking": list(thoughts)}:
                        for each in thoughts:
                            if text := _string(_object(each).get("text")):
                                yield self._thought(text)

    def _text(self, text: str) -> Iterator[Delta]:
        """Yield the text. A thought in tags at its beginning, which the server did not parse, becomes reasoning."""
        if self._inline == "after":
            text = text.lstrip("\n")
        if not text:
            return
        if self._inline in ("after", "answer"):
            self._inline = "answer"
            self._chunks += 1
            yield TextChunk(text)
            return
        held, self._held = self._held + text, ""
        if self._inline == "start":
            begun = held.lstrip()
            if not begun.startswith(THINK):
                if THINK.startswith(begun):
                    self._held = held
                    return
                self._inline = "answer"
                yield from self._text(held)
                return
            self._inline, held = "thought", begun.removeprefix(THINK)
        thought, end, rest = held.partition(THINK_END)
        if not end:
            kept = next(length for length in range(len(THINK_END) - 1, -1, -1) if thought.endswith(THINK_END[:length]))
            thought, self._held = thought[: len(thought) - kept], thought[len(thought) - kept :]
        if thought:
            yield self._thought(thought)
        if end:
            self._inline = "after"
            yield from self._text(rest)

    def _call(self, piece: Mapping[str, Any]) -> Iterator[CallChunk]:
        function = _object(piece.get("function"))
        name, call_id = _string(function.get("name")), _string(piece.get("id"))
        position = self._position(piece.get("index"), call_id, name)
        call = self._calls[position]
        call.id = call.id or call_id or None
        if not call.announced and name != call.name:
            call.name += name  # some servers split the name, some repeat it
        call.extra |= {
            key: value for key, value in piece.items() if key not in ("index", "id", "type", "function") and value
        }
        arguments = function.get("arguments")
        if isinstance(arguments, dict):
            arguments = json.dumps(arguments, ensure_ascii=False)
        if arguments:
            self._chunks += 1
            yield CallChunk(position, str(arguments), None if call.announced else call.id, call.name)
            call.announced = True

    def _position(self, index: object, call_id: str, name: str) -> int:
        """Return the call that a chunk belongs to. Some servers send no index, or the same index for all calls."""
        position: int | None = None
        if isinstance(index, int) and index in self._by_index:
            position = self._by_index[index]
        elif not isinstance(index, int):
            known = [place for place, call in enumerate(self._calls) if call_id and call.id == call_id]
            position = known[0] if known else len(self._calls) - 1 if self._calls and not (name or call_id) else None
        if position is not None:
            call = self._calls[position]
            another = call_id and call.id and call_id != call.id and name
            if not another:
                return position
        self._calls.append(_Call())
        if isinstance(index, int):
            self._by_index[index] = len(self._calls) - 1
        return len(self._calls) - 1


def _answer_format(schema: Mapping[str, Any]) -> dict[str, Any]:
    """Return the format of the answer: strict if the strict subset can express the schema."""
    sent = openai_tool(schema) if schema.get("type") == "object" else None
    if sent is not None and sent.strict and sent.mapping is None:
        return {"type": "json_schema", "json_schema": {"name": "answer", "schema": sent.schema, "strict": True}}
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": dict(schema)}}


def _dialect(endpoint: Endpoint) -> Dialect:
    if endpoint.provider == "deepseek":
        return "deepseek"
    name = endpoint.host.partition(":")[0]
    for suffix, dialect in _HOSTS.items():
        if name == suffix or name.endswith(f".{suffix}"):
            return dialect
    return "own"


def _room(said: str, limit: int | None) -> int | None:
    """Return a smaller token limit of a turn, after an error that says that `limit` does not fit; None if none fits.

    vLLM stops counting a prompt once it no longer fits. It then reports one token less than `limit`, and half of
    `limit` is returned.
    """
    size, prompt = _SIZE.search(said), _PROMPT.search(said)
    if size is None or prompt is None or limit is None:
        return None
    left = int(size[1]) - int(prompt[1] or prompt[2])
    if left == limit - 1:
        return limit // 2 if limit // 2 >= MIN_ROOM else None
    return left if 0 < left < limit else None


def _user(parts: Sequence[Part]) -> dict[str, Any]:
    content = [
        {"type": "text", "text": part.text}
        if isinstance(part, TextPart)
        else {"type": "image_url", "image_url": {"url": f"data:{part.media_type};base64,{part.data}"}}
        for part in parts
    ]
    return {"role": "user", "content": content}


def _valid_arguments(text: str) -> str:
    """Return the arguments as valid JSON, because chat templates fail on anything else."""
    arguments = arguments_object(text)
    return json.dumps(arguments, ensure_ascii=False) if "malformed_arguments" in arguments else text or "{}"


def _object(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _string(value: object) -> str:
    return value if isinstance(value, str) else ""


def _count(value: object) -> int:
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else 0


def _ids(value: object) -> tuple[int, ...]:
    if not isinstance(value, list) or not all(isinstance(each, int) and 0 <= each < 1 << 31 for each in value):
        return ()
    return tuple(value)


def _logprobs(value: object) -> list[float]:
    content = _object(value).get("content")
    found = [_object(each).get("logprob") for each in content] if isinstance(content, list) else []
    return [float(each) for each in found if isinstance(each, int | float) and isfinite(each)]
