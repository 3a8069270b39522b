"""The benchmark parallel-calls: many agents with many calls at the same time, beside the ideal under their limit.

Each agent makes all its calls in one turn. A call sleeps, and all agents share one limit on running calls, so the ideal
is the time of all calls divided by the limit.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import anyio

from agentkit.agent import Agent
from agentkit.limits import ConcurrencyLimits
from agentkit.messages import Message, ToolMessage
from agentkit.models.scripted import AssistantTurn, ScriptedModel, packaged_tokenizer
from agentkit.result import RunResult
from agentkit_engine.benchmarks.errors import OutputsDifferError
from agentkit_engine.benchmarks.record import Bound, Measurement
from agentkit_engine.benchmarks.timing import Median
from agentkit_engine.chat import encode_completion_ids
from agentkit_tools import tool


@dataclass(frozen=True, slots=True)
class Load:
    """Number of agents, calls of each, seconds of a call, and calls that may run at the same time, of all agents."""

    agents: int
    calls: int
    call_s: float
    at_once: int

    @property
    def ideal_s(self) -> float:
        """The time of all calls, `at_once` at a time."""
        return self.agents * self.calls * self.call_s / self.at_once


def parallel_calls(load: Load, repeats: int) -> Iterator[Measurement]:
    """Run parallel-calls."""
    taken = Median.of([anyio.run(_run, load) for _ in range(repeats)])
    yield Measurement(
        "parallel-calls",
        f"{load.agents} agents with {load.calls} calls of {1000 * load.call_s:g} ms each, {load.at_once} at a time",
        taken.value,
        "s",
        taken.spread,
        "the ideal, in which nothing but the calls takes time",
        load.ideal_s,
        higher_is_better=False,
        target=Bound("value", "<=", 1.5 * load.ideal_s),
        outputs="every result is at the place of its call; no task and no place under the limit is left over",
    )


async def _run(load: Load) -> float:
    """Run all agents at the same time; return the seconds that they took."""

    @tool(read_only=True)
    async def wait(number: int) -> int:
        """Wait, and return the number."""
        await anyio.sleep(load.call_s)
        return number

    tokenizer = packaged_tokenizer()
    arguments = [json.dumps({"number": number}) for number in range(load.calls)]
    made = [{"type": "function", "function": {"name": wait.name, "arguments": each}} for each in arguments]
    turn = encode_completion_ids({"role": "assistant", "tool_calls": made}, tokenizer=tokenizer, think=False)

    def calling(messages: Sequence[Message], think: bool) -> AssistantTurn | Sequence[int]:
        return AssistantTurn(content="done") if isinstance(messages[-1], ToolMessage) else turn

    limits = ConcurrencyLimits(per_turn=load.calls, per_tool=load.at_once, total=load.at_once)
    agent = Agent(ScriptedModel(calling, tokenizer), [wait], effort="none", concurrency=limits)
    results: list[RunResult] = []

    async def run() -> None:
        results.append(await agent.run("Wait."))

    start = time.perf_counter()
    async with anyio.create_task_group() as task_group:
        for _ in range(load.agents):
            task_group.start_soon(run)
    taken_s = time.perf_counter() - start
    numbers = [str(number) for number in range(load.calls)]
    for result in results:
        said = [message.content for message in result.trajectory.messages if isinstance(message, ToolMessage)]
        if (result.status, said) != ("answered", numbers):
            raise OutputsDifferError(f"a run ended as {result.outcome}, with the results {said}")
    if (tasks := len(anyio.get_running_tasks())) != 1 or limits.in_all.value != load.at_once:
        raise OutputsDifferError(
            f"{tasks} tasks are left, expected 1; {limits.in_all.value} of {load.at_once} calls may run"
        )
    return taken_s
