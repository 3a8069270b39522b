"""The user's own folder as a workdir: a copy goes into the sandbox, a diff comes out, and it is applied when wanted.

Regular files and links travel; `.git` stays at home, so that nothing an agent does can plant a hook.
"""

from __future__ import annotations

import contextlib
import difflib
import io
import os
import tarfile
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
    """Every file and link below `folder` by its POSIX path, without `.git`.

    Raises:
        OSError: something is unreadable.
        typer.BadParameter: there is more than a sandbox takes.
    """
    found: dict[str, File] = {}
    size = 0
    for parent, directories, names in os.walk(folder):
        directories[:] = sorted(name for name in directories if name != SKIPPED)
        links = [name for name in directories if Path(parent, name).is_symlink()]
        for name in sorted([*names, *links]):
            path = Path(parent, name)
            if path.is_symlink():
                found[path.relative_to(folder).as_posix()] = File(b"", link=os.readlink(path))
            elif path.is_file() and name != SKIPPED:
                size += path.stat().st_size
                if size > MAX_ARCHIVE_BYTES:
                    raise typer.BadParameter(
                        f"{folder} holds more than {MAX_ARCHIVE_BYTES >> 20} MiB; name a smaller folder",
                        param_hint="--workdir",
                    )
                executable = bool(path.stat().st_mode & 0o100)
                found[path.relative_to(folder).as_posix()] = File(path.read_bytes(), executable)
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
