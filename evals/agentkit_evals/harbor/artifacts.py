"""Files and folders on their way into a sandbox: those of the task, and those that a separate verifier gets."""

from __future__ import annotations

import fnmatch
import io
import posixpath
import re
import tarfile
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from agentkit.harbor import Artifact
from agentkit_environments import Environment
from agentkit_environments.folder import pack_folder

MAX_FILE_BYTES = 64 << 20
_SETS_AND_ESCAPES = re.compile(r"\[[!^]?\]?[^\]]*\]|\\.|\[", re.DOTALL)


async def exported(environment: Environment, artifact: Artifact) -> tuple[str, bytes] | None:
    """Return an artifact as the folder and the archive to unpack there; None if it is missing."""
    path = environment.resolve(artifact.source)
    try:
        archive = (await environment.export_dir(path)).data
    except FileNotFoundError:
        return None
    except NotADirectoryError:
        content = await environment.read_file(path, max_bytes=MAX_FILE_BYTES)
        return str(PurePosixPath(path).parent), one_file(PurePosixPath(path).name, content)
    return path, without_excluded(archive, artifact.exclude) if artifact.exclude else archive


def one_file(name: str, content: bytes) -> bytes:
    """Return an archive of one file."""
    out, entry = io.BytesIO(), tarfile.TarInfo(name)
    entry.size, entry.mode = len(content), 0o644
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as archive:
        archive.addfile(entry, io.BytesIO(content))
    return out.getvalue()


def without_excluded(archive: bytes, patterns: Sequence[str]) -> bytes:
    """Return the archive of a folder without the entries that `tar --exclude=PATTERN -C FOLDER .` leaves out.

    A pattern matches the whole of `./NAME`, or what follows one of its slashes; `*` and `?` match a slash, too. What is
    below an excluded folder is excluded.
    """
    excluded = re.compile("|".join(fnmatch.translate(_in_python(pattern)) for pattern in patterns), re.DOTALL)
    out, left_out = io.BytesIO(), {"."} if excluded.match(".") else set[str]()
    with (
        tarfile.open(fileobj=io.BytesIO(archive), mode="r:") as source,
        tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as target,
    ):
        for member in source:
            name = posixpath.join(".", posixpath.normpath(member.name))
            slashes = [match.end() for match in re.finditer("/", name)]
            if posixpath.dirname(name) in left_out or any(excluded.match(name, start) for start in (0, *slashes)):
                left_out.add(name)
                continue
            content = source.extractfile(member) if member.isreg() or member.islnk() else None
            if member.islnk() and posixpath.join(".", posixpath.normpath(member.linkname)) in left_out:
                member = source.getmember(member.linkname).replace(name=member.name, deep=False)
            target.addfile(member, content if member.isreg() else None)
    return out.getvalue()


def _in_python(pattern: str) -> str:
    r"""Return a pattern of tar as one of `fnmatch`, which negates sets only by `!` and has no escapes by `\`."""

    def replaced(match: re.Match[str]) -> str:
        part = match[0]
        if part.startswith("\\"):
            return f"[{part[1]}]" if part[1] in "*?[" else part[1]
        return "[[]" if part == "[" else f"[!{part[2:]}" if part.startswith("[^") else part

    return _SETS_AND_ESCAPES.sub(replaced, pattern)


def packed_at(target: str, path: Path) -> tuple[str, bytes]:
    """Return the folder and the archive to unpack there, so that a file or folder of the task is at `target`."""
    if path.is_dir():
        return target, pack_folder(path)
    place = PurePosixPath(target)
    return str(place.parent), one_file(place.name, path.read_bytes())
