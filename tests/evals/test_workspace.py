"""The user's folder as an agent sees it, through an overlay or as a copy, and the changes that come back."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import anyio
import pytest
import typer
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from rich.console import Console
from typer.testing import CliRunner

from agentkit.agent import Agent
from agentkit.cli import app, chat, signals
from agentkit.cli.changes import print_diff
from agentkit.cli.chat import Chat
from agentkit.cli.listing import ignored_by_git, ignored_directories, list_folder
from agentkit.cli.run import Job, carry_out
from agentkit.cli.workdir import Change, File, apply, read_file, unpack
from agentkit.cli.workspace import Workspace, open_workspace
from agentkit.errors import ApiError, ApiKeyError
from agentkit.messages import AssistantMessage, Message
from agentkit.models.embedded import EmbeddedModel
from agentkit.models.scripted import AssistantTurn, Policy, ScriptedModel
from agentkit.task import Task
from agentkit_engine import Engine
from agentkit_engine.chat import Tokenizer
from agentkit_environments import Environment, available_backends, process
from agentkit_environments.process import launcher_failure
from agentkit_evals.verify import Backend

TASK = Task(id="run", instruction="Change it.\nAll of it.")


@pytest.fixture(autouse=True)
def identity(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AUTHOR", "COMMITTER"):
        monkeypatch.setenv(f"GIT_{name}_NAME", "Ada")
        monkeypatch.setenv(f"GIT_{name}_EMAIL", "ada@example.com")


def git(folder: Path, *arguments: str) -> str:
    who = (
        "-c",
        "user.name=a",
        "-c",
        "user.email=a@b",
        "-c",
        "commit.gpgsign=false",
        "-c",
        "protocol.file.allow=always",
    )
    return subprocess.run(
        ["git", "-C", str(folder), *who, *arguments], check=True, capture_output=True, text=True
    ).stdout


def write(folder: Path, **files: str) -> None:
    for name, text in files.items():
        path = folder / name.replace("__", "/").replace("_", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A checkout with tracked, changed, untracked and ignored files, an empty directory and two checkouts inside."""
    root = tmp_path / "repo"
    root.mkdir()
    git(root, "init", "-q")
    write(root, a_txt="one\n", src__main_py="print()\n", src__gone_py="", forced_log="kept\n")
    (root / ".gitignore").write_text("*.log\n.env\nnode_modules/\n/build\n")
    git(root, "add", "-f", ".")
    git(root, "commit", "-q", "-m", "x")
    git(root, "init", "-q", "nested")
    write(root / "nested", inner_txt="inner\n")
    git(root / "nested", "add", ".")
    git(root / "nested", "commit", "-q", "-m", "x")
    git(root, "submodule", "--quiet", "add", "./nested", "module")
    write(root, node__modules__x="", src__debug_log="ignored\n", src__new_py="new\n", a_txt="dirty\n")
    (root / ".env").write_text("TOKEN=1\n")
    (root / "node_modules").mkdir()
    (root / "node_modules" / "dep.js").write_text("dep\n")
    (root / "src" / "gone.py").unlink()
    (root / "empty" / "er").mkdir(parents=True)
    os.mkfifo(root / "src" / "pipe")
    return root


SHOWN = {".gitignore", ".gitmodules", "a.txt", "forced.log", "node/modules/x", "src/main.py", "src/new.py"}


def test_a_listing_is_what_git_does_not_ignore(repository: Path) -> None:
    listing = list_folder(repository)
    assert listing.files.keys() == SHOWN
    assert listing.hidden == [".env", ".git", "module", "nested", "node_modules", "src/debug.log", "src/pipe"]
    assert listing.left_out == ["module: a git checkout of its own", "nested: a git checkout of its own"]
    assert set(list_folder(repository / "src").files) == {"main.py", "new.py"}
    assert set(list_folder(repository / "node_modules").files) == {"dep.js"}
    everything = list_folder(repository, include_ignored=True)
    assert everything.files.keys() - SHOWN == {
        *(".env", "module/inner.txt", "nested/inner.txt", "node_modules/dep.js", "src/debug.log")
    }
    assert [name for name in everything.hidden if "src" not in name] == [".git", "module/.git", "nested/.git"]


def test_a_checkout_with_nothing_but_ignored_files_shows_nothing(tmp_path: Path) -> None:
    git(tmp_path, "init", "-q")
    (tmp_path / ".git" / "info" / "exclude").write_text(".env\n")
    (tmp_path / ".env").write_text("x")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / ".env").write_text("x")
    assert list_folder(tmp_path).files == {} and list_folder(tmp_path / "sub").files == {}
    assert list_folder(tmp_path).hidden == [".env", ".git", "sub"]


def test_checkouts_in_a_folder_that_is_none_are_listed_by_git(repository: Path) -> None:
    (repository.parent / "note").write_text("")
    listing = list_folder(repository.parent)
    assert listing.files.keys() == {"note", *(f"repo/{path}" for path in SHOWN)}
    assert listing.checkouts == ["", "repo"]
    wanted = ["repo/src/x.log", "x.log", "repo/module/x", "repo/new", "repo/node_modules/y"]
    assert ignored_by_git(repository.parent, listing.checkouts, wanted) == {"repo/src/x.log", "repo/node_modules/y"}


def test_a_worktree_and_a_variable_of_another_repository(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    worktree = repository.parent / "worktree"
    git(repository, "worktree", "add", "-q", "--detach", str(worktree))
    (worktree / ".env").write_text("x")
    monkeypatch.setenv("GIT_DIR", "/nonexistent")
    monkeypatch.setenv("GIT_INDEX_FILE", "/nonexistent")
    assert list_folder(worktree).hidden == [".env", ".git"]
    assert ".env" not in list_folder(worktree).files


@pytest.mark.parametrize("case", ["no git", "bare", "broken"])
def test_a_checkout_that_git_cannot_list_is_refused(
    repository: Path, case: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    if case == "no git":
        monkeypatch.setenv("PATH", str(tmp_path))
    elif case == "broken":
        (repository / ".git" / "index").write_bytes(b"nonsense")
    else:
        git(tmp_path, "clone", "-q", "--bare", str(repository), str(tmp_path / "bare" / ".git"))
        repository = tmp_path / "bare"
    with pytest.raises(typer.BadParameter, match=r"git cannot tell which files .* it ignores: .*--include-ignored"):
        list_folder(repository)
    assert list_folder(repository, include_ignored=True).hidden[0].startswith(".")


async def in_workspace(
    folder: Path, command: str, backend: Backend | None, *, include_ignored: bool = False, copy: bool = False
) -> tuple[str, list[Change], list[str], Workspace]:
    console = Console(file=sys.stderr, width=200)
    opened = open_workspace(TASK, backend, folder, console, include_ignored=include_ignored, copy=copy)
    async with opened as workspace:
        result = await workspace.environment.exec(command, timeout_s=60)
        await workspace.environment.kill_all()
        changes, left_out, _ = await workspace.changes()
        return result.stdout + result.stderr, changes, left_out, workspace


WORKSPACES = [
    pytest.param("process", False, id="overlay", marks=pytest.mark.sandbox),
    pytest.param("process", True, id="process-copy", marks=pytest.mark.sandbox),
    pytest.param("docker", False, id="docker", marks=pytest.mark.docker),
]


@pytest.mark.parametrize(("backend", "copy"), WORKSPACES)
def test_the_same_changes_come_back_from_an_overlay_and_a_copy(
    repository: Path, backend: Backend, copy: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    if reason := available_backends()[backend]:
        pytest.skip(f"{backend}: {reason}")
    (repository / "out").symlink_to("/etc")
    command = r"""
        find . -type f | sort; echo $HOME
        echo more >> a.txt; rm src/main.py; chmod +x src/new.py; touch forced.log
        mkdir -p empty/er lib; echo x > empty/er/x; echo '#!/bin/sh' > lib/tool; chmod 755 lib/tool; ln -s lib/tool tool
        ln -s /etc esc; echo mine > .env; echo o > src/o.log; mkfifo fifo; printf x > "$(printf 'bad\377\nname')"
    """
    said, changes, left_out, workspace = anyio.run(lambda: in_workspace(repository, command, backend, copy=copy))
    assert said.splitlines() == [*sorted(f"./{path}" for path in SHOWN), "/tmp"]
    assert {change.path: (change.verb, change.after) for change in changes} == {
        "a.txt": ("changed", File(b"dirty\nmore\n")),
        "bad\udcff\nname": ("added", File(b"x")),
        "empty/er/x": ("added", File(b"x\n")),
        "lib/tool": ("added", File(b"#!/bin/sh\n", executable=True)),
        "src/main.py": ("deleted", None),
        "src/new.py": ("changed", File(b"new\n", executable=True)),
        "tool": ("added", File(b"", link="lib/tool")),
    }
    told = "\n".join(left_out)
    for part in ("esc", "src/o.log", ".env", "fifo", "module: a git checkout of its own"):
        assert part in told
    is_overlay = backend == "process" and not copy
    assert (workspace.copied is None) == is_overlay
    printed = capsys.readouterr().err
    assert (
        "8 files through an overlay, 7 entries hidden" if is_overlay else "files (1 MiB) copied, because"
    ) in printed
    assert apply(repository, changes) == []
    assert (repository / ".env").read_text() == "TOKEN=1\n" and not (repository / "src" / "o.log").exists()


RULES = "/target\nnode_modules\nbuild/\nlogs/*\n!logs/keep\n*.o\n"


@pytest.mark.sandbox
def test_what_a_build_leaves_in_ignored_directories_is_not_carried(repository: Path) -> None:
    """Neither 60,000 files nor 400 MiB of them are in the way of the changes."""
    (repository / ".gitignore").write_text(RULES)
    (repository / "src" / ".gitignore").write_text("out/\n")
    (repository / "src" / "out").mkdir()
    (repository / "src" / "out" / "forced").write_text("")
    git(repository, "add", "-f", "src/out/forced")
    command = """
        mkdir -p target/debug build sub/node_modules/a logs src/out src/target src/other/out
        (cd target/debug && seq 60000 | xargs touch); truncate -s 200M build/one build/two
        touch sub/node_modules/a/b logs/x logs/keep src/out/forced2 src/target/kept src/other/out/o src/x.o sub/kept
        echo x > src/out/forced
    """
    said, changes, left_out, _ = anyio.run(lambda: in_workspace(repository, command, "process"))
    assert said == ""
    assert {change.path for change in changes} == {*("logs/keep", "src/out/forced", "src/target/kept", "sub/kept")}
    assert {line.partition(": new, and ignored by git")[0] for line in left_out if "/: new" in line} == {
        *("build/", "src/other/out/", "sub/node_modules/", "target/")
    }
    assert {line.partition(":")[0] for line in left_out if "added, and ignored" in line} == {
        *("logs/x", "src/out/forced2", "src/x.o")
    }


def test_the_rules_above_a_subfolder_count(repository: Path) -> None:
    (repository / ".gitignore").write_text("/src/a\n/b\nc/\n")
    (repository / "src" / ".gitignore").write_text("d\n")
    listing = list_folder(repository / "src")
    found = ignored_directories(repository / "src", listing, ["a", "a/x", "b", "c/y", "c", "n/d", "n", "n/a", "\udcff"])
    assert found == ["a", "c", "n/d"]
    assert ignored_directories(repository.parent, list_folder(repository.parent), ["repo/src/a"]) == []


@pytest.mark.sandbox
def test_an_agent_that_floods_the_folder_loses_its_changes_and_the_user_is_told(
    repository: Path, tokenizer: Tokenizer, script: Callable[..., Policy], capsys: pytest.CaptureFixture[str]
) -> None:
    flood = [("bash", {"command": "mkdir many && cd many && seq 60000 | xargs touch"})]
    agent = Agent(ScriptedModel(script(flood, [("submit", {"answer": "done"})]), tokenizer))
    job = Job(TASK, agent, "process", repository, None, Console(quiet=True))
    assert carry_out(job, apply=True, as_json=False) == 1
    told = capsys.readouterr().err
    assert "Not solved: the files are lost: " in told and "the changes are too large: more than 50000 entries" in told
    assert not (repository / "many").exists()


@pytest.mark.sandbox
@pytest.mark.parametrize("copy", [False, True])
def test_ignored_files_can_be_shown_but_never_change(repository: Path, copy: bool) -> None:
    said, changes, left_out, _ = anyio.run(
        lambda: in_workspace(
            repository,
            "cat .env; echo x > .env; rm node_modules/*; ls -d .git",
            "process",
            include_ignored=True,
            copy=copy,
        )
    )
    assert said.startswith("TOKEN=1\n") and "No such file" in said
    assert changes == []
    assert left_out[1:] == [".env: changed, and ignored by git", "node_modules/dep.js: deleted, and ignored by git"]


@pytest.mark.sandbox
def test_what_the_user_changes_during_the_run_is_never_overwritten(repository: Path) -> None:
    async def run() -> list[Change]:
        console = Console(quiet=True)
        async with open_workspace(TASK, "process", repository, console, include_ignored=False, copy=False) as workspace:
            command = "for f in a.txt src/main.py src/new.py both new; do echo agent > $f; done; rm forced.log"
            assert (await workspace.environment.exec(command)).exit_code == 0
            write(repository, a_txt="user\n", both="user\n", forced_log="user\n")
            await anyio.Path(repository / "src" / "main.py").unlink()
            return (await workspace.changes())[0]

    changes = anyio.run(run)
    stale = {change.path for change in changes if change.is_stale}
    assert stale == {"a.txt", "both", "forced.log", "src/main.py"}
    assert {change.path for change in changes} - stale == {"new", "src/new.py"}
    first = next(change for change in changes if change.path == "a.txt")
    assert next(first.diff()) == "a.txt: it changed in your folder during the run"
    assert apply(repository, changes) == [f"{path}: it changed during the run" for path in sorted(stale)]
    assert (repository / "a.txt").read_text() == "user\n" and not (repository / "new").exists()


@pytest.mark.sandbox
@pytest.mark.skipif(os.geteuid() != 0, reason="not applicable: needs root to give a file to another user")
def test_files_of_another_user_are_copied_instead(repository: Path, capsys: pytest.CaptureFixture[str]) -> None:
    os.chown(repository / "a.txt", 1234, -1)
    said, changes, _, workspace = anyio.run(lambda: in_workspace(repository, "echo x > a.txt", "process"))
    assert said == "" and [change.path for change in changes] == ["a.txt"] and workspace.copied is not None
    assert "copied, because some files belong to another user or group" in capsys.readouterr().err


@pytest.mark.sandbox
def test_an_overlay_is_preferred_where_the_user_names_no_backend(repository: Path) -> None:
    if reason := available_backends()["process"]:
        pytest.skip(f"process: {reason}")
    _, _, _, workspace = anyio.run(lambda: in_workspace(repository, "true", None))
    assert (workspace.environment.backend, workspace.copied) == ("process", None)


@pytest.mark.sandbox
def test_where_a_policy_permits_no_overlay_the_folder_is_copied(
    repository: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if reason := launcher_failure("bwrap-plain"):
        pytest.skip(f"process-bwrap-plain: {reason}")
    monkeypatch.setattr(process, "LAUNCHERS", ("bwrap-plain",))
    said, changes, _, workspace = anyio.run(lambda: in_workspace(repository, "ls; rm a.txt", "process"))
    assert workspace.copied is not None and "a.txt" in said and [change.path for change in changes] == ["a.txt"]
    assert "copied, because a policy of this machine permits no mounts" in capsys.readouterr().err


def test_a_verifier_gets_a_copy(
    repository: Path, tokenizer: Tokenizer, script: Callable[..., Policy], backend: Backend
) -> None:
    task = Task.model_validate(
        {**TASK.model_dump(), "verifier": {"command": "grep -q done a.txt && test -f src/new.py"}}
    )
    policy = script([("bash", {"command": "echo done > a.txt"})], [("submit", {"answer": "done"})])
    job = Job(task, Agent(ScriptedModel(policy, tokenizer)), backend, repository, None, Console(quiet=True))
    done = anyio.run(job.run)
    assert done.verdict is not None and done.verdict.reward == 1
    assert [change.path for change in done.changes] == ["a.txt"]


@pytest.mark.parametrize("has_color", [True, False])
def test_a_diff_has_colors_only_where_they_are_wanted(has_color: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    if not has_color:
        monkeypatch.setenv("NO_COLOR", "1")
    screen = io.StringIO()
    print_diff(Console(file=screen, force_terminal=True), [Change("a", File(b"one\n"), File(b"two\n"))])
    assert ("\x1b[31m-one" in screen.getvalue()) == ("\x1b[32m+two" in screen.getvalue()) == has_color
    screen = io.StringIO()
    print_diff(Console(file=screen), [Change("a", None, File(b"two\n"))])
    assert "\x1b" not in screen.getvalue()


def test_a_secret_that_git_does_not_ignore_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in (".env", "a.env", ".env.local", ".env.example"):
        (tmp_path / name).write_text("")
    anyio.run(lambda: in_workspace(tmp_path, "true", "unsafe-local"))
    told = [line for line in capsys.readouterr().err.splitlines() if "can read" in line]
    assert sorted(told) == [
        f"The agent can read {name}, because git does not ignore it." for name in (".env", ".env.local")
    ]


@pytest.mark.sandbox
@pytest.mark.parametrize("copy", [False, True])
def test_a_link_that_becomes_a_directory_hides_what_it_led_to(repository: Path, tmp_path: Path, copy: bool) -> None:
    outside = tmp_path / "outside"
    write(outside, secret="mine\n")
    (repository / "latest").symlink_to("src")
    (repository / "other").symlink_to("../outside")
    (repository / "loop").symlink_to("loop")
    command = "rm latest other loop; cp -r src latest; mkdir other loop; echo theirs > other/secret; echo x > loop/x"
    _, changes, _, _ = anyio.run(lambda: in_workspace(repository, command, "process", copy=copy))
    found = {change.path: (change.verb, change.is_stale) for change in changes}
    if copy:  # two of the links were not copied
        assert found.pop("other/secret") and found.pop("loop/x")
    else:
        assert {found.pop(path) for path in ("other", "loop")} == {("deleted", False)}
        assert {found.pop(path) for path in ("other/secret", "loop/x")} == {("added", False)}
    assert found.pop("latest") == ("deleted", False)
    assert found == {"latest/main.py": ("added", False), "latest/new.py": ("added", False)}
    if not copy:
        assert apply(repository, changes) == []
        assert (repository / "latest" / "new.py").read_text() == "new\n" and not (repository / "latest").is_symlink()
    assert (outside / "secret").read_text() == "mine\n"


@pytest.mark.sandbox
@pytest.mark.skipif(os.geteuid() != 0, reason="not applicable: needs root to mount")
def test_a_folder_with_a_mount_in_it_is_copied(repository: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mounted = [repository / "da ta", repository / "node_modules" / "x"]
    for point in mounted:
        point.mkdir()
        write(point, below="below\n")
    try:
        for point in mounted:
            if subprocess.run(["mount", "-t", "tmpfs", "none", str(point)]).returncode != 0:
                pytest.skip("not applicable: nothing can be mounted here")
        write(mounted[0], above="above\n")
        said, _, _, workspace = anyio.run(lambda: in_workspace(repository, "ls 'da ta'", "process"))
        assert (said, workspace.copied is not None) == ("above\n", True)
        assert "copied, because something is mounted at da ta" in capsys.readouterr().err
        subprocess.run(["umount", str(mounted[0])], check=True)
        assert anyio.run(lambda: in_workspace(repository, "true", "process"))[3].copied is None
    finally:
        for point in mounted:
            subprocess.run(["umount", "-q", str(point)])


def test_a_copy_of_many_files_arrives_in_parts(tmp_path: Path) -> None:
    for number in range(2_100):
        (tmp_path / f"f{number}").write_bytes(b"x" * 10_000)
    (tmp_path / "link").symlink_to("f0")
    said, changes, _, _ = anyio.run(
        lambda: in_workspace(tmp_path, "ls | wc -l; cat f* | wc -c; readlink link; rm f7", "unsafe-local")
    )
    assert said.split() == ["2101", "21000000", "f0"]
    assert [(change.path, change.verb) for change in changes] == [("f7", "deleted")]


class RemoteModel(ScriptedModel):
    host = "api.example.com"


@pytest.mark.parametrize("as_json", [False, True])
def test_the_host_that_files_go_to_is_named_once_before_they_do(
    repository: Path,
    tokenizer: Tokenizer,
    script: Callable[..., Policy],
    as_json: bool,
    capsys: pytest.CaptureFixture[str],
) -> None:
    policy = script([("read_file", {"path": "a.txt"})], [("submit", {"answer": "done"})])
    told: list[str] = []

    def watched(*arguments: object) -> object:
        told.append(capsys.readouterr().err)
        return policy(*arguments)  # type: ignore[arg-type]

    agent = Agent(RemoteModel(watched, tokenizer))  # type: ignore[arg-type]
    job = Job(TASK, agent, "unsafe-local", repository, None, Console(file=sys.stdout, quiet=as_json))
    carry_out(job, apply=False, as_json=as_json)
    assert told == [f"Files of {repository} are sent to api.example.com as the agent reads them.\n", ""]
    shown = capsys.readouterr().out
    assert not as_json or json.loads(shown)["changes"] == []


STEPS = st.lists(
    st.tuples(
        st.sampled_from(["write", "remove", "mkdir", "move", "link", "mode", "touch", "hard"]),
        st.sampled_from(["a", "b", "d", "d/a", "d/e", "d/e/a", "new", "new/a", "d/new", "link", "secret", "hidden/x"]),
        st.sampled_from(["a", "d", "d/f", "n", "new", "d/e/a", "d/e", "link"]),
    ),
    max_size=12,
)
PERFORM = """
import os, shutil, sys, json
for verb, path, other in json.loads(sys.stdin.read()):
    try:
        if verb == 'write': open(path, 'w').write(other)
        elif verb == 'remove' and os.path.isdir(path) and not os.path.islink(path): shutil.rmtree(path)
        elif verb == 'remove': os.unlink(path)
        elif verb == 'mkdir': os.makedirs(path)
        elif verb == 'move': shutil.move(path, other)
        elif verb == 'link': os.symlink(other, path)
        elif verb == 'mode': os.chmod(path, os.stat(path).st_mode ^ 0o100)
        elif verb == 'touch': os.utime(path)
        elif verb == 'hard': os.link(path, other)
    except (OSError, shutil.Error):
        pass
"""


@pytest.mark.sandbox
@given(steps=STEPS)
@example(steps=[("remove", "link", "a"), ("link", "link", "link")])
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_the_upper_layer_tells_what_the_agent_did(steps: list[tuple[str, str, str]]) -> None:
    if reason := available_backends()["process"]:
        pytest.skip(f"process: {reason}")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary, "mine")
        folder.mkdir()
        git(folder, "init", "-q")
        (folder / ".git" / "info" / "exclude").write_text("secret\nhidden\n")
        for path in ("a", "b", "d/a", "d/e/a", "d/f", "secret", "hidden/x", "hidden/y"):
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_text(f"{path}\n")
        (folder / "link").symlink_to("d")

        async def run() -> tuple[list[Change], dict[str, File], set[str]]:
            console = Console(quiet=True)
            async with open_workspace(TASK, "process", folder, console, include_ignored=False, copy=False) as workspace:
                env = workspace.environment
                done = await env.exec(["python3", "-c", PERFORM], stdin=json.dumps(steps))
                assert (done.exit_code, workspace.copied) == (0, None), done.stderr
                seen = await env.export_dir(env.spec.workdir)
                changes, left_out, _ = await workspace.changes()
                bad_links = {
                    line.partition(": ")[0].strip("'") for line in (*seen.dropped, *left_out) if "loop" in line
                }
                return changes, unpack(seen.data), bad_links

        changes, seen, bad_links = anyio.run(run)
        assert apply(folder, changes) == []
        found = {path: read_file(folder / path) for path in list_folder(folder).files.keys() - bad_links}
        assert found == {
            path: file for path, file in seen.items() if path != "secret" and path.split("/")[0] != "hidden"
        }
        assert (folder / "secret").read_text() == "secret\n" and (folder / "hidden" / "y").read_text() == "hidden/y\n"


@pytest.mark.sandbox
@pytest.mark.parametrize("copy", [False, True])
def test_a_run_that_fails_keeps_the_changes_made_before(
    repository: Path, tokenizer: Tokenizer, script: Callable[..., Policy], copy: bool
) -> None:
    one_turn = script([("bash", {"command": "echo more >> a.txt"})])

    def policy(messages: Sequence[Message], think: bool) -> AssistantTurn | Sequence[int]:
        if any(isinstance(message, AssistantMessage) for message in messages):
            raise ApiError("the API cannot be reached")
        return one_turn(messages, think)

    agent = Agent(ScriptedModel(policy, tokenizer))
    job = Job(TASK, agent, "process", repository, None, Console(quiet=True), copy=copy)
    with pytest.raises(ApiError):
        carry_out(job, apply=False, as_json=False, branch="agent")
    assert git(repository, "show", "agent:a.txt") == "dirty\nmore\n"
    assert (repository / "a.txt").read_text() == "dirty\n"


@pytest.mark.sandbox
def test_a_run_that_is_interrupted_keeps_the_changes_made_before(
    repository: Path, tokenizer: Tokenizer, script: Callable[..., Policy], monkeypatch: pytest.MonkeyPatch
) -> None:
    """They go to a patch or branch, but not into the folder, even with --apply: half of the work may be missing."""
    monkeypatch.setattr(signals, "_received", None)
    one_turn = script([("bash", {"command": "echo more >> a.txt"})])

    def policy(messages: Sequence[Message], think: bool) -> AssistantTurn | Sequence[int]:
        if any(isinstance(message, AssistantMessage) for message in messages):
            signals._handle(signal.SIGINT, None)
            return AssistantTurn(calls=[("bash", {"command": "sleep 60"})])
        return one_turn(messages, think)

    agent = Agent(ScriptedModel(policy, tokenizer))
    job = Job(TASK, agent, "process", repository, None, Console(quiet=True))
    with pytest.raises(KeyboardInterrupt):
        carry_out(job, apply=True, as_json=False, branch="agent")
    assert git(repository, "show", "agent:a.txt") == "dirty\nmore\n"
    assert (repository / "a.txt").read_text() == "dirty\n"


class ShellChat(Chat):
    """A chat in which each message is a command for the sandbox."""

    async def _turn(self, said: str, environment: Environment) -> None:
        await environment.exec(said)


@pytest.mark.parametrize("apply", [True, False])
def test_a_chat_on_a_folder_shows_the_changes_and_writes_them(
    repository: Path,
    untrained: Path,
    apply: bool,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("/diff\necho more >> a.txt\n/diff\n"))
    agent = Agent(EmbeddedModel(Engine.load(untrained)))
    talk = ShellChat(agent, "unsafe-local", repository.parent / "chat.jsonl", Console(file=sys.stdout), False)
    talk.workdir = repository
    anyio.run(talk.converse)
    shown = capsys.readouterr().out
    assert "No files were changed." in shown.partition("+more")[0] and shown.count("+more") == 1
    patch = repository.parent / "patch"
    written = talk.keep(apply=apply, patch=None if apply else patch, branch=None if apply else "agent")
    assert (written.applied, written.refused) == (apply, [])
    assert (repository / "a.txt").read_text() == ("dirty\nmore\n" if apply else "dirty\n")
    assert ("Applied 1 change to" if apply else f"Wrote {patch}") in capsys.readouterr().out
    if not apply:
        assert patch.read_text().endswith("+more\n")
        assert git(repository, "log", "-1", "--format=%s", "agent") == "echo more >> a.txt\n"


@pytest.mark.sandbox
def test_a_chat_that_fails_keeps_the_changes_made_before(
    repository: Path, untrained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Failing(ShellChat):
        async def _turn(self, said: str, environment: Environment) -> None:
            await super()._turn(said, environment)
            if said == "fail":
                raise ApiKeyError("the key was revoked")

    lines = "seq 60000 | (mkdir many; cd many; xargs touch)\n/diff\nrm -r many; echo more >> a.txt\nfail\n"
    monkeypatch.setattr(chat, "Chat", Failing)
    options = ["chat", "--workdir", str(repository), "--env", "process", "-m", str(untrained), "--apply"]
    result = CliRunner().invoke(app, options, input=lines, catch_exceptions=False)
    assert result.exit_code == 2 and "the key was revoked" in result.output
    assert "too large: more than 50000 entries" in result.output
    assert (repository / "a.txt").read_text() == "dirty\nmore\n"
