"""`Snapshot`: the files of an environment at one moment."""

from __future__ import annotations

import os
import secrets
import stat
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from agentkit_environments import tree
from agentkit_environments.errors import SnapshotError

MAX_ENTRIES = 1 << 18
"""Maximum number of directories, files, links and pipes in a snapshot."""
SLACK_BYTES = 64 << 20
"""Bytes for the names and attributes of a snapshot's entries, beyond the `disk_mib` of each directory."""

MAX_INDEX_BYTES = 64 << 20
"""Maximum size of the list of entries in a file that is loaded."""
MEMORY_BYTES = 1 << 20
"""Size up to which a snapshot is kept in memory, so that thousands of them need no descriptors."""

Count = Annotated[int, Field(ge=0, lt=1 << 62)]
Pair = Annotated[list[Count], Field(min_length=2, max_length=2)]
Capability = Annotated[str, Field(pattern="^([0-9a-f]{2}){1,64}$")]
Id = Annotated[int, Field(ge=0, lt=(1 << 32) - 1)]
"""A user or group; the kernel would take a larger number modulo 2^32, and so 2^32 as root."""


class Snapshot:
    """The files of an environment: what the work directory and /tmp held at one moment.

    `Environment.snapshot` makes one, and any number of environments can be opened from it, in every backend and after
    the first environment is closed. It includes directories, files (with their holes), links and pipes, with
    permission bits, modification times and, in containers, owners. It does not include processes, sockets, extended
    attributes, /dev/shm and the rest of the file system, which is read-only.

    The snapshot of a sandbox `as_image` has what commands have changed anywhere in the root file system, with file
    capabilities. Only docker sandboxes `as_image` of the same image can begin with it.

    A small snapshot is kept in memory, a larger one in a temporary file without a name. `close`, or the end of the
    process, frees it.

    Attributes:
        left_out: One line for each entry that could not be captured: its name and the reason.
        entries: Number of entries.
        size_bytes: Size of the snapshot, without holes.
        image: Id of the image of a sandbox `as_image`; None for other sandboxes.
    """

    def __init__(self, fd: int) -> None:
        """Read the snapshot in an open file, whose descriptor may be closed afterwards.

        Raises:
            ValueError: If the file is not in the format of `tree`.
        """
        index, _ = tree.read_index(fd)
        self.left_out: tuple[str, ...] = tuple(index["left_out"])
        self.entries = len(index["entries"])
        self.image: str | None = index.get("image")
        self.size_bytes = os.fstat(fd).st_size
        self._content: bytes | int | None  # a small one itself, a larger one's descriptor, None once closed
        if self.size_bytes <= MEMORY_BYTES:
            self._content = os.pread(fd, self.size_bytes, 0)
        else:
            self._content = os.dup(fd)
            self._finalizer = weakref.finalize(self, os.close, self._content)

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
            _check(*tree.read_index(fd, MAX_INDEX_BYTES))
            return cls(fd)
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
        with self.descriptor(self.image) as fd:
            try:
                with partial.open("xb") as file:
                    offset = 0
                    while sent := os.sendfile(file.fileno(), fd, offset, 1 << 30):
                        offset += sent
                    os.fsync(file.fileno())
                partial.replace(path)
            finally:
                partial.unlink(missing_ok=True)

    @contextmanager
    def descriptor(self, image: str | None = None) -> Iterator[int]:
        """Yield a descriptor of the content that can only read; a sandbox may get it.

        Args:
            image: Id of the image of a sandbox `as_image`, or None, that begins with the snapshot.

        Raises:
            SnapshotError: If the snapshot was closed, or such a sandbox cannot begin with it.
        """
        if self._content is None:
            raise SnapshotError("this snapshot was closed; take another one")
        if self.image != image:
            raise SnapshotError(_other_image(self.image, image))
        if isinstance(self._content, int):
            fd = _read_only(self._content)
        else:
            with open(os.memfd_create("snapshot", os.MFD_CLOEXEC), "wb", buffering=0) as file:
                file.write(self._content)
                fd = _read_only(file.fileno())
        try:
            yield fd
        finally:
            os.close(fd)

    def close(self) -> None:
        """Free the content. Environments that were opened from it are not affected. Safe to call twice. Blocks."""
        if isinstance(self._content, int):
            self._finalizer()
        self._content = None


def _other_image(of: str | None, wanted: str | None) -> str:
    if of is None:
        return "a sandbox as_image can only begin with the snapshot of another one"
    if wanted is None:
        return f"the snapshot is of a sandbox as_image of {of}; only such a sandbox can begin with it"
    return f"the snapshot is of image {of}, but the sandbox is of {wanted}; use that image, or take another snapshot"


def _read_only(fd: int) -> int:
    return os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC)


class _Entry(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)
    name: str
    mode: Annotated[int, Field(ge=0, le=0o7777)]
    mtime_ns: Annotated[int, Field(ge=-(1 << 62), lt=1 << 62)]
    owner: Annotated[list[Id], Field(min_length=2, max_length=2)] | None = None


class _Directory(_Entry):
    kind: Literal["dir", "fifo"]


class _Link(_Entry):
    kind: Literal["link", "hard"]
    target: Annotated[str, Field(min_length=1)]
    capability: Capability | None = None


class _File(_Entry):
    kind: Literal["file"]
    size: Count
    offset: Count
    extents: list[Pair] | None = None
    capability: Capability | None = None


class _Index(BaseModel):
    model_config = ConfigDict(extra="forbid")
    format: str
    version: int
    left_out: list[str]
    image: Annotated[str, Field(pattern="^sha256:[0-9a-f]{64}$")] | None = None
    removed: Annotated[list[str], Field(max_length=MAX_ENTRIES)] = []
    entries: Annotated[
        list[Annotated[_Directory | _Link | _File, Field(discriminator="kind")]], Field(max_length=MAX_ENTRIES)
    ]


def _check(index: Mapping[str, Any], content_size: int) -> None:
    """Check the index of a file from outside. Raises ValueError if `tree.unpack` could not be trusted with it."""
    checked = _Index.model_validate(index)
    kinds: dict[str, str] = {}
    roots = (tree.WORK, tree.TMP) if checked.image is None else (tree.ROOT,)
    if checked.image is None and checked.removed:
        raise ValueError("files were removed from an image, but the image is missing")
    for name in checked.removed:
        if b"\0" in os.fsencode(name) or {"", ".", ".."} & {*name.split("/")}:
            raise ValueError(f"{name[:200]!r}, which was removed, is not a path in a tree")
    for entry in checked.entries:
        label, *parts = entry.name.split("/")
        parent = entry.name.rpartition("/")[0]
        texts = [entry.name, entry.target] if isinstance(entry, _Link) else [entry.name]
        if any(b"\0" in os.fsencode(text) for text in texts):  # a lone surrogate raises a ValueError
            raise ValueError(f"entry {entry.name[:200]!r} has a NUL byte")
        if label not in roots or {"", ".", ".."} & {*parts}:
            raise ValueError(f"an entry is named {entry.name[:200]!r}, which is not a path in a tree")
        if entry.name in kinds or (parts and kinds.get(parent) != "dir") or (not parts and entry.kind != "dir"):
            raise ValueError(f"entry {entry.name[:200]!r} does not follow its directory, or is not the only one")
        if isinstance(entry, _Link) and entry.kind == "hard" and kinds.get(entry.target) != "file":
            raise ValueError(f"entry {entry.name[:200]!r} is a hard link to {entry.target[:200]!r}, which is no file")
        if isinstance(entry, _File):
            extents = [[0, entry.size]] if entry.extents is None else entry.extents
            ends = [0, *(start + length for start, length in extents)]
            in_order = all(start >= end for (start, _), end in zip(extents, ends, strict=False))
            stored = sum(length for _, length in extents)
            if not in_order or ends[-1] > entry.size or entry.offset + stored > content_size:
                raise ValueError(f"the content of entry {entry.name[:200]!r} is outside the snapshot")
        kinds[entry.name] = entry.kind
    if not {*roots} <= kinds.keys():
        raise ValueError(f"the directory {' or '.join(roots)} is missing")


def _first_line(error: Exception) -> str:
    if isinstance(error, ValidationError):
        first = error.errors(include_url=False, include_input=False)[0]
        return f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
    return str(error).partition("\n")[0]
