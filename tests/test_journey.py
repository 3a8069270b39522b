"""One task through every room, from task file to report."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import anyio
import pytest
import typer.testing

from agentkit.cli import app
from agentkit.messages import AssistantMessage, Message, ToolMessage
from agentkit.models.scripted import AssistantTurn, ScriptedModel
from agentkit.models.tokens import rebuild_token_ids
from agentkit_engine import Engine
from agentkit_engine.chat import Tokenizer
from agentkit_engine.engine import PACKAGED_MODELS
from agentkit_engine.training.tokenizer import build_tokenizer
from agentkit_environments import available_backends
from agentkit_evals.record import RunDirectory, scores_by_task
from agentkit_evals.report import render_report
from agentkit_evals.run import EvalRun
from agentkit_evals.statistics import estimate
from agentkit_evals.suite import load_suite

PROCESS = available_backends().get("process", "not built")
TINY = (PACKAGED_MODELS["tiny"] / "config.json").is_file()

TASK = """\
id: fix-the-greeting
instruction: The script greet.sh should print "hello, world". Fix it, run it, and submit what it prints.
environment:
  files:
    greet.sh: |
      echo "helo, world"
tools: [bash, read_file, edit_file, submit]
verifier:
  command: test "$(sh greet.sh)" = "hello, world" && sh "$AGENTKIT_VERIFIER_DIR/answer.sh"
  files:
    answer.sh: test "$AGENTKIT_ANSWER" = "hello, world"
solution:
  command: sed -i s/helo/hello/ greet.sh && sh greet.sh
"""


def fixer(messages: Sequence[Message], think: bool) -> AssistantTurn:
    """Read the script and run it in parallel, edit it, run it again, and submit its actual output."""
    said = sum(isinstance(message, AssistantMessage) for message in messages)
    seen = [message.content for message in messages if isinstance(message, ToolMessage)]
    plan: list[list[tuple[str, dict[str, str]]]] = [
        [("read_file", {"path": "greet.sh"}), ("bash", {"command": "sh greet.sh"})],
        [("edit_file", {"path": "greet.sh", "old": "helo", "new": "hello"})],
        [("bash", {"command": "sh greet.sh"})],
        [("submit", {"answer": seen[-1] if seen else ""})],
    ]
    return AssistantTurn("I look at what it prints." if think else None, calls=plan[said])


def check_record(run: RunDirectory, tokenizer: Tokenizer) -> None:
    """Check properties that hold for every trial of any model: ids are complete, masked, counted and reproducible."""
    for trial in run.trials:
        trajectory = run.trajectory(trial)
        assert trajectory is not None and trial.backend == "process"
        assert rebuild_token_ids(trajectory, tokenizer) == trajectory.token_ids
        assert sum(trajectory.loss_mask) == trial.usage.sampled_tokens
        assert trial.usage.forced_tokens == sum(
            len(segment.ids) for segment in trajectory.segments if segment.kind == "forced"
        )
        logprobs = [value for value, mask in zip(trajectory.logprobs, trajectory.loss_mask, strict=True) if mask]
        assert all(value is not None and value <= 1e-4 for value in logprobs)
        assert f'"id":"{trial.trial}"' in render_report(run, decode=tokenizer.decode)


@pytest.mark.sandbox
@pytest.mark.skipif(PROCESS is not None, reason=f"no process sandbox: {PROCESS}")
def test_a_scripted_agent_takes_a_task_through_every_room(tmp_path: Path) -> None:
    (tmp_path / "task.yaml").write_text(TASK)
    suite = load_suite(str(tmp_path / "task.yaml"))
    tokenizer = Tokenizer.from_json(build_tokenizer([TASK], phrases=[], vocab_size=600))
    model = ScriptedModel(fixer, tokenizer)
    evaluation = EvalRun(suite, model, tmp_path / "run", model_name="scripted", backend="process")
    run = anyio.run(evaluation.execute)
    trial = run.trials[0]
    assert (trial.reward, trial.answer, trial.failure, trial.error) == (1.0, "hello, world", None, None)
    assert (trial.usage.turns, trial.usage.calls, trial.usage.forced_tokens) == (4, 5, 0)
    trajectory = run.trajectory(trial)
    assert trajectory is not None
    turns = [message for message in trajectory.messages if isinstance(message, AssistantMessage)]
    assert [bool(turn.reasoning) for turn in turns] == [True, False, False, False]
    results = [message.content for message in trajectory.messages if isinstance(message, ToolMessage)]
    assert results[:4] == ['echo "helo, world"\n', "helo, world", "Replaced 1 occurrence in greet.sh", "hello, world"]
    check_record(run, tokenizer)
    assert str(estimate(scores_by_task(run.trials))) == "1.000"


@pytest.mark.sandbox
@pytest.mark.skipif(PROCESS is not None, reason=f"no process sandbox: {PROCESS}")
@pytest.mark.skipif(not TINY, reason="the packaged model is not trained in this checkout")
def test_the_tiny_model_takes_the_demo_through_every_room(tmp_path: Path) -> None:
    arguments = ["demo", "--seed", "20261123", "--tasks", "12", "--out", str(tmp_path / "run")]
    shown = typer.testing.CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert shown.exit_code == 0, shown.output
    run = RunDirectory.open(tmp_path / "run")
    solved = sum(trial.solved for trial in run.trials)
    assert shown.stdout.splitlines()[-1] == f"solved {solved}/12"
    assert (tmp_path / "run" / "report.html").exists()
    assert [trial.failure for trial in run.trials if trial.failure in ("task", "infrastructure")] == []

    engine = Engine.load("tiny")
    check_record(run, engine.tokenizer)
    trajectory = run.trajectory(max(run.trials, key=lambda trial: trial.usage.turns))
    assert trajectory is not None
    recomputed = engine.logits(trajectory.token_ids).log_softmax(-1)
    for position, (token, logprob) in enumerate(zip(trajectory.token_ids, trajectory.logprobs, strict=True)):
        if logprob is not None:
            assert recomputed[position - 1, token].item() == pytest.approx(logprob, abs=2e-3)
