"""Context management: long results are kept in files, and a conversation that fills the context is compacted."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import count
from pathlib import Path

import pytest

from agentkit import (
    Agent,
    AssistantMessage,
    AssistantTurn,
    CallReady,
    Compacted,
    Compaction,
    EmbeddedModel,
    LimitReached,
    Limits,
    Message,
    ModelOptionError,
    RunResult,
    ScriptedModel,
    SystemMessage,
    TokenSegment,
    ToolMessage,
    Trajectory,
    TurnStarted,
    UserMessage,
    replay,
    tool,
)
from agentkit.compaction import LEFT_OUT, old_results, with_turns_left_out
from agentkit.models.scripted import ScriptedTokens
from agentkit.models.tokens import rebuild_token_ids
from agentkit_engine.chat import Tokenizer
from agentkit_environments import Environment
from agentkit_tools import BUILTINS

from .conftest import get_weather

pytestmark = pytest.mark.anyio
Script = Callable[..., ScriptedModel]

DONE = AssistantTurn(None, "Done.")


@tool
def pages(count: int) -> str:
    """Return pages of text."""
    return "".join(f"page {number}\n" for number in range(count))


def results(messages: Sequence[Message]) -> list[str]:
    return [message.content for message in messages if isinstance(message, ToolMessage)]


def compactions(trajectory: Trajectory) -> list[Compacted]:
    return [record for record in trajectory.records if isinstance(record, Compacted)]


def in_order(tokenizer: Tokenizer, *turns: AssistantTurn) -> ScriptedModel:
    """Return a model that takes these turns, however many are still in the conversation."""
    taken = count()
    return ScriptedModel(lambda messages, think: turns[next(taken)], tokenizer)


async def test_a_long_result_is_in_a_file_that_the_model_can_read(script: Script, environment: Environment) -> None:
    both = AssistantTurn(calls=[("bash", {"command": "seq 9000"}), ("pages", {"count": 9000})])
    look = AssistantTurn(calls=[("bash", {"command": "cd /tmp/agentkit; sed -n 5000p $(grep -l page *)"})])
    model = script(both, look, DONE)
    result = await Agent(model, [BUILTINS["bash"], pages]).run("Q", environment=environment)
    numbers, text, found = results(result.trajectory.messages)
    assert " bytes cut; see /tmp/agentkit/" in numbers and " (9000 lines) ...]" in text
    assert found == "page 4999"


async def test_without_a_sandbox_a_long_result_is_only_cut(script: Script) -> None:
    """Tools that need no environment open none for their results."""
    result = await Agent(script(AssistantTurn(calls=[("pages", {"count": 9000})]), DONE), [pages]).run("Q")
    [text] = results(result.trajectory.messages)
    assert " bytes cut ...]" in text


async def test_old_results_are_cleared_and_can_be_read_again(tokenizer: Tokenizer, environment: Environment) -> None:
    look = [AssistantTurn(None, "", [("pages", {"count": 150 + turn})]) for turn in range(6)]
    again = AssistantTurn(None, "", [("bash", {"command": "tail -qn 1 /tmp/agentkit/* | sort"})])
    agent = Agent(
        in_order(tokenizer, *look, again, DONE),
        [pages, BUILTINS["bash"]],
        thinking="never",
        compaction=Compaction(at_tokens=8000, keep_turns=2),
    )
    result = await agent.run("Q", environment=environment)
    record = result.trajectory
    first, *more = compactions(record)
    assert (result.answer, more) == ("Done.", [])
    assert first.tokens_before >= 8000 > first.tokens_after and first.turns_left_out == 0
    turn = first.turns
    assert first.cleared == tuple(f"call_{number}_0" for number in range(turn - 2))
    contents = results(first.messages)
    assert all(each.startswith("[This result was cleared to make room; see /tmp/agentkit/") for each in contents[:-2])
    assert contents[-2:] == [pages(150 + turn - 2), pages(150 + turn - 1)]
    assert [type(each) for each in first.messages[:2]] == [SystemMessage, UserMessage]
    assert results(record.messages)[-1].splitlines() == [f"page {149 + number}" for number in range(turn - 2)]
    assert rebuild_token_ids(record, tokenizer) == record.token_ids
    assert len(record.token_ids) < first.tokens_before
    assert result.usage.turns == 8 and result.usage.prompt_tokens > len(record.token_ids)


async def test_the_record_has_all_ids_and_is_read_again(
    tokenizer: Tokenizer, environment: Environment, tmp_path: Path
) -> None:
    look = AssistantTurn(None, "", [("pages", {"count": 60})])
    agent = Agent(in_order(tokenizer, *[look] * 9, DONE), [pages], compaction=Compaction(at_tokens=4000, keep_turns=1))
    result = await agent.run("Q", environment=environment, trajectory=tmp_path / "run.jsonl")
    read = Trajectory.load(tmp_path / "run.jsonl")
    assert read.records == result.trajectory.records and len(compactions(read)) > 1
    assert read.turns == 10 and sum(isinstance(record, TurnStarted) for record in read.records) == 10
    ids = [record.call.id for record in read.records if isinstance(record, CallReady)]
    assert ids == [f"call_{turn}_0" for turn in range(9)]
    before = sum(len(record.ids) for record in read.records if isinstance(record, TokenSegment))
    assert before > len(read.token_ids) == len(read.loss_mask) == len(read.logprobs)


async def test_the_oldest_turns_are_left_out_if_clearing_is_not_enough(
    tokenizer: Tokenizer, environment: Environment
) -> None:
    think = [AssistantTurn(f"Step {turn}. " * 60, "", [("pages", {"count": 1})]) for turn in range(8)]
    agent = Agent(
        in_order(tokenizer, *think, DONE),
        [pages],
        thinking="always",
        compaction=Compaction(at_tokens=4000, keep_turns=2),
    )
    result = await agent.run("The task.", environment=environment)
    record = result.trajectory
    first = compactions(record)[0]
    assert first.cleared == () and first.turns_left_out == first.turns - 2
    system, task, notice, *latest = first.messages
    assert isinstance(system, SystemMessage)
    assert (task, notice) == (UserMessage("The task."), UserMessage(LEFT_OUT))
    assert [type(message) for message in latest] == [AssistantMessage, ToolMessage] * 2
    assert sum(message == UserMessage(LEFT_OUT) for message in record.messages) == 1
    assert rebuild_token_ids(record, tokenizer) == record.token_ids
    assert result.answer == "Done."


async def test_the_number_of_messages_is_bounded(
    tokenizer: Tokenizer, environment: Environment, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Clearing the results would be enough, but the messages have to fit into a line of the record."""
    monkeypatch.setattr("agentkit.compaction.MAX_MESSAGES", 8)
    look = AssistantTurn(None, "", [("pages", {"count": 150})])
    agent = Agent(in_order(tokenizer, *[look] * 6, DONE), [pages], compaction=Compaction(at_tokens=8000, keep_turns=1))
    first = compactions((await agent.run("Q", environment=environment)).trajectory)[0]
    assert len(first.cleared) == first.turns_left_out == first.turns - 1 > 2


async def test_a_conversation_with_nothing_to_remove_ends_at_the_limit(
    tokenizer: Tokenizer, environment: Environment, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ScriptedTokens, "max_length", 3000)
    look = AssistantTurn(None, "", [("pages", {"count": 500})])
    agent = Agent(in_order(tokenizer, look, DONE), [pages], compaction=Compaction())
    result = await agent.run("Q", environment=environment)
    assert (result.limit, compactions(result.trajectory)) == ("context", [])
    assert isinstance(result.trajectory.records[-2], LimitReached)


async def test_by_default_nothing_is_removed(
    tokenizer: Tokenizer, environment: Environment, monkeypatch: pytest.MonkeyPatch
) -> None:
    look = AssistantTurn(None, "", [("pages", {"count": 60})])
    monkeypatch.setattr(ScriptedTokens, "max_length", 4000)
    plain = await Agent(in_order(tokenizer, *[look] * 8, DONE), [pages]).run("Q", environment=environment)
    assert (plain.limit, compactions(plain.trajectory)) == ("context", [])
    agent = Agent(in_order(tokenizer, *[look] * 8, DONE), [pages], compaction=Compaction())
    assert (await agent.run("Q", environment=environment)).answer == "Done."


async def test_a_compacted_run_can_be_resumed(tokenizer: Tokenizer, environment: Environment, tmp_path: Path) -> None:
    """The script follows the last result, which the resumed run has too."""

    @tool(read_only=True)
    def step(number: int) -> str:
        """Take a step."""
        return f"{number + 1} " * 200

    def policy(messages: Sequence[Message], think: bool) -> AssistantTurn:
        last = int(messages[-1].content.split()[0]) if isinstance(messages[-1], ToolMessage) else 0
        return DONE if last == 7 else AssistantTurn(None, "", [("step", {"number": last})])

    agent = Agent(ScriptedModel(policy, tokenizer), [step], compaction=Compaction(at_tokens=2500, keep_turns=2))
    path = tmp_path / "run.jsonl"
    whole = (await agent.run("Q", environment=environment, trajectory=path)).trajectory
    assert len(compactions(whole)) > 1
    lines = path.read_bytes().splitlines(keepends=True)
    places = [place for place, record in enumerate(whole.records) if isinstance(record, Compacted)]
    for length in [place + after for place in places[:2] for after in (1, 2, 3, 4, 6)]:  # the header is a line, too
        cut = tmp_path / f"{length}.jsonl"
        cut.write_bytes(b"".join(lines[:length]))
        resumed = (await agent.resume(cut, environment=environment)).trajectory
        assert (resumed.token_ids, resumed.messages) == (whole.token_ids, whole.messages)
        assert compactions(resumed) == compactions(whole)
        assert resumed.usage.turns == whole.usage.turns


async def test_a_compacted_run_of_the_engine_goes_on_and_replays(tiny: EmbeddedModel) -> None:
    agent = Agent(
        tiny,
        [get_weather],
        sampling=tiny.sampling.override(temperature=0),
        limits=Limits(max_tokens_per_turn=200),
        compaction=Compaction(at_tokens=200, keep_turns=1),
    )
    result: RunResult = await agent.run("What is the weather in Paris?")
    for city in ("Oslo", "Rome", "Paris"):
        result = await result.continue_(f"And in {city}?")
    record = result.trajectory
    assert compactions(record)
    assert rebuild_token_ids(record, tiny.tokenizer) == record.token_ids
    usages = [each.usage for each in record.records if each.type == "outcome"]
    assert all(usage.cache_hit_tokens + usage.cache_miss_tokens > 0 for usage in usages)
    found = replay(record, tiny)
    assert found.same, str(found.difference)
    assert found.tokens == sum(len(each.ids) for each in record.records if isinstance(each, TokenSegment))
    [branch] = await result.fork(at_turn=record.turns - 1)
    assert compactions(branch.trajectory)[0] == compactions(record)[0]
    assert rebuild_token_ids(branch.trajectory, tiny.tokenizer) == branch.trajectory.token_ids


async def test_the_window_must_be_known(script: Script, environment: Environment) -> None:
    with pytest.raises(ModelOptionError, match=r"context window is not known.*at_tokens=.*context_tokens="):
        await Agent(script(DONE), [], compaction=Compaction()).run("Q", environment=environment)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"at_tokens": 0}, r"Compaction\(at_tokens=...\)"),
        ({"at_tokens": 2.5}, r"Compaction\(at_tokens=...\)"),
        ({"keep_turns": 0}, r"Compaction\(keep_turns=...\)"),
        ({"keep_turns": None}, r"Compaction\(keep_turns=...\)"),
    ],
)
def test_bad_settings_are_refused(options: dict[str, int], expected: str) -> None:
    with pytest.raises((TypeError, ValueError), match=expected):
        Compaction(**options)


def test_short_results_and_conversations_stay() -> None:
    messages: list[Message] = [
        UserMessage("Q"),
        AssistantMessage("a"),
        ToolMessage("1", "t", "short"),
        AssistantMessage("b"),
        ToolMessage("2", "t", "x" * 500),
    ]
    assert old_results(messages, 1) == old_results(messages, 3) == []
    assert with_turns_left_out(messages, 2) == messages
    assert with_turns_left_out(messages, 1) == [messages[0], UserMessage(LEFT_OUT), *messages[3:]]
