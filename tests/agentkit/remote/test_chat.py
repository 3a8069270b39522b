"""Chat Completions over a socket: an agent runs on any server that speaks the protocol."""

from __future__ import annotations

import json
from typing import Any

import pytest
from servers.chat import ChatServer, calls, text

from agentkit import (
    Agent,
    AssistantMessage,
    RemoteModel,
    RunResult,
    tool,
)
from agentkit_environments import Environment

pytestmark = pytest.mark.anyio

KEY = "sk-secret-0123456789"


@tool(read_only=True)
def get_weather(city: str, days: int = 1) -> str:
    """Return the weather of a city."""
    return {"Paris": "sunny", "Oslo": "snowy"}.get(city, "unknown")


async def run(
    server: ChatServer, environment: Environment, *, task: str = "Weather?", model: str = "openai:toy", **options: Any
) -> RunResult:
    tools = options.pop("tools", [get_weather])
    fields = {name: options.pop(name) for name in ("max_retries", "timeout_s", "context_tokens") if name in options}
    async with server.serve() as url:
        agent = Agent(RemoteModel(model, base_url=url, api_key=KEY, **fields), tools, **options)
        return await agent.run(task, environment=environment)


async def test_a_run_with_parallel_calls_reasoning_and_usage(environment: Environment) -> None:
    first = calls(
        ("get_weather", '{"city": "Paris"}'),
        ("get_weather", '{"city": "Oslo", "days": 2}'),
        thought="Two cities.",
        usage={
            "prompt_tokens": 50,
            "completion_tokens": 30,
            "total_tokens": 80,
            "prompt_tokens_details": {"cached_tokens": 40},
            "completion_tokens_details": {"reasoning_tokens": 12},
        },
    )
    server = ChatServer(first, text("Sunny and snowy."), key=KEY)
    result = await run(server, environment)
    assert (result.status, result.answer) == ("answered", "Sunny and snowy.")
    usage = result.usage
    assert (usage.prompt_tokens, usage.cache_hit_tokens, usage.cache_miss_tokens) == (70, 40, 30)
    assert (usage.sampled_tokens, usage.thinking_tokens, usage.turns, usage.calls) == (35, 12, 2, 2)
    said = result.trajectory.messages[2]
    assert isinstance(said, AssistantMessage)
    assert said.reasoning == "Two cities." and [call.id for call in said.calls] == ["call_x0", "call_x1"]
    second = server.requests[1]["messages"]
    assert [message["role"] for message in second] == ["system", "user", "assistant", "tool", "tool"]
    assert second[2]["reasoning_content"] == "Two cities."
    assert [json.loads(call["function"]["arguments"])["city"] for call in second[2]["tool_calls"]] == ["Paris", "Oslo"]
    assert [message["content"] for message in second[3:]] == ["sunny", "snowy"]
    assert KEY not in repr(result) + json.dumps([repr(record) for record in result.trajectory.records])
    assert result.trajectory.header.grammar_off == "the model is behind an API"
