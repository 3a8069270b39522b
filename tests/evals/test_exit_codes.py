"""`agentkit run` exits with 0 only if the job is solved; otherwise it prints the reason in one line."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import pytest
from rich.console import Console

from agentkit.agent import Agent
from agentkit.cli.ending import ExitCode
from agentkit.cli.run import Job, carry_out
from agentkit.limits import Limits
from agentkit.models.scripted import Policy, ScriptedModel
from agentkit.task import Task
from agentkit_engine.chat import Tokenizer

MakeScript = Callable[..., Policy]
SUBMIT = [("submit", {"answer": "3"})]


@pytest.mark.parametrize(
    ("turn", "verifier", "limits", "code", "why"),
    [
        (SUBMIT, None, {}, ExitCode.OK, None),
        ("It is done.", None, {}, ExitCode.OK, None),
        (SUBMIT, 'test "$AGENTKIT_ANSWER" = 3', {}, ExitCode.OK, None),
        (SUBMIT, 'test "$AGENTKIT_ANSWER" = 4', {}, ExitCode.UNSOLVED, "reward 0 is below 1"),
        (SUBMIT, 'echo 0.5 > "$AGENTKIT_REWARD_DIR/reward.txt"', {}, ExitCode.UNSOLVED, "reward 0.5 is below 1"),
        ("", None, {}, ExitCode.UNSOLVED, "no answer was given"),
        ([("list_dir", {})], None, {"max_turns": 1}, ExitCode.UNSOLVED, "the limit max_turns was reached"),
        ([("list_dir", {})], "true", {"max_turns": 1}, ExitCode.UNSOLVED, "the limit max_turns was reached"),
    ],
)
def test_run(
    turn: Any,
    verifier: str | None,
    limits: dict[str, Any],
    code: ExitCode,
    why: str | None,
    script: MakeScript,
    tokenizer: Tokenizer,
    capsys: pytest.CaptureFixture[str],
) -> None:
    task = Task.model_validate(
        {"id": "t", "instruction": "Do it.", **({"verifier": {"command": verifier}} if verifier else {})}
    )
    shown = io.StringIO()
    agent = Agent(ScriptedModel(script(turn), tokenizer), thinking="never", limits=Limits(**limits))
    job = Job(task, agent, "unsafe-local", None, None, Console(file=shown, width=200))
    assert carry_out(job, apply=False, as_json=False) == code
    assert capsys.readouterr().err == ("" if why is None else f"Not solved: {why}.\n")
    if verifier and "= 4" in verifier:
        assert "expected  4" in shown.getvalue() and "given     3" in shown.getvalue()
