"""Typed answers, message histories and sub-agents with models behind an API."""

from __future__ import annotations

import json
from typing import Any

import pytest
from pydantic import BaseModel
from servers import anthropic, chat, responses
from servers.anthropic import AnthropicServer
from servers.chat import ChatServer
from servers.responses import ResponsesServer

from agentkit import (
    Agent,
    AssistantMessage,
    Limits,
    Message,
    Price,
    Prices,
    RemoteModel,
    SystemMessage,
    ToolCall,
    ToolMessage,
    UserMessage,
    tool,
)
from agentkit.limits import CostBudget
from agentkit.models.remote.openai_responses import OpenAIResponses
from agentkit_environments import Environment

pytestmark = pytest.mark.anyio
KEY = "sk-secret-0123456789"


class Weather(BaseModel):
    sky: str
    degrees: int


@tool
def get_weather(city: str) -> str:
    """Return the weather of a city."""
    return "snowy"


FITS, MISFIT = '{"sky": "snowy", "degrees": -3}', '{"sky": "snowy"}'


def model(kind: str, url: str) -> RemoteModel:
    if kind == "anthropic":
        return RemoteModel("anthropic:claude-sonnet-4-5", base_url=url, api_key=KEY)
    if kind == "chat":
        return RemoteModel("openai:toy", base_url=url, api_key=KEY)
    remote = RemoteModel("openai:gpt-5", api_key=KEY)
    remote._open_provider = lambda: OpenAIResponses("gpt-5", base_url=url, api_key=KEY)
    return remote


def server_of(kind: str, *said: str) -> Any:
    if kind == "anthropic":
        return AnthropicServer(*(anthropic.says(anthropic.text(text)) for text in said))
    if kind == "chat":
        return ChatServer(*map(chat.text, said))
    return ResponsesServer(*(responses.says(responses.message(text)) for text in said))


@pytest.mark.parametrize("kind", ["anthropic", "chat", "responses"])
async def test_an_answer_that_does_not_fit_is_returned_once(kind: str, environment: Environment) -> None:
    server = server_of(kind, MISFIT, FITS)
    async with server.serve() if kind == "chat" else server.running() as url:
        result = await Agent(model(kind, url), [], output_type=Weather).run("Q", environment=environment)
    assert (result.status, result.output) == ("answered", Weather(sky="snowy", degrees=-3))
    assert len(server.requests) == 2
    assert "Field required" in json.dumps(server.requests[1]) and "degrees" in json.dumps(server.requests[0])


@pytest.mark.parametrize("fence", ["```json\n{}\n```", "\n```\n{}```\n", "```JSON \r\n{}\r\n```"])
async def test_an_answer_may_be_in_a_fence(fence: str, environment: Environment) -> None:
    server = ChatServer(chat.text(fence.replace("{}", FITS)))
    async with server.serve() as url:
        result = await Agent(model("chat", url), [], output_type=Weather).run("Q", environment=environment)
        assert (result.output, result.answer) == (Weather(sky="snowy", degrees=-3), FITS)
        plain = await Agent(model("chat", url), []).run("Q", environment=environment)
        assert plain.answer is not None and "```" in plain.answer


@pytest.mark.parametrize("kind", ["anthropic", "chat", "responses"])
async def test_a_history_is_sent_to_every_api(kind: str, environment: Environment) -> None:
    call = ToolCall("call_1_0", "get_weather", '{"city": "Oslo"}')
    history: list[Message] = [
        SystemMessage("Be brief."),
        UserMessage("Weather in Oslo?"),
        AssistantMessage("", "Look.", (call,)),
        ToolMessage("call_1_0", "get_weather", "snowy"),
        AssistantMessage("Snowy."),
    ]
    server = server_of(kind, "Sunny.")
    async with server.serve() if kind == "chat" else server.running() as url:
        agent = Agent(model(kind, url), [get_weather])
        result = await agent.run("And in Paris?", environment=environment, message_history=history)
    assert result.answer == "Sunny."
    sent = json.dumps(server.requests[0])
    for text in ("Be brief.", "Weather in Oslo?", "call_1_0", "snowy", "Snowy.", "And in Paris?"):
        assert text in sent


async def test_calls_without_ids_after_a_history_get_new_ones(environment: Environment) -> None:
    call = ToolCall("call_1_0", "get_weather", '{"city": "Oslo"}')
    history: list[Message] = [
        *(UserMessage("One?"), AssistantMessage("1")),
        *(
            UserMessage("Weather?"),
            AssistantMessage("", None, (call,)),
            ToolMessage("call_1_0", "get_weather", "snowy"),
        ),
    ]
    made = chat.stream(
        {"tool_calls": [{"index": 0, "function": {"name": "get_weather", "arguments": '{"city": "Paris"}'}}]},
        finish="tool_calls",
    )
    server = ChatServer(made, chat.text("Done."))
    async with server.serve() as url:
        agent = Agent(model("chat", url), [get_weather])
        result = await agent.run("Paris?", environment=environment, message_history=history)
    assert [each.call_id for each in result.trajectory.results] == ["call_2_0"]


async def test_the_cost_of_sub_agents_counts_against_the_limits_of_the_run(environment: Environment) -> None:
    price = Price(
        host="127.0.0.1:*", models=["toy"], as_of="2026-11", source="a test", input=1, cache_hit=0.1, output=2
    )
    turn = 30e-6  # 20 tokens read and 5 written
    asking = ChatServer(chat.calls(("helper", '{"task": "T"}')))
    async with asking.serve() as url, ChatServer(chat.text("Yes.")).serve() as below:

        def priced(url: str) -> RemoteModel:
            return RemoteModel("openai:toy", base_url=url, api_key=KEY, prices=Prices([price]))

        helper = Agent(priced(below), []).as_tool("helper", "Helps.")
        for limits, budget in ((Limits(max_cost_usd=3.5 * turn), None), (Limits(), CostBudget(3.5 * turn))):
            main = Agent(priced(url), [helper], limits=limits, budget=budget)
            result = await main.run("Q", environment=environment)
            assert (result.limit, result.usage.turns) == ("max_cost_usd", 2)
            assert result.usage.cost_usd == pytest.approx(2 * turn)
            assert result.usage.total.cost_usd == pytest.approx(4 * turn)


async def test_a_sub_agent_stops_at_the_limit_on_the_cost_of_the_run(environment: Environment) -> None:
    price = Price(host="127.0.0.1:*", models=["toy"], as_of="2026-11", source="a test", input=1, output=2)
    turn = 30e-6
    never_done = ChatServer(chat.calls(("get_weather", '{"city": "Oslo"}')))
    asking = ChatServer(chat.calls(("outer", '{"task": "T"}')))
    async with asking.serve() as url, never_done.serve() as below:

        def priced(url: str) -> RemoteModel:
            return RemoteModel("openai:toy", base_url=url, api_key=KEY, prices=Prices([price]))

        inner = Agent(priced(below), [get_weather]).as_tool("outer", "Helps.")
        outer = Agent(priced(url), [inner]).as_tool("outer", "Helps.")
        main = Agent(priced(url), [outer], limits=Limits(max_cost_usd=4.5 * turn))
        result = await main.run("Q", environment=environment)
    assert result.limit == "max_cost_usd"
    assert result.usage.total.cost_usd == pytest.approx(5 * turn)
    assert len(never_done.requests) == 3
