"""`agentkit convert`: every format from every other, the printed errors, and refusals."""

from __future__ import annotations

import resource
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from agentkit.cli.commands import app
from agentkit.cli.ending import ExitCode
from agentkit_engine import Engine
from agentkit_engine.engine import PACKAGED_MODELS
from agentkit_engine.weights.convert import convert_checkpoint
from agentkit_engine.weights.export import Format

IDS = list(range(1, 60))


def run(*arguments: str | Path) -> str:
    result = CliRunner().invoke(app, ["convert", *map(str, arguments)])
    assert result.exit_code == 0, result.output
    return result.output


def test_a_model_is_converted_between_all_formats(tmp_path: Path) -> None:
    tiny = Engine.load("tiny")
    output = run(tiny.folder, tmp_path / "int8", "--to", "int8")
    lines = {line.split()[0]: line.split() for line in output.splitlines() if line.startswith(("layers", "norm"))}
    assert lines["norm"][1] == "bf16" and float(lines["norm"][3]) == 0
    assert lines["layers.ffn.experts.w1"][1] == "int8" and 0 < float(lines["layers.ffn.experts.w1"][3]) < 0.02
    assert "bytes of weights" in output
    official, back = tmp_path / "official", tmp_path / "bf16"
    run(tmp_path / "int8", official, "--to", "fp8+fp4")
    run(official, back, "--to", "bf16")
    exact, found = Engine.load(official), Engine.load(back)
    assert torch.equal(exact.logits(IDS), found.logits(IDS))  # bfloat16 holds every FP8 and FP4 value
    assert found.tokenizer.encode("hello") == tiny.tokenizer.encode("hello")
    assert Engine.load(tmp_path / "int8").dialect == tiny.dialect


def test_a_format_that_is_already_there_is_copied(tmp_path: Path) -> None:
    tiny = Engine.load("tiny").folder
    formats: tuple[Format, ...] = ("int8", "official")
    for number, format in enumerate(formats):
        once, twice = tmp_path / f"{number}-once", tmp_path / f"{number}-twice"
        assert any(kind.relative > 0 for kind in convert_checkpoint(tiny, once, format=format))
        assert all(kind.relative == kind.largest == 0 for kind in convert_checkpoint(once, twice, format=format))
        assert (once / "model.safetensors").read_bytes() == (twice / "model.safetensors").read_bytes()


@pytest.mark.parametrize(("source", "problem"), [("none", "there is no folder"), ("empty", "missing")])
def test_a_folder_without_a_model_is_refused(tmp_path: Path, source: str, problem: str) -> None:
    (tmp_path / "empty").mkdir()
    result = CliRunner().invoke(app, ["convert", str(tmp_path / source), str(tmp_path / "out"), "--to", "bf16"])
    assert result.exit_code != 0 and problem in " ".join(result.output.split())


def test_a_full_disk_is_an_error_of_the_disk(tmp_path: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, limits[1]))
    try:
        result = CliRunner().invoke(
            app, ["convert", str(PACKAGED_MODELS["tiny"]), str(tmp_path / "out"), "--to", "int8"]
        )
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert result.exit_code == ExitCode.INFRASTRUCTURE
    assert result.output == f"Error: {tmp_path}/out/part-0.safetensors: File too large\n"


def test_weights_are_not_overwritten(tmp_path: Path) -> None:
    tiny = Engine.load("tiny").folder
    result = CliRunner().invoke(app, ["convert", str(tiny), str(tiny), "--to", "bf16"])
    assert result.exit_code != 0 and "exists" in result.output
