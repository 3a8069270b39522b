"""Snapshots of a container: the work directory and /tmp, through the engine's archive interface.

The root of the file system is read-only, so these two hold everything that commands can change. The engine reads and
writes archives as root and needs nothing from the image. It rounds modification times down to seconds (Podman: to the
nearest one), leaves sockets out silently, and does not restore the permission bits of the two directories themselves.
Blocking calls.
"""

from __future__ import annotations

import errno
import json
import os
import posixpath
import tarfile
from collections.abc import Iterator, Mapping
from typing import IO, Any

import requests
from docker import APIClient

from agentkit_environments import tree
from agentkit_environments.docker.container import Container
from agentkit_environments.docker.engine import API_TIMEOUT_S
from agentkit_environments.docker.files import retry_short
from agentkit_environments.docker.hardening import AGENT_ID
from agentkit_environments.environment import EnvironmentSpec
from agentkit_environments.errors import SnapshotError
from agentkit_environments.executor import DropList, name_problem
from agentkit_environments.snapshot import Snapshot

BLOCK = 1 << 16
"""Bytes of a file that become a hole if all are zero: the engine's archives have no holes."""
ZEROS = bytes(BLOCK)
PIECE = 1 << 18
"""Bytes of an archive that are sent or received at once."""
AGENT = (AGENT_ID, AGENT_ID)
KINDS = {tarfile.DIRTYPE: "dir", tarfile.SYMTYPE: "link", tarfile.FIFOTYPE: "fifo", tarfile.LNKTYPE: "hard"}
TYPES = {kind: tar_type for tar_type, kind in KINDS.items()} | {"file": tarfile.REGTYPE}


def trees_of(spec: EnvironmentSpec) -> dict[str, str]:
    """Return the directories of a snapshot by their labels."""
    return {tree.WORK: spec.workdir, tree.TMP: "/tmp"}


def pack(container: Container, trees: Mapping[str, str], file: IO[bytes], *, max_entries: int, max_bytes: int) -> None:
    """Write directories of a container to an empty file in the format of `tree`.

    Raises:
        OSError: EFBIG if there are too many entries or bytes, holes included; EIO if the engine answers nonsense.
    """
    api = container.api

    def read() -> _Packer:
        file.seek(0)
        file.truncate()
        packer = _Packer(file, max_entries, max_bytes, has_owners=not container.is_podman)
        for label, path in trees.items():
            with api.get(
                _url(api, container.id),
                params={"path": path},
                headers={"Accept-Encoding": "identity"},  # otherwise the engine compresses the archive
                stream=True,
                timeout=API_TIMEOUT_S,
            ) as response:
                response.raise_for_status()
                with tarfile.open(fileobj=response.raw, mode="r|", bufsize=PIECE) as archive:
                    for member in archive:
                        packer.add(label, archive, member)
        return packer

    try:
        packer = retry_short(read)
    except (tarfile.TarError, EOFError, OverflowError) as error:
        raise OSError(errno.EIO, f"the engine's archive of {' or '.join(trees.values())}: {error}") from error
    file.writelines(tree.index_bytes(packer.entries, packer.drops.lines))


def restore(api: APIClient, container_id: str, trees: Mapping[str, str], snapshot: Snapshot) -> None:
    """Write the files of a snapshot into the directories of a container, which are empty.

    Raises:
        SnapshotError: If they do not fit.
    """
    with snapshot.descriptor() as fd:
        index, _ = tree.read_index(fd)
        for label, path in trees.items():
            if not any(entry["name"].startswith(f"{label}/") for entry in index["entries"]):
                continue  # the engine starts a process for each archive
            response: requests.Response = api.put(
                _url(api, container_id),
                params={"path": path, "noOverwriteDirNonDir": "1"},
                data=_pieces(_archive(label, index["entries"], fd)),
                timeout=API_TIMEOUT_S,
            )
            if not response.ok:
                raise SnapshotError(f"the snapshot cannot be restored: {response.text.strip()[:500]}")


def _url(api: APIClient, container_id: str) -> str:
    return f"{api.base_url}/v{api.api_version}/containers/{container_id}/archive"


class _Packer:
    """The entries of the engine's archives, whose content goes to a file.

    Without `has_owners`, everything belongs to the agent: in Podman's archives it all belongs to root.
    """

    def __init__(self, file: IO[bytes], max_entries: int, max_bytes: int, *, has_owners: bool) -> None:
        self.entries: list[bytes] = []
        self.drops = DropList()
        self._file, self._max_entries, self._max_bytes = file, max_entries, max_bytes
        self._has_owners = has_owners
        self._bytes = self._offset = 0
        self._left_out: set[str] = set()

    def add(self, label: str, archive: tarfile.TarFile, member: tarfile.TarInfo) -> None:
        """Add one entry of the directory `label`; names in the archive begin with that directory's own name."""
        below = posixpath.normpath(member.name).partition("/")[2]
        name = f"{label}/{below}" if below else label
        problem = name_problem(below)
        if problem is None and not (member.isreg() or member.type in KINDS):
            problem = "a device"
        if posixpath.dirname(name) in self._left_out:
            self._left_out.add(name)  # the line of its directory covers it
            return
        if problem is not None:
            self._left_out.add(name)
            self.drops.add(name, problem)
            return
        entry: dict[str, Any] = {"name": name, "mode": member.mode & 0o7777, "mtime_ns": int(member.mtime * 1e9)}
        if self._has_owners and (member.uid, member.gid) != AGENT:
            entry["owner"] = (member.uid, member.gid)
        if not member.isreg():
            entry["kind"] = KINDS[member.type]
            if member.issym():
                entry["target"] = member.linkname
            elif member.islnk():
                entry["target"] = f"{label}/{posixpath.normpath(member.linkname).partition('/')[2]}"
                if entry["target"] in self._left_out:
                    self.drops.add(name, "a hard link to a file that was left out")
                    return
        else:
            self._count(member.size)
            content = archive.extractfile(member)
            assert content is not None
            entry |= self._store(content, member.size)
        encoded = json.dumps(entry, separators=(",", ":")).encode()
        self._count(len(encoded) + tree.NAME_COST)
        if len(self.entries) == self._max_entries:
            raise OSError(errno.EFBIG, f"more than {self._max_entries} entries")
        self.entries.append(encoded)

    def _store(self, content: IO[bytes], size: int) -> dict[str, Any]:
        """Append the content of a file, without blocks of zeros, and return the fields of its entry."""
        offset, start = self._offset, 0
        extents: list[tuple[int, int]] = []
        while chunk := content.read(BLOCK):
            if chunk != ZEROS[: len(chunk)]:
                self._file.write(chunk)
                self._offset += len(chunk)
                if extents and sum(extents[-1]) == start:
                    extents[-1] = extents[-1][0], extents[-1][1] + len(chunk)
                else:
                    extents.append((start, len(chunk)))
            start += len(chunk)
        return tree.file_fields(size, extents or ([] if size else [(0, 0)]), offset)

    def _count(self, size: int) -> None:
        self._bytes += size
        if self._bytes > self._max_bytes:
            raise OSError(errno.EFBIG, f"more than {self._max_bytes} bytes")


def _pieces(chunks: Iterator[bytes]) -> Iterator[bytes]:
    """Yield the same bytes in larger pieces: each is a chunk of the request."""
    piece = bytearray()
    for chunk in chunks:
        piece += chunk
        if len(piece) >= PIECE:
            yield bytes(piece)
            piece.clear()
    if piece:
        yield bytes(piece)


def _archive(label: str, entries: list[dict[str, Any]], fd: int) -> Iterator[bytes]:
    """Yield a tar archive of one directory's entries, without the directory itself."""
    for entry in entries:
        root, _, name = entry["name"].partition("/")
        if root != label or not name:
            continue
        member = tarfile.TarInfo(name)
        member.type, member.mode = TYPES[entry["kind"]], entry["mode"]
        member.uid, member.gid = entry.get("owner", AGENT)
        seconds, nanoseconds = divmod(max(entry["mtime_ns"], 0), 10**9)
        member.pax_headers = {"mtime": f"{seconds}.{nanoseconds:09d}"}
        target = entry.get("target", "")
        member.linkname = target.partition("/")[2] if entry["kind"] == "hard" else target
        member.size = entry.get("size", 0)
        yield member.tobuf(tarfile.PAX_FORMAT, errors="surrogateescape")
        if entry["kind"] == "file":
            yield from _content(fd, entry)
            yield bytes(-member.size % tarfile.BLOCKSIZE)
    yield bytes(2 * tarfile.BLOCKSIZE)


def _content(fd: int, entry: Mapping[str, Any]) -> Iterator[bytes]:
    """Yield all bytes of a file; holes are zeros."""
    position, offset = 0, entry["offset"]
    for start, length in [*tree.extents_of(entry), (entry["size"], 0)]:
        for filled in range(position, start, BLOCK):
            yield ZEROS[: min(BLOCK, start - filled)]
        position = start + length
        while length:
            chunk = os.pread(fd, min(1 << 20, length), offset)
            if not chunk:
                raise ValueError("the snapshot ends within a file")
            yield chunk
            offset, length = offset + len(chunk), length - len(chunk)
