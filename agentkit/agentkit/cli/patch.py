"""The agent's changes as a patch for `git apply`, or as a commit on a new branch.

Neither touches the user's files, index or HEAD, and no hook runs. A patch is made of the bytes in the folder: it
applies to the folder as it is, uncommitted changes included. A branch starts from HEAD and holds the whole content of
each file that the agent changed, after the conversions that `git add` makes (line ends, filters).
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import typer

from agentkit.cli.git import GitError, NotACheckoutError, git, listed, names
from agentkit.cli.terminal import visible_line
from agentkit.cli.workdir import Change, File

ALONE = {"GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_NOSYSTEM": "1"}


def check_patch(path: Path) -> None:
    """Check that a patch can be written at the end of the run.

    Raises:
        typer.BadParameter: The file exists, its directory does not, or git is not installed.
    """
    if os.path.lexists(path):
        raise typer.BadParameter(
            f"{path} already exists and is never overwritten; give a new path", param_hint="--patch"
        )
    if not path.parent.is_dir():
        raise typer.BadParameter(f"there is no directory {path.parent}; make it first", param_hint="--patch")
    if shutil.which("git") is None:
        raise typer.BadParameter("git is needed to make the patch, but it is not installed", param_hint="--patch")


def check_branch(folder: Path, branch: str) -> None:
    """Check that a branch can be created at the end of the run.

    Raises:
        typer.BadParameter: The folder is not in a checkout, the name is not valid or taken, or git does not know who
            commits.
    """
    try:
        git(folder, "rev-parse", "--show-toplevel")
        git(folder, "var", "GIT_COMMITTER_IDENT")
        git(folder, "var", "GIT_AUTHOR_IDENT")
    except NotACheckoutError:
        why = f"{folder} is not in a git checkout; `git init` makes it one, or use --apply or --patch"
    except GitError as error:
        why = f"git cannot commit here: {error}"
    else:
        if not _succeeds(folder, "check-ref-format", "--branch", branch):
            why = f"{branch!r} is not a name for a branch"
        elif _succeeds(folder, "rev-parse", "--quiet", "--verify", f"refs/heads/{branch}"):
            why = f"the branch {branch} exists already and is never moved; give a new name"
        else:
            return
    raise typer.BadParameter(visible_line(why), param_hint="--branch")


def make_patch(folder: Path, wanted: Sequence[Change]) -> bytes:
    """Return the changes as a patch for `git apply`, with modes, links and binary files.

    In a git checkout, names start at its top, as `git apply` expects. `git apply` itself refuses a link that becomes a
    directory.

    Raises:
        GitError: Git failed.
    """
    try:
        prefix = os.fsdecode(git(folder, "rev-parse", "--show-prefix").removesuffix(b"\n"))
    except NotACheckoutError:
        prefix = ""
    before = [(prefix + change.path, change.before) for change in wanted if change.before is not None]
    after = [(prefix + change.path, change.after) for change in wanted]
    with tempfile.TemporaryDirectory(prefix="agentkit-patch-") as temporary:
        scratch = Path(temporary)
        git(scratch, "init", "--quiet", "--bare", "--template=", env=ALONE)
        commits = b"".join([*_commit("before", before), *_commit("after", after, parent="before")])
        git(scratch, "fast-import", "--quiet", stdin=commits, env=ALONE)
        shape = ("--binary", "--full-index", "--no-renames", "--no-ext-diff", "--no-textconv", "--no-color")
        return git(scratch, "diff-tree", "-r", "-p", *shape, "refs/heads/before", "refs/heads/after", env=ALONE)


def make_branch(folder: Path, branch: str, wanted: Sequence[Change], message: str) -> list[str]:
    """Commit the changes to a new branch that starts from HEAD; return sentences about the user's uncommitted changes.

    Raises:
        GitError: Git failed. No branch was created.
    """
    git_dir = os.fsdecode(git(folder, "rev-parse", "--absolute-git-dir").removesuffix(b"\n"))
    prefix = os.fsdecode(git(folder, "rev-parse", "--show-prefix").removesuffix(b"\n"))
    paths = [prefix + change.path for change in wanted]
    sentences = _uncommitted(folder, paths)
    with tempfile.TemporaryDirectory(prefix="agentkit-branch-") as temporary:
        tree = Path(temporary, "tree")
        tree.mkdir()
        for path, change in zip(paths, wanted, strict=True):
            if change.after is not None:
                _write(tree / path, change.after)
        env = {"GIT_INDEX_FILE": str(Path(temporary, "index")), "GIT_DIR": git_dir, "GIT_WORK_TREE": str(tree)}
        as_is = ("-c", "core.symlinks=true", "-c", "core.safecrlf=false", "-c", "core.sparseCheckout=false")
        has_head = _succeeds(folder, "rev-parse", "--quiet", "--verify", "HEAD^{commit}")
        git(tree, *as_is, "read-tree", "HEAD" if has_head else "--empty", env=env)
        update = (*as_is, "update-index", "--add", "--replace")
        deleted = {prefix + change.path for change in wanted if change.after is None}
        git(tree, *update, "--force-remove", "-z", "--stdin", stdin=listed(deleted), env=env)
        git(tree, *update, "-z", "--stdin", stdin=listed(path for path in paths if path not in deleted), env=env)
        for flag, is_executable in (("--chmod=+x", True), ("--chmod=-x", False)):  # for `core.fileMode=false`
            flipped = [path for path, change in zip(paths, wanted, strict=True) if _flips(change, is_executable)]
            git(tree, *update, flag, "-z", "--stdin", stdin=listed(flipped), env=env)
        content = git(tree, "write-tree", env=env).decode().strip()
        parent = ("-p", git(folder, "rev-parse", "HEAD").decode().strip()) if has_head else ()
        commit = git(folder, "commit-tree", content, *parent, "-F", "-", stdin=message.encode()).decode().strip()
    git(folder, "update-ref", "-m", "agentkit run", f"refs/heads/{branch}", commit, "0" * len(commit))
    return sentences


def _succeeds(folder: Path, *arguments: str) -> bool:
    try:
        git(folder, *arguments)
    except GitError:
        return False
    return True


def _flips(change: Change, is_executable: bool) -> bool:
    """Return whether a change turns a file's executable bit to `is_executable`."""
    if change.after is None or change.after.link is not None or change.after.executable != is_executable:
        return False
    before = change.before
    return is_executable != (before is not None and before.link is None and before.executable)


def _uncommitted(folder: Path, paths: Sequence[str]) -> list[str]:
    """Return sentences about the user's changes since HEAD, in `paths` and in other files."""
    shown = names(
        git(folder, "status", "--porcelain", "-z", "--no-renames", "--untracked-files=all", "--ignore-submodules=all")
    )
    dirty = {line[3:] for line in shown}
    both = sorted(dirty.intersection(paths))
    sentences = [f"The commit also holds your uncommitted changes to {visible_line(path)}." for path in both[:10]]
    if len(both) > 10:
        sentences.append(f"The commit also holds your uncommitted changes to {len(both) - 10} more files.")
    if others := len(dirty) - len(both):
        sentences.append(f"The commit does not hold your uncommitted changes to {others} other paths.")
    return sentences


def _write(path: Path, file: File) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if file.link is not None:
        path.symlink_to(file.link)
        return
    path.write_bytes(file.content)
    path.chmod(0o755 if file.executable else 0o644)


def _commit(branch: str, files: Sequence[tuple[str, File | None]], parent: str | None = None) -> Iterator[bytes]:
    """Yield a commit in the input format of `git fast-import`. Deletions come first, so that a file can replace a
    directory, and a directory can replace a file."""
    yield b"commit refs/heads/%b\ncommitter a <a> 0 +0000\ndata 0\n" % branch.encode()
    if parent is not None:
        yield b"from refs/heads/%b\n" % parent.encode()
    for path, file in files:
        if file is None:
            yield b"D %b\n" % _quoted(path)
    for path, file in files:
        if file is not None:
            mode = b"120000" if file.link is not None else b"100755" if file.executable else b"100644"
            content = file.content if file.link is None else os.fsencode(file.link)
            yield b"M %b inline %b\ndata %d\n" % (mode, _quoted(path), len(content))
            yield content + b"\n"


def _quoted(path: str) -> bytes:
    escaped = os.fsencode(path).replace(b"\\", b"\\\\").replace(b'"', b'\\"').replace(b"\n", b"\\n")
    return b'"%b"' % escaped
