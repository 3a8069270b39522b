"""A record replays on the model that wrote it; the first token or byte that was changed, or differs, is named."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path
from typing import Any

import anyio
import pytest
import typer.testing

from agentkit import (
    Agent,
    AssistantMessage,
    AssistantTurn,
    CallFinished,
    CallReady,
    Difference,
    EmbeddedModel,
    Limits,
    Message,
    MessageAdded,
    Outcome,
    ReasoningDelta,
    ReplayError,
    RunResult,
    ScriptedModel,
    TextDelta,
    TokenSegment,
    Trajectory,
    replay,
    tool,
)
from agentkit.cli import app
from agentkit.events import Record
from agentkit_engine import Engine


@tool
def get_weather(city: str) -> str:
    """Return the weather of a city."""
    return {"Paris": "sunny, 21 degrees", "Oslo": "snowy, -3 degrees"}.get(city, "unknown")


def run(agent: Agent, task: str = "What is the weather in Paris and Oslo?") -> RunResult:
    return agent.run_sync(task)


def check_replays(record: Trajectory, model: EmbeddedModel) -> None:
    found = replay(record, model)
    assert found.difference is None, str(found.difference)
    turns = sum(isinstance(message, AssistantMessage) for message in record.messages)
    assert (found.turns, found.tokens, found.sampled) == (turns, len(record.token_ids), sum(record.loss_mask))
    assert found.max_logprob_error == 0.0, "the same machine gives the same bits"


@pytest.mark.parametrize("grammar", ["auto", False])
@pytest.mark.parametrize(
    ("temperature", "limits"),
    [
        (0, Limits(max_turns=4)),
        (1, Limits(max_turns=4, max_tokens=90)),
        (3, Limits(max_turns=3, max_tokens_per_turn=40, max_thinking_tokens_per_turn=6)),
        (3, Limits(max_tokens=7)),
        (3, Limits(max_thinking_tokens_per_turn=1, max_tokens=3)),
    ],
)
def test_a_run_replays(tiny: EmbeddedModel, temperature: float, limits: Limits, grammar: Any) -> None:
    """Whatever the model wrote, however the turns ended, and when the session was continued."""
    sampling = tiny.sampling.override(temperature=float(temperature), grammar=grammar, seed=3)
    result = run(Agent(tiny, [get_weather], sampling=sampling, limits=limits))
    check_replays(result.trajectory, tiny)
    again = result.continue_sync("And in Rome?")
    check_replays(again.trajectory, tiny)


def test_a_turn_that_was_left_early_replays(tiny: EmbeddedModel, tmp_path: Path) -> None:
    path = tmp_path / "left.jsonl"

    async def leave() -> None:
        agent = Agent(tiny, [get_weather], sampling=tiny.sampling.override(seed=1))
        count = 0
        async with aclosing(agent.stream("What is the weather in Paris?", trajectory=path)) as events:
            async for event in events:
                count += isinstance(event, TextDelta | ReasoningDelta)
                if count == 3:
                    break

    anyio.run(leave)
    record = Trajectory.load(path)
    assert record.outcome is not None and record.outcome.status == "cancelled"
    check_replays(record, tiny)


@pytest.fixture(scope="module")
def record(tiny: EmbeddedModel) -> Trajectory:
    """A conversation with calls, written by a script, with the log-probabilities that the model gives its ids."""

    def policy(messages: Sequence[Message], think: bool) -> AssistantTurn:
        if messages[-1].role == "tool":
            return AssistantTurn(None, "Sunny in Paris, snowy in Oslo.")
        return AssistantTurn(
            "Look.", "I look.", [("get_weather", {"city": "Paris"}), ("get_weather", {"city": "Oslo"})]
        )

    script = ScriptedModel(policy, tiny.tokenizer, name="tiny", dialect=tiny.engine.dialect)
    written = run(Agent(script, [get_weather], thinking="always")).trajectory
    logprobs = [0.0, *tiny.engine.logprobs(written.token_ids).tolist()]
    position = 0
    records: list[Record] = []
    for each in written.records:
        if isinstance(each, TokenSegment):
            end = position + len(each.ids)
            if each.kind == "sampled":
                each = replace(each, logprobs=tuple(logprobs[position:end]))
            position = end
        records.append(each)
    return copy_of(written, records)


def copy_of(record: Trajectory, records: Sequence[Record]) -> Trajectory:
    made = Trajectory(record.header)
    for each in records:
        made.append(each)
    return made


def changed(record: Trajectory, kind: type[Any], number: int, change: Callable[[Any], Any]) -> Trajectory:
    """Return the record with its `number`-th record of a kind changed."""
    places = [place for place, each in enumerate(record.records) if isinstance(each, kind)]
    records = list(record.records)
    records[places[number]] = change(records[places[number]])
    return copy_of(record, records)


def fields(**changes: Any) -> Callable[[Any], Any]:
    return lambda item: replace(item, **changes)


def message(change: Callable[[Any], Any]) -> Callable[[MessageAdded], MessageAdded]:
    return lambda added: MessageAdded(change(added.message))


def at(ids: tuple[Any, ...], index: int, value: Any) -> tuple[Any, ...]:
    return (*ids[:index], value, *ids[index:][1:])


def first_call(said: AssistantMessage) -> AssistantMessage:
    call = replace(said.calls[0], arguments='{"city": "Rome"}')
    return replace(said, calls=(call, *said.calls[1:]))


def test_a_record_of_calls_replays(record: Trajectory, tiny: EmbeddedModel, tmp_path: Path) -> None:
    check_replays(record, tiny)
    assert len(record.results) == 2 and record.outcome is not None and record.outcome.status == "answered"
    record.save(tmp_path / "t.jsonl")
    assert replay(tmp_path / "t.jsonl", tiny) == replay(record, tiny)


SEGMENTS = [("prompt", 0), ("sampled", 1), ("prompt", 2), ("sampled", 3)]


def test_the_first_changed_token_of_a_prompt_is_named(record: Trajectory, tiny: EmbeddedModel) -> None:
    start = sum(len(segment.ids) for segment in record.segments[:2])
    assert [segment.kind for segment in record.segments] == [kind for kind, _ in SEGMENTS]
    for number, first in ((0, 0), (2, start)):
        ids = record.segments[number].ids
        for index in (0, 5, len(ids) - 1):
            other = (ids[index] + 1) % tiny.tokenizer.vocab_size
            found = replay(changed(record, TokenSegment, number, fields(ids=at(ids, index, other))), tiny)
            assert found.difference is not None
            assert (found.difference.kind, found.difference.position) == ("token", first + index)
            assert found.difference.recorded.startswith(f"{other} ")
            assert found.difference.replayed.startswith(f"{ids[index]} ")
        for longer in (ids[:-1], (*ids, 0)):
            found = replay(changed(record, TokenSegment, number, fields(ids=longer)), tiny)
            assert found.difference is not None and "no token" in str(found.difference)


def test_a_changed_sampled_token_or_log_probability_is_named(record: Trajectory, tiny: EmbeddedModel) -> None:
    start, segment = len(record.segments[0].ids), record.segments[1]
    for index in (0, len(segment.ids) // 2, len(segment.ids) - 1):
        ids = at(segment.ids, index, (segment.ids[index] + 1) % tiny.tokenizer.vocab_size)
        found = replay(changed(record, TokenSegment, 1, fields(ids=ids)), tiny).difference
        assert found is not None and (found.kind, found.position, found.turn) == ("logprob", start + index, 0)
        logprobs = at(segment.logprobs, index, segment.logprobs[index] - 0.01)
        doctored = changed(record, TokenSegment, 1, fields(logprobs=logprobs))
        found = replay(doctored, tiny).difference
        assert found is not None and (found.kind, found.position) == ("logprob", start + index)
        assert float(found.replayed) == pytest.approx(segment.logprobs[index], rel=1e-5, abs=1e-6)
        assert replay(doctored, tiny, tolerance=0.02).same


def test_an_id_that_the_model_does_not_have_is_named(record: Trajectory, tiny: EmbeddedModel) -> None:
    found = replay(
        changed(record, TokenSegment, 3, fields(ids=at(record.segments[3].ids, 2, 1 << 30))), tiny
    ).difference
    position = sum(len(segment.ids) for segment in record.segments[:3]) + 2
    assert found == Difference(
        "token", 1, position, str(1 << 30), f"an id below {tiny.tokenizer.vocab_size}", "not in the vocabulary"
    )


@pytest.mark.parametrize(
    ("kind", "number", "change", "turn", "what", "byte"),
    [
        (MessageAdded, 2, message(fields(content="I liik.")), 0, "the message.content", 3),
        (MessageAdded, 2, message(fields(reasoning="Lüok.")), 0, "the message.reasoning", 1),
        (MessageAdded, 2, message(first_call), 0, "the message.calls[0].arguments", 10),
        (MessageAdded, 2, message(fields(calls=())), 0, "the message.calls[0].id", 0),
        (CallReady, 1, lambda ready: replace(ready, call=replace(ready.call, name="get_wether")), 0, "call.name", 6),
        (CallFinished, 0, lambda done: replace(done, result=replace(done.result, content="sunny")), 1, "content", 5),
        (MessageAdded, 3, message(fields(content="sunny, 22 degrees")), 1, "content", 8),
        (MessageAdded, 3, message(fields(call_id="call_9_9")), 1, "call_9_9", 0),
        (Outcome, 0, fields(answer="Sunny in Paris."), 2, "the answer", 14),
    ],
)
def test_the_first_changed_byte_of_a_text_is_named(
    record: Trajectory,
    tiny: EmbeddedModel,
    kind: type[Any],
    number: int,
    change: Callable[[Any], Any],
    turn: int,
    what: str,
    byte: int,
) -> None:
    found = replay(changed(record, kind, number, change), tiny).difference
    assert found is not None and (found.kind, found.turn, found.position) == ("byte", turn, byte), str(found)
    assert what in found.what and found.what in str(found)


def test_a_result_without_its_call_is_named(record: Trajectory, tiny: EmbeddedModel) -> None:
    records = [each for each in record.records if not isinstance(each, CallFinished)]
    found = replay(copy_of(record, records), tiny).difference
    assert found is not None and found.kind == "byte" and "the result of call_0_0" in found.what


def test_a_record_that_ends_in_a_turn_replays_so_far(record: Trajectory, tiny: EmbeddedModel) -> None:
    for length in range(len(record.records)):
        assert replay(copy_of(record, record.records[:length]), tiny).same


def test_another_model_differs_at_the_first_sampled_token(record: Trajectory) -> None:
    engine = Engine.load("tiny")
    engine.decoder.embed.weight.data.mul_(1.5)
    found = replay(record, EmbeddedModel(engine)).difference
    assert found is not None
    assert (found.kind, found.position, found.turn) == ("logprob", len(record.segments[0].ids), 0)


def test_what_cannot_be_replayed_is_refused(record: Trajectory, tiny: EmbeddedModel) -> None:
    hosted = Trajectory(replace(record.header, dialect=None, model="openai:m"))
    with pytest.raises(ReplayError, match="the record is of openai:m, a model behind an API"):
        replay(hosted, tiny)
    with pytest.raises(TypeError, match=r"replay\(model\) must be an EmbeddedModel"):
        replay(record, ScriptedModel(lambda messages, think: AssistantTurn()))  # type: ignore[arg-type]


def agentkit(*arguments: str | Path, code: int = 0) -> str:
    result = typer.testing.CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)
    assert result.exit_code == code, result.output
    return result.output


def test_the_command(record: Trajectory, tmp_path: Path) -> None:
    good, bad, hosted, other = (tmp_path / f"{name}.jsonl" for name in ("good", "bad", "hosted", "other"))
    record.save(good)
    shown = agentkit("replay", good)
    assert shown.splitlines()[-2].startswith(f"replayed 2 turns, {len(record.token_ids)} ids, ")
    assert shown.splitlines()[-1] == "equal"
    cut = tmp_path / "cut.jsonl"
    cut.write_bytes(good.read_bytes()[:-20])
    assert "Note: the record ends before its run did" in agentkit("replay", cut)
    assert [json.loads(agentkit("replay", file, "--json"))["complete"] for file in (good, cut)] == [True, False]
    changed(record, MessageAdded, 2, message(fields(content="I liik."))).save(bad)
    shown = agentkit("replay", bad, "-m", "tiny", code=1)
    assert "differs at turn 1, byte 3 (the message.content): recorded 'I liik.', replayed 'I look.'" in shown
    found = json.loads(agentkit("replay", bad, "--json", code=1))
    assert (found["same"], found["difference"]["kind"], found["turns"]) == (False, "byte", 0)
    Trajectory(replace(record.header, dialect=None, model="openai:m"), hosted).close()
    assert "a model behind an API" in agentkit("replay", hosted, code=2)
    Trajectory(replace(record.header, model="mine"), other).close()
    assert 'the record is of a model "mine"; give its folder' in agentkit("replay", other, code=2)
    assert "other.jsonl has no ids, so there is nothing to compare" in agentkit("replay", other, "-m", "tiny", code=2)
    assert "is behind an API" in agentkit("replay", good, "-m", "openai:m", code=2)
    assert "none.jsonl" in agentkit("replay", "none.jsonl", code=2)
    bad.write_text("{}\n")
    assert "is not a trajectory" in agentkit("replay", bad, code=2)


def test_messages_that_are_no_prompt_are_an_error(record: Trajectory, tiny: EmbeddedModel) -> None:
    """A turn that no ids have is among the messages that the next turn answers."""
    records = list(record.records)
    said = next(
        place for place, each in enumerate(records) if isinstance(getattr(each, "message", None), AssistantMessage)
    )
    with pytest.raises(
        ReplayError, match="messages before turn 2 of the record are no prompt: a continuation holds no"
    ):
        replay(copy_of(record, [*records[: said + 1], *records[said:]]), tiny)
