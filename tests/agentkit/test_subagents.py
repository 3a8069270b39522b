"""Agents as tools: their own budget and record, in the caller's environment, with the caller's rules."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path
from typing import Any

import anyio
import pytest

from agentkit import (
    Agent,
    AssistantTurn,
    CallReady,
    ConcurrencyLimits,
    EmbeddedModel,
    ForkTool,
    Limits,
    Message,
    PendingCall,
    Refuse,
    ScriptedModel,
    SubagentEvent,
    SubagentFinished,
    SubagentStarted,
    ToolContext,
    ToolMessage,
    Trajectory,
    Usage,
    UserMessage,
    replay,
    tool,
)
from agentkit.benchmarks.steered import SteeredModel
from agentkit.events import CallFinished, MessageAdded
from agentkit.model import total_usage
from agentkit.models.tokens import rebuild_token_ids
from agentkit.subagent import ELSEWHERE
from agentkit_engine import AsyncEngine, Engine
from agentkit_engine.chat import Tokenizer
from agentkit_environments import Environment
from agentkit_tools import BUILTINS, ToolCall, ToolDefinitionError

from .conftest import get_weather

pytestmark = pytest.mark.anyio
Script = Callable[..., ScriptedModel]


def ask(*tasks: str, name: str = "helper") -> AssistantTurn:
    return AssistantTurn(calls=[(name, {"task": task}) for task in tasks])


def say(text: str) -> AssistantTurn:
    return AssistantTurn(content=text)


def use(name: str, **arguments: Any) -> AssistantTurn:
    return AssistantTurn(calls=[(name, arguments)])


async def test_the_answer_of_an_agent_is_the_result(script: Script, environment: Environment, tmp_path: Path) -> None:
    helper = Agent(script(use("get_weather", city="Oslo"), say("Snowy.")), [get_weather], system="Help.")
    main = Agent(script(ask("What is the weather in Oslo?"), say("It snows.")), [helper.as_tool("helper", "Helps.")])
    result = await main.run("Q", environment=environment, trajectory=tmp_path / "run.jsonl")
    assert result.answer == "It snows."
    assert [message.content for message in result.trajectory.messages if isinstance(message, ToolMessage)] == ["Snowy."]

    (child,) = result.trajectory.subagents
    assert child.messages[1] == UserMessage("What is the weather in Oslo?")
    assert child.outcome is not None
    kept = Trajectory.load(tmp_path / "run.agent1.jsonl")
    assert kept.messages == child.messages
    assert kept.header.metadata == {"parent": result.trajectory.header.id, "call_id": "call_0_0"}
    record = Trajectory.load(tmp_path / "run.jsonl").records
    assert SubagentStarted("call_0_0", "helper", child.header.id, "run.agent1.jsonl") in record
    assert SubagentFinished("call_0_0", child.outcome) in record

    usage = result.usage
    assert usage.subagents == child.outcome.usage and usage.turns == 2
    assert usage.total.turns == 4 and usage.total.calls == 2 and usage.total.wall_time_s == usage.wall_time_s
    assert usage.total.sampled_tokens == usage.sampled_tokens + child.outcome.usage.sampled_tokens
    assert result.trajectory.outcome == result.outcome


async def test_events_of_an_agent_are_streamed_with_its_call(script: Script, environment: Environment) -> None:
    main = Agent(script(ask("T"), say("ok")), [Agent(script(say("Yes.")), []).as_tool("helper", "Helps.")])
    async with aclosing(main.stream("Q", environment=environment)) as stream:
        events = [event async for event in stream]
    below = [event.event for event in events if isinstance(event, SubagentEvent) and event.call_id == "call_0_0"]
    assert below[0].type == "message" and below[-1].type == "run_finished"
    assert [event.type for event in below].count("text_delta") >= 1


@pytest.mark.parametrize(
    ("turn", "limits", "why"),
    [
        (use("get_weather", city="Oslo"), Limits(max_turns=2), "the limit max_turns was reached"),
        (say(""), None, "the last turn has no call"),
        (say("word " * 50), Limits(max_tokens=9), "the limit max_tokens was reached"),
    ],
)
async def test_no_answer_is_an_error_result(
    script: Script, environment: Environment, turn: AssistantTurn, limits: Limits | None, why: str
) -> None:
    helper = Agent(script(turn), [get_weather]).as_tool("helper", "Helps.", limits=limits)
    result = await Agent(script(ask("T"), say("ok")), [helper]).run("Q", environment=environment)
    (told,) = result.trajectory.results
    assert told.is_error and told.content.startswith("Error: the agent gave no valid answer: ") and why in told.content
    assert result.answer == "ok"


async def test_an_answer_of_the_wrong_type_is_an_error_result(script: Script, environment: Environment) -> None:
    helper = Agent(script(say("seven")), [], output_type=int)
    result = await Agent(script(ask("T"), say("ok")), [helper.as_tool("n", "N.")]).run("Q", environment=environment)
    (told,) = result.trajectory.results
    assert told.is_error


async def test_a_typed_answer_is_json(script: Script, environment: Environment) -> None:
    helper = Agent(script(say("[7]")), [], output_type=list[int]).as_tool("helper", "Helps.")
    result = await Agent(script(ask("T"), say("ok")), [helper]).run("Q", environment=environment)
    assert result.trajectory.results[0].content == "[7]"


async def test_a_model_that_fails_is_an_error_result_and_its_record_says_so(
    script: Script, environment: Environment, tokenizer: Any
) -> None:
    def fail(messages: Sequence[Message], think: bool) -> AssistantTurn:
        raise ConnectionError("unplugged")

    helper = Agent(ScriptedModel(fail, tokenizer), []).as_tool("helper", "Helps.")
    result = await Agent(script(ask("T"), say("ok")), [helper]).run("Q", environment=environment)
    (told,) = result.trajectory.results
    assert told.is_error and "unplugged" in told.content
    (child,) = result.trajectory.subagents
    assert child.outcome is not None and child.outcome.status == "error"
    assert [record.outcome.status for record in result.trajectory.records if isinstance(record, SubagentFinished)] == [
        "error"
    ]


@pytest.mark.parametrize("arguments", [{}, {"task": "T", "more": 1}])
async def test_invalid_arguments_are_an_error_result(script: Script, environment: Environment, arguments: Any) -> None:
    helper = Agent(script(say("Yes.")), []).as_tool("helper", "Helps.")
    result = await Agent(script(use("helper", **arguments), say("ok")), [helper]).run("Q", environment=environment)
    assert "invalid arguments for helper" in result.trajectory.results[0].content
    assert result.usage.subagents is None


async def test_an_agent_shares_the_files_or_has_its_own(script: Script, environment: Environment) -> None:
    writer = script(use("write_file", path="a.txt", content="here"), say("written"))
    tools = list(BUILTINS.values())
    shared = Agent(writer, tools).as_tool("shared", "Writes.")
    await Agent(script(ask("T", name="shared"), say("ok")), [shared]).run("Q", environment=environment)
    assert await environment.read_file("a.txt") == b"here"


@pytest.mark.sandbox
async def test_an_agent_with_its_own_sandbox_leaves_the_files_alone(script: Script, environment: Environment) -> None:
    writer = script(use("write_file", path="b.txt", content="here"), say("written"))
    own = Agent(writer, list(BUILTINS.values())).as_tool("own", "Writes.", own_sandbox=True)
    result = await Agent(script(ask("T", name="own"), say("ok")), [own]).run("Q", environment=environment)
    assert result.trajectory.results[0].content == "written"
    assert (await environment.exec("ls")).stdout == ""


async def test_an_agent_gets_the_object_of_the_run(script: Script, environment: Environment) -> None:
    @tool
    def secret(context: ToolContext[dict[str, str]]) -> str:
        """Tell the secret."""
        return context.deps["secret"]

    helper = Agent(script(use("secret"), say("told")), [secret]).as_tool("helper", "Helps.")
    main = Agent(script(ask("T"), say("ok")), [helper])
    result = await main.run("Q", environment=environment, deps={"secret": "1234"})
    assert result.trajectory.subagents[0].results[0].content == "1234"


async def test_an_object_that_a_tool_of_the_agent_needs_is_required_at_once(script: Script) -> None:
    @tool
    def count(context: ToolContext[Usage]) -> int:
        """Count."""
        return context.deps.turns

    helper = Agent(script(say("ok")), [count]).as_tool("helper", "Helps.")
    with pytest.raises(TypeError, match="tool 'helper' needs deps of type Usage"):
        await Agent(script(say("ok")), [helper]).run("Q")


async def test_cancelling_the_run_cancels_the_agent(script: Script, environment: Environment, tmp_path: Path) -> None:
    started, cancelled = anyio.Event(), []

    @tool
    async def wait() -> None:
        """Wait."""
        started.set()
        try:
            await anyio.sleep_forever()
        finally:
            cancelled.append(True)

    helper = Agent(script(use("wait"), say("ok")), [wait]).as_tool("helper", "Helps.")
    main = Agent(script(ask("T"), say("ok")), [helper])
    async with anyio.create_task_group() as task_group:
        task_group.start_soon(lambda: main.run("Q", environment=environment, trajectory=tmp_path / "run.jsonl"))
        await started.wait()
        task_group.cancel_scope.cancel()
    assert cancelled == [True]
    for name in ("run.jsonl", "run.agent1.jsonl"):
        record = Trajectory.load(tmp_path / name)
        assert record.outcome is not None and record.outcome.status == "cancelled"


async def test_a_limit_of_the_caller_ends_the_agent(script: Script, environment: Environment) -> None:
    @tool
    async def wait() -> None:
        """Wait."""
        await anyio.sleep_forever()

    helper = Agent(script(use("wait"), say("ok")), [wait]).as_tool("helper", "Helps.")
    main = Agent(script(ask("T"), say("ok")), [helper], limits=Limits(tool_time_s=0.2))
    result = await main.run("Q", environment=environment)
    assert (result.status, result.limit) == ("limit", "tool_time_s")
    assert "stopped before it finished" in result.trajectory.results[0].content
    assert result.usage.subagents is not None and result.usage.subagents.turns == 1


async def test_agents_are_nested_only_so_deep(tokenizer: Any, environment: Environment) -> None:
    def policy(messages: Sequence[Message], think: bool) -> AssistantTurn:
        if isinstance(messages[-1], ToolMessage):
            return say(f"I heard: {messages[-1].content}")
        return ask("Go on", name="again")

    agent = Agent(ScriptedModel(policy, tokenizer), [], limits=Limits(max_depth=3))
    agent.tools["again"] = agent.as_tool("again", "Goes on.")
    result = await agent.run("Q", environment=environment)
    assert result.answer is not None
    assert result.answer.count("I heard") == 4 and "agents are nested as deeply as the run allows" in result.answer
    assert result.usage.total.turns == 8

    main = Agent(ScriptedModel(policy, tokenizer), [agent.as_tool("again", "Goes on.")], limits=Limits(max_depth=1))
    result = await main.run("Q", environment=environment)
    assert result.answer is not None and result.answer.count("I heard") == 2


async def test_agents_that_share_narrow_limits_on_calls_do_not_wait_for_each_other(
    script: Script, environment: Environment
) -> None:
    one = ConcurrencyLimits(per_tool=1, total=1)
    inner = Agent(script(use("get_weather", city="Oslo"), say("Snowy.")), [get_weather], concurrency=one)
    outer = Agent(script(ask("T"), say("ok")), [inner.as_tool("helper", "Helps.")], concurrency=one)
    main = Agent(script(ask("T", "U", "V"), say("ok")), [outer.as_tool("helper", "Helps.")], concurrency=one)
    with anyio.fail_after(20):
        result = await main.run("Q", environment=environment)
    assert [each.content for each in result.trajectory.results] == ["ok"] * 3
    assert result.usage.subagents is not None and result.usage.subagents.subagents is not None
    assert result.usage.total.turns == 2 + 3 * 2 + 3 * 2


async def test_parallel_agents_have_records_of_their_own(
    script: Script, environment: Environment, tmp_path: Path
) -> None:
    helper = Agent(script(say("Yes.")), []).as_tool("helper", "Helps.")
    main = Agent(script(ask("A", "B"), say("ok"), ask("C"), say("ok")), [helper])
    result = await main.run("Q", environment=environment, trajectory=tmp_path / "run.jsonl")
    await result.continue_("More")
    files = sorted(os.listdir(tmp_path))
    assert files == ["run.agent1.jsonl", "run.agent2.jsonl", "run.agent3.jsonl", "run.jsonl"]
    tasks = [Trajectory.load(tmp_path / name).messages[1].content for name in files[:3]]
    assert sorted(tasks[:2]) == ["A", "B"] and tasks[2] == "C"


async def test_a_failed_agent_leaves_the_processes_of_its_siblings_alone(
    script: Script, environment: Environment, tokenizer: Any
) -> None:
    def policy(messages: Sequence[Message], think: bool) -> AssistantTurn:
        if isinstance(messages[-1], ToolMessage):
            raise ConnectionError("unplugged")
        return use("bash", command="until [ -e started ]; do sleep 0.01; done")

    bash = BUILTINS["bash"]
    helper = Agent(ScriptedModel(policy, tokenizer), [bash]).as_tool("helper", "Helps.")
    command = "touch started; until [ -e go ]; do sleep 0.01; done; echo alive"
    turn = AssistantTurn(calls=[("helper", {"task": "T"}), ("bash", {"command": command})])
    main = Agent(script(turn, say("ok")), [helper, bash])
    async with aclosing(main.stream("Q", environment=environment)) as stream:
        async for event in stream:
            if isinstance(event, SubagentFinished):
                await environment.write_file("go", b"")
            if event.type == "run_finished":
                failed, command_result = sorted(event.result.trajectory.results, key=lambda each: each.call_id)
    assert "unplugged" in failed.content
    assert "alive" in command_result.content and not command_result.is_error


async def test_the_rules_of_the_caller_hold_for_the_agent(script: Script, environment: Environment) -> None:
    def no_oslo(call: PendingCall) -> Refuse | None:
        return Refuse("not Oslo") if call.arguments.get("city") == "Oslo" else None

    helper = Agent(script(use("get_weather", city="Oslo"), say("Unknown.")), [get_weather])
    main = Agent(script(ask("T"), say("ok")), [helper.as_tool("helper", "Helps.")], approval=no_oslo)
    result = await main.run("Q", environment=environment)
    (child,) = result.trajectory.subagents
    assert child.results[0].content == "Error: the call was refused: not Oslo"


async def test_one_embedded_model_runs_both(tiny: EmbeddedModel, script: Script, environment: Environment) -> None:
    limits = Limits(max_turns=4, max_tokens=400)
    helper = Agent(tiny, [get_weather], limits=limits).as_tool("get_weather", "Return the weather of a city.")

    @tool
    async def look(city: str, context: ToolContext) -> str:
        """Return the weather of a city."""
        call = ToolCall("c", "get_weather", f'{{"task": "What is the weather in {city}?"}}')
        return (await helper.call(call, context)).content

    async with tiny:
        shared = await Agent(tiny, [tool(name="get_weather")(look.fn)], limits=limits).run(
            "What is the weather in Paris?", environment=environment
        )
    alone = await Agent(tiny, [tool(name="get_weather")(look.fn)], limits=limits).run(
        "What is the weather in Paris?", environment=environment
    )
    for result in (shared, alone):
        assert result.trajectory.subagents


def test_usage_is_added_with_that_of_the_sub_agents() -> None:
    priced, unpriced = Usage(cost_usd=0.5, turns=1), Usage(turns=2, sampled_tokens=1)
    assert total_usage([replace(priced, subagents=priced), replace(priced, subagents=priced)]) == Usage(
        cost_usd=1.0, turns=2, subagents=Usage(cost_usd=1.0, turns=2)
    )
    assert replace(priced, subagents=unpriced).total == Usage(turns=3, sampled_tokens=1)
    assert replace(priced, subagents=replace(priced, subagents=priced)).total == Usage(cost_usd=1.5, turns=3)
    assert priced.total is priced


def test_a_bad_name_is_refused(script: Script) -> None:
    with pytest.raises(ToolDefinitionError, match="tool name 'my helper'"):
        Agent(script(say("ok"))).as_tool("my helper", "Helps.")


def test_the_budget_of_the_tool_is_its_own(script: Script) -> None:
    agent = Agent(script(say("ok")), limits=Limits(max_turns=7))
    assert agent.as_tool("a", "A.").agent.limits.max_turns == 7
    assert agent.as_tool("a", "A.", limits=Limits(max_turns=2)).agent.limits.max_turns == 2
    assert agent.limits.max_turns == 7


def delegating(messages: Sequence[Message], think: bool) -> AssistantTurn:
    """Delegate two questions to forks of the agent, which each look once; then join their answers."""
    last = messages[-1]
    assert isinstance(last, UserMessage | ToolMessage)
    if isinstance(last, UserMessage):
        return ask("What is the weather in Oslo?", "What is the weather in Paris?", name="fork")
    results = [message.content for message in messages if isinstance(message, ToolMessage)]
    asked = next((text for text in results if "copy of the conversation, made for this call" in text), None)
    if last.name == "get_weather":
        return say(last.content)
    if asked is not None:
        return use("get_weather", city="Oslo" if "Oslo" in asked else "Paris")
    return say(" / ".join(results))


async def test_a_fork_knows_the_conversation_and_returns_only_its_answer(
    tokenizer: Tokenizer, environment: Environment, tmp_path: Path
) -> None:
    fork = ForkTool("fork", "Does a part of the task.", limits=Limits(max_turns=3))
    agent = Agent(ScriptedModel(delegating, tokenizer), [get_weather, fork], system="Be brief.")
    result = await agent.run("Weather?", environment=environment, trajectory=tmp_path / "run.jsonl")
    assert result.answer == "snowy, -3 degrees / sunny, 21 degrees"
    record = result.trajectory
    assert [message.role for message in record.messages] == ["system", "user", "assistant", "tool", "tool", "assistant"]

    first, second = record.subagents
    shared = record.messages[:3]
    asked = record.records.index(MessageAdded(shared[-1])) + 1
    for child, number in ((first, 0), (second, 1)):
        assert child.messages[:3] == shared and child.turns == 3
        own, other = child.messages[3 + number], child.messages[4 - number]
        assert own.content.startswith("This is a copy") and other.content == ELSEWHERE
        assert child.records[:asked] == record.records[:asked], "up to the turn that makes the calls"
        ends = [each for each in child.records[asked : asked + 2] if isinstance(each, CallFinished)]
        assert [each.result.content for each in ends] == [each.content for each in child.messages[3:5]]
        ids = sum((segment.ids for segment in record.segments[:2]), ())
        assert tuple(child.token_ids[: len(ids)]) == ids
        assert rebuild_token_ids(child, tokenizer) == child.token_ids
        assert child.header.metadata["parent"] == record.header.id
        assert child.outcome is not None and child.outcome.usage.turns == 2
    assert result.usage.subagents is not None and result.usage.subagents.turns == 4
    kept = Trajectory.load(tmp_path / "run.agent1.jsonl")
    assert kept.records == first.records and kept.header.metadata["call_id"] == "call_0_0"
    assert [call.call.id for call in first.records if isinstance(call, CallReady)] == [
        "call_0_0",
        "call_0_1",
        "call_1_0",
    ]


async def test_forks_have_a_budget_and_a_depth(tokenizer: Tokenizer, environment: Environment) -> None:
    def endless(messages: Sequence[Message], think: bool) -> AssistantTurn:
        last = messages[-1]
        if last.content.startswith("Error"):
            return say(last.content)
        return ask("Go on.", name="fork")

    model = ScriptedModel(endless, tokenizer)
    agent = Agent(model, [ForkTool("fork", "Forks.")], limits=Limits(max_depth=2))
    result = await agent.run("Q", environment=environment)
    assert result.answer is not None and "nested as deeply as the run allows" in result.answer
    assert len(result.trajectory.subagents) == 1 and len(result.trajectory.subagents[0].subagents) == 1

    fork = ForkTool("fork", "Forks.", limits=Limits(max_turns=1))
    result = await Agent(model, [fork], limits=Limits(max_depth=1)).run("Q", environment=environment)
    assert result.answer is not None and "the agent gave no valid answer: the limit max_turns" in result.answer


async def test_only_an_agent_can_be_forked(environment: Environment) -> None:
    fork = ForkTool("fork", "Forks.")
    outside = await fork.call(ToolCall("c", "fork", '{"task": "Q"}'), ToolContext(environment))
    assert outside.is_error and "only an agent can be forked" in outside.content
    with pytest.raises(TypeError, match=r"limits=.* must be a Limits or None, got 3"):
        ForkTool("fork", "Forks.", limits=3)  # type: ignore[arg-type]


async def test_forks_share_the_state_of_the_conversation(environment: Environment) -> None:
    """Each computes only its own results and turns, not the prompt that the agent has computed."""
    engine = Engine.load("tiny")
    async with AsyncEngine(engine) as running:
        fork = ForkTool("fork", "Does a part of the task.")
        agent = Agent(SteeredModel(running, delegating), [get_weather, fork], system="Be brief. " * 150, effort="none")
        result = await agent.run("Weather?", environment=environment)
    assert result.answer == "snowy, -3 degrees / sunny, 21 degrees"
    prompt = len(result.trajectory.segments[0].ids)
    shared = result.usage.subagents
    assert shared is not None and prompt > 500
    assert shared.cache_hit_tokens >= 2 * prompt > 4 * shared.cache_miss_tokens
    for record in (result.trajectory, *result.trajectory.subagents):
        found = replay(record, EmbeddedModel(engine))
        assert found.same, str(found.difference)
