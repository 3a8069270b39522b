"""A fork of a run behind an API sends the messages of the shared turns, and then goes its own way."""

from __future__ import annotations

import json

import pytest
from servers import chat
from servers.chat import ChatServer

from agentkit import Agent, RemoteModel, SamplingParams, tool
from agentkit_environments import Environment

pytestmark = pytest.mark.anyio


@tool
def get_weather(city: str) -> str:
    """Return the weather of a city."""
    return {"Paris": "sunny", "Oslo": "snowy"}.get(city, "unknown")


async def test_the_message_list_forks(environment: Environment) -> None:
    call = chat.calls(("get_weather", json.dumps({"city": "Paris"})))
    server = ChatServer(call, chat.text("Sunny."), chat.text("It is sunny."), chat.text("Sun."), chat.text("Bye."))
    async with server.serve() as url:
        agent = Agent(RemoteModel("openai:toy", base_url=url), [get_weather], sampling=SamplingParams(seed=5))
        result = await agent.run("What is the weather?", environment=environment, snapshots=True)
        choice = await result.best_of(2, lambda branch, world: len(branch.answer or ""), at_turn=1)
        last = await choice.best.continue_("Thanks!", environment=environment)
    assert (result.answer, choice.best.answer, last.answer) == ("Sunny.", "It is sunny.", "Bye.")
    _, asked, *branches, continued = server.requests
    assert [branch["messages"] for branch in branches] == [asked["messages"]] * 2
    assert asked["messages"][-1]["content"] == "sunny"
    assert [(request["seed"]) for request in (asked, *branches)] in ([5, 6, 7], [5, 7, 6])
    assert [message["content"] for message in continued["messages"][-2:]] == ["It is sunny.", "Thanks!"]
    assert choice.best.usage.turns == 1
