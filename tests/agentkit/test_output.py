"""Answers with a schema: the model is constrained to it, and an answer that does not fit is refused."""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from agentkit import (
    DEFAULT_SYSTEM,
    Agent,
    AssistantTurn,
    EmbeddedModel,
    Limits,
    SamplingParams,
    ScriptedModel,
    SystemMessage,
    Trajectory,
)
from agentkit.models.tokens import rebuild_token_ids
from agentkit_engine import GrammarMissingError
from agentkit_engine.grammar import GrammarWarning
from agentkit_environments import Environment
from agentkit_tools import BUILTINS

from .conftest import get_weather

pytestmark = pytest.mark.anyio
Script = Callable[..., ScriptedModel]
SCHEMA = {
    "type": "object",
    "properties": {"sky": {"enum": ["sunny", "snowy"]}, "degrees": {"type": "integer", "minimum": -99, "maximum": 99}},
    "required": ["sky", "degrees"],
    "additionalProperties": False,
}
NESTED = {"$defs": {"n": {"anyOf": [{"type": "null"}, {"items": {"$ref": "#/$defs/n"}}]}}, "$ref": "#/$defs/n"}


@pytest.mark.parametrize("tools", [[], [get_weather]], ids=["alone", "with a tool"])
async def test_answers_fit_the_output_schema(tiny: EmbeddedModel, environment: Environment, tools: list[Any]) -> None:
    calls = 0
    for seed, temperature in enumerate((0.0, 0.5, 1.6, 1.6, 1.6)):
        limits = Limits(max_turns=6, max_tokens=400, max_thinking_tokens_per_turn=20)
        sampling = SamplingParams(temperature, seed=seed)
        agent = Agent(tiny, tools, sampling=sampling, output_schema=SCHEMA, limits=limits)
        result = await agent.run("What is the weather in Oslo?", environment=environment)
        calls += result.usage.calls
        if result.status == "answered":
            assert result.answer is not None and result.error is None
            jsonschema.validate(json.loads(result.answer), SCHEMA)
            assert result.output == json.loads(result.answer)
        else:
            assert (result.status, result.answer) == ("limit", None)
        assert result.status == "answered" or tools or temperature > 1  # with a tool it may call until a limit
        assert rebuild_token_ids(result.trajectory, tiny.tokenizer) == result.trajectory.token_ids
    assert bool(calls) == bool(tools)


async def test_the_output_schema_is_in_the_prompt_and_the_record(
    tiny: EmbeddedModel, environment: Environment, tmp_path: Path
) -> None:
    agent = Agent(tiny, [], system="", output_schema=SCHEMA, thinking="never")
    result = await agent.run("Q", environment=environment, trajectory=tmp_path / "run.jsonl")
    record = Trajectory.load(tmp_path / "run.jsonl")
    assert record.header.sampling == tiny.sampling.override(output_schema=SCHEMA)
    assert record.messages == result.trajectory.messages
    assert record.messages[0] == SystemMessage("", SCHEMA)
    assert json.dumps(SCHEMA) in tiny.tokenizer.decode(record.segments[0].ids)
    assert rebuild_token_ids(record, tiny.tokenizer) == record.token_ids


async def test_a_truncated_answer_is_not_an_answer(tiny: EmbeddedModel, environment: Environment) -> None:
    limits = Limits(max_tokens=2)
    schema = {"type": "string", "minLength": 9}
    result = await Agent(tiny, [], output_schema=schema, thinking="never", limits=limits).run(
        "Q", environment=environment
    )
    assert (result.status, result.limit, result.answer) == ("limit", "max_tokens", None)


@pytest.mark.parametrize(
    ("schema", "text", "problem"),
    [
        (SCHEMA, "It is snowy.", "not valid JSON"),
        (SCHEMA, "{", "not valid JSON"),
        (SCHEMA, '{"sky": "snowy", "degrees": NaN}', "not valid JSON"),
        (SCHEMA, '{"sky": "snowy"}', r"\$\.degrees: missing, expected integer"),
        (SCHEMA, '{"sky": "dark", "degrees": 1}', r'\$\.sky: given "dark" .*expected one of "sunny", "snowy"'),
        ({"type": "array", "uniqueItems": True}, "[1, 1]", "expected uniqueItems"),
        (NESTED, "[" * 190 + "]" * 190, "cannot be checked"),
        ({"multipleOf": 0.1}, "1e400", "cannot be checked"),
    ],
)
@pytest.mark.parametrize("how", ["text", "submit"])
async def test_an_answer_that_does_not_fit_is_invalid_output(
    script: Script, environment: Environment, schema: dict[str, Any], text: str, problem: str, how: str
) -> None:
    said = AssistantTurn(content=text) if how == "text" else AssistantTurn(calls=[("submit", {"answer": text})])
    agent = Agent(script(said), [BUILTINS["submit"]], output_schema=schema, thinking="never")
    result = await agent.run("Q", environment=environment)
    assert (result.status, result.answer) == ("invalid_output", None)
    assert result.error is not None and "does not fit output_schema" in result.error
    with pytest.raises(ValueError, match=problem):
        raise ValueError(result.error)
    assert result.trajectory.outcome == result.outcome


async def test_a_continuation_can_correct_an_invalid_answer(script: Script, environment: Environment) -> None:
    fits = '{"sky": "snowy", "degrees": -3}'
    agent = Agent(script(*map(AssistantTurn, [None] * 3, ["Snowy.", "Snow.", fits])), output_schema=SCHEMA)
    first = await agent.run("Q", environment=environment)
    assert first.status == "invalid_output" and first.error is not None
    second = await first.continue_(first.error)
    assert (second.status, second.answer, second.error) == ("answered", fits, None)


def test_submit_is_not_a_default_tool_with_an_output_schema(script: Script) -> None:
    model = script(AssistantTurn())
    assert [*Agent(model, output_schema=SCHEMA).tools] == [name for name in BUILTINS if name != "submit"]
    assert [*Agent(model, sampling=SamplingParams(output_schema=SCHEMA)).tools] == [*BUILTINS][:-1]
    assert [*Agent(model).tools] == [*BUILTINS]


async def test_any_text_is_an_answer_without_an_output_schema(script: Script, environment: Environment) -> None:
    result = await Agent(script(AssistantTurn(content="Snowy."))).run("Q", environment=environment)
    assert (result.status, result.answer, result.error) == ("answered", "Snowy.", None)
    assert result.trajectory.header.sampling.output_schema is None
    assert result.trajectory.messages[0] == SystemMessage(DEFAULT_SYSTEM)


@pytest.mark.parametrize(
    ("schema", "problem"),
    [
        ({"type": "strin"}, r"output_schema: \$\.type: 'strin' is not valid"),
        ({"type": "object", "properties": []}, r"output_schema: \$\.properties"),
        ({"const": {1, 2}}, "output_schema: not JSON"),
        ({"$ref": "https://example.com/schema.json"}, r"given \$ref .*expected a place in this schema"),
        (["object"], "given \\['object'\\]; expected a JSON schema"),
        (SamplingParams, "model_json_schema"),
    ],
)
def test_an_invalid_output_schema_is_refused(script: Script, schema: Any, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        Agent(script(AssistantTurn()), output_schema=schema)


async def test_a_keyword_that_no_grammar_enforces_is_named(tiny: EmbeddedModel, environment: Environment) -> None:
    agent = Agent(tiny, [], output_schema={"type": "object", "minProperties": 1}, limits=Limits(max_tokens=1))
    with pytest.warns(GrammarWarning, match="minProperties of the answer"):
        await agent.run("Q", environment=environment)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        await Agent(tiny, [], output_schema=SCHEMA, limits=Limits(max_tokens=1)).run("Q", environment=environment)


async def test_a_missing_llguidance_is_an_error_with_the_install_command(
    environment: Environment, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(GrammarMissingError, match="pip install"):
        await Agent("tiny", [], output_schema=SCHEMA).run("Q", environment=environment)
