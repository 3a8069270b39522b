"""Runs are recorded as they happen, and a failure of the machine never counts against the model."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anyio
import pytest

from agentkit.agent import DEFAULT_SYSTEM
from agentkit.messages import SystemMessage
from agentkit.models.scripted import Policy
from agentkit.task import Task
from agentkit.trajectory import Trajectory
from agentkit_environments import Environment, open_environment, reap
from agentkit_evals.errors import RunDirectoryError
from agentkit_evals.record import RunDirectory, scores_by_task, trajectory_path
from agentkit_evals.run import EvalRun, TrialActed, TrialFinished, TrialStarted, Update, trial_seed
from agentkit_evals.verify import Backend

MakeTask = Callable[..., Task]
MakeScript = Callable[..., Policy]
Evaluate = Callable[..., RunDirectory]


def test_a_solved_trial_and_its_record(evaluate: Evaluate, number_task: MakeTask, solves: Policy) -> None:
    run = evaluate((number_task(), solves), epochs=2, seed=7, concurrency=1)
    assert run.complete and [trial.trial for trial in run.trials] == ["number.0", "number.1"]
    trial = run.trials[0]
    assert (trial.solved, trial.reward, trial.answer, trial.status) == (True, 1.0, "42", "submitted")
    assert (trial.family, trial.backend, trial.failure, trial.error) == ("numbers", "unsafe-local", None, None)
    assert (trial.usage.turns, trial.usage.calls, trial.usage.forced_tokens) == (2, 2, 0)
    trajectory = run.trajectory(trial)
    assert trajectory is not None and trajectory.outcome is not None
    assert len(trajectory.token_ids) == trial.usage.prompt_tokens + trial.usage.sampled_tokens
    assert trajectory.header.metadata["trial"] == "number.0"
    assert trajectory.header.sampling.seed == trial_seed(7, "number.0") != trial_seed(7, "number.1")
    assert run.lock.tasks == [number_task()]


def test_sandboxes_are_opened_ahead_and_each_is_used_once(
    make_run: Callable[..., EvalRun],
    number_task: MakeTask,
    solves: Policy,
    backend: Backend,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    opened: list[Environment] = []
    tasks: list[str | None] = []

    async def note(*arguments: Any, **options: Any) -> Environment:
        tasks.append(anyio.get_current_task().name)
        opened.append(await open_environment(*arguments, **options))
        return opened[-1]

    monkeypatch.setattr("agentkit_environments.pool.open_environment", note)
    scored_by_calls = number_task("calls", environment={}, verifier={"calls": "any"}, solution=None)
    run = make_run((number_task(), solves), (scored_by_calls, solves), epochs=2, backend=backend, concurrency=1, warm=2)
    trials = anyio.run(run.execute).trials
    assert [trial.reward for trial in trials] == [1.0] * 4
    ahead = [each for each, task in zip(opened, tasks, strict=True) if task == "environment opened ahead"]
    assert len(ahead) == 4, "two trials with a verifier; those that are scored by calls need no sandbox"
    assert {each.backend for each in ahead} == {backend} and {each.run_id for each in opened} == {run.run_id}
    assert anyio.run(reap, run.run_id) == 0


def test_an_answer_must_fit_the_output_schema_of_its_task(
    evaluate: Evaluate, number_task: MakeTask, script: MakeScript
) -> None:
    form = {"tools": ["read_file"], "output_schema": {"type": "integer"}}
    run = evaluate(
        (number_task("fits", **form), script([("read_file", {"path": "n.txt"})], "42")),
        (number_task("text", **form), script("It is 42.")),
    )
    assert {trial.task: (trial.solved, trial.status) for trial in run.trials} == {
        "fits": (True, "answered"),
        "text": (False, "invalid_output"),
    }
    trajectory = run.trajectory(run.trials[0])
    assert trajectory is not None and trajectory.messages[0] == SystemMessage(DEFAULT_SYSTEM, {"type": "integer"})


def test_a_trial_and_its_verifier_on_each_backend(
    make_run: Callable[..., EvalRun], number_task: MakeTask, script: MakeScript, backend: Backend
) -> None:
    """The verifier gets the agent's files in a sandbox of the same kind, and no sandbox remains."""
    verifier = {"command": 'test "$AGENTKIT_ANSWER" = 42 && test "$(cat made/n.txt)" = 43', "timeout_s": 20.0}
    works = script(
        [("bash", {"command": "mkdir made && sed s/42/43/ n.txt > made/n.txt"})], [("submit", {"answer": "42"})]
    )
    talks = script([("submit", {"answer": "42"})])
    run = make_run(
        (number_task("works", verifier=verifier), works),
        (number_task("talks", verifier=verifier), talks),
        backend=backend,
    )
    trials = {trial.task: (trial.reward, trial.failure, trial.backend) for trial in anyio.run(run.execute).trials}
    assert trials == {"works": (1.0, None, backend), "talks": (0.0, "model", backend)}
    assert anyio.run(reap, run.run_id) == 0


def test_the_four_failures_are_distinguished(
    evaluate: Evaluate, number_task: MakeTask, script: MakeScript, solves: Policy
) -> None:
    def task(name: str, **changes: Any) -> Task:
        return number_task(name, **changes)

    look = script([("list_dir", {})])
    escape = script([("bash", {"command": "ln -s /etc/passwd out"})], [("submit", {"answer": "42"})])
    nothing = {"verifier": {"command": "not-a-program"}}
    run = evaluate(
        (task("wrong"), script([("submit", {"answer": "41"})])),
        (task("escapes"), escape),
        (task("loops", agent={"max_turns": 2}), look),
        (task("loops-but-right", agent={"max_turns": 1}, verifier={"command": "true"}), look),
        (task("broken", environment={"setup": ["echo no disk >&2; exit 3"]}), solves),
        (task("no-verifier", **nothing), solves),
        (task("no-proof", **nothing, solution=None), solves),
        (task("no-sandbox", environment={"image": "needs-docker"}), solves),
        (task("solved"), solves),
        concurrency=3,
    )
    found = {trial.task: (trial.failure, trial.reward, trial.status) for trial in run.trials}
    assert found == {
        "wrong": ("model", 0.0, "submitted"),
        "escapes": (None, 1.0, "submitted"),
        "loops": ("limit", 0.0, "limit"),
        "loops-but-right": (None, 1.0, "limit"),
        "broken": ("task", None, None),
        "no-verifier": ("infrastructure", None, "submitted"),
        "no-proof": ("model", 0.0, "submitted"),
        "no-sandbox": ("infrastructure", None, None),
        "solved": (None, 1.0, "submitted"),
    }
    errors = {trial.task: trial.error for trial in run.trials}
    assert errors["broken"] == "task broken: setup command 'echo no disk >&2; exit 3' exited 3: no disk"
    assert str(errors["no-verifier"]).startswith("VerifierError: task no-verifier: the verifier 'not-a-program' could")
    assert str(errors["no-sandbox"]).startswith("SandboxUnavailableError: ")
    assert "The same happens on the task's own solution" in str(errors["no-verifier"])
    assert str(errors["no-proof"]).startswith("the verifier 'not-a-program' could not start")
    escaped = next(trial for trial in run.trials if trial.task == "escapes")
    assert escaped.dropped == ["'out': a link to an absolute path, '/etc/passwd'"]
    assert escaped.dropped[0] in escaped.verifier_output and escaped.error is None
    assert sorted(scores_by_task(run.trials)) == [[0.0], [0.0], [0.0], [1.0], [1.0], [1.0]]


def test_a_model_that_breaks_is_infrastructure(evaluate: Evaluate, number_task: MakeTask, solves: Policy) -> None:
    def breaks(messages: object, think: bool) -> Any:
        raise RuntimeError("the engine is on fire")

    run = evaluate((number_task("breaks"), breaks), (number_task("works"), solves), concurrency=1)
    assert [(trial.task, trial.failure, trial.status) for trial in run.trials] == [
        ("breaks", "infrastructure", "error"),
        ("works", None, "submitted"),
    ]
    assert run.trials[0].error == "RuntimeError: the engine is on fire"


def test_an_answer_with_an_unpaired_surrogate_is_scored(
    evaluate: Evaluate, number_task: MakeTask, script: MakeScript, solves: Policy
) -> None:
    half = script([("submit", {"answer": "half a pair: \ud800"})])
    run = evaluate((number_task("half"), half), (number_task("works"), solves))
    assert {trial.task: trial.solved for trial in run.trials} == {"half": False, "works": True}


def test_a_listener_gets_every_update(evaluate: Evaluate, number_task: MakeTask, solves: Policy) -> None:
    heard: list[Update] = []
    run = evaluate((number_task(), solves), listener=heard.append)
    assert heard == [
        TrialStarted("number.0"),
        TrialActed("number.0", 1, "thinking"),
        TrialActed("number.0", 1, "read_file"),
        TrialActed("number.0", 2, "answering"),
        TrialActed("number.0", 2, "submit"),
        TrialFinished(run.trials[0]),
    ]


def test_concurrency_is_bounded(evaluate: Evaluate, number_task: MakeTask, solves: Policy) -> None:
    running: set[str] = set()
    most = 0

    def listen(update: Update) -> None:
        nonlocal most
        if isinstance(update, TrialStarted):
            running.add(update.trial)
        elif isinstance(update, TrialFinished):
            running.remove(update.record.trial)
        most = max(most, len(running))

    run = evaluate(*((number_task(f"n{i}"), solves) for i in range(7)), concurrency=3, listener=listen)
    assert (most, len(run.trials), running) == (3, 7, set())


def test_a_cancelled_run_keeps_its_finished_trials(
    make_run: Callable[..., EvalRun], number_task: MakeTask, script: MakeScript, solves: Policy, tmp_path: Path
) -> None:
    hangs = script([("bash", {"command": "sleep 600"})])
    run = make_run((number_task("quick"), solves), (number_task("hangs"), hangs), concurrency=1)

    async def stop_while_it_hangs() -> None:
        async with anyio.create_task_group() as group:

            def listen(update: Update) -> None:
                if isinstance(update, TrialActed) and update.doing == "bash":
                    group.cancel_scope.cancel()

            run.listener = listen
            await run.execute()

    anyio.run(stop_while_it_hangs)
    kept = RunDirectory.open(tmp_path / "run")
    assert [trial.task for trial in kept.trials] == ["quick"] and not kept.complete
    outcome = Trajectory.load(trajectory_path(kept.path, "hangs.0")).outcome
    assert outcome is not None and outcome.status == "cancelled"


CHILD = """
import signal
import sys
from pathlib import Path
import anyio
from agentkit.models.scripted import AssistantTurn, ScriptedModel
from agentkit.task import Task
from agentkit_engine.chat import Tokenizer
from agentkit_engine.training.tokenizer import build_tokenizer
from agentkit_evals.run import EvalRun, TrialActed
from agentkit_evals.suite import Case, Suite

def policy(messages, think):
    if "quick" in messages[-1].content:
        return AssistantTurn(content="done")
    return AssistantTurn(calls=[("bash", {"command": "sleep 600"})])

def listen(update):
    if isinstance(update, TrialActed) and update.doing == "bash":
        print("hanging", flush=True)

signal.signal(signal.SIGINT, signal.default_int_handler)  # a background shell may have had it ignored
tasks = [Task.model_validate({"id": i, "instruction": i, "verifier": {"command": "true"}}) for i in ("quick", "slow")]
tokenizer = Tokenizer.from_json(build_tokenizer(["hello"], phrases=[], vocab_size=600))
run = EvalRun(Suite("s", tuple(Case(task, "f") for task in tasks)), ScriptedModel(policy, tokenizer), Path(sys.argv[1]),
              model_name="scripted", backend="unsafe-local", concurrency=1, listener=listen)
anyio.run(run.execute)
"""


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_the_directory_of_a_killed_run_opens(tmp_path: Path, how: signal.Signals) -> None:
    child = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(CHILD), str(tmp_path / "run")],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "OMP_NUM_THREADS": "1", "TMPDIR": str(tmp_path)},
    )
    with child:
        assert child.stdout is not None and child.stdout.readline() == b"hanging\n"
        child.send_signal(how)
    run = RunDirectory.open(tmp_path / "run")
    assert [trial.task for trial in run.trials] == ["quick"] and not run.complete
    outcome = Trajectory.load(trajectory_path(run.path, "slow.0")).outcome
    assert (outcome.status if outcome else None) == (None if how == signal.SIGKILL else "cancelled")


def test_an_incomplete_last_line_is_ignored(
    evaluate: Evaluate, number_task: MakeTask, solves: Policy, tmp_path: Path
) -> None:
    evaluate((number_task(), solves), epochs=2, concurrency=1)
    file = tmp_path / "run" / "trials.jsonl"
    file.write_bytes(file.read_bytes()[:-20])
    assert [trial.trial for trial in RunDirectory.open(tmp_path / "run").trials] == ["number.0"]


def test_directories_that_are_not_runs_are_refused(
    evaluate: Evaluate, number_task: MakeTask, solves: Policy, tmp_path: Path
) -> None:
    run = evaluate((number_task(), solves))
    with pytest.raises(RunDirectoryError, match="exists already; a run is never overwritten"):
        evaluate((number_task(), solves))
    with pytest.raises(RunDirectoryError, match=r"is not a run: it has no run\.json"):
        RunDirectory.open(tmp_path)
    lock = run.path / "run.json"
    text = lock.read_text()
    for broken, message in (
        (text.replace('"version": 4', '"version": 3'), "has run format 3; this agentkit reads format 4"),
        (text.replace('"epochs": 1', '"epochs": "x"'), "is damaged: "),
        (text[:-5], "cannot be read: "),
        ("[]", "is not an agentkit run"),
    ):
        lock.write_text(broken)
        with pytest.raises(RunDirectoryError, match=message):
            RunDirectory.open(run.path)
    lock.write_text(text)
    (run.path / "trials.jsonl").write_text("{}\n")
    with pytest.raises(RunDirectoryError, match=r"trials.jsonl:1: not a trial"):
        RunDirectory.open(run.path)


def test_bounds_are_checked(make_run: Callable[..., EvalRun], number_task: MakeTask, solves: Policy) -> None:
    with pytest.raises(ValueError, match=r"EvalRun\(epochs=\.\.\.\) must be positive, got 0"):
        make_run((number_task(), solves), epochs=0)
