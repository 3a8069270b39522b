"""Training rows of runs: contents, provenance, and licences that are not accepted."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer.testing

from agentkit.atif import load_atif
from agentkit.cli import app
from agentkit.models.scripted import Policy
from agentkit.task import Task
from agentkit_evals.record import RunDirectory
from agentkit_evals.rows import training_rows

MakeTask = Callable[..., Task]
Evaluate = Callable[..., RunDirectory]


@pytest.fixture
def export(tmp_path: Path) -> Callable[..., Any]:
    """Function that runs `agentkit export` on a run, and returns its result and the rows."""

    def run(done: RunDirectory, *options: str) -> tuple[Any, list[dict[str, Any]]]:
        out = tmp_path / "rows.jsonl"
        result = typer.testing.CliRunner().invoke(app, ["export", str(done.path), "--out", str(out), *options])
        assert not out.with_name("rows.jsonl.partial").exists()
        return result, [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []

    return run


def with_licence(number_task: MakeTask, name: str, licence: str | None) -> Task:
    origin = {"generator": "tests/1", "seed": 4, "package": "calc", "version": "1.0"}
    return number_task(
        name, metadata={"family": "n", "provenance": {**origin, **({"licence": licence} if licence else {})}}
    )


def test_a_row_has_ids_messages_and_its_whole_origin(
    number_task: MakeTask, solves: Policy, evaluate: Evaluate, export: Callable[..., Any]
) -> None:
    done = evaluate((with_licence(number_task, "a", "MIT"), solves))
    result, (row,) = export(done)
    assert result.exit_code == 0 and "1 rows; 0 below the reward" in result.output
    (trial,) = done.trials
    trajectory = done.trajectory(trial)
    assert trajectory is not None
    assert row["ids"] == trajectory.token_ids and row["loss_mask"] == trajectory.loss_mask and any(row["loss_mask"])
    assert row["logprobs"] == trajectory.logprobs and [each is not None for each in row["logprobs"]] == [
        bool(kept) for kept in row["loss_mask"]
    ]
    assert [message["role"] for message in row["messages"]][:2] == ["system", "user"]
    assert {tool["function"]["name"] for tool in row["tools"]} >= {"read_file", "submit"}
    assert (row["task"], row["reward"]) == ("a", 1.0)
    origin = row["provenance"]
    assert (origin["generator"], origin["seed"], origin["package"], origin["licence"]) == ("tests/1", 4, "calc", "MIT")
    assert origin["model"] == trajectory.header.model and origin["sampling"]["temperature"] >= 0


def test_rows_without_an_accepted_licence_are_refused_or_dropped(
    number_task: MakeTask, solves: Policy, evaluate: Evaluate, export: Callable[..., Any]
) -> None:
    tasks = [
        with_licence(number_task, "free", "MIT"),
        with_licence(number_task, "copyleft", "GPL-3.0-only"),
        with_licence(number_task, "unknown", None),
        number_task("none"),
    ]
    done = evaluate(*((task, solves) for task in tasks))
    result, rows = export(done)
    said = " ".join(result.output.split())
    assert result.exit_code == 2 and rows == []
    assert "3 rows have no accepted licence" in said and "2 with none" in said
    assert "1 with GPL-3.0-only (such as copyleft.0)" in said and "--unlisted drop" in said
    result, rows = export(done, "--unlisted", "drop")
    assert [row["task"] for row in rows] == ["free"] and result.exit_code == 0
    assert "left out: 1 rows with licence GPL-3.0-only" in result.output
    assert "left out: 2 rows with licence unknown" in result.output
    _, rows = export(done, "--unlisted", "drop", "--licences", "GPL-3.0-only, X")
    assert [row["task"] for row in rows] == ["copyleft"]
    _, rows = export(done, "--unlisted", "keep")
    assert sorted(row["task"] for row in rows) == ["copyleft", "free", "none", "unknown"]


def test_rewards_below_the_bound_stay_out_whatever_their_licence(
    number_task: MakeTask, script: Callable[..., Policy], evaluate: Evaluate, export: Callable[..., Any]
) -> None:
    done = evaluate((number_task("wrong"), script("41")))
    result, rows = export(done)
    assert (result.exit_code, rows, result.stdout) == (1, [], "")
    assert "rows.jsonl is not written: 1 of 1 trials are finished; left out: 1 below the reward 1" in result.stderr
    assert [row.reward for row in training_rows(done)] == [0.0]


def test_an_export_of_nothing_fails_and_leaves_the_file(
    number_task: MakeTask, solves: Policy, evaluate: Evaluate, export: Callable[..., Any], tmp_path: Path
) -> None:
    done = evaluate((with_licence(number_task, "a", "GPL-3.0-only"), solves), (number_task("b"), solves))
    out = tmp_path / "rows.jsonl"
    out.write_text("{}\n")
    result, rows = export(done, "--unlisted", "drop")
    assert (result.exit_code, rows) == (1, [{}])
    assert "left out: 1 rows with licence GPL-3.0-only, 1 rows with licence unknown" in result.stderr
    for file in (done.path / "trajectories").iterdir():
        file.unlink()
    result, rows = export(done, "--unlisted", "keep")
    assert (result.exit_code, rows) == (1, [{}])
    assert "2 of 2 trials are finished; left out: 2 without a trajectory" in result.stderr
    atif = ["export", str(done.path), "--out", str(tmp_path / "atif"), "--atif"]
    result = typer.testing.CliRunner().invoke(app, atif)
    assert (result.exit_code, result.stdout) == (1, "") and not (tmp_path / "atif").exists()
    assert "2 of 2 trials are finished; none has a trajectory" in result.stderr
    (done.path / "trials.jsonl").write_text("")
    result, rows = export(done)
    assert result.exit_code == 1 and "is not written: 0 of 2 trials are finished\n" in result.stderr


def test_a_malformed_provenance_and_wrong_usage(
    number_task: MakeTask, solves: Policy, evaluate: Evaluate, export: Callable[..., Any], tmp_path: Path
) -> None:
    done = evaluate((number_task("a", metadata={"provenance": {"seed": "x"}}), solves))
    result, _ = export(done)
    assert result.exit_code == 2 and "a.0: metadata.provenance" in " ".join(result.output.split())
    assert export(done, "--licences", " , ")[0].exit_code == 2
    result = typer.testing.CliRunner().invoke(
        app, ["export", str(tmp_path / "no"), "--out", str(tmp_path / "rows.jsonl")]
    )
    assert result.exit_code == 2 and "is not a run" in " ".join(result.output.split())
    result = typer.testing.CliRunner().invoke(
        app, ["export", str(done.path), "--out", str(tmp_path / "x" / "rows.jsonl")]
    )
    assert result.exit_code == 2 and "does not exist" in " ".join(result.output.replace("│", " ").split())


def test_openai_rows_have_only_messages_and_tools(
    number_task: MakeTask, solves: Policy, evaluate: Evaluate, export: Callable[..., Any]
) -> None:
    done = evaluate((with_licence(number_task, "a", "MIT"), solves), (number_task("b"), solves))
    result, rows = export(done, "--openai")
    assert (result.exit_code, rows) == (2, []), "rows for training need a licence in this form, too"
    result, (row,) = export(done, "--openai", "--unlisted", "drop")
    assert result.exit_code == 0 and {*row} == {"messages", "tools"}
    assert row["messages"][-2]["tool_calls"][0]["function"]["name"] == "submit"


def test_atif_files_of_runs_and_trajectories(
    number_task: MakeTask, solves: Policy, script: Callable[..., Policy], evaluate: Evaluate, tmp_path: Path
) -> None:
    def run(*sources: Path, out: Path) -> Any:
        return typer.testing.CliRunner().invoke(app, ["export", *map(str, sources), "--out", str(out), "--atif"])

    done = evaluate((number_task("a"), solves), (number_task("wrong"), script("41")))
    result = run(done.path, out=tmp_path / "atif")
    assert result.exit_code == 0 and "2 trajectories" in result.output
    made = {file.name: json.loads(file.read_bytes()) for file in (tmp_path / "atif").iterdir()}
    assert {*made} == {"a.0.json", "wrong.0.json"}, "trials below the reward are written, too"
    document = made["a.0.json"]
    assert document["schema_version"] == "ATIF-v1.8" and document["extra"]["answer"] == "42"
    assert [message.content for message in load_atif(tmp_path / "atif" / "wrong.0.json")][-1] == "41"

    file = done.path / "trajectories" / "a.0.jsonl"
    assert run(file, out=tmp_path / "one").exit_code == 0
    assert json.loads((tmp_path / "one" / "a.0.json").read_bytes()) == document
    assert run(done.path, file, out=tmp_path / "both").exit_code == 0
    assert {each.name for each in (tmp_path / "both").iterdir()} == {"1-a.0.json", "1-wrong.0.json", "2-a.0.json"}

    result = run(done.path, out=tmp_path / "atif")
    assert result.exit_code == 2 and "give a new folder" in " ".join(result.output.split())
    file.write_bytes(b"junk")
    assert run(done.path, out=tmp_path / "new").exit_code == 2
    assert not {*tmp_path.glob("new*")}, "nothing is left of an export that failed"
    arguments = ["export", str(done.path), "--out", str(tmp_path / "new"), "--atif", "--openai"]
    assert typer.testing.CliRunner().invoke(app, arguments).exit_code == 2
