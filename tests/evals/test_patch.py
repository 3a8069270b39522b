"""The agent's changes as a patch or as a branch: what git makes of them, and what stays as it was."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
import typer
import typer.testing
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from rich.console import Console

from agentkit.agent import Agent
from agentkit.cli import app
from agentkit.cli.changes import write
from agentkit.cli.git import GitError
from agentkit.cli.listing import list_folder
from agentkit.cli.patch import check_branch, check_patch, make_branch, make_patch
from agentkit.cli.run import Job, carry_out
from agentkit.cli.workdir import Change, File, apply, changes, read_file
from agentkit.models.scripted import Policy, ScriptedModel
from agentkit.task import Task
from agentkit_engine.chat import Tokenizer


@pytest.fixture(autouse=True)
def nobody_configured_git(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tmp_path_factory.mktemp("home") / "gitconfig"
    config.write_text("[user]\n\tname = Ada\n\temail = ada@example.com\n[diff]\n\tnoprefix = true\n")
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", str(config))
    monkeypatch.setenv("GIT_CONFIG_NOSYSTEM", "1")


def git(folder: Path, *arguments: str) -> str:
    done = subprocess.run(["git", "-C", str(folder), *arguments], check=True, capture_output=True)
    return os.fsdecode(done.stdout)


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    root = tmp_path / "repo"
    (root / "src").mkdir(parents=True)
    git(root, "init", "-q", "-b", "main")
    (root / "a.txt").write_text("one\ntwo\nthree\n")
    (root / "src" / "run.sh").write_text("echo hi\n")
    (root / "gone").write_text("gone")
    (root / "data").write_bytes(bytes(range(256)))
    (root / "link").symlink_to("a.txt")
    git(root, "add", ".")
    git(root, "commit", "-q", "-m", "first")
    return root


def read(folder: Path) -> dict[str, File]:
    found = {path: read_file(folder / path) for path in list_folder(folder).files}
    return {path: file for path, file in found.items() if isinstance(file, File)}


def edited(before: dict[str, File]) -> dict[str, File]:
    after = {
        **before,
        "a.txt": File(b"one\n2\nthree"),
        "src/run.sh": File(b"echo hi\n", executable=True),
        "data": File(bytes(range(255, -1, -1))),
        "link": File(b"", link="src/run.sh"),
        "new/tool": File(b"#!/bin/sh\n", executable=True),
        "new/empty": File(b""),
        'odd "name\\\n\udcff\u202e': File(b"odd\n"),
    }
    del after["gone"]
    return after


def state(folder: Path) -> tuple[object, ...]:
    """Return what a patch or a branch must not change: files, index, HEAD, other branches, configuration."""
    places = [".git/index", ".git/HEAD", ".git/config", ".git/logs/HEAD", ".git/refs/heads/main"]
    return read(folder), [(folder / place).read_bytes() for place in places if (folder / place).exists()]


def test_a_patch_applies_to_a_dirty_tree(repository: Path, tmp_path: Path) -> None:
    (repository / "a.txt").write_text("one\ntwo\nthree\nmine\n")
    (repository / "src" / "untracked").write_text("mine\n")
    before = read(repository)
    after = {**edited(before), "a.txt": File(b"one\n2\nthree\nmine\n"), "src/untracked": File(b"theirs\n")}
    there = state(repository)
    (tmp_path / "p").write_bytes(make_patch(repository, changes(before, after)))
    assert state(repository) == there
    git(repository, "apply", str(tmp_path / "p"))
    assert read(repository) == after


def test_a_patch_of_a_subfolder_and_of_a_folder_without_git(repository: Path, tmp_path: Path) -> None:
    before = read(repository / "src")
    patch = make_patch(repository / "src", changes(before, {**before, "x": File(b"x\n")}))
    (tmp_path / "p").write_bytes(patch)
    git(repository, "apply", str(tmp_path / "p"))
    assert (repository / "src" / "x").read_text() == "x\n"
    plain = tmp_path / "plain"
    plain.mkdir()
    (plain / "p").write_bytes(make_patch(plain, [Change("d/x", None, File(b"x\n"))]))
    git(plain, "apply", "p")
    assert (plain / "d" / "x").read_text() == "x\n"


@pytest.mark.parametrize("autocrlf", ["true", "input", "false"])
def test_line_ends(repository: Path, tmp_path: Path, autocrlf: str) -> None:
    git(repository, "config", "core.autocrlf", autocrlf)
    git(repository, "config", "core.safecrlf", "true")
    (repository / "a.txt").write_bytes(b"one\r\ntwo\r\nthree\r\n")
    before = read(repository)
    after = {**before, "a.txt": File(b"one\r\n2\r\nthree\r\n")}
    make_branch(repository, "b", changes(before, after), "m")
    stored = subprocess.run(["git", "-C", str(repository), "show", "b:a.txt"], capture_output=True, check=True).stdout
    assert stored == (b"one\r\n2\r\nthree\r\n" if autocrlf == "false" else b"one\n2\nthree\n")
    (tmp_path / "p").write_bytes(make_patch(repository, changes(before, after)))
    git(repository, "apply", str(tmp_path / "p"))
    assert (repository / "a.txt").read_bytes() == b"one\r\n2\r\nthree\r\n"


def test_a_branch_leaves_everything_else_as_it_was(repository: Path) -> None:
    for hook in ("reference-transaction", "post-index-change", "pre-commit", "post-commit", "commit-msg"):
        script = repository / ".git" / "hooks" / hook
        script.parent.mkdir(exist_ok=True)
        script.write_text("#!/bin/sh\ntouch ../hooked hooked\nexit 1\n")
        script.chmod(0o755)
    before = read(repository)
    there = state(repository)
    assert make_branch(repository, "agent/fix", changes(before, edited(before)), "subject\n\nbody\n") == []
    assert state(repository) == there and not list(repository.rglob("hooked"))
    assert git(repository, "log", "-2", "--format=%an %s", "agent/fix") == "Ada subject\nAda first\n"
    git(repository, "-c", "core.hooksPath=/dev/null", "checkout", "-q", "agent/fix")
    assert read(repository) == edited(before)


def test_a_branch_with_uncommitted_changes_says_which_it_holds(repository: Path) -> None:
    (repository / "a.txt").write_text("mine\n")
    (repository / "data").unlink()
    (repository / "new").mkdir()
    (repository / "new" / "mine").write_text("mine\n")
    git(repository, "add", "-A", "data")
    before = read(repository)
    there = state(repository)
    after = {**before, "a.txt": File(b"mine\ntheirs\n"), "new/mine": File(b"theirs\n"), "src/x": File(b"")}
    assert make_branch(repository, "b", changes(before, after), "m") == [
        "The commit also holds your uncommitted changes to a.txt.",
        "The commit also holds your uncommitted changes to new/mine.",
        "The commit does not hold your uncommitted changes to 1 other paths.",
    ]
    assert state(repository) == there
    assert git(repository, "diff", "--name-only", "main", "b").split() == ["a.txt", "new/mine", "src/x"]


@pytest.mark.parametrize("kind", ["empty", "detached", "worktree", "subfolder", "sha256", "no file mode", "sparse"])
def test_a_branch_in_every_kind_of_checkout(repository: Path, tmp_path: Path, kind: str) -> None:
    folder, expected = repository, ["a.txt", "tool"]
    if kind == "detached":
        git(folder, "checkout", "-q", "--detach")
    elif kind == "worktree":
        folder = tmp_path / "tree"
        git(repository, "worktree", "add", "-q", str(folder), "-b", "other")
    elif kind == "subfolder":
        folder, expected = repository / "src", ["src/a.txt", "src/tool"]
    elif kind == "no file mode":
        git(folder, "config", "core.fileMode", "false")
    elif kind == "sparse":
        git(folder, "sparse-checkout", "set", "src")
    elif kind in ("empty", "sha256"):
        folder, expected = tmp_path / "new", ["a.txt", "tool"]
        folder.mkdir()
        git(folder, "init", "-q", *(["--object-format=sha256"] if kind == "sha256" else []))
    before = read(folder)
    after = {**before, "a.txt": File(b"changed\n"), "tool": File(b"x\n", executable=True)}
    check_branch(folder, "b")
    make_branch(folder, "b", changes(before, after), "m")
    assert git(folder, "show", "--format=", "--name-only", "b").split() == expected
    assert git(folder, "ls-tree", "b", "tool").startswith("100755 blob ")
    whole = ["a.txt", "data", "gone", "link", "src/run.sh", "tool"]
    if kind not in ("empty", "sha256", "subfolder"):
        assert git(folder, "ls-tree", "-r", "--name-only", "b").split() == whole


def test_a_filter_of_the_user_runs_as_in_git_add(repository: Path) -> None:
    git(repository, "config", "filter.upper.clean", "tr a-z A-Z")
    (repository / ".gitattributes").write_text("*.up filter=upper\n")
    git(repository, "add", ".gitattributes")
    git(repository, "commit", "-q", "-m", "attributes")
    make_branch(repository, "b", [Change("src/x.up", None, File(b"text\n"))], "m")
    assert git(repository, "show", "b:src/x.up") == "TEXT\n"


@pytest.mark.parametrize(
    ("branch", "reason"),
    [
        ("main", "the branch main exists already and is never moved"),
        ("a..b", "is not a name for a branch"),
        ("-x", "is not a name for a branch"),
        ("main/x", None),
        ("", "is not a name for a branch"),
    ],
)
def test_branches_that_are_refused(repository: Path, branch: str, reason: str | None) -> None:
    if reason is None:  # git itself finds out only when it makes the branch
        with pytest.raises(GitError, match="main"):
            make_branch(repository, branch, [Change("x", None, File(b""))], "m")
        return
    with pytest.raises(typer.BadParameter, match=reason):
        check_branch(repository, branch)


def test_where_no_branch_can_be_made(repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(typer.BadParameter, match="is not in a git checkout; `git init` makes it one, or use --apply"):
        check_branch(tmp_path, "b")
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", os.devnull)
    git(repository, "config", "user.useConfigOnly", "true")
    with pytest.raises(typer.BadParameter, match="git cannot commit here: "):
        check_branch(repository, "b")


def test_where_no_patch_can_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "there").write_text("")
    check_patch(tmp_path / "new")
    for path, reason in (("there", "never overwritten"), ("no/p", "there is no directory")):
        with pytest.raises(typer.BadParameter, match=reason):
            check_patch(tmp_path / path)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(typer.BadParameter, match="git is needed to make the patch, but it is not installed"):
        check_patch(tmp_path / "new")


@pytest.mark.parametrize("flag", [["--apply"], ["--patch", "p"], ["--branch", "b"], ["--copy"], ["--include-ignored"]])
def test_flags_on_the_folder_need_a_folder(flag: list[str]) -> None:
    result = typer.testing.CliRunner().invoke(app, ["run", "Do it.", *flag])
    assert result.exit_code == 2 and "no folder to work on" in result.output


NAMES = st.sampled_from(["a", "b", "d", "é", "x y", "\udcff", 'q"\\', "n\nl", "\t"])
PATHS = st.lists(NAMES, min_size=1, max_size=3).map("/".join)
FILES = st.one_of(
    st.builds(File, st.binary(max_size=6), st.booleans()),
    st.builds(lambda link: File(b"", link=link), st.sampled_from(["a", "gone\n"])),
)


@st.composite
def trees(draw: st.DrawFn) -> dict[str, File]:
    drawn = draw(st.dictionaries(PATHS, FILES, max_size=5))
    return {path: file for path, file in drawn.items() if not any(other.startswith(path + "/") for other in drawn)}


@given(before=trees(), after=trees())
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_patch_and_a_branch_hold_exactly_the_changes(before: dict[str, File], after: dict[str, File]) -> None:
    wanted = changes(before, after)
    links = [path for path, file in before.items() if file.link is not None]
    assume(wanted and not any(path.startswith(f"{link}/") for link in links for path in after))  # see `make_patch`
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary, "mine")
        folder.mkdir()
        git(folder, "init", "-q", "-b", "main")
        assert apply(folder, changes({}, before)) == []
        git(folder, "add", "-A")
        git(folder, "commit", "-q", "--allow-empty", "-m", "first")
        make_branch(folder, "b", wanted, "m")
        Path(temporary, "p").write_bytes(make_patch(folder, wanted))
        git(folder, "apply", "../p")
        assert read(folder) == after
        git(folder, "checkout", "-q", "--force", "b")
        assert read(folder) == after


def test_the_flags_write_a_patch_and_a_branch_and_leave_the_folder(
    repository: Path,
    tmp_path: Path,
    tokenizer: Tokenizer,
    script: Callable[..., Policy],
    capsys: pytest.CaptureFixture[str],
) -> None:
    calls = [("bash", {"command": "echo 4 >> a.txt; chmod +x src/run.sh; ln -s a.txt new"})]
    agent = Agent(ScriptedModel(script(calls, [("submit", {"answer": "done"})]), tokenizer))
    task = Task(id="run", instruction="Add a line.\nPlease.")
    job = Job(task, agent, "unsafe-local", repository, None, Console(file=sys.stdout, width=200))
    there = state(repository)
    patch = tmp_path / "my patch"
    assert carry_out(job, apply=False, as_json=False, patch=patch, branch="agent") == 0
    shown = capsys.readouterr().out
    assert f"Wrote {patch}; `git apply '{patch}'` applies it." in shown
    assert "Committed 3 changes to the branch agent." in shown and "unchanged" not in shown
    assert state(repository) == there
    assert git(repository, "log", "-1", "--format=%B", "agent") == "Add a line.\n\nMade by agentkit.\n\n"
    git(repository, "apply", str(patch))
    assert git(repository, "diff", "--name-only", "agent", "--", "a.txt", "src") == ""
    git(repository, "checkout", "-q", ".")
    (repository / "new").unlink()
    job = Job(task, agent, "unsafe-local", repository, None, Console(quiet=True))
    assert carry_out(job, apply=True, as_json=True, patch=tmp_path / "no" / "p", branch="agent") == 1
    found = json.loads(capsys.readouterr().out)
    assert (found["applied"], found["patch"], found["branch"]) == (True, None, None)
    assert len(found["refused"]) == 2 and "agent" in found["refused"][0] and "No such file" in found["refused"][1]
    assert os.readlink(repository / "new") == "a.txt"


def test_a_file_that_changed_meanwhile_goes_to_a_branch_but_not_into_a_patch(repository: Path, tmp_path: Path) -> None:
    stale = Change("a.txt", File(b"mine\n"), File(b"theirs\n"), is_stale=True)
    where = {"apply": True, "patch": tmp_path / "p", "branch": "b"}
    written = write(repository, [stale], "x", **where)  # type: ignore[arg-type]
    assert (written.branch, written.patch, written.applied) == ("b", None, False)
    assert written.refused == ["a.txt: it changed during the run; use --branch", "a.txt: it changed during the run"]
    assert git(repository, "show", "b:a.txt") == "theirs\n" and not (tmp_path / "p").exists()


def test_a_branch_that_cannot_be_made_does_not_cost_the_patch(repository: Path, tmp_path: Path) -> None:
    git(repository, "branch", "taken")
    change = Change("new.txt", None, File(b"new\n"))
    where = {"apply": False, "patch": tmp_path / "p", "branch": "taken"}
    written = write(repository, [change], "x", **where)  # type: ignore[arg-type]
    assert (written.branch, written.patch) == (None, tmp_path / "p") and "taken" in written.refused[0]
    git(repository, "apply", str(tmp_path / "p"))
    assert (repository / "new.txt").read_bytes() == b"new\n"
