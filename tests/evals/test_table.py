"""Tables: rows become tasks, pairs become two, and mistakes are reported with their place."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import anyio
import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentkit.errors import TaskFileError
from agentkit.task import CallsConfig, Task, ToolConfig, VerifierConfig
from agentkit_evals.calls import gold_calls, mismatch
from agentkit_evals.selfcheck import selfcheck
from agentkit_evals.suite import load_suite
from agentkit_evals.table import expected_arguments, object_schema, parameter_schema, read_table

TABLE = """
kind: demo
functions:
  reserve:
    about: Reserve seats.
    takes:
      name: string - of the guest
      seats: integer
      (rows): integer[]
      (class): [first, second]
      (meal): boolean = false
      (address): {street: string, (zip): string}
      (children): [{name: string, age: integer}]
rows:
  - {id: count, ask: "How many?", files: {a.txt: "x\\ny\\n"}, run: wc -l < a.txt, answer: 2}
  - {id: names, ask: "Which files?", files: {a.txt: "x\\n", b.txt: "y\\n"}, run: ls, lists: [a.txt, b.txt]}
  - {id: edit, ask: Make it z., files: {a.txt: "x\\n", b.txt: "y\\n"}, run: echo z > a.txt, after: {a.txt: z}}
  - {id: gone, ask: Delete it., files: {a.txt: "x\\n"}, run: rm a.txt, after: {a.txt: null}}
  - id: code
    ask: Fix it.
    files: {a.sh: "echo 1\\n"}
    edits: [a.sh]
    run: echo echo 2 > a.sh
    prints: {sh a.sh: "2\\n"}
  - id: pair
    ask: What is in b.txt?
    files: {a.txt: "x\\n"}
    never: [x]
    twin: {ask: "What is in a.txt?", run: cat a.txt, answer: x}
"""


def write(folder: Path, text: str = TABLE, name: str = "demo.yaml") -> Path:
    path = folder / name
    path.write_text(text)
    return path


def test_each_row_is_a_task_of_the_kind(tmp_path: Path) -> None:
    tasks = list(read_table(write(tmp_path)))
    assert [task.id for task in tasks] == [
        *("demo-count", "demo-names", "demo-edit", "demo-gone", "demo-code"),
        *("demo-pair-impossible", "demo-pair-solvable"),
    ]
    assert tasks[0].instruction == "How many?" and tasks[0].environment.files == {"a.txt": "x\ny\n"}
    assert {task.metadata["family"] for task in tasks} == {"demo"}
    assert "pair" not in tasks[0].metadata
    assert [task.metadata["pair"] for task in tasks[5:]] == ["demo-pair"] * 2
    assert [task.metadata["solvable"] for task in tasks[5:]] == [False, True]
    impossible, solvable = [json.loads(verifier(task).files["expected.json"]) for task in tasks[5:]]
    assert impossible["impossible"] and impossible["never"] == ["x"] and "answer" not in impossible
    assert not solvable["impossible"] and solvable["answer"] == "x" and "never" not in solvable


def test_rows_are_sound_tasks(tmp_path: Path) -> None:
    async def check(task: Task) -> None:
        assert (await selfcheck(task, backend="unsafe-local")).problems == []

    for task in read_table(write(tmp_path)):
        anyio.run(check, task)


def test_a_wrong_solution_is_not_accepted(tmp_path: Path) -> None:
    async def check(task: Task) -> list[str]:
        return (await selfcheck(task, backend="unsafe-local")).problems

    wrong = TABLE.replace("answer: 2", "answer: 3").replace("rm a.txt", "ls")
    tasks = {task.id: task for task in read_table(write(tmp_path, wrong))}
    assert "the answer is '2', expected [3]" in anyio.run(check, tasks["demo-count"])[0]
    assert "a.txt still exists" in anyio.run(check, tasks["demo-gone"])[0]


def test_a_table_is_loaded_alone_in_a_folder_and_in_a_suite_file(tmp_path: Path) -> None:
    (tmp_path / "suite").mkdir()
    alone = write(tmp_path / "suite")
    (tmp_path / "nightly.yaml").write_text("tasks: [suite/demo.yaml]\n")
    ids = [task.id for task in read_table(alone)]
    for spec in (alone, tmp_path / "suite", tmp_path / "nightly.yaml"):
        cases = load_suite(str(spec)).cases
        assert [case.task.id for case in cases] == ids and {case.family for case in cases} == {"demo"}


def one_row(row: str) -> str:
    """Return a table with the functions of `TABLE` and one row."""
    return TABLE[: TABLE.index("rows:")] + f"rows:\n  - {{id: r, ask: Go, {row}}}\n"


def calls_task(folder: Path, calls: str) -> Task:
    (task,) = read_table(write(folder, one_row(f"calls: [{calls}]")))
    return task


def test_calls_are_scored_with_the_schema_of_the_function(tmp_path: Path) -> None:
    task = calls_task(tmp_path, "{reserve: {name: [Ana, Anna], seats: 2, rows: [1, 2], address: {street: Elm}}}")
    assert isinstance(task.verifier, CallsConfig)
    (tool,) = task.tools
    assert isinstance(tool, ToolConfig) and tool.parameters["required"] == ["name", "seats"]

    def problem(**arguments: Any) -> str | None:
        return mismatch(task, json.dumps([{"name": "reserve", "arguments": arguments}]))

    right = {"name": "Anna", "seats": 2, "rows": [1, 2], "address": {"street": "elm"}}
    assert mismatch(task, gold_calls(task)) is None
    assert problem(**right) is None
    assert problem(**right, meal=False) is None
    for wrong in (
        {**right, "meal": True},
        {**right, "class": "first"},
        {**right, "rows": [2, 1]},
        {**right, "seats": "2"},
        {**right, "address": {"street": "elm", "zip": "1"}},
        {key: value for key, value in right.items() if key != "rows"},
    ):
        assert problem(**wrong) is not None, wrong


def test_the_short_notation() -> None:
    assert parameter_schema("string") == {"type": "string"}
    assert parameter_schema("integer[] - odd ones") == {
        "type": "array", "items": {"type": "integer"}, "description": "odd ones",
    }  # fmt: skip
    assert parameter_schema('string = "a - b" - text') == {"type": "string", "default": "a - b", "description": "text"}
    assert parameter_schema(["a", "b"]) == {"type": "string", "enum": ["a", "b"]}
    assert parameter_schema({"type": "number", "minimum": 1}) == {"type": "number", "minimum": 1}
    assert parameter_schema([{"x": "number"}]) == {"type": "array", "items": object_schema({"x": "number"})}
    assert object_schema({"type": "string", "(b)": "boolean"}) == {
        "type": "object",
        "properties": {"type": {"type": "string"}, "b": {"type": "boolean"}},
        "required": ["type"],
    }


@given(
    st.sampled_from(["string", "integer", "number", "boolean"]),
    st.booleans(),
    st.none() | st.integers() | st.booleans() | st.text("abc=-\" '", max_size=8),
    st.none() | st.from_regex(r"[a-z][a-z =\-.,]{0,20}", fullmatch=True),
)
def test_every_part_of_the_short_notation_is_kept(kind: str, many: bool, default: Any, description: str | None) -> None:
    text = kind + "[]" * many
    expected: dict[str, Any] = {"type": "array", "items": {"type": kind}} if many else {"type": kind}
    if default is not None:
        text += f" = {json.dumps(default)}"
        expected["default"] = default
    if description is not None:
        text += f" - {description}"
        expected["description"] = description
    assert parameter_schema(text) == expected


@given(st.text() | st.integers() | st.lists(st.text() | st.integers()) | st.none())
def test_anything_else_is_an_error(entry: Any) -> None:
    try:
        assert parameter_schema(entry)["type"] in ("string", "integer", "number", "boolean", "array")
    except ValueError as exc:
        assert "is not" in str(exc)


def test_expected_arguments_of_an_unknown_parameter_are_refused() -> None:
    with pytest.raises(ValueError, match="no parameter seat; there are seats"):
        expected_arguments(object_schema({"seats": "integer"}), {"seat": 1})


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("answer: 1", "row r has no solution; add `run: COMMAND`"),
        ("run: 'true'", "row r has no outcome; add answer, lists, after, prints or calls"),
        ("twin: {ask: How}", "row r has no outcome"),
        ("run: 'true', anwser: 1", r'demo.yaml:\d+: unknown key "rows.0.anwser"; did you mean "answer"'),
        ("run: 'true', answer: 1, tools: [bsh]", 'row r: .*unknown tool "bsh"'),
        (
            "run: 'true', answer: 1, files: {/etc/x: ''}",
            r"demo.yaml:\d+: rows.0.files./etc/x.* must be a relative path",
        ),
        ("calls: [{book: {}}]", "row r: calls: no function book; there are reserve"),
        ("calls: [{reserve: {seat: 1}}]", "row r: calls: no parameter seat; there are name, seats"),
        ("calls: [], run: 'true'", "row r scores calls, which do not run; leave out files and run"),
    ],
)
def test_mistakes_in_a_row_are_reported(tmp_path: Path, row: str, message: str) -> None:
    with pytest.raises(TaskFileError, match=message):
        list(read_table(write(tmp_path, one_row(row))))


@pytest.mark.parametrize(
    ("parameter", "message"),
    [
        ("text", "'text' is not a parameter; write `TYPE`, `TYPE\\[\\]` or `TYPE = DEFAULT`"),
        ("string = abc", "default 'abc' is not JSON; write text in double quotes"),
        ("3", "3 is not a parameter; write TYPE, TYPE"),
    ],
)
def test_mistakes_in_a_parameter_are_reported(tmp_path: Path, parameter: str, message: str) -> None:
    text = one_row("calls: []").replace("seats: integer", f"seats: {parameter}")
    with pytest.raises(TaskFileError, match=rf"demo.yaml:\d+: functions.reserve.takes: {message}"):
        list(read_table(write(tmp_path, text)))


def test_a_table_without_rows_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TaskFileError, match=r"demo.yaml:3: rows: "):
        load_suite(str(write(tmp_path, "\nkind: demo\nrows: []\n")))


def verifier(task: Task) -> VerifierConfig:
    assert isinstance(task.verifier, VerifierConfig)
    return task.verifier
