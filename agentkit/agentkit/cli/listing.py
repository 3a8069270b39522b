"""List the user's folder: the files that an agent may see, which git does not ignore, and the hidden entries.

`.git` is always hidden, so an agent can neither plant a hook nor read credentials of a remote. Checkouts inside a
checkout, and entries other than files, links and directories, are hidden too.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import typer

from agentkit.cli.git import GitError, NotACheckoutError, git, listed, names
from agentkit.cli.terminal import visible_line

GIT_DIRECTORY = ".git"
KINDS = {
    stat.S_IFDIR: "a directory",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFBLK: "a device",
    stat.S_IFCHR: "a device",
}
Signature = tuple[int, int, int, int, int]


@dataclass(slots=True)
class Listing:
    """The state of a folder when the agent starts, without file contents. Paths are relative POSIX paths."""

    files: dict[str, Signature] = field(default_factory=dict)
    """The files and links that the agent sees. A signature changes when the file does."""
    hidden: list[str] = field(default_factory=list)
    """The entries that the agent does not see. No entry is below another."""
    left_out: list[str] = field(default_factory=list)
    """One line for each hidden entry that git does not ignore: its name and its kind."""
    checkouts: list[str] = field(default_factory=list)
    """The git checkouts with files that the agent sees. The first, "", is the folder, even without a checkout."""
    owners: set[tuple[int, int]] = field(default_factory=set)
    """User and group of every entry that the agent sees."""

    @property
    def size(self) -> int:
        """The total size of all files in bytes."""
        return sum(signature[1] for signature in self.files.values())


def signature(info: os.stat_result) -> Signature:
    """Return values that change when the file is changed or replaced."""
    return info.st_mode, info.st_size, info.st_mtime_ns, info.st_ctime_ns, info.st_ino


def list_folder(folder: Path, *, include_ignored: bool = False) -> Listing:
    """List a folder: what git does not ignore in a checkout, otherwise everything; `.git` is always hidden.

    A folder that git ignores entirely is listed in full, and so is everything with `include_ignored`. In a folder that
    is not in a checkout, each checkout below it is listed by git.

    Raises:
        typer.BadParameter: Git cannot list a checkout, so the ignored files are not known.
    """
    listing = Listing()
    _list_into(listing, folder, "", include_ignored=include_ignored)
    for found in (listing.hidden, listing.left_out):
        found.sort()
    return listing


def ignored_by_git(folder: Path, checkouts: Iterable[str], paths: Iterable[str]) -> set[str]:
    """Return the paths that git ignores, each by the rules of the innermost of `checkouts` that it is in."""
    inside: dict[str, list[str]] = {}
    known = sorted(checkouts, key=len, reverse=True)
    for path in paths:
        root = next((root for root in known if not root or path.startswith(f"{root}/")), None)
        if root is not None:
            inside.setdefault(root, []).append(path[len(root) + 1 :] if root else path)
    return {
        f"{root}/{path}" if root else path for root, below in inside.items() for path in _ignored(folder / root, below)
    }


def _ignored(checkout: Path, paths: list[str]) -> list[str]:
    try:
        return names(git(checkout, "check-ignore", "-z", "--stdin", stdin=listed(paths)))
    except GitError as error:
        # With status 1, none is ignored. Otherwise git has refused one of the paths: it is below a link or a submodule.
        if error.status == 1 or isinstance(error, NotACheckoutError) or len(paths) == 1:
            return []
        half = len(paths) // 2
        return [*_ignored(checkout, paths[:half]), *_ignored(checkout, paths[half:])]


def ignored_directories(folder: Path, listing: Listing, directories: Iterable[str]) -> list[str]:
    """Return the topmost of `directories` that git ignores and of which the agent saw no file in `folder`.

    The directories need not exist in the folder. Most rules that ignore directories match only existing directories, so
    git runs in a temporary copy of the folder that holds only these directories and the files with the rules.
    """
    seen = _parents(listing.files)
    unseen = sorted(path for path in directories if path not in seen)
    if not unseen or listing.checkouts != [""]:
        return []
    try:
        top = Path(os.fsdecode(git(folder, "rev-parse", "--show-toplevel").removesuffix(b"\n")))
        prefix = os.fsdecode(git(folder, "rev-parse", "--show-prefix").removesuffix(b"\n"))
        git_dir = os.fsdecode(git(folder, "rev-parse", "--absolute-git-dir").removesuffix(b"\n"))
        with tempfile.TemporaryDirectory(prefix="agentkit-rules-") as temporary:
            for path in unseen:
                os.makedirs(os.path.join(temporary, prefix + path), exist_ok=True)
            rules = [f"{above}/.gitignore" for above in above_all(prefix)]
            rules += [prefix + path for path in listing.files if path.rpartition("/")[2] == ".gitignore"]
            for path in (".gitignore", *rules):
                os.makedirs(os.path.join(temporary, os.path.dirname(path)), exist_ok=True)
                with contextlib.suppress(OSError):
                    shutil.copyfile(top / path, os.path.join(temporary, path), follow_symlinks=False)
            env = {"GIT_DIR": git_dir, "GIT_WORK_TREE": temporary}
            asked = listed(prefix + path for path in unseen)
            printed = git(Path(temporary), "check-ignore", "-z", "--stdin", stdin=asked, env=env)
    except GitError:  # not a checkout; or exit status 1: it ignores none
        return []
    ignored = {path[len(prefix) :] for path in names(printed)}
    return sorted(path for path in ignored if not any(above in ignored for above in above_all(path)))


def is_git_directory(name: str) -> bool:
    """Return whether a name is `.git`, in any letter case, for case-insensitive file systems."""
    return name.casefold() == GIT_DIRECTORY


def _list_into(listing: Listing, folder: Path, root: str, *, include_ignored: bool) -> None:
    """Add everything below `folder / root`."""
    shown = None if include_ignored else _shown_by_git(folder / root)
    shown_directories = None if shown is None else _parents(shown)
    listing.checkouts.append(root)
    start = len(root) + 1 if root else 0
    pending = [root]
    while pending:
        directory = pending.pop()
        try:
            with os.scandir(folder / directory) as scanned:
                entries = list(scanned)
        except OSError as error:
            listing.left_out.append(visible_line(f"{directory or '.'}: {error.strerror}"))
            if directory:
                listing.hidden.append(directory)
            continue
        if shown is None and directory != root and any(is_git_directory(entry.name) for entry in entries):
            _list_into(listing, folder, directory, include_ignored=include_ignored)
            continue
        for entry in entries:
            path = f"{directory}/{entry.name}" if directory else entry.name
            if is_git_directory(entry.name):
                listing.hidden.append(path)
                continue
            try:
                info = entry.stat(follow_symlinks=False)
            except FileNotFoundError:
                continue
            kind, is_shown = stat.S_IFMT(info.st_mode), shown is None or path[start:] in shown
            if kind == stat.S_IFDIR:
                if shown_directories is None or path[start:] in shown_directories or _holds_nothing(entry.path):
                    pending.append(path)
                else:
                    listing.hidden.append(path)
                    if is_shown:
                        listing.left_out.append(visible_line(f"{path}: a git checkout of its own"))
                    continue
            elif kind not in (stat.S_IFREG, stat.S_IFLNK):
                listing.hidden.append(path)
                if is_shown:
                    listing.left_out.append(visible_line(f"{path}: {KINDS.get(kind, 'neither a file nor a link')}"))
                continue
            elif not is_shown:
                listing.hidden.append(path)
                continue
            else:
                listing.files[path] = signature(info)
            listing.owners.add((info.st_uid, info.st_gid))


def _shown_by_git(folder: Path) -> set[str] | None:
    """Return the tracked and the untracked, not ignored files of a folder; None if it is not in a checkout, or
    ignored."""
    try:
        printed = names(git(folder, "ls-files", "-z", "--cached", "--others", "--exclude-standard"))
        shown = {name.removesuffix("/") for name in printed}  # a nested checkout ends with a slash
        if not shown and git(folder, "rev-parse", "--show-prefix").strip():
            return None if _is_ignored(folder) else shown
        return shown
    except NotACheckoutError:
        return None
    except GitError as error:
        if not any(os.path.lexists(above / GIT_DIRECTORY) for above in (folder, *folder.absolute().parents)):
            return None
        raise typer.BadParameter(
            visible_line(
                f"git cannot tell which files of {folder} it ignores: {error}. Remove the cause, or give "
                "--include-ignored to show the agent everything"
            ),
            param_hint="--workdir",
        ) from error


def _is_ignored(folder: Path) -> bool:
    try:
        return bool(git(folder, "check-ignore", "."))
    except GitError:  # exit status 1: the folder is not ignored
        return False


def above_all(path: str) -> Iterable[str]:
    """Yield the directories above a relative path, the innermost first."""
    while path := path.rpartition("/")[0]:
        yield path


def _parents(paths: Iterable[str]) -> set[str]:
    found: set[str] = set()
    for path in paths:
        while (path := path.rpartition("/")[0]) and path not in found:
            found.add(path)
    return found


def _holds_nothing(directory: str) -> bool:
    """Return whether a directory holds only directories, at every depth."""
    pending = [directory]
    while pending:
        try:
            with os.scandir(pending.pop()) as entries:
                for entry in entries:
                    if not entry.is_dir(follow_symlinks=False):
                        return False
                    pending.append(entry.path)
        except OSError:
            return False
    return True
