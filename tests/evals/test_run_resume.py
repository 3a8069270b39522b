"""`agentkit run --resume`: an interrupted run goes on with its own task and settings, in the same file."""

from __future__ import annotations

import io
import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import anyio
import pytest
import torch
import typer.testing
from rich.console import Console

from agentkit.agent import Agent
from agentkit.cli import app
from agentkit.cli.run import Job
from agentkit.events import TurnFinished
from agentkit.messages import AssistantMessage, Message, ToolMessage
from agentkit.models.scripted import AssistantTurn, Policy, ScriptedModel
from agentkit.task import Task
from agentkit.trajectory import Trajectory
from agentkit_engine.chat import Tokenizer
from agentkit_engine.model.decoder import Decoder, initialize_
from agentkit_engine.training.tiny import tiny_spec
from agentkit_engine.weights.export import export_checkpoint

MakeScript = Callable[..., Policy]
OPTIONS = ("--env", "unsafe-local", "--seed", "3", "--max-tokens", "12", "--effort", "none", "--temperature", "0.9")


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")


def agentkit(*arguments: str | Path, code: int | None = None) -> typer.testing.Result:
    """Run a command. By default 0 and 1 are accepted, since an untrained model may give an answer or not."""
    result = typer.testing.CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)
    assert result.exit_code in ((0, 1) if code is None else (code,)), result.output
    return result


def cut(path: Path, at: bytes) -> bytes:
    """Cut a record after the first line that contains a text, in the middle of the next line; return what was cut."""
    lines = path.read_bytes().splitlines(keepends=True)
    end = next(index for index, line in enumerate(lines) if at in line) + 1
    torn = lines[end][:20] if end < len(lines) else b""
    path.write_bytes(b"".join(lines[:end]) + torn)
    return torn


@pytest.mark.parametrize("at", [b'"header"', b'"role":"system"', b'"turn_started"'])
def test_a_run_goes_on_in_its_file(untrained: Path, tmp_path: Path, at: bytes) -> None:
    path = tmp_path / "t.jsonl"
    whole = json.loads(agentkit("run", "Say hi.", "-m", untrained, *OPTIONS, "--trajectory", path, "--json").stdout)
    ids, header = Trajectory.load(path).token_ids, Trajectory.load(path).header
    torn = cut(path, at)
    result = json.loads(agentkit("run", "--resume", path, "--json").stdout)
    resumed = Trajectory.load(path)
    assert (resumed.token_ids, resumed.header) == (ids, header) and result["trajectory"] == str(path)
    same = ("status", "answer", "limit", "failure", "backend")
    assert [result[name] for name in same] == [whole[name] for name in same]
    assert {**result["usage"], "wall_time_s": 0} == {**whole["usage"], "wall_time_s": 0}
    assert path.with_suffix(".jsonl.torn").read_bytes().endswith(torn + b"\n")
    assert "the run has ended with status" in agentkit("run", "--resume", path, code=2).stderr


def test_the_settings_of_the_run_are_kept(untrained: Path, tmp_path: Path) -> None:
    (tmp_path / "task.yaml").write_text(
        "id: t\ninstruction: Say hi.\nenvironment: {files: {a.txt: x}}\nverifier: {command: test -e a.txt}\n"
    )
    schema = tmp_path / "schema.json"
    schema.write_text('{"enum": ["yes", "no"]}')
    path = tmp_path / "t.jsonl"
    options = ("-m", untrained, *OPTIONS, "--threads", "1", "--output-schema", schema, "--approve", "read-only")
    agentkit("run", tmp_path / "task.yaml", *options, "--trajectory", path)
    before = Trajectory.load(path)
    (tmp_path / "task.yaml").unlink()
    schema.unlink()
    cut(path, b'"turn_started"')
    found = json.loads(agentkit("run", "--resume", path, "--json", "--threads", "2").stdout)
    assert found["reward"] == 1.0 and Trajectory.load(path).messages == before.messages


def test_what_the_record_has_fixed_is_refused(untrained: Path, tmp_path: Path) -> None:
    model, path = tmp_path / "model", tmp_path / "t.jsonl"
    shutil.copytree(untrained, model)
    agentkit("run", "Say hi.", "-m", model, *OPTIONS, "--trajectory", path)
    cut(path, b'"turn_started"')
    before = path.read_bytes()

    def refused(*arguments: str | Path, text: str) -> None:
        shown = " ".join(agentkit("run", *arguments, code=2).output.replace("│", " ").split())
        assert text in shown
        assert path.read_bytes() == before

    kept = f"a resumed run keeps its settings, which {path} has"
    for flag, value in (
        *(("--seed", "4"), ("--model", "tiny"), ("--max-turns", "3"), ("--env", "process"), ("--workdir", ".")),
    ):
        refused("--resume", path, flag, value, text=f"Invalid value for {flag}: {kept}")
    refused("Say ho.", "--resume", path, text=f"Invalid value for TASK: {kept}")
    refused("--resume", path, "--apply", text="no folder to work on")
    refused("--resume", tmp_path / "none.jsonl", text="does not exist")
    refused(text="give a task, or a trajectory with --resume")
    seeded = torch.Generator().manual_seed(1)
    vocab_size = Tokenizer.from_dir(model).vocab_size
    export_checkpoint(initialize_(Decoder(tiny_spec(vocab_size)), seeded), tmp_path / "other")
    shutil.copy(tmp_path / "other" / "model.safetensors", model)
    refused("--resume", path, text="the run was started with other weights of the model model")
    trajectory = Trajectory.load(path)
    settings = {**trajectory.header.metadata["run"], "history": "before.json"}
    for name, metadata, text in (
        ("no", {}, "was not recorded by `agentkit run --trajectory`"),
        ("bad", {"run": {"task": 1}}, "has invalid settings of its run: "),
    ):
        trajectory.header.metadata.clear()
        trajectory.header.metadata.update(metadata)
        trajectory.save(tmp_path / f"{name}.jsonl")
        refused("--resume", tmp_path / f"{name}.jsonl", text=text)
    started = Trajectory.load(path).branch(replace(trajectory.header, metadata={"run": settings}), tmp_path / "h", 0)
    refused("--resume", str(started.path), text="start the run again, with --history before.json")


def test_the_folder_of_the_run_must_exist(untrained: Path, tmp_path: Path) -> None:
    mine, path = tmp_path / "mine", tmp_path / "t.jsonl"
    mine.mkdir()
    agentkit("run", "Say hi.", "-m", untrained, *OPTIONS, "--workdir", "mine", "--trajectory", path)
    cut(path, b'"turn_started"')
    assert f"resuming {path} after 0 turns; turn 1 is done again" in agentkit("run", "--resume", path).stdout
    cut(path, b'"turn_started"')
    mine.rmdir()
    assert f"the folder of the run, {mine}, does not exist" in " ".join(
        agentkit("run", "--resume", path, code=2).output.replace("│", " ").split()
    )


@pytest.mark.parametrize("with_folder", [False, True])
def test_turns_whose_changes_are_lost_are_done_again(
    script: MakeScript, tokenizer: Tokenizer, tmp_path: Path, with_folder: bool
) -> None:
    """The sandbox of a killed run is gone. Its record goes on before the first turn that wrote a file."""
    policy = script(
        [("list_dir", {})],
        [("bash", {"command": "cat a.txt >> b.txt"})],
        [("bash", {"command": "cat b.txt"})],
        [("submit", {"answer": "done"})],
    )
    task = Task.model_validate({"id": "t", "instruction": "Copy.", "environment": {"files": {"a.txt": "1\n"}}})
    agent = Agent(ScriptedModel(policy, tokenizer), thinking="never")
    path, shown = tmp_path / "t.jsonl", io.StringIO()
    mine = tmp_path / "mine" if with_folder else None
    if mine is not None:
        mine.mkdir()

    def run(**options: Any) -> Any:
        console = Console(file=shown, width=200)
        return anyio.run(Job(task, agent, "unsafe-local", mine, options.pop("path", None), console, **options).run)

    whole = run(path=path)
    lines = path.read_bytes().splitlines(keepends=True)
    ends = [index + 1 for index, line in enumerate(lines) if b'"turn_finished"' in line]
    for turns, again in (
        (1, "after 1 turn\n"),
        (2, "after 1 turn; turn 2 is done again\n"),
        (3, "turns 2 to 3 are done"),
    ):
        path.write_bytes(b"".join(lines[: ends[turns - 1]]))
        done = run(record=Trajectory.load(path))
        assert f"resuming {path} " in shown.getvalue() and again in shown.getvalue()
        assert done.result.answer == "done" and done.failure is None
        assert [change.path for change in done.changes] == [change.path for change in whole.changes]
        read = [each.content for each in Trajectory.load(path).messages if isinstance(each, ToolMessage)][2]
        assert read.endswith("1"), "the file was written once in this sandbox"


@pytest.mark.parametrize("breaks_in", [1, 2, 3])
def test_a_run_with_snapshots_goes_on_in_the_files_of_its_last_complete_turn(
    tokenizer: Tokenizer, tmp_path: Path, breaks_in: int
) -> None:
    turns: list[list[tuple[str, dict[str, Any]]]] = [
        [("bash", {"command": "cat a.txt >> b.txt; date +%N > c.txt"})],
        [("bash", {"command": "echo 2 >> b.txt"})],
        [("submit", {"answer": "done"})],
    ]
    breaks = True

    def policy(messages: Sequence[Message], think: bool) -> AssistantTurn:
        said = sum(isinstance(message, AssistantMessage) for message in messages)
        if breaks and said == breaks_in - 1:
            raise RuntimeError("the model is on fire")
        return AssistantTurn(calls=turns[said])

    fields = {"files": {"a.txt": "1\n"}, "setup": ["echo 1 > d.txt"], "snapshots": True}
    task = Task.model_validate({"id": "t", "instruction": "Copy.", "environment": fields})
    agent = Agent(ScriptedModel(policy, tokenizer), thinking="never")
    path, shown = tmp_path / "t.jsonl", io.StringIO()
    console = Console(file=shown, width=200)
    with pytest.raises(RuntimeError, match="on fire"):
        anyio.run(Job(task, agent, "unsafe-local", None, path, console).run)
    [saved] = tmp_path.glob("t.jsonl.*.snapshot")
    breaks = False
    done = anyio.run(Job(task, agent, "unsafe-local", None, None, console, record=Trajectory.load(path)).run)
    kept = "1 turn" if breaks_in == 2 else f"{breaks_in - 1} turns"
    assert f"resuming {path} after {kept}; turn {breaks_in} is done again\n" in shown.getvalue()
    assert [change.path for change in done.changes] == ["b.txt", "c.txt"]
    written = done.changes[0].after
    assert written is not None and written.content == b"1\n2\n" and done.result.answer == "done"
    assert not saved.exists()


def test_snapshots_that_cannot_be_saved_are_refused_by_name(untrained: Path, tmp_path: Path) -> None:
    def refused(*arguments: str | Path, text: str) -> None:
        assert text in " ".join(agentkit(*arguments, code=2).output.replace("│", " ").split())

    start = ("run", "Say hi.", "-m", untrained, *OPTIONS)
    beside = ("--snapshots", "--trajectory", tmp_path / "t.jsonl")
    refused(*start, "--snapshots", text="they are saved beside --trajectory FILE")
    refused(*start, *beside, "--workdir", ".", text="the files of --workdir cannot be captured")
    calls = tmp_path / "calls.yaml"
    calls.write_text("id: c\ninstruction: Go.\nverifier: {calls: any}\n")
    refused("eval", calls, "--snapshots", text="task c: a task with verifier.calls has no environment")
    assert not (tmp_path / "t.jsonl").exists()
    agentkit(*start, *beside)
    assert Trajectory.load(tmp_path / "t.jsonl").header.metadata["run"]["task"]["environment"] == {"snapshots": True}
    cut(tmp_path / "t.jsonl", b'"turn_started"')
    refused("run", "--resume", tmp_path / "t.jsonl", "--snapshots", text="Invalid value for --snapshots")


KILLED_RUN = """
import os, signal, sys, time
from pathlib import Path
from agentkit.cli import main
from agentkit_engine.runtime.disk_cache import survey

turns, cache = int(sys.argv.pop(1)), Path(sys.argv.pop(1))
write, prompts = os.write, 0

def write_or_die(fd, data):
    global prompts
    prompts += bytes(data).count(b'"kind":"prompt"')
    if prompts == turns:
        while sum(model.checkpoints for model in survey(cache)) < turns:  # a thread writes them
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGKILL)
    return write(fd, data)

os.write = write_or_die
main()
"""
"""`agentkit`, killed before it records turn `argv[1]`, once the disk cache `argv[2]` has the state of every prompt."""


def test_a_killed_run_goes_on_with_its_state_from_the_disk_cache(tmp_path: Path) -> None:
    """Without the cache, everything is computed again; the ids are the same."""
    (tmp_path / "task.yaml").write_text(
        "id: t\ninstruction: What is the value of level in settings.txt?\n"
        'environment: {files: {settings.txt: "name=x\\nlevel=7\\n"}, snapshots: true}\n'
        "agent: {max_tokens: 200}\nverifier: {command: 'true'}\n"
    )
    command = ("run", "task.yaml", "-m", "tiny", "--env", "unsafe-local", "--json", "--trajectory")
    turns = json.loads(agentkit(*command, "whole.jsonl").stdout)["usage"]["turns"]
    assert turns > 1, "the packaged model made no call"
    whole = Trajectory.load(tmp_path / "whole.jsonl").token_ids

    (tmp_path / "warm").mkdir()
    arguments = [str(turns), "cache", *command, "warm/t.jsonl", "--cache-dir", "cache"]
    killed = subprocess.run([sys.executable, "-c", KILLED_RUN, *arguments], capture_output=True, timeout=120)
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    shutil.copytree(tmp_path / "warm", tmp_path / "cold")
    record = Trajectory.load(tmp_path / "warm" / "t.jsonl")
    before = [each for each in record.records if isinstance(each, TurnFinished)][-1].usage
    last = max(place for place, segment in enumerate(record.segments) if segment.kind == "prompt")
    prompt_end = sum(len(segment.ids) for segment in record.segments[: last + 1])

    computed = {}
    for folder, cache, found_on_disk in (("warm", "cache", prompt_end), ("cold", "empty", 0)):
        resumed = json.loads(agentkit("run", "--resume", f"{folder}/t.jsonl", "--cache-dir", cache, "--json").stdout)
        assert Trajectory.load(tmp_path / folder / "t.jsonl").token_ids == whole
        assert resumed["usage"]["cache_hit_tokens"] - before.cache_hit_tokens == found_on_disk
        computed[folder] = resumed["usage"]["cache_miss_tokens"] - before.cache_miss_tokens
    assert computed["warm"] == computed["cold"] - prompt_end
