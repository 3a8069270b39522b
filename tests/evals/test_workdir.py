"""The user's own folder: a copy goes in, a diff comes out, and nothing else is ever touched."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import typer
import typer.testing
from rich.console import Console

from agentkit.agent import Agent
from agentkit.cli import app
from agentkit.cli.run import Job, carry_out
from agentkit.cli.workdir import Change, File, apply, changes, pack, read_folder, unpack
from agentkit.models.scripted import Policy, ScriptedModel
from agentkit.task import Task
from agentkit_engine.chat import Tokenizer
from agentkit_environments import open_environment
from agentkit_environments.environment import MAX_ARCHIVE_BYTES
from agentkit_evals.verify import Backend


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "mine"
    (root / "src").mkdir(parents=True)
    (root / ".git" / "hooks").mkdir(parents=True)
    (root / ".git" / "hooks" / "pre-commit").write_text("#!/bin/sh\n")
    (root / "a.txt").write_text("one\ntwo\n")
    (root / "src" / "run.sh").write_text("echo hi\n")
    (root / "src" / "run.sh").chmod(0o755)
    (root / "bin").write_bytes(b"\xff\x00")
    (root / "here").symlink_to("a.txt")
    (root / "code").symlink_to("src")
    return root


def test_what_is_packed_is_what_is_unpacked(folder: Path) -> None:
    files = read_folder(folder)
    assert files == {
        "a.txt": File(b"one\ntwo\n"),
        "bin": File(b"\xff\x00"),
        "code": File(b"", link="src"),
        "here": File(b"", link="a.txt"),
        "src/run.sh": File(b"echo hi\n", executable=True),
    }
    assert unpack(pack(files)) == files


def git(folder: Path, *arguments: str) -> None:
    who = ("-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false")
    subprocess.run(["git", "-C", str(folder), *who, *arguments], check=True, capture_output=True)


def test_in_a_git_checkout_what_git_ignores_stays_at_home(tmp_path: Path) -> None:
    git(tmp_path, "init")
    for path in ("tracked ü.txt", "gone.txt", "sub/kept.log", "build/out"):
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_text(path)
    (tmp_path / ".gitignore").write_text(".venv/\nbuild/\n*.log\n")
    git(tmp_path, "add", "tracked ü.txt", "gone.txt")
    git(tmp_path, "add", "-f", "sub/kept.log")
    git(tmp_path, "commit", "-m", "x")
    (tmp_path / "gone.txt").unlink()
    (tmp_path / "new.txt").write_text("new")
    (tmp_path / ".venv").mkdir()
    (tmp_path / ".venv" / "large").touch()
    os.truncate(tmp_path / ".venv" / "large", MAX_ARCHIVE_BYTES + 1)
    assert list(read_folder(tmp_path)) == [".gitignore", "new.txt", "sub/kept.log", "tracked ü.txt"]
    assert list(read_folder(tmp_path / "sub")) == ["kept.log"]
    assert list(read_folder(tmp_path / "build")) == ["out"]


def test_what_is_too_large_is_named(folder: Path) -> None:
    (folder / "data").mkdir()
    (folder / "data" / "large").touch()
    os.truncate(folder / "data" / "large", MAX_ARCHIVE_BYTES + 1)
    with pytest.raises(typer.BadParameter, match=r"more than 256 MiB, most of it in data \(257 MiB\), "):
        read_folder(folder)


@pytest.mark.anyio
async def test_a_round_trip_through_an_environment_changes_only_what_was_changed(folder: Path) -> None:
    before = read_folder(folder)
    async with await open_environment(backend="unsafe-local") as environment:
        await environment.import_dir(environment.spec.workdir, pack(before))
        commands = (
            "echo three >> a.txt; rm bin here; mkdir -p new .git/hooks; echo x > new/n; echo evil > .git/hooks/evil"
        )
        assert (await environment.exec(f"{commands}; chmod -x src/run.sh; ln -s new/n link")).exit_code == 0
        after = unpack(await environment.export_dir(environment.spec.workdir))
    found = changes(before, after)
    assert [(change.path, change.verb) for change in found] == [
        ("a.txt", "changed"),
        ("bin", "deleted"),
        ("here", "deleted"),
        ("link", "added"),
        ("new/n", "added"),
        ("src/run.sh", "changed"),
    ]
    assert ["".join(line[:1] for line in change.diff()) for change in found] == [
        "-+@  +",
        "B",
        "-+@-",
        "-+@+",
        "-+@+",
        "s",
    ]
    assert apply(folder, found) == []
    assert read_folder(folder) == after
    assert os.listdir(folder / ".git" / "hooks") == ["pre-commit"]


def test_a_directory_may_become_a_file_and_back(folder: Path) -> None:
    there = {**read_folder(folder), "src": File(b"now a file\n")}
    del there["src/run.sh"], there["code"]
    before = read_folder(folder)
    assert apply(folder, changes(before, there)) == []
    assert read_folder(folder) == there
    assert apply(folder, changes(there, before)) == []
    assert read_folder(folder) == before


def test_what_changed_meanwhile_is_left_alone(folder: Path) -> None:
    before = read_folder(folder)
    (folder / "a.txt").write_text("mine\n")
    (folder / "new.txt").write_text("mine too\n")
    after = {**before, "a.txt": File(b"theirs\n"), "new.txt": File(b"theirs\n"), "b.txt": File(b"fine\n")}
    assert apply(folder, changes(before, after)) == [
        "a.txt: it changed meanwhile",
        "new.txt: it changed meanwhile",
    ]
    assert (folder / "a.txt").read_text() == "mine\n" and (folder / "b.txt").read_text() == "fine\n"


def test_no_change_goes_through_a_link(folder: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (folder / "out").symlink_to(outside)
    wanted = [Change("out/x", None, File(b"x")), Change("code/y", None, File(b"y"))]
    assert apply(folder, wanted) == ["code/y: a link stands in its way", "out/x: a link stands in its way"]
    assert os.listdir(outside) == [] and os.listdir(folder / "src") == ["run.sh"]


def test_diffs_of_what_is_no_text() -> None:
    assert list(Change("b", File(b"\xff"), File(b"\xfe")).diff()) == ["Binary file b changed"]
    assert list(Change("e", None, File(b"")).diff()) == ["Empty file e added"]
    newline = list(Change("n", File(b"a"), File(b"a\n")).diff())
    assert newline[3:] == [" a", "-\\ No newline at end of file"]
    assert list(Change("t", File(b"a\n"), None).diff()) == ["--- a/t", "+++ /dev/null", "@@ -1 +0,0 @@", "-a"]


MakeJob = Callable[..., Job]
WANTED = {
    "a.txt": File(b"one\n2\n"),
    "code": File(b"", link="src"),
    "here": File(b"", link="a.txt"),
    "new/deep/n.txt": File(b"new\n"),
    "new/tool": File(b"echo tool\n", executable=True),
    "src/run.sh": File(b"echo hello\n", executable=True),
}


@pytest.fixture
def make_job(folder: Path, tokenizer: Tokenizer, script: Callable[..., Policy]) -> MakeJob:
    """Makes the job of an agent that turns `folder` into `WANTED`."""
    calls = [
        ("edit_file", {"path": "a.txt", "old": "two", "new": "2"}),
        ("edit_file", {"path": "src/run.sh", "old": "hi", "new": "hello"}),
        ("write_file", {"path": "new/deep/n.txt", "content": "new\n"}),
        ("bash", {"command": "rm bin; mkdir -p new; echo echo tool > new/tool; chmod +x new/tool"}),
    ]
    agent = Agent(ScriptedModel(script(calls, [("submit", {"answer": "done"})]), tokenizer))
    task = Task(id="run", instruction="Change it.")

    def make(backend: Backend = "unsafe-local", *, quiet: bool = False) -> Job:
        return Job(task, agent, backend, folder, None, Console(file=sys.stdout, quiet=quiet, width=200))

    return make


@pytest.fixture
def typed(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """A terminal as standard input, and what types on it."""
    keyboard, screen = os.openpty()
    with open(screen) as stdin, open(keyboard, "w") as typist:
        monkeypatch.setattr(sys, "stdin", stdin)
        yield lambda text: print(text, file=typist, flush=True)


def test_apply_makes_the_agents_changes(
    make_job: MakeJob, folder: Path, backend: Backend, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "a.txt").chmod(0o640)
    carry_out(make_job(backend, quiet=True), apply=True, as_json=True)
    found = json.loads(capsys.readouterr().out)
    assert (found["answer"], found["applied"], found["refused"]) == ("done", True, [])
    assert {change["path"]: change["change"] for change in found["changes"]} == {
        "a.txt": "changed",
        "bin": "deleted",
        "new/deep/n.txt": "added",
        "new/tool": "added",
        "src/run.sh": "changed",
    }
    assert read_folder(folder) == WANTED
    modes = {path: (folder / path).stat().st_mode & 0o777 for path in ("a.txt", "src/run.sh")}
    assert modes == {"a.txt": 0o640, "src/run.sh": 0o755}
    assert os.listdir(folder / ".git" / "hooks") == ["pre-commit"]


@pytest.mark.parametrize(("answer", "applied"), [("n", False), ("", False), ("y", True)])
def test_without_apply_the_user_is_asked(
    make_job: MakeJob,
    folder: Path,
    typed: Callable[[str], None],
    answer: str,
    applied: bool,
    capsys: pytest.CaptureFixture[str],
) -> None:
    before = read_folder(folder)
    typed(answer)
    carry_out(make_job(), apply=False, as_json=False)
    shown = capsys.readouterr().out
    assert "+2\n" in shown.partition("Apply these changes? [y/N]")[0]
    assert read_folder(folder) == (WANTED if applied else before)
    end = f"Applied 5 of 5 changes to {folder}." if applied else f"{folder} is as it was; `--apply` accepts the changes"
    assert end in shown


@pytest.mark.parametrize("as_json", [False, True])
def test_where_nobody_can_be_asked_nothing_is_applied(
    make_job: MakeJob, folder: Path, as_json: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    before = read_folder(folder)
    carry_out(make_job(quiet=as_json), apply=False, as_json=as_json)
    shown = capsys.readouterr().out
    assert '"applied": false' in shown if as_json else "is as it was" in shown
    assert read_folder(folder) == before


def test_the_flag_of_the_command(folder: Path, untrained: Path, tmp_path: Path) -> None:
    """The changes are the setup's, since no model of a test could be relied on to make them."""
    task = tmp_path / "task.yaml"
    task.write_text(
        "id: x\ninstruction: Hi.\ntools: []\nagent: {max_tokens: 4}\nenvironment: {setup: ['rm bin; echo x > x']}\n"
    )
    arguments = ["run", str(task), "--workdir", str(folder), "-m", str(untrained), "--env", "unsafe-local"]
    before = read_folder(folder)
    runner = typer.testing.CliRunner()
    assert "is as it was" in runner.invoke(app, arguments, catch_exceptions=False).stdout
    assert read_folder(folder) == before
    assert "Applied 2 of 2 changes" in runner.invoke(app, [*arguments, "--apply"], catch_exceptions=False).stdout
    assert {*read_folder(folder)} == {*before, "x"} - {"bin"}
