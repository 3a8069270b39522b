"""Folders of this machine on their way into a sandbox: their hash, the image built from one, and a tar archive."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import tarfile
from collections.abc import Iterator, Mapping
from pathlib import Path

from agentkit_environments.archive import MAX_ARCHIVE_BYTES
from agentkit_environments.errors import UnsafeArchiveError


def folder_hash(folder: str | Path) -> str:
    """Return the SHA-256 of a folder's content in hex: names, executable bits, link targets and bytes of files.

    Raises:
        OSError: the folder, or a file in it, cannot be read.
    """
    total = hashlib.sha256()
    for path in _entries(folder):
        relative = os.fsencode(path.relative_to(folder))
        if path.is_symlink():
            kind, content = b"link", os.fsencode(os.readlink(path))
        elif path.is_dir():
            kind, content = b"folder", b""
        elif not path.is_file():
            raise OSError(errno.EINVAL, "not a file, a folder or a link", str(path))
        else:
            kind = b"program" if os.access(path, os.X_OK) else b"file"
            with path.open("rb") as file:
                content = hashlib.file_digest(file, "sha256").digest()
        for part in (relative, kind, content):
            total.update(len(part).to_bytes(8, "big") + part)
    return total.hexdigest()


def image_tag(
    sha256: str, *, dockerfile: str = "Dockerfile", target: str | None = None, args: Mapping[str, str] | None = None
) -> str:
    """Return the name of the image that is built from a folder with this hash, in this way."""
    if (dockerfile, target, args or None) != ("Dockerfile", None, None):
        way = json.dumps([sha256, dockerfile, target, args], sort_keys=True)
        sha256 = hashlib.sha256(way.encode()).hexdigest()
    return f"agentkit-build:{sha256}"


def pack_folder(folder: str | Path) -> bytes:
    """Return a folder's files, folders and links as an uncompressed tar archive, for `Environment.import_dir`.

    Raises:
        UnsafeArchiveError: the files have more than `MAX_ARCHIVE_BYTES`, or one is not a file, a folder or a link.
        OSError: the folder, or a file in it, cannot be read.
    """
    out, size = io.BytesIO(), 0
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for path in _entries(folder):
            entry = archive.gettarinfo(path, path.relative_to(folder).as_posix())
            if entry is None or not (entry.isreg() or entry.isdir() or entry.issym() or entry.islnk()):
                raise UnsafeArchiveError(f"{path} is not a file, a folder or a link")
            size += entry.size
            if size > MAX_ARCHIVE_BYTES:
                raise UnsafeArchiveError(f"the files of {folder} have more than {MAX_ARCHIVE_BYTES} bytes")
            if entry.isreg():
                with path.open("rb") as file:
                    archive.addfile(entry, file)
            else:
                archive.addfile(entry)
    return out.getvalue()


def _entries(folder: str | Path) -> Iterator[Path]:
    """Yield everything below a folder, sorted; folders before what they contain. Links are not followed."""

    def fail(error: OSError) -> None:
        raise error

    for place, folders, files in os.walk(folder, onerror=fail):
        folders.sort()
        for name in sorted([*folders, *files]):
            yield Path(place, name)
