"""Rows of BFCL become tasks that are scored by calls."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer.testing

from agentkit.cli import app
from agentkit.errors import TaskFileError
from agentkit.models.scripted import Policy
from agentkit.task import CallsConfig, ToolConfig
from agentkit_evals.errors import SuiteError
from agentkit_evals.record import RunDirectory
from agentkit_evals.suite import load_suite

MakeScript = Callable[..., Policy]
Evaluate = Callable[..., RunDirectory]

FUNCTION = {
    "name": "geo.distance",
    "description": "Distance of two points.",
    "parameters": {
        "type": "dict",
        "properties": {
            "start": {"type": "tuple", "items": {"type": "float"}, "description": "x and y"},
            "unit": {"type": "string", "enum": ["km", "mi"], "optional": True},
            "options": {"type": "dict", "properties": {"exact": {"type": "any"}}},
        },
        "required": ["start"],
    },
}
TRUTH = [{"geo.distance": {"start": [[1.0, 2.5]], "unit": ["", "km"], "options": [""]}}]


def row(name: str = "simple_python_0", **changes: Any) -> dict[str, Any]:
    return {"id": name, "question": [[{"role": "user", "content": "How far?"}]], "function": [FUNCTION], **changes}


def write(path: Path, *rows: Any) -> str:
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join((each if isinstance(each, str) else json.dumps(each)) + "\n" for each in rows))
    return str(path)


def test_a_row_with_its_ground_truth_is_a_task(tmp_path: Path) -> None:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"},
                {"role": "assistant", "content": "Hello"}, {"role": "user", "content": "How far?"}]  # fmt: skip
    file = write(
        tmp_path / "rows.jsonl",
        row(ground_truth=TRUTH),
        "",
        row("live_simple_7-3-0", ground_truth=TRUTH, question=[messages]),
    )
    suite = load_suite(file)
    first, second = (case.task for case in suite.cases)
    assert [case.family for case in suite.cases] == ["simple_python", "live_simple"] and suite.name == "rows"
    assert (first.system, first.instruction) == ("", "How far?")
    assert (second.system, second.instruction) == ("Be brief.", "Hi\n\n[You answered: Hello]\n\nHow far?")
    (tool,) = first.tools
    assert isinstance(tool, ToolConfig) and tool.name == "geo_distance" and tool.command is None
    assert tool.parameters == {
        "type": "object",
        "properties": {
            "start": {"type": "array", "items": {"type": "number"}, "description": "x and y"},
            "unit": {"type": "string", "enum": ["km", "mi"]},
            "options": {"type": "object", "properties": {"exact": {}}},
        },
        "required": ["start"],
    }
    assert isinstance(first.verifier, CallsConfig)
    assert first.verifier.calls == [{"geo_distance": TRUTH[0]["geo.distance"]}]


def test_the_ground_truth_may_be_in_the_folder_possible_answer(tmp_path: Path) -> None:
    file = write(tmp_path / "BFCL_v4_parallel.json", row("parallel_0"), row("parallel_1"))
    write(
        tmp_path / "possible_answer" / "BFCL_v4_parallel.json",
        {"id": "parallel_1", "ground_truth": [*TRUTH, *TRUTH]},
        {"id": "parallel_0", "ground_truth": TRUTH},
    )
    calls = [case.task.verifier.calls for case in load_suite(file).cases if isinstance(case.task.verifier, CallsConfig)]
    assert [len(each) for each in calls] == [1, 2]


def test_irrelevance_and_relevance_need_no_ground_truth(tmp_path: Path) -> None:
    names = ("irrelevance_0", "live_irrelevance_1-0-0", "live_relevance_2-0-0")
    cases = load_suite(write(tmp_path / "rows.jsonl", *map(row, names))).cases
    verifiers = [case.task.verifier for case in cases]
    assert [each.calls for each in verifiers if isinstance(each, CallsConfig)] == [[], [], "any"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (row("multi_turn_base_0", involved_classes=["X"]), "BFCL category multi_turn_base is not supported"),
        (row("simple_java_0", ground_truth=TRUTH), "BFCL category simple_java is not supported"),
        (row("memory_kv_0"), "BFCL category memory_kv is not supported"),
        (row(), "no ground truth: expected the key ground_truth, or a row with the id simple_python_0 in"),
        (row(ground_truth="x"), "ground_truth: str 'x', expected a list"),
        (row(ground_truth=["x"]), "ground_truth: 'x', expected {function"),
        (row(ground_truth=[{"nope": {}}]), "no tool nope; tools: geo_distance"),
        (row(ground_truth=[{"geo.distance": {"start": 5}}]), "verifier"),
        (row(id=5), "id: int 5, expected a text"),
        (row("simple_../../x_0", ground_truth=TRUTH), "not supported"),
        (row(question="Hi", ground_truth=TRUTH), "question: str 'Hi', expected a list with one turn"),
        (row(question=[], ground_truth=TRUTH), "question: 0 turns, expected one list of messages"),
        (row(question=[[], []], ground_truth=TRUTH), "question: 2 turns"),
        (row(question=[[{"role": "tool"}]], ground_truth=TRUTH), "expected messages with role"),
        (row(function=FUNCTION, ground_truth=TRUTH), "expected a list of functions"),
        (row(function=[{"name": "f"}], ground_truth=TRUTH), "function: expected name, description and parameters"),
        (row(function=[{**FUNCTION, "parameters": {"type": "nope"}}], ground_truth=TRUTH), "$.type"),
        (row(function=[FUNCTION, FUNCTION], ground_truth=TRUTH), "duplicate tools: geo_distance"),
        ("{", "not a JSON row: "),
        ("[1]", "list [1], expected one JSON object per line"),
        ('{"id": "a", "id": "b"}', "twice in one object"),
    ],
)
def test_a_malformed_row_is_named_with_its_line(tmp_path: Path, text: Any, message: str) -> None:
    file = write(tmp_path / "rows.jsonl", row(ground_truth=TRUTH), "", text)
    with pytest.raises(TaskFileError) as caught:
        load_suite(file)
    assert str(caught.value).startswith(f"{file}:3: ") and message in str(caught.value), caught.value


def test_other_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(TaskFileError, match=r"rows.jsonl:1: unknown kind of row with the keys a, b; expected BFCL"):
        load_suite(write(tmp_path / "rows.jsonl", {"a": 1, "b": 2}))
    with pytest.raises(SuiteError, match="has no rows"):
        load_suite(write(tmp_path / "empty.jsonl"))
    with pytest.raises(SuiteError, match="two tasks have the id 'simple_python_0'"):
        load_suite(write(tmp_path / "twice.jsonl", row(ground_truth=TRUTH), row(ground_truth=TRUTH)))


def test_a_suite_file_may_name_a_data_set(tmp_path: Path) -> None:
    write(tmp_path / "rows.jsonl", row(ground_truth=TRUTH), row("irrelevance_0"))
    (tmp_path / "more.yaml").write_text("id: more\ninstruction: Do it.\nverifier: {command: 'true'}\n")
    (tmp_path / "suite.yaml").write_text("tasks: [rows.jsonl, more.yaml]\n")
    cases = load_suite(str(tmp_path / "suite.yaml")).cases
    assert [case.task.id for case in cases] == ["simple_python_0", "irrelevance_0", "more"]


def test_the_commands_run_and_check_rows(tmp_path: Path, untrained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    file = write(tmp_path / "rows.jsonl", row(ground_truth=TRUTH), row("irrelevance_0"))
    runner = typer.testing.CliRunner()
    checked = runner.invoke(app, ["check", file], catch_exceptions=False)
    assert (checked.exit_code, checked.stdout.splitlines()[-1]) == (0, "2/2 tasks are sound")
    ran = runner.invoke(app, ["eval", file, "-m", str(untrained), "--seed", "1", "--json"], catch_exceptions=False)
    found = json.loads(ran.stdout)
    assert ran.exit_code == 0 and found["trials"] == found["scored"] == 2 and found["backends"] == []
    assert set(found["families"]) == {"simple_python", "irrelevance"}


def test_a_json_file_may_also_be_one_task(tmp_path: Path) -> None:
    task = {"id": "one", "instruction": "Do it.", "verifier": {"command": "true"}}
    for text in (json.dumps(task), json.dumps(task, indent=1)):
        (tmp_path / "task.json").write_text(text)
        assert [case.task.id for case in load_suite(str(tmp_path / "task.json")).cases] == ["one"]
