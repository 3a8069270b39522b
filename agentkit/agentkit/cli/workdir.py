"""The user's own folder as a workdir: a copy goes into the sandbox, a diff comes out, and it is applied when wanted.

Regular files and links travel, in a git checkout those that git does not ignore; `.git` stays at home, so that nothing
an agent does can plant a hook. What is applied is what the diff shows: all of it, or nothing.
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
"""Lines of a file beyond which it is not compared line by line; the time for that can grow with their square."""
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
    """A regular file's content, or a link's target; `executable` is the one permission that matters."""

    content: bytes
    executable: bool = False
    link: str | None = None


class Folder(dict[str, File]):
    """The files and links of a folder by their POSIX path."""

    def __init__(self, files: Mapping[str, File], left_out: Sequence[str] = ()) -> None:
        super().__init__(files)
        self.left_out = list(left_out)
        """One line for each entry that does not travel: its name and what it is."""


@dataclass(frozen=True, slots=True)
class Change:
    """One path that differs: `before` None means it is new, `after` None means it is gone."""

    path: str
    before: File | None
    after: File | None

    @property
    def verb(self) -> str:
        """What happened to the path, in one word."""
        if self.before is None:
            return "added"
        return "deleted" if self.after is None else "changed"

    def diff(self) -> Iterator[str]:
        """Yield the change as lines of a unified diff, one line for what is no text; nothing in them is invisible.

        What a unified diff has no words for stands above it: the executable bit, and what is or becomes a link.
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
        """Return what changes beside the content, if anything does."""
        was, now = self.before, self.after
        if was is not None and now is not None and (was.link is None) != (now.link is None):
            return "a file becomes a link" if was.link is None else "a link becomes a file"
        if any(file is not None and file.link is not None for file in (was, now)):
            return f"a link is {self.verb}"
        if now is not None and now.executable != (was is not None and was.executable):
            return "becomes executable" if now.executable else "is no longer executable"
        return None


def read_folder(folder: Path) -> Folder:
    """Read a folder: in a git checkout what git does not ignore, else everything.

    Never `.git`, and in a git checkout no checkout inside it. A folder that git ignores as a whole is read whole. What
    is neither a file nor a link, and what cannot be read, is left out and listed.

    Raises:
        typer.BadParameter: there is more than a sandbox takes.
    """
    unread: list[str] = []
    paths = sorted(_listed_by_git(folder) or _walked(folder, unread))
    sizes: Counter[str] = Counter()
    for path in paths:
        with contextlib.suppress(OSError):  # deleted, but git still lists it
            sizes[path.split("/")[0]] += (folder / path).lstat().st_size
    if sizes.total() > MAX_ARCHIVE_BYTES:
        largest = ", ".join(f"{name} ({-(-size >> 20)} MiB)" for name, size in sizes.most_common(3))
        raise typer.BadParameter(
            visible_line(
                f"{folder} holds more than {MAX_ARCHIVE_BYTES >> 20} MiB, most of it in {largest}; "
                "name a smaller folder, or let git ignore what the agent does not need"
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
    """Return what git tracks below a folder, or could; nothing without git or outside a checkout."""
    listed = _git(folder, "ls-files", "-z", "--cached", "--others", "--exclude-standard")
    return {path for path in listed if not _is_skipped(path)}


def _git(folder: Path, *arguments: str, stdin: bytes = b"") -> list[str]:
    """Return the names that a git command lists, each ended by a NUL byte; none without git or outside a checkout."""
    argv = ["git", "-C", str(folder), *arguments]
    try:
        done = subprocess.run(argv, capture_output=True, input=stdin)
    except OSError:
        return []
    return [os.fsdecode(path) for path in done.stdout.split(b"\0") if path] if done.returncode == 0 else []


def _walked(folder: Path, unread: list[str]) -> set[str]:
    """Return everything below a folder but directories and `.git`; directories that cannot be read go to `unread`."""

    def failed(error: OSError) -> None:
        unread.append(f"{Path(error.filename).relative_to(folder).as_posix()}: {error.strerror}")

    found: set[str] = set()
    for parent, directories, names in os.walk(folder, onerror=failed):
        directories[:] = [name for name in directories if not _is_skipped(name)]
        links = [name for name in directories if Path(parent, name).is_symlink()]
        found.update(Path(parent, name).relative_to(folder).as_posix() for name in [*names, *links])
    return {path for path in found if not _is_skipped(path)}


def _is_skipped(path: str) -> bool:
    """Return whether a path belongs to git's own folder, by any name that a file system takes for it."""
    return any(part.casefold() == SKIPPED for part in path.split("/"))


def pack(files: Mapping[str, File]) -> bytes:
    """The files as the tar archive that `Environment.import_dir` takes."""
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
    """The files of an archive that `Environment.export_dir` made (and so checked), without `.git`."""
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
    """What differs, by path."""
    paths = sorted({*before, *after})
    return [Change(path, before.get(path), after.get(path)) for path in paths if before.get(path) != after.get(path)]


def without_dropped(wanted: list[Change], dropped: Sequence[str]) -> list[Change]:
    """Return the changes without the deletion of what an export left out (`ExportedDir.dropped`).

    The agent has such a path still, as something that cannot be carried, so that its absence proves nothing.
    """
    if not dropped:
        return wanted
    names = {match[0]: ast.literal_eval(match[0]) for line in dropped if (match := QUOTED.match(line))}
    told = len(names) == len(dropped)  # the last line may say how many more there are

    def is_dropped(path: str) -> bool:
        parts = path.split("/")
        above = ["/".join(parts[:length]) for length in range(1, len(parts) + 1)]
        return not told or any(name in (place, _shortened(place)) for name in names.values() for place in above)

    return [change for change in wanted if change.after is not None or not is_dropped(change.path)]


def _shortened(name: str) -> str:
    """Return a name as an export's list of what it left out has it."""
    return name if len(name) <= 200 else f"{name[:100]}...{name[-80:]}"


def without_ignored(folder: Path, wanted: list[Change]) -> tuple[list[Change], list[str]]:
    """Return the changes without new files that git ignores in `folder`, and a line for each of those.

    What git ignores there was not copied, so that new files of these names (a Python's byte code, say) would replace
    files that nobody has compared.
    """
    new = b"".join(os.fsencode(change.path) + b"\0" for change in wanted if change.before is None)
    ignored = set(_git(folder, "check-ignore", "-z", "--stdin", stdin=new)) if new else set()
    kept = [change for change in wanted if change.before is not None or change.path not in ignored]
    left_out = [change.path for change in wanted if change.before is None and change.path in ignored]
    return kept, [f"{visible_line(path)}: new, and ignored by git" for path in left_out]


def compare(
    folder: Path, before: Folder, archive: bytes, dropped: Sequence[str] = ()
) -> tuple[list[Change], list[str]]:
    """Return what an agent changed of a copy of `folder`, and a line for all that was left out on the way.

    Args:
        folder: The user's folder.
        before: The copy.
        archive: What the agent left, as `Environment.export_dir` has it.
        dropped: What that export could not carry.
    """
    wanted, ignored = without_ignored(folder, without_dropped(changes(before, unpack(archive)), dropped))
    return wanted, [*before.left_out, *ignored, *map(visible_line, dropped)]


class Refused(Exception):
    """A path cannot be changed; the text names it and says why."""


def apply(folder: Path, wanted: list[Change]) -> list[str]:
    """Make all the changes in `folder`, or none; return a sentence for each that stands in the way.

    Every path must be what it was when the copy was made. New files are prepared in a directory beside; then the old
    ones are moved there, and the new ones take their places. A failure on the way undoes what was done.
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
            raise Refused(f"{change.path}: it changed meanwhile")
    for path, new in prepared.items():
        target = folder / path
        if target.is_dir() and not target.is_symlink():  # all its files are deleted, or `_problem` had found it
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
    """Return what stands in the way of a change, or None."""
    parts = change.path.split("/")
    if change.path.startswith("/") or _is_skipped(change.path) or {"", ".", ".."} & set(parts):
        return "it is no path that an agent may change"
    deleted = {other.path for other in wanted if other.before is not None and other.after is None}
    for above in _above(change.path):
        if above in deleted:  # and so is what lies behind it, should it be a link
            return None if change.before is None else "it changed meanwhile"
        if (folder / above).is_symlink():
            return "a link stands in its way"
        if os.path.lexists(folder / above) and not (folder / above).is_dir():
            return f"{above} is in its way and is no directory"
    found = _read(folder / change.path)
    if found == KINDS[stat.S_IFDIR] and change.before is None:
        return _only_holds(folder, change.path, deleted)
    if found == change.before:
        return None
    return "it changed meanwhile" if found is None or isinstance(found, File) else f"{found} stands in its place"


def _only_holds(folder: Path, path: str, deleted: set[str]) -> str | None:
    """Return a problem when a directory holds anything but what is to be deleted."""
    emptied = {above for name in deleted for above in _above(name)}
    for parent, directories, names in os.walk(folder / path):
        here = Path(parent).relative_to(folder).as_posix()
        links = {name for name in directories if Path(parent, name).is_symlink()}
        kept = [name for name in (*names, *links) if f"{here}/{name}" not in deleted]
        if kept or here not in emptied:
            return (
                f"a directory stands in its place, with {kept[0] if kept else 'an empty one'} in it that was not copied"
            )
    return None


def _above(path: str) -> list[str]:
    parts = path.split("/")
    return ["/".join(parts[:length]) for length in range(1, len(parts))]


def _prepare(switch: Switch, folder: Path, change: Change) -> Path:
    """Make the new file beside; one that replaces a file takes over its permissions, owner and attributes."""
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
    """Return what is at a path: a file, nothing, or in words what does not travel. Nothing is opened but files."""
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
    """Return the lines of a file with their ends, or None for what is no text, or too long to compare."""
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
