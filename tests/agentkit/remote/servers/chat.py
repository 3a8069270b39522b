"""A fake server of Chat Completions, which checks every request against the types of OpenAI's SDK."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any

import anyio
from openai.types.chat.completion_create_params import CompletionCreateParamsStreaming
from servers.http import Reply, Request, serve
from servers.validation import Strictly

_REQUESTS = Strictly(CompletionCreateParamsStreaming)

OWN = ("chat_template_kwargs", "return_token_ids", "top_k", "min_p", "repetition_penalty", "stop_token_ids")
DEEPSEEK = ("thinking",)
USAGE = {"prompt_tokens": 20, "completion_tokens": 5, "total_tokens": 25}

Answer = Reply | Callable[[dict[str, Any]], Reply]


class ChatServer:
    """Answers the requests in turn; the last answer repeats.

    `extras` are the fields that the server knows beyond those of OpenAI. A request with any other field fails the test.
    """

    def __init__(
        self,
        *answers: Answer,
        extras: Sequence[str] = OWN,
        models: Sequence[str] = ("toy",),
        key: str | None = None,
    ) -> None:
        self.answers = answers
        self.extras = extras
        self.models = models
        self.key = key
        self.requests: list[dict[str, Any]] = []
        self.headers: list[Mapping[str, str]] = []

    @asynccontextmanager
    async def serve(self, *, port: int = 0) -> AsyncIterator[str]:
        """Serve, and yield the base URL."""
        async with serve(self._answer, port=port) as url:
            yield f"{url}/v1"

    async def _answer(self, request: Request) -> Reply:
        if self.key is not None and request.headers.get("authorization") != f"Bearer {self.key}":
            return error(401, f"Incorrect API key provided: {request.headers.get('authorization')}")
        if request.path == "/v1/models":
            return Reply.of_json({"object": "list", "data": [{"id": each, "object": "model"} for each in self.models]})
        if request.path != "/v1/chat/completions":
            return error(404, "Not Found")
        body = request.json()
        check_request(body, self.extras)
        self.requests.append(body)
        self.headers.append(request.headers)
        answer = self.answers[min(len(self.requests), len(self.answers)) - 1]
        return answer if isinstance(answer, Reply) else answer(body)


def check_request(body: Mapping[str, Any], extras: Sequence[str]) -> None:
    """Check a request against the SDK's types, except for the `extras`, and for the rules that the types do not say."""
    plain = {name: value for name, value in body.items() if name not in extras}
    plain["messages"] = [_plain(message) for message in body["messages"]]
    _REQUESTS.check(plain)
    waiting: list[str] = []
    for message in body["messages"]:
        if message["role"] == "tool":
            waiting.remove(message["tool_call_id"])
            continue
        assert not waiting, f"calls without a result: {waiting}"
        for call in message.get("tool_calls") or ():
            json.loads(call["function"]["arguments"])
            waiting.append(call["id"])
        assert message["role"] != "assistant" or message["content"] or message.get("tool_calls"), "an empty turn"
    assert not waiting, f"calls without a result: {waiting}"


def _plain(message: Mapping[str, Any]) -> dict[str, Any]:
    """Return a message without the fields that servers add to OpenAI's and want back."""
    plain = {name: value for name, value in message.items() if name not in ("reasoning_content", "reasoning")}
    if "tool_calls" in plain:
        plain["tool_calls"] = [
            {name: value for name, value in call.items() if name != "extra_content"} for call in plain["tool_calls"]
        ]
    return plain


def error(status: int, message: str, *, headers: Mapping[str, str] | None = None, **fields: Any) -> Reply:
    return Reply.of_json({"error": {"message": message, "type": None, "code": None, **fields}}, status, headers)


def event(value: object) -> bytes:
    return f"data: {json.dumps(value)}\n\n".encode()


def chunk(delta: Mapping[str, Any], finish: str | None = None, **fields: Any) -> dict[str, Any]:
    choice = {"index": 0, "delta": delta, "finish_reason": finish, **fields}
    return {"id": "c", "object": "chat.completion.chunk", "created": 1, "model": "toy", "choices": [choice]}


def stream(
    *deltas: Mapping[str, Any], finish: str | None = "stop", usage: Mapping[str, Any] | None = USAGE, cut: bool = False
) -> Reply:
    """Return a whole stream. With `cut`, the connection breaks after the deltas."""
    pieces = [event(chunk({"role": "assistant"})), b": keep-alive\n\n", *(event(chunk(delta)) for delta in deltas)]
    if not cut:
        pieces.append(event(chunk({}, finish)))
        if usage is not None:
            pieces.append(event({**chunk({}), "choices": [], "usage": usage}))
        pieces.append(b"data: [DONE]\n\n")
    return Reply(b"".join(pieces), cut=cut)


def text(said: str, **options: Any) -> Reply:
    """Return a stream with the text in pieces of four characters."""
    return stream(*({"content": said[at : at + 4]} for at in range(0, len(said), 4)), **options)


def calls(*made: tuple[str, str], thought: str = "", **options: Any) -> Reply:
    """Return a stream with calls as (name, arguments), whose arguments arrive interleaved and in two pieces."""
    heads = [
        {"index": index, "id": f"call_x{index}", "type": "function", "function": {"name": name, "arguments": ""}}
        for index, (name, _) in enumerate(made)
    ]
    halves = [
        {"index": index, "function": {"arguments": part}}
        for half in (0, 1)
        for index, (_, arguments) in enumerate(made)
        for part in [arguments[len(arguments) // 2 :] if half else arguments[: len(arguments) // 2]]
    ]
    reasoning = [{"reasoning_content": thought}] if thought else []
    options.setdefault("finish", "tool_calls")
    return stream(*reasoning, *({"tool_calls": [piece]} for piece in (*heads, *halves)), **options)


async def forever() -> AsyncIterator[bytes]:
    """Yield the beginning of a stream that never goes on."""
    yield event(chunk({"content": "wait"}))
    await anyio.sleep_forever()
