"""Fixtures of the evaluation tests: a small tokenizer, an untrained model, small tasks, policies, runs and commands."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import anyio
import pytest
import torch
import typer.testing

from agentkit.cli import app
from agentkit.messages import AssistantMessage, Message
from agentkit.models.scripted import AssistantTurn, Policy, ScriptedModel
from agentkit.task import Task
from agentkit_engine.chat import Tokenizer
from agentkit_engine.model.decoder import Decoder, initialize_
from agentkit_engine.training.tiny import tiny_spec
from agentkit_engine.training.tokenizer import build_tokenizer
from agentkit_engine.weights.export import export_checkpoint
from agentkit_environments import available_backends
from agentkit_evals.record import RunDirectory
from agentkit_evals.run import EvalRun
from agentkit_evals.suite import Case, Suite
from agentkit_evals.synth.tokenizer_texts import phrases
from agentkit_evals.verify import Backend

TASK = """\
id: {id}
instruction: Say something.
environment: {{files: {{a.txt: "hello"}}}}
agent: {{effort: none, max_turns: 2, max_tokens: 12}}
verifier: {{command: "test -e a.txt"}}
solution: {{command: "true"}}
"""
Calls = Sequence[tuple[str, dict[str, Any]]]
MakeTask = Callable[..., Task]
MakeScript = Callable[..., Policy]
MakeRun = Callable[..., EvalRun]
Evaluate = Callable[..., RunDirectory]


@pytest.fixture(scope="session")
def tokenizer_json() -> str:
    return build_tokenizer(["hello world"], phrases=phrases(), vocab_size=700)


@pytest.fixture(scope="session")
def tokenizer(tokenizer_json: str) -> Tokenizer:
    return Tokenizer.from_json(tokenizer_json)


@pytest.fixture(scope="session")
def untrained(tmp_path_factory: pytest.TempPathFactory, tokenizer_json: str) -> Path:
    """Folder of an untrained model with the tiny model's shape."""
    folder = tmp_path_factory.mktemp("models") / "untrained"
    vocab_size = Tokenizer.from_json(tokenizer_json).vocab_size
    export_checkpoint(initialize_(Decoder(tiny_spec(vocab_size)), torch.Generator().manual_seed(0)), folder)
    (folder / "tokenizer.json").write_text(tokenizer_json)
    return folder


@pytest.fixture(
    params=[
        "unsafe-local",
        pytest.param("process", marks=pytest.mark.sandbox),
        pytest.param("docker", marks=pytest.mark.docker),
    ]
)
def backend(request: pytest.FixtureRequest) -> Backend:
    """Each backend in turn; the test is skipped if the backend does not work here."""
    chosen: Backend = request.param
    reason = available_backends()[chosen]
    if reason is not None:
        pytest.skip(f"{chosen}: {reason}")
    return chosen


@pytest.fixture
def number_task() -> MakeTask:
    """Function that makes a task: submit the number in a file."""

    def make(task_id: str = "number", **changes: Any) -> Task:
        return Task.model_validate(
            {
                "id": task_id,
                "instruction": "Submit the number in n.txt.",
                "environment": {"files": {"n.txt": "42\n"}},
                "verifier": {"command": 'test "$AGENTKIT_ANSWER" = 42', "timeout_s": 20.0},
                "solution": {"command": "cat n.txt"},
                "metadata": {"family": "numbers"},
                **changes,
            }
        )

    return make


@pytest.fixture
def script() -> MakeScript:
    """Function that makes a policy from turns, each a list of calls or a text. The last turn repeats."""

    def make(*turns: Calls | str) -> Policy:
        def policy(messages: Sequence[Message], think: bool) -> AssistantTurn:
            said = sum(isinstance(message, AssistantMessage) for message in messages)
            turn = turns[min(said, len(turns) - 1)]
            reasoning = f"This is turn {said}." if think else None
            return AssistantTurn(reasoning, turn) if isinstance(turn, str) else AssistantTurn(reasoning, calls=turn)

        return policy

    return make


@pytest.fixture
def suite(tmp_path: Path) -> Path:
    """Folder with two task files, which any agent solves."""
    folder = tmp_path / "suite"
    folder.mkdir()
    for name in ("first", "second"):
        (folder / f"{name}.yaml").write_text(TASK.format(id=name))
    return folder


@pytest.fixture
def in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run commands in an empty folder, with wide output and without a home of agentkit."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("AGENTKIT_HOME", raising=False)
    monkeypatch.setenv("COLUMNS", "200")


@pytest.fixture
def solves(script: MakeScript) -> Policy:
    """A policy that solves the number task."""
    return script([("read_file", {"path": "n.txt"})], [("submit", {"answer": "42"})])


@pytest.fixture
def make_run(tmp_path: Path, tokenizer: Tokenizer) -> MakeRun:
    """Function that makes an evaluation of (task, policy) pairs, without isolation by default."""

    def make(*pairs: tuple[Task, Policy], **options: Any) -> EvalRun:
        policies = {task.id: policy for task, policy in pairs}
        cases = tuple(Case(task, str(task.metadata.get("family", "tests"))) for task, _ in pairs)
        settings: dict[str, Any] = {"backend": "unsafe-local", "model_name": "scripted", **options}
        return EvalRun(
            Suite("tests", cases),
            lambda case: ScriptedModel(policies[case.task.id], tokenizer),
            settings.pop("directory", tmp_path / "run"),
            **settings,
        )

    return make


@pytest.fixture
def evaluate(make_run: MakeRun) -> Evaluate:
    """Function that runs such an evaluation and returns its run directory."""
    return lambda *pairs, **options: anyio.run(make_run(*pairs, **options).execute)


def agentkit(*arguments: str | Path, code: int | None = 0) -> typer.testing.Result:
    """Run a command and check its exit code; None accepts 0 or 1, since an untrained model may solve a task or not."""
    result = typer.testing.CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)
    assert result.exit_code in ((0, 1) if code is None else (code,)), result.output
    return result
