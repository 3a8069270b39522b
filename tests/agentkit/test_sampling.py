"""The record holds the sampling parameters in use, from the caller or from the checkpoint folder."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from agentkit import Agent, EmbeddedModel, Limits, SamplingParams, ScriptedModel, Trajectory, tool
from agentkit.models.embedded import EngineTokens
from agentkit_engine.engine import PACKAGED_MODELS
from agentkit_environments import Environment

from .conftest import get_weather

pytestmark = pytest.mark.anyio
Script = Callable[..., ScriptedModel]
FOLDER_SAYS = {"temperature": 0.5, "top_p": 0.75, "top_k": 20, "min_p": 0.125, "repetition_penalty": 1.25}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The packaged model with a generation_config.json that sets every supported parameter."""
    folder = tmp_path_factory.mktemp("checkpoint") / "model"
    shutil.copytree(PACKAGED_MODELS["tiny"], folder)
    (folder / "generation_config.json").write_text(json.dumps({"do_sample": True, **FOLDER_SAYS}))
    return folder


@pytest.fixture(scope="module")
def model(folder: Path) -> EmbeddedModel:
    return EmbeddedModel(folder)


@pytest.fixture
def used(monkeypatch: pytest.MonkeyPatch) -> list[SamplingParams]:
    """The parameters of each generation of the engine."""
    seen: list[SamplingParams] = []
    make = EngineTokens.__init__

    def noted(self: EngineTokens, session: Any, params: SamplingParams, **options: Any) -> None:
        seen.append(params)
        make(self, session, params, **options)

    monkeypatch.setattr(EngineTokens, "__init__", noted)
    return seen


async def header_of(agent: Agent, environment: Environment, path: Path) -> Any:
    await agent.run("Q", environment=environment, trajectory=path)
    return Trajectory.load(path).header


async def test_the_folder_parameters_are_used_and_recorded(
    model: EmbeddedModel, environment: Environment, used: list[SamplingParams], tmp_path: Path
) -> None:
    agent = Agent(model, [], limits=Limits(max_tokens=2))
    header = await header_of(agent, environment, tmp_path / "t.jsonl")
    assert {name: getattr(header.sampling, name) for name in FOLDER_SAYS} == FOLDER_SAYS
    assert header.sampling == model.sampling
    assert used == [dataclasses.replace(model.sampling, stop_token_ids=frozenset({model.tokenizer.eos_id}))]


async def test_override_changes_some_parameters_and_sampling_params_sets_all(
    model: EmbeddedModel, environment: Environment, used: list[SamplingParams], tmp_path: Path
) -> None:
    limits = Limits(max_tokens=2)
    changed = model.sampling.override(temperature=0, seed=3)
    header = await header_of(Agent(model, [], sampling=changed, limits=limits), environment, tmp_path / "a.jsonl")
    assert header.sampling == dataclasses.replace(model.sampling, temperature=0.0, seed=3)
    header = await header_of(
        Agent(model, [], sampling=SamplingParams(seed=3), limits=limits), environment, tmp_path / "b.jsonl"
    )
    assert header.sampling == SamplingParams(seed=3)
    assert [dataclasses.replace(params, stop_token_ids=frozenset()) for params in used] == [
        changed,
        SamplingParams(seed=3),
    ]


async def test_every_field_reaches_the_engine(
    model: EmbeddedModel, environment: Environment, used: list[SamplingParams], tmp_path: Path
) -> None:
    sampling = SamplingParams(
        temperature=0.5,
        top_p=0.5,
        top_k=7,
        min_p=0.25,
        repetition_penalty=1.5,
        presence_penalty=0.5,
        frequency_penalty=-0.5,
        logit_bias={70: 2.0, 71: -math.inf},
        seed=5,
        max_tokens=3,
        stop_token_ids=frozenset({9}),
        stop=("never said",),
        top_logprobs=2,
        grammar=False,
    )
    agent = Agent(model, [get_weather], sampling=sampling)
    path = tmp_path / "t.jsonl"
    result = await agent.run("Q", environment=environment, trajectory=path)
    assert used == [dataclasses.replace(sampling, stop_token_ids=frozenset({9, model.tokenizer.eos_id}))]
    read = Trajectory.load(path)
    assert read.header.sampling == sampling
    assert read.segments == result.trajectory.segments
    sampled = [segment for segment in read.segments if segment.kind == "sampled"]
    assert sampled and all(len(segment.top_logprobs) == len(segment.ids) for segment in sampled)
    assert all(len(top) == 2 and top[0][1] >= top[1][1] for segment in sampled for top in segment.top_logprobs)


async def test_a_stop_text_or_id_ends_the_turn(tiny: EmbeddedModel, environment: Environment) -> None:
    greedy = SamplingParams(temperature=0, grammar=False)
    whole = await Agent(tiny, [get_weather], sampling=greedy, thinking="never", limits=Limits(max_turns=1)).run(
        "What is the weather in Oslo?", environment=environment
    )
    ids = [token for segment in whole.trajectory.segments if segment.kind == "sampled" for token in segment.ids]
    for stop in ({"stop_token_ids": {ids[2]}}, {"stop": ("invoke",)}):
        agent = Agent(
            tiny, [get_weather], sampling=greedy.override(**stop), thinking="never", limits=Limits(max_turns=1)
        )
        result = await agent.run("What is the weather in Oslo?", environment=environment)
        assert 0 < result.usage.sampled_tokens < len(ids)
        assert result.limit in (None, "max_turns")
        assert result.trajectory.token_ids[-1] == tiny.tokenizer.eos_id


async def test_calls_are_constrained_by_default_and_the_record_has_the_reason_if_not(
    tiny: EmbeddedModel, environment: Environment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits = Limits(max_tokens=2)
    cases: list[tuple[Any, Any, str | None]] = [
        ([get_weather], "auto", None),
        ([get_weather], True, None),
        ([get_weather], False, "switched off"),
        ([], "auto", "no tools"),
    ]
    for number, (tools, grammar, reason) in enumerate(cases):
        agent = Agent(tiny, tools, sampling=SamplingParams(grammar=grammar), limits=limits)
        header = await header_of(agent, environment, tmp_path / f"{number}.jsonl")
        assert header.grammar_off is None if reason is None else reason in header.grammar_off
        assert header.sampling.grammar == grammar
    tiny.engine.__dict__.pop("grammars", None)
    monkeypatch.setitem(sys.modules, "llguidance", None)
    header = await header_of(Agent(tiny, [get_weather], limits=limits), environment, tmp_path / "missing.jsonl")
    assert "llguidance" in header.grammar_off


async def test_grammar_auto_gives_no_keyword_warnings(tiny: EmbeddedModel, environment: Environment) -> None:
    @tool
    def pick(words: list[str]) -> str:
        """Pick."""
        return words[0]

    pick.parameters["properties"]["words"]["uniqueItems"] = True
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        await Agent(tiny, [pick], limits=Limits(max_tokens=1)).run("Q", environment=environment)
    assert warned == []


async def test_the_record_of_a_script_names_the_missing_grammar(
    script: Script, environment: Environment, tmp_path: Path
) -> None:
    from agentkit import AssistantTurn

    header = await header_of(Agent(script(AssistantTurn(None, "hi"))), environment, tmp_path / "t.jsonl")
    assert header.grammar_off == "the model does not use one"
