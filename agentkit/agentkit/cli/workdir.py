"""The user's own folder as a work directory: copy it into the sandbox, show the agent's changes as a diff, apply them.

Regular files and links are copied; in a git checkout, only those that git does not ignore. `.git` is never copied, so
an agent cannot plant a hook. Applying makes exactly the changes in the diff: all of them, or none.
"""

from __future__ import annotations

import ast
import contextlib
import difflib
import io
import os
import re
import shutil
import stat
import subprocess
import tarfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import typer

from agentkit.cli.switch import NotUndoneError, Switch
from agentkit.cli.terminal import visible_line
from agentkit_environments.environment import MAX_ARCHIVE_BYTES

SKIPPED = ".git"
MAX_DIFF_LINES = 20_000
"""Files with more lines are not compared line by line, because the time can grow quadratically."""
QUOTED = re.compile(r"""'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*\"""")
KINDS = {
    stat.S_IFDIR: "a directory",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFBLK: "a device",
    stat.S_IFCHR: "a device",
}


@dataclass(frozen=True, slots=True)
class File:
    """The content of a regular file or the target of a link; `executable` is the only permission that is kept."""

    content: bytes
    executable: bool = False
    link: str | None = None


class Folder(dict[str, File]):
    """The files and links of a folder by POSIX path."""

    def __init__(self, files: Mapping[str, File], left_out: Sequence[str] = ()) -> None:
        super().__init__(files)
        self.left_out = list(left_out)
        """One line for each entry that is not copied: its name and its kind."""


@dataclass(frozen=True, slots=True)
class Change:
    """One path that differs: `before` is None for a new file, `after` is None for a deleted one."""

    path: str
    before: File | None
    after: File | None

    @property
    def verb(self) -> str:
        """The kind of change in one word."""
        if self.before is None:
            return "added"
        return "deleted" if self.after is None else "changed"

    def diff(self) -> Iterator[str]:
        """Yield the change as lines of a unified diff without invisible characters; a binary file is one line.

        Changes that a unified diff cannot express come first: the executable bit, and links.
        """
        path = visible_line(self.path)
        if note := self._note():
            yield f"{path}: {note}"
        old, new = _lines(self.before), _lines(self.after)
        if old is None or new is None:
            kind = "Binary" if None in (_text(self.before), _text(self.after)) else "Very long"
            yield f"{kind} file {path} {self.verb}"
        elif old != new:
            names = ("/dev/null" if self.before is None else f"a/{path}", f"b/{path}")
            yield f"--- {names[0]}"
            yield f"+++ {'/dev/null' if self.after is None else names[1]}"
            for line in list(difflib.unified_diff(old, new))[2:]:
                yield visible_line(line.removesuffix("\n"))
                if not line.endswith("\n"):
                    yield "\\ No newline at end of file"
        elif self.before is None or self.after is None:
            yield f"Empty file {path} {self.verb}"

    def _note(self) -> str | None:
        """Return the changes other than content, in words; None if there are none."""
        was, now = self.before, self.after
        if was is not None and now is not None and (was.link is None) != (now.link is None):
            return "a file becomes a link" if was.link is None else "a link becomes a file"
        if any(file is not None and file.link is not None for file in (was, now)):
            return f"a link is {self.verb}"
        if now is not None and now.executable != (was is not None and was.executable):
            return "becomes executable" if now.executable else "is no longer executable"
        return None


def read_folder(folder: Path) -> Folder:
    """Read a folder: the files that git does not ignore in a git checkout, otherwise everything.

    `.git` is always skipped, and so are checkouts inside a checkout. A folder that git ignores entirely is read in
    full. Entries that are neither files nor links, and entries that cannot be read, are skipped and listed in
    `left_out`.

    Raises:
        typer.BadParameter: The folder is larger than a sandbox accepts.
    """
    unread: list[str] = []
    paths = sorted(_listed_by_git(folder) or _walked(folder, unread))
    sizes: Counter[str] = Counter()
    for path in paths:
        with contextlib.suppress(OSError):  # git still lists a deleted file
            sizes[path.split("/")[0]] += (folder / path).lstat().st_size
    if sizes.total() > MAX_ARCHIVE_BYTES:
        largest = ", ".join(f"{name} ({-(-size >> 20)} MiB)" for name, size in sizes.most_common(3))
        raise typer.BadParameter(
            visible_line(
                f"{folder} holds more than {MAX_ARCHIVE_BYTES >> 20} MiB, most of it in {largest}; "
                "give a smaller folder, or add what the agent does not need to .gitignore"
            ),
            param_hint="--workdir",
        )
    files: dict[str, File] = {}
    for path in paths:
        found = _read(folder / path)
        if isinstance(found, File):
            files[path] = found
        elif found is not None:
            unread.append(f"{path}: {found}")
    return Folder(files, [visible_line(line) for line in unread])


def _listed_by_git(folder: Path) -> set[str]:
    """Return the tracked and the untracked, not ignored files of a folder; empty without git or outside a checkout."""
    listed = _git(folder, "ls-files", "-z", "--cached", "--others", "--exclude-standard")
    return {path for path in listed if not _is_skipped(path)}


def _git(folder: Path, *arguments: str, stdin: bytes = b"") -> list[str]:
    """Return the NUL-terminated names printed by a git command; empty without git or outside a checkout."""
    argv = ["git", "-C", str(folder), *arguments]
    try:
        done = subprocess.run(argv, capture_output=True, input=stdin)
    except OSError:
        return []
    return [os.fsdecode(path) for path in done.stdout.split(b"\0") if path] if done.returncode == 0 else []


def _walked(folder: Path, unread: list[str]) -> set[str]:
    """Return all files and links of a folder except `.git`; directories that cannot be read are added to `unread`."""

    def failed(error: OSError) -> None:
        unread.append(f"{Path(error.filename).relative_to(folder).as_posix()}: {error.strerror}")

    found: set[str] = set()
    for parent, directories, names in os.walk(folder, onerror=failed):
        directories[:] = [name for name in directories if not _is_skipped(name)]
        links = [name for name in directories if Path(parent, name).is_symlink()]
        found.update(Path(parent, name).relative_to(folder).as_posix() for name in [*names, *links])
    return {path for path in found if not _is_skipped(path)}


def _is_skipped(path: str) -> bool:
    """Return whether a path is in a `.git` folder, in any letter case, for case-insensitive file systems."""
    return any(part.casefold() == SKIPPED for part in path.split("/"))


def pack(files: Mapping[str, File]) -> bytes:
    """Pack files into the tar archive expected by `Environment.import_dir`."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for path, file in files.items():
            entry = tarfile.TarInfo(path)
            entry.mode = 0o755 if file.executable else 0o644
            if file.link is not None:
                entry.type, entry.linkname = tarfile.SYMTYPE, file.link
            else:
                entry.size = len(file.content)
            archive.addfile(entry, io.BytesIO(file.content))
    return buffer.getvalue()


def unpack(archive: bytes) -> dict[str, File]:
    """Return the files of an archive from `Environment.export_dir`, which has checked it, without `.git`."""
    files: dict[str, File] = {}
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        for entry in tar:
            path = str(PurePosixPath(entry.name))
            if _is_skipped(path):
                continue
            if entry.issym():
                files[path] = File(b"", link=entry.linkname)
            elif entry.isreg() or entry.islnk():
                content = tar.extractfile(entry)
                assert content is not None
                files[path] = File(content.read(), bool(entry.mode & 0o100))
    return files


def changes(before: Mapping[str, File], after: Mapping[str, File]) -> list[Change]:
    """Return the differences, sorted by path."""
    paths = sorted({*before, *after})
    return [Change(path, before.get(path), after.get(path)) for path in paths if before.get(path) != after.get(path)]


def without_dropped(wanted: list[Change], dropped: Sequence[str]) -> list[Change]:
    """Return the changes without deletions of paths that the export dropped (`ExportedDir.dropped`).

    Such a path still exists in the sandbox, as an entry that cannot be exported, so the agent did not delete it.
    """
    if not dropped:
        return wanted
    names = {match[0]: ast.literal_eval(match[0]) for line in dropped if (match := QUOTED.match(line))}
    told = len(names) == len(dropped)  # otherwise the last line counts further paths without naming them

    def is_dropped(path: str) -> bool:
        parts = path.split("/")
        above = ["/".join(parts[:length]) for length in range(1, len(parts) + 1)]
        return not told or any(name in (place, _shortened(place)) for name in names.values() for place in above)

    return [change for change in wanted if change.after is not None or not is_dropped(change.path)]


def _shortened(name: str) -> str:
    """Return a name shortened as in `ExportedDir.dropped`."""
    return name if len(name) <= 200 else f"{name[:100]}...{name[-80:]}"


def without_ignored(folder: Path, wanted: list[Change]) -> tuple[list[Change], list[str]]:
    """Return the changes without new files that git ignores in `folder`, and one line for each of those.

    Files that git ignores were not copied, so a new file of such a name (Python byte code, for example) would replace a
    file that was never compared.
    """
    new = b"".join(os.fsencode(change.path) + b"\0" for change in wanted if change.before is None)
    ignored = set(_git(folder, "check-ignore", "-z", "--stdin", stdin=new)) if new else set()
    kept = [change for change in wanted if change.before is not None or change.path not in ignored]
    left_out = [change.path for change in wanted if change.before is None and change.path in ignored]
    return kept, [f"{visible_line(path)}: new, and ignored by git" for path in left_out]


def compare(
    folder: Path, before: Folder, archive: bytes, dropped: Sequence[str] = ()
) -> tuple[list[Change], list[str]]:
    """Return the agent's changes to the copy of `folder`, and one line for each entry that was left out.

    Args:
        folder: The user's folder.
        before: The copy given to the agent.
        archive: The agent's result, from `Environment.export_dir`.
        dropped: The entries that the export left out.
    """
    wanted, ignored = without_ignored(folder, without_dropped(changes(before, unpack(archive)), dropped))
    return wanted, [*before.left_out, *ignored, *map(visible_line, dropped)]


class Refused(Exception):
    """A path cannot be changed; the message names it and gives the reason."""


def apply(folder: Path, wanted: list[Change]) -> list[str]:
    """Apply all changes to `folder`, or none; return one sentence per conflict.

    Every path must be unchanged since the copy was made. New files are prepared in a stage directory; then the old
    files are moved there and the new ones take their places. A failure undoes the steps made so far.
    """
    found = ((change, _problem(folder, change, wanted)) for change in wanted)
    problems = [visible_line(f"{change.path}: {problem}") for change, problem in found if problem]
    if problems or not wanted:
        return problems
    try:
        with Switch(folder) as switch:
            _apply(switch, folder, wanted)
    except (Refused, NotUndoneError) as error:
        return [visible_line(str(error))]
    except OSError as error:
        return [visible_line(f"{error.filename2 or error.filename or folder}: {error.strerror}")]
    return []


def _apply(switch: Switch, folder: Path, wanted: list[Change]) -> None:
    prepared = {change.path: _prepare(switch, folder, change) for change in wanted if change.after is not None}
    for change in wanted:
        if change.before is not None and _read(switch.move_away(folder / change.path)) != change.before:
            raise Refused(f"{change.path}: it changed during the run")
    for path, new in prepared.items():
        target = folder / path
        if target.is_dir() and not target.is_symlink():  # `_problem` has checked that all its files are deleted
            for parent, _, _ in os.walk(target, topdown=False):
                switch.remove_empty(Path(parent))
        switch.make_parents(target)
        switch.place(new, target)
    for change in wanted:
        directory = (folder / change.path).parent
        while change.after is None and directory != folder and directory.is_dir() and not os.listdir(directory):
            switch.remove_empty(directory)
            directory = directory.parent


def _problem(folder: Path, change: Change, wanted: list[Change]) -> str | None:
    """Return the reason a change cannot be applied, or None."""
    parts = change.path.split("/")
    if change.path.startswith("/") or _is_skipped(change.path) or {"", ".", ".."} & set(parts):
        return "agents cannot change this path"
    deleted = {other.path for other in wanted if other.before is not None and other.after is None}
    for above in _above(change.path):
        if above in deleted:  # removed first, so a link here is not followed
            return None if change.before is None else "it changed during the run"
        if (folder / above).is_symlink():
            return "one of its parent directories is a link"
        if os.path.lexists(folder / above) and not (folder / above).is_dir():
            return f"{above} is not a directory"
    found = _read(folder / change.path)
    if found == KINDS[stat.S_IFDIR] and change.before is None:
        return _only_holds(folder, change.path, deleted)
    if found == change.before:
        return None
    return "it changed during the run" if found is None or isinstance(found, File) else f"it is now {found}"


def _only_holds(folder: Path, path: str, deleted: set[str]) -> str | None:
    """Return a problem if a directory holds anything that is not about to be deleted."""
    emptied = {above for name in deleted for above in _above(name)}
    for parent, directories, names in os.walk(folder / path):
        here = Path(parent).relative_to(folder).as_posix()
        links = {name for name in directories if Path(parent, name).is_symlink()}
        kept = [name for name in (*names, *links) if f"{here}/{name}" not in deleted]
        if kept or here not in emptied:
            return f"it is now a directory with {kept[0] if kept else 'an empty directory'} in it, which was not copied"
    return None


def _above(path: str) -> list[str]:
    parts = path.split("/")
    return ["/".join(parts[:length]) for length in range(1, len(parts))]


def _prepare(switch: Switch, folder: Path, change: Change) -> Path:
    """Prepare the new file in the stage; a replacement keeps the old file's permissions, owner and attributes."""
    assert change.after is not None
    if change.after.link is not None:
        return switch.link(change.after.link)
    new, old = switch.write(change.after.content), folder / change.path
    if change.before is not None and change.before.link is None:
        info = old.stat(follow_symlinks=False)
        with contextlib.suppress(PermissionError):
            os.chown(new, info.st_uid, info.st_gid)
        times = new.stat()
        shutil.copystat(old, new, follow_symlinks=False)
        os.utime(new, ns=(times.st_atime_ns, times.st_mtime_ns))
    mode = new.stat().st_mode & 0o777
    new.chmod(mode | (mode & 0o444) >> 2 if change.after.executable else mode & ~0o111)
    return new


def _read(path: Path) -> File | str | None:
    """Return the file or link at a path, None if there is nothing, or the kind of any other entry in words.

    Only regular files are opened.
    """
    try:
        info = path.lstat()
        if stat.S_ISLNK(info.st_mode):
            return File(b"", link=os.readlink(path))
        if not stat.S_ISREG(info.st_mode):
            return KINDS.get(stat.S_IFMT(info.st_mode), "neither a file nor a link")
        with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                return "neither a file nor a link"
            return File(file.read(), bool(info.st_mode & 0o100))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        return f"a file that cannot be read ({error.strerror})"


def _lines(file: File | None) -> list[str] | None:
    """Return the lines of a file with their line ends; None if it is binary or too long to compare."""
    text = _text(file)
    lines = None if text is None else re.findall(r"[^\n]*\n|[^\n]+$", text)
    return lines if lines is not None and len(lines) <= MAX_DIFF_LINES else None


def _text(file: File | None) -> str | None:
    if file is None:
        return ""
    if file.link is not None:
        return f"link to {file.link}\n"
    try:
        return file.content.decode("utf-8")
    except UnicodeDecodeError:
        return None
