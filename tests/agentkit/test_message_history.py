"""`message_history`: a new run that begins with the messages of an earlier conversation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentkit import (
    Agent,
    AssistantMessage,
    AssistantTurn,
    EmbeddedModel,
    Limits,
    Message,
    ScriptedModel,
    SystemMessage,
    ToolCall,
    ToolMessage,
    Trajectory,
    UserMessage,
)
from agentkit.history import check_history, opening_messages
from agentkit.messages import to_openai_all
from agentkit.models.scripted import ScriptedTokens
from agentkit.models.tokens import rebuild_token_ids
from agentkit_engine.chat import Tokenizer, encode_ids
from agentkit_environments import Environment

from .conftest import get_weather

pytestmark = pytest.mark.anyio
Script = Callable[..., ScriptedModel]
CALL = ToolCall("call_0_0", "get_weather", '{"city": "Oslo"}')
TALK: list[Message] = [
    UserMessage("What is the weather in Oslo?"),
    AssistantMessage("", "I have to look.", (CALL,)),
    ToolMessage("call_0_0", "get_weather", "snowy, -3 degrees"),
    AssistantMessage("Snowy.", None),
]


def answer(text: str = "Done.") -> AssistantTurn:
    return AssistantTurn(content=text)


async def test_a_run_begins_with_the_messages(script: Script, environment: Environment, tokenizer: Tokenizer) -> None:
    agent = Agent(script(answer()), [get_weather], system="Be brief.", thinking="never")
    result = await agent.run("And in Paris?", environment=environment, message_history=TALK)
    record = result.trajectory
    read = [SystemMessage("Be brief."), *TALK, UserMessage("And in Paris?")]
    assert record.messages[:-1] == read
    prompt = encode_ids(to_openai_all(read), tokenizer=tokenizer, tools=[get_weather.spec], effort="high", think=False)
    assert list(record.segments[0].ids) == prompt
    assert rebuild_token_ids(record, tokenizer) == record.token_ids
    assert result.usage.turns == 1


async def test_calls_after_a_history_have_new_ids(script: Script, environment: Environment) -> None:
    model = script(answer(), answer(), AssistantTurn(calls=[("get_weather", {"city": "Paris"})]), answer())
    result = await Agent(model, [get_weather]).run("Q", environment=environment, message_history=TALK)
    calls = [
        call.id
        for message in result.trajectory.messages
        if isinstance(message, AssistantMessage)
        for call in message.calls
    ]
    assert calls == ["call_0_0", "call_2_0"]
    continued = await result.continue_("More?")
    assert continued.status == "answered"


@pytest.mark.parametrize("as_list", [False, True])
async def test_a_malformed_call_after_a_history_has_its_own_id(
    as_list: bool, script: Script, environment: Environment, tokenizer: Tokenizer
) -> None:
    broken = '\n\n<｜DSML｜tool_calls>\n<｜DSML｜invoke name="get_weather">\n<oops'
    ids = [*tokenizer.encode(broken), tokenizer.eos_id]
    result = await Agent(script(answer(), answer(), ids, answer()), [get_weather], thinking="never").run(
        "Q", environment=environment, message_history=TALK
    )
    told = [message for message in result.trajectory.messages if isinstance(message, ToolMessage)]
    assert [message.call_id for message in told] == ["call_0_0", "call_2_0"]
    history = result.trajectory.messages if as_list else result
    again = await Agent(script(answer()), [get_weather]).run("Q", environment=environment, message_history=history)
    assert UserMessage(told[1].content) in again.trajectory.messages
    assert again.status == "answered"


@pytest.mark.parametrize("kind", ["result", "trajectory", "file"])
async def test_a_run_or_its_record_is_a_history(
    script: Script, environment: Environment, tmp_path: Path, kind: str
) -> None:
    first = await Agent(script(AssistantTurn(calls=[("get_weather", {"city": "Oslo"})]), answer()), [get_weather]).run(
        "One", environment=environment, trajectory=tmp_path / "one.jsonl"
    )
    given: Any = {"result": first, "trajectory": first.trajectory}.get(kind) or Trajectory.load(tmp_path / "one.jsonl")
    agent = Agent(script(answer()), [], system="Another prompt.")
    second = await agent.run("Two", environment=environment, trajectory=tmp_path / "two.jsonl", message_history=given)
    assert second.trajectory.messages[:-1] == [*first.trajectory.messages, UserMessage("Two")]
    assert len(first.trajectory.messages) == 5  # the first record did not grow
    again = Trajectory.load(tmp_path / "two.jsonl")
    assert again.messages == second.trajectory.messages
    assert again.header.id != first.trajectory.header.id


async def test_the_system_prompt_of_the_history_wins_and_the_schema_of_the_agent(
    script: Script, environment: Environment
) -> None:
    old = SystemMessage("Old.", {"type": "string"})
    for output_type, schema in ((None, None), (int, {"type": "integer"})):
        agent = Agent(script(answer("7")), [], system="New.", output_type=output_type)
        result = await agent.run("Q", environment=environment, message_history=[old])
        assert result.trajectory.messages[0] == SystemMessage("Old.", schema)
    result = await Agent(script(answer()), [], system="").run("Q", environment=environment, message_history=[])
    assert result.trajectory.messages[0] == UserMessage("Q")


async def test_a_policy_of_thoughts_reads_only_what_the_turn_answers(script: Script, environment: Environment) -> None:
    seen: list[list[Message]] = []

    def policy(news: list[Message]) -> bool:
        seen.append(news)
        return False

    await Agent(script(answer()), [get_weather], thinking=policy).run(
        "Q", environment=environment, message_history=TALK
    )
    assert seen == [[UserMessage("Q")]]


async def test_the_embedded_model_reads_a_history_of_another_model(
    tiny: EmbeddedModel, environment: Environment
) -> None:
    agent = Agent(tiny, [get_weather], limits=Limits(max_tokens=300))
    result = await agent.run("What is the weather in Paris?", environment=environment, message_history=TALK)
    record = result.trajectory
    assert record.messages[1:5] == TALK
    assert rebuild_token_ids(record, tiny.tokenizer) == record.token_ids
    continued = await result.continue_("And in Oslo?")
    assert rebuild_token_ids(continued.trajectory, tiny.tokenizer) == continued.trajectory.token_ids


async def test_a_history_that_does_not_fit_is_a_limit_and_can_be_continued(
    script: Script, environment: Environment, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ScriptedTokens, "max_length", 2000)
    long = [UserMessage("word " * 2000), *TALK[1:]]
    result = await Agent(script(answer()), [get_weather]).run("Q", environment=environment, message_history=long)
    assert (result.status, result.limit, result.usage.turns) == ("limit", "context", 0)
    again = await result.continue_("Q")
    assert again.limit == "context"  # all of the history is still unread, not only what follows its last turn


@pytest.mark.parametrize(
    ("history", "problem"),
    [
        ([*TALK[:2], UserMessage("Q")], r"message_history\[1\]: call 'call_0_0' has no result"),
        (TALK[:2], r"message_history\[1\]: call 'call_0_0' has no result"),
        ([TALK[0], TALK[2]], r"message_history\[1\]: the result of call 'call_0_0'"),
        ([*TALK[:3], TALK[2]], r"message_history\[3\]: the result of call 'call_0_0'"),
        ([*TALK[:2], ToolMessage("call_9", "x", "y")], r"message_history\[2\]: the result of call 'call_9'"),
        ([UserMessage("Q"), SystemMessage("S")], r"message_history\[1\]: a system message"),
        ([SystemMessage("S"), SystemMessage("S")], r"message_history\[1\]: a system message"),
        ([AssistantMessage("Hello.")], r"message_history\[0\]: an assistant turn; expected a user message"),
        ([*TALK, AssistantMessage("More.")], r"message_history\[4\]: an assistant turn"),
        ([TALK[0], AssistantMessage("", None, (CALL, CALL))], r"message_history\[1\]: two calls have the same id"),
    ],
)
async def test_a_history_that_is_no_conversation_is_refused(
    script: Script, history: list[Message], problem: str
) -> None:
    agent = Agent(script(answer()), [get_weather])
    with pytest.raises(ValueError, match=problem):
        await agent.run("Q", message_history=history)  # refused before a sandbox is opened


@pytest.mark.parametrize("history", ["text", [{"role": "user", "content": "Q"}], [None], 3])
async def test_a_history_of_something_else_is_refused(script: Script, history: Any) -> None:
    with pytest.raises(TypeError, match="message_history"):
        await Agent(script(answer())).run("Q", message_history=history)


async def test_a_stream_takes_a_history_but_not_with_a_record_to_continue(
    script: Script, environment: Environment
) -> None:
    agent = Agent(script(answer()), [get_weather])
    events = [event async for event in agent.stream("Q", environment=environment, message_history=TALK)]
    assert events[-1].type == "run_finished"
    result = await agent.run("Q", environment=environment)
    with pytest.raises(ValueError, match="message_history"):
        await anext(agent.stream("Q", environment=environment, history=result.trajectory, message_history=TALK))


@st.composite
def conversations(draw: st.DrawFn) -> list[Message]:
    """A conversation that any model could have had, with results in any order."""
    messages: list[Message] = [SystemMessage("S")] if draw(st.booleans()) else []
    for turn in range(draw(st.integers(0, 4))):
        messages += [UserMessage(draw(st.text(max_size=5)))] * draw(st.integers(1, 2))
        for step in range(draw(st.integers(0, 2))):
            ids = [f"call_{turn}_{step}_{number}" for number in range(draw(st.integers(1, 3)))]
            messages.append(AssistantMessage("", None, tuple(ToolCall(each, "t", "{}") for each in ids)))
            messages += [ToolMessage(each, "t", "r") for each in draw(st.permutations(ids))]
        if draw(st.booleans()):
            messages.append(AssistantMessage("A"))
    return messages


@given(conversations())
def test_conversations_are_accepted_and_kept(messages: list[Message]) -> None:
    opening = opening_messages(messages, UserMessage("Q"), system="", output_schema=None)
    assert opening == [*messages, UserMessage("Q")]


@given(conversations(), st.data())
def test_a_conversation_without_one_result_is_refused_with_the_index_of_the_call(
    messages: list[Message], data: st.DataObject
) -> None:
    results = [index for index, message in enumerate(messages) if isinstance(message, ToolMessage)]
    if not results:
        return
    lost = data.draw(st.sampled_from(results))
    removed = messages[lost]
    assert isinstance(removed, ToolMessage)
    index = next(
        index
        for index, message in enumerate(messages)
        if isinstance(message, AssistantMessage) and removed.call_id in [call.id for call in message.calls]
    )
    with pytest.raises(ValueError, match=rf"message_history\[{index}\]: call '{removed.call_id}' has no result"):
        check_history([*messages[:lost], *messages[lost + 1 :]])


@given(conversations())
def test_a_record_with_results_of_malformed_calls_is_a_conversation(messages: list[Message]) -> None:
    def forget(message: Message) -> Message:
        if isinstance(message, ToolMessage):
            return replace(message, is_error=True)
        return replace(message, calls=message.calls[1:]) if isinstance(message, AssistantMessage) else message

    class Record(Trajectory):
        def __init__(self, messages: Sequence[Message]) -> None:
            self._messages = list(messages)

        @property
        def messages(self) -> list[Message]:
            return self._messages

    record = Record([forget(message) for message in messages])
    opening = opening_messages(record, UserMessage("Q"), system="", output_schema=None)
    check_history(opening)
    assert len(opening) == len(messages) + 1
