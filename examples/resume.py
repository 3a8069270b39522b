"""Resume a run whose process was killed while a tool ran. Run it with `python examples/resume.py`."""

import os
import signal
import tempfile
from collections.abc import Sequence
from pathlib import Path

from agentkit import Agent, AssistantTurn, Message, ScriptedModel, tool

PARENT = os.getpid()


@tool
def get_weather(city: str) -> str:
    """Return the weather of a city."""
    if os.getpid() != PARENT:
        os.kill(os.getpid(), signal.SIGKILL)
    return "sunny, 21 degrees"


def ask_until_known(messages: Sequence[Message], think: bool) -> AssistantTurn:
    """Stand in for a large model: call the tool until it has a result."""
    if messages[-1].role == "tool" and not messages[-1].is_error:
        return AssistantTurn(content=messages[-1].content)
    return AssistantTurn(calls=[("get_weather", {"city": "Paris"})])


agent = Agent(ScriptedModel(ask_until_known), [get_weather])
record = Path(tempfile.mkdtemp(), "weather.jsonl")
if os.fork() == 0:
    agent.run_sync("What is the weather in Paris?", trajectory=record)
os.wait()

result = agent.resume_sync(record)
print(result.trajectory.results[0].content.partition(": the")[0])
print(f"{result.answer}, after {result.usage.turns} turns")
