"""`Snapshot`: the files of an environment at one moment, in a temporary file or a file of the user."""

from __future__ import annotations

import os
import secrets
import stat
import tempfile
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from agentkit_environments import tree
from agentkit_environments.errors import SnapshotError

MAX_ENTRIES = 1 << 18
"""Maximum number of directories, files, links and pipes in a snapshot."""
SLACK_BYTES = 64 << 20
"""Bytes for the names and attributes of a snapshot's entries, beyond the `disk_mib` of each directory."""

Count = Annotated[int, Field(ge=0, lt=1 << 62)]


class Snapshot:
    """The files of an environment: what the work directory and /tmp held at one moment.

    `Environment.snapshot` makes one, and any number of environments can be opened from it, in every backend and after
    the first environment is closed. It includes directories, files (with their holes), links and pipes, with
    permission bits, modification times and, in containers, owners. It does not include processes, sockets, extended
    attributes, /dev/shm and the rest of the file system, which is read-only.

    The content is in a temporary file without a name, which `close`, or the end of the process, frees.

    Attributes:
        left_out: One line for each entry that could not be captured: its name and the reason.
        entries: Number of entries.
        size_bytes: Size of the snapshot; holes do not count.
    """

    def __init__(self, fd: int) -> None:
        """Take over the descriptor of a file in the format of `tree`. Raises ValueError if it is not one."""
        self._fd = fd
        self._finalizer = weakref.finalize(self, os.close, fd)
        index, _ = tree.read_index(fd)
        self.left_out = tuple(index["left_out"])
        self.entries = len(index["entries"])
        self.size_bytes = os.fstat(fd).st_size

    @classmethod
    def of(cls, file: IO[bytes]) -> Self:
        """Return the snapshot that was written to `file`, which may be closed afterwards."""
        file.flush()
        return cls(os.dup(file.fileno()))

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Open a file that `save` wrote. The snapshot stays usable if the file is removed, but not if it is changed.

        Raises:
            SnapshotError: If the file is not a snapshot, is damaged, or has another format version.
            OSError: If it cannot be opened.
        """
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                raise ValueError("not a regular file")
            _check(*tree.read_index(fd))
            return cls(os.dup(fd))
        except (ValueError, RecursionError) as error:
            raise SnapshotError(f"{path} cannot be used as a snapshot: {_first_line(error)}") from error
        finally:
            os.close(fd)

    def save(self, path: str | Path) -> None:
        """Write the snapshot to a file, which replaces an existing one as a whole; it is on the disk on return.

        Raises:
            OSError: If the file cannot be written.
            SnapshotError: If the snapshot was closed.
        """
        path = Path(path)
        partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
        try:
            with partial.open("xb") as file:
                offset = 0
                while sent := os.sendfile(file.fileno(), self.fileno(), offset, 1 << 30):
                    offset += sent
                os.fsync(file.fileno())
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)

    def fileno(self) -> int:
        """Return the file's descriptor. Raises SnapshotError if the snapshot was closed."""
        if not self._finalizer.alive:
            raise SnapshotError("this snapshot was closed; take another one")
        return self._fd

    def reader(self) -> int:
        """Return a new descriptor that can only read, for a sandbox; the caller closes it."""
        return os.open(f"/proc/self/fd/{self.fileno()}", os.O_RDONLY | os.O_CLOEXEC)

    def index(self) -> list[dict[str, Any]]:
        """Return the entries, as described in `tree`."""
        entries: list[dict[str, Any]] = tree.read_index(self.fileno())[0]["entries"]
        return entries

    def close(self) -> None:
        """Free the content. Environments that were opened from it are not affected. Safe to call twice."""
        self._finalizer()


def temporary_file() -> IO[bytes]:
    """Return a file without a name, to write a snapshot to."""
    return tempfile.TemporaryFile()


class _Entry(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)
    name: str
    mode: Annotated[int, Field(ge=0, le=0o7777)]
    mtime_ns: Annotated[int, Field(ge=-(1 << 62), lt=1 << 62)]
    owner: tuple[Count, Count] | None = None


class _Directory(_Entry):
    kind: Literal["dir", "fifo"]


class _Link(_Entry):
    kind: Literal["link", "hard"]
    target: Annotated[str, Field(min_length=1)]


class _File(_Entry):
    kind: Literal["file"]
    size: Count
    offset: Count
    extents: list[tuple[Count, Count]] | None = None


class _Index(BaseModel):
    model_config = ConfigDict(extra="forbid")
    format: str
    version: int
    left_out: list[str]
    entries: Annotated[list[Annotated[_Directory | _Link | _File, Field(discriminator="kind")]], Field(max_length=MAX_ENTRIES)]


def _check(index: Mapping[str, Any], content_size: int) -> None:
    """Check the index of a file from outside. Raises ValueError if `tree.unpack` could not be trusted with it."""
    kinds: dict[str, str] = {}
    for entry in _Index.model_validate(index).entries:
        label, *parts = entry.name.split("/")
        parent = entry.name.rpartition("/")[0]
        if label not in (tree.WORK, tree.TMP) or {"", ".", ".."} & {*parts} or "\0" in entry.name:
            raise ValueError(f"an entry is named {entry.name[:200]!r}, which is not a path in a tree")
        if entry.name in kinds or (parts and kinds.get(parent) != "dir") or (not parts and entry.kind != "dir"):
            raise ValueError(f"entry {entry.name[:200]!r} does not follow its directory, or is not the only one")
        if isinstance(entry, _Link) and entry.kind == "hard" and kinds.get(entry.target) != "file":
            raise ValueError(f"entry {entry.name[:200]!r} is a hard link to {entry.target[:200]!r}, which is no file")
        if isinstance(entry, _File):
            extents = [(0, entry.size)] if entry.extents is None else entry.extents
            ends = [0, *(start + length for start, length in extents)]
            in_order = all(start >= end for (start, _), end in zip(extents, ends, strict=False))
            stored = sum(length for _, length in extents)
            if not in_order or ends[-1] > entry.size or entry.offset + stored > content_size:
                raise ValueError(f"the content of entry {entry.name[:200]!r} is outside the snapshot")
        kinds[entry.name] = entry.kind
    if not {tree.WORK, tree.TMP} <= kinds.keys():
        raise ValueError("the work directory or /tmp is missing")


def _first_line(error: Exception) -> str:
    if isinstance(error, ValidationError):
        first = error.errors(include_url=False, include_input=False)[0]
        return f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
    return str(error).partition("\n")[0]
