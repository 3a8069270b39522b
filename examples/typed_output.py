"""A typed answer: `output` is a `Weather`. Run it with `python examples/typed_output.py`."""

from typing import Literal

from pydantic import BaseModel, Field

from agentkit import Agent, tool


class Weather(BaseModel):
    sky: Literal["sunny", "snowy"]
    degrees: int = Field(ge=-99, le=99)


@tool
def get_weather(city: str) -> str:
    """Return the weather of a city."""
    return {"Paris": "sunny, 21 degrees", "Oslo": "snowy, -3 degrees"}.get(city, "unknown")


agent = Agent("tiny", [get_weather], output_type=Weather)
weather = agent.run_sync("What is the weather in Paris?").output
if weather is not None:
    print(f"{weather.sky}, {weather.degrees}")
