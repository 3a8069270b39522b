"""The client of OpenAI's Responses API, against a server that checks each request with the SDK's types."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from dataclasses import replace
from itertools import chain

import anyio
import pytest
from asking import USER, ask, calls_of, drained, reasoning_of, text_of
from servers.http import Reply, Request, serve
from servers.responses import (
    Json,
    ResponsesServer,
    Script,
    begin_item,
    call,
    error,
    item_events,
    message,
    numbered,
    reasoning,
    refusal,
    response,
    says,
    sse,
    turn,
)
from servers.validation import Strictly

from agentkit import AssistantMessage, SystemMessage, ToolMessage, UserMessage
from agentkit.errors import (
    ApiError,
    ApiKeyError,
    ContextFullError,
    MissingDependencyError,
    ModelOptionError,
    UnknownModelError,
)
from agentkit.model import Effort
from agentkit.models.remote.openai_responses import OpenAIResponses
from agentkit.models.remote.provider import StreamFinished, TextChunk, TokenCounts, ToolSpec, TransientError
from agentkit_engine.sampling_params import SamplingParams
from agentkit_tools import BUILTINS, ImagePart, TextPart, ToolCall

pytestmark = pytest.mark.anyio

KEY = "sk-secret-1234"
SEARCH = ToolSpec("search", "Search files.", BUILTINS["search"].parameters)
BASH = ToolSpec("bash", "Run a command.", BUILTINS["bash"].parameters)
ANY = ToolSpec("any", "Take anything.", {"type": "object", "additionalProperties": True})


@asynccontextmanager
async def serving(
    *script: Script, model: str = "gpt-5.2", timeout_s: float = 20.0
) -> AsyncIterator[tuple[OpenAIResponses, ResponsesServer]]:
    server = ResponsesServer(*script)
    async with server.running() as url:
        provider = OpenAIResponses(model, base_url=url, api_key=KEY, timeout_s=timeout_s)
        try:
            yield provider, server
        finally:
            await provider.aclose()


async def test_a_turn_with_reasoning_text_and_parallel_calls() -> None:
    items = [
        reasoning("First I look."),
        message("Let me see."),
        call("call_a", "search", '{"pattern": "x", "path": null}'),
        call("call_b", "bash", '{"command": "ls"}'),
    ]
    async with serving(says(*items)) as (provider, server):
        deltas, finished = await drained(provider, ask(SystemMessage("Be brief."), USER, tools=[SEARCH, BASH]))
    assert reasoning_of(deltas) == "First I look."
    assert text_of(deltas) == "Let me see."
    assert calls_of(deltas) == {
        0: ("call_a", "search", '{"pattern": "x"}'),  # an optional parameter that is null is absent
        1: ("call_b", "bash", '{"command": "ls"}'),
    }
    counts = TokenCounts(100, 60, 30, 40, 25)
    data = {"api": "openai-responses", "model": "gpt-5.2", "output": items}
    assert finished == StreamFinished("stop", counts, data)
    [request] = server.requests
    assert request["instructions"] == "Be brief."
    assert request["input"] == [{"type": "message", "role": "user", "content": "hello"}]
    assert request["reasoning"] == {"effort": "high", "summary": "auto"}
    assert request["include"] == ["reasoning.encrypted_content"]
    assert [tool["strict"] for tool in request["tools"]] == [True, True]
    assert server.headers[0]["authorization"] == f"Bearer {KEY}"


def without_nulls(item: Json) -> Json:
    """Return the item as the API takes it back."""
    return {key: value for key, value in item.items() if value is not None}


async def test_a_turn_goes_back_unchanged_with_the_results_of_its_calls() -> None:
    items = [reasoning("", encrypted="secret thoughts"), call("call_a", "search", '{"pattern": "x", "path": null}')]
    async with serving(says(*items), says(message("done"))) as (provider, server):
        _, finished = await drained(provider, ask(tools=[SEARCH]))
        said = AssistantMessage(
            "",
            None,
            (ToolCall("call_a", "search", '{"pattern": "x"}'),),
            json.loads(json.dumps(finished.provider_data)),
        )
        image = ImagePart.of(b"png", "image/png")
        result = ToolMessage("call_a", "search", "text", parts=(TextPart("found"), image))
        await drained(provider, ask(USER, said, result, tools=[SEARCH]))
    user, *own, output = server.requests[1]["input"]
    assert user["role"] == "user" and own == [without_nulls(item) for item in items]
    assert output["output"] == [
        {"type": "input_text", "text": "found"},
        {"type": "input_image", "detail": "auto", "image_url": "data:image/png;base64,cG5n"},
    ]


@pytest.mark.parametrize(
    "data",
    [
        None,
        {"api": "anthropic", "model": "gpt-5.2", "content": []},
        {"api": "openai-responses", "model": "o3", "output": [reasoning("")]},
        {"api": "openai-responses", "model": "gpt-5.2", "output": [call("other", "bash", "{}")]},
        {"api": "openai-responses", "model": "gpt-5.2"},
    ],
    ids=["none", "other API", "other model", "other calls", "damaged"],
)
async def test_a_turn_of_another_model_goes_back_as_text_and_calls(data: Json | None) -> None:
    odd_id = "toolu/" + "x" * 80
    said = AssistantMessage("I look.", "thought", (ToolCall(odd_id, "bash", '{"comm'),), data)
    async with serving(says(message("done"))) as (provider, server):
        await drained(provider, ask(USER, said, ToolMessage(odd_id, "bash", "broken"), tools=[BASH]))
    _, text, called, output = server.requests[0]["input"]
    assert text == {"type": "message", "role": "assistant", "content": "I look."}
    assert called["arguments"] == '{"comm' and called["call_id"] == output["call_id"] != odd_id


async def test_interleaved_calls_are_told_apart() -> None:
    items = [call("call_a", "any", '{"a": 1}'), call("call_b", "any", '{"b": null}')]
    first, second = begin_item(0, items[0]), begin_item(1, items[1])
    mixed = chain.from_iterable(zip(first, second, strict=True))
    done = [item_events(1, items[1])[-1], item_events(0, items[0])[-1]]
    async with serving(Reply(sse([*mixed, *done, turn()[-1]]))) as (provider, _):
        deltas, finished = await drained(provider, ask(tools=[ANY]))
    assert calls_of(deltas) == {0: ("call_a", "any", '{"a": 1}'), 1: ("call_b", "any", '{"b": null}')}
    assert finished.provider_data is not None and finished.provider_data["output"] == items


async def test_comments_unknown_events_and_split_bytes_do_not_matter() -> None:
    odd: list[Json] = [
        {"type": "response.queued", "response": response("queued")},
        {"type": "response.new_thing", "x": 1},
    ]
    whole = b": keep-alive\n\n" + sse(odd) + sse(turn(message("größer ✓"))) + b": end\n\n"

    async def bytewise() -> AsyncIterator[bytes]:
        for byte in whole:
            yield bytes([byte])

    async with serving(Reply(bytewise())) as (provider, _):
        deltas, finished = await drained(provider, ask())
    assert text_of(deltas) == "größer ✓" and finished.end == "stop"


async def test_several_messages_and_summaries_are_separated() -> None:
    thoughts = {**reasoning("one"), "summary": [{"type": "summary_text", "text": text} for text in ("one", "two")]}
    items = [thoughts, reasoning("three", id="rs_2"), message("I look."), message("Done.", id="msg_2")]
    async with serving(says(*items)) as (provider, _):
        deltas, _ = await drained(provider, ask())
    assert reasoning_of(deltas) == "one\n\ntwo\n\nthree"
    assert text_of(deltas) == "I look.\n\nDone."


@pytest.mark.parametrize(
    ("last", "item", "end"),
    [
        (
            {"status": "incomplete", "incomplete_details": {"reason": "max_output_tokens"}},
            message("half"),
            "max_tokens",
        ),
        ({"status": "incomplete", "incomplete_details": {"reason": "content_filter"}}, message("half"), "refused"),
        ({}, refusal("I cannot."), "refused"),
        ({"usage": None}, message("half"), "stop"),
    ],
    ids=["max_tokens", "filter", "refusal", "no usage"],
)
async def test_the_reason_for_the_end(last: Json, item: Json, end: str) -> None:
    async with serving(says(item, **last)) as (provider, _):
        deltas, finished = await drained(provider, ask())
    assert finished.end == end and text_of(deltas) in ("half", "I cannot.")


async def test_a_turn_that_is_cut_off_in_its_reasoning_goes_back_without_it() -> None:
    cut = {"status": "incomplete", "incomplete_details": {"reason": "max_output_tokens"}}
    async with serving(says(reasoning("hm"), **cut), says(message("done"))) as (provider, server):
        _, finished = await drained(provider, ask())
        await drained(provider, ask(USER, AssistantMessage("", "hm", (), finished.provider_data), UserMessage("go on")))
    assert finished.provider_data is not None and finished.provider_data["output"] == []
    assert [item["content"] for item in server.requests[1]["input"]] == ["hello", "go on"]


@pytest.mark.parametrize("tool", [SEARCH, ANY], ids=["mapped", "streamed"])
async def test_a_call_that_is_cut_off_keeps_its_text(tool: ToolSpec) -> None:
    cut = response("incomplete", incomplete_details={"reason": "max_output_tokens"})
    begun = begin_item(0, call("call_a", tool.name, '{"pattern": "abc'))
    events = [*begun, {"type": "response.incomplete", "response": cut}]
    async with serving(Reply(sse(events)), says(message("done"))) as (provider, server):
        deltas, finished = await drained(provider, ask(tools=[tool]))
        [(id, name, arguments)] = calls_of(deltas).values()
        assert (id, name, arguments, finished.end) == ("call_a", tool.name, '{"pattern": "abc', "max_tokens")
        said = AssistantMessage("", None, (ToolCall("call_a", tool.name, arguments),), finished.provider_data)
        await drained(provider, ask(USER, said, ToolMessage("call_a", tool.name, "broken"), tools=[tool]))
    assert server.requests[1]["input"][1]["arguments"] == '{"pattern": "abc'


@pytest.mark.parametrize(
    ("model", "efforts"),
    [
        ("gpt-4o", {"none": None, "high": None}),
        ("gpt-4.1-mini", {"none": None, "high": None}),
        ("gpt-5-chat-latest", {"none": None, "high": None}),
        ("ft:gpt-4.1-2025-04-14:org::id", {"none": None, "high": None}),
        ("o3", {"low": "low", "high": "high"}),
        ("o4-mini-2025-04-16", {"low": "low", "high": "high"}),
        ("gpt-5", {"none": "minimal", "low": "low", "high": "high"}),
        ("gpt-5-mini-2025-08-07", {"none": "minimal", "low": "low", "high": "high"}),
        ("gpt-5-pro", {"high": "high"}),
        ("gpt-5-codex", {"low": "low", "high": "high"}),
        ("gpt-5.1-codex-max", {"low": "low", "high": "high", "max": "xhigh"}),
        ("gpt-5.1", {"none": "none", "low": "low", "high": "high"}),
        ("gpt-5.2-pro", {"high": "high", "max": "xhigh"}),
        ("gpt-5.4-mini", {"none": "none", "low": "low", "high": "high", "max": "xhigh"}),
        ("gpt-5.6-sol", {"none": "none", "low": "low", "high": "high", "max": "max"}),
        ("gpt-6-astra", {"low": "low", "high": "high", "max": "max"}),
        ("gpt-6.1-sol", {"none": "none", "low": "low", "high": "high", "max": "max"}),
        ("some-new-model", {"none": "none", "low": "low", "high": "high", "max": "max"}),
    ],
)
async def test_efforts_are_mapped_to_those_of_the_model(model: str, efforts: dict[Effort, str | None]) -> None:
    async with serving(*[says(message("a"))] * 4, model=model) as (provider, server):
        assert provider.efforts == tuple(efforts)
        for effort in efforts:
            await drained(provider, ask(effort=effort, think=effort != "none"))
        for lacking in {"none", "low", "high", "max"} - set(efforts):
            with pytest.raises(ModelOptionError, match=f"{model} has no effort '{lacking}'; it has "):
                await drained(provider, ask(effort=lacking, think=lacking != "none"))
    sent = [request.get("reasoning", {}).get("effort") for request in server.requests]
    assert sent == list(efforts.values())


async def test_a_turn_that_does_not_think_has_the_least_effort() -> None:
    async with serving(says(message("a")), model="o3") as (provider, server):
        await drained(provider, ask(think=False))
    assert server.requests[0]["reasoning"]["effort"] == "low"


async def test_sampling_parameters_are_sent_where_the_model_has_them() -> None:
    sampling = SamplingParams(temperature=0.2, top_p=0.9, seed=7, max_tokens=9)
    async with serving(*[says(message("a"))] * 2, model="gpt-4.1") as (provider, server):
        provider.check_sampling(sampling)
        await drained(provider, ask(sampling=sampling, max_tokens=300))
        await drained(provider, ask())
    given, default = server.requests
    assert (given["temperature"], given["top_p"], given["max_output_tokens"]) == (0.2, 0.9, 16)
    assert not {"temperature", "top_p", "max_output_tokens", "seed"} & default.keys()


@pytest.mark.parametrize(
    ("model", "changes", "named"),
    [
        ("gpt-4.1", {"top_k": 5, "stop": ("a",)}, "gpt-4.1 at .* has no top_k, stop"),
        ("gpt-4.1", {"logit_bias": {1: 2.0}, "min_p": 0.1}, "has no min_p, logit_bias"),
        ("o3", {"temperature": 0.0}, "o3 at .* has no temperature"),
        ("gpt-6-sol", {"top_p": 0.5}, "has no top_p"),
    ],
)
async def test_sampling_parameters_that_the_model_lacks_are_refused(model: str, changes: Json, named: str) -> None:
    async with serving(model=model) as (provider, _):
        with pytest.raises(ModelOptionError, match=named):
            provider.check_sampling(SamplingParams(**changes))


async def test_a_temperature_is_refused_while_the_model_reasons() -> None:
    request = ask(sampling=SamplingParams(temperature=0.5))
    async with serving(says(message("a"))) as (provider, server):
        with pytest.raises(ModelOptionError, match='takes temperature only with effort "none"'):
            await drained(provider, request)
        await drained(provider, replace(request, think=False, effort="none"))
    assert server.requests[0]["temperature"] == 0.5


@pytest.mark.parametrize(
    ("schema", "written", "answer"),
    [
        (
            {"type": "object", "properties": {"n": {"type": "integer"}, "why": {"type": "string"}}, "required": ["n"]},
            '{"n": 1, "why": null}',
            {"n": 1},
        ),
        ({"type": "array", "items": {"type": "integer"}}, '{"value": [1, 2]}', [1, 2]),
        ({"type": "object", "additionalProperties": {"type": "integer"}}, '{"a": 1}', {"a": 1}),
    ],
    ids=["object", "array", "map"],
)
async def test_an_answer_with_a_schema(schema: Json, written: str, answer: object) -> None:
    items = [message("I think.", id="msg_0"), message(written)]
    async with serving(says(*items)) as (provider, server):
        deltas, finished = await drained(provider, ask(sampling=SamplingParams(output_schema=schema)))
    assert json.loads(text_of(deltas)) == answer
    assert server.requests[0]["text"]["format"]["strict"] is ("additionalProperties" not in schema)
    assert finished.provider_data is not None and finished.provider_data["output"] == items


async def test_what_the_api_refuses_is_left_out() -> None:
    said = AssistantMessage(
        "Hi.", None, (), {"api": "openai-responses", "model": "gpt-5.2", "output": [message("Hi.")]}
    )
    schema = {"type": "object", "properties": {"n": {"type": "integer"}}}
    script = [
        error(400, "Invalid schema for function 'search': In context=('properties', 'path')", code="invalid_function"),
        error(400, "Invalid schema for response_format 'answer': no", code="invalid_json_schema"),
        error(400, "Your organization must be verified to generate reasoning summaries."),
        error(400, "The encrypted content for item rs_1 could not be verified.", code="invalid_encrypted_content"),
        says(message("{}")),
        says(message("{}")),
    ]
    request = ask(USER, said, USER, tools=[SEARCH, BASH], sampling=SamplingParams(output_schema=schema))
    async with serving(*script) as (provider, server):
        await drained(provider, request)
        other = OpenAIResponses("gpt-5.2", base_url=f"http://{provider.host}/v1", api_key=KEY, like=provider)
        await drained(other, request)
        await other.aclose()
    *_, first, second = server.requests
    assert len(server.requests) == 6
    for sent in (first, second):
        assert [tool["strict"] for tool in sent["tools"]] == [False, True] and "summary" not in sent["reasoning"]
        assert sent["tools"][0]["parameters"] == BUILTINS["search"].parameters
        assert sent["text"]["format"]["strict"] is False
    assert first["input"][1] == {"type": "message", "role": "assistant", "content": "Hi."}
    assert second["input"][1] == message("Hi.")


@pytest.mark.parametrize(
    ("reply", "kind", "text"),
    [
        (
            error(401, f"Incorrect API key provided: {KEY}"),
            ApiKeyError,
            "refuses the key .request req_1.: check OPENAI",
        ),
        (
            error(403, "Country not supported"),
            ApiKeyError,
            "HTTP 403: Country not .*check OPENAI_API_KEY, and that the key may use",
        ),
        (error(404, "no", code="model_not_found"), UnknownModelError, "has no model 'gpt-5.2'"),
        (error(400, "no", code="model_not_found"), UnknownModelError, "has no model 'gpt-5.2'"),
        (Reply(b"<html>not here</html>", 404, {"content-type": "text/html"}), ApiError, "HTTP 404.*check the base URL"),
        (Reply(b"", 307, {"location": "http://127.0.0.1:9/v1"}), ApiError, "HTTP 307.*check the base URL"),
        (error(400, "no", code="context_length_exceeded"), ContextFullError, "HTTP 400"),
        (error(413, "too large"), ContextFullError, "HTTP 413"),
        (error(429, "You exceeded your quota", code="insufficient_quota"), ApiError, "exceeded your quota"),
        (error(400, f"bad {KEY}\nrequest"), ApiError, r"HTTP 400: bad \[key\] request \(request req_1\)"),
        (Reply(b"<html>hi</html>", 200, {"content-type": "text/html"}), ApiError, "text/html.*is not the base URL"),
        (Reply.of_json({"hello": 1}), ApiError, "sent application/json.*is not the base URL of an OpenAI-compatible"),
        (Reply(b""), ApiError, "sent an empty stream.*is not the base URL"),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else None,
)
async def test_errors_that_do_not_pass(
    reply: Reply, kind: type[Exception], text: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    async with serving(reply) as (provider, server):
        with pytest.raises(kind, match=text) as caught:
            await drained(provider, ask())
        assert KEY not in repr(provider.__dict__)
    assert len(server.requests) == 1 and KEY[:5] not in str(caught.value) and "\n" not in str(caught.value)
    assert KEY not in caplog.text


FAILED = {"type": "response.failed", "response": response("failed", error={"code": "server_error", "message": "oops"})}


@pytest.mark.parametrize(
    ("reply", "text", "wait_s"),
    [
        (error(429, "slow down", headers={"retry-after": "3"}), "HTTP 429: slow down", 3.0),
        (error(429, "slow down", headers={"retry-after-ms": "1500"}), "slow down", 1.5),
        (error(429, "slow down", headers={"retry-after": "Mon, 01 Jan 2001 00:00:00 GMT"}), "slow down", 0.0),
        (error(429, "slow down", headers={"retry-after": "soon"}), "slow down", None),
        (error(500, "oops"), "HTTP 500: oops", None),
        (Reply(b"<html>", 502, {"content-type": "text/html"}), "HTTP 502", None),
        (error(408, "timeout"), "HTTP 408", None),
        (Reply(sse(turn(message("half"))[:-2])), "ended the stream before its last event", None),
        (Reply(sse(turn(message("half"))[:-2]), cut=True), "broke|no connection", None),
        (Reply(b"", cut=True), "broke|no connection", None),
        (Reply(sse([FAILED])), "oops", None),
        (Reply(sse([{"type": "error", "code": None, "message": "overloaded", "param": None}])), "overloaded", None),
        (Reply(b'event: error\ndata: {"error": {"message": "busy", "type": "server_error"}}\n\n'), "busy", None),
        (Reply(b"data: {not json\n\n"), "not JSON", None),
        (Reply(b"data: [1]\n\n"), "not a JSON object", None),
        (Reply(b"data: \xff\xfe\n\n"), "not JSON", None),
        (Reply(b'data: {"no": "type"}\n\n'), "malformed event", None),
        (
            Reply(sse([{"type": "response.output_text.delta", "delta": 5}])),
            "malformed event of type 'response.out",
            None,
        ),
        (
            Reply(sse([{"type": "response.function_call_arguments.delta", "output_index": 4, "delta": "{"}])),
            "malformed event",
            None,
        ),
        (
            Reply(sse([{"type": "response.output_item.added", "output_index": 0, "item": {"type": "function_call"}}])),
            "malformed event",
            None,
        ),
    ],
    ids=str,
)
async def test_errors_that_may_pass(reply: Reply, text: str, wait_s: float | None) -> None:
    async with serving(reply) as (provider, _):
        with pytest.raises(TransientError, match=text) as caught:
            await drained(provider, ask())
    assert caught.value.retry_after_s == wait_s and "\n" not in caught.value.reason
    assert caught.value.status == (reply.status if reply.status != 200 else None)


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        ({"code": "invalid_prompt", "message": "no"}, ApiError),
        ({"code": "context_length_exceeded", "message": "no"}, ContextFullError),
        ({"code": "insufficient_quota", "message": "no"}, ApiError),
    ],
)
async def test_errors_inside_a_stream_that_do_not_pass(error: Json, kind: type[Exception]) -> None:
    events = turn(message("half"))[:-1]
    async with serving(
        Reply(sse([*events, {"type": "response.failed", "response": response("failed", error=error)}]))
    ) as (
        provider,
        _,
    ):
        with pytest.raises(kind):
            await drained(provider, ask())


async def test_a_silent_server_times_out() -> None:
    release = anyio.Event()

    async def silent() -> AsyncIterator[bytes]:
        yield sse(turn(message("half"))[:3])
        await release.wait()

    async with serving(Reply(silent()), timeout_s=0.2) as (provider, _):
        with pytest.raises(TransientError, match=r"sent nothing for 0\.2 s"):
            await drained(provider, ask())
        release.set()


async def test_an_unreachable_host_may_come_back() -> None:
    async with serve(never) as url:
        pass
    provider = OpenAIResponses("gpt-5", base_url=f"{url}/v1", api_key=KEY)
    with pytest.raises(TransientError, match=f"no connection to {provider.host}"):
        await drained(provider, ask())
    await provider.aclose()


async def never(request: Request) -> Reply:
    raise AssertionError


async def test_a_redirect_is_not_followed() -> None:
    async with serve(never) as other, serving(Reply(b"", 308, {"location": f"{other}/v1/responses"})) as (provider, _):
        with pytest.raises(ApiError, match="HTTP 308"):
            await drained(provider, ask())


async def test_leaving_a_stream_closes_the_connection() -> None:
    gone = anyio.Event()

    async def answer(request: Request) -> Reply:
        async def endless() -> AsyncIterator[bytes]:
            yield sse(turn(message("half"))[:3])
            await request.disconnected()
            gone.set()

        return Reply(endless())

    async with serve(answer) as url:
        provider = OpenAIResponses("gpt-5", base_url=f"{url}/v1", api_key=KEY)
        async with aclosing(provider.stream(ask())) as stream:
            assert await anext(stream) == TextChunk("ha")
        with anyio.fail_after(5):
            await gone.wait()
        await provider.aclose()


async def test_a_server_that_does_not_close_the_stream_does_not_hold_up_the_turn() -> None:
    release = anyio.Event()

    async def open_end() -> AsyncIterator[bytes]:
        yield sse(turn(message("done")))
        await release.wait()

    async with serving(Reply(open_end())) as (provider, _):
        deltas, _ = await drained(provider, ask())
        assert text_of(deltas) == "done"
        release.set()


async def test_text_that_utf8_does_not_have_is_sent_with_a_replacement() -> None:
    async with serving(says(message("a"))) as (provider, server):
        await drained(provider, ask(UserMessage("a\ud800b")))
    assert server.requests[0]["input"][0]["content"] == "a?b"


async def test_a_client_can_be_used_again_after_it_was_closed() -> None:
    async with serving(says(message("a")), says(message("b"))) as (provider, server):
        await drained(provider, ask())
        await provider.aclose()
        await drained(provider, ask())
    assert len(server.requests) == 2


def test_a_client_can_be_used_from_one_event_loop_after_another() -> None:
    provider = OpenAIResponses("gpt-5", base_url="http://127.0.0.1:1/v1", api_key=KEY)

    async def run() -> None:
        with pytest.raises(TransientError):
            await drained(provider, ask())
        await provider.aclose()

    anyio.run(run)
    anyio.run(run)


@pytest.mark.parametrize("key", ["", "   ", "sk-ä", "sk a", "sk\na"])
def test_a_missing_or_damaged_key_is_refused_before_any_request(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ApiKeyError, match="OPENAI_API_KEY") as caught:
        OpenAIResponses("gpt-5", api_key=key)
    assert not key.strip() or key not in str(caught.value)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with pytest.raises(ApiKeyError, match="there is no key: set OPENAI_API_KEY"):
        OpenAIResponses("gpt-5")


def test_a_missing_sdk_is_named_with_the_command_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(MissingDependencyError, match=r'pip install "agentkit-harness\[api\]"'):
        OpenAIResponses("gpt-5", api_key=KEY)


def test_the_key_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", f"{KEY}\n")
    provider = OpenAIResponses("gpt-5")
    assert provider.host == "api.openai.com" and KEY not in repr(provider)


@pytest.mark.parametrize("url", ["api.openai.com", "ftp://a/v1", "http://", "https://user:pass@a/v1"])
def test_a_base_url_that_is_none_is_refused(url: str) -> None:
    with pytest.raises(ValueError, match="base_url must be an http or https URL"):
        OpenAIResponses("gpt-5", base_url=url, api_key=KEY)


def test_the_events_of_the_fake_server_are_those_of_the_sdk() -> None:
    from openai.types.responses import ResponseStreamEvent

    events = turn(reasoning("a"), message("b"), refusal("c"), call("d", "e", "{}"))
    events += numbered([FAILED, {"type": "error", "code": None, "message": "m", "param": None}])
    kind = Strictly(ResponseStreamEvent)
    for event in events:
        kind.check(event)
