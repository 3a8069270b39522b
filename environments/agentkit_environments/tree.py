"""Directory trees as one file: the format of a snapshot, and its two functions, `TreePacker` and `unpack`.

    content of the files, one after another | index: JSON | trailer: magic, length of the index (16 bytes)

The index lists the entries of every tree, each directory before what it contains. A name is the label of its tree and
the path in it ("work/src/a.py"; "work" is the root of that tree). An entry has its kind, permission bits and
modification time, and a file also the position of its content. A file with holes lists the extents that have data, and
only these are stored. Owners are stored only where they are not the commands' user.

The snapshot of a sandbox `as_image` has one tree, "root": what commands have changed in the root file system. The index
then has the image's id, and the names (below "root") that were removed from the image. They are removed before the tree
is written; a directory that was replaced is in both. Files may have a capability, as hexadecimal digits.

The executor runs this file in process sandboxes, with its own functions as `agentkit_environments.executor`; otherwise
it imports only the standard library.
"""

from __future__ import annotations

import errno
import json
import os
import stat
import struct

from agentkit_environments.executor import DropList, Pieces, children_of, name_problem, open_for_reading, try_chmod

TYPE_CHECKING = False  # as in `typing`; importing `typing` would make opening a sandbox slower
if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterable, Mapping
    from typing import Any

FORMAT = "agentkit.snapshot"
VERSION = 1
TRAILER = struct.Struct(">8sQ")
MAGIC = b"AKITSNAP"
WORK, TMP = "work", "tmp"
"""Labels of the two trees of an environment: its work directory and its /tmp."""
ROOT = "root"
"""Label of the tree of a sandbox `as_image`."""
READ_SIZE = 1 << 18
NAME_COST = 256
"""Bytes that one entry counts as, in addition to its name and content."""


class TreePacker(Pieces):
    """Directories as a stream of bytes in this module's format; memory use is bounded by the index and one piece.

    Directories, regular files, symbolic links, hard links within a tree, and pipes are packed. Sockets and devices are
    left out, as are names that are too long or too deep and entries that cannot be read; `drops` lists them.
    """

    def __init__(
        self,
        roots: Mapping[str, str],
        max_entries: int,
        max_bytes: int,
        *,
        retarget: Callable[[str], str] = str,
    ) -> None:
        """Prepare to pack; nothing is read before the first piece.

        Reading a piece raises EFBIG if there are more than `max_entries` entries, or more than `max_bytes` bytes of
        content (without holes), names and `NAME_COST`.

        Args:
            roots: Directories by label.
            max_entries: Maximum number of entries.
            max_bytes: Maximum number of bytes.
            retarget: Maps the target of each symbolic link to the one that is stored.
        """
        self.drops = DropList()
        self._max_entries, self._max_bytes, self._retarget = max_entries, max_bytes, retarget
        self._bytes = self._offset = 0
        super().__init__(self._pack(roots))

    def _pack(self, roots: Mapping[str, str]) -> Generator[bytes, None, None]:
        entries: list[bytes] = []
        for label, root in roots.items():
            inodes: dict[tuple[int, int], str] = {}
            walk = self._walk(root)
            try:
                for name, path, info in walk:
                    entry: dict[str, Any] = {
                        "name": f"{label}/{name}" if name else label,
                        "mode": stat.S_IMODE(info.st_mode),
                        "mtime_ns": info.st_mtime_ns,
                    }
                    try:
                        yield from self._fill(entry, path, info, inodes)
                    except OSError as error:
                        if error.errno == errno.EFBIG:
                            raise
                        self.drops.add(entry["name"], f"cannot be read: {error.strerror}")
                        continue
                    if len(entries) == self._max_entries:
                        raise OSError(errno.EFBIG, f"more than {self._max_entries} entries", root)
                    encoded = json.dumps(entry, separators=(",", ":")).encode()
                    self._count(len(encoded) + NAME_COST)
                    entries.append(encoded)
            finally:
                walk.close()
        yield from index_bytes(entries, self.drops.lines)

    def _fill(
        self, entry: dict[str, Any], path: str, info: os.stat_result, inodes: dict[tuple[int, int], str]
    ) -> Generator[bytes, None, None]:
        """Add the fields of one kind of entry, and yield the content of a file."""
        kind = stat.S_IFMT(info.st_mode)
        inode = info.st_dev, info.st_ino
        if kind == stat.S_IFDIR:
            entry["kind"] = "dir"
        elif kind == stat.S_IFLNK:
            entry |= {"kind": "link", "target": self._retarget(os.readlink(path))}
        elif kind == stat.S_IFIFO:
            entry["kind"] = "fifo"
        elif kind != stat.S_IFREG:
            raise OSError(errno.EINVAL, "a socket or a device")
        elif inode in inodes:
            entry |= {"kind": "hard", "target": inodes[inode]}
        else:
            fd = open_for_reading(path, info.st_mode)
            try:
                size = os.fstat(fd).st_size
                extents = _extents(fd, size)
                entry |= file_fields(size, extents, self._offset)
                stored = sum(length for _, length in extents)
                self._count(stored)
                for start, length in extents:
                    yield from _content(fd, start, length)
                self._offset += stored
            finally:
                os.close(fd)
            inodes[inode] = entry["name"]

    def _count(self, size: int) -> None:
        self._bytes += size
        if self._bytes > self._max_bytes:
            raise OSError(errno.EFBIG, f"more than {self._max_bytes} bytes")

    def _walk(self, root: str) -> Generator[tuple[str, str, os.stat_result], None, None]:
        """Yield (name, path, status) of a directory and of everything in it; directories come first.

        A directory that its owner has no permission for is opened up meanwhile.
        """
        unlocked: list[tuple[str, int]] = []
        pending = [""]
        try:
            while pending:
                name = pending.pop()
                path = os.path.join(root, name) if name else root
                try:
                    info = os.lstat(path) if name else os.stat(path)
                    if stat.S_ISDIR(info.st_mode):
                        if info.st_mode & 0o500 != 0o500 and try_chmod(path, info.st_mode | 0o700):
                            unlocked.append((path, info.st_mode))
                        for child in sorted(children_of(path, self._max_entries), reverse=True):
                            below = os.path.join(name, child)
                            if problem := name_problem(below):
                                self.drops.add(below, problem)
                            else:
                                pending.append(below)
                except OSError as error:
                    if not name:
                        raise
                    self.drops.add(name, f"cannot be read: {error.strerror}")
                    continue
                yield name, path, info
        finally:
            for path, mode in reversed(unlocked):
                try_chmod(path, mode)


def file_fields(size: int, extents: list[tuple[int, int]], offset: int) -> dict[str, Any]:
    """Return the fields of a file's entry; `offset` is the position of its content in the snapshot."""
    fields: dict[str, Any] = {"kind": "file", "size": size, "offset": offset}
    if extents != [(0, size)]:
        fields["extents"] = extents
    return fields


def index_bytes(
    entries: Iterable[bytes], left_out: Iterable[str], *, image: str | None = None, removed: Iterable[str] = ()
) -> Generator[bytes, None, None]:
    """Yield the index and the trailer; each entry is encoded as JSON already."""
    of_image = {} if image is None else {"image": image, "removed": sorted(removed)}
    head = json.dumps({"format": FORMAT, "version": VERSION, "left_out": list(left_out), **of_image}).encode()
    index = head[:-1] + b',"entries":[' + b",".join(entries) + b"]}"
    yield index
    yield TRAILER.pack(MAGIC, len(index))


def read_index(fd: int, max_bytes: int = 1 << 62) -> tuple[dict[str, Any], int]:
    """Return the index of a snapshot, and the number of bytes of content before it.

    Raises:
        ValueError: If the file is not a snapshot, has another format version, or an index of more than `max_bytes`.
    """
    end = os.fstat(fd).st_size - TRAILER.size
    magic, length = TRAILER.unpack(os.pread(fd, TRAILER.size, end)) if end >= 0 else (b"", 0)
    if magic != MAGIC or length > end:
        raise ValueError("not a complete snapshot")
    if length > max_bytes:
        raise ValueError(f"its index has {length} bytes, more than {max_bytes}")
    data = bytearray()
    while len(data) < length and (chunk := os.pread(fd, length - len(data), end - length + len(data))):
        data += chunk
    index = json.loads(data)
    if not isinstance(index, dict) or index.get("format") != FORMAT or index.get("version") != VERSION:
        raise ValueError(f"not a snapshot of format version {VERSION}")
    return index, end - length


def extents_of(entry: Mapping[str, Any]) -> list[tuple[int, int]]:
    """Return the (start, length) of each part of a file that has data."""
    extents: list[tuple[int, int]] = entry.get("extents", [(0, entry["size"])])
    return extents


def unpack(fd: int, roots: Mapping[str, str], *, retarget: Callable[[str], str] = str) -> None:
    """Write the trees of a snapshot into empty directories. Owners are not restored.

    No link is ever followed: the parent of each entry is a directory that this function made, and nothing else may
    change the directories meanwhile.

    Args:
        fd: The snapshot; its position is not used.
        roots: The empty directories by label.
        retarget: Maps each stored target of a symbolic link to that of the new link.

    Raises:
        OSError: The file system's error.
        ValueError: If the file is not a snapshot.
    """
    index, _ = read_index(fd)
    directories: list[tuple[str, dict[str, Any]]] = []
    for entry in index["entries"]:
        path, kind = _place(roots, entry["name"]), entry["kind"]
        times = (entry["mtime_ns"], entry["mtime_ns"])
        if kind == "dir":
            if "/" in entry["name"]:
                os.mkdir(path, 0o700)
            directories.append((path, entry))
        elif kind == "link":
            os.symlink(retarget(entry["target"]), path)
            os.utime(path, ns=times, follow_symlinks=False)
        elif kind == "hard":
            os.link(_place(roots, entry["target"]), path, follow_symlinks=False)
        elif kind == "fifo":
            os.mkfifo(path, 0o600)
            os.chmod(path, entry["mode"])
            os.utime(path, ns=times)
        else:
            _write_file(fd, path, entry)
    for path, entry in reversed(directories):
        os.chmod(path, entry["mode"])
        os.utime(path, ns=(entry["mtime_ns"], entry["mtime_ns"]))


def _place(roots: Mapping[str, str], name: str) -> str:
    label, _, path = name.partition("/")
    return os.path.join(roots[label], path) if path else roots[label]


def _write_file(fd: int, path: str, entry: Mapping[str, Any]) -> None:
    out = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        offset, end = entry["offset"], 0
        for start, length in extents_of(entry):
            os.lseek(out, start, os.SEEK_SET)
            end = start + length
            while length:
                sent = os.sendfile(out, fd, offset, length)
                if not sent:
                    raise ValueError("the snapshot ends within a file")
                offset, length = offset + sent, length - sent
        if end != entry["size"]:
            os.ftruncate(out, entry["size"])
        os.fchmod(out, entry["mode"])
        os.utime(out, ns=(entry["mtime_ns"], entry["mtime_ns"]))
    finally:
        os.close(out)


def _extents(fd: int, size: int) -> list[tuple[int, int]]:
    """Return the (start, length) of each part of a file that has data."""
    if os.fstat(fd).st_blocks * 512 >= size:
        return [(0, size)]
    extents, start = [], 0
    while start < size:
        try:
            start = os.lseek(fd, start, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:  # only a hole is left
                break
            raise
        end = min(os.lseek(fd, start, os.SEEK_HOLE), size)
        if end > start:
            extents.append((start, end - start))
        start = end
    return extents


def _content(fd: int, start: int, length: int) -> Generator[bytes, None, None]:
    """Yield exactly `length` bytes of a file; zeros replace bytes that were truncated meanwhile."""
    while length:
        chunk = os.pread(fd, min(READ_SIZE, length), start) or bytes(min(READ_SIZE, length))
        yield chunk
        start, length = start + len(chunk), length - len(chunk)
