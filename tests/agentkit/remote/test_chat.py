"""Chat Completions over a socket: an agent runs on any server that speaks the protocol."""

from __future__ import annotations

import json
from collections.abc import Mapping
from traceback import format_exception
from typing import Any

import anyio
import pytest
from servers import chat
from servers.chat import DEEPSEEK, Answer, ChatServer, calls, chunk, event, stream, text
from servers.http import Reply

from agentkit import (
    Agent,
    ApiError,
    ApiKeyError,
    AssistantMessage,
    Compacted,
    Compaction,
    ImagePart,
    Limits,
    ModelOptionError,
    RemoteModel,
    Retried,
    RunResult,
    SamplingParams,
    TokenSegment,
    UnknownModelError,
    tool,
)
from agentkit_environments import Environment
from agentkit_tools import ToolOutput

pytestmark = pytest.mark.anyio

KEY = "sk-secret-0123456789"
PARIS = '{"city": "Paris"}'


@tool(read_only=True)
def get_weather(city: str, days: int = 1) -> str:
    """Return the weather of a city."""
    return {"Paris": "sunny", "Oslo": "snowy"}.get(city, "unknown")


@tool
def picture(name: str) -> ToolOutput:
    """Take a picture."""
    return ToolOutput(parts=(ImagePart.of(b"pixels", "image/png"),))


async def run(server: ChatServer, environment: Environment, *, model: str = "openai:toy", **options: Any) -> RunResult:
    tools, task = options.pop("tools", [get_weather]), options.pop("task", "Weather?")
    settings = {name: options.pop(name) for name in ("max_retries", "timeout_s", "context_tokens") if name in options}
    async with server.serve() as url:
        agent = Agent(RemoteModel(model, base_url=url, api_key=KEY, **settings), tools, **options)
        try:
            return await agent.run(task, environment=environment)
        except Exception as exc:  # raised outside, because the server's task group would wrap it
            error = exc
    raise error


def retries(result: RunResult) -> list[Retried]:
    return [record for record in result.trajectory.records if isinstance(record, Retried)]


async def test_a_run_with_parallel_calls_reasoning_and_usage(environment: Environment) -> None:
    usage = {
        "prompt_tokens": 50,
        "completion_tokens": 30,
        "total_tokens": 80,
        "prompt_tokens_details": {"cached_tokens": 40},
        "completion_tokens_details": {"reasoning_tokens": 12},
    }
    oslo = '{"city": "Oslo", "days": 2}'
    first = calls(("get_weather", PARIS), ("get_weather", oslo), thought="Two cities.", usage=usage)
    server = ChatServer(first, text("Sunny and snowy."), key=KEY)
    result = await run(server, environment)
    assert (result.status, result.answer) == ("answered", "Sunny and snowy.")
    used = result.usage
    assert (used.prompt_tokens, used.cache_hit_tokens, used.cache_miss_tokens) == (70, 40, 30)
    assert (used.sampled_tokens, used.thinking_tokens, used.turns, used.calls) == (35, 12, 2, 2)
    said = result.trajectory.messages[2]
    assert isinstance(said, AssistantMessage)
    assert said.reasoning == "Two cities." and [call.id for call in said.calls] == ["call_x0", "call_x1"]
    second = server.requests[1]["messages"]
    assert [message["role"] for message in second] == ["system", "user", "assistant", "tool", "tool"]
    assert second[2]["reasoning_content"] == "Two cities."
    assert [json.loads(call["function"]["arguments"])["city"] for call in second[2]["tool_calls"]] == ["Paris", "Oslo"]
    assert [message["content"] for message in second[3:]] == ["sunny", "snowy"]
    assert KEY not in repr(result) + repr(result.trajectory.records)
    assert result.trajectory.header.grammar_off == "the model is behind an API"


def call_piece(**piece: Any) -> dict[str, Any]:
    function = {key: piece.pop(key) for key in ("name", "arguments") if key in piece}
    return {"tool_calls": [{**piece, "function": function}]}


WHOLE = {
    "role": "assistant",
    "content": None,
    "tool_calls": [{"id": "a", "type": "function", "function": {"name": "get_weather", "arguments": PARIS}}],
}


@pytest.mark.parametrize(
    "answer",
    [
        pytest.param(stream(call_piece(name="get_weather", arguments=PARIS)), id="neither index nor id"),
        pytest.param(
            stream(call_piece(name="get_weather"), call_piece(arguments=PARIS[:5]), call_piece(arguments=PARIS[5:])),
            id="no index in pieces",
        ),
        pytest.param(
            stream(
                call_piece(index=0, name="get_"),
                call_piece(index=0, name="weather"),
                call_piece(index=0, arguments=PARIS),
            ),
            id="a name in pieces",
        ),
        pytest.param(
            stream(
                *(call_piece(index=0, id="a", name="get_weather", arguments=part) for part in (PARIS[:5], PARIS[5:]))
            ),
            id="name and id repeated",
        ),
        pytest.param(
            stream(call_piece(index=0, id="a", name="get_weather", arguments={"city": "Paris"})), id="an object"
        ),
        pytest.param(
            Reply(event({**chunk({}), "choices": [{"index": 0, "message": WHOLE, "finish_reason": "tool_calls"}]})),
            id="a whole message in the stream",
        ),
        pytest.param(
            Reply.of_json({"choices": [{"index": 0, "message": WHOLE, "finish_reason": "tool_calls"}]}),
            id="no stream at all",
        ),
        pytest.param(
            Reply(b"\r\n".join([b": ping", b"", *event(chunk(WHOLE, "tool_calls")).strip().split(b"\n"), b"", b""])),
            id="comments and CRLF",
        ),
    ],
)
async def test_calls_in_every_form_that_servers_send(answer: Reply, environment: Environment) -> None:
    result = await run(ChatServer(answer, text("Sunny.")), environment)
    assert [done.content for done in result.trajectory.results] == ["sunny"]
    assert result.answer == "Sunny."


async def test_the_same_index_for_all_calls_and_ids_used_twice(environment: Environment) -> None:
    pieces = [
        call_piece(index=0, id=name, name="get_weather", arguments=json.dumps({"city": name}))
        for name in ("Paris", "Oslo")
    ]
    server = ChatServer(stream(*pieces), stream(*pieces), text("Done."))
    result = await run(server, environment)
    assert [done.content for done in result.trajectory.results] == ["sunny", "snowy"] * 2
    ids = [done.call_id for done in result.trajectory.results]
    assert ids == ["Paris", "Oslo", "call_1_0", "call_1_1"]


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning"])
async def test_reasoning_goes_back_under_the_key_it_came_with(key: str, environment: Environment) -> None:
    server = ChatServer(stream({key: "Hm."}, call_piece(name="get_weather", arguments=PARIS)), text("Sunny."))
    await run(server, environment)
    assert server.requests[1]["messages"][2][key] == "Hm."


async def test_content_in_parts(environment: Environment) -> None:
    parts = [{"type": "thinking", "thinking": [{"type": "text", "text": "Hm."}]}, {"type": "text", "text": "Sunny."}]
    result = await run(ChatServer(stream({"content": parts})), environment)
    assert result.answer == "Sunny."
    assert [m.reasoning for m in result.trajectory.messages if isinstance(m, AssistantMessage)] == ["Hm."]


@pytest.mark.parametrize("step", [1, 3, 100])
@pytest.mark.parametrize(
    ("said", "thought", "answer"),
    [
        ("<think>Hm. </thin </think>\n\nSunny.", "Hm. </thin ", "Sunny."),
        ("\n<think></think>Sunny.", None, "Sunny."),
        ("<thinking> is a tag, </think> too", None, "<thinking> is a tag, </think> too"),
        ("<thi", None, "<thi"),
        ("It is <think>sunny</think>.", None, "It is <think>sunny</think>."),
    ],
)
async def test_a_thought_in_tags_is_no_answer(
    step: int, said: str, thought: str | None, answer: str, environment: Environment
) -> None:
    server = ChatServer(stream(*({"content": said[at : at + step]} for at in range(0, len(said), step))))
    result = await run(server, environment, thinking="never")
    assert result.answer == answer
    message = result.trajectory.messages[-1]
    assert isinstance(message, AssistantMessage) and message.reasoning == thought


@pytest.mark.parametrize(
    ("arguments", "sent"),
    [
        ('{"city": "Par', {"malformed_arguments": '{"city": "Par'}),
        ('["Paris"]', {"malformed_arguments": '["Paris"]'}),
        ("", {}),
        ('{"town": "Paris"}', {"town": "Paris"}),
    ],
)
async def test_malformed_arguments_are_an_error_that_the_model_reads(
    arguments: str, sent: dict[str, Any], environment: Environment
) -> None:
    server = ChatServer(calls(("get_weather", arguments)), text("I give up."))
    result = await run(server, environment)
    assert [done.is_error for done in result.trajectory.results] == [True]
    assert json.loads(server.requests[1]["messages"][2]["tool_calls"][0]["function"]["arguments"]) == sent


async def test_an_unknown_tool_and_a_name_that_the_api_refuses(environment: Environment) -> None:
    server = ChatServer(calls(("rm -rf", "{}")), text("Sorry."))
    result = await run(server, environment)
    assert 'unknown tool "rm -rf"; available: get_weather' in result.trajectory.results[0].content
    assert server.requests[1]["messages"][2]["tool_calls"][0]["function"]["name"] == "rm_-rf"


BROKEN: Mapping[str, Answer] = {
    "cut in the middle": calls(("get_weather", PARIS), cut=True),
    "no finish reason": Reply(event(chunk({"content": "Sun"}))),
    "not JSON": Reply(event(chunk({"content": "Sun"})) + b"data: {oops\n\n"),
    "not an object": Reply(b"data: [1, 2]\n\n"),
    "an error in the stream": Reply(event(chunk({"content": "Sun"})) + event({"error": {"message": "engine died"}})),
    "overloaded in the stream": Reply(event({"error": {"message": "overloaded", "code": 529}})),
    "HTTP 429": chat.error(429, "slow down", headers={"retry-after": "0"}),
    "HTTP 429 in milliseconds": chat.error(429, "slow down", headers={"retry-after-ms": "1"}),
    "HTTP 500": chat.error(500, "oops"),
    "HTTP 503 with a page": Reply(b"<html>busy</html>", 503, {"content-type": "text/html"}),
    "HTTP 408": chat.error(408, "too slow"),
    "stopped by the API": stream({"content": "Sun"}, finish="insufficient_system_resource"),
}


@pytest.mark.parametrize("name", BROKEN)
async def test_what_may_pass_is_sent_again_and_nothing_happens_twice(name: str, environment: Environment) -> None:
    made: list[str] = []

    @tool(read_only=True)
    def note(word: str) -> str:
        """Note a word."""
        made.append(word)
        return "noted"

    first = calls(("note", '{"word": "a"}'))
    broken = BROKEN[name] if name != "cut in the middle" else calls(("note", '{"word": "a"}'), cut=True)
    server = ChatServer(broken, broken, first, broken, text("Done."))
    result = await run(server, environment, tools=[note])
    assert (result.answer, made) == ("Done.", ["a"])
    assert [retry.attempt for retry in retries(result)] == [1, 2, 1]
    assert (result.usage.prompt_tokens, result.usage.sampled_tokens, result.usage.turns) == (40, 10, 2)
    assert len(server.requests) == 5 and server.requests[0] == server.requests[2]
    assert KEY not in repr(result.trajectory.records)


async def test_a_silent_server_is_given_up_in_time(environment: Environment) -> None:
    server = ChatServer(lambda _: Reply(chat.forever()), text("Late."))
    result = await run(server, environment, timeout_s=0.2)
    assert result.answer == "Late."
    assert "sent nothing for 0.2 s" in retries(result)[0].reason


ERRORS: Mapping[str, tuple[Answer, type[Exception], str]] = {
    "wrong key": (chat.error(401, f"Incorrect API key {KEY}"), ApiKeyError, "refuses the key: check OPENAI_API_KEY"),
    "forbidden": (chat.error(403, "no access"), ApiKeyError, "that the key may use toy"),
    "unknown model": (
        chat.error(404, "The model `toy` does not exist", code="model_not_found"),
        UnknownModelError,
        "has no model 'toy'; it has big, small",
    ),
    "DeepSeek's unknown model": (chat.error(400, "Model Not Exist"), UnknownModelError, "it has big, small"),
    "no such path": (chat.error(404, "Not Found"), ApiError, "check the base URL"),
    "a server of files": (Reply(b"<html>", 501, {"content-type": "text/html"}), ApiError, "check the base URL"),
    "a web page": (
        Reply(b"<html>hi</html>", 200, {"content-type": "text/html"}),
        ApiError,
        "is not the base URL of an OpenAI-",
    ),
    "some JSON": (Reply.of_json({"hello": "world"}), ApiError, "is not the base URL of an OpenAI-compatible API"),
    "an error with HTTP 200": (Reply.of_json({"error": "invalid_request: no"}), ApiError, "invalid_request: no"),
    "nothing": (Reply(), ApiError, "is not the base URL of an OpenAI-compatible API"),
    "no tools": (chat.error(400, "toy does not support tools"), ApiError, "choose a model that calls tools"),
    "vLLM without its flag": (
        chat.error(400, '"auto" tool choice requires --enable-auto-tool-choice and --tool-call-parser to be set'),
        ApiError,
        "choose a model that calls tools",
    ),
    "no credit": (chat.error(402, "Insufficient Balance"), ApiError, "the account has no credit left"),
    "OpenAI's no credit": (
        chat.error(429, "You exceeded your current quota", code="insufficient_quota"),
        ApiError,
        "the account has no credit left",
    ),
    "a redirect": (Reply(b"", 307, {"location": "http://evil.example/v1"}), ApiError, "check the base URL"),
    "a long wait": (chat.error(429, "slow down", headers={"retry-after": "3600"}), ApiError, "it asks to wait 3,600 s"),
    "too many failures": (chat.error(500, "oops"), ApiError, "HTTP 500: oops, in 3 attempts: try again later"),
    "an effort": (
        chat.error(400, "reasoning_effort: Input should be 'low' or 'medium'"),
        ModelOptionError,
        "does not have the effort 'high'",
    ),
}


@pytest.mark.parametrize("name", ERRORS)
async def test_an_error_is_one_line_with_a_remedy(name: str, environment: Environment) -> None:
    answer, kind, said = ERRORS[name]
    server = ChatServer(answer, models=("small", "big"))
    with pytest.raises(kind) as caught:
        await run(server, environment, max_retries=2)
    assert said in str(caught.value)
    assert KEY not in "".join(format_exception(caught.value)) and "\n" not in str(caught.value)


async def test_a_server_that_is_not_there(environment: Environment) -> None:
    agent = Agent(
        RemoteModel("openai:toy", base_url="http://127.0.0.1:9/v1", api_key=KEY, max_retries=1), [get_weather]
    )
    with pytest.raises(ApiError, match=r"no connection to 127\.0\.0\.1:9: .* in 2 attempts: check the base URL"):
        await agent.run("Hi", environment=environment)


@pytest.mark.parametrize(
    "said",
    [
        "This model's maximum context length is 4096 tokens. However, you requested 5000 tokens",
        "the request exceeds the available context size",
        "Input is longer than the model's context length",
    ],
)
async def test_a_full_context_is_a_limit(said: str, environment: Environment) -> None:
    server = ChatServer(calls(("get_weather", PARIS)), chat.error(400, said))
    result = await run(server, environment)
    assert (result.status, result.limit, result.usage.turns) == ("limit", "context", 1)
    assert [message.role for message in result.trajectory.messages] == ["system", "user", "assistant", "tool"]


async def test_a_context_that_the_server_would_cut_silently(environment: Environment) -> None:
    result = await run(ChatServer(calls(("get_weather", PARIS))), environment, context_tokens=25)
    assert (result.status, result.limit, result.usage.turns) == ("limit", "context", 1)


async def test_token_limits_are_sent_and_end_the_run(environment: Environment) -> None:
    cut = text("Sun", finish="length", usage={"prompt_tokens": 20, "completion_tokens": 7, "total_tokens": 27})
    server = ChatServer(calls(("get_weather", PARIS)), cut)
    result = await run(server, environment, limits=Limits(max_tokens=12, max_tokens_per_turn=10))
    assert [request["max_tokens"] for request in server.requests] == [10, 7]
    assert (result.status, result.limit, result.usage.sampled_tokens) == ("limit", "max_tokens", 12)
    cut_call = calls(("get_weather", '{"city": "Par'), finish="length", usage=None)
    server = ChatServer(cut_call)
    result = await run(server, environment, limits=Limits(max_tokens_per_turn=1))
    assert (result.status, result.limit) == ("limit", "max_tokens_per_turn")
    assert [done.is_error for done in result.trajectory.results] == [True]


async def test_what_a_server_refuses_is_learned_once(environment: Environment) -> None:
    """Optional fields are left out, and limits follow what the server takes."""
    lessons = [
        chat.error(422, "Unexpected fields in the request: chat_template_kwargs, return_token_ids"),
        chat.error(400, "Unsupported parameter: 'max_tokens'. Use 'max_completion_tokens' instead."),
        chat.error(400, "max_tokens is too large: 32768. This model supports at most 4096 completion tokens"),
        chat.error(400, "extra inputs are not permitted"),
    ]
    server = ChatServer(*lessons, text("Hi."), text("Hello."))
    async with server.serve() as url:
        agent = Agent(RemoteModel("openai:toy", base_url=url, api_key=KEY), [get_weather])
        for answer in ("Hi.", "Hello."):
            assert (await agent.run("Hi", environment=environment)).answer == answer
    assert len(server.requests) == 6
    assert "chat_template_kwargs" in server.requests[0] and "chat_template_kwargs" not in server.requests[1]
    assert server.requests[2]["max_completion_tokens"] == 32768
    last = server.requests[-1]
    assert last["max_completion_tokens"] == 4096 and last["tools"] and last["stream"]
    assert not {"chat_template_kwargs", "return_token_ids", "logprobs", "stream_options", "reasoning_effort"} & {*last}


async def test_an_error_that_is_not_about_a_field_teaches_nothing(environment: Environment) -> None:
    server = ChatServer(chat.error(400, "something odd"), chat.error(400, "something odd"), text("Hi."))
    async with server.serve() as url:
        agent = Agent(RemoteModel("openai:toy", base_url=url, api_key=KEY), [get_weather])
        with pytest.raises(ApiError, match="something odd"):
            await agent.run("Hi", environment=environment)
        await agent.run("Hi", environment=environment)
    assert "reasoning_effort" in server.requests[0] and "reasoning_effort" not in server.requests[1]
    assert server.requests[2] == server.requests[0]


async def test_a_turn_gets_what_the_context_has_left(environment: Environment) -> None:
    said = (
        "'max_tokens' is too large: 32768. This model's maximum context length is 1000 tokens and your request has "
        "900 input tokens (32768 > 1000 - 900)."
    )
    full = text("Sun", finish="length", usage={"prompt_tokens": 900, "completion_tokens": 100, "total_tokens": 1000})
    server = ChatServer(chat.error(400, said), full)
    result = await run(server, environment)
    assert [request["max_tokens"] for request in server.requests] == [32768, 100]
    assert (result.status, result.limit) == ("limit", "context")


CLASSIC = "maximum context length is {size} tokens. However, you requested {all} tokens ({prompt} in the messages"
TRUNCATED = "You passed {counted} input tokens and requested {sent} output tokens. However, the model's context "


@pytest.mark.parametrize(
    ("size", "prompt", "said", "sent"),
    [
        (8192, 900, CLASSIC, [32768, 7292]),
        (8192, 900, "maximum context length of {size} tokens. {prompt} tokens from the input messages", [32768, 7292]),
        (32768, 9000, TRUNCATED + "length is only {size}", [32768, 16384]),
        (32768, 30000, TRUNCATED + "length is only {size}", [32768, 16384, 8192, 4096, 2048]),
        (4096, 900, "maximum context length is {size} tokens, your prompt has at least {counted} input tokens", None),
        (4096, 5000, "maximum context length is {size} tokens, your prompt has at least {counted} input tokens", None),
    ],
)
async def test_servers_say_in_many_ways_what_the_context_has_left(
    size: int, prompt: int, said: str, sent: list[int] | None, environment: Environment
) -> None:
    """The last four count no more of a prompt than shows that it does not fit, as vLLM does."""

    def answer(body: dict[str, Any]) -> Reply:
        asked = body["max_tokens"]
        if asked > size:
            return chat.error(400, f"max_tokens={asked}cannot be greater than max_model_len=max_total_tokens={size}.")
        if asked + prompt <= size:
            return text("Hi.")
        counted = min(prompt, max(0, size - asked) + 1)
        return chat.error(400, said.format(size=size, all=asked + prompt, prompt=prompt, counted=counted, sent=asked))

    def at_once(body: dict[str, Any]) -> Reply:
        asked = body["max_tokens"]
        return chat.error(400, said.format(size=size, all=asked + prompt, prompt=prompt, sent=asked))

    server = ChatServer(answer) if "{counted}" in said else ChatServer(at_once, text("Hi."))
    result = await run(server, environment)
    if prompt > size:
        assert (result.status, result.limit) == ("limit", "context")
    else:
        assert result.answer == "Hi."
    if sent is not None:
        assert [request["max_tokens"] for request in server.requests] == sent


async def test_characters_that_are_split_between_chunks_are_joined(environment: Environment) -> None:
    halves = [{"content": "\ud83d"}, {"content": "\ude00 \ud83d"}]
    arguments = [{"index": 0, "id": "a", "function": {"name": "get_weather", "arguments": '{"city": "\ud83d'}}]
    rest = [{"index": 0, "function": {"arguments": '\ude00"}'}}]
    server = ChatServer(stream({"tool_calls": arguments}, {"tool_calls": rest}, finish="tool_calls"), stream(*halves))
    result = await run(server, environment)
    assert result.answer == "\U0001f600 \ufffd"
    said = result.trajectory.messages[2]
    assert isinstance(said, AssistantMessage) and json.loads(said.calls[0].arguments) == {"city": "\U0001f600"}


async def test_a_refusal_is_told(environment: Environment) -> None:
    result = await run(ChatServer(stream(finish="content_filter")), environment)
    assert (result.status, result.error) == (
        "no_answer",
        "the provider refused to answer: its filter stopped the last turn",
    )


@pytest.mark.parametrize("when", ["stream", "retry"])
async def test_the_wall_time_interrupts_streams_and_waits(when: str, environment: Environment) -> None:
    wait = chat.error(429, "slow down", headers={"retry-after": "50"})
    server = ChatServer(wait if when == "retry" else lambda _: Reply(chat.forever()))
    with anyio.fail_after(10):
        result = await run(server, environment, limits=Limits(wall_time_s=0.3))
    assert (result.status, result.limit) == ("limit", "wall_time_s")


async def test_a_cancelled_turn_can_be_continued(environment: Environment) -> None:
    """The partial text stays, calls that were never made do not, and the next request is one that an API accepts."""
    server = ChatServer(lambda _: Reply(chat.forever()), text("Sunny."))
    async with server.serve() as url:
        agent = Agent(
            RemoteModel("openai:toy", base_url=url, api_key=KEY), [get_weather], limits=Limits(wall_time_s=0.5)
        )
        first = await agent.run("Weather?", environment=environment)
        assert first.status == "limit"
        second = await first.continue_("And now?", environment=environment)
    assert second.answer == "Sunny."
    sent = server.requests[1]["messages"]
    assert [message["role"] for message in sent] == ["system", "user", "assistant", "user"]
    assert [message["content"] for message in sent[1:]] == ["Weather?", "wait", "And now?"]


async def test_a_runaway_is_stopped(environment: Environment) -> None:
    server = ChatServer(stream(*[{"content": "ha"}] * 200))
    result = await run(server, environment, limits=Limits(max_repeated_tokens=64))
    assert (result.status, result.limit) == ("limit", "repetition")
    assert 64 <= result.usage.sampled_tokens < 200


async def test_deepseek(environment: Environment) -> None:
    """DeepSeek's own fields, its counts of cache hits, and reasoning that goes back with every call."""
    usage = {"prompt_tokens": 20, "completion_tokens": 5, "total_tokens": 25, "prompt_cache_hit_tokens": 16}
    server = ChatServer(
        calls(("get_weather", PARIS), thought="Hm.", usage=usage),
        calls(("get_weather", PARIS), usage=usage),
        text("Sunny.", usage=usage),
        extras=DEEPSEEK,
    )
    result = await run(server, environment, model="deepseek:deepseek-chat", effort="max")
    assert result.answer == "Sunny." and result.usage.cache_hit_tokens == 48
    assert [request["thinking"]["type"] for request in server.requests] == ["enabled", "disabled", "disabled"]
    assert [request.get("reasoning_effort") for request in server.requests] == ["max", None, None]
    said = [message for message in server.requests[2]["messages"] if message["role"] == "assistant"]
    assert [message["reasoning_content"] for message in said] == ["Hm.", ""]


async def test_deepseek_reads_the_reasoning_of_its_answers_too(environment: Environment) -> None:
    server = ChatServer(stream({"reasoning_content": "Hm."}, {"content": "Hi."}), text("Bye."), extras=DEEPSEEK)
    async with server.serve() as url:
        agent = Agent(RemoteModel("deepseek:deepseek-chat", base_url=url, api_key=KEY), [get_weather])
        await (await agent.run("Hi", environment=environment)).continue_("Bye", environment=environment)
    assert server.requests[1]["messages"][2]["reasoning_content"] == "Hm."


async def test_a_server_that_refuses_reasoning_in_messages(environment: Environment) -> None:
    refuses = chat.error(400, "'messages.2' : property 'reasoning_content' is unsupported")
    server = ChatServer(calls(("get_weather", PARIS), thought="Hm."), refuses, text("Sunny."))
    assert (await run(server, environment)).answer == "Sunny."
    assert "reasoning_content" not in server.requests[2]["messages"][2] and "reasoning_effort" in server.requests[0]


async def test_a_turn_that_only_thought_is_not_sent(environment: Environment) -> None:
    server = ChatServer(stream({"reasoning": "Hm."}), text("Bye."))
    async with server.serve() as url:
        agent = Agent(RemoteModel("openai:toy", base_url=url, api_key=KEY), [])
        first = await agent.run("Hi", environment=environment)
        assert first.status == "no_answer"
        await first.continue_("Well?", environment=environment)
    assert [message["role"] for message in server.requests[1]["messages"]] == ["system", "user", "user"]


async def test_what_else_a_call_carries_goes_back(environment: Environment) -> None:
    """Gemini's thought signatures, for example."""
    signature = {"google": {"thought_signature": "abc"}}
    piece = call_piece(index=0, id="a", name="get_weather", arguments=PARIS, extra_content=signature)
    server = ChatServer(stream(piece), text("Sunny."))
    await run(server, environment)
    assert server.requests[1]["messages"][2]["tool_calls"][0]["extra_content"] == signature


async def test_the_chat_template_of_an_own_server_is_told_whether_to_think(environment: Environment) -> None:
    server = ChatServer(text("Hi."))
    await run(server, environment, effort="none")
    assert server.requests[0]["chat_template_kwargs"] == {"thinking": False, "enable_thinking": False}
    assert "reasoning_effort" not in server.requests[0]


async def test_only_parameters_that_were_set_are_sent(environment: Environment) -> None:
    server = ChatServer(text("Hi."))
    await run(server, environment)
    assert not {"temperature", "top_p", "top_k", "seed", "stop"} & {*server.requests[0]}
    sampling = SamplingParams(temperature=0.5, top_k=20, seed=3, stop=("END",), logit_bias={7: -float("inf")})
    await run(server, environment, sampling=sampling)
    sent = server.requests[1]
    assert (sent["temperature"], sent["top_k"], sent["seed"], sent["stop"]) == (0.5, 20, 3, ["END"])
    assert sent["logit_bias"] == {"7": -100}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"sampling": SamplingParams(top_k=20)}, "has no top_k"),
        ({"sampling": SamplingParams(logit_bias={1: 2.0})}, "has no logit_bias"),
        ({"sampling": SamplingParams(top_logprobs=2)}, "reports no top_logprobs"),
        ({"sampling": SamplingParams(grammar=True)}, "no grammar can be set"),
        (
            {"tools": [tool(name=f"tool_{number}", description="Do it.")(lambda: "") for number in range(129)]},
            "takes at most 128 tools, and the agent has 129",
        ),
    ],
)
async def test_what_the_api_lacks_is_refused_before_any_request(
    options: dict[str, Any], said: str, environment: Environment
) -> None:
    server = ChatServer(text("Hi."), extras=DEEPSEEK)
    with pytest.raises(ModelOptionError, match=said):
        await run(server, environment, model="deepseek:deepseek-chat", **options)
    assert server.requests == []


SCHEMA = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"], "additionalProperties": False}


async def test_structured_output(environment: Environment) -> None:
    server = ChatServer(text('{"n": 3}'))
    result = await run(server, environment, tools=[], output_schema=SCHEMA)
    assert result.output == {"n": 3}
    sent = server.requests[0]
    assert sent["response_format"]["json_schema"] == {"name": "answer", "schema": SCHEMA, "strict": True}
    assert '"n": {"type": "integer"}' in sent["messages"][0]["content"]
    server = ChatServer(text("three"), text('{"n": 3}'))
    assert (await run(server, environment, output_schema=SCHEMA)).output == {"n": 3}
    first, again = server.requests
    assert "response_format" not in first, "a server of one's own would hold calls to it too"
    assert again["response_format"]["type"] == "json_schema" and again["tool_choice"] == "none" and again["tools"]
    server = ChatServer(text('{"n": "3"}'), extras=DEEPSEEK)
    result = await run(server, environment, model="deepseek:deepseek-chat", output_schema=SCHEMA)
    assert result.status == "invalid_output" and server.requests[0]["response_format"] == {"type": "json_object"}


async def test_images_of_tools_follow_as_a_user_message(environment: Environment) -> None:
    server = ChatServer(calls(("picture", '{"name": "a"}'), ("picture", '{"name": "b"}')), text("Nice."))
    await run(server, environment, tools=[picture])
    *_, first, second, images = server.requests[1]["messages"]
    assert (first["role"], second["role"], images["role"]) == ("tool", "tool", "user")
    assert first["content"] == "[image: image/png, 6 bytes]"
    assert [part["type"] for part in images["content"]] == ["text", "image_url"] * 2
    assert images["content"][1]["image_url"]["url"] == "data:image/png;base64,cGl4ZWxz"


async def test_a_task_has_texts_and_images_in_order(environment: Environment) -> None:
    server = ChatServer(text("A cat."))
    task = ["What is this?", ImagePart.of(b"pixels", "image/png"), "Be brief."]
    result = await run(server, environment, task=task)
    content = server.requests[0]["messages"][-1]["content"]
    assert [part["type"] for part in content] == ["text", "image_url", "text"]
    assert content[1]["image_url"]["url"] == "data:image/png;base64,cGl4ZWxz"
    assert result.trajectory.messages[1].content == "What is this?\n[image: image/png, 6 bytes]\nBe brief."


@pytest.mark.parametrize(("task", "told"), [(5, "given 5 as a task"), (["a", b"b"], "given b'b' in a task")])
async def test_a_task_is_text_and_images(task: Any, told: str, environment: Environment) -> None:
    with pytest.raises(TypeError, match=told):
        await run(ChatServer(), environment, task=task)


DSML = """{lead}<{m}function_calls>
<{m}invoke name="get_weather">
<{m}parameter name="city" string="true">Paris</{m}parameter>
</{m}invoke>
</{m}function_calls>"""


@pytest.mark.parametrize("marker", ["｜DSML｜", "|DSML|", "｜｜DSML｜｜", "||DSML||", "| DSML | "])
@pytest.mark.parametrize("lead", ["", "Let me look.\n\n"])
async def test_calls_written_as_text_are_made(marker: str, lead: str, environment: Environment) -> None:
    server = ChatServer(text(DSML.format(m=marker, lead=lead)), text("Sunny."))
    result = await run(server, environment)
    assert result.answer == "Sunny." and [done.content for done in result.trajectory.results] == ["sunny"]
    said = result.trajectory.messages[2]
    assert isinstance(said, AssistantMessage) and said.content == lead.strip()
    assert server.requests[1]["messages"][2]["tool_calls"][0]["function"]["name"] == "get_weather"


async def test_an_answer_of_nothing_but_fenced_calls_makes_them(environment: Environment) -> None:
    block = DSML.format(m="|DSML|", lead="")
    result = await run(ChatServer(text(f"```xml\n{block}\n```"), text("Sunny.")), environment)
    assert result.answer == "Sunny." and [done.content for done in result.trajectory.results] == ["sunny"]
    quoted = f"Such a call reads:\n```xml\n{block}\n```"
    assert (await run(ChatServer(text(quoted)), environment)).answer == quoted


async def test_calls_written_as_text_are_no_answer_without_tools_either(environment: Environment) -> None:
    server = ChatServer(text(DSML.format(m="|DSML|", lead="")), text("I have no tools."))
    result = await run(server, environment, tools=[])
    assert result.answer == "I have no tools."
    assert "unknown tool" in result.trajectory.results[0].content


async def test_calls_written_as_text_that_do_not_parse_are_an_error_for_the_model(environment: Environment) -> None:
    server = ChatServer(text(DSML.format(m="|DSML|", lead="")[:60]), text("Sorry."))
    result = await run(server, environment)
    assert result.answer == "Sorry."
    assert [done.is_error for done in result.trajectory.results] == [True]
    *_, said, told = server.requests[1]["messages"]
    assert said["content"].startswith("<|DSML|function_calls>") and told["role"] == "user"
    assert "malformed call" in told["content"]


async def test_calls_written_as_text_with_more_lines_after_them_are_no_answer(environment: Environment) -> None:
    server = ChatServer(text(DSML.format(m="|DSML|", lead="") + "\n\nLet me wait."), text("Sorry."))
    result = await run(server, environment)
    assert result.answer == "Sorry."
    assert "text follows the calls" in result.trajectory.results[0].content


async def test_a_quotation_of_calls_stays_text(environment: Environment) -> None:
    quoted = DSML.format(m="|DSML|", lead="They look so:\n") + "\nThat is all."
    result = await run(ChatServer(text(quoted)), environment)
    assert (result.status, result.answer) == ("answered", quoted)


def with_ids(answer: str, prompt: list[int], sampled: list[int], *, logprobs: bool = True) -> Reply:
    choice = {"index": 0, "delta": {"content": answer}, "finish_reason": "stop", "token_ids": sampled}
    if logprobs:
        choice["logprobs"] = {"content": [{"token": "x", "logprob": -0.5} for _ in sampled]}
    return Reply(event({**chunk({}), "choices": [choice], "prompt_token_ids": prompt, "usage": chat.USAGE}))


@pytest.mark.parametrize("logprobs", [True, False])
async def test_token_ids_are_kept(logprobs: bool, environment: Environment) -> None:
    server = ChatServer(
        with_ids("A.", [1, 2], [3, 4], logprobs=logprobs),
        with_ids("B.", [1, 2, 3, 4, 5], [6], logprobs=logprobs),
        with_ids("C.", [9, 8], [7], logprobs=logprobs),
    )
    async with server.serve() as url:
        agent = Agent(RemoteModel("openai:toy", base_url=url), [])
        first = await agent.run("a", environment=environment)
        second = await first.continue_("b", environment=environment)
        assert second.trajectory.token_ids == [1, 2, 3, 4, 5, 6]
        assert second.trajectory.loss_mask == [0, 0, 1, 1, 0, 1]
        sampled = -0.5 if logprobs else None
        assert second.trajectory.logprobs == [None, None, sampled, sampled, None, sampled]
        third = await second.continue_("c", environment=environment)
    assert third.trajectory.segments[-2] == TokenSegment("prompt", (9, 8), restart=True)
    assert third.trajectory.token_ids == [9, 8, 7] and third.trajectory.loss_mask == [0, 0, 1]
    assert "authorization" in server.headers[0] and "sk-" not in server.headers[0]["authorization"]


async def test_a_long_conversation_is_compacted(environment: Environment) -> None:
    """The API's count and the length of what is new decide; the cleared result is not sent again."""

    @tool
    def article(name: str) -> str:
        """Return an article."""
        return f"{name} " * 400

    def asks(name: str, call_id: str) -> Reply:
        call = {"index": 0, "id": call_id, "function": {"name": "article", "arguments": json.dumps({"name": name})}}
        return stream({"tool_calls": [call]})

    server = ChatServer(asks("bolt", "a"), asks("nut", "b"), asks("screw", "c"), text("All three."))
    compaction = Compaction(at_tokens=1200, keep_turns=1)
    result = await run(server, environment, tools=[article], compaction=compaction)
    assert result.answer == "All three."
    [compacted] = [record for record in result.trajectory.records if isinstance(record, Compacted)]
    assert compacted.cleared == ("a", "b") and compacted.turns_left_out == 0
    sent = [message["content"] for message in server.requests[3]["messages"] if message["role"] == "tool"]
    assert sent == ["[This result was cleared to make room.]"] * 2 + ["screw " * 400]
    assert [message["role"] for message in server.requests[3]["messages"][:2]] == ["system", "user"]
