"""Directories in and out of a container, through the engine's archive interface: as root, as a tar archive.

The engine's messages become the OSError that a file system would raise.
"""

from __future__ import annotations

import base64
import contextlib
import errno
import io
import json
import os
import posixpath
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING, TypeVar

import requests
from docker.errors import DockerException

from agentkit_environments.archive import MAX_LINKS_FOLLOWED, ExportedDir, rebase_archive, repack
from agentkit_environments.docker.container import Container
from agentkit_environments.docker.engine import API_TIMEOUT_S, OWNER_LABEL, RUN_LABEL, remove_container
from agentkit_environments.docker.hardening import AGENT_ID
from agentkit_environments.errors import SandboxUnavailableError, UnsafeArchiveError
from agentkit_environments.owner import owner_token

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

T = TypeVar("T")
ATTEMPTS = 5
PHRASES = {
    "too many levels": errno.ELOOP,
    "symbolic link loop": errno.ELOOP,
    "too many links": errno.ELOOP,
    "read-only": errno.EROFS,
    "no space left": errno.ENOSPC,
    "not a directory": errno.ENOTDIR,
    "no such file": errno.ENOENT,
    "file too large": errno.EFBIG,
    "name too long": errno.ENAMETOOLONG,
    "is a directory": errno.EISDIR,
    "permission denied": errno.EACCES,
    "file exists": errno.EEXIST,
    "cannot overwrite": errno.EEXIST,
}
"""Phrases in messages of the engine, and the error number that each stands for."""


@dataclass(frozen=True, slots=True)
class Stat:
    """The engine's answer about a path; only the parts of its Go `FileMode` that are used here."""

    path: str
    size: int
    mode: int
    link_target: str

    @property
    def is_dir(self) -> bool:
        return bool(self.mode & 1 << 31)

    @property
    def is_link(self) -> bool:
        return bool(self.mode & 1 << 27)


def retry_short(read: Callable[[], T]) -> T:
    """Return what `read` returns, which reads an archive of the engine: up to `ATTEMPTS` times if the archive is short.

    The engine ends an archive at a file that a command has made shorter meanwhile.
    """
    for _ in range(ATTEMPTS - 1):
        with contextlib.suppress(tarfile.ReadError, EOFError):
            return read()
    return read()


class Files:
    """The directories of one container by absolute path; blocking calls that raise OSError."""

    def __init__(self, container: Container, uid: int = AGENT_ID) -> None:
        """Files that are copied in belong to `uid`."""
        self._container, self._api, self._uid = container, container.api, uid
        self._url = f"{self._api.base_url}/v{self._api.api_version}/containers/{container.id}/archive"

    def export_dir(self, path: str, max_entries: int, max_bytes: int) -> ExportedDir:
        stat = self.stat(path)
        if not stat.is_dir:
            raise os_error(errno.ENOTDIR, path)

        def export() -> ExportedDir:
            with self._api.get(self._url, params={"path": stat.path}, stream=True, timeout=API_TIMEOUT_S) as response:
                self._raise_for(response, path)
                source = io.BufferedReader(_Stream(response.iter_content(1 << 20)))
                return repack(source, max_entries=max_entries, max_bytes=max_bytes)

        try:
            return retry_short(export)
        except (tarfile.TarError, ValueError, EOFError, OverflowError) as error:
            raise UnsafeArchiveError(f"the engine's archive of {stat.path} cannot be read: {error}") from error

    def import_dir(self, path: str, archive: bytes) -> None:
        directory, missing = self._existing_parent(posixpath.join(path, "x"), path)
        self._put(directory, rebase_archive(archive, prefix="/".join(missing[:-1]), uid=self._uid), path)

    def copy_from_image(self, image: str, path: str, run_id: str) -> None:
        """Copy a directory of the image into the volume mounted over it, and make the commands' user own everything.

        Raises:
            SandboxUnavailableError: If the image has no such directory, or the volume is too small.
        """
        labels = {RUN_LABEL: run_id, OWNER_LABEL: owner_token()}
        try:
            source = self._api.create_container(image, entrypoint=["/bin/sh"], labels=labels)["Id"]
            try:
                url = self._url.replace(self._container.id, source)
                with (
                    self._api.get(url, params={"path": path}, stream=True, timeout=API_TIMEOUT_S) as response,
                    tempfile.TemporaryFile() as file,
                ):
                    self._raise_for(response, path)
                    _reown(io.BufferedReader(_Stream(response.iter_content(1 << 20))), file)
                    file.seek(0)
                    self._put(path, file, path)
            finally:
                remove_container(self._container.client, source)
        except FileNotFoundError as error:
            raise SandboxUnavailableError(f"image {image} has no directory {path}") from error
        except (DockerException, requests.RequestException, tarfile.TarError, OSError) as error:
            hint = "; raise limits.disk_mib" if getattr(error, "errno", None) == errno.ENOSPC else ""
            raise SandboxUnavailableError(
                f"the files of image {image} at {path} cannot be copied: {error}{hint}"
            ) from error

    def stat(self, path: str) -> Stat:
        """Return what is at `path`; links are followed inside the container."""
        place = _without_dots(path)
        for _ in range(MAX_LINKS_FOLLOWED):
            response = self._api.head(self._url, params={"path": place}, timeout=API_TIMEOUT_S)
            if not response.ok and response.status_code != 404:
                # A HEAD reply has no body: send a GET for the reason, and read no more than that.
                with self._api.get(self._url, params={"path": place}, stream=True, timeout=API_TIMEOUT_S) as explained:
                    self._raise_for(explained, path)
                    continue
            self._raise_for(response, path)
            fields = json.loads(base64.b64decode(response.headers["X-Docker-Container-Path-Stat"]))
            stat = Stat(place, fields["size"], fields["mode"], fields["linkTarget"])
            if not stat.is_link:
                return stat
            place = _without_dots(posixpath.join(posixpath.dirname(place), stat.link_target))
        raise os_error(errno.ELOOP, path)

    def _existing_parent(self, path: str, shown: str) -> tuple[str, list[str]]:
        """Return the deepest existing directory above `path`, and the names from there to `path`."""
        parts = posixpath.normpath(path).split("/")
        for length in range(len(parts) - 1, 0, -1):
            try:
                stat = self.stat("/".join(parts[:length]) or "/")
            except FileNotFoundError:
                continue
            if not stat.is_dir:
                raise os_error(errno.ENOTDIR, shown)
            return stat.path, parts[length:]
        raise os_error(errno.ENOENT, shown)

    def _put(self, directory: str, data: bytes | IO[bytes], shown: str) -> None:
        """Unpack a tar archive into an existing directory; errors name the path `shown`.

        By default the engine would let a file replace a directory with everything in it.
        """
        params = {"path": directory, "noOverwriteDirNonDir": "1"}
        self._raise_for(self._api.put(self._url, params=params, data=data, timeout=API_TIMEOUT_S), shown)

    def _raise_for(self, response: requests.Response, path: str) -> None:
        if response.ok:
            return
        said = "" if response.request.method == "HEAD" else response.text.lower()
        if response.status_code == 404 and "no such container" not in said:
            self._container.require_running()
            raise os_error(errno.ENOENT, path)
        for phrase, number in PHRASES.items():
            if phrase in said:
                raise os_error(number, path)
        self._container.require_running()
        raise OSError(errno.EIO, f"the Docker engine answered {response.status_code}: {said.strip()}", path)


def _without_dots(path: str) -> str:
    """Return an absolute path without `.`: engines disagree about the names in an archive of `directory/.`."""
    return "/" + "/".join(part for part in path.split("/") if part not in ("", "."))


def _reown(source: IO[bytes], out: IO[bytes]) -> None:
    """Copy the archive of a directory, with names relative to that directory and one owner for all entries."""
    with tarfile.open(fileobj=source, mode="r|") as archive, tarfile.open(fileobj=out, mode="w|") as target:
        for member in archive:
            member.name = member.name.partition("/")[2]
            if member.islnk():
                member.linkname = member.linkname.partition("/")[2]
            if not member.name or not (member.isreg() or member.isdir() or member.issym() or member.islnk()):
                continue
            member.uid = member.gid = AGENT_ID
            member.uname = member.gname = ""
            target.addfile(member, archive.extractfile(member) if member.isreg() else None)


class _Stream(io.RawIOBase):
    """The body of a reply as a file that can be read once."""

    def __init__(self, chunks: Iterator[bytes]) -> None:
        self._chunks, self._rest = chunks, memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: WriteableBuffer) -> int:
        target = memoryview(buffer).cast("B")
        if not self._rest:
            self._rest = memoryview(next(self._chunks, b""))
        length = min(len(target), len(self._rest))
        target[:length], self._rest = self._rest[:length], self._rest[length:]
        return length


def os_error(number: int, path: str) -> OSError:
    return OSError(number, os.strerror(number), path)
