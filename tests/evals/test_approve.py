"""`--approve` of `agentkit run`, with a scripted model in the place of the loaded one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import typer.testing

from agentkit.cli import app
from agentkit.events import CallDecided
from agentkit.models.scripted import ScriptedModel
from agentkit.trajectory import Trajectory
from agentkit_engine.chat import Tokenizer

from .conftest import MakeScript


@pytest.fixture(autouse=True)
def scripted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tokenizer: Tokenizer, script: MakeScript) -> None:
    policy = script(
        [("write_file", {"path": "a.txt", "content": "new\n"}), ("list_dir", {})], [("submit", {"answer": "ok"})]
    )
    monkeypatch.setattr("agentkit.cli.run.load_model", lambda *_, **__: ScriptedModel(policy, tokenizer))
    monkeypatch.chdir(tmp_path)


def agentkit(*arguments: str) -> typer.testing.Result:
    command = ["run", "Write a file.", "--env", "unsafe-local", "--trajectory", "run.jsonl", *arguments]
    return typer.testing.CliRunner().invoke(app, command, catch_exceptions=False)


def decisions() -> list[tuple[str, str, str | None]]:
    return [
        (record.name, record.decision, record.policy)
        for record in Trajectory.load("run.jsonl").records
        if isinstance(record, CallDecided)
    ]


def changes(result: typer.testing.Result) -> list[Any]:
    assert result.exit_code == 0, result.output
    return [change["path"] for change in json.loads(result.stdout)["changes"]]


@pytest.mark.parametrize("options", [(), ("--approve", "all")])
def test_every_call_runs_by_default(options: tuple[str, ...]) -> None:
    assert changes(agentkit("--json", *options)) == ["a.txt"]
    assert decisions() == []


def test_only_calls_that_change_nothing_run_with_read_only() -> None:
    assert changes(agentkit("--json", "--approve", "read-only")) == []
    assert decisions() == [
        ("write_file", "refused", "refuse_changes"),
        ("list_dir", "approved", None),
        ("submit", "approved", None),
    ]


def test_without_a_terminal_a_call_that_needs_an_answer_is_refused_and_shown() -> None:
    result = agentkit("--approve", "ask")
    assert result.exit_code == 0
    assert "✗ write_file" in result.stdout and "standard input is not a terminal" in result.stdout
    assert ("write_file", "refused", "ask_before_changes") in decisions()


def test_an_unknown_choice_is_named() -> None:
    result = agentkit("--approve", "maybe")
    assert result.exit_code == 2
    assert "maybe" in result.stderr and "read-only" in result.stderr
