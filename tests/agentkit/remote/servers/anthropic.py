"""A fake of Anthropic's Messages API. It refuses requests that the SDK's types or the API's documented rules refuse."""

from __future__ import annotations

import json
import re
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping
from contextlib import asynccontextmanager
from functools import cache
from itertools import pairwise
from typing import Any

from servers.http import Reply, Request, serve
from servers.validation import Strictly

Json = dict[str, Any]
Script = Reply | Callable[[Json], Reply]

USAGE: Json = {
    "input_tokens": 10,
    "cache_creation_input_tokens": 30,
    "cache_read_input_tokens": 60,
    "output_tokens": 1,
}


class AnthropicServer:
    """Answers each request with the next reply of the script, and keeps the requests.

    Without `checks`, it takes requests that only later models accept.
    """

    def __init__(self, *script: Script, checks: bool = True) -> None:
        self.checks = checks
        self.requests: list[Json] = []
        self.headers: list[Mapping[str, str]] = []
        self._script = iter(script)

    @asynccontextmanager
    async def running(self) -> AsyncIterator[str]:
        """Serve, and yield the base URL."""
        async with serve(self._answer) as url:
            yield url

    async def _answer(self, request: Request) -> Reply:
        assert (request.method, request.path) == ("POST", "/v1/messages")
        body = request.json()
        self.requests.append(body)
        self.headers.append(request.headers)
        if self.checks:
            check_request(body)
        reply = next(self._script)
        return reply if isinstance(reply, Reply) else reply(body)


@cache
def _params() -> Strictly:
    from anthropic.types.message_create_params import MessageCreateParamsStreaming

    return Strictly(MessageCreateParamsStreaming)


@cache
def _block() -> Strictly:
    from anthropic.types import ContentBlockParam

    return Strictly(ContentBlockParam)


def check_request(body: Json) -> None:
    _params().check(body)
    assert body["stream"] is True
    assert str(body).count("cache_control") <= 4, "A maximum of 4 blocks with cache_control may be provided"
    _check_thinking(body)
    for tool in body.get("tools", ()):
        assert re.fullmatch(r"[a-zA-Z0-9_-]{1,128}", tool["name"])
        schema = tool["input_schema"]
        assert schema["type"] == "object" and not {"oneOf", "anyOf", "allOf"} & schema.keys()
        assert all(re.fullmatch(r"[a-zA-Z0-9_.-]{1,64}", name) for name in schema.get("properties", ()))
    assert all(block["text"].strip() for block in body.get("system", ())), "text content blocks must be non-empty"
    roles = [message["role"] for message in body["messages"]]
    assert roles[0] == "user" and all(one != other for one, other in pairwise(roles))
    waiting: list[str] = []
    for message in body["messages"]:
        content = message["content"]
        for block in content:
            _block().check(block)
            assert block["type"] != "text" or block["text"].strip(), "text content blocks must contain non-whitespace"
        results = [block["tool_use_id"] for block in content if block["type"] == "tool_result"]
        assert results == waiting, "`tool_use` ids were found without `tool_result` blocks immediately after"
        assert all(block["type"] == "tool_result" for block in content[: len(results)]), "tool results come first"
        waiting = [block["id"] for block in content if block["type"] == "tool_use"]
        assert all(re.fullmatch(r"[a-zA-Z0-9_-]+", call_id) for call_id in waiting)
        if message["role"] == "assistant":
            assert content[-1]["type"] != "thinking", "The final block in an assistant message cannot be `thinking`"
            assert all(block["signature"] for block in content if block["type"] == "thinking")


def _check_thinking(body: Json) -> None:
    thinking = body.get("thinking", {}).get("type")
    if thinking == "enabled":
        assert 1024 <= body["thinking"]["budget_tokens"] < body["max_tokens"]
        last = [message for message in body["messages"] if message["role"] == "assistant"][-1:]
        if last and body["messages"][-1]["content"][0]["type"] == "tool_result":
            begins = last[0]["content"][0]["type"]
            assert begins in ("thinking", "redacted_thinking"), f"Expected `thinking`, but found `{begins}`"
    newer = re.search(r"claude-[a-z]+-(5|4-[6-9]|preview)", body["model"])
    assert not (newer and thinking == "enabled"), '"thinking.type.enabled" is not supported for this model'
    assert newer or thinking != "adaptive", "adaptive thinking is not supported on this model"
    if re.search(r"opus-5-5|sonnet-5-5|fable", body["model"]):
        assert thinking != "disabled", '"thinking.type.disabled" is not supported for this model'
    if thinking in ("disabled", "between_tools"):
        assert body.get("output_config", {}).get("effort") != "max"


def thinking(text: str, signature: str = "sig") -> Json:
    return {"type": "thinking", "thinking": text, "signature": signature}


def text(value: str) -> Json:
    return {"type": "text", "text": value, "citations": None}


def tool_use(call_id: str, name: str, arguments: str) -> Json:
    """Return a block whose input is the text that the model writes, which need not be JSON."""
    return {"type": "tool_use", "id": call_id, "name": name, "input": arguments, "caller": {"type": "direct"}}


def turn(*blocks: Json, stop: str = "end_turn", usage: Json | None = None) -> list[Json]:
    """Return the events of a turn with these blocks; `usage` is that of its last but one event."""
    started: Json = {
        "id": "msg_1",
        "type": "message",
        "role": "assistant",
        "model": "claude",
        "content": [],
        "stop_reason": None,
        "stop_sequence": None,
        "usage": USAGE,
    }
    events: list[Json] = [{"type": "message_start", "message": started}, {"type": "ping"}]
    for at, block in enumerate(blocks):
        events += [*begin_block(at, block), {"type": "content_block_stop", "index": at}]
    last = {"output_tokens": 40, "output_tokens_details": {"thinking_tokens": 25}} if usage is None else usage
    delta = {"type": "message_delta", "delta": {"stop_reason": stop, "stop_sequence": None}, "usage": last}
    return [*events, delta, {"type": "message_stop"}]


def begin_block(at: int, block: Json) -> Iterator[Json]:
    """Yield all events of a block but the last."""
    match block["type"]:
        case "text":
            opened = {**block, "text": ""}
            deltas = [{"type": "text_delta", "text": piece} for piece in halves(block["text"])]
        case "thinking":
            opened = {**block, "thinking": "", "signature": ""}
            deltas = [{"type": "thinking_delta", "thinking": piece} for piece in halves(block["thinking"])]
            if block["signature"]:
                deltas.append({"type": "signature_delta", "signature": block["signature"]})
        case "tool_use":
            opened = {**block, "input": {}}
            deltas = [{"type": "input_json_delta", "partial_json": piece} for piece in ("", *halves(block["input"]))]
        case _:
            opened, deltas = block, []
    yield {"type": "content_block_start", "index": at, "content_block": opened}
    for delta in deltas:
        yield {"type": "content_block_delta", "index": at, "delta": delta}


def halves(value: str) -> list[str]:
    middle = len(value) // 2
    return [piece for piece in (value[:middle], value[middle:]) if piece]


def sse(events: Iterable[Json]) -> bytes:
    return b"".join(f"event: {event['type']}\ndata: {json.dumps(event)}\n\n".encode() for event in events)


def says(*blocks: Json, stop: str = "end_turn", usage: Json | None = None) -> Reply:
    """Return the reply that streams these blocks."""
    return Reply(sse(turn(*blocks, stop=stop, usage=usage)))


def error(status: int, kind: str, message: str, headers: Mapping[str, str] | None = None) -> Reply:
    body = {"type": "error", "error": {"type": kind, "message": message}, "request_id": "req_1"}
    return Reply.of_json(body, status, {"request-id": "req_1", **(headers or {})})
