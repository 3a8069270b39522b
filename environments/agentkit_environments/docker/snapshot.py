"""Snapshots of a container, through the engine's archive interface.

The root of the file system is read-only, so the work directory and /tmp hold everything that commands can change. The
engine reads and writes archives as root and needs nothing from the image. It rounds modification times down to seconds
(Podman: to the nearest one), leaves sockets out silently, and does not restore the permission bits of the roots
themselves.

In a sandbox `as_image`, commands can change everything. With the storage driver overlay2, all changes are in a folder
of the engine's machine, the container's writable layer. The engine mounts it in a second container, which is never
started, and archives it there. With other drivers, it archives the whole root file system, of which the paths in its
list of changes are kept; this takes longer the larger the image is.

Blocking calls.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import posixpath
import re
import tarfile
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import IO, Any

import requests
from docker import APIClient
from docker.errors import APIError
from docker.types import Mount

from agentkit_environments import tree
from agentkit_environments.docker.container import Container
from agentkit_environments.docker.engine import API_TIMEOUT_S, OWNER_LABEL, RUN_LABEL, remove_container
from agentkit_environments.docker.files import retry_short
from agentkit_environments.docker.hardening import AGENT_ID, EXECUTOR, PROXY_SOCKET
from agentkit_environments.environment import EnvironmentSpec
from agentkit_environments.errors import SnapshotError
from agentkit_environments.executor import DropList, name_problem
from agentkit_environments.owner import owner_token
from agentkit_environments.snapshot import Snapshot

BLOCK = 1 << 16
"""Bytes of a file that become a hole if all are zero: the engine's archives have no holes."""
ZEROS = bytes(BLOCK)
PIECE = 1 << 18
"""Bytes of an archive that are sent or received at once."""
AGENT = (AGENT_ID, AGENT_ID)
KINDS = {tarfile.DIRTYPE: "dir", tarfile.SYMTYPE: "link", tarfile.FIFOTYPE: "fifo", tarfile.LNKTYPE: "hard"}
TYPES = {kind: tar_type for tar_type, kind in KINDS.items()} | {"file": tarfile.REGTYPE}
CAPABILITY = "SCHILY.xattr.security.capability"
"""Key of a file's capability in the extended header of an archive."""
OWN_FOLDER = posixpath.dirname(EXECUTOR)
OWN_MOUNTS = {OWN_FOLDER, PROXY_SOCKET}
DRIVERS_WITH_FOLDERS = ("overlay2",)
"""Storage drivers whose writable layer is a folder with nothing but what was changed."""
REMOVED = 2
"""The engine's number for a path that was removed."""
MAX_ARGUMENT_BYTES = 1 << 16
"""Maximum size of the paths that one command removes."""


@dataclass(frozen=True, slots=True)
class _Source:
    """A directory of a container that the engine archives as the tree `label`.

    Attributes:
        kept: The paths that are part of the tree; None for all.
    """

    label: str
    container_id: str
    path: str
    kept: Collection[str] | None = None


def pack(
    container: Container,
    spec: EnvironmentSpec,
    run_id: str,
    file: IO[bytes],
    *,
    max_entries: int,
    max_bytes: int,
) -> None:
    """Write what commands can have changed in a container to an empty file, in the format of `tree`.

    Args:
        container: The container.
        spec: Its specification.
        run_id: Label of the container that mounts the writable layer.
        file: The file.
        max_entries: Maximum number of entries.
        max_bytes: Maximum size of names and files; holes count.

    Raises:
        OSError: EFBIG if there are too many entries or bytes; EIO if the engine answers nonsense.
        SnapshotError: If a sandbox `as_image` has volumes, whose files the writable layer does not have.
    """
    api = container.api

    def read(*sources: _Source) -> _Packer:
        file.seek(0)
        file.truncate()
        packer = _Packer(file, max_entries, max_bytes, has_owners=not container.is_podman)
        for source in sources:
            with api.get(
                _url(api, source.container_id),
                params={"path": source.path},
                headers={"Accept-Encoding": "identity"},  # otherwise the engine compresses the archive
                stream=True,
                timeout=API_TIMEOUT_S,
            ) as response:
                response.raise_for_status()
                with tarfile.open(fileobj=response.raw, mode="r|", bufsize=PIECE) as archive:
                    for member in archive:
                        packer.add(source, archive, member)
        return packer

    def read_root() -> _Packer:
        inspected = api.inspect_container(container.id)
        if others := sorted({each["Destination"] for each in inspected["Mounts"]} - OWN_MOUNTS):
            raise SnapshotError(
                f"the image has a volume at {', '.join(others)}, whose files a snapshot would not have; build it "
                "without VOLUME"
            )
        changes = api.diff(container.id) or ()
        removed = {each["Path"].strip("/") for each in changes if each["Kind"] == REMOVED}
        with _layer_reader(container, inspected, run_id) as reader:
            if reader is not None:
                packer = read(_Source(tree.ROOT, reader, OWN_FOLDER))
            else:
                kept = {""}
                for each in changes:
                    path = each["Path"].strip("/")
                    while path not in kept:
                        kept.add(path)
                        path = posixpath.dirname(path)
                packer = read(_Source(tree.ROOT, container.id, "/", kept))
        for path in removed - {_as_listed(path) for path in packer.removed}:
            packer.remove(path)
        return packer

    try:
        if spec.as_image:
            packer, image = retry_short(read_root), container.image_id
        else:
            trees = [_Source(tree.WORK, container.id, spec.workdir), _Source(tree.TMP, container.id, "/tmp")]
            packer, image = retry_short(lambda: read(*trees)), None
    except (tarfile.TarError, EOFError, OverflowError) as error:
        raise OSError(errno.EIO, f"the engine's archive of {container}: {error}") from error
    file.writelines(tree.index_bytes(packer.entries, packer.drops.lines, image=image, removed=packer.removed))


def _layer_folder(api: APIClient, inspected: Mapping[str, Any]) -> str | None:
    """Return the folder of the engine's machine that is a container's writable layer.

    None if the storage driver has no such folder, or one with renamed directories (no "native diff").
    """
    driver = inspected.get("GraphDriver") or {}
    if driver.get("Name") not in DRIVERS_WITH_FOLDERS or ["Native Overlay Diff", "true"] not in (
        api.info()["DriverStatus"] or ()
    ):
        return None
    folder: str | None = (driver.get("Data") or {}).get("UpperDir")
    return folder


@contextlib.contextmanager
def _layer_reader(container: Container, inspected: Mapping[str, Any], run_id: str) -> Iterator[str | None]:
    """Yield the id of a container, never started, that has a container's writable layer at `OWN_FOLDER`, read-only.

    None if the engine cannot mount the layer.
    """
    api = container.api
    reader: str | None = None
    if (folder := _layer_folder(api, inspected)) is not None:
        mounts = [Mount(OWN_FOLDER, folder, type="bind", read_only=True)]
        try:
            reader = api.create_container(
                container.image_id,
                entrypoint=["/"],
                labels={RUN_LABEL: run_id, OWNER_LABEL: owner_token()},
                host_config=api.create_host_config(mounts=mounts, network_mode="none"),
            )["Id"]
        except APIError as error:
            if error.status_code != 400:  # the folder is out of its reach, as that of an engine in a virtual machine
                raise
    try:
        yield reader
    finally:
        if reader is not None:
            remove_container(container.client, reader)


def removed_paths(container: Container, snapshot: Snapshot) -> list[list[str]]:
    """Return the paths of a sandbox `as_image` that must be removed before `restore`, in parts that fit into commands.

    Raises:
        SnapshotError: If the snapshot was closed, or is not of the container's image.
    """
    parts: list[list[str]] = []
    size = MAX_ARGUMENT_BYTES
    with snapshot.descriptor(container.image_id) as fd:
        for path in tree.read_index(fd)[0].get("removed", ()):
            size += len(os.fsencode(path)) + 10
            if size > MAX_ARGUMENT_BYTES:
                parts.append([])
                size = 0
            parts[-1].append(f"/{path}")
    return parts


def restore(container: Container, spec: EnvironmentSpec, snapshot: Snapshot) -> None:
    """Write the files of a snapshot into the empty directories of a container, or into the root of one `as_image`.

    Raises:
        SnapshotError: If the snapshot was closed, is of another image, or does not fit.
    """
    trees = {tree.ROOT: "/"} if spec.as_image else {tree.WORK: spec.workdir, tree.TMP: "/tmp"}
    with snapshot.descriptor(container.image_id if spec.as_image else None) as fd:
        entries = tree.read_index(fd)[0]["entries"]
        for label, path in trees.items():
            if not any(entry["name"].startswith(f"{label}/") for entry in entries):
                continue  # the engine starts a process for each archive
            response: requests.Response = container.api.put(
                _url(container.api, container.id),
                params={"path": path} if spec.as_image else {"path": path, "noOverwriteDirNonDir": "1"},
                data=_pieces(_archive(label, entries, fd)),
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
        self.removed: set[str] = set()
        self.drops = DropList()
        self._file, self._max_entries, self._max_bytes = file, max_entries, max_bytes
        self._has_owners = has_owners
        self._bytes = self._offset = 0
        self._left_out: set[str] = set()
        self._whiteouts: set[str] = set()

    def add(self, source: _Source, archive: tarfile.TarFile, member: tarfile.TarInfo) -> None:
        """Add one entry of a directory; names in the archive begin with that directory's own name."""
        label, below = source.label, _below(source, member.name)
        name = f"{label}/{below}" if below else label
        if label == tree.ROOT and not self._is_of_root(source, member, below):
            return
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
                target = _below(source, member.linkname)
                entry["target"] = f"{label}/{target}"
                if entry["target"] in self._left_out or (
                    source.kept is not None and _as_listed(target) not in source.kept
                ):
                    self._left_out.add(name)
                    self.drops.add(name, "a hard link to a file that was left out")
                    return
        else:
            self._count(member.size)
            content = archive.extractfile(member)
            assert content is not None
            entry |= self._store(content, member.size)
        if capability := member.pax_headers.get(CAPABILITY):  # also of a hard link: making it clears the file's own
            entry["capability"] = os.fsencode(capability).hex()
        encoded = json.dumps(entry, separators=(",", ":")).encode()
        self._count(len(encoded) + tree.NAME_COST)
        if len(self.entries) == self._max_entries:
            raise OSError(errno.EFBIG, f"more than {self._max_entries} entries")
        self.entries.append(encoded)

    def remove(self, path: str) -> None:
        """Add a path that was removed from the image."""
        if "\ufffd" in path:
            self.drops.add(f"{tree.ROOT}/{path}", "removed, but the engine does not tell its name, which is not UTF-8")
            return
        self._count(len(os.fsencode(path)) + tree.NAME_COST)
        if len(self.removed) == self._max_entries:
            raise OSError(errno.EFBIG, f"more than {self._max_entries} removed paths")
        self.removed.add(path)

    def _is_of_root(self, source: _Source, member: tarfile.TarInfo, below: str) -> bool:
        """Return whether an entry is part of the tree `ROOT`. Note the path of one that stands for a removed path."""
        if source.kept is not None:
            return _as_listed(below) in source.kept and not _is_in(below, OWN_FOLDER.strip("/"))
        is_whiteout = member.ischr() and not member.devmajor and not member.devminor
        if is_whiteout or (member.islnk() and _below(source, member.linkname) in self._whiteouts):
            self._whiteouts.add(below)
            self.remove(below)
            return False
        return not _is_in(below, OWN_FOLDER.strip("/"))

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


def _below(source: _Source, name: str) -> str:
    """Return a name of an archive relative to the directory that was archived, whose own name comes first."""
    normal = posixpath.normpath(name)
    if source.path != "/":
        return normal.partition("/")[2]
    return "" if normal == "." else normal.lstrip("/")


def _as_listed(path: str) -> str:
    """Return a path as it is in the engine's list of changes, which has U+FFFD for each byte that is not UTF-8."""
    return re.sub("[\udc80-\udcff]", "\ufffd", path)


def _is_in(path: str, folder: str) -> bool:
    return path == folder or path.startswith(f"{folder}/")


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
        member.mtime = seconds
        extended: dict[str, str] = {}  # a header of its own, larger than many a file
        if nanoseconds:
            extended["mtime"] = f"{seconds}.{nanoseconds:09d}"
        if capability := entry.get("capability"):
            extended[CAPABILITY] = os.fsdecode(bytes.fromhex(capability))
        member.pax_headers = extended
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
