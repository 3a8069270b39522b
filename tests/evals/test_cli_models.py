"""`agentkit eval` with several models: one run each in a common folder, one table, and the paired comparison."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch

from agentkit.cli.model import load_model
from agentkit.cli.options import KVCacheDtype
from agentkit.models.embedded import EmbeddedModel
from agentkit.trajectory import Trajectory
from agentkit_evals.record import RunDirectory

from .conftest import TASK, agentkit

pytestmark = pytest.mark.usefixtures("in_a_folder_of_its_own")


@pytest.fixture
def models(untrained: Path, tmp_path: Path) -> list[str]:
    """Three models; the second one's folder has the first one's name, and the third's context is too short to run."""
    places = [tmp_path / "one" / "small", tmp_path / "two" / "small", tmp_path / "three" / "blind"]
    for place in places:
        shutil.copytree(untrained, place)
    config = json.loads((places[2] / "config.json").read_text())
    (places[2] / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 16}))
    return [part for place in places for part in ("-m", str(place))]


def test_models_are_compared_on_the_same_trials(suite: Path, models: list[str], tmp_path: Path) -> None:
    options: tuple[str | Path, ...] = (
        "eval",
        suite,
        *models,
        "--env",
        "unsafe-local",
        "--seed",
        "3",
        "-k",
        "2",
        "--temperature",
        "1",
    )
    shown = agentkit(*options, "--out", "together", "--junit", "results.xml").stdout
    runs = [RunDirectory.open(Path("together", name)) for name in ("small", "small-2", "blind")]
    assert all(run.complete and run.lock.seed == 3 for run in runs)
    assert (
        all(re.search(rf"{name} +4/4 ", shown) for name in ("small", "small-2", "blind")) and "runs  together" in shown
    )
    assert shown.count("B − A: +0.000 ± 0.000") == 2 and "page  together/small-small-2.html" in shown
    assert Path("together/small-blind.html").read_text().startswith("<!doctype html>")
    root = ElementTree.parse("results.xml").getroot()
    assert (root.get("tests"), root.get("failures"), len(root.findall("testsuite"))) == ("12", "0", 3)
    agentkit("view", "together")
    agentkit("view", ".")
    assert "together/small-2/report.html" in Path("index.html").read_text()
    found: dict[str, Any] = json.loads(agentkit(*options, "--json").stdout)
    assert [run["solved"] for run in found["runs"]] == [4, 4, 4]
    assert [each["compared_tasks"] for each in found["comparisons"]] == [2, 2]
    folder = Path(found["folder"])
    assert folder.parent == Path("runs") and {Path(run["run"]).parent for run in found["runs"]} == {folder}


def test_a_model_below_the_threshold_and_unscored_trials_decide_the_exit_code(
    suite: Path, models: list[str], tmp_path: Path
) -> None:
    # only a model that can take a turn writes an answer
    (suite / "second.yaml").write_text(
        TASK.format(id="second").replace('"test -e a.txt"', "'test -n \"$AGENTKIT_ANSWER\"'")
    )
    options: tuple[str | Path, ...] = ("eval", suite, *models[:2], *models[4:], "--env", "unsafe-local")
    agentkit(*options, "--threshold", "0.6", code=1)
    broken = TASK.format(id="second").replace("test -e", "no-such-program")
    (suite / "second.yaml").write_text(broken.partition("solution:")[0])
    assert "1 tasks compared; left out: 1 not scored in A, 1 not scored in B" not in agentkit(*options).stdout
    (suite / "second.yaml").write_text(broken)
    assert "1 tasks compared; left out: 1 not scored in A, 1 not scored in B" in agentkit(*options, code=3).stdout


def test_runs_before_a_model_that_fails_are_reported(suite: Path, models: list[str], tmp_path: Path) -> None:
    (tmp_path / "two" / "small" / "config.json").write_text("{")
    options: tuple[str | Path, ...] = ("eval", suite, *models, "--env", "unsafe-local", "--out", "out")
    result = agentkit(*options, "--junit", "results.xml", code=2)
    assert re.search(r"small +2/2 ", result.stdout) and "runs  out" in result.stdout
    assert "config.json" in result.stderr and result.stderr.startswith("Error: ")
    assert ElementTree.parse("results.xml").getroot().get("tests") == "2"
    found = json.loads(agentkit(*options[:-1], "again", "--json", code=2).stdout)
    assert [run["solved"] for run in found["runs"]] == [2] and found["comparisons"] == []


def test_a_model_given_twice_is_refused(suite: Path, models: list[str]) -> None:
    assert "is given twice" in agentkit("eval", suite, *models[:2], *models[:2], code=2).output
    assert 'no model "none"' in agentkit("eval", suite, "-m", "tiny", "-m", "none", code=2).output


def test_the_junit_file_is_checked_before_the_run(suite: Path, models: list[str]) -> None:
    assert "does not exist" in agentkit("eval", suite, *models[:2], "--junit", "no/results.xml", code=2).output
    assert not Path("runs").exists()


@pytest.mark.parametrize(("option", "found"), [(None, "auto"), (KVCacheDtype.FP8, "fp8")])
def test_the_format_of_sessions_reaches_the_engine(option: KVCacheDtype | None, found: str) -> None:
    model = load_model("tiny", device=None, cache_dir=None, base_url=None, kv_cache_dtype=option)
    assert isinstance(model, EmbeddedModel)
    assert model.engine.kv_cache_dtype == found


def test_a_run_on_two_devices_has_the_tokens_of_one_process(untrained: Path) -> None:
    # the command that scores the run finds the second device's process among the children of agentkit
    worker = (
        "cd /proc; for child in $(cat $PPID/task/*/children); do cat $child/cmdline; done | grep -aq engine[.]worker"
    )
    task = {"id": "say", "instruction": "Say hello.", "agent": {"max_tokens": 24}, "verifier": {"command": worker}}
    Path("say.yaml").write_text(json.dumps(task))
    options = ["run", "say.yaml", "-m", str(untrained), "--env", "unsafe-local", "--temperature", "1", "--seed", "3"]
    agentkit(*options, "--trajectory", "one.jsonl", code=1)
    command = [sys.executable, "-m", "agentkit", *options, "--devices", "2", "--trajectory", "two.jsonl", "--json"]
    ran = subprocess.run(command, stdout=subprocess.PIPE, check=False)
    assert json.loads(ran.stdout)["reward"] == 1.0
    one, two = (Trajectory.load(Path(f"{name}.jsonl")) for name in ("one", "two"))
    assert sum(logprob is not None for logprob in one.logprobs) == 24
    assert (two.token_ids, two.logprobs) == (one.token_ids, one.logprobs)


@pytest.mark.parametrize(
    ("gpus", "options", "message"),
    [
        (0, ["--device", "cuda"], "device='cuda' does not exist: torch .* sees 0 GPUs; use device=\"cpu\", or install"),
        (1, ["--device", "cuda"], "devices=2 needs cuda:0 to cuda:1, but torch sees 1 GPUs; use devices=1"),
        (3, ["--device", "cuda:2"], "devices=2 needs cuda:2 to cuda:3, but torch sees 3 GPUs; use devices=1"),
    ],
)
def test_devices_that_a_machine_lacks_are_refused_with_a_remedy(
    gpus: int, options: list[str], message: str, untrained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    result = agentkit("run", "Hi", "-m", untrained, "--devices", "2", *options, code=2)
    assert re.search(message, " ".join(result.output.split())), result.output


def test_a_model_that_cannot_be_divided_is_refused_with_a_remedy(untrained: Path) -> None:
    shown = agentkit("run", "Hi", "-m", untrained, "--devices", "9", code=2).output
    assert "9 is more than the 8 experts of this model, which the devices divide among themselves; use at most 8" in (
        " ".join(shown.replace("│", " ").split())
    )
