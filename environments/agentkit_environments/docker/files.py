"""Files in and out of a container through the engine's archive interface: a tar archive each way.

The engine resolves paths inside the container, and no program of the image takes part. What it says of a path becomes
the OSError that a file system has for it.
"""

from __future__ import annotations

import base64
import errno
import io
import json
import os
import posixpath
import tarfile
import time
from dataclasses import dataclass

import requests

from agentkit_environments.archive import MAX_ARCHIVE_BYTES, MAX_LINKS_FOLLOWED, rebase_archive
from agentkit_environments.docker.container import Container
from agentkit_environments.docker.engine import API_TIMEOUT_S
from agentkit_environments.docker.hardening import AGENT_ID

PHRASES = {
    "too many levels": errno.ELOOP,
    "too many links": errno.ELOOP,
    "read-only": errno.EROFS,
    "no space left": errno.ENOSPC,
    "not a directory": errno.ENOTDIR,
    "name too long": errno.ENAMETOOLONG,
    "is a directory": errno.EISDIR,
    "permission denied": errno.EACCES,
    "file exists": errno.EEXIST,
    "cannot overwrite": errno.EEXIST,
}
"""What the engine's answers hold when a file system said no, and the error that they stand for."""


@dataclass(frozen=True, slots=True)
class Stat:
    """What the engine says of a path: the part of its Go `FileMode` that we need."""

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

    @property
    def is_file(self) -> bool:
        return not self.mode & 0x8F28_0000

    @property
    def permissions(self) -> int:
        return self.mode & 0o777


class Files:
    """The files of one container, by absolute paths; blocking calls that raise OSError."""

    def __init__(self, container: Container) -> None:
        self._container, self._api = container, container.api
        self._url = f"{self._api.base_url}/v{self._api.api_version}/containers/{container.id}/archive"

    def read_file(self, path: str, max_bytes: int) -> bytes:
        stat = self.stat(path)
        _require_file(stat, path)
        if stat.size > max_bytes:
            raise _os_error(errno.EFBIG, path)
        data = self._get(stat.path, max_bytes + (1 << 20))
        with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as archive:
            member = archive.next()
            content = archive.extractfile(member) if member is not None and member.isreg() else None
            if content is None:
                raise OSError(errno.EINVAL, "not a regular file", path)
            return content.read()

    def write_file(self, path: str, data: bytes) -> None:
        try:
            stat = self.stat(path)
            _require_file(stat, path)
            target, mode = stat.path, stat.permissions
        except FileNotFoundError:
            target, mode = posixpath.normpath(path), 0o644
        directory, missing = self._existing_parent(target, path)
        member = tarfile.TarInfo(missing[-1])
        member.mode, member.size, member.mtime = mode, len(data), int(time.time())
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as archive:
            archive.addfile(member, io.BytesIO(data))
        self._put(directory, rebase_archive(buffer.getvalue(), prefix="/".join(missing[:-1]), uid=AGENT_ID), path)

    def export_dir(self, path: str) -> bytes:
        stat = self.stat(path)
        if not stat.is_dir:
            raise _os_error(errno.ENOTDIR, path)
        # The bound on the raw archive leaves room for headers; check_archive applies the exact ones.
        return rebase_archive(self._get(stat.path, 2 * MAX_ARCHIVE_BYTES), strip=1)

    def import_dir(self, path: str, archive: bytes) -> None:
        directory, missing = self._existing_parent(posixpath.join(path, "x"), path)
        self._put(directory, rebase_archive(archive, prefix="/".join(missing[:-1]), uid=AGENT_ID), path)

    def stat(self, path: str) -> Stat:
        """Return what is at `path`, links followed inside the container."""
        place = path
        for _ in range(MAX_LINKS_FOLLOWED):
            response = self._api.head(self._url, params={"path": place}, timeout=API_TIMEOUT_S)
            if not response.ok and response.status_code != 404:
                # A reply to HEAD has no body: ask again for the reason, and read no further than that.
                with self._api.get(self._url, params={"path": place}, stream=True, timeout=API_TIMEOUT_S) as explained:
                    self._raise_for(explained, path)
                    continue
            self._raise_for(response, path)
            fields = json.loads(base64.b64decode(response.headers["X-Docker-Container-Path-Stat"]))
            stat = Stat(place, fields["size"], fields["mode"], fields["linkTarget"])
            if not stat.is_link:
                return stat
            place = posixpath.join(posixpath.dirname(place), stat.link_target)
        raise _os_error(errno.ELOOP, path)

    def _existing_parent(self, path: str, shown: str) -> tuple[str, list[str]]:
        """Return the deepest existing directory above `path`, and the names from there to it."""
        parts = posixpath.normpath(path).split("/")
        for length in range(len(parts) - 1, 0, -1):
            try:
                stat = self.stat("/".join(parts[:length]) or "/")
            except FileNotFoundError:
                continue
            if not stat.is_dir:
                raise _os_error(errno.ENOTDIR, shown)
            return stat.path, parts[length:]
        raise _os_error(errno.ENOENT, shown)

    def _get(self, path: str, max_bytes: int) -> bytes:
        """Return the engine's tar archive of `path`; EFBIG when it has more than `max_bytes`."""
        data = bytearray()
        with self._api.get(self._url, params={"path": path}, stream=True, timeout=API_TIMEOUT_S) as response:
            self._raise_for(response, path)
            for chunk in response.iter_content(1 << 20):
                data += chunk
                if len(data) > max_bytes:
                    raise _os_error(errno.EFBIG, path)
        return bytes(data)

    def _put(self, directory: str, data: bytes, shown: str) -> None:
        """Unpack a tar archive into an existing directory; `shown` is the path that errors name.

        Unless told otherwise the engine lets a file take the place of a directory with all that is in it.
        """
        params = {"path": directory, "noOverwriteDirNonDir": "1"}
        self._raise_for(self._api.put(self._url, params=params, data=data, timeout=API_TIMEOUT_S), shown)

    def _raise_for(self, response: requests.Response, path: str) -> None:
        if response.ok:
            return
        said = "" if response.request.method == "HEAD" else response.text.lower()
        if response.status_code == 404 and "no such container" not in said:
            self._container.require_running()
            raise _os_error(errno.ENOENT, path)
        for phrase, number in PHRASES.items():
            if phrase in said:
                raise _os_error(number, path)
        self._container.require_running()
        raise OSError(errno.EIO, f"the Docker engine answered {response.status_code}: {said.strip()}", path)


def _require_file(stat: Stat, path: str) -> None:
    if stat.is_dir:
        raise _os_error(errno.EISDIR, path)
    if not stat.is_file:
        raise OSError(errno.EINVAL, "not a regular file", path)


def _os_error(number: int, path: str) -> OSError:
    return OSError(number, os.strerror(number), path)
