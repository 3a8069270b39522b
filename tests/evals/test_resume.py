"""A run that was interrupted at any byte is resumed: finished trials are kept, and none is counted twice."""

from __future__ import annotations

import contextlib
import os
import random
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.conftest import WaitUntil
from tests.engine_proxy import EngineProxy

from agentkit.errors import TrajectoryFormatError
from agentkit.messages import Message
from agentkit.models.scripted import AssistantTurn, Policy, ScriptedModel
from agentkit.task import Task
from agentkit.trajectory import Trajectory
from agentkit_engine.chat import Tokenizer
from agentkit_engine.sampling_params import SamplingParams
from agentkit_environments import available_backends
from agentkit_evals.errors import OutputError, RunDirectoryError
from agentkit_evals.record import RunDirectory, TrialLog, attempt_path, patch_path, trajectory_path
from agentkit_evals.report import render_report
from agentkit_evals.resume import suite_of
from agentkit_evals.run import EvalRun, TrialActed, TrialStarted, Update
from agentkit_evals.suite import Case, Suite
from agentkit_evals.verify import Backend

MakeTask = Callable[..., Task]
MakeScript = Callable[..., Policy]
MakeRun = Callable[..., EvalRun]
DOCKER = available_backends()["docker"]


def figures(run: RunDirectory) -> dict[str, Any]:
    """Return everything about the trials of a complete run that a repetition reproduces: all but times."""
    found: dict[str, Any] = {}
    for trial in run.trials:
        trajectory = run.trajectory(trial)
        assert trajectory is not None and trajectory.outcome is not None
        usage = replace(trial.usage, tool_time_s=0.0, wall_time_s=0.0)
        found[trial.trial] = (
            trial.reward,
            trial.answer,
            trial.status,
            usage,
            trajectory.token_ids,
            trajectory.messages,
        )
    assert run.complete and len(found) == len(run.trials)
    return found


def check_files(run: RunDirectory) -> None:
    """Open every file of a run. A file that was cut before the end of its first line holds no record."""
    for file in run.path.glob("**/*.jsonl"):
        if file.name != "trials.jsonl":
            try:
                Trajectory.load(file)
            except TrajectoryFormatError:
                assert b"\n" not in file.read_bytes() and file.parent.parent.name == "attempts"


@pytest.fixture(scope="module")
def suite() -> Suite:
    task = {
        "instruction": "Submit the number in n.txt.",
        "environment": {"files": {"n.txt": "42\n"}},
        "verifier": {"command": 'test "$AGENTKIT_ANSWER" = 42'},
    }
    return Suite("numbers", tuple(Case(Task.model_validate({"id": name, **task}), "f") for name in ("a", "b")))


@pytest.fixture(scope="module")
def begin(suite: Suite, tokenizer: Tokenizer) -> Callable[..., EvalRun]:
    """Function that makes an evaluation in a directory. Its agents read in their first turn and write in the second."""

    def policy(messages: Sequence[Message], think: bool) -> AssistantTurn:
        turns: list[list[tuple[str, dict[str, Any]]]] = [
            [("list_dir", {}), ("read_file", {"path": "n.txt"})],
            [("bash", {"command": "cat n.txt >> m.txt; cat m.txt"})],
            [("submit", {"answer": messages[-1].content.strip()})],
        ]
        said = sum(message.role == "assistant" for message in messages)
        return AssistantTurn("Look." if think else None, calls=turns[said])

    def make(path: Path, **options: Any) -> EvalRun:
        settings = {"model_name": "scripted", "backend": "unsafe-local", "epochs": 2, "concurrency": 1, **options}
        return EvalRun(settings.pop("suite", suite), ScriptedModel(policy, tokenizer), path, **settings)

    return make


@pytest.fixture(scope="module")
def whole(begin: Callable[..., EvalRun], tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    """A run that was not interrupted."""
    return anyio.run(begin(tmp_path_factory.mktemp("runs") / "whole").execute)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=15)
@given(place=st.floats(0, 1), trajectory_place=st.floats(0, 1))
def test_a_run_that_was_cut_at_any_byte(
    begin: Callable[..., EvalRun], whole: RunDirectory, tmp_path: Path, place: float, trajectory_place: float
) -> None:
    """The trial in flight goes on after its first turn, which only reads, or starts again. Nothing is lost.

    It also starts again if its agent had ended: its files were not scored, and are gone.
    """
    path = tmp_path / "run"
    shutil.rmtree(path, ignore_errors=True)
    shutil.copytree(whole.path, path)
    file = path / "trials.jsonl"
    data = file.read_bytes()
    kept = data[: round(place * len(data))]
    file.write_bytes(kept)
    finished = RunDirectory.open(path).trials
    was = complete = b""
    for number, trial in enumerate(whole.trials[len(finished) :]):
        record = trajectory_path(path, trial.trial)
        if number:
            record.unlink()
        else:
            complete = record.read_bytes()
            was = complete[: round(trajectory_place * len(complete))]
            record.write_bytes(was)
    resumed = anyio.run(begin(path, resume=True).execute)
    assert figures(resumed) == figures(whole)
    assert file.read_bytes().startswith(kept[: kept.rfind(b"\n") + 1]) and resumed.trials[: len(finished)] == finished
    torn = path / "trials.torn"
    assert (torn.read_bytes()[:-1] if torn.exists() else b"") == kept[kept.rfind(b"\n") + 1 :]
    again = {trial.trial: trial.attempt for trial in resumed.trials if trial.attempt > 1}
    for name in [trial.trial for trial in whole.trials[len(finished) :]][:1]:  # the trial in flight
        keeps_a_turn = was != complete and b'"turn_finished"' in was[: was.rfind(b"\n") + 1]
        assert again == ({} if keeps_a_turn else {name: 2})
        before, after = (Trajectory.load(trajectory_path(run.path, name)).header.id for run in (whole, resumed))
        assert (before == after) == keeps_a_turn
        assert keeps_a_turn or attempt_path(path, name, 1).read_bytes() == was
    assert len(resumed.lock.resumed) == 1 and resumed.lock.created == whole.lock.created
    check_files(resumed)


CHILD = """
import sys
from pathlib import Path
import anyio
from agentkit.models.scripted import AssistantTurn, ScriptedModel
from agentkit.task import Task
from agentkit_engine.chat import Tokenizer
from agentkit_engine.training.tokenizer import build_tokenizer
from agentkit_evals.run import EvalRun
from agentkit_evals.suite import Case, Suite

def policy(messages, think):
    said = sum(message.role == "assistant" for message in messages)
    if said == 0:
        return AssistantTurn("Look.", calls=[("list_dir", {}), ("search", {"pattern": "x"})])
    if said < 5:
        return AssistantTurn("Go on." if think else None, calls=[("bash", {"command": f"echo {said} >> log; cat log"})])
    return AssistantTurn(calls=[("submit", {"answer": messages[-1].content})])

tasks = [
    Task.model_validate({"id": f"t{i}", "instruction": "Count.", "verifier": {"command": "test $(wc -l < log) = 4"}})
    for i in range(3)
]
tokenizer = Tokenizer.from_json(build_tokenizer(["hello"], phrases=[], vocab_size=600))
path = Path(sys.argv[1])
run = EvalRun(Suite("s", tuple(Case(task, "f") for task in tasks)), ScriptedModel(policy, tokenizer), path, epochs=2,
              model_name="scripted", backend="unsafe-local", concurrency=2, resume=(path / "run.json").exists())
print("ready", flush=True)
anyio.run(run.execute)
"""


def start(path: Path, temporary: Path) -> subprocess.Popen[bytes]:
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, path],
        stdout=subprocess.PIPE,
        env={**os.environ, "OMP_NUM_THREADS": "1", "TMPDIR": str(temporary)},
    )
    assert child.stdout is not None and child.stdout.readline() == b"ready\n"
    return child


def check_kills(tmp_path: Path, kills: int) -> None:
    """Kill a run at random moments and resume it, and begin a new one whenever it is complete."""
    with start(tmp_path / "whole", tmp_path) as child:
        begun = time.monotonic()
        assert child.wait() == 0
        duration_s = time.monotonic() - begun
    expected = figures(RunDirectory.open(tmp_path / "whole"))
    rng = random.Random(7)
    done = 0
    path = tmp_path / "run0"
    while done < kills:
        with start(path, tmp_path) as child:
            try:
                child.wait(rng.uniform(0, duration_s / 2))
            except subprocess.TimeoutExpired:
                child.kill()
                done += 1
        if (path / "run.json").exists():
            opened = RunDirectory.open(path)
            check_files(opened)
            assert not opened.complete or figures(opened) == expected
        if child.returncode == 0 or not (path / "run.json").exists():
            path = tmp_path / f"run{done}-{child.returncode}"
    with start(path, tmp_path) as child:
        assert child.wait() == 0
    assert figures(RunDirectory.open(path)) == expected


def test_sigkill_at_random_moments(tmp_path: Path) -> None:
    check_kills(tmp_path, 4)


@pytest.mark.hostile
def test_sigkill_at_fifty_random_moments(tmp_path: Path) -> None:
    check_kills(tmp_path, 50)


def test_a_trial_that_the_machine_broke_runs_again(
    make_run: MakeRun, number_task: MakeTask, script: MakeScript, solves: Policy
) -> None:
    """Its first attempt is kept and not counted. Failures of the model and of the task are final."""
    broken = True

    def policy(messages: Sequence[Message], think: bool) -> Any:
        if broken:
            raise RuntimeError("the engine is on fire")
        return solves(messages, think)

    pairs = [
        (number_task("breaks"), policy),
        (number_task("wrong"), script([("submit", {"answer": "41"})])),
        (number_task("defect", environment={"setup": ["exit 3"]}), solves),
    ]
    first = anyio.run(make_run(*pairs, concurrency=1).execute)
    assert {trial.task: trial.failure for trial in first.trials} == {
        "breaks": "infrastructure",
        "wrong": "model",
        "defect": "task",
    }
    anyio.run(make_run(*pairs, resume=True).execute)  # the machine is still broken
    broken = False
    heard: list[Update] = []
    run = anyio.run(make_run(*pairs, resume=True, listener=heard.append).execute)
    assert [update.trial for update in heard if isinstance(update, TrialStarted)] == ["breaks.0"]
    assert [(trial.task, trial.failure, trial.attempt) for trial in run.trials] == [
        *(("wrong", "model", 1), ("defect", "task", 1), ("breaks", None, 3))
    ]
    assert run.complete and len((run.path / "trials.jsonl").read_text().splitlines()) == 5
    for attempt in (1, 2):
        outcome = Trajectory.load(attempt_path(run.path, "breaks.0", attempt)).outcome
        assert outcome is not None and outcome.status == "error"
    assert "attempts repeated" in render_report(run) and "attempts repeated" not in render_report(first)
    lines = (run.path / "trials.jsonl").read_text().splitlines()
    (run.path / "trials.jsonl").write_text("\n".join([*lines, lines[-1]]) + "\n")
    with pytest.raises(RunDirectoryError, match=r"trials\.jsonl:6: not a trial: trial breaks\.0 occurs twice"):
        RunDirectory.open(run.path)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"epochs": 3}, "epochs 2, given 3"),
        ({"seed": 1}, "seed 0, given 1"),
        ({"model_name": "other"}, "model 'scripted', given 'other'"),
        ({"backend": None}, "backend 'unsafe-local', given None"),
        ({"sampling": SamplingParams(top_k=5)}, "top_k None, given 5"),
    ],
    ids=lambda value: str(value),
)
def test_other_settings_are_refused_by_name(
    begin: Callable[..., EvalRun], whole: RunDirectory, options: dict[str, Any], named: str
) -> None:
    before = {file: file.read_bytes() for file in whole.path.glob("**/*") if file.is_file()}
    with pytest.raises(RunDirectoryError, match=f"was started with {named}; a resumed run keeps its settings"):
        anyio.run(begin(whole.path, resume=True, **options).execute)
    assert {file: file.read_bytes() for file in whole.path.glob("**/*") if file.is_file()} == before


def test_other_tasks_and_weights_are_refused_by_name(
    begin: Callable[..., EvalRun], whole: RunDirectory, suite: Suite
) -> None:
    first, second = suite.cases
    changed = Case(first.task.model_copy(update={"instruction": "Do it."}), "f")
    for cases, problem in (
        ((changed, second), "task a differs"),
        ((first,), "task b differs"),
        ((second, first), "the order of the tasks differs"),
    ):
        with pytest.raises(RunDirectoryError, match=f"was started with other tasks: {problem}"):
            anyio.run(begin(whole.path, resume=True, suite=Suite("numbers", cases)).execute)
    run = begin(whole.path, resume=True)
    run.model.fingerprint = "of other weights"  # type: ignore[union-attr]
    with pytest.raises(RunDirectoryError, match="was started with other weights of the model scripted"):
        anyio.run(run.execute)
    assert suite_of(whole.lock) == suite


def test_what_is_not_a_run_cannot_be_resumed(begin: Callable[..., EvalRun], tmp_path: Path) -> None:
    with pytest.raises(RunDirectoryError, match=r"is not a run: it has no run\.json"):
        anyio.run(begin(tmp_path, resume=True).execute)
    assert list(tmp_path.iterdir()) == []


def test_a_run_has_one_writer(begin: Callable[..., EvalRun], tmp_path: Path) -> None:
    heard: list[str] = []

    def listen(update: Update) -> None:
        if isinstance(update, TrialActed) and not heard:
            with pytest.raises(RunDirectoryError) as caught:
                TrialLog(tmp_path / "run")
            heard.append(str(caught.value))

    anyio.run(begin(tmp_path / "run", listener=listen).execute)
    assert heard == [f"{tmp_path / 'run'} is in use by another process; wait until that has ended, or stop it"]


def test_a_record_that_cannot_be_written_is_an_error(whole: RunDirectory, tmp_path: Path) -> None:
    """The part that was written is set aside when the run is next opened for writing."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    with TrialLog(tmp_path) as log:
        resource.setrlimit(resource.RLIMIT_FSIZE, (10, before[1]))
        try:
            with pytest.raises(OutputError, match=r"trials\.jsonl cannot be written: File too large; make room"):
                log.append(whole.trials[0])
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
    with TrialLog(tmp_path) as log:
        log.append(whole.trials[0])
    line = whole.trials[0].model_dump_json().encode() + b"\n"
    assert (tmp_path / "trials.jsonl").read_bytes() == line
    assert (tmp_path / "trials.torn").read_bytes() == line[:10] + b"\n"


def test_a_log_that_leads_elsewhere_is_not_written(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").touch()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "trials.jsonl").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError, match="symbolic link"):
        TrialLog(tmp_path / "run")


def interrupt(run: EvalRun, turn: int) -> None:
    """Start an evaluation, and cancel it while a command of this turn runs."""

    async def execute() -> None:
        with anyio.CancelScope() as scope:

            def listen(update: Update) -> None:
                if isinstance(update, TrialActed) and update.turn == turn and update.doing == "bash":
                    scope.cancel()

            run.listener = listen
            await run.execute()
        assert scope.cancelled_caught

    anyio.run(execute)


WAITS = [("bash", {"command": "sleep 60"})]


def test_an_interrupted_trial_goes_on_in_its_files(make_run: MakeRun, script: MakeScript, backend: Backend) -> None:
    """The task's setup is not repeated, and each command has run once in the files that are scored."""
    fields = {
        "instruction": "Count.",
        "environment": {"files": {"log": "0\n"}, "setup": ["echo setup >> log"], "snapshots": True},
        "verifier": {"command": 'test "$(cat log)" = "0\nsetup\n1\n2"'},
    }
    turns = [("bash", {"command": "echo 1 >> log"})], [("bash", {"command": "echo 2 >> log"})]
    task = Task.model_validate({"id": "t", **fields})
    interrupt(make_run((task, script(*turns, WAITS)), backend=backend), turn=3)
    heard: list[Update] = []
    pair = (task, script(*turns, [("submit", {"answer": "done"})]))
    run = anyio.run(make_run(pair, backend=backend, resume=True, listener=heard.append).execute)
    assert heard[0] == TrialStarted("t.0", attempt=1, kept_turns=2)
    [trial] = run.trials
    assert (trial.reward, trial.attempt, trial.usage.turns, trial.backend) == (1.0, 1, 3, backend)
    assert [file.name for file in (run.path / "trajectories").iterdir() if "snapshot" in file.name] == []


@pytest.mark.parametrize("damage", ["no snapshot", "damaged snapshot"])
def test_a_trial_whose_files_are_lost_starts_again(make_run: MakeRun, script: MakeScript, damage: str) -> None:
    """The attempt that was interrupted is kept, and its snapshot is removed."""
    first = [("bash", {"command": "echo 1 >> log"})]
    fields = {
        "instruction": "Count.",
        "environment": {"snapshots": damage != "no snapshot"},
        "verifier": {"command": "test $(wc -l < log) = 1"},
    }
    task = Task.model_validate({"id": "t", **fields})
    run = make_run((task, script(first, WAITS)))
    interrupt(run, turn=2)
    record = trajectory_path(run.directory, "t.0").read_bytes()
    for snapshot in run.directory.glob("trajectories/*.snapshot"):
        snapshot.write_bytes(b"x")
    heard: list[Update] = []
    pair = (task, script(first, [("submit", {"answer": "done"})]))
    resumed = anyio.run(make_run(pair, resume=True, listener=heard.append).execute)
    assert isinstance(started := heard[0], TrialStarted)
    assert (started.attempt, started.kept_turns) == (2, 0)
    assert (
        "its first turn is done again" if damage == "no snapshot" else "not a complete snapshot"
    ) in started.why_again
    assert [(trial.reward, trial.attempt) for trial in resumed.trials] == [(1.0, 2)]
    assert attempt_path(run.directory, "t.0", 1).read_bytes() == record
    assert not list(run.directory.glob("**/*.snapshot"))


ENDED: dict[str, dict[str, Any]] = {
    "files saved": {
        "environment": {"snapshots": True},
        "verifier": {"command": 'test "$AGENTKIT_ANSWER$(cat log)" = yes1'},
    },
    "no files scored": {"verifier": {"calls": [{"bash": {"command": ["echo 1 >> log"]}}]}},
    "files gone": {"verifier": {"command": "test -e log"}},
}
"""Tasks whose only missing part is the score."""


@pytest.mark.parametrize("case", ENDED)
def test_a_trial_whose_agent_had_ended_is_scored(
    make_run: MakeRun, script: MakeScript, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    """Its agent does not run again, unless the files that would be scored are gone."""
    task = Task.model_validate({"id": "t", "instruction": "Count.", **ENDED[case]})
    turns = [("bash", {"command": "echo 1 >> log"})], [("submit", {"answer": "yes"})]

    async def execute() -> None:
        with anyio.CancelScope() as scope, monkeypatch.context() as patch:

            async def die(*_: object, **__: object) -> None:
                scope.cancel()
                await anyio.sleep_forever()

            patch.setattr("agentkit_evals.run.verify", die)
            await make_run((task, script(*turns))).execute()

    anyio.run(execute)
    heard: list[Update] = []
    again = script(*turns) if case == "files gone" else script()
    run = anyio.run(make_run((task, again), resume=True, listener=heard.append).execute)
    assert isinstance(started := heard[0], TrialStarted)
    assert started.has_ended == (case != "files gone")
    assert started.why_again == (
        "its agent had ended, but the files that are scored were not saved; --snapshots saves them"
        if case == "files gone"
        else ""
    )
    [trial] = run.trials
    assert (trial.reward, trial.attempt) == (1.0, 2 if case == "files gone" else 1)
    assert trial.usage.turns == (1 if case == "no files scored" else 2)
    assert not list(run.path.glob("**/*.snapshot"))
    record = run.trajectory(trial)
    assert record is not None and record.outcome is not None and trial.status == record.outcome.status


def test_a_change_is_scored_against_the_start_of_the_trial(make_run: MakeRun, script: MakeScript) -> None:
    """A task that is scored by tests: the patch has the changes from before the interruption, too."""
    setup = "git init -q && git -c user.name=a -c user.email=a@b commit -q --allow-empty -m a"
    fields = {
        "instruction": "Write.",
        "environment": {"files": {"old.txt": "0\n"}, "setup": [setup], "snapshots": True},
        "verifier": {
            "fail_to_pass": ["t.py::a"],
            "command": "cat old.txt one.txt two.txt > /dev/null && echo PASSED t.py::a",
        },
    }
    turns = [[("write_file", {"path": f"{name}.txt", "content": "1\n"})] for name in ("one", "two")]
    task = Task.model_validate({"id": "t", **fields})
    interrupt(make_run((task, script(*turns, WAITS))), turn=3)
    pair = (task, script(*turns, [("submit", {"answer": "done"})]))
    run = anyio.run(make_run(pair, resume=True).execute)
    patch = patch_path(run.path, "t.0").read_text()
    assert "+++ b/one.txt" in patch and "+++ b/two.txt" in patch and "old.txt" not in patch
    assert [(trial.reward, trial.attempt) for trial in run.trials] == [(1.0, 1)]


def test_the_costs_of_all_attempts_count(begin: Callable[..., EvalRun], whole: RunDirectory, tmp_path: Path) -> None:
    """An attempt that was interrupted has the usage of its finished turns."""
    path = tmp_path / "run"
    shutil.copytree(whole.path, path)
    lines = (path / "trials.jsonl").read_bytes().splitlines(keepends=True)
    (path / "trials.jsonl").write_bytes(b"".join(lines[:-1]))
    record = trajectory_path(path, whole.trials[-1].trial)
    turns = record.read_bytes().splitlines(keepends=True)
    record.write_bytes(b"".join(turns[: next(index for index, line in enumerate(turns) if b'"turn_started"' in line)]))
    assert RunDirectory.open(path).usage.turns == whole.usage.turns - 3
    resumed = anyio.run(begin(path, resume=True).execute)
    assert resumed.usage.turns == whole.usage.turns
    earlier = attempt_path(path, whole.trials[-1].trial, 1)
    earlier.write_bytes(
        b"".join(turns[: next(index for index, line in enumerate(turns) if b'"turn_finished"' in line) + 1])
    )
    assert RunDirectory.open(path).usage.turns == whole.usage.turns + 1


@pytest.mark.docker
@pytest.mark.skipif(DOCKER is not None, reason=f"no Docker: {DOCKER}")
def test_an_engine_that_goes_away_interrupts_a_run_that_can_be_resumed(
    number_task: MakeTask, make_run: MakeRun, script: MakeScript, tmp_path: Path, wait_until: WaitUntil
) -> None:
    """The first trial is kept; the one with a call in flight, and the one after it, could not be scored."""
    read = [[("read_file", {"path": "n.txt"})], [("submit", {"answer": "42"})]]
    sleep = f"sleep {1_000_000 + os.getpid()}"
    pairs = [
        (number_task("first"), script(*read)),
        (number_task("cut"), script([("bash", {"command": sleep})], *read)),
        (number_task("last"), script(*read)),
    ]
    settings: dict[str, Any] = {"backend": "docker", "concurrency": 1, "directory": tmp_path / "run"}
    proxy = EngineProxy(tmp_path / "engine", "/var/run/docker.sock")

    def sleeps() -> bool:
        return subprocess.run(["pgrep", "-fx", sleep], stdout=subprocess.DEVNULL).returncode == 0

    def cut() -> None:
        wait_until(sleeps, sleep)
        proxy.stop()

    async def interrupted() -> RunDirectory:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(anyio.to_thread.run_sync, cut)
            await make_run(*pairs, **settings).execute()
        return RunDirectory.open(tmp_path / "run")

    with contextlib.closing(proxy), pytest.MonkeyPatch.context() as patch:
        patch.setenv("DOCKER_HOST", f"unix://{tmp_path / 'engine'}")
        run = anyio.run(interrupted)
        assert [(trial.task, trial.reward, trial.failure) for trial in run.trials] == [
            ("first", 1.0, None),
            ("cut", None, "infrastructure"),
            ("last", None, "infrastructure"),
        ]
        assert "the Docker engine" in (run.trials[1].error or "") and run.trials[2].error
        record = run.trajectory(run.trials[1])
        assert record is not None and record.messages[-1].role == "tool" and record.outcome is not None

        proxy.start_again()
        pairs[1] = (pairs[1][0], script(*read))
        resumed = anyio.run(make_run(*pairs, **settings, resume=True).execute)
    assert resumed.complete and resumed.trials[0] == run.trials[0]
    assert {trial.task: (trial.reward, trial.attempt) for trial in resumed.trials} == {
        "first": (1.0, 1),
        "cut": (1.0, 2),
        "last": (1.0, 2),
    }
    wait_until(lambda: not sleeps(), "the end of the lost container")
