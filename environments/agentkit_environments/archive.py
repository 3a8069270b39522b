"""What may be in an archive that goes in or out of a sandbox, checked before anything is unpacked."""

from __future__ import annotations

import io
import posixpath
import tarfile
import time

from agentkit_environments.errors import UnsafeArchiveError

MAX_ARCHIVE_BYTES = 256 << 20
"""Bytes of file content, and of the archive itself, that one `export_dir` or `import_dir` may carry."""

MAX_ARCHIVE_ENTRIES = 50_000
"""Entries (files, directories, links) that one `export_dir` or `import_dir` may carry."""

MAX_LINKS_FOLLOWED = 40
MAX_NAME_BYTES = 4096
MAX_DEPTH = 128


def check_archive(
    data: bytes, *, max_entries: int = MAX_ARCHIVE_ENTRIES, max_bytes: int = MAX_ARCHIVE_BYTES
) -> list[tarfile.TarInfo]:
    """Check an uncompressed tar archive and return its entries in their order.

    Allowed are directories, regular files, symbolic links and hard links with relative names. Links are followed the
    way the kernel would, through the other links of the archive, and must end inside it.

    Args:
        data: The archive.
        max_entries: Most entries it may hold.
        max_bytes: Most bytes of file content it may hold.

    Raises:
        UnsafeArchiveError: If it is not a tar archive, or an entry has an absolute or empty name, `..` in its name, a
            name that passes through a link, another type (device, pipe, sparse file), or a link that leads out; or if
            there are too many entries or bytes, or a name is longer than 4096 bytes or 128 components.
    """
    members: list[tarfile.TarInfo] = []
    size = 0
    try:
        with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as archive:
            for member in archive:
                size += member.size if member.isreg() else 0
                if len(members) == max_entries:
                    raise UnsafeArchiveError(f"the archive has more than {max_entries} entries")
                if size > max_bytes:
                    raise UnsafeArchiveError(
                        f"the archive holds more than {max_bytes} bytes of files, at {member.name!r}"
                    )
                members.append(member)
    except (tarfile.TarError, ValueError, EOFError) as error:
        raise UnsafeArchiveError(f"not an uncompressed tar archive: {error}") from error
    names = [_checked_name(member) for member in members]
    links = {name: member.linkname for name, member in zip(names, members, strict=True) if member.issym()}
    files = {name for name, member in zip(names, members, strict=True) if member.isreg()}
    for name, member in zip(names, members, strict=True):
        for parent in _parents(name):
            if parent in links:
                raise UnsafeArchiveError(f"{member.name!r} passes through the link {parent!r}")
        if member.issym():
            _follow(name, links)
        elif member.islnk() and posixpath.normpath(member.linkname) not in files:
            raise UnsafeArchiveError(f"{member.name!r} is a hard link to {member.linkname!r}, no file of the archive")
    return members


def _checked_name(member: tarfile.TarInfo) -> str:
    name = member.name
    if not (member.isreg() or member.isdir() or member.issym() or member.islnk()) or member.issparse():
        raise UnsafeArchiveError(f"{name!r} is neither a file, a directory nor a link (tar type {member.type!r})")
    if not name or name.startswith("/") or "\0" in name or ".." in name.split("/"):
        raise UnsafeArchiveError(f"{name!r} is not a relative name without '..'")
    if len(name) > MAX_NAME_BYTES or name.count("/") >= MAX_DEPTH:
        raise UnsafeArchiveError(
            f"{name[:60]!r}... is longer than {MAX_NAME_BYTES} bytes or {MAX_DEPTH} components deep"
        )
    return posixpath.normpath(name)


def _parents(name: str) -> list[str]:
    parts = name.split("/")
    return ["/".join(parts[:length]) for length in range(1, len(parts))]


def _follow(name: str, links: dict[str, str]) -> None:
    """Resolve the link `name` as the kernel would with the archive's directory as its working directory."""
    resolved: list[str] = []
    pending = name.split("/")[::-1]
    followed = 0
    while pending:
        part = pending.pop()
        if part in ("", "."):
            continue
        if part == "..":
            if not resolved:
                raise UnsafeArchiveError(f"the link {name!r} -> {links[name]!r} leads out of the archive")
            resolved.pop()
            continue
        resolved.append(part)
        target = links.get("/".join(resolved))
        if target is None:
            continue
        followed += 1
        if target.startswith("/") or not target or followed > MAX_LINKS_FOLLOWED:
            raise UnsafeArchiveError(f"the link {name!r} -> {links[name]!r} is absolute, empty or a loop")
        resolved.pop()
        pending += target.split("/")[::-1]


def rebase_archive(data: bytes, *, strip: int = 0, prefix: str = "", uid: int = 0) -> bytes:
    """Return the archive with other names and one owner, its entries sorted by name, hard links last.

    Every directory above an entry is an entry too: whoever unpacks the archive meets what is in a directory's place,
    say a link that leads elsewhere, and does not pass through it unseen.

    Args:
        data: An uncompressed tar archive.
        strip: Leading components taken off every name and hard link; entries with no more than these are left out.
        prefix: Put before every name and hard link.
        uid: The owner and group of every entry.

    Raises:
        UnsafeArchiveError: If it is not a tar archive.
    """

    def rebased(name: str) -> str:
        return posixpath.join(prefix, *posixpath.normpath(name).split("/")[strip:])

    directories: set[str] = set()
    out = io.BytesIO()
    try:
        with (
            tarfile.open(fileobj=io.BytesIO(data), mode="r:") as source,
            tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as target,
        ):

            def add_parents(name: str) -> None:
                for directory in _parents(name):
                    if directory not in directories:
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
                if member.isdir():
                    directories.add(name)
                entry = tarfile.TarInfo(name)
                entry.type, entry.mode, entry.mtime, entry.size = member.type, member.mode, member.mtime, member.size
                entry.linkname = rebased(member.linkname) if member.islnk() else member.linkname
                entry.uid = entry.gid = uid
                target.addfile(entry, source.extractfile(member) if member.isreg() else None)
    except (tarfile.TarError, ValueError, EOFError) as error:
        raise UnsafeArchiveError(f"not an uncompressed tar archive: {error}") from error
    return out.getvalue()
