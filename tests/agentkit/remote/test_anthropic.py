"""The client of Anthropic's Messages API, against a server that checks each request with the SDK's types."""

from __future__ import annotations

import json
import logging
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from itertools import chain

import anyio
import pytest
from asking import USER, ask, calls_of, drained, reasoning_of, text_of
from servers.anthropic import (
    AnthropicServer,
    Json,
    Script,
    begin_block,
    error,
    says,
    sse,
    text,
    thinking,
    tool_use,
    turn,
)
from servers.http import Reply, Request, serve
from servers.validation import Strictly

from agentkit import AssistantMessage, SystemMessage, ToolMessage, UserMessage
from agentkit.errors import ApiError, ApiKeyError, ContextFullError, ModelOptionError, UnknownModelError
from agentkit.model import Effort
from agentkit.models.remote.anthropic import Anthropic
from agentkit.models.remote.provider import StreamFinished, TextChunk, TokenCounts, ToolSpec, TransientError
from agentkit_engine.sampling_params import SamplingParams
from agentkit_tools import BUILTINS, ImagePart, TextPart, ToolCall

pytestmark = pytest.mark.anyio

KEY = "sk-ant-secret-1234"
MODEL = "claude-sonnet-5"
SEARCH = ToolSpec("search", "Search files.", BUILTINS["search"].parameters)
BASH = ToolSpec("bash", "Run a command.", BUILTINS["bash"].parameters)
CACHED = {"cache_control": {"type": "ephemeral"}}


@asynccontextmanager
async def serving(
    *script: Script, model: str = MODEL, timeout_s: float = 20.0, checks: bool = True
) -> AsyncIterator[tuple[Anthropic, AnthropicServer]]:
    server = AnthropicServer(*script, checks=checks)
    async with server.running() as url:
        provider = Anthropic(model, base_url=url, api_key=KEY, timeout_s=timeout_s)
        try:
            yield provider, server
        finally:
            await provider.aclose()


def said_in(finished: StreamFinished, *calls: ToolCall, content: str = "") -> AssistantMessage:
    """Return the message of a turn as it is after it was recorded and read again."""
    return AssistantMessage(content, None, calls, json.loads(json.dumps(finished.provider_data)))


async def test_a_turn_with_thinking_text_and_parallel_calls() -> None:
    blocks = [
        thinking("First I look."),
        text("Let me see."),
        tool_use("toolu_a", "search", '{"pattern": "größe"}'),
        tool_use("toolu_b", "bash", ""),
    ]
    async with serving(says(*blocks, stop="tool_use")) as (provider, server):
        deltas, finished = await drained(provider, ask(SystemMessage("Be brief."), USER, tools=[SEARCH, BASH]))
    assert reasoning_of(deltas) == "First I look."
    assert text_of(deltas) == "Let me see."
    assert calls_of(deltas) == {
        0: ("toolu_a", "search", '{"pattern": "größe"}'),
        1: ("toolu_b", "bash", "{}"),
    }
    assert (finished.end, finished.usage) == ("stop", TokenCounts(100, 60, 30, 40, 25))
    [request] = server.requests
    assert request["system"] == [{"type": "text", "text": "Be brief.", **CACHED}]
    assert request["messages"] == [{"role": "user", "content": [{"type": "text", "text": "hello", **CACHED}]}]
    assert request["thinking"] == {"type": "adaptive", "display": "summarized"}
    assert request["output_config"] == {"effort": "high"} and request["max_tokens"] == 128_000
    assert not any("cache_control" in tool for tool in request["tools"])
    assert server.headers[0]["authorization"] == f"Bearer {KEY}"


async def test_a_turn_goes_back_unchanged_with_the_results_of_its_calls() -> None:
    redacted = {"type": "redacted_thinking", "data": "opaque"}
    blocks = [
        thinking("", "omitted"),
        redacted,
        text("b"),
        tool_use("toolu_a", "bash", '{"command": "ls"}'),
    ]
    async with serving(says(*blocks, stop="tool_use"), says(text("done"))) as (provider, server):
        _, finished = await drained(provider, ask(tools=[BASH]))
        assert finished.provider_data is not None and finished.provider_data["content"][2] == blocks[2]
        image = ImagePart.of(b"png", "image/png")
        result = ToolMessage("toolu_a", "bash", "x", True, parts=(TextPart("found"), TextPart(" "), image))
        await drained(
            provider,
            ask(USER, said_in(finished, ToolCall("toolu_a", "bash", "{}")), UserMessage("and?"), result, tools=[BASH]),
        )
    first, own, answer = server.requests[1]["messages"]
    called = {**blocks[3], "input": {"command": "ls"}}
    assert own["content"] == [*blocks[:2], {"type": "text", "text": "b"}, called]  # without "citations": null
    source = {"type": "base64", "media_type": "image/png", "data": "cG5n"}
    assert answer["content"] == [
        {
            "type": "tool_result",
            "tool_use_id": "toolu_a",
            "content": [{"type": "text", "text": "found"}, {"type": "image", "source": source}],
            "is_error": True,
        },
        {"type": "text", "text": "and?", **CACHED},
    ]
    assert first["content"][-1]["cache_control"] == {"type": "ephemeral"}


@pytest.mark.parametrize(
    "data",
    [
        None,
        {"api": "openai-responses", "model": MODEL, "output": []},
        {"api": "anthropic", "model": "claude-opus-5", "content": [thinking("a"), text("I look.")]},
        {"api": "anthropic", "model": MODEL, "content": [tool_use("other", "bash", "{}")]},
        {"api": "anthropic", "model": MODEL},
    ],
    ids=["none", "other API", "other model", "other calls", "damaged"],
)
async def test_a_turn_of_another_model_goes_back_as_text_and_calls(data: Json | None) -> None:
    odd_id = "call/1" + "x" * 80
    said = AssistantMessage("I look.", "thought", (ToolCall(odd_id, "bash", '{"command": "ls"}'),), data)
    async with serving(says(text("done"))) as (provider, server):
        await drained(provider, ask(USER, said, ToolMessage(odd_id, "bash", ""), tools=[BASH]))
    _, own, answer = server.requests[0]["messages"]
    shown, called = own["content"]
    assert shown == {"type": "text", "text": "I look."} and called["input"] == {"command": "ls"}
    assert called["id"] == answer["content"][0]["tool_use_id"] != odd_id
    assert answer["content"][0]["content"] == "(no output)"


@pytest.mark.parametrize(
    "arguments", ['{"command": "l', "[1]", "null", '"ls"', "NaN", "[" * 100_000], ids=lambda a: a[:9]
)
async def test_arguments_that_are_no_object_go_back_as_one(arguments: str) -> None:
    first = says(tool_use("toolu_a", "bash", arguments), stop="max_tokens")
    async with serving(first, says(text("done")), says(text("done"))) as (provider, server):
        deltas, finished = await drained(provider, ask(tools=[BASH]))
        assert calls_of(deltas) == {0: ("toolu_a", "bash", arguments)} and finished.end == "max_tokens"
        call = ToolCall("toolu_a", "bash", arguments)
        for said in (said_in(finished, call), AssistantMessage("", None, (call,))):
            await drained(provider, ask(USER, said, ToolMessage("toolu_a", "bash", "malformed"), tools=[BASH]))
    for request in server.requests[1:]:
        assert request["messages"][1]["content"][0]["input"] == {"malformed_arguments": arguments}


async def test_interleaved_blocks_are_told_apart() -> None:
    blocks = [tool_use("toolu_a", "bash", '{"command": "a"}'), tool_use("toolu_b", "bash", '{"command": "b"}')]
    events = turn(*blocks)
    mixed = chain.from_iterable(zip(begin_block(0, blocks[0]), begin_block(1, blocks[1]), strict=True))
    stops: list[Json] = [{"type": "content_block_stop", "index": at} for at in (1, 0)]
    async with serving(Reply(sse([*events[:2], *mixed, *stops, *events[-2:]]))) as (provider, _):
        deltas, finished = await drained(provider, ask(tools=[BASH]))
    assert calls_of(deltas) == {0: ("toolu_a", "bash", '{"command": "a"}'), 1: ("toolu_b", "bash", '{"command": "b"}')}
    assert finished.provider_data is not None
    assert [block["input"]["command"] for block in finished.provider_data["content"]] == ["a", "b"]


async def test_pings_comments_unknown_events_and_split_bytes_do_not_matter() -> None:
    [start, ping, *rest] = turn(text("größer ✓"), {"type": "new_block", "x": 1})
    odd: list[Json] = [
        ping,
        {"type": "new_event"},
        {"type": "content_block_delta", "index": 0, "delta": {"type": "new_delta"}},
    ]
    whole = b": keep-alive\n\n" + sse([start, *rest[:1], *odd, *rest[1:]])

    async def bytewise() -> AsyncIterator[bytes]:
        for byte in whole:
            yield bytes([byte])

    async with serving(Reply(bytewise())) as (provider, _):
        deltas, finished = await drained(provider, ask())
    assert text_of(deltas) == "größer ✓" and finished.end == "stop"
    assert finished.provider_data is not None and finished.provider_data["content"][1] == {"type": "new_block", "x": 1}


async def test_thoughts_and_texts_are_separated() -> None:
    blocks = [thinking("one"), text("I look."), thinking("two"), text("Do"), text("ne.")]
    async with serving(says(*blocks)) as (provider, _):
        deltas, _ = await drained(provider, ask())
    assert reasoning_of(deltas) == "one\n\ntwo" and text_of(deltas) == "I look.\n\nDone."


async def test_a_call_with_its_input_in_one_piece() -> None:
    block = {**tool_use("toolu_a", "bash", ""), "input": {"command": "ls"}}
    events = turn()
    started: list[Json] = [
        {"type": "content_block_start", "index": 0, "content_block": block},
        {"type": "content_block_stop", "index": 0},
    ]
    async with serving(Reply(sse([*events[:2], *started, *events[-2:]]))) as (provider, _):
        deltas, _ = await drained(provider, ask(tools=[BASH]))
    assert calls_of(deltas) == {0: ("toolu_a", "bash", '{"command": "ls"}')}


async def test_arguments_with_other_property_names_are_mapped_back() -> None:
    tool = ToolSpec("odata", "Query.", {"type": "object", "properties": {"$top": {"type": "integer"}}})
    blocks = [tool_use("toolu_a", "odata", '{"_top": 5}')]
    async with serving(says(*blocks), says(text("done"))) as (provider, server):
        deltas, finished = await drained(provider, ask(tools=[tool]))
        assert calls_of(deltas) == {0: ("toolu_a", "odata", '{"$top": 5}')}
        said = said_in(finished, ToolCall("toolu_a", "odata", '{"$top": 5}'))
        await drained(provider, ask(USER, said, ToolMessage("toolu_a", "odata", "x"), tools=[tool]))
    assert server.requests[1]["messages"][1]["content"][0]["input"] == {"_top": 5}


@pytest.mark.parametrize(
    ("stop", "end"),
    [
        ("end_turn", "stop"),
        ("tool_use", "stop"),
        ("stop_sequence", "stop"),
        ("max_tokens", "max_tokens"),
        ("model_context_window_exceeded", "context"),
        ("refusal", "refused"),
        ("new_reason", "stop"),
    ],
)
async def test_the_reason_for_the_end(stop: str, end: str) -> None:
    async with serving(says(text("half"), stop=stop)) as (provider, _):
        deltas, finished = await drained(provider, ask())
    assert finished.end == end and text_of(deltas) == "half"


async def test_a_turn_that_the_api_pauses_is_continued() -> None:
    first = says(thinking("a"), text("I look."), tool_use("toolu_a", "bash", "{}"), stop="pause_turn")
    second = says(text("Done."), tool_use("toolu_b", "bash", "{}"), usage={"output_tokens": 2, "input_tokens": None})

    def pass_on(body: Json) -> Reply:
        assert [block["type"] for block in body["messages"].pop()["content"]] == ["thinking", "text", "tool_use"]
        return second

    async with serving(first, pass_on) as (provider, _):
        deltas, finished = await drained(provider, ask(tools=[BASH]))
    assert calls_of(deltas).keys() == {0, 1} and text_of(deltas) == "I look.\n\nDone."
    assert finished.usage == TokenCounts(200, 120, 60, 42, 25)
    assert finished.provider_data is not None and len(finished.provider_data["content"]) == 5


async def test_thinking_that_is_cut_off_does_not_go_back() -> None:
    blocks = [thinking("a"), text(" "), thinking("b", ""), thinking("c")]
    async with serving(says(*blocks, stop="max_tokens"), says(text("done"))) as (provider, server):
        _, finished = await drained(provider, ask())
        await drained(provider, ask(USER, said_in(finished), UserMessage("")))
    [message] = server.requests[1]["messages"]
    assert [block["text"] for block in message["content"]] == ["hello", "(empty message)"]


async def test_the_prefixes_of_the_last_two_turns_are_cached() -> None:
    turns = [said for n in range(3) for said in (UserMessage(f"q{n}"), AssistantMessage(f"a{n}"))]
    async with serving(says(text("a")), says(text("b"))) as (provider, server):
        await drained(provider, ask(*turns, UserMessage("now"), tools=[BASH, SEARCH]))
        await drained(provider, ask())
    request, other = server.requests
    marked = [m["content"][-1]["text"] for m in request["messages"] if "cache_control" in m["content"][-1]]
    assert marked == ["q2", "now"]
    assert ["cache_control" in tool for tool in request["tools"]] == [False, True]
    assert "tools" not in other and "system" not in other


@pytest.mark.parametrize(
    ("model", "off", "low", "highest", "max_tokens"),
    [
        ("claude-3-haiku-20240307", None, None, None, 4_096),
        ("claude-3-7-sonnet-20250219", "disabled", 4_096, 32_000, 64_000),
        ("claude-opus-4-20250514", "disabled", 4_096, 16_000, 32_000),
        ("claude-4-opus-20250514", "disabled", 4_096, 16_000, 32_000),
        ("claude-haiku-4-5-20251001", "disabled", 4_096, 32_000, 64_000),
        ("claude-opus-4-5", "disabled", 4_096, 32_000, 64_000),
        ("claude-sonnet-4-6", "disabled", "low", "max", 64_000),
        ("claude-opus-4-7", "disabled", "low", "max", 128_000),
        ("claude-mythos-preview", None, "low", "max", 128_000),
        ("claude-fable-5", None, "low", "max", 128_000),
        ("claude-opus-5", "disabled", "low", "max", 128_000),
        ("claude-opus-5-5", None, "low", "max", 128_000),
        ("claude-sonnet-5-5", "between_tools", "low", "max", 128_000),
        ("claude-haiku-5-5", "disabled", "low", "max", 128_000),
        ("kimi-k2", "disabled", 4_096, 16_000, 32_000),
    ],
)
async def test_thinking_is_that_of_the_model(
    model: str, off: str | None, low: object, highest: object, max_tokens: int
) -> None:
    thinks = highest is not None
    efforts: tuple[Effort, ...] = ("none", "low", "high", "max") if thinks else ("none", "high")
    efforts = efforts[off is None and thinks :]
    async with serving(*[says(text("a"))] * 8, model=model) as (provider, server):
        assert provider.efforts == efforts
        for effort in efforts:
            await drained(provider, ask(effort=effort, think=effort != "none", tools=[BASH]))
        for lacking in {"none", "low", "max"} - set(efforts):
            with pytest.raises(ModelOptionError, match=f"{model} has no effort '{lacking}'; it has "):
                await drained(provider, ask(effort=lacking, think=lacking != "none"))
        await drained(provider, ask(think=False, effort=efforts[-1]))
    *asked, calm = server.requests
    assert all(request["max_tokens"] == max_tokens for request in server.requests)
    if off is not None:
        assert asked.pop(0)["thinking"] == {"type": off} == calm["thinking"]
        assert calm.get("output_config") in (None, {"effort": "high"})
    elif thinks:
        assert calm["thinking"]["type"] == "adaptive" and calm["output_config"]["effort"] == "low"
    if not thinks:
        assert not any("thinking" in request for request in server.requests)
        return
    given = [request["thinking"].get("budget_tokens") or request["output_config"]["effort"] for request in asked]
    assert (given[0], given[-1]) == (low, highest)
    betas = {headers.get("anthropic-beta") for headers in server.headers}
    interleaved = isinstance(low, int) and model != "kimi-k2"
    assert betas == ({"interleaved-thinking-2025-05-14", None} if interleaved else {None})


@pytest.mark.parametrize(
    ("fields", "thinking"),
    [
        ({"max_tokens": 8_000}, {"type": "enabled", "budget_tokens": 4_000}),
        ({"max_tokens": 2_000}, {"type": "disabled"}),
        ({"max_thinking_tokens": 2_000}, {"type": "enabled", "budget_tokens": 2_000}),
        ({"max_thinking_tokens": 1_000}, {"type": "disabled"}),
        ({"sampling": SamplingParams(max_tokens=4_000)}, {"type": "enabled", "budget_tokens": 2_000}),
    ],
)
async def test_a_thinking_budget_fits_the_limits_of_the_turn(fields: Json, thinking: Json) -> None:
    async with serving(says(text("a")), model="claude-haiku-4-5") as (provider, server):
        await drained(provider, ask(**fields))
    assert server.requests[0]["thinking"] == thinking


async def test_an_id_that_the_api_does_not_take_is_changed_in_the_turn_and_its_result() -> None:
    """Other servers of the protocol make such ids."""
    odd = "functions.bash:0"
    async with serving(says(tool_use(odd, "bash", "{}"), stop="tool_use"), says(text("a"))) as (provider, server):
        _, finished = await drained(provider, ask(tools=[BASH]))
        said = said_in(finished, ToolCall(odd, "bash", "{}"))
        await drained(provider, ask(USER, said, ToolMessage(odd, "bash", "x"), tools=[BASH]))
    _, own, answer = server.requests[1]["messages"]
    assert own["content"][-1]["id"] == answer["content"][0]["tool_use_id"] != odd


@pytest.mark.parametrize("after", [(), (UserMessage("And?"),)])
async def test_a_model_with_a_budget_does_not_begin_to_think_between_its_calls(after: tuple[UserMessage, ...]) -> None:
    called, answered = tool_use("toolu_a", "bash", "{}"), ToolMessage("toolu_a", "bash", "x")
    script = [says(called), says(text("a")), says(thinking("b"), called), says(text("a"))]
    async with serving(*script, model="claude-haiku-4-5") as (provider, server):
        for think in (False, True):
            _, finished = await drained(provider, ask(tools=[BASH], think=think))
            said = said_in(finished, ToolCall("toolu_a", "bash", "{}"))
            await drained(provider, ask(USER, said, answered, *after, tools=[BASH]))
    types = [request["thinking"]["type"] for request in server.requests]
    assert types == ["disabled", "disabled", "enabled", "enabled"]


async def test_limits_and_stop_texts_are_sent() -> None:
    sampling = SamplingParams(seed=7, stop=("END",), max_tokens=9)
    async with serving(says(text("a"))) as (provider, server):
        provider.check_sampling(sampling)
        await drained(provider, ask(sampling=sampling, max_tokens=300))
    [request] = server.requests
    assert (request["max_tokens"], request["stop_sequences"]) == (9, ["END"]) and "seed" not in request


@pytest.mark.parametrize("changes", [{"temperature": 0.0}, {"top_p": 0.5}, {"top_k": 3, "min_p": 0.1}], ids=str)
async def test_sampling_parameters_that_the_api_lacks_are_refused(changes: Json) -> None:
    async with serving() as (provider, _):
        with pytest.raises(ModelOptionError, match=f"the API of .* has no {', '.join(changes)}: leave it out"):
            provider.check_sampling(SamplingParams(**changes))


@pytest.mark.parametrize(
    ("schema", "written", "answer"),
    [
        ({"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}, '{"n": 1}', {"n": 1}),
        ({"type": "array", "items": {"type": "integer"}}, '{"value": [1, 2]}', [1, 2]),
    ],
    ids=["object", "array"],
)
async def test_an_answer_with_a_schema(schema: Json, written: str, answer: object) -> None:
    blocks = [text("I think."), thinking("hm"), text(written)]
    async with serving(says(*blocks)) as (provider, server):
        deltas, finished = await drained(provider, ask(sampling=SamplingParams(output_schema=schema)))
    assert json.loads(text_of(deltas)) == answer
    assert server.requests[0]["output_config"]["format"]["schema"]["type"] == "object"
    assert "system" not in server.requests[0]
    assert finished.provider_data is not None and finished.provider_data["content"] == blocks


async def test_a_schema_that_cannot_be_sent_is_shown() -> None:
    schema = {"type": "object", "additionalProperties": {"type": "integer"}}
    async with serving(says(text('{"a": 1}'))) as (provider, server):
        request = ask(SystemMessage("Count."), USER, sampling=SamplingParams(output_schema=schema))
        deltas, _ = await drained(provider, request)
    assert text_of(deltas) == '{"a": 1}' and "format" not in server.requests[0]["output_config"]
    shown = server.requests[0]["system"][-1]["text"]
    assert shown.endswith(json.dumps(schema))


async def test_features_that_the_api_refuses_are_left_out() -> None:
    invalid = "invalid_request_error"
    sampling = SamplingParams(output_schema={"type": "object", "properties": {"n": {"type": "integer"}}})
    script = [
        error(400, invalid, "max_tokens: 128000 > 9000, which is the maximum allowed number of output tokens"),
        error(400, invalid, "thinking.adaptive.display: Extra inputs are not permitted"),
        error(400, invalid, "output_config.format.schema: unsupported"),
        says(text('{"n": 1}')),
    ]
    async with serving(*script) as (provider, server):
        deltas, _ = await drained(provider, ask(sampling=sampling))
    last = server.requests[-1]
    assert text_of(deltas) == '{"n": 1}' and last["max_tokens"] == 9_000 and last["thinking"] == {"type": "adaptive"}
    assert last["output_config"] == {"effort": "high"} and "matches this schema" in last["system"][-1]["text"]


@pytest.mark.parametrize(
    ("model", "refused", "learned"),
    [
        ("claude-haiku-4-5", "enabled", {"type": "adaptive"}),
        ("claude-haiku-5-5", "disabled", {"type": "adaptive", "display": "summarized"}),
    ],
)
async def test_a_way_to_think_that_the_model_refuses_is_not_used_again(model: str, refused: str, learned: Json) -> None:
    said = f'"thinking.type.{refused}" is not supported for this model. Use "thinking.type.adaptive".'

    def refuse(body: Json) -> Reply:
        return error(400, "invalid_request_error", said) if body["thinking"]["type"] == refused else says(text("a"))

    async with serving(refuse, refuse, refuse, checks=False, model=model) as (provider, server):
        await drained(provider, ask(think=refused == "enabled"))
        other = Anthropic(model, base_url=f"http://{provider.host}", api_key=KEY, like=provider)
        await drained(other, ask(think=refused == "enabled"))
        await other.aclose()
    assert [request["thinking"] for request in server.requests[1:]] == [learned] * 2


@pytest.mark.parametrize(
    ("reply", "kind", "said"),
    [
        (
            error(401, "authentication_error", f"invalid x-api-key {KEY[:9]}"),
            ApiKeyError,
            "key .request req_1.: check ANTH",
        ),
        (
            error(403, "permission_error", "no"),
            ApiKeyError,
            f"HTTP 403: no .*and that the key may use {MODEL}",
        ),
        (error(402, "billing_error", "pay"), ApiError, "HTTP 402: pay"),
        (
            error(404, "not_found_error", f"model: {MODEL}"),
            UnknownModelError,
            f"has no model '{MODEL}' .request req_1.",
        ),
        (Reply(b"<html>not here</html>", 404, {"content-type": "text/html"}), ApiError, "HTTP 404.*check the base URL"),
        (Reply(b"", 307, {"location": "http://127.0.0.1:9/"}), ApiError, "HTTP 307.*check the base URL"),
        (error(400, "invalid_request_error", "prompt is too long: 2 tokens > 1 maximum"), ContextFullError, "too long"),
        (
            error(400, "invalid_request_error", "input length and `max_tokens` exceed context limit"),
            ContextFullError,
            "exceed",
        ),
        (error(413, "request_too_large", "too large"), ContextFullError, "HTTP 413"),
        (
            error(400, "invalid_request_error", f"bad {KEY}\nrequest"),
            ApiError,
            r"bad \[key\] request \(request req_1\)",
        ),
        (Reply(b"<html>hi</html>", 200, {"content-type": "text/html"}), ApiError, "text/html.*is not the base URL"),
        (Reply.of_json({"hello": 1}), ApiError, "sent application/json.*of an Anthropic-compatible API"),
        (Reply(b""), ApiError, "sent an empty stream.*is not the base URL"),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else None,
)
async def test_errors_that_do_not_pass(
    reply: Reply, kind: type[Exception], said: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    async with serving(reply) as (provider, server):
        with pytest.raises(kind, match=said) as caught:
            await drained(provider, ask())
        assert KEY not in repr(provider.__dict__)
    assert len(server.requests) == 1 and KEY[:9] not in str(caught.value) and "\n" not in str(caught.value)
    assert KEY not in caplog.text


WRONG_DELTA = {"type": "content_block_delta", "index": 0, "delta": {"type": "input_json_delta", "partial_json": "{"}}


def failing(kind: str) -> Reply:
    """Return a reply whose stream breaks off with an error event."""
    failure = {"type": "error", "error": {"type": kind, "message": "oops"}, "request_id": "req_1"}
    return Reply(sse([*turn(text("half"))[:4], failure]))


@pytest.mark.parametrize(
    ("reply", "said", "wait_s"),
    [
        (error(429, "rate_limit_error", "slow down", {"retry-after": "3"}), "HTTP 429: slow down", 3.0),
        (error(529, "overloaded_error", "Overloaded"), "HTTP 529: Overloaded .request req_1.", None),
        (error(500, "api_error", "oops"), "HTTP 500", None),
        (error(504, "timeout_error", "late"), "HTTP 504", None),
        (Reply(b"<html>", 502, {"content-type": "text/html"}), "HTTP 502", None),
        (failing("overloaded_error"), "oops", None),
        (failing("api_error"), "oops", None),
        (Reply(sse(turn(text("half"))[:-1])), "ended the stream before its last event", None),
        (Reply(sse(turn(text("half"), stop="pause_turn")[:-1])), "ended the stream before its last event", None),
        (Reply(sse(turn(text("half"))[:4]), cut=True), "broke|no connection", None),
        (Reply(b"", cut=True), "broke|no connection", None),
        (Reply(b"event: message_start\ndata: {not json\n\n"), "not JSON", None),
        (Reply(b"event: message_start\ndata: [1]\n\n"), "not a JSON object", None),
        (Reply(b"event: message_start\ndata: \xff\n\n"), "not JSON", None),
        (Reply(b'event: message_start\ndata: {"no": "type"}\n\n'), "malformed event", None),
        (Reply(sse([{"type": "message_stop"}])), "malformed event of type 'message_stop'", None),
        (
            Reply(sse([{"type": "content_block_start", "index": 0, "content_block": {"type": "tool_use"}}])),
            "malf",
            None,
        ),
        (Reply(sse([{"type": "content_block_delta", "index": 3, "delta": {"type": "text_delta"}}])), "malformed", None),
        (Reply(sse([*begin_block(0, text("a")), WRONG_DELTA])), "malformed event of type 'content_block_delta'", None),
    ],
    ids=str,
)
async def test_errors_that_may_pass(reply: Reply, said: str, wait_s: float | None) -> None:
    async with serving(reply) as (provider, _):
        with pytest.raises(TransientError, match=said) as caught:
            await drained(provider, ask())
    assert caught.value.retry_after_s == wait_s and "\n" not in caught.value.reason
    assert caught.value.status == (reply.status if reply.status != 200 else None)


async def test_an_error_inside_a_stream_that_does_not_pass() -> None:
    async with serving(failing("invalid_request_error")) as (provider, _):
        with pytest.raises(ApiError, match=r"oops \(request req_1\)"):
            await drained(provider, ask())


async def test_a_silent_server_times_out() -> None:
    release = anyio.Event()

    async def silent() -> AsyncIterator[bytes]:
        yield sse(turn(text("half"))[:4])
        await release.wait()

    async with serving(Reply(silent()), timeout_s=0.2) as (provider, _):
        with pytest.raises(TransientError, match=r"sent nothing for 0\.2 s"):
            await drained(provider, ask())
        release.set()


async def test_leaving_a_stream_closes_the_connection() -> None:
    gone = anyio.Event()

    async def answer(request: Request) -> Reply:
        async def endless() -> AsyncIterator[bytes]:
            yield sse(turn(text("half"))[:4])
            await request.disconnected()
            gone.set()

        return Reply(endless())

    async with serve(answer) as url:
        provider = Anthropic(MODEL, base_url=url, api_key=KEY)
        async with aclosing(provider.stream(ask())) as stream:
            assert await anext(stream) == TextChunk("ha")
        with anyio.fail_after(5):
            await gone.wait()
        await provider.aclose()


async def test_a_base_url_may_end_in_v1() -> None:
    server = AnthropicServer(says(text("a")))
    async with server.running() as url:
        provider = Anthropic(MODEL, base_url=f"{url}/v1/", api_key=KEY)
        await drained(provider, ask())
        await provider.aclose()
    assert len(server.requests) == 1


def test_a_missing_key_is_refused_before_any_request(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ANTHROPIC_API_KEY", raising=False)
    with pytest.raises(ApiKeyError, match="there is no key: set ANTHROPIC_API_KEY"):
        Anthropic(MODEL)
    monkeypatch.setenv("ANTHROPIC_API_KEY", KEY)
    assert Anthropic(MODEL).host == "api.anthropic.com"


def test_the_events_of_the_fake_server_are_those_of_the_sdk() -> None:
    from anthropic.types import RawMessageStreamEvent

    kind = Strictly(RawMessageStreamEvent)
    for event in turn(thinking("a"), text("b"), tool_use("c", "d", "{}"), {"type": "redacted_thinking", "data": "e"}):
        if event["type"] != "ping":  # the SDK drops it
            kind.check(event)
