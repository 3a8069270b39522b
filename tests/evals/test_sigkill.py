"""Real runs and evaluations are killed at seeded moments, and resumed with their snapshots, on every backend.

One process imports everything once and forks a child for each run. The child counts what it does and kills itself at
the chosen place:

    bytes      written with `os.write` (all records): in the middle of a write
    steps      synchronizing or renaming a file, copying a snapshot, the two sides of an effect outside the sandbox
    commands   the two sides of a command in a sandbox
    starts     a sandbox is made, but not started
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import docker
import pytest

from agentkit.errors import TrajectoryError
from agentkit.events import CallFinished, CallStarted, Outcome, TurnFinished
from agentkit.interrupted import NOT_STARTED, UNKNOWN
from agentkit.messages import ToolMessage
from agentkit.trajectory import Trajectory
from agentkit_environments.cgroups import PREFIX as GROUP_PREFIX
from agentkit_environments.cgroups import hierarchies
from agentkit_environments.docker.engine import OWNER_LABEL
from agentkit_environments.leftovers import PREFIX as FOLDER_PREFIX
from agentkit_evals.record import RunDirectory, trajectory_path
from agentkit_evals.verify import Backend

if TYPE_CHECKING:
    from tests.conftest import Tag, WaitUntil

SIGKILL = -9
UNITS = ("bytes", "steps", "commands", "starts")
FEW = 4
MANY = {"unsafe-local": 51, "process": 12, "docker": 12}
AMOUNTS = pytest.mark.parametrize(
    "many", [pytest.param(False, id="few"), pytest.param(True, id="many", marks=pytest.mark.hostile)]
)

SERVER = r"""
import json, os, signal, sys, traceback
from collections import Counter
from pathlib import Path
import anyio
import docker
from agentkit import Agent, AssistantTurn, ScriptedModel, Trajectory, TrajectoryError, TurnStarted, tool
from agentkit.models.scripted import packaged_tokenizer
from agentkit.saved import saved_snapshot
from agentkit.task import Task
from agentkit_environments import Environment, Snapshot, available_backends, open_environment, reap
from agentkit_evals.run import EvalRun
from agentkit_evals.suite import Case, Suite
from agentkit_tools import BUILTINS

counts = Counter()

def die():
    os.kill(os.getpid(), signal.SIGKILL)

def arm(path, unit, at):
    write = os.write
    def write_or_die(fd, data):
        data = bytes(data)
        left = at - counts["bytes"]
        if unit == "bytes" and left < len(data):
            write(fd, data[:left])
            die()
        counts["bytes"] += len(data)
        return write(fd, data)
    def pass_by(kind):
        if unit == kind and counts[kind] == at:
            die()
        counts[kind] += 1
    def stepping(kind, call):
        def step(*args, **options):
            pass_by(kind)
            return call(*args, **options)
        return step
    command = Environment.exec
    async def exec_or_die(*args, **options):
        pass_by("commands")
        result = await command(*args, **options)
        pass_by("commands")
        return result
    start = docker.APIClient.start
    def start_or_die(api, container):
        with open(path / "volumes", "a") as volumes:
            for mount in api.inspect_container(container)["Mounts"]:
                volumes.write(mount["Name"] + "\n")
        pass_by("starts")
        return start(api, container)
    global step
    os.write = write_or_die
    os.fsync, os.replace, os.sendfile = (stepping("steps", each) for each in (os.fsync, os.replace, os.sendfile))
    step = stepping("steps", lambda: None)
    Environment.exec = exec_or_die
    docker.APIClient.start = start_or_die
    anyio.open_process = stepping("starts", anyio.open_process)

def policy_of(turns):
    def policy(messages, think):
        said = sum(message.role == "assistant" for message in messages)
        return AssistantTurn(calls=turns[said])
    return policy

def run(path, backend, tag):
    @tool
    def buy(article: str) -> str:
        "Buy an article."
        step()
        with open(path / "ledger", "a") as ledger:
            ledger.write(article + "\n")
        step()
        return f"bought {article}"

    turns = [
        [("bash", {"command": f"sleep {tag} >/dev/null 2>&1 & echo 1 >> log; cat log"})],
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
        async with await open_environment(backend=backend, run_id=f"sigkill-{tag}", snapshot=snapshot) as environment:
            if history is None:
                await agent.run("Go.", environment=environment, trajectory=record, save_snapshots=True)
            else:
                await agent.resume(history, environment=environment, world_turns=saved.turns, save_snapshots=True)
            found = await environment.exec("ls; cat log a.txt")
        (path / "world").write_text(found.stdout)

    anyio.run(main)

def evaluate(path, backend, tag):
    turns = [
        [("list_dir", {})],
        [("bash", {"command": f"sleep {tag} >/dev/null 2>&1 & echo 1 >> log; cat log"})],
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
    run = EvalRun(suite, ScriptedModel(policy_of(turns)), path / "run", model_name="scripted", backend=backend,
                  concurrency=2, resume=(path / "run" / "run.json").exists())
    anyio.run(run.execute)

def reap_all(path, backend, tag):
    anyio.run(reap)

available_backends()  # checks once, and not in each child, if they work
packaged_tokenizer()
for line in sys.stdin:
    what, path, unit, at, backend, tag = json.loads(line)
    child = os.fork()
    if child == 0:
        try:
            path = Path(path)
            arm(path, unit, at)
            {"run": run, "evaluate": evaluate, "reap": reap_all}[what](path, backend, tag)
            Path(path, "counts").write_text(json.dumps(counts))
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), child, flush=True)
"""


@dataclass(slots=True)
class Server:
    """The process that runs each request in a child of its own, with the sandboxes of one backend."""

    process: subprocess.Popen[str]
    temporary: Path
    backend: Backend
    tag: Tag
    pids: list[int] = field(default_factory=list)

    def __call__(self, what: str, path: Path, unit: str | None = None, at: int = 0) -> int:
        """Run one child, which kills itself at the chosen place, and return its exit code."""
        path.mkdir(exist_ok=True)
        assert self.process.stdin is not None and self.process.stdout is not None
        request = [what, str(path), unit, at, self.backend, self.tag.value]
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        code, pid = map(int, self.process.stdout.readline().split())
        self.pids.append(pid)
        return code

    def left(self, path: Path) -> list[str]:
        """Return what is left of the sandboxes of all children; `path` is the folder of the last ones."""
        found = [f"process {pid}" for pid in self.tag.pids()]
        found += [path.name for path in self.temporary.glob(f"{FOLDER_PREFIX}*")]
        pids = {*map(str, self.pids)}
        for parent in {hierarchy.parent for hierarchy in hierarchies()}:
            found += [path.name for path in parent.glob(f"{GROUP_PREFIX}*") if path.name.split("~")[1] in pids]
        if self.backend != "docker":
            return found
        client = docker.from_env()
        try:
            labels = {"label": OWNER_LABEL}
            owned = [*client.api.containers(all=True, filters=labels), *client.api.networks(filters=labels)]
            owned += client.api.images(filters=labels)
            found += [each["Id"] for each in owned if each["Labels"][OWNER_LABEL].split("/")[1] in pids]
            volumes = {each["Name"] for each in client.api.volumes()["Volumes"]}
            return found + sorted(volumes.intersection(volumes_of(path)))
        finally:
            client.close()

    def is_clean(self, path: Path) -> bool:
        return not self.left(path)


@pytest.fixture(scope="module")
def processes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[subprocess.Popen[str], Path]]:
    temporary = tmp_path_factory.mktemp("sandboxes")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TMPDIR": str(temporary)}
    with subprocess.Popen(
        [sys.executable, "-c", SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        yield process, temporary
        assert process.stdin is not None
        process.stdin.close()


@pytest.fixture
def server(processes: tuple[subprocess.Popen[str], Path], backend: Backend, tag: Tag) -> Server:
    return Server(*processes, backend, tag)


def volumes_of(path: Path) -> list[str]:
    """Return the volumes of the containers that the children in `path` have made."""
    return (path / "volumes").read_text().split() if (path / "volumes").exists() else []


def points(counts: dict[str, int], number: int) -> list[tuple[str, int]]:
    """Return random places of a run, about as many of each unit."""
    draw = random.Random(7)
    units = [unit for unit in UNITS if unit in counts]
    found = []
    for index, unit in enumerate(units):
        share = len(range(index, number, len(units)))
        found += [(unit, at) for at in draw.sample(range(counts[unit]), min(share, counts[unit]))]
    return found


def complete_turns(path: Path) -> bytes:
    """Return the lines of a record up to its last complete turn."""
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    return b"".join(lines[: 1 + max((n for n, line in enumerate(lines) if b'"turn_finished"' in line), default=-1)])


def load(path: Path) -> Trajectory | None:
    try:
        return Trajectory.load(path)
    except TrajectoryError:
        return None


def check_runs(server: Server, folder: Path, number: int, wait_until: WaitUntil) -> Counter[str]:
    """Kill a run at each point and resume it; return how often it was killed, and what was found then."""
    assert server("run", folder / "whole") == 0
    whole = Trajectory.load(folder / "whole" / "t.jsonl")
    world = (folder / "whole" / "world").read_text()
    seen = Counter[str]()
    for unit, at in points(json.loads((folder / "whole" / "counts").read_text()), number):
        path = folder / f"{unit}{at}"
        seen["points"] += 1
        if server("run", path, unit, at) != SIGKILL:  # the number of bytes varies by a few
            continue
        seen["killed"] += 1
        seen["left"] += bool(server.left(path))
        assert server("reap", folder / "reap") == 0
        wait_until(partial(server.is_clean, path), f"the end of the sandbox, {unit} {at}")
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
        assert not server.left(path)
        seen["volumes"] += len(volumes_of(path))
    return seen


def check_evaluations(server: Server, folder: Path, number: int, wait_until: WaitUntil) -> Counter[str]:
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
        seen["points"] += 1
        if server("evaluate", path, unit, at) != SIGKILL or not (path / "run" / "run.json").exists():
            continue
        seen["killed"] += 1
        seen["left"] += bool(server.left(path))
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
        wait_until(partial(server.is_clean, path), f"the end of the sandboxes, {unit} {at}")
        seen["volumes"] += len(volumes_of(path))
    return seen


@AMOUNTS
def test_killed_runs_go_on(server: Server, tmp_path: Path, many: bool, wait_until: WaitUntil) -> None:
    seen = check_runs(server, tmp_path, MANY[server.backend] if many else FEW, wait_until)
    assert seen["killed"] >= 0.7 * seen["points"]
    assert seen["left"] > 0 or server.backend == "process", "the kernel ends a process sandbox with its harness"
    assert seen["complete turns"] > 0
    assert bool(seen["volumes"]) == (server.backend == "docker")
    if seen["points"] > 50:
        assert seen["unknown"] > 0 and seen["complete turns"] > 50


@AMOUNTS
def test_killed_evaluations_go_on(server: Server, tmp_path: Path, many: bool, wait_until: WaitUntil) -> None:
    seen = check_evaluations(server, tmp_path, MANY[server.backend] if many else FEW, wait_until)
    assert seen["killed"] >= 0.7 * seen["points"]
    assert seen["left"] > 0 or server.backend == "process", "the kernel ends a process sandbox with its harness"
    assert seen["gone on"] > 0
    assert bool(seen["volumes"]) == (server.backend == "docker")
    if seen["points"] > 50:
        assert seen["gone on"] > 10 and seen["finished"] > 5
