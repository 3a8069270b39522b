"""Two questions go to sub-agents at the same time. Run it with `python examples/subagents.py`."""

from collections.abc import Sequence

from agentkit import Agent, AssistantTurn, Limits, Message, ScriptedModel, tool


@tool
def get_weather(city: str) -> str:
    """Return the weather of a city."""
    return {"Paris": "sunny, 21 degrees", "Rome": "rainy, 14 degrees"}.get(city, "unknown")


def plan(messages: Sequence[Message], think: bool) -> AssistantTurn:
    """Stand in for a large model: delegate to the forecaster and join its answers."""
    if answers := [message.content for message in messages if message.role == "tool"]:
        return AssistantTurn(content=" / ".join(answers))
    tasks = [{"task": f"What is the weather in {city}?"} for city in ("Paris", "Rome")]
    return AssistantTurn(calls=[("forecaster", task) for task in tasks])


forecaster = Agent("tiny", [get_weather]).as_tool("forecaster", "Answers a question.", limits=Limits(max_turns=5))
result = Agent(ScriptedModel(plan), [forecaster]).run_sync("Compare the weather in Paris and Rome.")
print(result.answer)
print(f"{result.usage.turns} turns, {result.usage.total.turns} with sub-agents")
