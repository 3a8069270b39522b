"""The packaged model's folder is complete, and its tokenizer still fits the tools' texts."""

from __future__ import annotations

import json

import pytest
import torch

from agentkit_engine import Engine
from agentkit_engine.chat import Tokenizer
from agentkit_engine.engine import PACKAGED_MODELS
from agentkit_engine.training.tiny import tiny_spec
from agentkit_engine.weights.safetensors_file import read_header
from agentkit_evals.synth.generate import phrases

FOLDER = PACKAGED_MODELS["tiny"]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_dir(FOLDER)


def test_the_weights_are_small_and_bfloat16(tokenizer: Tokenizer) -> None:
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) <= 20e6
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
    ids, name = tokenizer.encode_text(frame.format("kalo")), tokenizer.encode_text("kalo")
    assert any(ids[start : start + len(name)] == name for start in range(len(ids)))
