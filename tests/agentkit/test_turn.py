"""The calls of one turn: concurrent, limited, in order, early. Events, not sleeps, determine the order."""

from __future__ import annotations

import math
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager

import anyio
import pytest

from agentkit import (
    Agent,
    AssistantTurn,
    CallFinished,
    CallOutput,
    CallStarted,
    ConcurrencyLimits,
    Limits,
    ScriptedModel,
    Tool,
    ToolCall,
    ToolContext,
    ToolMessage,
    ToolResult,
    Trajectory,
    tool,
)
from agentkit.approval import Approvals
from agentkit.forks import ignore
from agentkit.model import Effort, History, ModelSession
from agentkit.models.scripted import Policy, ScriptedToken, ScriptedTokens
from agentkit.models.tokens import TokenizedSession
from agentkit.turn import TurnCalls
from agentkit_engine.chat import Tokenizer
from agentkit_engine.sampling_params import SamplingParams
from agentkit_environments import Environment

pytestmark = pytest.mark.anyio
Script = Callable[..., ScriptedModel]
DONE = AssistantTurn(None, "done")


def results(trajectory: Trajectory) -> list[str]:
    return [message.content for message in trajectory.messages if isinstance(message, ToolMessage)]


async def test_128_calls_run_concurrently_and_results_keep_their_order(
    script: Script, environment: Environment
) -> None:
    """Every call waits until all have started, and then for the call after it, so they finish in reverse order."""
    started = 0
    all_started = anyio.Event()
    finished = [anyio.Event() for _ in range(129)]
    finished[128].set()

    @tool
    async def number(n: int) -> int:
        """Number."""
        nonlocal started
        started += 1
        if started == 128:
            all_started.set()
        await all_started.wait()
        await finished[n + 1].wait()
        finished[n].set()
        return n

    calls = [("number", {"n": n}) for n in range(128)]
    concurrency = ConcurrencyLimits(per_turn=128, per_tool=128, total=128)
    agent = Agent(script(AssistantTurn(None, "", calls), DONE), [number], concurrency=concurrency)
    with anyio.fail_after(60):
        result = await agent.run("Q", environment=environment)
    assert results(result.trajectory) == [str(n) for n in range(128)]
    assert [r.content for r in result.trajectory.results] == [str(n) for n in reversed(range(128))]


@pytest.mark.parametrize(
    ("bounds", "most", "most_of_one"),
    [({"per_turn": 3}, 3, 2), ({"total": 4}, 4, 2), ({"per_tool": 2}, 4, 2), ({}, 12, 6)],
)
async def test_concurrency_limits_are_reached_and_never_exceeded(
    script: Script, environment: Environment, bounds: dict[str, int], most: int, most_of_one: int
) -> None:
    """With six calls each of two tools, the number of running calls reaches each limit but never exceeds it."""
    running = {"one": 0, "other": 0}
    seen: list[tuple[int, int]] = []

    def make(name: str) -> Tool:
        @tool(name=name)
        async def count() -> str:
            """Count."""
            running[name] += 1
            seen.append((sum(running.values()), running["one"]))
            for _ in range(20):
                await anyio.lowlevel.checkpoint()
            running[name] -= 1
            return "ok"

        return count

    calls: list[tuple[str, dict[str, object]]] = [("one", {}), ("other", {})] * 6
    agent = Agent(
        script(AssistantTurn(None, "", calls), DONE),
        [make("one"), make("other")],
        concurrency=ConcurrencyLimits(**bounds),
    )
    result = await agent.run("Q", environment=environment)
    assert results(result.trajectory) == ["ok"] * 12
    assert max(total for total, _ in seen) == most
    assert max(one for _, one in seen) == most_of_one


async def test_the_total_limit_spans_runs(script: Script, environment: Environment) -> None:
    running, most = 0, 0

    @tool
    async def count() -> str:
        """Count."""
        nonlocal running, most
        running += 1
        most = max(most, running)
        for _ in range(20):
            await anyio.lowlevel.checkpoint()
        running -= 1
        return "ok"

    calls: list[tuple[str, dict[str, object]]] = [("count", {})] * 4
    agent = Agent(script(AssistantTurn(None, "", calls), DONE), [count], concurrency=ConcurrencyLimits(total=5))
    async with anyio.create_task_group() as task_group:
        for _ in range(4):
            task_group.start_soon(lambda: agent.run("Q", environment=environment))
    assert most == 5


async def test_a_barrier_runs_alone(script: Script, environment: Environment) -> None:
    log: list[str] = []

    @tool
    async def work(n: int) -> str:
        """Work."""
        log.append(f"start {n}")
        await anyio.lowlevel.checkpoint()
        log.append(f"end {n}")
        return "ok"

    @tool(barrier=True)
    async def alone() -> str:
        """Alone."""
        log.append("start alone")
        for _ in range(10):
            await anyio.lowlevel.checkpoint()
        log.append("end alone")
        return "ok"

    calls: list[tuple[str, dict[str, object]]] = [
        ("work", {"n": 0}),
        ("work", {"n": 1}),
        ("alone", {}),
        ("work", {"n": 2}),
        ("alone", {}),
    ]
    await Agent(script(AssistantTurn(None, "", calls), DONE), [work, alone]).run("Q", environment=environment)
    assert sorted(log[:4]) == ["end 0", "end 1", "start 0", "start 1"]
    assert log[4:] == ["start alone", "end alone", "start 2", "end 2", "start alone", "end alone"]


class GatedModel(ScriptedModel):
    """A model that keeps generating its first turn, by holding back the last id until `gate` is set."""

    def __init__(self, policy: Policy, tokenizer: Tokenizer, gate: anyio.Event) -> None:
        super().__init__(policy, tokenizer)
        self.gate = gate
        self.parts = policy, tokenizer

    @asynccontextmanager
    async def open(
        self, *, tools: Sequence[Tool], effort: Effort, sampling: SamplingParams, history: History | None = None
    ) -> AsyncIterator[ModelSession]:
        gate, (_, tokenizer) = self.gate, self.parts

        class Gated(ScriptedTokens):
            async def generate(self, *, max_tokens: int | None) -> AsyncGenerator[ScriptedToken, None]:
                async for token in super().generate(max_tokens=max_tokens):
                    if token.id == tokenizer.eos_id:
                        await gate.wait()
                    yield token

        tokens = Gated(*self.parts)
        session = TokenizedSession(tokens, tokenizer, tools=tools, effort=effort, dialect="v4-preview")
        tokens.messages = session.messages
        yield session


async def test_read_only_calls_start_while_the_model_still_generates(
    environment: Environment, tokenizer: Tokenizer
) -> None:
    """The model ends its turn only after both readers ran. The writer and the calls after it wait for the end of the
    turn."""
    log: list[str] = []
    gate = anyio.Event()

    @tool(read_only=True)
    async def read(n: int) -> str:
        """Read."""
        log.append(f"read {n}")
        if n == 1:
            gate.set()
        return "ok"

    @tool
    async def write() -> str:
        """Write."""
        log.append("write")
        return "ok"

    calls = [("read", {"n": 0}), ("read", {"n": 1}), ("write", {}), ("read", {"n": 2})]

    def policy(messages: object, think: bool) -> AssistantTurn:
        return DONE if log else AssistantTurn(None, "", calls)

    agent = Agent(GatedModel(policy, tokenizer, gate), [read, write])
    with anyio.fail_after(20):
        result = await agent.run("Q", environment=environment)
    assert log == ["read 0", "read 1", "write", "read 2"]
    starts = [record for record in result.trajectory.records if isinstance(record, CallStarted)]
    assert [start.early for start in starts] == [True, True, False, False]
    finished = [record for record in result.trajectory.records if isinstance(record, CallFinished)]
    assert len(finished) == 4


async def test_output_of_an_early_call_comes_while_the_model_still_generates(
    environment: Environment, tokenizer: Tokenizer
) -> None:
    gate = anyio.Event()

    @tool(read_only=True)
    async def read(context: ToolContext) -> str:
        """Read."""
        context.emit_output("begun")
        await gate.wait()
        return "ok"

    def policy(messages: object, think: bool) -> AssistantTurn:
        return DONE if gate.is_set() else AssistantTurn(None, "", [("read", {})])

    events = []
    with anyio.fail_after(20):
        async for event in Agent(GatedModel(policy, tokenizer, gate), [read]).stream("Q", environment=environment):
            events.append(event)
            if isinstance(event, CallOutput):
                gate.set()
    assert CallOutput("call_0_0", "stdout", "begun") in events


@pytest.mark.parametrize("before", [0, 1])
async def test_a_read_only_barrier_does_not_start_early(
    environment: Environment, tokenizer: Tokenizer, before: int
) -> None:
    """The barrier and the calls after it wait for the end of the turn."""
    log: list[str] = []
    gate = anyio.Event()

    @tool(read_only=True)
    async def read(n: int) -> str:
        """Read."""
        log.append(f"read {n}")
        return "ok"

    @tool(read_only=True, barrier=True)
    async def alone() -> str:
        """Alone."""
        log.append("alone")
        return "ok"

    calls: list[tuple[str, dict[str, object]]] = [("read", {"n": n}) for n in range(before)]
    calls += [("alone", {}), ("read", {"n": before}), ("alone", {})]

    def policy(messages: object, think: bool) -> AssistantTurn:
        return DONE if gate.is_set() else AssistantTurn(None, "", calls)

    async def open_gate() -> None:
        for _ in range(50):  # enough for any call that would start early
            await anyio.lowlevel.checkpoint()
        log.append("the turn ends")
        gate.set()

    agent = Agent(GatedModel(policy, tokenizer, gate), [read, alone])
    with anyio.fail_after(20):
        async with anyio.create_task_group() as task_group:
            task_group.start_soon(open_gate)
            result = await agent.run("Q", environment=environment)
    early = [f"read {n}" for n in range(before)]
    assert log == [*early, "the turn ends", "alone", f"read {before}", "alone"]
    starts = [record.early for record in result.trajectory.records if isinstance(record, CallStarted)]
    assert starts == [True] * before + [False] * 3


async def test_tool_time_of_earlier_turns_counts(script: Script, environment: Environment) -> None:
    """Each turn stays below the limit, two together exceed it, and there is no third."""

    @tool
    async def work() -> str:
        """Work."""
        await anyio.sleep(0.2)
        return "ok"

    @tool
    async def wait() -> str:
        """Wait."""
        await anyio.sleep_forever()
        return ""

    limits = Limits(tool_time_s=0.35, max_turns=5)
    model = script(AssistantTurn(None, "", [("work", {})]))
    result = await Agent(model, [work], limits=limits).run("Q", environment=environment)
    assert (result.limit, result.usage.turns) == ("tool_time_s", 2)
    model = script(AssistantTurn(None, "", [("work", {})]), AssistantTurn(None, "", [("wait", {})]))
    with anyio.fail_after(30):
        result = await Agent(model, [work, wait], limits=limits).run("Q", environment=environment)
    assert (result.limit, result.usage.turns) == ("tool_time_s", 2)


async def test_a_spent_tool_time_forbids_the_next_turn(
    script: Script, environment: Environment, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The times are faked, so the speed of the machine does not matter. The run stops between two turns."""

    @tool
    async def work() -> str:
        """Work."""
        return "ok"

    def finished(self: TurnCalls, stopped: str) -> list[ToolResult]:
        self.time_s = 3.0
        return results_of(self, stopped)

    results_of = TurnCalls.results
    monkeypatch.setattr(TurnCalls, "results", finished)
    model = script(AssistantTurn(None, "", [("work", {})]))
    result = await Agent(model, [work], limits=Limits(tool_time_s=6, max_turns=9)).run("Q", environment=environment)
    assert (result.limit, result.usage.turns, result.usage.tool_time_s) == ("tool_time_s", 2, 6.0)


async def test_wall_time_in_generation_stops_early_calls_too(environment: Environment, tokenizer: Tokenizer) -> None:
    @tool(read_only=True)
    async def wait() -> str:
        """Wait."""
        await anyio.sleep_forever()
        return ""

    model = GatedModel(lambda messages, think: AssistantTurn("Hm.", "", [("wait", {})]), tokenizer, anyio.Event())
    result = await Agent(model, [wait], limits=Limits(wall_time_s=0.2)).run("Q", environment=environment)
    assert result.limit == "wall_time_s"
    assert results(result.trajectory) == ["Error: stopped before it finished: the run's limit wall_time_s was reached"]
    prompt, sampled, forced = result.trajectory.segments
    assert (prompt.kind, sampled.kind, forced.kind) == ("prompt", "sampled", "forced")
    assert tokenizer.decode(forced.ids) == "<｜end▁of▁sentence｜>"


async def test_synchronous_calls_run_concurrently_up_to_the_limits(script: Script, environment: Environment) -> None:
    """Each call waits for all others, so they finish only if each has its own thread."""
    everyone = threading.Barrier(64)

    def meet() -> str:
        everyone.wait(60)
        return "met"

    calls: list[tuple[str, dict[str, object]]] = [("meet", {})] * 64
    concurrency = ConcurrencyLimits(per_turn=64, per_tool=64, total=64)
    agent = Agent(script(AssistantTurn(None, "", calls), DONE), [meet], concurrency=concurrency)
    result = await agent.run("Q", environment=environment)
    assert results(result.trajectory) == ["met"] * 64


async def test_waiting_for_a_slot_counts_as_neither_call_time_nor_tool_time(
    script: Script, environment: Environment
) -> None:
    """Another agent holds the only slot for longer than a call of this agent may take."""
    bounds = ConcurrencyLimits(total=1)
    held, release = anyio.Event(), anyio.Event()

    @tool
    async def hold() -> str:
        """Hold."""
        held.set()
        await release.wait()
        return "held"

    def quick() -> str:
        """Quick."""
        return "done"

    holder = Agent(script(AssistantTurn(None, "", [("hold", {})]), DONE), [hold], concurrency=bounds)
    limits = Limits(tool_time_s=0.3, call_timeout_s=0.3)
    calls: list[tuple[str, dict[str, object]]] = [("quick", {})] * 3
    agent = Agent(script(AssistantTurn(None, "", calls), DONE), [quick], concurrency=bounds, limits=limits)
    async with anyio.create_task_group() as task_group:
        task_group.start_soon(lambda: holder.run("Q", environment=environment))
        await held.wait()

        async def release_late() -> None:
            await anyio.sleep(0.6)  # twice the time limit of a call
            release.set()

        task_group.start_soon(release_late)
        result = await agent.run("Q", environment=environment)
    assert results(result.trajectory) == ["done"] * 3
    assert result.status == "answered"
    assert result.usage.tool_time_s < 0.3


def read_only_calls(environment: Environment, *, hold: anyio.Event | None = None) -> TurnCalls:
    """The calls of a turn with one read-only tool, `look`, which waits for `hold`."""

    @tool(read_only=True)
    async def look() -> str:
        """Look."""
        if hold is not None:
            await hold.wait()
        return "seen"

    context = ToolContext(environment, timeout_s=60)
    return TurnCalls({"look": look}, context, ConcurrencyLimits(), ignore, ignore, approvals=Approvals(), max_calls=8)


async def test_a_call_that_is_withdrawn_before_it_starts_leaves_the_clock_alone(environment: Environment) -> None:
    hold = anyio.Event()
    calls = read_only_calls(environment, hold=hold)
    async with anyio.create_task_group() as task_group:
        calls.open(task_group, deadline=math.inf, time_left_s=None)
        calls.ready(0, ToolCall("call_0", "look", "{}"))
        calls.withdraw()  # its task has not run yet
        await anyio.wait_all_tasks_blocked()
        calls.ready(1, ToolCall("call_1", "look", "{}"))
        await anyio.wait_all_tasks_blocked()
        hold.set()
        await calls.finish()
    assert [result.content for result in calls.results("x")] == ["seen"]
    assert 0 < calls.time_s < 60  # seconds of one call, not seconds since the clock was last set


async def test_the_tool_time_limit_counts_only_while_a_call_runs(environment: Environment) -> None:
    hold = anyio.Event()
    calls = read_only_calls(environment, hold=hold)
    async with anyio.create_task_group() as task_group:
        calls.open(task_group, deadline=math.inf, time_left_s=100)
        calls.ready(0, ToolCall("call_0", "look", "{}"))
        await anyio.wait_all_tasks_blocked()
        assert task_group.cancel_scope.deadline < math.inf
        hold.set()
        await calls.finish()
        assert task_group.cancel_scope.deadline == math.inf  # the model may generate for longer
