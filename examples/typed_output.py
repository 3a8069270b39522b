"""A typed answer: `output` is a `Weather`. Run it with `python examples/typed_output.py`; it prints
`sky='sunny' degrees=21`.
"""

from typing import Literal

from pydantic import BaseModel, Field

from agentkit import Agent, Limits, tool


class Weather(BaseModel):
    sky: Literal["sunny", "snowy"]
    degrees: int = Field(ge=-99, le=99)


@tool
def get_weather(city: str) -> str:
    """Return the weather of a city."""
    return {"Paris": "sunny, 21 degrees", "Oslo": "snowy, -3 degrees"}.get(city, "unknown")


agent = Agent("tiny", [get_weather], output_type=Weather, limits=Limits(max_turns=6))
result = agent.run_sync("What is the weather in Paris?")
print(result.output or f"no answer: {result.limit}")
