"""A run that was interrupted at any byte of its record goes on after its last complete turn."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import anyio
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from agentkit import (
    Agent,
    AssistantMessage,
    AssistantTurn,
    CallFinished,
    CallMalformed,
    CallReady,
    CallStarted,
    CallsWithdrawn,
    EmbeddedModel,
    Header,
    LimitReached,
    Limits,
    Message,
    MessageAdded,
    ModelSession,
    Outcome,
    ResumeError,
    SamplingParams,
    ScriptedModel,
    SystemMessage,
    TokenSegment,
    ToolCall,
    ToolMessage,
    ToolResult,
    Trajectory,
    TrajectoryWriteError,
    TurnFinished,
    TurnStarted,
    Usage,
    UserMessage,
    tool,
)
from agentkit.events import Record
from agentkit.interrupted import NOT_STARTED, UNKNOWN, interrupted_run
from agentkit.model import GenerationLimits
from agentkit.models.tokens import rebuild_token_ids
from agentkit_environments import Environment, open_environment
from agentkit_tools import BUILTINS

pytestmark = pytest.mark.anyio
Script = Callable[..., ScriptedModel]

made: list[str] = []


@tool
def buy(article: str) -> str:
    """Buy an article."""
    made.append(article)
    return f"bought {article}"


@tool(read_only=True)
def price(article: str) -> int:
    """Return the price of an article."""
    return len(article)


@pytest.fixture
def agent(script: Script) -> Agent:
    """An agent that buys in its first and third turn, looks in its second, and answers in its fourth."""
    return Agent(
        script(
            AssistantTurn("Hm.", "", [("buy", {"article": "bolt"}), ("price", {"article": "nut"})]),
            AssistantTurn("So.", "I look.", [("price", {"article": "nut"}), ("buy", {"no": 1})]),
            AssistantTurn("Now.", "", [("buy", {"article": "nut"}), ("buy", {"article": "screw"})]),
            AssistantTurn("", "Done."),
        ),
        [buy, price],
        thinking="auto",
    )


@pytest.fixture
async def whole(agent: Agent, tmp_path: Path) -> Trajectory:
    made.clear()
    result = await agent.run("Buy things.", trajectory=tmp_path / "whole.jsonl")
    assert result.answer == "Done." and made == ["bolt", "nut", "screw"]
    return Trajectory.load(tmp_path / "whole.jsonl")


def comparable(usage: Usage) -> Usage:
    """Return a usage without times, and without the thinking tokens, which an open turn does not have."""
    return replace(usage, tool_time_s=0.0, wall_time_s=0.0, thinking_tokens=0)


async def test_a_record_that_was_cut_after_any_record(agent: Agent, whole: Trajectory, tmp_path: Path) -> None:
    """The result is that of the whole run, but for calls that had started and whose results are lost."""
    assert whole.path is not None
    lines = whole.path.read_bytes().splitlines(keepends=True)
    path = tmp_path / "cut.jsonl"
    unknown = 0
    for length in range(1, len(lines)):
        torn = lines[length][: len(lines[length]) // 2]
        path.unlink(missing_ok=True)
        path.with_suffix(".jsonl.torn").unlink(missing_ok=True)
        path.write_bytes(b"".join(lines[:length]) + torn)
        records = whole.records[: length - 1]
        if not any(isinstance(record, TurnStarted) for record in records):
            with pytest.raises(ResumeError, match="has no turn of the run yet"):
                await agent.resume(path)
            assert path.read_bytes().endswith(torn)
            continue
        made.clear()
        result = await agent.resume(path)
        resumed = Trajectory.load(path)
        assert resumed.records == result.trajectory.records and result.answer == "Done."
        kept = path.read_bytes()
        moved = path.with_suffix(".jsonl.torn").read_bytes()
        begun = b"".join(lines[:length]) + torn
        assert begun == kept[: len(begun) - len(moved) + 1] + moved[:-1], "nothing is lost"
        lost = [each for each in resumed.results if UNKNOWN in each.content or NOT_STARTED in each.content]
        started = {record.call.id for record in records if isinstance(record, CallStarted)}
        finished = {record.result.call_id for record in records if isinstance(record, CallFinished)}
        assert {each.call_id for each in lost if UNKNOWN in each.content} <= started - finished
        assert all(each.is_error for each in lost) and not finished & {each.call_id for each in lost}
        unknown += len(lost)
        bought = [
            record.call.arguments for record in records if isinstance(record, CallStarted) and record.call.name == "buy"
        ]
        assert not {f'{{"article": "{article}"}}' for article in made} & set(bought), "no call is made twice"
        assert rebuild_token_ids(resumed, agent.model.tokenizer) == resumed.token_ids  # type: ignore[attr-defined]
        if not lost:
            assert (resumed.token_ids, resumed.messages) == (whole.token_ids, whole.messages)
            assert resumed.outcome is not None and whole.outcome is not None
            assert comparable(result.usage) == comparable(whole.outcome.usage) == comparable(resumed.usage)
        assert result.usage.turns == 4 and result.usage.calls == 6
        assert [m.call_id for m in resumed.messages if isinstance(m, ToolMessage)] == [
            m.call_id for m in whole.messages if isinstance(m, ToolMessage)
        ]
    assert unknown > 0


async def test_an_interrupted_call_is_not_made_again(agent: Agent, whole: Trajectory, tmp_path: Path) -> None:
    """Three calls of one turn: one has its result, one was running, and one had not started."""
    records = [record for record in whole.records if not isinstance(record, MessageAdded | TurnFinished)]
    turn = [place for place, record in enumerate(whole.records) if isinstance(record, TurnStarted)][2]
    cut = Trajectory(whole.header)
    for record in whole.records[:turn]:
        cut.append(record)
    for record in whole.records[turn:]:
        if isinstance(record, CallFinished):
            break
        if isinstance(record, CallStarted) and "screw" in record.call.arguments:
            continue
        cut.append(record)
    assert records
    made.clear()
    result = await agent.resume(cut)
    assert made == [] and result.answer == "Done."
    last = [message for message in result.trajectory.messages if isinstance(message, ToolMessage)][-2:]
    assert UNKNOWN in last[0].content and NOT_STARTED in last[1].content and all(message.is_error for message in last)
    assert [record.result.content for record in result.trajectory.records if isinstance(record, CallFinished)][-2:] == [
        message.content for message in last
    ]


async def test_a_cancelled_run_is_resumed(script: Script, tmp_path: Path) -> None:
    """The calls that were stopped have their results; the model reads them and goes on."""
    waiting = anyio.Event()
    hang = True

    @tool
    async def work() -> str:
        """Work."""
        waiting.set()
        await anyio.sleep_forever() if hang else None
        return "worked"

    agent = Agent(
        script(AssistantTurn(None, "", [("work", {})]), AssistantTurn(None, "Done.")), [work], thinking="never"
    )
    path = tmp_path / "t.jsonl"
    async with anyio.create_task_group() as group:

        async def run() -> None:
            await agent.run("Work.", trajectory=path)

        group.start_soon(run)
        await waiting.wait()
        group.cancel_scope.cancel()
    hang = False
    result = await agent.resume(path)
    assert result.answer == "Done." and result.usage.turns == 2
    [message] = [each for each in Trajectory.load(path).messages if isinstance(each, ToolMessage)]
    assert "stopped before it finished" in message.content
    assert [each.type for each in Trajectory.load(path).records].count("outcome") == 1
    assert b'"status":"cancelled"' in (tmp_path / "t.jsonl.torn").read_bytes()


async def test_the_usage_of_an_interrupted_run_counts_towards_the_limits(agent: Agent, whole: Trajectory) -> None:
    end = [place for place, record in enumerate(whole.records) if isinstance(record, TurnFinished)][1]
    for limits, limit, turns in (
        (Limits(max_turns=3), "max_turns", 3),
        (Limits(max_turns=2), "max_turns", 2),
        (Limits(max_tokens=whole.records[end].usage.sampled_tokens + 5), "max_tokens", 3),  # type: ignore[union-attr]
        (Limits(wall_time_s=whole.records[end].usage.wall_time_s), "wall_time_s", 2),  # type: ignore[union-attr]
    ):
        cut = Trajectory(whole.header)
        cut.records = whole.records[: end + 1]
        cut.times_s = whole.times_s[: end + 1]
        agent.limits = limits
        result = await agent.resume(cut)
        assert (result.status, result.limit, result.usage.turns) == ("limit", limit, turns)


async def test_turns_that_changed_a_lost_sandbox_are_done_again(script: Script, tmp_path: Path) -> None:
    """Reading changes nothing, so a run goes on before its first call that may have changed a file."""
    agent = Agent(
        script(
            AssistantTurn(None, "", [("list_dir", {})]),
            AssistantTurn(None, "", [("write_file", {"path": "a.txt", "content": "1"})]),
            AssistantTurn(None, "", [("read_file", {"path": "a.txt"})]),
            AssistantTurn(None, "Done."),
        ),
        thinking="never",
    )
    path = tmp_path / "whole.jsonl"
    async with await open_environment(backend="unsafe-local") as environment:
        whole = (await agent.run("Write.", environment=environment, trajectory=path)).trajectory
    lines = path.read_bytes().splitlines(keepends=True)
    ends = [index + 1 for index, line in enumerate(lines) if b'"turn_finished"' in line]
    second = [index for index, line in enumerate(lines) if b'"turn_started"' in line][1]
    for turns, kept in ((1, ends[0]), (2, second), (3, second)):
        path.write_bytes(b"".join(lines[: ends[turns - 1]]))
        path.with_suffix(".jsonl.torn").unlink(missing_ok=True)
        async with await open_environment(backend="unsafe-local") as environment:
            result = await agent.resume(path, environment=environment, world_turns=0)
        assert path.read_bytes().splitlines(keepends=True)[:kept] == lines[:kept]
        assert path.with_suffix(".jsonl.torn").exists() == (kept < ends[turns - 1])
        assert [each.content for each in result.trajectory.results] == [each.content for each in whole.results]
        assert (result.answer, result.usage.turns, result.usage.calls) == ("Done.", 4, 3)
    path.write_bytes(b"".join(lines[: ends[1]]))
    async with await open_environment(backend="unsafe-local") as environment:
        result = await agent.resume(path, environment=environment)  # all turns are kept
        assert result.trajectory.results[-1].is_error and result.usage.turns == 4
        path.write_bytes(b"".join(lines[: ends[2]]))
        assert (await agent.resume(path, environment=environment, world_turns=2)).usage.turns == 4


async def test_a_call_with_effects_elsewhere_is_not_repeated_for_a_lost_sandbox(script: Script) -> None:
    agent = Agent(
        script(
            AssistantTurn(None, "", [("write_file", {"path": "a.txt", "content": "1"})]),
            AssistantTurn(None, "", [("buy", {"article": "bolt"})]),
            AssistantTurn(None, "Done."),
        ),
        [BUILTINS["write_file"], buy],
        thinking="never",
    )
    async with await open_environment(backend="unsafe-local") as environment:
        whole = (await agent.run("Write.", environment=environment)).trajectory
        cut = Trajectory(whole.header)
        cut.records, cut.times_s = whole.records[:-1], whole.times_s[:-1]
        with pytest.raises(ResumeError, match="doing its turns again would repeat a call of buy"):
            await agent.resume(cut, environment=environment, world_turns=0)
        assert (await agent.resume(cut, environment=environment)).answer == "Done."


@pytest.mark.parametrize("messages", [[], [UserMessage("x"), AssistantMessage("y")], [SystemMessage("z")]])
def test_a_record_without_a_message_to_answer_is_refused(agent: Agent, messages: list[Message]) -> None:
    trajectory = Trajectory(Header("m", "v4-preview", "high", SamplingParams(), (), "auto"))
    trajectory.records = [*map(MessageAdded, messages), TurnStarted(0, think=True)]
    with pytest.raises(ResumeError, match="no message that the next turn would answer"):
        interrupted_run(trajectory, agent.tools)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=200)
@given(data=st.data())
def test_any_sequence_of_records_is_judged(agent: Agent, records: list[Record], data: st.DataObject) -> None:
    """Crafted records give a place or a typed error."""
    some = data.draw(st.lists(st.sampled_from(records), max_size=20))
    trajectory = Trajectory(Header("m", "v4-preview", "high", SamplingParams(), (), "auto"))
    trajectory.records = some
    with suppress(ResumeError):
        found = interrupted_run(trajectory, agent.tools, world_turns=data.draw(st.sampled_from([None, 0, 1])))
        assert 0 <= found.length <= len(some)
        assert {each.call_id for each in found.unrecorded} <= {each.call_id for each in found.results}


@pytest.fixture(scope="module")
def records() -> list[Record]:
    call, other = ToolCall("call_0_0", "buy", "{}"), ToolCall("call_0_1", "price", "{}")
    return [
        *(TurnStarted(0, think=True), TurnStarted(1, think=False), TurnStarted(-1, think=False)),
        *(TokenSegment("prompt", (1,)), TokenSegment("sampled", (2, 3), (0.0, 0.0)), TokenSegment("forced", (4,))),
        *(MessageAdded(UserMessage("x")), MessageAdded(AssistantMessage("x", calls=(call, other)))),
        *(MessageAdded(ToolMessage("call_0_0", "buy", "x")), MessageAdded(ToolMessage("none", "none", "x"))),
        *(CallReady(0, call), CallReady(1, other), CallMalformed(0, None, "x"), CallsWithdrawn(0)),
        *(CallStarted(call), CallStarted(other), CallStarted(ToolCall("c", "gone", ""))),
        *(
            CallFinished(ToolResult("call_0_0", "buy", "x")),
            CallFinished(ToolResult("call_0_1", "price", "x", final=True)),
        ),
        *(TurnFinished(0, Usage(turns=1, cost_usd=1.0)), TurnFinished(1, Usage(turns=2)), LimitReached("max_turns")),
        *(Outcome("answered", "x", Usage(turns=1)), Outcome("cancelled", None, Usage(turns=1))),
    ]


async def test_what_cannot_be_resumed_is_refused(agent: Agent, whole: Trajectory, tmp_path: Path) -> None:
    assert whole.path is not None
    with pytest.raises(ResumeError, match="the run has ended with status 'answered'"):
        await agent.resume(whole.path)
    lines = whole.path.read_bytes().splitlines(keepends=True)
    whole.path.write_bytes(b"".join(lines[:-1]))
    before = whole.path.read_bytes()
    model = agent.model
    assert isinstance(model, ScriptedModel)
    for other, named in (
        (Agent(model, [price, buy], thinking="auto"), r"tools \['buy', 'price'\], given \['price', 'buy'\]"),
        (Agent(model, [buy, price], thinking="never"), "thinking 'auto', given 'never'"),
        (Agent(model, [buy, price], effort="max"), "effort 'high', given 'max'"),
        (Agent(model, [buy, price], sampling=SamplingParams(top_k=3)), "top_k None, given 3"),
        (
            Agent(ScriptedModel(lambda m, t: AssistantTurn(), model.tokenizer, name="x"), [buy, price]),
            "model 'scripted'",
        ),
    ):
        with pytest.raises(ResumeError, match=f"the run was started with {named}"):
            await other.resume(whole.path)
        assert whole.path.read_bytes() == before
    with pytest.raises(ValueError, match="without a task there is nothing to do"):
        async for _ in agent.stream(None):
            pass


async def test_a_record_has_one_writer(agent: Agent, whole: Trajectory) -> None:
    again, other = Trajectory.load(whole.path or ""), Trajectory.load(whole.path or "")
    again.reopen()
    with pytest.raises(TrajectoryWriteError, match="is in use by another process"):
        other.reopen()
    again.close()
    other.reopen()
    other.close()


async def test_an_invalid_answer_is_returned_once_in_all(script: Script) -> None:
    agent = Agent(script(AssistantTurn(None, "no")), [], thinking="never", output_schema={"type": "integer"})
    whole = (await agent.run("A number?")).trajectory
    assert whole.outcome is not None and (whole.outcome.status, whole.outcome.usage.turns) == ("invalid_output", 2)
    turns = [place for place, record in enumerate(whole.records) if isinstance(record, TurnStarted)]
    for length in range(turns[0] + 1, len(whole.records)):
        cut = Trajectory(whole.header)
        cut.records, cut.times_s = whole.records[:length], whole.times_s[:length]
        result = await agent.resume(cut)
        assert (result.status, result.usage.turns, result.trajectory.token_ids) == (
            "invalid_output",
            2,
            whole.token_ids,
        )


@pytest.mark.parametrize("temperature", [0.0, 1.5])
async def test_a_model_in_this_process_continues_with_the_same_tokens(
    tiny: EmbeddedModel, temperature: float, tmp_path: Path, environment: Environment
) -> None:
    """With a seed, the resumed run is the run that was not interrupted, bit for bit."""
    sampling = tiny.sampling.override(temperature=temperature, seed=11)
    agent = Agent(tiny, [price], sampling=sampling, limits=Limits(max_turns=3, max_tokens_per_turn=60))
    path = tmp_path / "t.jsonl"
    whole = (await agent.run("What is the price of a bolt?", environment=environment, trajectory=path)).trajectory
    lines = path.read_bytes().splitlines(keepends=True)
    first = next(index for index, line in enumerate(lines) if b'"turn_started"' in line)
    for length in sorted({first + 1, (first + len(lines)) // 2, len(lines) - 1}):
        path.write_bytes(b"".join(lines[:length]))
        result = await agent.resume(path, environment=environment, world_turns=0)
        if not any(UNKNOWN in each.content or NOT_STARTED in each.content for each in result.trajectory.results):
            assert result.trajectory.token_ids == whole.token_ids
            assert result.trajectory.logprobs == whole.logprobs
            assert result.outcome.status == (whole.outcome.status if whole.outcome else None)


async def test_the_state_of_a_killed_session_is_found_on_disk(tmp_path: Path) -> None:
    """Each prompt's end is written while the session runs, so a killed process loses one turn's state at most."""

    async def generate(session: ModelSession, text: str) -> None:
        await session.append([UserMessage(text)])
        async for _ in session.generate(think=False, limits=GenerationLimits(max_tokens=9)):
            pass

    def load() -> EmbeddedModel:
        return EmbeddedModel("tiny", cache_dir=tmp_path)

    options: dict[str, Any] = {"tools": [price], "effort": "high"}
    async with load() as first, first.open(**options, sampling=first.sampling) as session:
        await generate(session, "What is the price of a bolt?")
        await generate(session, "And of a nut?")
        last = max(place for place, segment in enumerate(session.segments) if segment.kind == "prompt")
        prompt_end = sum(len(segment.ids) for segment in session.segments[: last + 1])
        assert first._running is not None
        await first._running.call(first.engine.flush)  # the writer is a thread; a killed process may lose its last job
        async with load() as second, second.open(**options, sampling=second.sampling, history=session) as resumed:
            await generate(resumed, "And of a screw?")
            assert resumed.usage.cache_hit_tokens == prompt_end
