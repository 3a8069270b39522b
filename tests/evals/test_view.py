"""`agentkit view` of a run, a folder of runs, a report and one trajectory, and the contents of the pages."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlparse

import pytest
import typer.testing

from agentkit.cli import app
from agentkit.models.scripted import Policy
from agentkit.task import Task
from agentkit_evals.record import RunDirectory

MakeTask = Callable[..., Task]
Evaluate = Callable[..., RunDirectory]


def view(*arguments: str | Path, code: int = 0) -> Path:
    result = typer.testing.CliRunner().invoke(app, ["view", *map(str, arguments)], catch_exceptions=False)
    assert result.exit_code == code, result.output
    return Path(unquote(urlparse(result.stdout.strip().splitlines()[-1]).path))


def data_of(page: Path) -> dict[str, Any]:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page.read_text(), re.S)
    assert found is not None
    data: dict[str, Any] = json.loads(found[1])
    return data


@pytest.fixture
def run(evaluate: Evaluate, number_task: MakeTask, solves: Policy, tmp_path: Path) -> RunDirectory:
    return evaluate((number_task("one"), solves), (number_task("two"), solves), directory=tmp_path / "runs" / "a run")


def test_a_run_lists_instruction_answer_and_expected(run: RunDirectory) -> None:
    for place in (run.path, run.path / "run.json"):
        page = view(place)
        assert page == run.path / "report.html"
    trial = data_of(page)["trials"][0]
    assert (trial["instruction"], trial["answer"], trial["expected"]) == ("Submit the number in n.txt.", "42", "42")
    assert view(page) == page
    text = page.read_text()
    for needed in ('id="trials"', 'id="download"', "aria-sort", 'class="scroll"'):
        assert needed in text


def test_a_page_can_run_only_its_own_script(run: RunDirectory) -> None:
    text = view(run.path).read_text()
    policy = re.search(r'http-equiv="Content-Security-Policy" content="([^"]+)"', text)
    assert policy is not None and "default-src &#39;none&#39;" in policy[1]
    script = re.findall(r"<script>(.*?)</script>", text, re.S)[-1]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"sha256-{digest}" in policy[1].replace("&#43;", "+")


def test_a_folder_of_runs_has_an_index(
    run: RunDirectory, evaluate: Evaluate, number_task: MakeTask, solves: Policy, tmp_path: Path
) -> None:
    evaluate((number_task("three"), solves), directory=tmp_path / "runs" / "b")
    (tmp_path / "runs" / "broken").mkdir()
    (tmp_path / "runs" / "broken" / "run.json").write_text("{")
    page = view(tmp_path / "runs")
    assert page == tmp_path / "runs" / "index.html" and "broken" in page.read_text()
    rows = {row["run"]: row for row in data_of(page)["runs"]}
    assert set(rows) == {"a run", "b"}
    assert (rows["a run"]["suite"], rows["a run"]["score"], rows["a run"]["trials"]) == ("tests", "1.000 ± 0.000", 2)
    assert rows["a run"]["tokens"] == sum(trial.usage.sampled_tokens for trial in run.trials)
    assert (page.parent / unquote(rows["a run"]["report"])).is_file()


def test_one_trajectory_is_a_page(run: RunDirectory) -> None:
    page = view(run.path / "trajectories" / "one.0.jsonl")
    trial = data_of(page)["trials"][0]
    assert (trial["answer"], trial["status"], len(trial["turns"])) == ("42", "submitted", 2)


def test_a_foreign_page_is_not_overwritten(run: RunDirectory) -> None:
    theirs = run.path / "trajectories" / "one.0.html"
    theirs.write_text("mine")
    page = view(run.path / "trajectories" / "one.0.jsonl")
    assert page != theirs and theirs.read_text() == "mine"


@pytest.mark.parametrize("content", ["", "{", '{"format": "other"}\n', "\0\xff"])
def test_an_invalid_path_is_one_error_message(content: str, tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text(content)
    result = typer.testing.CliRunner().invoke(app, ["view", str(tmp_path / "x.jsonl")], catch_exceptions=False)
    assert result.exit_code == 2 and "is not a trajectory" in result.output
    assert typer.testing.CliRunner().invoke(app, ["view", str(tmp_path)], catch_exceptions=False).exit_code == 2
