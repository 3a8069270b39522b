"""Agents with a grammar: forced ids are recorded as forced, and the record is exact."""

from __future__ import annotations

import json
import sys
import threading
import warnings
from typing import Any

import anyio
import anyio.to_thread
import jsonschema
import pytest

from agentkit import Agent, EmbeddedModel, Limits, SamplingParams, Trajectory
from agentkit.events import CallFinished
from agentkit.model import CallMalformed, CallReady
from agentkit.models.grammars import grammar_for
from agentkit.models.tokens import rebuild_token_ids
from agentkit_engine import GrammarMissingError
from agentkit_engine.grammar import Grammar, GrammarWarning
from agentkit_environments import Environment
from agentkit_tools import BUILTINS, CommandTool

from .conftest import get_weather

pytestmark = pytest.mark.anyio
WITH_GRAMMAR = SamplingParams(temperature=0, grammar=True)


async def ask(
    model: EmbeddedModel, sampling: SamplingParams, environment: Environment, *, tokens: int = 300
) -> Trajectory:
    agent = Agent(model, [get_weather], sampling=sampling, limits=Limits(max_tokens=tokens))
    return (await agent.run("What is the weather in Oslo?", environment=environment)).trajectory


async def test_forced_ids_are_recorded_as_forced(tiny: EmbeddedModel, environment: Environment) -> None:
    trajectory = await ask(tiny, WITH_GRAMMAR, environment)
    assert trajectory.header.sampling.grammar
    assert [record for record in trajectory.records if isinstance(record, CallFinished)]
    forced = [token_id for segment in trajectory.segments if segment.kind == "forced" for token_id in segment.ids]
    assert trajectory.outcome is not None
    usage = trajectory.outcome.usage
    assert usage.forced_tokens == len(forced) > 5
    assert usage.sampled_tokens == sum(trajectory.loss_mask) == sum(p is not None for p in trajectory.logprobs)
    assert "invoke" in tiny.tokenizer.decode(forced)
    assert rebuild_token_ids(trajectory, tiny.tokenizer) == trajectory.token_ids
    logprobs = tiny.engine.logits(trajectory.token_ids).log_softmax(-1)
    for place, recorded in enumerate(trajectory.logprobs):
        if recorded is not None:
            assert recorded == pytest.approx(logprobs[place - 1, trajectory.token_ids[place]].item(), abs=1e-4)


async def test_a_grammar_does_not_change_a_valid_generation(tiny: EmbeddedModel, environment: Environment) -> None:
    without = await ask(tiny, SamplingParams(temperature=0, grammar=False), environment)
    assert {segment.kind for segment in without.segments} == {"prompt", "sampled"}
    assert (await ask(tiny, WITH_GRAMMAR, environment)).token_ids == without.token_ids


@pytest.mark.parametrize("tokens", [1, 12, 25])
async def test_max_tokens_counts_sampled_ids_but_not_forced_ids(
    tiny: EmbeddedModel, environment: Environment, tokens: int
) -> None:
    trajectory = await ask(tiny, WITH_GRAMMAR, environment, tokens=tokens)
    assert trajectory.outcome is not None
    assert (trajectory.outcome.limit, trajectory.outcome.usage.sampled_tokens) == ("max_tokens", tokens)
    assert trajectory.token_ids[-1] == tiny.tokenizer.eos_id
    assert rebuild_token_ids(trajectory, tiny.tokenizer) == trajectory.token_ids


async def test_calls_fit_their_schema_even_at_a_high_temperature(tiny: EmbeddedModel, environment: Environment) -> None:
    calls = 0
    for seed in range(6):
        trajectory = await ask(tiny, SamplingParams(temperature=1.6, seed=seed, grammar=True), environment, tokens=120)
        schema = get_weather.spec["function"]["parameters"]
        for record in trajectory.records:
            if isinstance(record, CallReady):
                calls += 1
                assert record.call.name == "get_weather"
                jsonschema.validate(json.loads(record.call.arguments), schema)
            elif isinstance(record, CallMalformed):
                assert record.error == "the turn ended inside the call"
    assert calls > 0


def test_the_grammar_enforces_the_built_in_tools_completely(tiny: EmbeddedModel) -> None:
    grammar = tiny.engine.grammars.calls([each.spec for each in BUILTINS.values()])
    assert (grammar.unenforced, grammar.unenforced_tools) == ((), ())


async def test_a_tool_without_a_grammar_does_not_stop_the_run(tiny: EmbeddedModel, environment: Environment) -> None:
    """Its calls are unconstrained, a warning names the tool, and the other tools stay constrained."""
    odd = CommandTool("odd", "", {"type": "object", "properties": {"a": {"enum": []}}, "required": ["a"]}, "true")
    agent = Agent(tiny, [get_weather, odd], sampling=WITH_GRAMMAR, limits=Limits(max_tokens=300))
    with pytest.warns(GrammarWarning, match="calls of tool 'odd' are not held to its schema"):
        result = await agent.run("What is the weather in Oslo?", environment=environment)
    assert result.status in ("answered", "submitted", "limit")
    with pytest.warns(GrammarWarning, match="odd"):
        grammar, told = await grammar_for(tiny.engine, [get_weather, odd], WITH_GRAMMAR)
    assert grammar is not None and told is not None and "'odd'" in told


async def test_unconstrained_tools_are_recorded_by_default(tiny: EmbeddedModel, environment: Environment) -> None:
    """A tool that is not constrained to its schema is reported; single keywords are not, with `grammar="auto"`."""
    assert tiny.sampling.grammar == "auto"
    unique = {"type": "object", "properties": {"a": {"type": "array", "uniqueItems": True}}}
    odd = CommandTool("odd", "", {"type": "object", "properties": {"a": {"enum": []}}, "required": ["a"]}, "true")
    agent = Agent(tiny, [get_weather, CommandTool("unique", "", unique, "true")], limits=Limits(max_tokens=300))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        held = await agent.run("What is the weather in Oslo?", environment=environment)
    assert held.trajectory.header.grammar_off is None and held.usage.forced_tokens > 0
    agent = Agent(tiny, [get_weather, odd], limits=Limits(max_tokens=300))
    with pytest.warns(GrammarWarning, match="calls of tool 'odd' are not held to its schema"):
        told = await agent.run("What is the weather in Oslo?", environment=environment)
    assert "'odd'" in (told.trajectory.header.grammar_off or "")


async def test_building_a_grammar_does_not_block_the_event_loop(
    tiny: EmbeddedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, release = threading.Event(), threading.Event()
    calls = tiny.engine.grammars.calls

    def slow(*args: Any, **options: Any) -> Grammar:
        begun.set()
        assert release.wait(30)
        return calls(*args, **options)

    monkeypatch.setattr(tiny.engine.grammars, "calls", slow)
    async with anyio.create_task_group() as task_group:
        task_group.start_soon(grammar_for, tiny.engine, [get_weather], WITH_GRAMMAR)
        # would never return if building the grammar blocked the event loop
        assert await anyio.to_thread.run_sync(begun.wait, 30)
        release.set()


async def test_there_is_no_grammar_without_tools_or_with_grammar_false(tiny: EmbeddedModel) -> None:
    assert await grammar_for(tiny.engine, [], WITH_GRAMMAR) == (None, "there are no tools")
    assert await grammar_for(tiny.engine, [get_weather], tiny.sampling.override(grammar=False)) == (
        None,
        "it is switched off",
    )


async def test_a_missing_llguidance_is_an_error_with_the_install_command(
    environment: Environment, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    agent = Agent("tiny", [get_weather], sampling=WITH_GRAMMAR)
    with pytest.raises(GrammarMissingError, match="pip install"):
        await agent.run("What is the weather in Oslo?", environment=environment)


async def test_a_grammar_without_tools_has_nothing_to_constrain(tiny: EmbeddedModel, environment: Environment) -> None:
    sampling = SamplingParams(temperature=0, grammar=True)
    agent = Agent(tiny, [], sampling=sampling, limits=Limits(max_tokens=8))
    result = await agent.run("Hello.", environment=environment)
    assert result.status in ("answered", "no_answer", "limit")
    assert result.trajectory.header.grammar_off == "there are no tools"
