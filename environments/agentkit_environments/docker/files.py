"""Files in and out of a container.

A small script reads or writes one file as the commands' user, so that the kernel resolves its path and checks its
permissions as it does for a command. The script needs `cat`, `head` and `mkdir` in the image. Directories go through
the engine's archive interface as root, as a tar archive in each direction. Messages of both become the OSError that a
file system would raise.
"""

from __future__ import annotations

import base64
import errno
import io
import json
import os
import posixpath
import secrets
import tarfile
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING

import requests
from docker.errors import DockerException

from agentkit_environments.archive import MAX_LINKS_FOLLOWED, ExportedDir, rebase_archive, repack
from agentkit_environments.docker.container import Container
from agentkit_environments.docker.engine import API_TIMEOUT_S, OWNER_LABEL, RUN_LABEL, remove_container
from agentkit_environments.docker.exec_stream import KILLED, ExecStream
from agentkit_environments.docker.hardening import AGENT_ID, AGENT_USER
from agentkit_environments.errors import SandboxUnavailableError
from agentkit_environments.executor import COOKIE
from agentkit_environments.owner import owner_token

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

PHRASES = {
    "too many levels": errno.ELOOP,
    "symbolic link loop": errno.ELOOP,
    "too many links": errno.ELOOP,
    "read-only": errno.EROFS,
    "no space left": errno.ENOSPC,
    "not a directory": errno.ENOTDIR,
    "no such file": errno.ENOENT,
    "directory nonexistent": errno.ENOENT,  # Debian's shell, about a file that it cannot create
    "file too large": errno.EFBIG,
    "name too long": errno.ENAMETOOLONG,
    "is a directory": errno.EISDIR,
    "permission denied": errno.EACCES,
    "file exists": errno.EEXIST,
    "cannot overwrite": errno.EEXIST,
}
"""Phrases in messages of the engine and of programs, and the error number that each stands for."""

SCRIPT_TIMEOUT_S = 20.0
ERRNO_BASE = 100
"""Exit status of a script that finds an error itself: this plus the error number."""

# Opening a pipe would block, so the script checks for a regular file first. If another process replaces the file in
# between, the script runs into the timeout. The errors are those of `open` with O_NONBLOCK, as in `executor.py`.
CHECK = rf"""
fail() {{ exit $(({ERRNO_BASE} + $1)); }}
check() {{
  [ -S "$1" ] && fail {errno.ENXIO}
  [ ! -e "$1" ] || [ -f "$1" ] || fail {errno.EINVAL}
}}
"""
READ = (
    CHECK
    + rf"""
[ ! -e "$1" ] || [ -r "$1" ] || fail {errno.EACCES}
[ -d "$1" ] && fail {errno.EISDIR}
check "$1"
exec head -c "$2" "$1"
"""
)
WRITE = (
    CHECK
    + rf"""
umask 022
mkdir -p "${{1%/*}}/" || exit 1
[ -d "$1" ] && fail {errno.EISDIR}
[ -p "$1" ] && fail {errno.ENXIO}
check "$1"
exec cat >"$1"
"""
)


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


class Files:
    """The files of one container by absolute path; blocking calls that raise OSError."""

    def __init__(self, container: Container) -> None:
        self._container, self._api = container, container.api
        self._url = f"{self._api.base_url}/v{self._api.api_version}/containers/{container.id}/archive"

    def read_file(self, path: str, max_bytes: int, cancel_fd: int) -> bytes:
        data = self._run(READ, [path, str(max_bytes + 1)], b"", path, max_bytes + 1, cancel_fd)
        if len(data) > max_bytes:
            raise os_error(errno.EFBIG, path)
        return data

    def write_file(self, path: str, data: bytes, cancel_fd: int) -> None:
        self._run(WRITE, [path], data, path, 0, cancel_fd)

    def _run(
        self, script: str, arguments: list[str], stdin: bytes, path: str, max_output_bytes: int, cancel_fd: int
    ) -> bytes:
        """Run a script as the commands' user and return its output."""
        argv = ["/bin/sh", "-c", script, "sh", *arguments]
        cookie, deadline = secrets.token_hex(12), time.monotonic() + SCRIPT_TIMEOUT_S
        env = {"LC_ALL": "C", COOKIE: cookie}
        with ExecStream(
            self._api, self._container.id, argv, stdin, "/", env, AGENT_USER, max(max_output_bytes, 1 << 12)
        ) as stream:
            code = stream.exit_code(deadline, cancel_fd) if stream.pump(deadline, cancel_fd) else None
            if code is None:
                self._container.kill_command(cookie, AGENT_USER, stream)
                raise OSError(errno.ETIMEDOUT, f"not done within {SCRIPT_TIMEOUT_S:g} s", path)
        if code == 0:
            return stream.stdout.value()
        if ERRNO_BASE < code < KILLED - 1 and code - ERRNO_BASE in errno.errorcode:
            number = code - ERRNO_BASE
            raise OSError(number, "not a regular file" if number == errno.EINVAL else os.strerror(number), path)
        if code == KILLED:
            self._container.require_running()
            raise OSError(errno.EINTR, "the helper that reads and writes files was killed in the container", path)
        said = (stream.stderr.value() or stream.stdout.value()[:1000]).decode("utf-8", "replace").strip()
        reason = said.lower().rpartition(": ")[2]  # skip the path, which may contain any of the phrases
        for phrase, number in PHRASES.items():
            if phrase in reason:
                # EEXIST comes from `mkdir -p` only: a file stands where a directory is needed.
                raise os_error(errno.ENOTDIR if number == errno.EEXIST else number, path)
        raise OSError(errno.EIO, f"the helper that reads and writes files exited with {code}: {said}", path)

    def export_dir(self, path: str, max_entries: int, max_bytes: int) -> ExportedDir:
        stat = self.stat(path)
        if not stat.is_dir:
            raise os_error(errno.ENOTDIR, path)
        with self._api.get(self._url, params={"path": stat.path}, stream=True, timeout=API_TIMEOUT_S) as response:
            self._raise_for(response, path)
            source = io.BufferedReader(_Stream(response.iter_content(1 << 20)))
            return repack(source, max_entries=max_entries, max_bytes=max_bytes)

    def import_dir(self, path: str, archive: bytes) -> None:
        directory, missing = self._existing_parent(posixpath.join(path, "x"), path)
        self._put(directory, rebase_archive(archive, prefix="/".join(missing[:-1]), uid=AGENT_ID), path)

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
        place = path
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
            place = posixpath.join(posixpath.dirname(place), stat.link_target)
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
