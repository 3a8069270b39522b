"""Suites from folders, files and generated families, and errors for invalid ones."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from agentkit.errors import TaskFileError
from agentkit_evals.errors import SuiteError
from agentkit_evals.suite import PACKAGED_SUITES, load_operations, load_suite

TASK = "id: {id}\ninstruction: Do it.\nverifier: {{command: 'true'}}\n"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "smoke"
    (root / "more").mkdir(parents=True)
    for name in ("b", "a", "more/c"):
        (root / f"{name}.yaml").write_text(TASK.format(id=Path(name).name))
    (root / "nightly.yaml").write_text(
        "name: nightly\ntasks: [more, a.yaml]\nsynth: {operations: [count_lines], per_operation: 2}\n"
    )
    return root


def ids(spec: Path | str, **options: int) -> list[str]:
    return [case.task.id for case in load_suite(str(spec), **options).cases]


def test_a_folder_includes_every_task_below_it(folder: Path) -> None:
    assert ids(folder) == ["a", "b", "c"]
    assert ids(folder, limit=2) == ["a", "b"]
    assert {case.family for case in load_suite(str(folder)).cases} == {"smoke"}
    assert ids(folder / "b.yaml") == ["b"]


def test_a_suite_file_keeps_its_order(folder: Path) -> None:
    suite = load_suite(str(folder / "nightly.yaml"), seed=3)
    assert suite.name == "nightly"
    assert [case.task.id for case in suite.cases][:2] == ["c", "a"]
    generated = suite.cases[2:]
    assert [case.family for case in generated] == ["count_lines"] * 2
    assert all(case.task.id.startswith("count_lines-heldout-3") for case in generated)


def test_generated_tasks(folder: Path) -> None:
    suite = load_suite("synth", seed=1)
    assert [case.family for case in suite.cases] == [name for name in load_operations() for _ in range(3)]
    chosen = load_suite("synth:compute,count_lines", seed=1).cases
    assert [case.family for case in chosen] == ["compute"] * 3 + ["count_lines"] * 3
    assert {case.task.id for case in chosen} < {case.task.id for case in suite.cases}
    spec = "synth:count_rows,fix_bug"
    assert ids(spec, seed=1) == ids(spec, seed=1) != ids(spec, seed=2)


def test_without_the_synth_extra_only_generating_tasks_fails() -> None:
    script = """
import sys
sys.modules["mimesis"] = None
from agentkit_evals.suite import load_suite
print(len(load_suite("generated").cases))
load_suite("synth:count_lines")
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert int(done.stdout) >= 24
    assert done.stderr.splitlines()[-1].endswith("mimesis is missing; run: pip install 'agentkit-harness[synth]'")


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("tasks: [gone.yaml]\n", TaskFileError, r"gone\.yaml: cannot be read"),
        ("tasks: [../x.yaml]\n", TaskFileError, r"s\.yaml:1: tasks.0: '../x.yaml' must be a relative path"),
        ("tasks: []\n", SuiteError, "suite s has no tasks"),
        ("tasks: [a.yaml, a.yaml]\n", SuiteError, "two tasks have the id 'a'"),
        ("task: [a.yaml]\nsynth: {}\n", TaskFileError, r's\.yaml:1: unknown key "task"; did you mean "tasks"'),
        ("synth:\n  seeds: 3\n", TaskFileError, r's\.yaml:2: unknown key "synth.seeds"; did you mean "seed"'),
        (
            "synth: {operations: [count_line]}\n",
            SuiteError,
            'unknown operation "count_line"; did you mean "count_lines"',
        ),
        ("synth: {operations: [zzz]}\n", SuiteError, 'unknown operation "zzz"; there are read_setting, change_setting'),
        ("synth: {families: [a]}\n", TaskFileError, 'unknown key "synth.families"'),
        ("synth: {per_operation: 0}\n", TaskFileError, "per_operation: input should be greater than or equal to 1"),
    ],
)
def test_mistakes_are_reported(folder: Path, text: str, error: type[Exception], message: str) -> None:
    (folder / "s.yaml").write_text(text)
    with pytest.raises(error, match=message):
        load_suite(str(folder / "s.yaml"))


def test_a_task_that_cannot_be_scored_is_refused(folder: Path) -> None:
    (folder / "b.yaml").write_text("id: b\ninstruction: Do it.\n")
    with pytest.raises(SuiteError, match="task 'b' has no verifier"):
        load_suite(str(folder))


def test_a_broken_file_in_a_folder_is_reported(folder: Path) -> None:
    (folder / "z.yaml").write_text("id: z\ninstruction: [unclosed\n")
    with pytest.raises(TaskFileError, match=r"z\.yaml:3: not valid YAML"):
        load_suite(str(folder))


def test_a_packaged_suite_is_loaded_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert all(load_suite(name, limit=1).name == name for name in PACKAGED_SUITES)
    (tmp_path / "everyday").mkdir()
    (tmp_path / "everyday" / "mine.yaml").write_text(TASK.format(id="mine"))
    assert ids("everyday") == ["mine"]


def test_a_selection_of_no_operation_is_refused() -> None:
    for spec in ("synth:", "synth:,"):
        with pytest.raises(SuiteError, match="names no operation"):
            load_suite(spec)
