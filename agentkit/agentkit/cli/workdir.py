"""The agent's changes to the user's own folder: find them, show them as a diff, apply them.

Applying makes exactly the changes in the diff: all of them, or none. `listing.py` says what the agent sees.
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
import tarfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import typer

from agentkit.cli.listing import KINDS, Listing, ignored_by_git, is_git_directory
from agentkit.cli.switch import NotUndoneError, Switch
from agentkit.cli.terminal import visible_line
from agentkit_environments.archive import link_problems
from agentkit_environments.environment import MAX_ARCHIVE_BYTES

MAX_DIFF_LINES = 20_000
"""Files with more lines are not compared line by line, because the time can grow quadratically."""
QUOTED = re.compile(r"""'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*\"""")


@dataclass(frozen=True, slots=True)
class File:
    """The content of a regular file or the target of a link; `executable` is the only permission that is kept."""

    content: bytes
    executable: bool = False
    link: str | None = None


@dataclass(frozen=True, slots=True)
class Change:
    """One path that differs: `before` is None for a new file, `after` is None for a deleted one."""

    path: str
    before: File | None
    after: File | None
    is_stale: bool = False
    """True if the user changed the file during the run, so the agent's change is based on an older version."""

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
        if self.is_stale:
            yield f"{path}: it changed in your folder during the run"
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


def read_files(folder: Path, listing: Listing, reason: str) -> tuple[dict[str, File], list[str]]:
    """Read the files and links of a listing; return them by path, and one line for each that cannot be copied.

    Args:
        folder: The user's folder.
        listing: The files and links to read.
        reason: The reason for copying, for the error message.

    Raises:
        typer.BadParameter: The files are larger than a sandbox accepts.
    """
    if listing.size > MAX_ARCHIVE_BYTES:
        sizes: Counter[str] = Counter()
        for path, signature in listing.files.items():
            sizes[path.split("/")[0]] += signature[1]
        largest = ", ".join(f"{name} ({-(-size >> 20)} MiB)" for name, size in sizes.most_common(3))
        raise typer.BadParameter(
            visible_line(
                f"{folder} holds more than {MAX_ARCHIVE_BYTES >> 20} MiB, most of it in {largest}, which is too much "
                f"to copy, and {reason}; give a smaller folder, or add what the agent does not need to .gitignore"
            ),
            param_hint="--workdir",
        )
    files: dict[str, File] = {}
    unread: list[str] = []
    for path in sorted(listing.files):
        found = read_file(folder / path)
        if isinstance(found, File):
            files[path] = found
        elif found is not None:
            unread.append(f"{path}: {found}")
    links = {path: file.link for path, file in files.items() if file.link is not None}
    for path, problem in link_problems(links).items():
        del files[path]
        unread.append(f"{path}: {problem}")
    return files, [visible_line(line) for line in unread]


def is_skipped(path: str) -> bool:
    """Return whether a path is in a `.git` folder."""
    return any(is_git_directory(part) for part in path.split("/"))


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
            if is_skipped(path):
                continue
            if not entry.isdir():
                files[path] = file_of(tar, entry)
    return files


def file_of(tar: tarfile.TarFile, entry: tarfile.TarInfo) -> File:
    """Return a file, a hard link or a symbolic link of an archive from an environment."""
    if entry.issym():
        return File(b"", link=entry.linkname)
    content = tar.extractfile(entry)
    assert content is not None
    return File(content.read(), bool(entry.mode & 0o100))


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


def without_ignored(folder: Path, listing: Listing, wanted: list[Change]) -> tuple[list[Change], list[str]]:
    """Return the changes without paths that git ignores in `folder`, and one line for each of those.

    Unless the user asked for them, such files were not shown to the agent, so a new one (Python byte code, for
    example) would replace a file that was never compared.
    """
    ignored = ignored_by_git(folder, listing.checkouts, [change.path for change in wanted])
    kept = [change for change in wanted if change.path not in ignored]
    left_out = [change for change in wanted if change.path in ignored]
    return kept, [visible_line(f"{change.path}: {change.verb}, and ignored by git") for change in left_out]


def compare(
    folder: Path, listing: Listing, before: Mapping[str, File], archive: bytes, dropped: Sequence[str] = ()
) -> tuple[list[Change], list[str]]:
    """Return the agent's changes to the copy of `folder`, and one line for each entry that was left out.

    Args:
        folder: The user's folder.
        listing: The folder's listing from before the run.
        before: The copy given to the agent.
        archive: The agent's result, from `Environment.export_dir`.
        dropped: The entries that the export left out.
    """
    wanted, ignored = without_ignored(folder, listing, without_dropped(changes(before, unpack(archive)), dropped))
    return wanted, [*ignored, *map(visible_line, dropped)]


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
        if change.before is not None and read_file(switch.move_away(folder / change.path)) != change.before:
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
    if change.is_stale:
        return "it changed during the run"
    if change.path.startswith("/") or is_skipped(change.path) or {"", ".", ".."} & set(parts):
        return "agents cannot change this path"
    deleted = {other.path for other in wanted if other.before is not None and other.after is None}
    for above in _above(change.path):
        if above in deleted:  # removed first, so a link here is not followed
            return None if change.before is None else "it changed during the run"
        if (folder / above).is_symlink():
            return "one of its parent directories is a link"
        if os.path.lexists(folder / above) and not (folder / above).is_dir():
            return f"{above} is not a directory"
    found = read_file(folder / change.path)
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


def read_file(path: Path) -> File | str | None:
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
