"""Untrusted run directories and suites give a value or a typed error, and read nothing outside the folder."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anyio
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from agentkit.errors import TaskFileError
from agentkit.models.scripted import AssistantTurn, ScriptedModel
from agentkit.task import Task, VerifierConfig
from agentkit_engine.chat import Tokenizer
from agentkit_evals.errors import RunDirectoryError, SuiteError
from agentkit_evals.record import RunDirectory
from agentkit_evals.run import EvalRun
from agentkit_evals.suite import Case, Suite, load_suite

in_place = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=60)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> Path:
    """Path of a run of one trial."""
    task = Task(id="a", instruction="x", verifier=VerifierConfig(command="true"))
    model = ScriptedModel(lambda messages, think: AssistantTurn(None, "Done."), tokenizer)
    path = tmp_path_factory.mktemp("runs") / "run"
    suite = Suite("tests", (Case(task, "f"),))
    anyio.run(EvalRun(suite, lambda case: model, path, backend="unsafe-local", model_name="scripted").execute)
    assert len(RunDirectory.open(path).trials) == 1
    return path


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    for name in ("run.json", "trials.jsonl"):
        (tmp_path / name).write_bytes((finished / name).read_bytes())
    return tmp_path


def change(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values) + "\n")


TRIALS: list[dict[str, Any]] = [
    {"reward": float("nan")},
    {"reward": float("inf")},
    {"reward": "1"},
    {"reward": True},
    {"agent_s": float("nan")},
    {"usage": {"wall_time_s": float("nan")}},
    {"usage": []},
    {"trial": "../../../etc/passwd"},
    {"trial": "/etc/passwd"},
    {"trial": "a\0b"},
    {"trial": "a" * 5000},
    {"trial": ""},
    {"task": "other"},
    {"task": None},
    {"status": "won"},
    {"more": 1},
    {f"k{number}": 1 for number in range(20_000)},
    {"answer": [[1] * 1000] * 10},
    {"answer": "\x1b[31m", "error": 5},
]


@pytest.mark.parametrize("values", TRIALS, ids=lambda values: f"{next(iter(values.items()))}"[:30])
def test_a_crafted_trial_is_an_error_with_its_line(values: dict[str, Any], run: Path) -> None:
    change(run / "trials.jsonl", **values)
    with pytest.raises(RunDirectoryError, match=r"trials\.jsonl:1: not a trial: ") as caught:
        RunDirectory.open(run)
    assert len(str(caught.value)) < 1000 and str(caught.value).isprintable()


def test_a_duplicate_trial_is_refused(run: Path) -> None:
    lines = (run / "trials.jsonl").read_text()
    (run / "trials.jsonl").write_text(lines * 2)
    with pytest.raises(RunDirectoryError, match=r"trials\.jsonl:2: not a trial: trial a\.0 occurs twice"):
        RunDirectory.open(run)


LOCKS: list[dict[str, Any]] = [
    {"sampling": {"temperature": float("nan")}},
    {"sampling": {"temperature": float("inf")}},
    {"epochs": 0},
    {"epochs": 2**70},
    {"epochs": True},
    {"version": True},
    {"version": [[[[[]]]]]},
    {"format": "other"},
    {"tasks": [1] * 100_000},
    {"tasks": {}},
    {"tasks": [{"id": "../x", "instruction": "x"}]},
    {"tasks": [{"id": "a", "instruction": "x", "agent": {"timeout_s": float("nan")}}]},
    {"more": "x" * 100_000},
]


@pytest.mark.parametrize("values", LOCKS, ids=lambda values: f"{next(iter(values.items()))}"[:30])
def test_a_crafted_lock_is_an_error_with_its_file(values: dict[str, Any], run: Path) -> None:
    change(run / "run.json", **values)
    with pytest.raises(RunDirectoryError, match=r"run\.json") as caught:
        RunDirectory.open(run)
    assert len(str(caught.value)) < 1000 and str(caught.value).isprintable()


@pytest.mark.parametrize(
    "content", [b"", b"[]", b"null", b"\xff", b"[" * 100_000, b'{"a":1,"a":2}', b"[" + b"0," * 600_000 + b"0]"]
)
def test_a_lock_of_invalid_json_is_an_error_with_its_file(content: bytes, run: Path) -> None:
    (run / "run.json").write_bytes(content)
    with pytest.raises(RunDirectoryError, match=r"run\.json"):
        RunDirectory.open(run)


def make_huge(path: Path) -> None:
    path.touch()
    os.truncate(path, 1 << 40)


@pytest.mark.parametrize("name", ["run.json", "trials.jsonl"])
@pytest.mark.parametrize("make", [os.mkfifo, Path.mkdir, make_huge, lambda path: path.symlink_to("/dev/zero")])
def test_a_run_of_special_files_never_hangs(make: Callable[[Path], Any], name: str, run: Path) -> None:
    (run / name).unlink()
    make(run / name)
    with pytest.raises(RunDirectoryError, match=name):
        RunDirectory.open(run)


def test_an_endless_line_is_refused(run: Path) -> None:
    os.truncate(run / "trials.jsonl", 20 << 20)
    with pytest.raises(RunDirectoryError, match="a line of more than 16,777,216 bytes"):
        RunDirectory.open(run)


@given(content=st.binary(max_size=200), place=st.integers(0, 1 << 20))
@in_place
def test_any_bytes_are_a_run_or_a_run_directory_error(run: Path, content: bytes, place: int) -> None:
    for name in ("run.json", "trials.jsonl"):
        whole = (run / name).read_bytes()
        at = place % len(whole)
        for data in (content + b"\n", whole[:at] + content + whole[at:]):
            (run / name).write_bytes(data)
            try:
                RunDirectory.open(run)
            except RunDirectoryError as error:
                assert len(str(error)) < 1500
        (run / name).write_bytes(whole)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("synth: {per_operation: 1000000000000}", r":1: synth.per_operation: .*less than or equal to 10000"),
        ("synth: {per_operation: 1e12}", r":1: synth.per_operation: .*got str '1e12'"),
        ("synth: {per_operation: 1.0e+12}", r":1: synth.per_operation: "),
        ("synth: {seed: 99999999999}", r":1: synth.seed: "),
        ("tasks: &t [*t]", r":1: .*is inside its own anchor"),
        ("tasks: [../outside.yaml]", r":1: tasks.0: .*without '..'"),
        ("tasks: [.]", r":1: tasks.0: .*relative path"),
        ("tasks: [fifo.yaml]", r"fifo.yaml: cannot be read: it is a FIFO"),
        ("tasks: [nowhere.yaml]", r"nowhere.yaml: cannot be read: No such file"),
        ('tasks: ["a\\0b"]', r":1: tasks.0: "),
        ("tasks: 5", r":1: tasks: .*write `- ` before each item"),
        ("tasks: [[[a]]]", r":1: tasks.0: "),
        ("? [a]\n: b\ntasks: []", r"unhashable key"),
    ],
)
def test_a_crafted_suite_is_an_error_with_its_line(text: str, message: str, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo.yaml")
    (tmp_path / "suite.yaml").write_text(text)
    with pytest.raises(TaskFileError, match=message):
        load_suite(str(tmp_path / "suite.yaml"))


def test_a_repeated_operation_is_refused(tmp_path: Path) -> None:
    (tmp_path / "suite.yaml").write_text(
        f"synth: {{operations: [{', '.join(['fix_bug'] * 1000)}], per_operation: 10000}}"
    )
    with pytest.raises(SuiteError, match="operation fix_bug is named twice"):
        load_suite(str(tmp_path / "suite.yaml"))


def test_a_folder_with_a_fifo_never_hangs(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.yaml")
    with pytest.raises(TaskFileError, match="it is a FIFO"):
        load_suite(str(tmp_path))
