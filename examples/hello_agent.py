"""An agent with one custom tool and the packaged tiny model. Run it with `python examples/hello_agent.py`."""

from agentkit import Agent, tool


@tool
def get_weather(city: str) -> str:
    """Return the weather of a city."""
    return {"Paris": "sunny, 21 degrees", "Oslo": "snowy, -3 degrees"}.get(city, "unknown")


agent = Agent("tiny", [get_weather])
print(agent.run_sync("What is the weather in Paris?").answer)
