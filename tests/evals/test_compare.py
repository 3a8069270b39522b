"""Two runs are compared on the tasks that both have, and never on others."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import typer.testing

from agentkit.cli import app
from agentkit.model import Usage
from agentkit.task import EnvironmentConfig, Task
from agentkit_engine.sampling_params import SamplingParams
from agentkit_evals.compare import compare, task_hash
from agentkit_evals.errors import ComparisonError
from agentkit_evals.record import RunDirectory, RunLock, TrialRecord
from agentkit_evals.report import render_comparison

HOSTILE = "\x1b[31m</script><img src=x onerror=alert(1)>\u202e"

Rewards = Mapping[str, Sequence[float | None]]


def task(name: str, instruction: str = "Do it.") -> Task:
    return Task.model_validate({"id": name, "instruction": instruction, "verifier": {"command": "true"}})


def make_run(
    folder: Path,
    rewards: Rewards,
    *,
    model: str = "m",
    cost_usd: float | None = None,
    instruction: str = "Do it.",
    planned: Sequence[str] = (),
    **lock: Any,
) -> RunDirectory:
    """Write a run: each task's scored epochs; None is an infrastructure failure. `planned` tasks did not run."""
    epochs = max((len(each) for each in rewards.values()), default=1)
    names = [*rewards, *planned]
    folder.mkdir(parents=True)
    settings: dict[str, Any] = {"backend": "auto", "concurrency": 1, "seed": 0, "sampling": SamplingParams(), **lock}
    run_lock = RunLock(
        name="suite",
        model=model,
        epochs=epochs,
        tasks=[task(name, instruction) for name in names],
        families={name: name.split("-")[0] for name in names},
        **settings,
    )
    (folder / "run.json").write_text(run_lock.model_dump_json())
    with (folder / "trials.jsonl").open("w") as file:
        for name, each in rewards.items():
            for epoch, reward in enumerate(each):
                record = TrialRecord(
                    trial=f"{name}.{epoch}",
                    task=name,
                    epoch=epoch,
                    family=run_lock.families[name],
                    phrasing="",
                    held_out_phrasing=False,
                    status="answered",
                    failure="infrastructure" if reward is None else None if reward == 1 else "model",
                    reward=reward,
                    answer="x",
                    error="lost" if reward is None else None,
                    verifier_output="",
                    backend="process",
                    usage=Usage(sampled_tokens=10 * (epoch + 1), prompt_tokens=100, turns=2, cost_usd=cost_usd),
                    started="2026-01-01T00:00:00.000+00:00",
                    setup_s=0.5,
                    agent_s=2.0,
                    verify_s=0.25,
                )
                file.write(record.model_dump_json() + "\n")
    return RunDirectory.open(folder)


def agentkit(*arguments: str | Path, code: int = 0) -> str:
    result = typer.testing.CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)
    assert result.exit_code == code, result.output
    return result.output


@pytest.fixture
def runs(tmp_path: Path) -> tuple[RunDirectory, RunDirectory]:
    """Ten tasks: B solves four that A does not, A one that B does not; more tasks are not comparable."""
    a: Rewards = {
        **{f"x-{i}": [float(i < 3)] for i in range(8)},
        "y-0": [1.0],
        "y-1": [0.0],
        "y-2": [None],
        "only-a": [1.0],
    }
    b: Rewards = {
        **{f"x-{i}": [float(1 <= i < 7)] for i in range(8)},
        "y-0": [1.0],
        "y-1": [0.0],
        "y-2": [1.0],
        "only-b": [1.0],
        "y-3": [None],
    }
    return (
        make_run(tmp_path / "a", a, model="A", planned=["y-3"], cost_usd=0.25),
        make_run(tmp_path / "b", b, model="B"),
    )


def test_tasks_are_paired_and_the_others_counted(runs: tuple[RunDirectory, RunDirectory]) -> None:
    found = compare(*runs)
    total = found.total
    assert (total.first.mean, total.second.mean, total.difference.tasks) == (0.4, 0.7, 10)
    assert total.difference.value == pytest.approx(0.3)
    # the differences are four times 1, once -1 and five times 0: their sum of squares is 5 - 10 * 0.09
    assert total.difference.stderr == pytest.approx((4.1 / 9 / 10) ** 0.5)
    assert total.difference.p_value == pytest.approx(0.375)  # 2 * (1 + 5) / 32
    assert [row.family for row in found.families] == ["x", "y"]
    assert [row.difference.tasks for row in found.families] == [8, 2]
    assert [flip.task for flip in found.first_better] == ["x-0"]
    assert [flip.task for flip in found.second_better] == ["x-3", "x-4", "x-5", "x-6"]
    left = found.left
    assert (left.only_first, left.only_second, left.unscored_first, left.unscored_second) == (1, 1, 2, 1)
    assert (total.first.cost_usd, total.second.cost_usd) == (0.25, None)
    assert (total.first.tokens, total.first.prompt_tokens, total.first.seconds) == (10, 100, 2)
    reverse = compare(*reversed(runs))
    assert reverse.total.difference.value == -total.difference.value
    assert reverse.first_better == tuple(
        type(flip)(flip.task, flip.family, flip.second, flip.first) for flip in found.second_better
    )


def test_epochs_of_a_task_are_one_observation(tmp_path: Path) -> None:
    one = make_run(tmp_path / "a", {"x-0": [0.0, 0.0], "x-1": [1.0, 0.0], "x-2": [1.0, None]})
    other = make_run(tmp_path / "b", {"x-0": [1.0, 0.0], "x-1": [0.0, 1.0], "x-2": [1.0, 1.0]})
    found = compare(one, other)
    assert found.total.first.mean == pytest.approx(0.5) and found.total.second.mean == pytest.approx(2 / 3)
    assert found.total.difference.value == pytest.approx(1 / 6) and found.total.difference.p_value is None
    assert [(flip.task, flip.first, flip.second) for flip in found.second_better] == [("x-0", (0, 2), (1, 2))]
    assert not found.first_better


def test_partial_rewards_have_no_mcnemar_test(tmp_path: Path) -> None:
    found = compare(
        make_run(tmp_path / "a", {"x": [0.5], "y": [0.0]}), make_run(tmp_path / "b", {"x": [1.0], "y": [0.0]})
    )
    assert (found.total.difference.value, found.total.difference.p_value) == (0.25, None)


def test_snapshots_make_no_other_task() -> None:
    saved = task("x").model_copy(update={"environment": EnvironmentConfig(snapshots=True)})
    assert task_hash(saved) == task_hash(task("x")) != task_hash(task("x", "Do something else."))


def test_what_cannot_be_compared_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = make_run(tmp_path / "base", {"x-0": [1.0], "x-1": [0.0]})
    for other, expected in (
        (make_run(tmp_path / "other", {"z": [1.0]}), "no task in common"),
        (
            make_run(tmp_path / "changed", {"x-0": [1.0], "x-1": [0.0]}, instruction="Do something else."),
            r"2 of 2 tasks have the same id in both runs but different content \(x-0, x-1\)",
        ),
        (make_run(tmp_path / "lost", {"x-0": [None], "x-1": [None]}), "no task has a scored trial in both"),
    ):
        with pytest.raises(ComparisonError, match=expected):
            compare(base, other)
        shown = " ".join(agentkit("compare", base.path, other.path, code=2).split())
        assert re.search(expected, shown) and "Traceback" not in shown
    assert "is not a run" in agentkit("compare", base.path, tmp_path, code=2)
    monkeypatch.chdir(tmp_path)
    assert "does not exist" in agentkit("compare", "base", "base", "--html", "no/x.html", code=2)
    assert "is a folder" in agentkit("compare", "base", "base", "--html", ".", code=2)


def test_the_command_prints_a_table_json_and_a_page(
    runs: tuple[RunDirectory, RunDirectory], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    page = tmp_path / "page.html"
    shown = agentkit("compare", tmp_path / "a", tmp_path / "b", "--html", page)
    assert "10 tasks compared; left out: 1 only in A, 1 only in B, 2 not scored in A, 1 not scored in B" in shown
    assert "B − A: +0.300 ± 0.213, 95 % interval" in shown and "McNemar's exact test p = 0.375" in shown
    assert "solved more often by B (4)\n    x-3  A 0/1, B 1/1" in shown and "$0.2500" in shown
    assert "(incomplete: 12 trials)" in shown
    found = json.loads(agentkit("compare", tmp_path / "a", tmp_path / "b", "--json"))
    assert found["compared_tasks"] == 10 and found["total"]["difference"]["value"] == pytest.approx(0.3)
    assert found["total"]["a"]["cost_usd"] == 0.25 and found["total"]["b"]["cost_usd"] is None
    assert set(found["families"]) == {"x", "y"} and len(found["b_better"]) == 4
    html = page.read_text()
    assert html.startswith("<!doctype html>") and "x-6" in html and "+0.300" in html
    assert "p = 0.375" in html


def test_no_number_is_cut_on_a_narrow_terminal(
    runs: tuple[RunDirectory, RunDirectory], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    shown = agentkit("compare", tmp_path / "a", tmp_path / "b")
    total = next(line for line in shown.splitlines() if line.startswith("all"))
    assert total.split()[1:7] == ["10", "0.400", "0.700", "+0.300", "±", "0.213"] and "$0.2500" in total
    assert "…" not in shown


def test_hostile_names_are_only_text(tmp_path: Path) -> None:
    one = make_run(tmp_path / "a", {"x": [1.0]}, model=HOSTILE, agentkit=HOSTILE)
    other = make_run(tmp_path / "b", {"x": [0.0]}, model=":smile: [red]B[/]")
    html = render_comparison(compare(one, other))
    assert "<img" not in html and "default-src &#39;none&#39;" in html and "sha256-" in html
    shown = agentkit("compare", one.path, other.path)
    assert "\x1b[31m" not in shown and "\u202e" not in shown and ":smile: [red]B[/]" in shown


def test_differing_settings_are_named(tmp_path: Path) -> None:
    one = make_run(tmp_path / "a", {"x": [1.0]}, seed=1)
    other = make_run(tmp_path / "b", {"x": [0.0]}, seed=2, sampling=SamplingParams(temperature=0.5))
    assert [name for name, *_ in compare(one, other).settings] == ["seed", "temperature"]
    assert "seed differs: 1 and 2" in agentkit("compare", one.path, other.path)
    assert not compare(one, one).settings
