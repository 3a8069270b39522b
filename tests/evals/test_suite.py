"""Suites from folders, files and generated families, and errors for invalid ones."""

from __future__ import annotations

from pathlib import Path

import pytest

from agentkit.errors import TaskFileError
from agentkit_evals.errors import SuiteError
from agentkit_evals.suite import PACKAGED_SUITES, load_suite
from agentkit_evals.synth import FAMILIES

TASK = "id: {id}\ninstruction: Do it.\nverifier: {{command: 'true'}}\n"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "smoke"
    (root / "more").mkdir(parents=True)
    for name in ("b", "a", "more/c"):
        (root / f"{name}.yaml").write_text(TASK.format(id=Path(name).name))
    (root / "nightly.yaml").write_text(
        "name: nightly\ntasks: [more, a.yaml]\nsynth: {families: [logs], per_family: 2}\n"
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
    assert [case.task.id for case in suite.cases] == ["c", "a", "logs-heldout-6", "logs-heldout-7"]


def test_generated_families(folder: Path) -> None:
    suite = load_suite("synth", seed=1)
    assert [case.family for case in suite.cases] == [name for name in FAMILIES for _ in range(3)]
    chosen = load_suite("synth:chat,logs", seed=1).cases
    assert [case.family for case in chosen] == ["chat"] * 3 + ["logs"] * 3
    assert {case.task.id for case in chosen} < {case.task.id for case in suite.cases}
    assert ids("synth", seed=1) == ids("synth", seed=1) != ids("synth", seed=2)


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("tasks: [gone.yaml]\n", TaskFileError, r"gone\.yaml: cannot be read"),
        ("tasks: [../x.yaml]\n", TaskFileError, r"s\.yaml:1: tasks.0: '../x.yaml' must be a relative path"),
        ("tasks: []\n", SuiteError, "suite s has no tasks"),
        ("tasks: [a.yaml, a.yaml]\n", SuiteError, "two tasks have the id 'a'"),
        ("task: [a.yaml]\nsynth: {}\n", TaskFileError, r's\.yaml:1: unknown key "task"; did you mean "tasks"'),
        ("synth:\n  seeds: 3\n", TaskFileError, r's\.yaml:2: unknown key "synth.seeds"; did you mean "seed"'),
        ("synth: {families: [logz]}\n", SuiteError, "unknown families logz; there are combine, bugfix"),
        ("synth: {per_family: 0}\n", TaskFileError, "per_family: input should be greater than or equal to 1"),
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
