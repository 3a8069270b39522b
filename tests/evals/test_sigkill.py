"""Real runs and evaluations are killed at seeded bytes and steps of what they write, and resumed with their snapshots.

One process imports everything once and forks a child for each run. The child counts the bytes that it writes with
`os.write` (all records) and its steps (synchronizing and renaming a file, copying a snapshot, and the two sides of an
effect outside the sandbox), and kills itself in the middle of the chosen byte's write, or before the chosen step.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from agentkit.errors import TrajectoryError
from agentkit.events import CallFinished, CallStarted, Outcome, TurnFinished
from agentkit.interrupted import NOT_STARTED, UNKNOWN
from agentkit.messages import ToolMessage
from agentkit.trajectory import Trajectory
from agentkit_evals.record import RunDirectory, trajectory_path

pytestmark = pytest.mark.hostile
SIGKILL = -9

SERVER = r"""
import json, os, signal, sys, traceback
from pathlib import Path
import anyio
from agentkit import Agent, AssistantTurn, ScriptedModel, Trajectory, TrajectoryError, TurnStarted, tool
from agentkit.models.scripted import packaged_tokenizer
from agentkit.saved import saved_snapshot
from agentkit.task import Task
from agentkit_environments import Snapshot, open_environment
from agentkit_evals.run import EvalRun
from agentkit_evals.suite import Case, Suite
from agentkit_tools import BUILTINS

counts = {"bytes": 0, "steps": 0}

def die():
    os.kill(os.getpid(), signal.SIGKILL)

def arm(unit, at):
    write = os.write
    def write_or_die(fd, data):
        data = bytes(data)
        left = at - counts["bytes"]
        if unit == "bytes" and left < len(data):
            write(fd, data[:left])
            die()
        counts["bytes"] += len(data)
        return write(fd, data)
    def stepping(call):
        def step(*args, **options):
            if unit == "steps" and counts["steps"] == at:
                die()
            counts["steps"] += 1
            return call(*args, **options)
        return step
    global step
    os.write = write_or_die
    os.fsync, os.replace, os.sendfile = map(stepping, (os.fsync, os.replace, os.sendfile))
    step = stepping(lambda: None)

def policy_of(turns):
    def policy(messages, think):
        said = sum(message.role == "assistant" for message in messages)
        return AssistantTurn(calls=turns[said])
    return policy

def run(path):
    @tool
    def buy(article: str) -> str:
        "Buy an article."
        step()
        with open(path / "ledger", "a") as ledger:
            ledger.write(article + "\n")
        step()
        return f"bought {article}"

    turns = [
        [("bash", {"command": "echo 1 >> log; cat log"})],
        [("buy", {"article": "bolt"})],
        [("list_dir", {})],
        [("bash", {"command": "echo 2 >> log; cat log"}), ("write_file", {"path": "a.txt", "content": "x"})],
        [("buy", {"article": "nut"}), ("buy", {"article": "screw"})],
        [("bash", {"command": "echo 3 >> log; cat log"})],
        [("submit", {"answer": "done"})],
    ]
    tools = [*(BUILTINS[name] for name in ("bash", "list_dir", "write_file", "submit")), buy]
    agent = Agent(ScriptedModel(policy_of(turns)), tools, thinking="never")
    record = path / "t.jsonl"

    async def main():
        history = None
        if record.exists():
            try:
                history = Trajectory.load(record)
            except TrajectoryError:
                pass
            if history is None or not any(isinstance(each, TurnStarted) for each in history.records):
                record.unlink()
                history = None
        saved = None if history is None else saved_snapshot(history)
        snapshot = None if saved is None else Snapshot.load(saved.path)
        async with await open_environment(backend="unsafe-local", snapshot=snapshot) as environment:
            if history is None:
                await agent.run("Go.", environment=environment, trajectory=record, save_snapshots=True)
            else:
                await agent.resume(history, environment=environment, world_turns=saved.turns, save_snapshots=True)
            found = await environment.exec("ls; cat log a.txt")
        (path / "world").write_text(found.stdout)

    anyio.run(main)

def evaluate(path):
    turns = [
        [("list_dir", {})],
        [("bash", {"command": "echo 1 >> log; cat log"})],
        [("bash", {"command": "echo 2 >> log"}), ("write_file", {"path": "a.txt", "content": "x"})],
        [("bash", {"command": "cat log"})],
        [("submit", {"answer": "done"})],
    ]
    verifier = {"command": 'test "$(echo *; cat log a.txt)" = "a.txt log\n1\n2\nx"'}
    environment = {"snapshots": True}
    tasks = [
        Task.model_validate({"id": f"t{i}", "instruction": "Go.", "verifier": verifier, "environment": environment})
        for i in range(3)
    ]
    suite = Suite("s", tuple(Case(task, "f") for task in tasks))
    run = EvalRun(suite, ScriptedModel(policy_of(turns)), path / "run", model_name="scripted", backend="unsafe-local",
                  concurrency=2, resume=(path / "run" / "run.json").exists())
    anyio.run(run.execute)

packaged_tokenizer()
for line in sys.stdin:
    what, path, unit, at = json.loads(line)
    child = os.fork()
    if child == 0:
        try:
            arm(unit, at)
            {"run": run, "evaluate": evaluate}[what](Path(path))
            Path(path, "counts").write_text(json.dumps(counts))
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


class Server:
    """The process that runs each request in a child of its own."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def __call__(self, what: str, path: Path, unit: str | None = None, at: int = 0) -> int:
        """Run one child, which kills itself at a byte or step, and return its exit code."""
        path.mkdir(exist_ok=True)
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps([what, str(path), unit, at]) + "\n")
        self._process.stdin.flush()
        return int(self._process.stdout.readline())


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TMPDIR": str(tmp_path_factory.mktemp("sandboxes"))}
    with subprocess.Popen(
        [sys.executable, "-c", SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        yield Server(process)
        assert process.stdin is not None
        process.stdin.close()


def points(counts: dict[str, int], number: int) -> Iterator[tuple[str, int]]:
    """Yield random places of a run: bytes and steps in turn."""
    draw = random.Random(7)
    for index in range(number):
        unit = ("bytes", "steps")[index % 2]
        yield unit, draw.randrange(counts[unit])


def complete_turns(path: Path) -> bytes:
    """Return the lines of a record up to its last complete turn."""
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    return b"".join(lines[: 1 + max((n for n, line in enumerate(lines) if b'"turn_finished"' in line), default=-1)])


def load(path: Path) -> Trajectory | None:
    try:
        return Trajectory.load(path)
    except TrajectoryError:
        return None


def check_runs(server: Server, folder: Path, number: int) -> Counter[str]:
    """Kill a run at each point and resume it; return how often it was killed, and what was found then."""
    assert server("run", folder / "whole") == 0
    whole = Trajectory.load(folder / "whole" / "t.jsonl")
    world = (folder / "whole" / "world").read_text()
    seen = Counter[str]()
    for unit, at in points(json.loads((folder / "whole" / "counts").read_text()), number):
        path = folder / f"{unit}{at}"
        shutil.rmtree(path, ignore_errors=True)
        if server("run", path, unit, at) != SIGKILL:  # the number of bytes varies by a few
            continue
        seen["killed"] += 1
        record = load(path / "t.jsonl")
        if record is not None and any(isinstance(each, Outcome) for each in record.records):
            continue
        records = [] if record is None else record.records
        started = {each.call.id for each in records if isinstance(each, CallStarted) and each.call.name == "buy"}
        finished = {each.result.call_id for each in records if isinstance(each, CallFinished)}
        kept = complete_turns(path / "t.jsonl")
        assert server("run", path) == 0, (unit, at)
        resumed = Trajectory.load(path / "t.jsonl")
        assert (path / "t.jsonl").read_bytes().startswith(kept)
        assert (path / "world").read_text() == world
        found = {each.call_id: each.content for each in resumed.messages if isinstance(each, ToolMessage)}
        unknown = {call_id for call_id, content in found.items() if UNKNOWN in content}
        assert unknown == started - finished
        unlike = {
            each.call_id
            for each in whole.messages
            if isinstance(each, ToolMessage) and each.content != found[each.call_id]
        }
        assert all(UNKNOWN in found[each] or NOT_STARTED in found[each] for each in unlike)
        bought = (path / "ledger").read_text().split()
        assert len(bought) == len(set(bought)), "nothing is bought twice"
        seen["unknown"] += len(unknown)
        seen["complete turns"] += sum(isinstance(each, TurnFinished) for each in records)
        assert not list(path.glob("*.snapshot")) and not list(path.glob(".*"))
    return seen


def check_evaluations(server: Server, folder: Path, number: int) -> Counter[str]:
    """Kill an evaluation at each point and resume it; return how often it was killed, and what was found then."""

    def figures(run: RunDirectory) -> dict[str, Any]:
        return {
            trial.trial: (trial.reward, trial.answer, replace(trial.usage, tool_time_s=0.0, wall_time_s=0.0))
            for trial in run.trials
        }

    assert server("evaluate", folder / "whole") == 0
    whole = RunDirectory.open(folder / "whole" / "run")
    assert [trial.reward for trial in whole.trials] == [1.0] * 3
    seen = Counter[str]()
    for unit, at in points(json.loads((folder / "whole" / "counts").read_text()), number):
        path = folder / f"{unit}{at}"
        shutil.rmtree(path, ignore_errors=True)
        if server("evaluate", path, unit, at) != SIGKILL or not (path / "run" / "run.json").exists():
            shutil.rmtree(path / "run", ignore_errors=True)
            continue
        seen["killed"] += 1
        killed = RunDirectory.open(path / "run")
        finished = {trial.trial: trajectory_path(killed.path, trial.trial).read_bytes() for trial in killed.trials}
        unfinished = {name: complete_turns(file) for name, file in killed.unfinished.items()}
        assert server("evaluate", path) == 0, (unit, at)
        resumed = RunDirectory.open(path / "run")
        assert resumed.complete and figures(resumed) == figures(whole)
        assert resumed.trials[: len(killed.trials)] == killed.trials
        assert all(trajectory_path(resumed.path, name).read_bytes() == record for name, record in finished.items())
        attempts = {trial.trial: trial.attempt for trial in resumed.trials}
        for name, kept in unfinished.items():  # one whose agent had ended is scored with the files of its snapshot
            assert attempts[name] == (1 if kept else 2)
            assert trajectory_path(resumed.path, name).read_bytes().startswith(kept)
            seen["gone on" if kept else "started again"] += 1
        seen["finished"] += len(finished)
        assert not list((resumed.path / "trajectories").glob("*.snapshot*"))
        assert not list((resumed.path / "trajectories").glob(".*"))
    return seen


def test_runs_that_are_killed_at_fifty_points(server: Server, tmp_path: Path) -> None:
    seen = check_runs(server, tmp_path, 50)
    assert seen["killed"] >= 45 and seen["unknown"] > 0 and seen["complete turns"] > 50


def test_evaluations_that_are_killed_at_fifty_points(server: Server, tmp_path: Path) -> None:
    seen = check_evaluations(server, tmp_path, 50)
    assert seen["killed"] >= 40 and seen["gone on"] > 10 and seen["finished"] > 5
