"""An agent on a model behind an API.

DEEPSEEK_API_KEY=... python examples/remote_model.py
OPENAI_BASE_URL=http://localhost:8000/v1 python examples/remote_model.py openai:MODEL
"""

import sys

from agentkit import Agent, tool


@tool
def get_weather(city: str) -> str:
    """Return the weather of a city."""
    return {"Paris": "sunny, 21 degrees", "Oslo": "snowy, -3 degrees"}.get(city, "unknown")


name = sys.argv[1] if len(sys.argv) > 1 else "deepseek:deepseek-flash"
result = Agent(name, tools=[get_weather]).run_sync("What is the weather in Paris and Oslo?")
usage = result.usage
print(result.answer)
cost = "an unknown price" if usage.cost_usd is None else f"${usage.cost_usd:.6f}"
print(f"{usage.turns} turns, {usage.prompt_tokens} tokens read, {usage.sampled_tokens} written, for {cost}")
