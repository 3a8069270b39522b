"""The commands: output, exit codes and error messages."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anyio
import pytest
from rich.console import Console

from agentkit.agent import Agent
from agentkit.cli.progress import LiveProgress
from agentkit.cli.resume import RunSettings
from agentkit.cli.run import Job
from agentkit.compaction import Compaction
from agentkit.models.scripted import Policy, ScriptedModel
from agentkit.task import EnvironmentConfig, Task, load_task
from agentkit.trajectory import Trajectory
from agentkit_engine.chat import Tokenizer
from agentkit_engine.sampling_params import SamplingParams
from agentkit_environments import available_backends
from agentkit_evals.record import RunDirectory
from agentkit_evals.run import TrialActed, TrialStarted, agent_for
from agentkit_evals.suite import load_suite

from .conftest import TASK, agentkit

MakeScript = Callable[..., Policy]
PROCESS = available_backends().get("process", "not built")
needs_sandbox = [
    pytest.mark.sandbox,
    pytest.mark.skipif(PROCESS is not None, reason=f"no process sandbox: {PROCESS}"),
]

pytestmark = pytest.mark.usefixtures("in_a_folder_of_its_own")


def as_json(*arguments: str | Path, code: int | None = 0) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(agentkit(*arguments, "--json", code=code).stdout)
    return found


def test_help_and_version_start_without_torch() -> None:
    script = "import sys, agentkit.cli; assert not {'torch', 'docker', 'jinja2'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", script], check=True)
    assert "demo" in agentkit("--help").stdout
    assert agentkit("--version").stdout.startswith("agentkit ")


def test_eval_writes_a_run_and_reports_its_scores(suite: Path, untrained: Path, tmp_path: Path) -> None:
    found = as_json(
        "eval", suite, "-m", untrained, "-k", "2", "-n", "2", "--warm", "2", "--seed", "5", "--env", "unsafe-local"
    )
    assert (found["solved"], found["trials"], found["mean"], found["stderr"]) == (4, 4, 1.0, 0.0)
    assert (found["suite"], found["model"], found["seed"]) == ("suite", "untrained", 5)
    assert found["usage"]["sampled_tokens"] > 0
    run = RunDirectory.open(found["run"])
    assert run.complete and run.path.parent == Path("runs")
    assert all(trial.status in ("limit", "answered") for trial in run.trials)
    assert Path(found["report"]).read_text().startswith("<!doctype html>")
    ids = [[trial.trial, trajectory.token_ids] for trial in run.trials if (trajectory := run.trajectory(trial))]
    again = as_json("eval", suite, "-m", untrained, "-k", "2", "--seed", "5", "--env", "unsafe-local", "--out", "again")
    rerun = RunDirectory.open(again["run"])
    assert sorted(ids) == sorted([t.trial, r.token_ids] for t in rerun.trials if (r := rerun.trajectory(t)))


def test_eval_prints_progress_and_a_table(suite: Path, untrained: Path) -> None:
    shown = agentkit("eval", suite, "-m", untrained, "--limit", "1", "--env", "unsafe-local").stdout
    assert "✓ first.0" in shown and "[1/1]" in shown
    assert "suite" in shown and "1/1" in shown and "report  runs/" in shown


def test_sampling_defaults_to_the_models_own(suite: Path, untrained: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(untrained, model)
    (model / "generation_config.json").write_text('{"do_sample": true, "temperature": 0.25, "top_p": 0.5}')
    options = ("-m", model, "--env", "unsafe-local")
    for temperature, expected in ((None, 0.25), ("0", 0.0)):
        more = () if temperature is None else ("--temperature", temperature)
        lock = RunDirectory.open(as_json("eval", suite, "--limit", "1", *options, *more)["run"]).lock
        assert (lock.sampling.temperature, lock.sampling.top_p) == (expected, 0.5)
        record = tmp_path / f"{expected}.jsonl"
        as_json("run", suite / "first.yaml", "--trajectory", record, "--seed", "3", *options, *more, code=None)
        assert Trajectory.load(record).header.sampling == SamplingParams(expected, 0.5, seed=3)


def test_a_run_may_be_compacted(suite: Path, untrained: Path, tmp_path: Path) -> None:
    """The resumed run has the setting, too, because the record has the task."""
    record = tmp_path / "run.jsonl"
    task = ("run", suite / "first.yaml", "-m", untrained, "--env", "unsafe-local", "--trajectory", record)
    agentkit(*task, "--compact-at", "5000", code=None)
    run = RunSettings.of(Trajectory.load(record))
    model = ScriptedModel(lambda messages, think: [])
    assert agent_for(run.task, model, model.sampling).compaction == Compaction(at_tokens=5000)
    assert agent_for(load_task(suite / "first.yaml"), model, model.sampling).compaction is None
    assert "--compact-at" in agentkit(*task, "--compact-at", "0", code=2).output


def test_grammar_options(suite: Path, untrained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = (suite, "--limit", "1", "-m", untrained, "--env", "unsafe-local")
    assert RunDirectory.open(as_json("eval", *options)["run"]).lock.sampling.grammar == "auto"
    assert RunDirectory.open(as_json("eval", *options, "--no-grammar")["run"]).lock.sampling.grammar is False
    run = RunDirectory.open(as_json("eval", *options, "--grammar", "on")["run"])
    trajectory = run.trajectory(run.trials[0])
    assert run.lock.sampling.grammar is True and trajectory is not None
    assert trajectory.header.sampling.grammar is True and trajectory.header.grammar_off is None
    record = tmp_path / "run.jsonl"
    as_json("run", suite / "first.yaml", *options[3:], "--grammar", "on", "--trajectory", record, code=None)
    assert Trajectory.load(record).header.sampling.grammar is True
    monkeypatch.setitem(sys.modules, "llguidance", None)
    for command in (("eval", *options), ("run", suite / "first.yaml", *options[3:])):
        assert "pip install" in agentkit(*command, "--grammar", "on", code=2).output


def test_an_answer_matches_the_given_schema(suite: Path, untrained: Path, tmp_path: Path) -> None:
    schema, record = tmp_path / "schema.json", tmp_path / "run.jsonl"
    schema.write_text('{"enum": ["yes", "no"]}')
    (tmp_path / "alone.yaml").write_text(TASK.format(id="alone") + "tools: [submit]\n")
    options = ("-m", untrained, "--env", "unsafe-local", "--output-schema", schema)
    found = as_json("run", tmp_path / "alone.yaml", *options, "--trajectory", record)
    assert json.loads(found["answer"]) in ("yes", "no") and (found["status"], found["error"]) == ("answered", None)
    header = Trajectory.load(record).header
    assert (header.sampling.output_schema, header.tools) == ({"enum": ["yes", "no"]}, ())
    schema.write_text('{"type": "string", "minLength": 900}')
    found = as_json("run", tmp_path / "alone.yaml", *options, code=1)
    assert (found["status"], found["answer"]) == ("limit", None)
    for text, problem in (("{", "schema.json: Expecting"), ("[]", "expected a JSON schema"), ('{"type": 1}', "$.type")):
        schema.write_text(text)
        assert problem in agentkit("run", tmp_path / "alone.yaml", *options, code=2).output
    assert "does not exist" in agentkit("run", "Hello", *options[:-1], tmp_path / "none.json", code=2).output


def test_demo_without_flags(untrained: Path, tmp_path: Path) -> None:
    """Runs the whole demo on a model whose context is too short for any prompt, so every trial ends at once."""
    model = tmp_path / "blind"
    shutil.copytree(untrained, model)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 16}))
    options = ("demo", "-m", model, "--env", "unsafe-local")
    shown = agentkit(*options, "--out", "run").stdout
    run = RunDirectory.open("run")
    assert Counter(trial.family for trial in run.trials) == {"everyday": 12, "generated": 12}
    packaged = {case.task.id for name in ("everyday", "generated") for case in load_suite(name).cases}
    assert {task.id for task in run.lock.tasks} <= packaged
    assert len({task.metadata["family"] for task in run.lock.tasks}) >= 18
    assert {trial.failure for trial in run.trials} == {"limit"}
    said = " ".join(shown.split())
    assert said.startswith("24 tasks outside tiny's training data: 12 hand-written (suite everyday), 12 generated")
    assert f", seed {run.lock.seed}, " in said
    assert shown.splitlines()[-1] == "solved 0/24"
    again = as_json(*options, "--tasks", "5")
    assert (again["solved"], again["trials"]) == (0, 5)
    assert again["seed"] == RunDirectory.open(again["run"]).lock.seed != run.lock.seed


def test_threshold_and_home(suite: Path, untrained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AGENTKIT_HOME", str(tmp_path / "home"))
    (suite / "second.yaml").write_text(TASK.format(id="second").replace("test -e", "test ! -e"))
    options = ("eval", suite, "-m", untrained, "--env", "unsafe-local")
    found = as_json(*options, "--threshold", "0.6", code=1)
    assert (found["mean"], found["failures"]["limit"] + found["failures"]["model"]) == (0.5, 1)
    assert Path(found["run"]).parent == tmp_path / "home" / "runs"
    as_json(*options, "--threshold", "0.5")


def test_a_verifier_that_cannot_start_is_infrastructure(suite: Path, untrained: Path) -> None:
    (suite / "second.yaml").write_text(TASK.format(id="second").replace("test -e", "no-such-program"))
    found = as_json("eval", suite, "-m", untrained, "--env", "unsafe-local", code=3)
    assert (found["scored"], found["trials"], found["mean"]) == (1, 2, 1.0)
    assert found["failures"] == {"model": 0, "limit": 0, "task": 0, "infrastructure": 1}


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["eval", "suite", "-m", "no-such-folder"], 2, 'no model "no-such-folder": it is neither a packaged model'),
        (["run", "Say hi.", "-m", "no-such-folder"], 2, 'no model "no-such-folder"'),
        (["demo", "-m", "no-such-folder"], 2, 'no model "no-such-folder"'),
        (["eval", "nowhere"], 2, "nowhere: cannot be read: No such file or directory"),
        (["run", "nowhere.yaml"], 2, "nowhere.yaml: cannot be read"),
        (["eval", "synth:none"], 2, 'unknown operation "none"; '),
        (["run", "unknown-key.yaml"], 2, 'unknown-key.yaml:4: unknown key "verfier"; did you mean "verifier"?'),
        (
            ["run", "unknown-tool.yaml"],
            2,
            'unknown-tool.yaml:4: tools.0: unknown tool "bsh"; built in: bash, read_file',
        ),
        (["view", "suite"], 2, "suite is not a run: it has no run.json"),
        (
            ["compare", "several", "several"],
            2,
            "several is not a run: it has no run.json; give one of the runs in it: a",
        ),
        (["eval", "rows"], 2, "rows has no task files, but data sets; give one of them: simple.jsonl"),
        (["eval", "suite", "-k", "0"], 2, "Invalid value for '--epochs'"),
        (["run", "suite"], 2, "suite is not a task file: `agentkit eval suite` runs every task in a folder"),
        (["run", "suite/"], 2, "suite/ is not a task file"),
        (["run", "tasks/frist"], 2, "tasks/frist is not a task file: task files end in .yaml"),
        (["run", "task.toml"], 2, "task.toml is not a task file"),
        (["run", "notes"], 2, "notes is not a task file"),
        (
            ["run", "low-effort.yaml", "--env", "unsafe-local"],
            2,
            "effort 'low' does not exist in dialect 'v4-preview'; it has none, high, max",
        ),
        (["run", "Say hi.", "--workdir", "nowhere"], 2, "Invalid value for '--workdir'"),
    ],
)
def test_each_mistake_is_one_message(
    suite: Path, tmp_path: Path, arguments: list[str], code: int, message: str
) -> None:
    head = "id: x\ninstruction: Do it.\n# a comment\n"
    (tmp_path / "unknown-key.yaml").write_text(f"{head}verfier: {{command: 'true'}}\n")
    (tmp_path / "unknown-tool.yaml").write_text(f"{head}tools: [bsh]\n")
    (tmp_path / "low-effort.yaml").write_text(f"{head}agent: {{effort: low}}\nverifier: {{command: 'true'}}\n")
    (tmp_path / "notes").write_text("not a task\n")
    for file in ("several/a/run.json", "rows/simple.jsonl"):
        (tmp_path / file).parent.mkdir(parents=True)
        (tmp_path / file).write_text("{}")
    (tmp_path / "no-solution.yaml").write_text(f"{head}verifier: {{command: 'true'}}\n")
    result = agentkit(*arguments, code=code)
    assert message in " ".join(result.stderr.replace("│", " ").split())


def test_docker_not_running(suite: Path, untrained: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("DOCKER_HOST", f"unix://{tmp_path}/no.sock")
    result = agentkit("eval", suite, "-m", untrained, "--env", "docker", "--out", "run", code=3)
    assert result.stderr.startswith("Error: ") and "ocker" in result.stderr
    assert not Path("run").exists()


def test_no_sandbox_possible(suite: Path, untrained: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Without a Docker engine or a namespace program nothing runs, and the error gives the reason."""
    monkeypatch.setenv("DOCKER_HOST", f"unix://{tmp_path}/no.sock")
    monkeypatch.setenv("PATH", str(tmp_path))
    result = agentkit("eval", suite, "-m", untrained, "--out", "run", code=3)
    assert result.stderr.startswith("Error: ") and not Path("run").exists()


def test_run_on_a_task_file(suite: Path, untrained: Path) -> None:
    options = ("-m", untrained, "--env", "unsafe-local", "--max-tokens", "1")
    found = as_json("run", suite / "first.yaml", *options, "--trajectory", "t.jsonl", code=1)
    assert (found["reward"], found["backend"], found["trajectory"]) == (1.0, "unsafe-local", "t.jsonl")
    assert found["usage"]["sampled_tokens"] == 1 and Path("t.jsonl").stat().st_size > 0
    shown = agentkit("run", suite / "first.yaml", *options, code=1).stdout
    assert "turn 1" in shown and "reward    1" in shown and "in a unsafe-local sandbox" in shown


def test_a_conversation_before_the_task(suite: Path, untrained: Path, tmp_path: Path) -> None:
    def run(history: str, name: str, code: int | None = 0) -> str:
        options = ("--env", "unsafe-local", "--history", history, "--trajectory", name, "-m", untrained)
        return " ".join(agentkit("run", suite / "first.yaml", *options, code=code).output.split())

    step = {"step_id": 1, "source": "user", "message": "Hello."}
    agent = {"name": "other", "version": "1"}
    document = {"schema_version": "ATIF-v1.6", "agent": agent, "steps": [step]}
    (tmp_path / "before.json").write_text(json.dumps(document))
    run("before.json", "first.jsonl", code=None)
    first = Trajectory.load("first.jsonl").messages
    assert [message.content for message in first[1:3]] == ["Hello.", "Say something."]
    run("first.jsonl", "second.jsonl", code=None)
    assert Trajectory.load("second.jsonl").messages[: len(first)] == first
    (tmp_path / "before.json").write_text(json.dumps({**document, "steps": [{**step, "source": "agent"}]}))
    assert "before.json: message_history[0]: an assistant turn" in run("before.json", "third.jsonl", code=2)
    (tmp_path / "before.json").write_text("{}")
    assert "schema_version is None" in run("before.json", "third.jsonl", code=2)


def test_check_probes_tasks(suite: Path) -> None:
    (suite / "first.yaml").write_text(
        TASK.format(id="first").replace("test -e a.txt", "test -e b.txt").replace('"true"', '"touch b.txt"')
    )
    shown = agentkit("check", suite, "--env", "unsafe-local", code=1).stdout
    assert "✓ first" in shown and "✗ second" in shown and "doing nothing scores 1, expected 0" in shown
    assert "1/2 tasks are sound" in shown
    assert as_json("check", suite / "first.yaml", "--env", "unsafe-local") == {"first": []}


def test_view_recreates_the_report(suite: Path, untrained: Path) -> None:
    found = as_json("eval", suite, "-m", untrained, "--env", "unsafe-local", "--out", "run")
    Path(found["report"]).unlink()
    assert agentkit("view", "run").stdout.strip() == Path("run/report.html").resolve().as_uri()
    assert Path(found["report"]).exists()


def test_doctor_reports_the_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))  # do not reap sandboxes of other processes
    usable = any(reason is None for name, reason in available_backends().items() if name != "unsafe-local")
    found = as_json("doctor", "--reap", code=0 if usable else 3)
    assert set(found["backends"]) == {"docker", "process", "unsafe-local"}
    assert found["torch"]["version"] and found["reaped"] >= 0 and "tiny" in found["models"]
    assert "sandboxes" in agentkit("doctor", code=0 if usable else 3).stdout


INTERRUPTIBLE = """
import signal
from agentkit.cli import main
signal.signal(signal.SIGINT, signal.default_int_handler)  # a background shell may have had it ignored
main()
"""


def test_ctrl_c_writes_a_report(suite: Path, untrained: Path, tmp_path: Path) -> None:
    slow = TASK.replace("max_tokens: 12", "max_tokens: 100000").replace("max_turns: 2", "max_turns: 1000")
    (suite / "second.yaml").write_text(slow.format(id="second"))
    child = subprocess.Popen(
        [
            *(sys.executable, "-c", INTERRUPTIBLE, "eval", suite, "-m", untrained, "-n", "1"),
            *("--env", "unsafe-local", "--out", "run"),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"},
    )
    with child:
        assert child.stdout is not None and child.stderr is not None
        assert "first.0" in child.stdout.readline().decode()
        child.send_signal(signal.SIGINT)
        rest, errors = child.stdout.read().decode(), child.stderr.read().decode()
    assert child.returncode == 4, errors
    assert "report  run/report.html" in rest
    assert [trial.task for trial in RunDirectory.open("run").trials] == ["first"]
    assert "interrupted: 1 of 2 trials" in Path("run/report.html").read_text()
    assert "continue with `agentkit eval --resume run`" in errors


@pytest.mark.parametrize("env", ["unsafe-local", pytest.param("process", marks=needs_sandbox)])
def test_run_an_instruction_on_a_copy_of_the_users_folder(untrained: Path, tmp_path: Path, env: str) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "a.txt").write_text("as it was\n")
    said = ("run", "Say hi.", "--workdir", mine, "-m", untrained, "--max-tokens", "1")
    found = as_json(*said, "--env", env, "--apply", code=1)
    assert (found["changes"], found["applied"], found["refused"]) == ([], False, [])
    assert (mine / "a.txt").read_text() == "as it was\n"


def test_the_diff_and_output_of_a_job(tmp_path: Path, tokenizer: Tokenizer, script: MakeScript) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "a.txt").write_text("one\ntwo\n")
    shown = io.StringIO()
    policy = script(
        [
            ("edit_file", {"path": "a.txt", "old": "two", "new": "2"}),
            ("bash", {"command": "printf '\\033[2J'; exit 1"}),
        ],
        [("submit", {"answer": "done"})],
    )
    agent = Agent(ScriptedModel(policy, tokenizer))
    task = Task(id="run", instruction="Change it.", environment=EnvironmentConfig(files={"b.txt": "new\n"}))
    job = Job(task, agent, "unsafe-local", mine, None, Console(file=shown, width=200))
    done = anyio.run(job.run)
    assert [list(change.diff()) for change in done.changes] == [
        ["--- a/a.txt", "+++ b/a.txt", "@@ -1,2 +1,2 @@", " one", "-two", "+2"],
        ["--- /dev/null", "+++ b/b.txt", "@@ -0,0 +1 @@", "+new"],
    ]
    assert (done.result.answer, done.verdict, done.backend) == ("done", None, "unsafe-local")
    assert (mine / "a.txt").read_text() == "one\ntwo\n"
    for part in (
        "turn 1, thinking",
        "This is turn 0.",
        "→ edit_file",
        "Replaced 1 occurrence in a.txt",
        "␛[2J",
        "→ submit",
    ):
        assert part in shown.getvalue()
    assert "\033[2J" not in shown.getvalue()


def test_live_progress_escapes_names() -> None:
    shown = io.StringIO()
    console = Console(file=shown, width=200, force_terminal=True, color_system=None)
    with LiveProgress(console, 1, {}) as listener:
        listener(TrialStarted("t.0"))
        listener(TrialActed("t.0", 1, "[/nonsense] \033]0;title\007"))
        listener.progress.refresh()
    assert "turn 1: [/nonsense] ␛]0;title␇" in shown.getvalue()
