"""`agentkit eval --resume`: an interrupted run goes on with its own tasks, model and settings; others are refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

import agentkit_evals.run
import agentkit_evals.verify
from agentkit_environments import EnvironmentPool
from agentkit_evals.record import RunDirectory

from .conftest import TASK, agentkit

pytestmark = pytest.mark.usefixtures("in_a_folder_of_its_own")


def cut(run: Path) -> None:
    """Make a finished run one that was killed while it wrote the record of its last trial."""
    file = run / "trials.jsonl"
    file.write_bytes(file.read_bytes()[:-30])
    (run / "report.html").unlink()


def ids(run: RunDirectory) -> dict[str, list[int]]:
    return {trial.trial: found.token_ids for trial in run.trials if (found := run.trajectory(trial)) is not None}


def test_a_killed_run_is_resumed_with_its_own_settings(
    suite: Path, untrained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ("-m", untrained, "-k", "2", "-n", "1", "--seed", "5", "--env", "unsafe-local", "--temperature", "0.7")
    more = ("--warm", "2", "--compact-at", "5000")
    agentkit("eval", suite, *options, "--threads", "1", "--cache-dir", "cache", "--out", "run", *more)
    before = RunDirectory.open("run")
    options_of_model = {"model": str(untrained), "threads": 1, "cache_dir": str(tmp_path / "cache")}
    assert before.lock.model_options == options_of_model and before.lock.fingerprint is not None
    assert [task.agent.compact_at_tokens for task in before.lock.tasks] == [5000, 5000] and before.lock.warm == 2
    cut(tmp_path / "run")
    shutil.rmtree(suite)  # the run has its tasks
    result = agentkit("eval", "--resume", "run", "--json", "--junit", "results.xml", "--max-connections", "3", code=2)
    assert "name a model behind the API" in " ".join(result.output.split())
    pools: list[int] = []

    def pool(size: int, **options: Any) -> EnvironmentPool:
        pools.append(size)
        return EnvironmentPool(size, **options)

    monkeypatch.setattr(agentkit_evals.run, "EnvironmentPool", pool)
    result = agentkit("eval", "--resume", "run", "--json", "--junit", "results.xml", "-n", "2")
    assert pools == [2]
    found = json.loads(result.stdout)
    assert (found["trials"], found["mean"], found["seed"]) == (4, 1.0, 5)
    assert "resuming run: 3 of 4 trials are finished, 1 interrupted" in result.stderr
    after = RunDirectory.open("run")
    assert ids(after) == ids(before) and after.complete and Path("results.xml").exists()
    assert after.lock.model_options == options_of_model and after.lock.concurrency == 2
    assert "attempts repeated" in Path("run/report.html").read_text()


def test_a_finished_run_is_reported_without_its_model_and_without_a_sandbox(
    suite: Path, untrained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tmp_path / "model"
    shutil.copytree(untrained, model)
    options = ("-m", model, "--seed", "5", "--env", "unsafe-local", "--out", "run")
    before = json.loads(agentkit("eval", suite, *options, "--json").stdout)
    report, written = Path("run/report.html"), Path("run/run.json").read_bytes()
    kept = report.read_bytes()
    report.write_text('<p class="brand">agentkit</p> of the run when it was interrupted')
    leftover = Path("run/trajectories/first.0.jsonl.01234567-3.snapshot")
    leftover.touch()
    for weights in model.glob("*.safetensors"):
        weights.unlink()
    monkeypatch.setattr(agentkit_evals.verify, "open_environment", None)
    shown = agentkit("eval", "--resume", "run", "--json", "--junit", "results.xml", "-n", "3", "-m", model)
    assert shown.stderr == "run is finished: all 2 trials have a record\n"
    assert json.loads(shown.stdout) == before and Path("results.xml").exists()
    assert report.read_bytes() == kept and Path("run/run.json").read_bytes() == written and not leftover.exists()
    shown = agentkit("eval", suite, *options[:-2], "--resume", "run")
    assert "report  run/report.html" in shown.stdout
    assert agentkit("eval", "--resume", "run", "--threshold", "1").exit_code == 0
    for more, message in ((("-k", "3"), "epochs 1, given 3"), (("-m", untrained), "given 'untrained'")):
        assert message in agentkit("eval", "--resume", "run", *more, code=2).stderr


def test_other_settings_are_refused(suite: Path, untrained: Path, tmp_path: Path) -> None:
    agentkit("eval", suite, "-m", untrained, "--seed", "5", "--env", "unsafe-local", "--out", "run")
    cut(tmp_path / "run")
    kept = RunDirectory.open("run")
    other = tmp_path / "other"
    shutil.copytree(untrained, other)
    cases: list[tuple[tuple[str | Path, ...], str]] = [
        (("-k", "3"), "run was started with epochs 1, given 3; a resumed run keeps its settings"),
        (("--seed", "6"), "run was started with seed 5, given 6"),
        (("--temperature", "0.5"), "run was started with temperature 1.0, given 0.5"),
        (("--env", "process"), "run was started with backend 'unsafe-local', given 'process'"),
        (("-m", other), "run was started with model 'untrained', given 'other'"),
        (("--kv-cache-dtype", "fp8"), "with other options that change its results"),
        (("--out", "there"), "a resumed run stays in run"),
        (("--limit", "1"), "the run has its tasks"),
        (("--snapshots",), "the run has its tasks"),
        (("--compact-at", "100"), "the run has its tasks"),
        ((suite, "--compact-at", "100"), "run was started with other tasks"),
        ((suite, "--snapshots"), "run was started with other tasks"),
        (("-m", untrained, "-m", other), "a run has one model"),
    ]
    for more, message in cases:
        result = agentkit("eval", "--resume", "run", *more, code=2)
        assert message in " ".join(result.output.replace("│", " ").split()), more
    (suite / "second.yaml").write_text(TASK.format(id="second").replace("something", "nothing"))
    shown = agentkit("eval", suite, "--resume", "run", code=2).stderr
    assert "run was started with other tasks: task second differs" in shown
    assert RunDirectory.open("run") == kept
    (suite / "second.yaml").write_text(TASK.format(id="second"))
    same: tuple[Any, ...] = (suite, "-m", untrained, "--seed", "5", "--env", "unsafe-local", "-k", "1")
    agentkit("eval", *same, "--resume", "run")
    assert RunDirectory.open("run").complete


def test_mistakes(suite: Path, untrained: Path) -> None:
    assert "1048576" in agentkit("eval", suite, "-k", "2000000", code=2).output
    assert "give a suite, or a run with --resume" in agentkit("eval", code=2).output
    assert "suite is not a run: it has no run.json" in agentkit("eval", "--resume", suite, code=2).output
    assert "does not exist" in agentkit("eval", "--resume", "none", code=2).output


def test_a_run_of_the_demo_can_be_resumed(untrained: Path, tmp_path: Path) -> None:
    model = tmp_path / "blind"
    shutil.copytree(untrained, model)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 16}))  # trials end at once
    options = ("--tasks", "4", "-n", "1", "--env", "unsafe-local", "--out", "run", "--json")
    agentkit("demo", "-m", model, *options)
    before = RunDirectory.open("run")
    assert len(before.trials) == 4
    cut(tmp_path / "run")
    assert "starts again, attempt 2" in agentkit("eval", "--resume", "run").stdout
    after = RunDirectory.open("run")
    times = {"usage", "started", "setup_s", "agent_s", "verify_s", "attempt"}
    for was, now in zip(before.trials, after.trials, strict=True):
        assert was.model_dump(exclude=times) == now.model_dump(exclude=times)
