"""Output of calls while they run: events for the caller, which are in no record and which no model sees."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import aclosing
from pathlib import Path
from typing import Any

import anyio
import pytest

from agentkit import (
    Agent,
    AssistantTurn,
    CallFinished,
    CallOutput,
    CallStarted,
    Event,
    Limits,
    RunFinished,
    ScriptedModel,
    SubagentEvent,
    Tool,
    ToolContext,
    Trajectory,
    tool,
)
from agentkit_environments import Environment
from agentkit_tools import BUILTINS, CommandTool, FunctionTool, bash_session

pytestmark = pytest.mark.anyio
Script = Callable[..., ScriptedModel]
DONE = AssistantTurn(None, "done")
UNTIL_GO = "while ! [ -e go ]; do sleep 0.01; done; rm go"


def calls(*made: tuple[str, dict[str, Any]]) -> AssistantTurn:
    return AssistantTurn(None, "", list(made))


async def follow(
    agent: Agent[Any], environment: Environment, answers: dict[str, str] | None = None, **options: Any
) -> list[Event]:
    """Return the events of a run. Write a file when output of a text comes: `answers[text]`, for which a call waits."""
    events: list[Event] = []
    with anyio.fail_after(60):
        async with aclosing(agent.stream("Q", environment=environment, **options)) as stream:
            async for event in stream:
                events.append(event)
                below = event.event if isinstance(event, SubagentEvent) else event
                if isinstance(below, CallOutput) and below.text in (answers or {}):
                    await environment.write_file((answers or {})[below.text], "")
    return events


def output_of(events: list[Event], call_id: str, stream: str) -> str:
    return "".join(
        event.text
        for event in events
        if isinstance(event, CallOutput) and (event.call_id, event.stream) == (call_id, stream)
    )


async def test_output_comes_while_the_call_runs(script: Script, environment: Environment, tmp_path: Path) -> None:
    command = f"echo one; {UNTIL_GO}; echo two >&2; {UNTIL_GO}; printf three; exit 3"
    agent = Agent(script(calls(("bash", {"command": command})), DONE), [BUILTINS["bash"]])
    path = tmp_path / "run.jsonl"
    events = await follow(agent, environment, {"one\n": "go", "two\n": "go"}, trajectory=path)
    outputs = [event for event in events if isinstance(event, CallOutput)]
    assert outputs[:2] == [CallOutput("call_0_0", "stdout", "one\n"), CallOutput("call_0_0", "stderr", "two\n")]
    assert output_of(events, "call_0_0", "stdout") == "one\nthree"
    kinds = [event.type for event in events]
    assert kinds.index("call_started") < kinds.index("call_output")
    assert max(place for place, kind in enumerate(kinds) if kind == "call_output") < kinds.index("call_finished")

    finished = events[-1]
    assert isinstance(finished, RunFinished)
    records = finished.result.trajectory.records
    assert finished.result.trajectory.results[0].content == "one\nthree\ntwo\n[exit code 3]"
    assert not {"call_output"} & {record.type for record in records}
    assert Trajectory.load(path).records == records
    assert "call_output" not in path.read_text()


@pytest.mark.parametrize(
    ("using", "arguments"),
    [
        (BUILTINS["bash"], {"command": "echo out; echo err >&2"}),
        (bash_session, {"command": "echo out; echo err >&2"}),
        (BUILTINS["python"], {"code": "import sys; print('out'); print('err', file=sys.stderr)"}),
        (CommandTool("own", "Own.", {"type": "object"}, "echo out; cat >/dev/null; echo err >&2"), {}),
    ],
    ids=["bash", "bash_session", "python", "command"],
)
async def test_every_tool_that_runs_a_command_passes_its_output_on(
    script: Script, environment: Environment, using: Tool, arguments: dict[str, Any]
) -> None:
    events = await follow(Agent(script(calls((using.name, arguments)), DONE), [using]), environment)
    assert output_of(events, "call_0_0", "stdout") == "out\n"
    assert output_of(events, "call_0_0", "stderr") == "err\n"


async def test_calls_that_run_side_by_side_have_their_own_output(script: Script, environment: Environment) -> None:
    commands = [f"echo {n}; while ! [ -e go{1 - n} ]; do sleep 0.01; done; echo {n}" for n in range(2)]
    agent = Agent(script(calls(*(("bash", {"command": command}) for command in commands)), DONE), [BUILTINS["bash"]])
    events = await follow(agent, environment, {"0\n": "go0", "1\n": "go1"})
    assert [output_of(events, f"call_0_{n}", "stdout") for n in range(2)] == ["0\n0\n", "1\n1\n"]


async def test_a_tool_emits_output_of_its_own(script: Script, environment: Environment) -> None:
    go = anyio.Event()
    gone = threading.Event()

    @tool
    async def deploy(context: ToolContext) -> str:
        """Deploy."""
        context.emit_output("uploading\n")
        await go.wait()
        result = await context.environment.exec("echo checked", on_output=context.on_output)
        context.emit_output("warned\n", stream="stderr")
        return result.stdout

    @tool
    def build(context: ToolContext) -> str:
        """Build, in a thread."""
        context.emit_output("compiling\n")
        gone.wait(30)
        context.emit_output("linking\n")
        return "built"

    agent = Agent(script(calls(("deploy", {}), ("build", {})), DONE), [deploy, build])
    events = []
    with anyio.fail_after(60):
        async for event in agent.stream("Q", environment=environment):
            events.append(event)
            if event == CallOutput("call_0_0", "stdout", "uploading\n"):
                go.set()
            elif event == CallOutput("call_0_1", "stdout", "compiling\n"):
                gone.set()
    assert output_of(events, "call_0_0", "stdout") == "uploading\nchecked\n"
    assert output_of(events, "call_0_0", "stderr") == "warned\n"
    assert output_of(events, "call_0_1", "stdout") == "compiling\nlinking\n"
    assert (await deploy.call(started(events, 1).call, ToolContext(environment))).content == "checked\n"


def started(events: list[Event], number: int) -> CallStarted:
    return [event for event in events if isinstance(event, CallStarted)][number - 1]


async def test_nothing_comes_after_the_end_of_a_call(script: Script, environment: Environment) -> None:
    over, said = threading.Event(), threading.Event()

    @tool
    def slow(context: ToolContext) -> str:
        """Go on after the deadline."""
        over.wait(30)
        context.emit_output("late")
        said.set()
        return ""

    class Impatient(FunctionTool[..., str]):
        def deadline_s(self, context: ToolContext) -> float:
            return 0.05

    agent = Agent(script(calls(("slow", {})), DONE), [Impatient(slow.fn)], limits=Limits(max_turns=2))
    events = []
    async for event in agent.stream("Q", environment=environment):
        events.append(event)
        if isinstance(event, CallFinished):
            assert event.result.is_error
            over.set()
            await anyio.to_thread.run_sync(said.wait, 30)
    assert said.is_set()
    assert not [event for event in events if isinstance(event, CallOutput)]


async def test_output_of_a_stopped_call_stays(script: Script, environment: Environment) -> None:
    agent = Agent(script(calls(("bash", {"command": "echo before; sleep 60"})), DONE), [BUILTINS["bash"]])
    agent.limits = Limits(call_timeout_s=1)
    events = await follow(agent, environment)
    assert output_of(events, "call_0_0", "stdout") == "before\n"
    agent.limits = Limits(tool_time_s=1)
    events = await follow(agent, environment)
    assert output_of(events, "call_0_0", "stdout") == "before\n"


async def test_output_of_a_sub_agent_comes_with_its_call(script: Script, environment: Environment) -> None:
    helper = Agent(script(calls(("bash", {"command": f"echo deep; {UNTIL_GO}"})), DONE), [BUILTINS["bash"]])
    main = Agent(script(calls(("helper", {"task": "T"})), DONE), [helper.as_tool("helper", "Helps.")])
    events = await follow(main, environment, {"deep\n": "go"})
    assert SubagentEvent("call_0_0", CallOutput("call_0_0", "stdout", "deep\n")) in events
    assert not [event for event in events if isinstance(event, CallOutput)]
