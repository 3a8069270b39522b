"""The same run on each API: a turn with reasoning and two calls, a broken stream, and an answer."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from anyio.from_thread import start_blocking_portal
from servers import anthropic, chat, responses
from servers.anthropic import AnthropicServer
from servers.chat import ChatServer
from servers.http import Reply
from servers.responses import ResponsesServer

from agentkit import Agent, RemoteModel, Retried, RunResult, tool
from agentkit.models.remote.openai_responses import OpenAIResponses
from agentkit_environments import Environment

KEY = "sk-secret-0123456789"
EXAMPLE = Path(__file__).parents[3] / "examples" / "remote_model.py"


@tool
def get_weather(city: str) -> str:
    """Return the weather of a city."""
    return {"Paris": "sunny", "Oslo": "snowy"}.get(city, "unknown")


async def weather(server: Any, environment: Environment, change: Callable[[str], RemoteModel]) -> RunResult:
    async with server.running() as url:
        agent = Agent(change(url), [get_weather], thinking="always")
        return await agent.run("What is the weather?", environment=environment)


def check(result: RunResult, *, turns: int = 2) -> None:
    assert (result.status, result.answer) == ("answered", "Sunny and snowy.")
    assert [done.content for done in result.trajectory.results] == ["sunny", "snowy"]
    assert [record.attempt for record in result.trajectory.records if isinstance(record, Retried)] == [1]
    assert (result.usage.turns, result.usage.calls) == (turns, 2)
    assert KEY not in repr(result.trajectory.records)


def cut(reply: Reply) -> Reply:
    assert isinstance(reply.body, bytes)
    return Reply(reply.body[: len(reply.body) * 3 // 4], cut=True)


@pytest.mark.anyio
async def test_anthropic(environment: Environment) -> None:
    first = anthropic.says(
        anthropic.thinking("Two cities.", "signed"),
        anthropic.tool_use("toolu_1", "get_weather", '{"city": "Paris"}'),
        anthropic.tool_use("toolu_2", "get_weather", '{"city": "Oslo"}'),
        stop="tool_use",
    )
    server = AnthropicServer(cut(first), first, anthropic.says(anthropic.text("Sunny and snowy.")))
    result = await weather(
        server, environment, lambda url: RemoteModel("anthropic:claude-sonnet-4-5", base_url=url, api_key=KEY)
    )
    check(result)
    said = server.requests[2]["messages"][1]["content"]
    assert said[0] == {"type": "thinking", "thinking": "Two cities.", "signature": "signed"}
    assert [block["tool_use_id"] for block in server.requests[2]["messages"][2]["content"]] == ["toolu_1", "toolu_2"]
    assert result.usage.prompt_tokens == 200 and result.usage.cache_hit_tokens == 120


@pytest.mark.anyio
async def test_openai(environment: Environment) -> None:
    first = responses.says(
        responses.reasoning("Two cities.", encrypted="secret"),
        responses.call("call_1", "get_weather", '{"city": "Paris"}'),
        responses.call("call_2", "get_weather", '{"city": "Oslo"}'),
    )
    server = ResponsesServer(cut(first), first, responses.says(responses.message("Sunny and snowy.")))

    def model(url: str) -> RemoteModel:
        remote = RemoteModel("openai:gpt-5", api_key=KEY)
        remote._open_provider = lambda: OpenAIResponses("gpt-5", base_url=url, api_key=KEY)
        return remote

    result = await weather(server, environment, model)
    check(result)
    sent = server.requests[2]["input"]
    assert [item["encrypted_content"] for item in sent if item["type"] == "reasoning"] == ["secret"]
    assert [item["output"] for item in sent if item["type"] == "function_call_output"] == ["sunny", "snowy"]


def test_one_model_in_two_event_loops() -> None:
    server = ChatServer(chat.text("One."), chat.text("Two."))
    with start_blocking_portal() as portal, portal.wrap_async_context_manager(server.serve()) as url:
        agent = Agent(RemoteModel("openai:toy", base_url=url), [])
        assert [agent.run_sync("Hi").answer for _ in range(2)] == ["One.", "Two."]


@pytest.mark.sandbox
def test_the_example_runs() -> None:
    assert len(EXAMPLE.read_text().splitlines()) < 30
    made = [("get_weather", json.dumps({"city": city})) for city in ("Paris", "Oslo")]
    server = ChatServer(chat.calls(*made), chat.text("Paris is sunny, Oslo is snowy."))
    with start_blocking_portal() as portal, portal.wrap_async_context_manager(server.serve()) as url:
        done = subprocess.run(
            [sys.executable, EXAMPLE, "openai:toy"],
            capture_output=True,
            text=True,
            check=True,
            timeout=60,
            env=os.environ | {"OPENAI_BASE_URL": url, "NO_PROXY": "*"},
        )
    assert done.stdout == "Paris is sunny, Oslo is snowy.\n2 turns, 40 tokens read, 10 written, for an unknown price\n"
    results = [message["content"] for message in server.requests[1]["messages"] if message["role"] == "tool"]
    assert results == ["sunny, 21 degrees", "snowy, -3 degrees"]
