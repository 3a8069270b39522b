"""Measurements of the model card: ablations change only their entries, and baselines solve nothing."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import anyio
import pytest
import torch

from agentkit.models.scripted import Policy, ScriptedModel
from agentkit.task import Task
from agentkit_engine import Engine
from agentkit_engine.chat import Tokenizer
from agentkit_engine.engine import PACKAGED_MODELS
from agentkit_evals.baselines import BASELINES
from agentkit_evals.measure import Attention, leaks, main, summary, without_entries
from agentkit_evals.record import RunDirectory
from agentkit_evals.run import EvalRun
from agentkit_evals.suite import SynthSelection, load_operations, synth_suite

MakeTask = Callable[..., Task]
Evaluate = Callable[..., RunDirectory]


@pytest.mark.parametrize("kind", ["csa", "hca"])
def test_an_ablation_zeroes_only_the_entries_of_its_kind(untrained: Path, kind: Attention) -> None:
    whole, ablated = Engine.load(untrained), without_entries(Engine.load(untrained), kind)
    changed = {
        name
        for (name, before), after in zip(whole.decoder.named_parameters(), ablated.decoder.parameters(), strict=True)
        if not torch.equal(before, after)
    }
    layers = [layer.index for layer in whole.spec.layers if layer.attention == kind]
    assert changed == {f"layers.{index}.attn.compressor.norm.weight" for index in layers} and layers


def test_an_ablation_of_a_missing_attention_kind_is_refused(untrained: Path) -> None:
    engine = Engine.load(untrained)
    engine.spec = replace(engine.spec, layers=engine.spec.layers[:1])
    with pytest.raises(ValueError, match="model untrained has no csa layer"):
        without_entries(engine, "csa")


def test_held_out_tasks_do_not_occur_in_training_and_leaks_are_counted() -> None:
    held_out = synth_suite(SynthSelection(per_operation=1), seed=3)
    assert leaks(held_out, 20) == 0
    trained = synth_suite(SynthSelection(operations=["compute"], per_operation=5, split="train"), seed=0)
    assert leaks(trained, 5) == 5


@pytest.mark.parametrize("name", list(BASELINES))
def test_baselines_solve_nothing_that_needs_a_tool(name: str, tokenizer: Tokenizer, tmp_path: Path) -> None:
    names = [name for name, operation in load_operations().items() if operation.needs_tool]
    suite = synth_suite(SynthSelection(operations=names[::4], per_operation=1), seed=3)
    model = ScriptedModel(BASELINES[name], tokenizer)
    run = anyio.run(EvalRun(suite, model, tmp_path / "run", model_name=name, backend="unsafe-local").execute)
    assert [trial.trial for trial in run.trials if trial.solved or trial.reward is None] == []


def test_summary_reports_held_out_phrasings_separately(
    evaluate: Evaluate, number_task: MakeTask, solves: Policy
) -> None:
    run = evaluate((number_task("a"), solves), (number_task("b"), BASELINES["do nothing"]))
    trials = tuple(trial.model_copy(update={"held_out_phrasing": trial.task == "b"}) for trial in run.trials)
    found = summary(RunDirectory(run.path, run.lock, trials))
    assert found["all"] == {
        "mean": 0.5,
        "stderr": 0.5,
        "n": 2,
        "trained_phrasings": {"mean": 1.0, "stderr": None, "n": 1},
        "held_out_phrasings": {"mean": 0.0, "stderr": None, "n": 1},
    }
    assert found["operations"] == {"numbers": found["all"]}
    assert found["failures"] == {"model": 1, "limit": 0, "task": 0, "infrastructure": 0}
    empty = summary(RunDirectory(run.path, run.lock, ()))
    assert empty["all"] == {"n": 0, "trained_phrasings": {"n": 0}, "held_out_phrasings": {"n": 0}}


@pytest.mark.skipif(not (PACKAGED_MODELS["tiny"] / "config.json").is_file(), reason="the packaged model is not trained")
def test_a_whole_measurement_of_the_tiny_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    where = ("--out", str(tmp_path / "results"), "--runs", str(tmp_path / "runs"), "--env", "unsafe-local")
    which = ["--operations", "small_talk", "far_name", "--per-operation", "1", "--training-worlds", "20"]
    main([*which, "--grammar", "--no-baselines", *where])
    measured = json.loads((tmp_path / "results" / "measure-tiny.json").read_text())
    assert measured["results"]["all"]["n"] == 2 and measured["signatures_seen_in_training"] == 0
    assert measured["with_grammar"]["all"]["n"] == 2
    assert set(measured["ablations"]) == {"csa", "hca"}
    assert set(measured["ablations"]["csa"]["operations"]) == {"far_name"}
    assert len(list((tmp_path / "runs").glob("*/report.html"))) == 4
    assert "held-out phrasings" in capsys.readouterr().out
