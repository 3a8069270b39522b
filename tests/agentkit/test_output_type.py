"""`output_type`: the answer is a value of a Python type, and one that does not fit is returned to the model once."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypedDict

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, Field, TypeAdapter, field_validator

from agentkit import (
    Agent,
    AssistantMessage,
    AssistantTurn,
    EmbeddedModel,
    Limits,
    SamplingParams,
    ScriptedModel,
    SystemMessage,
    ToolMessage,
    Trajectory,
    UserMessage,
)
from agentkit.models.tokens import rebuild_token_ids
from agentkit.output import output_of
from agentkit_environments import Environment
from agentkit_tools import BUILTINS

pytestmark = pytest.mark.anyio
Script = Callable[..., ScriptedModel]


class Weather(BaseModel):
    """The weather of a city."""

    sky: Literal["sunny", "snowy"]
    degrees: int = Field(ge=-99, le=99)


@dataclass(frozen=True)
class Forecast:
    city: str
    days: list[Weather]


class Range(TypedDict):
    low: int
    high: int


class Even(BaseModel):
    number: int

    @field_validator("number")
    @classmethod
    def _even(cls, number: int) -> int:
        if number % 2:
            raise ValueError("an odd number")
        return number


SNOWY = '{"sky": "snowy", "degrees": -3}'
CASES: list[tuple[Any, str, Any, str]] = [
    (Weather, SNOWY, Weather(sky="snowy", degrees=-3), '{"sky": "dark", "degrees": 1}'),
    (
        Forecast,
        f'{{"city": "Oslo", "days": [{SNOWY}]}}',
        Forecast("Oslo", [Weather(sky="snowy", degrees=-3)]),
        '{"city": "Oslo"}',
    ),
    (Range, '{"low": 1, "high": 2}', {"low": 1, "high": 2}, '{"low": 1}'),
    (list[int], "[1, 2]", [1, 2], '["a"]'),
    (tuple[int, str], '[1, "a"]', (1, "a"), "[1]"),
    (dict[str, float], '{"a": 1.5}', {"a": 1.5}, '{"a": "b"}'),
    (Literal["yes", "no"], '"yes"', "yes", "yes"),
    (int | list[str], '["a"]', ["a"], '"a"'),
    (Weather | None, "null", None, "{}"),
    (int, "7", 7, "seven"),
    (bool, "true", True, "[]"),
    (float, "0.5", 0.5, "NaN"),
]


@pytest.mark.parametrize(("kind", "fits", "value", "misfit"), CASES, ids=[str(case[0]) for case in CASES])
async def test_the_output_is_a_value_of_the_type(
    script: Script, environment: Environment, kind: Any, fits: str, value: Any, misfit: str
) -> None:
    agent = Agent(script(AssistantTurn(content=fits)), [], output_type=kind)
    result = await agent.run("Q", environment=environment)
    assert (result.status, result.answer, result.output) == ("answered", fits, value)
    assert type(result.output) is type(value)
    assert isinstance(result.trajectory.messages[0], SystemMessage)
    assert result.trajectory.messages[0].output_schema == agent.output_schema == agent.sampling.output_schema

    agent = Agent(script(AssistantTurn(content=misfit), AssistantTurn(content=fits)), [], output_type=kind)
    result = await agent.run("Q", environment=environment)
    assert (result.status, result.output, result.usage.turns) == ("answered", value, 2)

    agent = Agent(script(AssistantTurn(content=misfit)), [], output_type=kind)
    result = await agent.run("Q", environment=environment)
    assert (result.status, result.answer, result.output, result.usage.turns) == ("invalid_output", None, None, 2)
    assert result.error is not None and "does not fit output_schema: $" in result.error


async def test_the_model_is_told_what_is_wrong(script: Script, environment: Environment) -> None:
    agent = Agent(script(AssistantTurn(content='{"sky": "dark"}'), AssistantTurn(content=SNOWY)), output_type=Weather)
    result = await agent.run("Q", environment=environment)
    told = result.trajectory.messages[-2]
    assert isinstance(told, UserMessage)
    assert "$.sky: given 'dark': Input should be 'sunny' or 'snowy'" in told.content
    assert "$.degrees: " in told.content and "Field required" in told.content
    assert result.trajectory.outcome == result.outcome


async def test_validators_of_a_model_count(script: Script, environment: Environment) -> None:
    agent = Agent(script(AssistantTurn(content='{"number": 3}')), [], output_type=Even)
    result = await agent.run("Q", environment=environment)
    assert result.status == "invalid_output" and result.error is not None and "an odd number" in result.error


async def test_a_submitted_answer_is_returned_too(script: Script, environment: Environment) -> None:
    submitted = [AssistantTurn(calls=[("submit", {"answer": text})]) for text in ("Snowy.", SNOWY)]
    agent = Agent(script(*submitted), [BUILTINS["submit"]], output_type=Weather)
    result = await agent.run("Q", environment=environment)
    assert (result.status, result.output) == ("submitted", Weather(sky="snowy", degrees=-3))
    kinds = [type(message) for message in result.trajectory.messages[2:]]
    assert kinds == [AssistantMessage, ToolMessage, UserMessage, AssistantMessage, ToolMessage]


async def test_a_spent_limit_leaves_no_second_try(script: Script, environment: Environment) -> None:
    agent = Agent(script(AssistantTurn(content="Snowy.")), [], output_type=Weather, limits=Limits(max_turns=1))
    result = await agent.run("Q", environment=environment)
    assert (result.status, result.usage.turns) == ("invalid_output", 1)
    assert result.error is not None and "not valid JSON" in result.error


async def test_a_continued_run_has_the_type_and_a_new_second_try(script: Script, environment: Environment) -> None:
    turns = [AssistantTurn(content=text) for text in ("No.", SNOWY, "No.", SNOWY)]
    first = await Agent(script(*turns), [], output_type=Weather).run("Q", environment=environment)
    second = await first.continue_("And now?")
    assert first.output == second.output == Weather(sky="snowy", degrees=-3)
    assert second.usage.turns == 2


async def test_an_output_schema_gets_the_second_try_too(script: Script, environment: Environment) -> None:
    schema = {"type": "array", "items": {"type": "integer"}}
    turns = [AssistantTurn(content=text) for text in ("No.", "[1]")]
    for agent in (
        Agent(script(*turns), [], output_schema=schema),
        Agent(script(*turns), [], sampling=SamplingParams(output_schema=schema)),
    ):
        result = await agent.run("Q", environment=environment)
        assert (result.status, result.output, result.usage.turns) == ("answered", [1], 2)


@pytest.mark.parametrize("kind", [None, str])
async def test_free_text_is_not_a_schema(script: Script, environment: Environment, kind: Any) -> None:
    agent = Agent(script(AssistantTurn(content="7")), [], output_type=kind)
    result = await agent.run("Q", environment=environment)
    assert (result.output, agent.output_schema, agent.sampling.output_schema) == ("7", None, None)


async def test_properties_that_the_type_does_not_have_are_closed_for_the_model_and_ignored(
    script: Script, environment: Environment
) -> None:
    agent = Agent(script(AssistantTurn(content='{"low": 1, "high": 2, "more": 3}')), [], output_type=Range)
    assert agent.output_schema is not None and agent.output_schema["additionalProperties"] is False
    result = await agent.run("Q", environment=environment)
    assert result.output == {"low": 1, "high": 2}


async def test_the_type_is_inferred(script: Script, environment: Environment) -> None:
    result = await Agent(script(AssistantTurn(content=SNOWY)), [], output_type=Weather).run(
        "Q", environment=environment
    )
    assert result.output is not None and result.output.degrees == -3  # mypy knows the attribute
    wrong: str = result.output  # type: ignore[assignment]
    assert isinstance(wrong, Weather)


@pytest.mark.parametrize(
    ("kind", "problem"),
    [
        (3, "output_type: given 3, which has no JSON schema"),
        ("Weather", "output_type: given 'Weather'"),
        (type, "output_type: type <class 'type'> has no JSON schema"),
        (Callable, "output_type: given .*Callable"),
        (len, r"output_type: given .*it is a function.*expected a pydantic model"),
        (lambda: 1, "it is a function"),
        (Environment, "output_type: given .*Environment"),
    ],
)
def test_a_type_without_a_schema_is_refused(script: Script, kind: Any, problem: str) -> None:
    with pytest.raises(ValueError, match=problem) as caught:
        Agent(script(AssistantTurn()), output_type=kind)
    assert "\n" not in str(caught.value)


def test_a_type_and_a_schema_are_refused(script: Script) -> None:
    with pytest.raises(ValueError, match="give one of them"):
        Agent(script(AssistantTurn()), output_type=int, output_schema={"type": "integer"})


async def test_the_embedded_model_is_constrained_to_the_type(tiny: EmbeddedModel, environment: Environment) -> None:
    limits = Limits(max_turns=6, max_tokens=400, max_thinking_tokens_per_turn=20)
    for seed in range(3):
        agent = Agent(tiny, [], sampling=SamplingParams(0.5, seed=seed), output_type=Weather, limits=limits)
        result = await agent.run("What is the weather in Oslo?", environment=environment)
        assert result.status == "answered" and isinstance(result.output, Weather)
        assert json.dumps(agent.output_schema) in tiny.tokenizer.decode(result.trajectory.segments[0].ids)
        assert rebuild_token_ids(result.trajectory, tiny.tokenizer) == result.trajectory.token_ids


async def test_a_second_try_of_the_embedded_model_is_rebuilt(tiny: EmbeddedModel, environment: Environment) -> None:
    class Never(BaseModel):
        flag: bool

        @field_validator("flag")
        @classmethod
        def _refuse(cls, flag: bool) -> bool:
            raise ValueError("never")

    agent = Agent(tiny, [], output_type=Never, thinking="never", limits=Limits(max_tokens=60))
    result = await agent.run("Q", environment=environment)
    assert (result.status, result.usage.turns) == ("invalid_output", 2)
    assert rebuild_token_ids(result.trajectory, tiny.tokenizer) == result.trajectory.token_ids


relaxed = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])  # the first example builds tables


@functools.cache
def forecast() -> TypeAdapter[Forecast]:
    return TypeAdapter(Forecast)


@relaxed
@given(
    st.builds(
        Forecast,
        st.text(),
        st.lists(st.builds(Weather, sky=st.sampled_from(["sunny", "snowy"]), degrees=st.integers(-99, 99)), max_size=3),
    )
)
def test_every_value_survives_its_json(value: Forecast) -> None:
    output = output_of(Forecast, None)
    text = forecast().dump_json(value).decode()
    assert output.check(text) == [] and output.value(text) == value


@relaxed
@given(st.text() | st.recursive(st.none() | st.booleans() | st.floats() | st.text(), st.lists).map(json.dumps))
def test_any_text_either_converts_or_has_problems(text: str) -> None:
    output = output_of(Forecast, None)
    if not output.check(text):
        assert isinstance(output.value(text), Forecast)


async def test_a_record_of_a_typed_run_is_read(script: Script, environment: Environment, tmp_path: Path) -> None:
    agent = Agent(script(AssistantTurn(content="[1]")), [], output_type=list[int])
    await agent.run("Q", environment=environment, trajectory=tmp_path / "run.jsonl")
    assert Trajectory.load(tmp_path / "run.jsonl").header.sampling.output_schema == agent.output_schema
