"""The packaged model: its folder is complete, its tokenizer fits the tools' texts, and it solves tasks.

No other test depends on what this model answers, except that it makes a call (`test_run_resume.py`).
"""

from __future__ import annotations

import json
from pathlib import Path

import anyio
import pytest
import torch

from agentkit.models.embedded import EmbeddedModel
from agentkit_engine import Engine
from agentkit_engine.chat import Tokenizer
from agentkit_engine.engine import PACKAGED_MODELS
from agentkit_engine.training.tiny import tiny_spec
from agentkit_engine.weights.safetensors_file import read_header
from agentkit_evals.record import RunDirectory
from agentkit_evals.run import EvalRun
from agentkit_evals.suite import Suite, load_suite
from agentkit_evals.synth.tokenizer_texts import phrases

FOLDER = PACKAGED_MODELS["tiny"]
TASKS = {
    "readme": ("weather-paris", "sum-example", "stock-bolt"),
    "everyday": ("count", "setting", "create", "list", "chat", "own_tool"),
    "generated": ("read_setting", "change_setting", "count_files", "create_file", "count_lines", "call_function"),
}
"""Tasks by suite: ids, or kinds of which the first task is taken."""
FLOOR = 0.4
"""Share of `TASKS` that must be solved; the model card has the rates of all tasks."""


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_dir(FOLDER)


def test_the_weights_are_small_and_bfloat16(tokenizer: Tokenizer) -> None:
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) <= 25e6
    engine = Engine.load("tiny", dtype=torch.float32)
    assert 3e6 <= sum(parameter.numel() for parameter in engine.decoder.parameters()) <= 8e6
    stored = read_header(FOLDER / "model.safetensors")
    matrices = [tensor for name, tensor in stored.items() if name.endswith(("wq_b.weight", "w1.weight"))]
    assert matrices
    assert {tensor.dtype for tensor in matrices} == {"BF16"}


def test_the_configuration_is_that_of_the_training_script(tokenizer: Tokenizer) -> None:
    expected = tiny_spec(tokenizer.vocab_size)
    found = type(expected).from_config(json.loads((FOLDER / "config.json").read_text()))
    assert found == expected


def test_every_fixed_phrase_is_one_id(tokenizer: Tokenizer) -> None:
    """A description edited after training would split into ids that the model never saw in this place."""
    broken = [phrase for phrase in phrases() if len(tokenizer.encode_text(phrase)) != 1]
    assert broken == []


@pytest.mark.parametrize("frame", ["{}", " {}", "`{}`", '"{}"', "/{}.txt", "\n{}\n", "={}"])
def test_a_name_has_the_same_ids_in_every_context(tokenizer: Tokenizer, frame: str) -> None:
    ids, name = tokenizer.encode_text(frame.format("budget")), tokenizer.encode_text("budget")
    assert any(ids[start : start + len(name)] == name for start in range(len(ids)))


def test_it_solves_simple_tasks(tmp_path: Path) -> None:
    cases = [
        next(case for case in load_suite(suite).cases if wanted in (case.task.id, case.family))
        for suite, names in TASKS.items()
        for wanted in names
    ]

    async def execute() -> RunDirectory:
        async with EmbeddedModel("tiny") as model:
            run = EvalRun(
                Suite("simple", tuple(cases)), model, tmp_path / "run", model_name="tiny", backend="unsafe-local"
            )
            return await run.execute()

    trials = anyio.run(execute).trials
    assert len(trials) == len(cases)
    solved = [trial.task for trial in trials if trial.solved]
    assert len(solved) >= FLOOR * len(cases), f"only {solved}"
