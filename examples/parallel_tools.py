"""The calls of one turn run at the same time. Run it with `python examples/parallel_tools.py`."""

from collections.abc import Sequence

import anyio

from agentkit import Agent, AssistantTurn, Message, ScriptedModel, tool

SECONDS = {"Paris": 0.9, "Rome": 0.6, "Oslo": 0.3}


@tool
async def get_weather(city: str) -> str:
    """Return the weather of a city."""
    print(f"{city}?")
    await anyio.sleep(SECONDS[city])
    print(f"{city}.")
    return f"{city} is sunny"


def plan(messages: Sequence[Message], think: bool) -> AssistantTurn:
    """Stand in for a large model: call the tool for three cities in one turn, then join the results."""
    if results := [message.content for message in messages if message.role == "tool"]:
        return AssistantTurn(content=", ".join(results))  # in the order of the calls, not of their ends
    return AssistantTurn(calls=[("get_weather", {"city": city}) for city in SECONDS])


print(Agent(ScriptedModel(plan), [get_weather]).run_sync("Where is it sunny?").answer)
