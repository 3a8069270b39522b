"""The user's own folder as a workdir: a copy goes into the sandbox, a diff comes out, and it is applied when wanted.

Regular files and links travel, in a git checkout those that git does not ignore; `.git` stays at home, so that nothing
an agent does can plant a hook.
"""

from __future__ import annotations

import contextlib
import difflib
import io
import os
import subprocess
import tarfile
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import typer

from agentkit_environments.environment import MAX_ARCHIVE_BYTES

SKIPPED = ".git"


@dataclass(frozen=True, slots=True)
class File:
    """A regular file's content, or a link's target; `executable` is the one permission that matters."""

    content: bytes
    executable: bool = False
    link: str | None = None


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
        """The change as lines of a unified diff; one line for what is no text."""
        old, new = _lines(self.before), _lines(self.after)
        names = ("/dev/null" if self.before is None else f"a/{self.path}", f"b/{self.path}")
        if old is None or new is None:
            yield f"Binary file {self.path} {self.verb}"
        elif old == new:
            yield f"{self.path}: mode changed" if self.before and self.after else f"Empty file {self.path} {self.verb}"
        else:
            yield from difflib.unified_diff(
                old, new, names[0], "/dev/null" if self.after is None else names[1], lineterm=""
            )


def read_folder(folder: Path) -> dict[str, File]:
    """The files and links of `folder` by their POSIX path: in a git checkout those that git does not ignore, else all.

    Never `.git`, and in a git checkout no checkout inside it. A folder that git ignores as a whole is read whole.

    Raises:
        OSError: something is unreadable.
        typer.BadParameter: there is more than a sandbox takes.
    """
    paths = sorted(_listed_by_git(folder) or _walked(folder))
    sizes: Counter[str] = Counter()
    for path in paths:
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):  # deleted, but git still lists it
            sizes[path.split("/")[0]] += (folder / path).lstat().st_size
    if sizes.total() > MAX_ARCHIVE_BYTES:
        largest = ", ".join(f"{name} ({-(-size >> 20)} MiB)" for name, size in sizes.most_common(3))
        raise typer.BadParameter(
            f"{folder} holds more than {MAX_ARCHIVE_BYTES >> 20} MiB, most of it in {largest}; "
            "name a smaller folder, or let git ignore what the agent does not need",
            param_hint="--workdir",
        )
    files = {path: _read(folder / path) for path in paths}
    return {path: file for path, file in files.items() if file is not None}


def _listed_by_git(folder: Path) -> set[str]:
    """What git tracks below `folder`, or could; nothing without git or outside a checkout."""
    argv = ["git", "-C", str(folder), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        listed = subprocess.run(argv, capture_output=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return set()
    return {os.fsdecode(path) for path in listed.split(b"\0") if path}


def _walked(folder: Path) -> set[str]:
    """Everything below `folder` but directories and `.git`."""
    found: set[str] = set()
    for parent, directories, names in os.walk(folder):
        directories[:] = [name for name in directories if name != SKIPPED]
        links = [name for name in directories if Path(parent, name).is_symlink()]
        found.update(Path(parent, name).relative_to(folder).as_posix() for name in [*names, *links] if name != SKIPPED)
    return found


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
            path = PurePosixPath(entry.name)
            if SKIPPED in path.parts:
                continue
            if entry.issym():
                files[str(path)] = File(b"", link=entry.linkname)
            elif entry.isreg() or entry.islnk():
                content = tar.extractfile(entry)
                assert content is not None
                files[str(path)] = File(content.read(), bool(entry.mode & 0o100))
    return files


def changes(before: Mapping[str, File], after: Mapping[str, File]) -> list[Change]:
    """What differs, by path."""
    paths = sorted({*before, *after})
    return [Change(path, before.get(path), after.get(path)) for path in paths if before.get(path) != after.get(path)]


def apply(folder: Path, wanted: list[Change]) -> list[str]:
    """Make the changes in `folder`; returns one sentence for each that was refused.

    A path is left alone when it is no longer what it was when the copy was made, or when a link stands in the way.
    Deletions come first, so that a file may become a directory.
    """
    refused: list[str] = []
    for change in sorted(wanted, key=lambda change: (change.after is not None, change.path)):
        target = folder / change.path
        parents = [folder.joinpath(*parent.parts) for parent in PurePosixPath(change.path).parents]
        if any(parent.is_symlink() for parent in parents if parent != folder):
            refused.append(f"{change.path}: a link stands in its way")
        elif _read(target) != change.before:
            refused.append(f"{change.path}: it changed meanwhile")
        elif change.after is None:
            target.unlink()
            with contextlib.suppress(OSError):  # directories that still hold something stay, with all above them
                for parent in parents[:-1]:
                    parent.rmdir()
        else:
            _write(target, change.after)
    return refused


def _read(path: Path) -> File | None:
    if path.is_symlink():
        return File(b"", link=os.readlink(path))
    return File(path.read_bytes(), bool(path.stat().st_mode & 0o100)) if path.is_file() else None


def _write(target: Path, file: File) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.is_symlink() or (file.link is not None and target.exists()):
        target.unlink()
    if file.link is not None:
        target.symlink_to(file.link)
        return
    target.write_bytes(file.content)
    mode = target.stat().st_mode & 0o777
    target.chmod(mode | (mode & 0o444) >> 2 if file.executable else mode & ~0o111)


def _lines(file: File | None) -> list[str] | None:
    if file is None:
        return []
    if file.link is not None:
        return [f"link to {file.link}"]
    try:
        lines = file.content.decode("utf-8").split("\n")
    except UnicodeDecodeError:
        return None
    return lines[:-1] if lines[-1] == "" else [*lines, "\\ No newline at end of file"]
