"""Replay a recorded run, and find what was changed in its record. Run it with `python examples/replay.py`."""

from agentkit import Agent, EmbeddedModel, MessageAdded, UserMessage, replay, tool


@tool
def get_weather(city: str) -> str:
    """Return the weather of a city."""
    return {"Paris": "sunny, 21 degrees", "Oslo": "snowy, -3 degrees"}.get(city, "unknown")


model = EmbeddedModel("tiny")
record = Agent(model, [get_weather]).run_sync("What is the weather in Paris?").trajectory
print("equal" if replay(record, model).same else "different")

question = record.records.index(MessageAdded(UserMessage("What is the weather in Paris?")))
record.records[question] = MessageAdded(UserMessage("What is the weather in Rome?"))
print(replay(record, model).difference)
