"""A fake of OpenAI's Responses API. It refuses requests that the SDK's types or the API's documented rules refuse."""

from __future__ import annotations

import json
import re
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from functools import cache
from typing import Any

from servers.http import Reply, Request, serve
from servers.validation import Strictly

Json = dict[str, Any]
Script = Reply | Callable[[Json], Reply]

USAGE: Json = {
    "input_tokens": 100,
    "input_tokens_details": {"cached_tokens": 60, "cache_write_tokens": 30},
    "output_tokens": 40,
    "output_tokens_details": {"reasoning_tokens": 25},
    "total_tokens": 140,
}


class ResponsesServer:
    """Answers each request with the next reply of the script, and keeps the requests."""

    def __init__(self, *script: Script) -> None:
        self.requests: list[Json] = []
        self.headers: list[Mapping[str, str]] = []
        self._script = iter(script)

    @asynccontextmanager
    async def running(self) -> AsyncIterator[str]:
        """Serve, and yield the base URL."""
        async with serve(self._answer) as url:
            yield f"{url}/v1"

    async def _answer(self, request: Request) -> Reply:
        assert (request.method, request.path) == ("POST", "/v1/responses")
        body = request.json()
        self.requests.append(body)
        self.headers.append(request.headers)
        check_request(body)
        reply = next(self._script)
        return reply if isinstance(reply, Reply) else reply(body)


@cache
def _params() -> Strictly:
    from openai.types.responses.response_create_params import ResponseCreateParamsStreaming

    return Strictly(ResponseCreateParamsStreaming)


def check_request(body: Json) -> None:
    _params().check(body)
    assert body["store"] is False and body["stream"] is True
    assert body.get("max_output_tokens", 16) >= 16
    assert len(body.get("tools", ())) <= 128
    for tool in body.get("tools", ()):
        assert re.fullmatch(r"[a-zA-Z0-9_-]{1,64}", tool["name"])
        _check_schema(tool["parameters"], strict=tool["strict"])
    if "text" in body:
        _check_schema(body["text"]["format"]["schema"], strict=body["text"]["format"]["strict"])
    if re.match(r"gpt-4", body["model"]):
        assert "reasoning" not in body, "Unsupported parameter: 'reasoning.effort'"
    elif "temperature" in body:
        assert body["reasoning"]["effort"] == "none", "Unsupported parameter: 'temperature'"
    calls = [item["call_id"] for item in body["input"] if item["type"] == "function_call"]
    outputs = [item["call_id"] for item in body["input"] if item["type"] == "function_call_output"]
    assert sorted(calls) == sorted(outputs), "No tool output found for function call"
    assert all(len(call) <= 64 for call in calls)
    for item, following in zip(body["input"], [*body["input"][1:], None], strict=True):
        if item["type"] == "reasoning":
            assert item["encrypted_content"], "Items are not persisted when `store` is set to false"
            assert following is not None and following["type"] in ("reasoning", "function_call", "message")
            assert following.get("role") != "user", "reasoning was provided without its required following item"


def _check_schema(schema: Json, *, strict: bool) -> None:
    assert schema["type"] == "object" and not {"oneOf", "anyOf", "allOf", "enum", "not"} & schema.keys()
    if strict:
        for node in _objects(schema):
            assert node["additionalProperties"] is False and set(node["required"]) == set(node["properties"])


def _objects(schema: Any) -> Iterator[Json]:
    if isinstance(schema, dict):
        if schema.get("type") == "object":
            yield schema
        for child in schema.values():
            yield from _objects(child)
    elif isinstance(schema, list):
        for child in schema:
            yield from _objects(child)


def reasoning(summary: str, *, id: str = "rs_1", encrypted: str = "gAAAA") -> Json:
    parts = [{"type": "summary_text", "text": summary}] if summary else []
    return {"type": "reasoning", "id": id, "summary": parts, "encrypted_content": encrypted, "status": None}


def message(text: str, *, id: str = "msg_1") -> Json:
    content = [{"type": "output_text", "text": text, "annotations": [], "logprobs": []}]
    return {"type": "message", "id": id, "role": "assistant", "status": "completed", "content": content}


def refusal(text: str) -> Json:
    return {**message(""), "content": [{"type": "refusal", "refusal": text}]}


def call(call_id: str, name: str, arguments: str) -> Json:
    named = {"id": f"fc_{call_id}", "call_id": call_id, "name": name, "arguments": arguments}
    return {"type": "function_call", **named, "status": "completed"}


def response(status: str, output: Sequence[Json] = (), **fields: Any) -> Json:
    return {
        "id": "resp_1",
        "object": "response",
        "created_at": 1,
        "model": "gpt-5",
        "status": status,
        "output": list(output),
        "parallel_tool_calls": True,
        "tool_choice": "auto",
        "tools": [],
        "error": None,
        "incomplete_details": None,
        **fields,
    }


def turn(*items: Json, **last: Any) -> list[Json]:
    """Return the events of a response with these items; `last` are fields of the response in its last event."""
    events = [{"type": "response.created", "response": response("in_progress")}]
    for at, item in enumerate(items):
        events += item_events(at, item)
    status = last.pop("status", "completed")
    ended = response(status, items, usage=last.pop("usage", USAGE), **last)
    return numbered([*events, {"type": f"response.{status}", "response": ended}])


def item_events(at: int, item: Json) -> list[Json]:
    return [*begin_item(at, item), {"type": "response.output_item.done", "output_index": at, "item": item}]


def begin_item(at: int, item: Json) -> list[Json]:
    """Return all events of an item but the last."""
    where = {"output_index": at, "item_id": item["id"]}
    match item["type"]:
        case "reasoning":
            opened = {**item, "summary": [], "encrypted_content": "incomplete"}
            deltas = []
            for index, part in enumerate(item["summary"]):
                empty = {**part, "text": ""}
                deltas.append({"type": "response.reasoning_summary_part.added", "summary_index": index, "part": empty})
                deltas += [
                    {"type": "response.reasoning_summary_text.delta", "summary_index": index, "delta": piece}
                    for piece in halves(part["text"])
                ]
        case "message":
            opened = {**item, "content": [], "status": "in_progress"}
            [part] = item["content"]
            deltas = [
                {"type": "response.refusal.delta", "content_index": 0, "delta": piece}
                if part["type"] == "refusal"
                else {"type": "response.output_text.delta", "content_index": 0, "delta": piece, "logprobs": []}
                for piece in halves(part.get("refusal") or part["text"])
            ]
        case _:
            opened = {**item, "arguments": "", "status": "in_progress"}
            deltas = [
                {"type": "response.function_call_arguments.delta", "delta": piece}
                for piece in halves(item["arguments"])
            ]
    added = {"type": "response.output_item.added", "output_index": at, "item": opened}
    return [added, *({**delta, **where} for delta in deltas)]


def halves(text: str) -> list[str]:
    middle = len(text) // 2
    return [piece for piece in (text[:middle], text[middle:]) if piece]


def numbered(events: Iterable[Json]) -> list[Json]:
    return [{**event, "sequence_number": number} for number, event in enumerate(events)]


def sse(events: Iterable[Json]) -> bytes:
    return b"".join(f"event: {event['type']}\ndata: {json.dumps(event)}\n\n".encode() for event in events)


def says(*items: Json, **last: Any) -> Reply:
    """Return the reply that streams these items."""
    return Reply(sse(turn(*items, **last)))


def error(status: int, message: str, *, code: str | None = None, headers: Mapping[str, str] | None = None) -> Reply:
    body = {"error": {"message": message, "type": "invalid_request_error", "param": None, "code": code}}
    return Reply.of_json(body, status, {"x-request-id": "req_1", **(headers or {})})
