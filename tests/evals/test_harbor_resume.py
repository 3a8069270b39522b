"""Trials of Harbor tasks whose harness is killed go on after their last complete turn, with the whole root file system.

Each harness is a process of its own that kills itself, so that nothing of it is cleaned up.
"""

from __future__ import annotations

import io
import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anyio
import docker
import pytest
from rich.console import Console

from agentkit.agent import Agent
from agentkit.cli.eval import _with_options
from agentkit.cli.run import Job
from agentkit.messages import ToolMessage
from agentkit.models.scripted import AssistantTurn, ScriptedModel
from agentkit.task import HarborConfig, Task
from agentkit.trajectory import Trajectory
from agentkit_environments import Snapshot, available_backends
from agentkit_environments.docker.engine import OWNER_LABEL, RUN_LABEL
from agentkit_environments.owner import owner_token
from agentkit_evals.harbor import read_task_directory
from agentkit_evals.record import RunDirectory, TrialRecord
from agentkit_evals.resume import goes_on
from agentkit_evals.run import EvalRun, TrialStarted, Update
from agentkit_evals.suite import Case, Suite, load_suite

from .conftest import agentkit

DOCKER = available_backends()["docker"]
pytestmark = [pytest.mark.docker, pytest.mark.skipif(DOCKER is not None, reason=f"no Docker: {DOCKER}")]

DOCKERFILE = """\
FROM agentkit-base:latest
WORKDIR /app
RUN echo 42 > n.txt && mkdir -p /usr/share/old && echo old > /usr/share/old/a && echo old > /usr/share/old/b
ENTRYPOINT ["/bin/sh", "-c", "echo >> /app/starts; exec \\"$@\\"", "sh"]
"""
TOML = 'environment = {network_mode = "no-network"}\nverifier = {timeout_sec = 30}\n'
INSTALL = """\
mkdir -p /usr/lib/package && printf '#!/bin/sh\\necho works\\n' > /usr/lib/package/run && chmod 755 /usr/lib/package/run
ln -s ../lib/package/run /usr/bin/package && rm /usr/share/old/a && mv n.txt m.txt
mkdir -p /srv && echo mine > /srv/own
python3 -c 'import os; os.chown("/srv/own", 1000, 1000); os.chmod("/srv/own", 0o600)'
echo 1 > /usr/share/log
"""
TURNS: list[list[tuple[str, dict[str, Any]]]] = [
    [("bash", {"command": INSTALL})],
    [("bash", {"command": "package; echo 2 >> /usr/share/log"})],
    [("bash", {"command": "package; echo 3 >> /usr/share/log; cat /usr/share/log m.txt"})],
    [("submit", {"answer": "done"})],
]
TEST = """\
#!/bin/sh
found="$(package) $(ls /usr/share/old) $(cat /app/m.txt) $(stat -c '%u %a' /srv/own) $(echo $(cat /usr/share/log))"
echo "$found"
until [ "$(wc -l < /app/starts)" -ge 2 ]; do :; done  # the entry point starts again in the new sandbox
test "$found" = "works b 42 1000 600 1 2 3" && test ! -e /app/n.txt && echo 1 > /logs/verifier/reward.txt
"""

HARNESS = """
import json, os, signal, sys
from pathlib import Path
import anyio
from rich.console import Console
from agentkit import Agent, AssistantTurn, ScriptedModel
from agentkit.cli.run import Job
from agentkit.task import Task
from agentkit_environments.docker import DockerEnvironment
from agentkit_evals.harbor import episode
from agentkit_evals.run import EvalRun
from agentkit_evals.suite import Case, Suite

kind, task, turns, breaks_in, path = sys.argv[1:]
task, turns, path = Task.model_validate_json(task), json.loads(turns), Path(path)

def die(*arguments, **options):
    os.kill(os.getpid(), signal.SIGKILL)

def policy(messages, think):
    said = sum(message.role == "assistant" for message in messages)
    if breaks_in == str(said + 1):
        die()
    return AssistantTurn(calls=turns[said])

if breaks_in == "scoring":
    episode._score = die
if breaks_in == "a command":
    execute = DockerEnvironment.exec
    async def execute_and_die(self, command, **options):
        result = await execute(self, command, **options)
        return die() if "echo 3" in str(command) else result
    DockerEnvironment.exec = execute_and_die
if kind == "run":
    agent = Agent(ScriptedModel(policy), thinking="never")
    anyio.run(Job(task, agent, None, None, path, Console(quiet=True)).run)
else:
    suite = Suite("tests", (Case(task, "tests"),))
    anyio.run(EvalRun(suite, lambda case: ScriptedModel(policy), path, model_name="scripted").execute)
"""


@pytest.fixture
def task(tmp_path: Path) -> Iterator[Task]:
    """A Harbor task with snapshots; its image is removed afterwards."""
    folder = tmp_path / "tasks" / "install"
    files = {
        "task.toml": TOML,
        "instruction.md": "Install the package.\n",
        "environment/Dockerfile": DOCKERFILE,
        "tests/test.sh": TEST,
        "solution/solve.sh": "#!/bin/sh\n" + INSTALL + "echo 2 >> /usr/share/log; echo 3 >> /usr/share/log\n",
    }
    for path, text in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(text)
    task = read_task_directory(folder)
    yield Task.model_validate(task.model_dump() | {"environment": {**task.environment.model_dump(), "snapshots": True}})
    subprocess.run(["docker", "rmi", "-f", str(task.environment.spec().image)], capture_output=True, check=False)


@pytest.fixture
def engine() -> Iterator[docker.DockerClient]:
    client = docker.from_env()
    yield client
    client.close()


def images_of(engine: docker.DockerClient) -> set[str]:
    return {*engine.api.images(quiet=True, all=True)}


def killed(kind: str, task: Task, breaks_in: str, path: Path) -> None:
    """Run a harness until it kills itself in a turn (from 1), after the command of the third one, or when it scores."""
    arguments = (kind, task.model_dump_json(), json.dumps(TURNS), breaks_in, str(path))
    done = subprocess.run([sys.executable, "-c", HARNESS, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr


def policy(messages: Any, think: bool) -> AssistantTurn:
    return AssistantTurn(calls=TURNS[sum(message.role == "assistant" for message in messages)])


def resumed(task: Task, path: Path) -> tuple[TrialRecord, list[TrialStarted]]:
    """Resume an evaluation of one task; return its trial, and how it started."""
    started: list[TrialStarted] = []

    def listen(update: Update) -> None:
        if isinstance(update, TrialStarted):
            started.append(update)

    suite = Suite("tests", (Case(task, "tests"),))
    run = EvalRun(suite, lambda case: ScriptedModel(policy), path, model_name="scripted", resume=True, listener=listen)
    (trial,) = anyio.run(run.execute).trials
    return trial, started


@pytest.mark.parametrize("breaks_in", ["1", "2", "a command", "4", "scoring"])
def test_a_trial_goes_on_in_its_world(task: Task, tmp_path: Path, engine: docker.DockerClient, breaks_in: str) -> None:
    killed("eval", task, breaks_in, tmp_path / "run")
    before = images_of(engine)
    run_id = RunDirectory.open(tmp_path / "run").lock.run_id
    snapshots = [*(tmp_path / "run" / "trajectories").glob("*.snapshot")]
    assert len(snapshots) == 1
    trial, [started] = resumed(task, tmp_path / "run")
    assert (trial.reward, trial.error, trial.answer) == (1.0, None, "done"), trial.verifier_output
    if breaks_in == "1":
        assert (trial.attempt, started.why_again) == (2, "its first turn is done again")
    else:
        turns = {"2": 1, "a command": 2, "4": 3, "scoring": 4}[breaks_in]
        assert (trial.attempt, started.kept_turns) == (1, turns)
        assert started.has_ended == (breaks_in == "scoring")
    assert trial.usage.turns == 4
    assert not [*(tmp_path / "run").glob("**/*.snapshot*")]
    assert images_of(engine) == before, "snapshots leave no image"
    labels = [f"{RUN_LABEL}={run_id}"]
    assert engine.api.containers(all=True, filters={"label": labels}) == []


def test_a_run_goes_on_in_its_world(task: Task, tmp_path: Path, engine: docker.DockerClient) -> None:
    path, shown = tmp_path / "t.jsonl", io.StringIO()
    killed("run", task, "3", path)
    before = images_of(engine)
    job = Job(
        task,
        Agent(ScriptedModel(policy), thinking="never"),
        None,
        None,
        None,
        Console(file=shown, width=200),
        record=Trajectory.load(path),
    )
    done = anyio.run(job.run)
    assert f"resuming {path} after 2 turns; turn 3 is done again\n" in shown.getvalue()
    assert done.failure is None and done.verdict is not None and done.verdict.reward == 1.0, done.verdict
    results = [each.content for each in Trajectory.load(path).messages if isinstance(each, ToolMessage)]
    assert results[2].split() == ["works", "1", "2", "3", "42"]
    assert not [*tmp_path.glob("*.snapshot*")] and images_of(engine) == before
    mine = {"label": f"{OWNER_LABEL}={owner_token()}"}
    assert engine.api.containers(all=True, filters=mine) == []


def test_a_container_that_read_a_snapshot_is_removed_with_the_killed_run(
    task: Task, tmp_path: Path, engine: docker.DockerClient
) -> None:
    """As the harness may be killed in the tenth of a second that the container exists."""
    killed("run", task, "2", tmp_path / "t.jsonl")
    labels = {RUN_LABEL: "killed", OWNER_LABEL: owner_token().rpartition("/")[0] + "/1"}
    left = engine.api.create_container("agentkit-base:latest", entrypoint=["/"], labels=labels)["Id"]
    agent = Agent(ScriptedModel(policy), thinking="never")
    job = Job(task, agent, None, None, None, Console(quiet=True), record=Trajectory.load(tmp_path / "t.jsonl"))
    assert anyio.run(job.run).failure is None
    assert left not in [each["Id"] for each in engine.api.containers(all=True)]


@pytest.mark.parametrize("damage", ["torn", "of another image"])
def test_a_snapshot_that_cannot_be_used(task: Task, tmp_path: Path, engine: docker.DockerClient, damage: str) -> None:
    """A damaged one starts the trial again and says so. One of another image is an error with both images."""
    killed("eval", task, "3", tmp_path / "run")
    [file] = (tmp_path / "run" / "trajectories").glob("*.snapshot")
    if damage == "torn":
        file.write_bytes(file.read_bytes()[:-1])
        trial, [started] = resumed(task, tmp_path / "run")
        assert (trial.reward, trial.attempt) == (1.0, 2)
        assert "cannot be used as a snapshot: not a complete snapshot" in started.why_again
        return
    image = str(task.environment.spec().image)
    of = Snapshot.load(file).image
    assert of == engine.images.get(image).id
    built, _ = engine.images.build(fileobj=io.BytesIO(f"FROM {image}\nRUN true\n".encode()), tag=image, rm=True)
    trial, _ = resumed(task, tmp_path / "run")
    assert (trial.reward, trial.failure) == (None, "infrastructure")
    assert f"the snapshot is of image {of}, but the sandbox is of {built.id}" in (trial.error or "")


def test_commands(untrained: Path, task: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`agentkit run --resume` of a Harbor task, which needs no more than the record."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "300")
    assert isinstance(task.verifier, HarborConfig)
    path = tmp_path / "t.jsonl"
    options = ("-m", untrained, "--max-tokens", "4", "--seed", "3", "--snapshots", "--trajectory", path, "--json")
    whole = json.loads(agentkit("run", task.verifier.folder, *options, code=1).stdout)
    lines = path.read_bytes().splitlines(keepends=True)
    end = next(index for index, line in enumerate(lines) if b'"turn_started"' in line) + 1
    path.write_bytes(b"".join(lines[:end]))
    again = json.loads(agentkit("run", "--resume", path, "--json", code=1).stdout)
    assert (again["reward"], again["limit"], again["backend"]) == (0.0, "max_tokens", "docker")
    assert {**again["usage"], "wall_time_s": 0} == {**whole["usage"], "wall_time_s": 0}


STEPS = '[[steps]]\nname = "one"\n[[steps]]\nname = "two"\n'
SERVER = '[[environment.mcp_servers]]\nname = "notes"\ntransport = "stdio"\ncommand = "notes"\n'


@pytest.mark.parametrize(("toml", "state"), [(STEPS, "the rewards of its steps"), (SERVER, "its MCP servers")])
def test_state_that_no_snapshot_has(
    untrained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], toml: str, state: str
) -> None:
    folder = tmp_path / "tasks" / "several"
    for path, text in (
        ("environment/Dockerfile", DOCKERFILE),
        *((f"{step}/{name}", "x") for step in (".", "steps/one", "steps/two") for name in ("instruction.md",)),
        ("tests/test.sh", TEST),
        ("task.toml", toml),
    ):
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(text)
    options = ("--snapshots", "--trajectory", tmp_path / "t.jsonl")
    refused = agentkit("run", folder, "-m", untrained, *options, code=2)
    shown = " ".join(refused.output.replace("│", " ").split())
    assert f"snapshots: the files of the sandbox would be saved without {state}; leave it out" in shown
    assert not (tmp_path / "t.jsonl").exists()
    (case,) = _with_options(load_suite(str(tmp_path / "tasks")), None, snapshots=True).cases
    assert case.task == read_task_directory(folder)
    noted = f"Note: task several is run without snapshots, which would not have {state}.\n"
    assert capsys.readouterr().err == noted
    assert goes_on(read_task_directory(folder), tmp_path / "t.jsonl", attempt=1) == f"{state} are gone"
