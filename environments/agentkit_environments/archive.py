"""Tar archives that enter or leave a sandbox: checking, cleaning, splitting and rebuilding them.

A sandbox's files are untrusted, so an export keeps what can be carried and lists the rest (`ExportedDir.dropped`). An
import comes from a caller and is checked as a whole (`check_archive`).
"""

from __future__ import annotations

import io
import posixpath
import tarfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import IO, Any

from agentkit_environments.errors import UnsafeArchiveError
from agentkit_environments.executor import DropList, clamp_time, name_problem

MAX_ARCHIVE_BYTES = 256 << 20
"""Maximum bytes of file content and names in one `export_dir` or `import_dir`."""

MAX_ARCHIVE_ENTRIES = 50_000
"""Maximum number of entries (files, directories, links) in one `export_dir` or `import_dir`."""

MAX_LINKS_FOLLOWED = 40
MAX_STEPS = 1_000_000
"""Maximum number of path components walked to resolve all links of one archive: about a second of work."""

PIECE_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class ExportedDir:
    """A directory as an uncompressed tar archive, and a list of the entries that were left out."""

    data: bytes
    """The archive; it passes `check_archive`."""
    dropped: tuple[str, ...] = ()
    """One line for each entry left out: its quoted name and the reason."""


def check_archive(
    data: bytes, *, max_entries: int = MAX_ARCHIVE_ENTRIES, max_bytes: int = MAX_ARCHIVE_BYTES
) -> list[tarfile.TarInfo]:
    """Check an uncompressed tar archive and return its entries in order.

    Directories, regular files, symbolic links and hard links with relative names are allowed. Links are resolved as
    the kernel would resolve them, through the other links of the archive, and must end inside it.

    Args:
        data: The archive.
        max_entries: Maximum number of entries.
        max_bytes: Maximum bytes of file content and names.

    Raises:
        UnsafeArchiveError: If it is not a tar archive; if an entry has an absolute or empty name, `..` in its name, a
            name that passes through a link, another type (device, pipe, sparse file), or a link that leads out; if
            there are too many entries or bytes; or if a name is too long or too deep (`executor.name_problem`).
    """
    members = _members(data, max_entries, max_bytes)
    names = [_checked_name(member) for member in members]
    links = {name: member.linkname for name, member in zip(names, members, strict=True) if member.issym()}
    files = {name for name, member in zip(names, members, strict=True) if member.isreg()}
    resolver = _Resolver(links)
    plain = {""}  # directories already found not to pass through a link
    for name, member in zip(names, members, strict=True):
        parent, passed = posixpath.dirname(name), []
        while parent not in plain:
            if parent in links:
                raise UnsafeArchiveError(f"{member.name!r} passes through the link {parent!r}")
            passed.append(parent)
            parent = posixpath.dirname(parent)
        plain.update(passed)
        if member.issym() and (problem := resolver.problem(name)):
            raise UnsafeArchiveError(f"{member.name!r}: {problem}")
        if member.islnk() and posixpath.normpath(member.linkname) not in files:
            raise UnsafeArchiveError(
                f"{member.name!r} is a hard link to {member.linkname!r}, which is not a file in the archive"
            )
    return members


def drop_links(data: bytes, dropped: Sequence[str] = (), *, max_entries: int, max_bytes: int) -> ExportedDir:
    """Remove the links of an export that lead out of the directory or form a loop.

    Args:
        data: An archive of a directory's entries, made by a backend.
        dropped: Entries that the backend has already left out.
        max_entries: Maximum number of entries in the archive.
        max_bytes: Maximum bytes of file content and names in the archive.

    Raises:
        UnsafeArchiveError: If it is not a tar archive, or is too large.
    """
    drops = DropList(dropped)
    members = _members(data, max_entries, max_bytes)
    bad = link_problems({posixpath.normpath(member.name): member.linkname for member in members if member.issym()})
    if not bad:
        return ExportedDir(data, drops.lines)
    view, parts = memoryview(data), []
    for member in members:
        if member.issym() and (problem := bad.get(posixpath.normpath(member.name), "")):
            drops.add(member.name, problem)
        else:
            parts.append(view[member.offset : member.offset_data + -(-_stored(member) // 512) * 512])
    return ExportedDir(b"".join([*parts, bytes(1024)]), drops.lines)


def link_problems(links: Mapping[str, str]) -> dict[str, str]:
    """Return the links that lead out of a directory or form a loop, each with the reason.

    Args:
        links: The target of every link in the directory, by the relative path of the link.
    """
    resolver = _Resolver(links)
    return {name: problem for name in links if (problem := resolver.problem(name))}


def _stored(member: tarfile.TarInfo) -> int:
    return member.size if member.isreg() else 0


def _members(data: bytes, max_entries: int, max_bytes: int) -> list[tarfile.TarInfo]:
    members: list[tarfile.TarInfo] = []
    size = 0
    try:
        with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as archive:
            for member in archive:
                size += _stored(member) + len(member.name) + len(member.linkname)
                if len(members) == max_entries:
                    raise UnsafeArchiveError(f"the archive has more than {max_entries} entries")
                if size > max_bytes:
                    raise UnsafeArchiveError(
                        f"the archive holds more than {max_bytes} bytes of files, at {member.name!r}"
                    )
                members.append(member)
    except (tarfile.TarError, ValueError, EOFError, OverflowError) as error:
        raise UnsafeArchiveError(f"not an uncompressed tar archive: {error}") from error
    return members


def _checked_name(member: tarfile.TarInfo) -> str:
    name = member.name
    if not _is_plain(member):
        raise UnsafeArchiveError(f"{name!r} is neither a file, a directory nor a link (tar type {member.type!r})")
    if not name or name.startswith("/") or "\0" in name or ".." in name.split("/"):
        raise UnsafeArchiveError(f"{name!r} is not a relative name without '..'")
    if problem := name_problem(name):
        raise UnsafeArchiveError(f"{name[:60]!r}...: {problem}")
    return posixpath.normpath(name)


def _is_plain(member: tarfile.TarInfo) -> bool:
    return (member.isreg() or member.isdir() or member.issym() or member.islnk()) and not member.issparse()


class _Resolver:
    """Resolves the links of one archive as the kernel would, with the archive's directory as the working directory."""

    def __init__(self, links: Mapping[str, str]) -> None:
        self._links = links
        self._steps_left = MAX_STEPS

    def problem(self, name: str) -> str | None:
        """Return the reason why the link `name` cannot be carried, or None."""
        target, followed = self._links[name], 0
        resolved: list[str] = []
        pending = name.split("/")[::-1]
        while pending:
            self._steps_left -= 1
            if self._steps_left < 0:
                return "a link in an archive whose links are too long to follow"
            part = pending.pop()
            if part in ("", "."):
                continue
            if part == "..":
                if not resolved:
                    return f"a link that leads out, to {target[:200]!r}"
                resolved.pop()
                continue
            resolved.append(part)
            here = self._links.get("/".join(resolved))
            if here is None:
                continue
            followed += 1
            if here.startswith("/"):
                return f"a link to an absolute path, {target[:200]!r}"
            if not here or "\0" in here or followed > MAX_LINKS_FOLLOWED:
                return f"a loop of links, at {target[:200]!r}"
            resolved.pop()
            pending += here.split("/")[::-1]
        return None


def repack(source: IO[bytes], *, max_entries: int, max_bytes: int) -> ExportedDir:
    """Read a container engine's archive of one directory from a stream. The directory is its first entry.

    Reading stops at the bounds. Names become relative to the directory. Entries other than files, directories and
    links are left out, as are names that are too long. Links are not changed.

    Raises:
        UnsafeArchiveError: If it is too large.
        tarfile.TarError, ValueError, EOFError, OverflowError: If it is not a tar archive.
    """
    drops, out, hidden = DropList(), io.BytesIO(), set()
    entries = size = 0
    with (
        tarfile.open(fileobj=source, mode="r|") as engine,
        tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as target,
    ):
        for member in engine:
            name = posixpath.normpath(member.name).partition("/")[2]
            if not name:
                continue
            entries += 1
            size += _stored(member) + len(name) + len(member.linkname)
            if entries > max_entries or size > max_bytes:
                raise UnsafeArchiveError(f"more than {max_entries} entries or {max_bytes} bytes, at {name[:200]!r}")
            entry = _like(member, name)
            if member.islnk():
                entry.linkname = posixpath.normpath(member.linkname).partition("/")[2]
            problem = name_problem(name)
            if not _is_plain(member):
                problem = "a pipe, a socket or a device"
            elif member.islnk() and entry.linkname in hidden:
                problem = "a hard link to a file that was left out"
            if posixpath.dirname(name) in hidden:
                hidden.add(name)  # its directory's line in `dropped` covers it
            elif problem is None:
                target.addfile(entry, engine.extractfile(member) if member.isreg() else None)
            else:
                hidden.add(name)
                drops.add(name, problem)
    return ExportedDir(out.getvalue(), drops.lines)


def _like(member: tarfile.TarInfo, name: str, *, uid: int = 0) -> tarfile.TarInfo:
    """Return the entry with another name and owner, and with a mode and time that every tool supports."""
    entry = tarfile.TarInfo(name)
    entry.type, entry.size, entry.linkname = member.type, _stored(member), member.linkname
    entry.mode, entry.mtime = member.mode & 0o777, clamp_time(member.mtime)
    entry.uid = entry.gid = uid
    return entry


def pieces(data: bytes, members: Sequence[tarfile.TarInfo]) -> Iterator[tuple[list[dict[str, Any]], bytes]]:
    """Split a checked archive into arguments for `executor.unpack`: entries and the content of their files.

    A piece has about `PIECE_BYTES`, which bounds the memory needed to unpack it. A larger file is split over several
    pieces. Directories get their mode and time last, after their content has been written.
    """
    entries: list[dict[str, Any]] = []
    content: list[memoryview] = []
    size = 0
    view = memoryview(data)
    for member in members:
        entry = _entry(member)
        offset = 0
        while True:
            length = min(_stored(member) - offset, PIECE_BYTES - size)
            last = offset + length == _stored(member)
            entries.append({**entry, "offset": offset, "size": length, "last": last})
            content.append(view[member.offset_data + offset :][:length])
            offset += length
            size += length + 256 + len(member.name) + len(member.linkname)
            if size >= PIECE_BYTES:
                yield entries, b"".join(content)
                entries, content, size = [], [], 0
            if last:
                break
    directories = [{**_entry(member), "kind": "attributes"} for member in reversed(members) if member.isdir()]
    yield entries, b"".join(content)
    for start in range(0, len(directories), 2_000):
        yield directories[start : start + 2_000], b""


def _entry(member: tarfile.TarInfo) -> dict[str, Any]:
    """Return an archive entry in the form that `executor.unpack` takes."""
    return {
        "name": posixpath.normpath(member.name),
        "kind": "dir" if member.isdir() else "file" if member.isreg() else "hard" if member.islnk() else "link",
        "target": member.linkname,
        "mode": member.mode & 0o777 | (0o700 if member.isdir() else 0),
        "mtime": clamp_time(member.mtime),
    }


def rebase_archive(data: bytes, *, prefix: str = "", uid: int = 0) -> bytes:
    """Return the archive with new names and one owner, entries sorted by name, hard links last.

    Every directory above an entry gets an entry of its own, so that unpacking detects anything else in its place, such
    as a link that leads elsewhere. Every directory is readable, writable and searchable for its owner.

    Args:
        data: An uncompressed tar archive.
        prefix: Prefix of every name and hard link target.
        uid: Owner and group of every entry.

    Raises:
        UnsafeArchiveError: If it is not a tar archive.
    """

    def rebased(name: str) -> str:
        return posixpath.join(prefix, posixpath.normpath(name))

    directories: set[str] = set()
    out = io.BytesIO()
    try:
        with (
            tarfile.open(fileobj=io.BytesIO(data), mode="r:") as source,
            tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as target,
        ):

            def add_parents(name: str) -> None:
                missing = []
                while (name := posixpath.dirname(name)) and name not in directories:
                    missing.append(name)
                for directory in reversed(missing):
                    directories.add(directory)
                    entry = tarfile.TarInfo(directory)
                    entry.type, entry.mode, entry.mtime = tarfile.DIRTYPE, 0o755, int(time.time())
                    entry.uid = entry.gid = uid
                    target.addfile(entry)

            add_parents(posixpath.join(prefix, "x"))
            for member in sorted(source, key=lambda member: (member.islnk(), rebased(member.name))):
                name = rebased(member.name)
                if name in ("", ".", prefix):
                    continue
                add_parents(name)
                entry = _like(member, name, uid=uid)
                if member.isdir():
                    directories.add(name)
                    entry.mode |= 0o700
                if member.islnk():
                    entry.linkname = rebased(member.linkname)
                target.addfile(entry, source.extractfile(member) if member.isreg() else None)
    except (tarfile.TarError, ValueError, EOFError, OverflowError) as error:
        raise UnsafeArchiveError(f"not an uncompressed tar archive: {error}") from error
    return out.getvalue()
