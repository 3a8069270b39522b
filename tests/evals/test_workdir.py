"""The user's own folder: a copy goes into the sandbox, a diff comes out, and nothing else is changed."""

from __future__ import annotations

import errno
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import typer
import typer.testing
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from agentkit.agent import Agent
from agentkit.cli import app
from agentkit.cli.listing import list_folder
from agentkit.cli.run import Job, carry_out
from agentkit.cli.workdir import (
    Change,
    File,
    apply,
    changes,
    compare,
    pack,
    read_file,
    read_files,
    unpack,
    without_dropped,
)
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


def read_folder(folder: Path) -> dict[str, File]:
    """Return every file and link of a folder that an agent sees."""
    found = {path: read_file(folder / path) for path in sorted(list_folder(folder).files)}
    return {path: file for path, file in found.items() if isinstance(file, File)}


def test_unpack_reverses_pack(folder: Path) -> None:
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


def test_files_ignored_by_git_are_not_copied(tmp_path: Path) -> None:
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


def test_a_link_can_become_a_directory(tmp_path: Path) -> None:
    before = {"a/b": File(b"", link="a"), "b": File(b"", link="a")}
    after = {"a": File(b"", link="a"), "b/b/a": File(b"", link="a")}
    make(tmp_path / "mine", before)
    assert apply(tmp_path / "mine", changes(before, after)) == []
    assert read_folder(tmp_path / "mine") == after


def test_a_folder_that_is_too_large_names_its_largest_entry(folder: Path) -> None:
    (folder / "data").mkdir()
    (folder / "data" / "large").touch()
    os.truncate(folder / "data" / "large", MAX_ARCHIVE_BYTES + 1)
    with pytest.raises(
        typer.BadParameter, match=r"more than 256 MiB, most of it in data \(257 MiB\), .* and --copy was given; "
    ):
        read_files(folder, list_folder(folder), "--copy was given")


@pytest.mark.anyio
async def test_a_round_trip_through_an_environment_shows_only_its_changes(folder: Path) -> None:
    before = read_folder(folder)
    async with await open_environment(backend="unsafe-local") as environment:
        await environment.import_dir(environment.spec.workdir, pack(before))
        commands = (
            "echo three >> a.txt; rm bin here; mkdir -p new .git/hooks; echo x > new/n; echo evil > .git/hooks/evil"
        )
        assert (await environment.exec(f"{commands}; chmod -x src/run.sh; ln -s new/n link")).exit_code == 0
        after = unpack((await environment.export_dir(environment.spec.workdir)).data)
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
        "h-+@-",
        "l-+@+",
        "-+@+",
        "s",
    ]
    assert apply(folder, found) == []
    assert read_folder(folder) == after
    assert os.listdir(folder / ".git" / "hooks") == ["pre-commit"]


def test_a_directory_can_become_a_file_and_back(folder: Path) -> None:
    there = {**read_folder(folder), "src": File(b"now a file\n")}
    del there["src/run.sh"], there["code"]
    before = read_folder(folder)
    assert apply(folder, changes(before, there)) == []
    assert read_folder(folder) == there
    assert apply(folder, changes(there, before)) == []
    assert read_folder(folder) == before


def test_nothing_is_applied_if_a_file_changed_during_the_run(folder: Path) -> None:
    before = read_folder(folder)
    (folder / "a.txt").write_text("mine\n")
    (folder / "new.txt").write_text("mine too\n")
    now = read_folder(folder)
    after = {**before, "a.txt": File(b"theirs\n"), "new.txt": File(b"theirs\n"), "b.txt": File(b"fine\n")}
    assert apply(folder, changes(before, after)) == [
        "a.txt: it changed during the run",
        "new.txt: it changed during the run",
    ]
    assert read_folder(folder) == now


def test_no_change_goes_through_a_link(folder: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (folder / "out").symlink_to(outside)
    wanted = [Change("code/y", None, File(b"y")), Change("fine", None, File(b"")), Change("out/x", None, File(b"x"))]
    assert apply(folder, wanted) == [
        "code/y: one of its parent directories is a link",
        "out/x: one of its parent directories is a link",
    ]
    assert os.listdir(outside) == [] and os.listdir(folder / "src") == ["run.sh"]
    assert not (folder / "fine").exists()


def test_diffs_of_binary_empty_and_long_files() -> None:
    assert list(Change("b", File(b"\xff"), File(b"\xfe")).diff()) == ["Binary file b changed"]
    assert list(Change("e", None, File(b"")).diff()) == ["Empty file e added"]
    assert list(Change("l", File(b""), File(b"x\n" * 20_001)).diff()) == ["Very long file l changed"]
    newline = list(Change("n", File(b"a"), File(b"a\n")).diff())
    assert newline[3:] == ["-a", "\\ No newline at end of file", "+a"]
    assert list(Change("t", File(b"a\n"), None).diff()) == ["--- a/t", "+++ /dev/null", "@@ -1 +0,0 @@", "-a"]


TEXT, TOOL, LINK = File(b"link to t\n"), File(b"link to t\n", executable=True), File(b"", link="t")


@pytest.mark.parametrize(
    ("before", "after", "first"),
    [
        (TEXT, TOOL, "x: becomes executable"),
        (TOOL, TEXT, "x: is no longer executable"),
        (File(b"a\n"), TOOL, "x: becomes executable"),
        (TOOL, File(b"\xff"), "x: is no longer executable"),
        (None, TOOL, "x: becomes executable"),
        (None, File(b"", executable=True), "x: becomes executable"),
        (TEXT, LINK, "x: a file becomes a link"),
        (TOOL, LINK, "x: a file becomes a link"),
        (LINK, TEXT, "x: a link becomes a file"),
        (None, LINK, "x: a link is added"),
        (LINK, None, "x: a link is deleted"),
        (LINK, File(b"", link="u"), "x: a link is changed"),
    ],
)
def test_diffs_show_changed_modes_and_links(before: File | None, after: File | None, first: str) -> None:
    shown = list(Change("x", before, after).diff())
    assert shown[0] == first


@pytest.mark.parametrize(
    "letter", ["\n", "\r", "\x1b", "\x7f", "\x9b", "\u202e", "\u2066", "\u2028", "\u200b", "\ud800"]
)
def test_a_name_or_a_line_can_forge_nothing(letter: str) -> None:
    name = f"a{letter}+++ b/other"
    for change in (
        Change(name, None, File(b"x\n")),
        Change(name, File(b"\xff"), None),
        Change(name, File(b""), File(b"", executable=True)),
        Change(name, None, File(b"", link=name)),
        Change("f", File(b"a\n"), File(f"a{letter}b\n".encode("utf-8", "surrogatepass"))),
    ):
        lines = list(change.diff())
        assert all(line.isprintable() for line in lines), lines
        assert sum(line.startswith("+++ ") for line in lines) <= 1


def test_a_content_line_cannot_imitate_a_diff_header() -> None:
    forged = b"++ b/other\n\\ No newline at end of file\n@@ -1 +1 @@\n"
    assert list(Change("x", None, File(forged)).diff()) == [
        "--- /dev/null",
        "+++ b/x",
        "@@ -0,0 +1,3 @@",
        "+++ b/other",
        "+\\ No newline at end of file",
        "+@@ -1 +1 @@",
    ]
    both = File(b"a\n\\ No newline at end of file\n"), File(b"a")
    assert list(Change("x", *both).diff())[3:] == [
        "-a",
        "-\\ No newline at end of file",
        "+a",
        "\\ No newline at end of file",
    ]


@pytest.fixture
def odd(folder: Path) -> Path:
    """A folder with entries that are not copied."""
    os.mkfifo(folder / "pipe")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(folder / "sock"))
    os.mkdir(folder / "empty")
    return folder


def test_entries_other_than_files_and_links_are_left_out_and_named(odd: Path) -> None:
    found = list_folder(odd)
    assert found.left_out == ["pipe: a named pipe", "sock: a socket"]
    assert set(found.files) == {"a.txt", "bin", "code", "here", "src/run.sh"}
    assert found.hidden == [".git", "pipe", "sock"]


@pytest.mark.parametrize("path", ["pipe", "sock", "empty", "pipe/x", "src"])
@pytest.mark.parametrize("content", [File(b"x"), File(b"", link="a.txt")])
def test_an_entry_that_did_not_travel_is_never_replaced(odd: Path, path: str, content: File) -> None:
    before = read_folder(odd)
    (refused,) = apply(odd, [Change("a.txt", before["a.txt"], None), Change(path, None, content)])
    assert refused.startswith(f"{path}: ")
    assert read_folder(odd) == before
    assert sorted(os.listdir(odd)) == [".git", "a.txt", "bin", "code", "empty", "here", "pipe", "sock", "src"]


@pytest.mark.parametrize(
    ("there", "path"), [("build/out", "build"), ("out.log", "out.log/x"), ("build/out", "build/out/x")]
)
def test_a_new_file_does_not_replace_an_ignored_entry(folder: Path, there: str, path: str) -> None:
    shutil.rmtree(folder / ".git")
    git(folder, "init")
    (folder / ".gitignore").write_text("build/\n*.log\n")
    (folder / there).parent.mkdir(exist_ok=True)
    (folder / there).write_text("precious")
    before = read_folder(folder)
    after = {**before, "a.txt": File(b"new"), path: File(b"theirs")}
    assert len(apply(folder, changes(before, after))) == 1
    assert read_folder(folder) == before
    assert (folder / there).read_text() == "precious"
    # `compare` leaves out the ignored path, and the other change is applied.
    wanted, left_out = compare(folder, list_folder(folder), before, pack(after))
    assert [change.path for change in wanted] == ["a.txt"]
    assert left_out == [f"{path}: added, and ignored by git"]
    assert apply(folder, wanted) == []


def test_paths_dropped_by_an_export_are_not_deleted(folder: Path) -> None:
    before = read_folder(folder)
    after = {path: file for path, file in before.items() if path not in ("a.txt", "src/run.sh", "here")}
    dropped = ["'a.txt': a pipe, a socket or a device", "'src': cannot be read: x"]
    wanted, left_out = compare(folder, list_folder(folder), before, pack(after), dropped)
    assert [(change.path, change.verb) for change in wanted] == [("here", "deleted")]
    assert left_out == dropped
    assert compare(folder, list_folder(folder), before, pack(after), [*dropped, "... and 3 more"])[0] == []
    long = "n" * 250
    shown = f"'{long[:100]}...{long[-80:]}': a pipe"
    assert without_dropped([Change(long, File(b""), None)], [shown]) == []
    quoted = "it's \n"
    assert without_dropped([Change(quoted, File(b""), None)], [f"{quoted!r}: a pipe"]) == []


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_unreadable_entries_are_left_out(folder: Path) -> None:
    (folder / "a.txt").chmod(0)
    (folder / "src").chmod(0)
    listing = list_folder(folder)
    assert listing.left_out == ["src: Permission denied"]
    assert read_files(folder, listing, "")[1] == ["a.txt: a file that cannot be read (Permission denied)"]
    (folder / "src").chmod(0o755)


@pytest.mark.parametrize("path", ["../x", "/x", "a/../../x", ".git/hooks/x", ".GIT/x", "sub/.git/x", "", ".", "a//b"])
def test_a_path_that_leads_elsewhere_is_refused(folder: Path, path: str) -> None:
    assert apply(folder, [Change("ok", None, File(b"")), Change(path, None, File(b"x"))])
    assert not (folder / "ok").exists()


def test_a_replaced_file_keeps_its_permissions_and_owner(folder: Path) -> None:
    (folder / "a.txt").chmod(0o640)
    if os.geteuid() == 0:
        os.chown(folder / "a.txt", 1234, 1234)
    (folder / "src").chmod(0o750)
    owner = (folder / "a.txt").stat().st_uid
    before = read_folder(folder)
    after = {**before, "a.txt": File(b"x", executable=True), "src/other": File(b"")}
    del after["src/run.sh"]
    assert apply(folder, changes(before, after)) == []
    found = (folder / "a.txt").stat()
    assert (found.st_mode & 0o777, found.st_uid) == (0o750, owner)
    assert (folder / "src").stat().st_mode & 0o777 == 0o750


NAMES = st.sampled_from(["a", "b", "c", "d", "é", "x y", "-f", "\udcff", "n\nl", "\u202ec"])
PATHS = st.lists(NAMES, min_size=1, max_size=3).map("/".join)
FILES = st.one_of(
    st.builds(File, st.binary(max_size=6), st.booleans()),
    st.builds(lambda link: File(b"", link=link), st.sampled_from(["a", "gone", "../b"])),
)


@st.composite
def trees(draw: st.DrawFn) -> dict[str, File]:
    """Draw files and links by path, none below another."""
    drawn = draw(st.dictionaries(PATHS, FILES, max_size=6))
    return {path: file for path, file in drawn.items() if not any(other.startswith(path + "/") for other in drawn)}


def make(folder: Path, tree: Mapping[str, File]) -> None:
    folder.mkdir()
    for path, file in tree.items():
        target = folder / path
        target.parent.mkdir(parents=True, exist_ok=True)
        if file.link is not None:
            target.symlink_to(file.link)
        else:
            target.write_bytes(file.content)
            target.chmod(0o755 if file.executable else 0o644)


def look(folder: Path) -> dict[str, object]:
    """Return the mode and content of every entry, including directories."""
    found: dict[str, object] = {}
    for parent, directories, names in os.walk(folder):
        for name in [*directories, *names]:
            path = Path(parent, name)
            what = os.readlink(path) if path.is_symlink() else path.read_bytes() if path.is_file() else None
            found[str(path.relative_to(folder))] = (path.lstat().st_mode, what)
    return found


@given(before=trees(), after=trees())
@settings(max_examples=40, deadline=None)
def test_after_applying_the_folder_is_what_the_diff_said(before: dict[str, File], after: dict[str, File]) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary, "mine")
        make(folder, before)
        assert read_folder(folder) == before
        assert unpack(pack(after)) == after
        assert apply(folder, changes(before, after)) == []
        assert read_folder(folder) == after
        make(Path(temporary, "fresh"), after)
        assert look(folder).keys() == look(Path(temporary, "fresh")).keys()  # no directories left over


@given(before=trees(), after=trees(), data=st.data())
@settings(max_examples=40, deadline=None)
def test_a_failure_at_any_step_leaves_the_folder_as_it_was(
    before: dict[str, File], after: dict[str, File], data: st.DataObject
) -> None:
    calls = data.draw(st.integers(1, 25))
    with tempfile.TemporaryDirectory() as temporary, pytest.MonkeyPatch.context() as patch:
        folder = Path(temporary, "mine")
        make(folder, before)
        there = look(folder)
        left = [calls]

        def failing(name: str) -> None:
            real = getattr(os, name)

            def call(*arguments: object, **keywords: object) -> object:
                left[0] -= 1
                if left[0] == 0:
                    raise OSError(errno.EIO, "injected", str(arguments[0]))
                return real(*arguments, **keywords)

            patch.setattr(os, name, call)

        for name in ("rename", "link", "mkdir", "rmdir", "symlink", "chmod", "open"):
            failing(name)
        problems = apply(folder, changes(before, after))
        patch.undo()
        if left[0] > 0:
            assert problems == [] and read_folder(folder) == after
        elif problems:
            assert look(folder) == there
        else:  # only the cleanup failed
            assert {path: file for path, file in read_folder(folder).items() if ".agentkit" not in path} == after


@given(before=trees(), after=trees(), mine=trees())
@settings(max_examples=40, deadline=None)
def test_what_the_user_changed_meanwhile_is_noticed(
    before: dict[str, File], after: dict[str, File], mine: dict[str, File]
) -> None:
    wanted = changes(before, after)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary, "mine")
        make(folder, mine)
        there = look(folder)
        if apply(folder, wanted):
            assert look(folder) == there
        else:
            assert all(mine.get(change.path) == change.before for change in wanted)
            expected = {**mine, **{change.path: change.after for change in wanted}}
            assert read_folder(folder) == {path: file for path, file in expected.items() if file is not None}


def test_a_change_between_the_check_and_the_switch_is_noticed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = read_folder(folder)
    real = os.rename

    def rename(source: Path, target: Path) -> None:
        if Path(source).name == "a.txt":
            (folder / "a.txt").write_text("mine, at the last moment")
        real(source, target)

    monkeypatch.setattr(os, "rename", rename)
    assert apply(folder, changes(before, {**before, "a.txt": File(b"x"), "b.txt": File(b"y")})) == [
        "a.txt: it changed during the run"
    ]
    assert (folder / "a.txt").read_text() == "mine, at the last moment"
    assert set(os.listdir(folder)) == {".git", "a.txt", "bin", "code", "here", "src"}


def test_a_file_that_appears_at_the_last_moment_is_not_replaced(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = read_folder(folder)
    real = os.link

    def link(source: Path, target: Path, **keywords: bool) -> None:
        if Path(target).name == "new.txt":
            (folder / "new.txt").write_text("mine")
        real(source, target, **keywords)

    monkeypatch.setattr(os, "link", link)
    (refused,) = apply(folder, changes(before, {**before, "a.txt": File(b"x"), "new.txt": File(b"y")}))
    assert "File exists" in refused
    assert (folder / "new.txt").read_text() == "mine" and (folder / "a.txt").read_text() == "one\ntwo\n"


def test_apply_works_without_hard_links(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def link(source: Path, target: Path, **keywords: bool) -> None:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM), str(source))

    monkeypatch.setattr(os, "link", link)
    before = read_folder(folder)
    after = {**before, "a.txt": File(b"x"), "new": File(b"", link="a.txt")}
    assert apply(folder, changes(before, after)) == []
    assert read_folder(folder) == after
    assert len(apply(folder, [Change("a.txt", after["a.txt"], None), Change("b", File(b""), None)])) == 1
    assert read_folder(folder) == after


def test_a_failed_undo_names_the_stage(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def link(source: Path, target: Path, **keywords: bool) -> None:
        raise OSError(errno.EIO, "injected", str(source))

    monkeypatch.setattr(os, "link", link)
    before = read_folder(folder)
    (problem,) = apply(folder, changes(before, {**before, "a.txt": File(b"x")}))
    (stage,) = folder.glob(".agentkit-apply-*")
    assert f"the missing originals are in {stage}" in problem
    assert (stage / "old-1").read_text() == "one\ntwo\n"


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
    """Return a factory of jobs whose agent turns `folder` into `WANTED`."""
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
    """Replace standard input by a terminal; yield a function that types on it."""
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


def test_odd_names_and_modes_survive_every_backend(
    folder: Path,
    tokenizer: Tokenizer,
    script: Callable[..., Policy],
    backend: Backend,
    capsys: pytest.CaptureFixture[str],
) -> None:
    names = r"""printf x > "$(printf 'bad\377')"; printf y > "$(printf 'esc\033]0;t\007')" """
    command = f"{names}; chmod +x a.txt; echo z >> a.txt"
    agent = Agent(ScriptedModel(script([("bash", {"command": command})], [("submit", {"answer": "done"})]), tokenizer))
    job = Job(Task(id="run", instruction="x"), agent, backend, folder, None, Console(file=sys.stdout, width=200))
    carry_out(job, apply=True, as_json=False)
    shown = capsys.readouterr().out
    assert "\x1b]" not in shown
    assert "+++ b/bad<U+DCFF>" in shown and "+++ b/esc␛]0;t␇" in shown and "a.txt: becomes executable" in shown
    assert os.listdir(os.fsencode(folder)).count(b"bad\377") == 1
    assert (folder / "a.txt").stat().st_mode & 0o111
    before = read_folder(folder)
    carry_out(replace(job, console=Console(quiet=True)), apply=False, as_json=True)
    assert json.loads(capsys.readouterr().out)["changes"][0]["path"] == "a.txt"
    assert read_folder(folder) == before


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
    end = f"Applied 5 changes to {folder}." if applied else f"{folder} is unchanged. Give --apply, --patch or --branch"
    assert end in shown


@pytest.mark.parametrize("as_json", [False, True])
def test_without_a_terminal_nothing_is_applied(
    make_job: MakeJob, folder: Path, as_json: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    before = read_folder(folder)
    carry_out(make_job(quiet=as_json), apply=False, as_json=as_json)
    shown = capsys.readouterr().out
    assert '"applied": false' in shown if as_json else "is unchanged" in shown
    assert read_folder(folder) == before


def test_the_workdir_option(folder: Path, untrained: Path, tmp_path: Path) -> None:
    """The task's setup makes the changes, because a test model cannot be relied on to make them."""
    task = tmp_path / "task.yaml"
    task.write_text(
        "id: x\ninstruction: Hi.\ntools: []\nagent: {max_tokens: 4}\nenvironment: {setup: ['rm bin; echo x > x']}\n"
    )
    arguments = ["run", str(task), "--workdir", str(folder), "-m", str(untrained), "--env", "unsafe-local"]
    before = read_folder(folder)
    runner = typer.testing.CliRunner()
    assert "is unchanged" in runner.invoke(app, arguments, catch_exceptions=False).stdout
    assert read_folder(folder) == before
    assert "Applied 2 changes" in runner.invoke(app, [*arguments, "--apply"], catch_exceptions=False).stdout
    assert {*read_folder(folder)} == {*before, "x"} - {"bin"}
