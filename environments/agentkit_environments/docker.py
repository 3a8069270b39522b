"""The Docker sandbox: one container per environment, hardened beyond the engine's defaults.

No capabilities, no new privileges, the engine's seccomp filter, no network, bounds on processes, memory (without swap),
CPU, file size and open files, a read-only root, an unprivileged user, an init process. The work directory and /tmp are
memory-backed volumes of bounded size. Files go in and out through the engine's archive interface, never through
programs of the image, of which only /bin/sh is needed.

The container's first program is a shell, of another user than the commands', that reads a connection which the harness
holds open: when the harness dies, even by SIGKILL, the engine closes it, the shell ends, and the engine removes the
container with its volumes. Labels (`agentkit.run`, `agentkit.owner`) let `reap_docker` find what an engine that was
itself killed has left.

Calls of the `docker` library block; each runs in a worker thread.
"""

from __future__ import annotations

import base64
import errno
import io
import json
import os
import posixpath
import secrets
import select
import socket
import tarfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self, TypeVar

import anyio
import anyio.lowlevel
import anyio.to_thread
import docker
import requests
from docker.errors import APIError, DockerException, ImageNotFound, NotFound
from docker.types import DriverConfig, LogConfig, Mount, Ulimit
from docker.utils import parse_host

from agentkit_environments.archive import check_archive, rebase_archive
from agentkit_environments.environment import (
    MAX_ARCHIVE_BYTES,
    Environment,
    EnvironmentSpec,
    ExecResult,
    exec_argv,
    exec_variables,
    input_bytes,
)
from agentkit_environments.errors import (
    FileTooLargeError,
    SandboxError,
    SandboxLostError,
    SandboxUnavailableError,
    UnsafeArchiveError,
    UnsafePathError,
)
from agentkit_environments.executor import COOKIE, BoundedOutput
from agentkit_environments.owner import is_orphan, owner_token
from agentkit_environments.threads import run_cancellable

T = TypeVar("T")

BASE_IMAGE = "agentkit-base:latest"
BUILD_HINT = "build it with `python -m agentkit_environments.images`"
RUN_LABEL, OWNER_LABEL = "agentkit.run", "agentkit.owner"
AGENT_USER = "1000:1000"
KEEPER_USER = "65534:65534"
API_TIMEOUT_S = 60
KILL_TIMEOUT_S = 10.0
MAX_LINKS_FOLLOWED = 40

# Kill the processes that carry the cookie "$1" in their environment, and their descendants and sessions. All are
# stopped before any is killed, so that none can fork its way out. Nothing but the shell's own commands is used.
KILL_COMMAND = r"""
cookie=$1; marked=' '
while :; do
  fresh=
  for directory in /proc/[0-9]*; do
    pid=${directory#/proc/}
    case "$marked" in *" $pid "*) continue;; esac
    [ "$pid" = "$$" ] && continue
    { IFS= read -r line <"$directory/stat"; } 2>/dev/null || continue
    set -- ${line##*) }
    [ "$1" = Z ] && continue
    found=
    case "$marked" in *" $2 "*|*" $4 "*) found=1;; esac
    if [ -z "$found" ]; then
      { while IFS= read -r line || [ -n "$line" ]; do
          case "$line" in *"=$cookie"*) found=1; break;; esac
        done <"$directory/environ"; } 2>/dev/null
    fi
    [ -n "$found" ] && kill -STOP "$pid" 2>/dev/null && fresh="$fresh$pid "
  done
  [ -z "$fresh" ] && break
  marked="$marked$fresh"
done
for pid in $marked; do kill -KILL "$pid" 2>/dev/null; done
exit 0
"""

# Kill every process of this user but this shell, until none is left; exit with 1 when some will not die.
KILL_USER = r"""
tries=0
while [ "$tries" -lt 1000 ]; do
  tries=$((tries + 1)); living=
  kill -KILL -1 2>/dev/null
  for directory in /proc/[0-9]*; do
    [ -O "$directory" ] && [ "${directory#/proc/}" != "$$" ] || continue
    { IFS= read -r line <"$directory/stat"; } 2>/dev/null || continue
    case "${line##*) }" in Z*) ;; *) living=1;; esac
  done
  [ -z "$living" ] && exit 0
done
exit 1
"""


@dataclass(frozen=True, slots=True)
class _Stat:
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


class DockerEnvironment(Environment):
    """One hardened container. See the module's docstring for what that means."""

    backend = "docker"

    def __init__(self, spec: EnvironmentSpec, run_id: str, container: _Container) -> None:
        self.spec, self.run_id = spec, run_id
        self._container = container
        self._env = {"HOME": spec.workdir, "LANG": "C.UTF-8", **spec.env}
        self._users = {AGENT_USER}
        self._limiter = anyio.CapacityLimiter(256)
        self._closed = False

    @classmethod
    async def open(cls, spec: EnvironmentSpec, run_id: str) -> Self:
        """Start a container.

        Raises:
            SandboxUnavailableError: If no engine answers, the image is not there and cannot be pulled, or the engine
                refuses the container.
        """
        started: list[_Container] = []

        def start() -> None:
            started.append(_Container(spec, run_id))

        try:
            # Not abandoned when cancelled: a container that was started is known here and removed.
            await anyio.to_thread.run_sync(start)
            await anyio.lowlevel.checkpoint_if_cancelled()
        except anyio.get_cancelled_exc_class():
            with anyio.CancelScope(shield=True):
                for container in started:
                    await anyio.to_thread.run_sync(container.remove)
            raise
        return cls(spec, run_id, started[0])

    async def exec(
        self,
        command: str | Sequence[str],
        *,
        stdin: str | bytes = b"",
        cwd: str | None = None,
        env: Mapping[str, str] | None = None,
        user: str | None = None,
        timeout_s: float | None = None,
        max_output_bytes: int = 1 << 20,
    ) -> ExecResult:
        argv = exec_argv(command)
        if not isinstance(command, str):
            argv = ["/bin/sh", "-c", 'exec "$0" "$@"', *argv]  # the shell's 126 and 127 for what cannot be started
        data = input_bytes(stdin)
        directory = self.resolve(cwd or ".")
        variables = exec_variables(self._env, env)
        user = user or AGENT_USER
        self._require_open()
        self._users.add(user)

        def run(cancel_fd: int) -> ExecResult:
            if cwd is not None and not self._container.stat(directory).is_dir:
                raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), cwd)
            cookie = secrets.token_hex(12)
            started = time.monotonic()
            stream = _ExecStream(
                self._container, argv, data, directory, {**variables, COOKIE: cookie}, user, max_output_bytes
            )
            with stream:
                deadline = float("inf") if timeout_s is None else started + timeout_s
                ended = stream.pump(deadline, cancel_fd)
                if not ended:
                    self._container.run_script(KILL_COMMAND, [cookie], user)
                    stream.pump(time.monotonic() + KILL_TIMEOUT_S, None)
                exit_code = stream.exit_code()
            if ended and exit_code == 137:
                # The command was killed, or the whole container was and the engine has not noticed yet: only a
                # container whose init is alive can run another command.
                self._container.require_running()
                if self._container.run_script(":", [], user) != 0:
                    raise SandboxLostError(f"container {self._container.short_id} was killed")
            return ExecResult(
                exit_code=exit_code if ended else 137,
                stdout=stream.stdout.value().decode("utf-8", "replace"),
                stderr=stream.stderr.value().decode("utf-8", "replace"),
                truncated=stream.stdout.truncated or stream.stderr.truncated,
                timed_out=not ended,
                duration_s=time.monotonic() - started,
            )

        return await run_cancellable(lambda cancel_fd: self._container.guard(lambda: run(cancel_fd)), self._limiter)

    async def read_file(self, path: str, *, max_bytes: int = 16 << 20) -> bytes:
        absolute = self.resolve(path)

        def read() -> bytes:
            stat = self._container.stat(absolute)
            _require_file(stat, path)
            if stat.size > max_bytes:
                raise FileTooLargeError(f"{path} has {stat.size} bytes, more than {max_bytes}")
            data = self._container.get_archive(stat.path, max_bytes + (1 << 20))
            with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as archive:
                member = archive.next()
                content = archive.extractfile(member) if member is not None and member.isreg() else None
                if content is None:
                    raise OSError(errno.EINVAL, "not a regular file", path)
                return content.read()

        try:
            return await self._call(read)
        except UnsafeArchiveError as error:
            raise FileTooLargeError(f"{path} has more than {max_bytes} bytes") from error

    async def write_file(self, path: str, data: str | bytes) -> None:
        absolute, raw = self.resolve(path), input_bytes(data)
        if len(raw) > self.spec.limits.file_size_mib << 20:
            raise OSError(errno.EFBIG, os.strerror(errno.EFBIG), path)

        def write() -> None:
            try:
                stat = self._container.stat(absolute)
                _require_file(stat, path)
                target, mode = stat.path, stat.permissions
            except FileNotFoundError:
                target, mode = posixpath.normpath(absolute), 0o644
            directory, missing = self._container.existing_parent(target, path)
            buffer = io.BytesIO()
            with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as archive:
                for length in range(1, len(missing)):
                    archive.addfile(_member("/".join(missing[:length]), tarfile.DIRTYPE, 0o755, 0))
                archive.addfile(_member("/".join(missing), tarfile.REGTYPE, mode, len(raw)), io.BytesIO(raw))
            self._container.put_archive(directory, buffer.getvalue(), path)

        await self._call(write)

    async def export_dir(self, path: str) -> bytes:
        absolute = self.resolve(path)

        def export() -> bytes:
            stat = self._container.stat(absolute)
            if not stat.is_dir:
                raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), path)
            # The bound on the raw archive leaves room for headers; check_archive applies the exact ones.
            raw = self._container.get_archive(stat.path, 2 * MAX_ARCHIVE_BYTES)
            return rebase_archive(raw, strip=1)

        data = await self._call(export)
        check_archive(data)
        return data

    async def import_dir(self, path: str, archive: bytes) -> None:
        check_archive(archive)
        absolute = self.resolve(path)

        def unpack() -> None:
            directory, missing = self._container.existing_parent(posixpath.join(absolute, "x"), path)
            prefix = "/".join(missing[:-1])
            raw = rebase_archive(archive, prefix=prefix, uid=int(AGENT_USER.split(":")[0]))
            self._container.put_archive(directory, raw, path)

        await self._call(unpack)

    async def kill_all(self) -> None:
        def kill() -> None:
            for user in sorted(self._users):
                if self._container.run_script(KILL_USER, [], user) != 0:
                    raise SandboxLostError(f"container {self._container.short_id}: processes of {user} would not die")

        await self._call(kill)

    async def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        with anyio.CancelScope(shield=True):
            await anyio.to_thread.run_sync(self._container.remove, limiter=self._limiter)

    async def _call(self, function: Callable[[], T]) -> T:
        self._require_open()
        return await anyio.to_thread.run_sync(self._container.guard, function, limiter=self._limiter)

    def _require_open(self) -> None:
        if self._closed:
            raise SandboxLostError("this docker environment was closed; open another one")


class _Container:
    """The engine's side of one environment: blocking calls only."""

    def __init__(self, spec: EnvironmentSpec, run_id: str) -> None:
        self.client = connect()
        try:
            self._image = _require_image(self.client, spec.image)
            self.id: str = self._create(spec, run_id)
        except BaseException:
            self.client.close()
            raise
        try:
            self._keeper: Any = self.client.api.attach_socket(self.id, params={"stdin": 1, "stream": 1})
            self.client.api.start(self.id)
        except (DockerException, requests.RequestException) as error:
            self.remove()
            raise SandboxUnavailableError(f"the container did not start: {error}") from error

    @property
    def short_id(self) -> str:
        return self.id[:12]

    def _create(self, spec: EnvironmentSpec, run_id: str) -> str:
        limits = spec.limits
        memory = (limits.memory_mib + limits.disk_mib) << 20  # what lies in the volumes is charged to the container
        api = self.client.api
        options = f"size={limits.disk_mib}m,nosuid,nodev,uid=1000,gid=1000"
        mounts = [
            Mount(
                target=target,
                source=None,
                type="volume",
                no_copy=True,
                driver_config=DriverConfig(
                    "local", {"type": "tmpfs", "device": "tmpfs", "o": f"{options},mode={mode}"}
                ),
            )
            for target, mode in ((spec.workdir, "0755"), ("/tmp", "1777"))
        ]
        host_config = api.create_host_config(
            auto_remove=True,
            cap_drop=["ALL"],
            init=True,
            ipc_mode="private",
            log_config=LogConfig(type="none"),
            mem_limit=memory,
            memswap_limit=memory,
            mounts=mounts,
            nano_cpus=int(limits.cpus * 1e9),
            network_mode="none" if spec.network == "none" else "bridge",
            oom_score_adj=500,
            pids_limit=limits.processes,
            privileged=False,
            read_only=True,
            security_opt=["no-new-privileges:true"],
            shm_size=64 << 20,
            ulimits=[
                Ulimit(name="nofile", soft=limits.open_files, hard=limits.open_files),
                Ulimit(name="fsize", soft=limits.file_size_mib << 20, hard=limits.file_size_mib << 20),
                Ulimit(name="core", soft=0, hard=0),
            ],
        )
        try:
            return str(
                api.create_container(
                    self._image,
                    entrypoint=["/bin/sh"],
                    command=[],
                    environment={"ENV": ""},
                    hostname="sandbox",
                    host_config=host_config,
                    labels={RUN_LABEL: run_id, OWNER_LABEL: owner_token()},
                    stdin_open=True,
                    user=KEEPER_USER,
                    working_dir=spec.workdir,
                )["Id"]
            )
        except (DockerException, requests.RequestException) as error:
            raise SandboxUnavailableError(f"the Docker engine refused the container: {error}") from error

    def guard(self, function: Callable[[], T]) -> T:
        """Run `function`; what the engine, or the connection to it, says of a dead container is `SandboxLostError`."""
        try:
            return function()
        except (SandboxError, OSError) as error:
            if isinstance(error, requests.RequestException):
                raise SandboxLostError(f"container {self.short_id}: the Docker engine is gone: {error}") from error
            raise
        except DockerException as error:
            raise SandboxLostError(f"container {self.short_id} is gone: {error}") from error

    def run_script(self, script: str, arguments: list[str], user: str) -> int:
        """Run a script of ours with /bin/sh; return its exit code."""
        stream = _ExecStream(self, ["/bin/sh", "-c", script, "sh", *arguments], b"", "/", {}, user, 1 << 12)
        with stream:
            if not stream.pump(time.monotonic() + KILL_TIMEOUT_S, None):
                self.remove()
                raise SandboxLostError(f"container {self.short_id} was removed: its processes could not be killed")
            return stream.exit_code()

    def remove(self) -> None:
        """Kill and remove the container and its volumes, and let go of the engine. Safe to call twice."""
        try:
            _remove(self.client, self.id)
        finally:
            keeper = self.__dict__.pop("_keeper", None)
            if keeper is not None:
                _close_socket(keeper)
            self.client.close()

    def stat(self, path: str) -> _Stat:
        """Return what is at `path`, links followed inside the container."""
        for _ in range(MAX_LINKS_FOLLOWED):
            response = self.client.api.head(self._archive_url, params={"path": path}, timeout=API_TIMEOUT_S)
            if not response.ok and response.status_code != 404:
                # A reply to HEAD has no body: ask again for the reason, and read no further than that.
                with self.client.api.get(
                    self._archive_url, params={"path": path}, stream=True, timeout=API_TIMEOUT_S
                ) as explained:
                    self._raise_for(explained, path)
                    continue
            self._raise_for(response, path)
            fields = json.loads(base64.b64decode(response.headers["X-Docker-Container-Path-Stat"]))
            stat = _Stat(path, fields["size"], fields["mode"], fields["linkTarget"])
            if not stat.is_link:
                return stat
            path = posixpath.join(posixpath.dirname(path), stat.link_target)
        raise UnsafePathError(f"{path} is a loop of links")

    def existing_parent(self, path: str, shown: str) -> tuple[str, list[str]]:
        """Return the deepest existing directory above `path`, and the names from there to it."""
        parts = posixpath.normpath(path).split("/")
        for length in range(len(parts) - 1, 0, -1):
            try:
                stat = self.stat("/".join(parts[:length]) or "/")
            except FileNotFoundError:
                continue
            if not stat.is_dir:
                raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), shown)
            return stat.path, parts[length:]
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), shown)

    def get_archive(self, path: str, max_bytes: int) -> bytes:
        """Return the engine's tar archive of `path`. Raises UnsafeArchiveError when it has more than `max_bytes`."""
        data = bytearray()
        with self.client.api.get(
            self._archive_url, params={"path": path}, stream=True, timeout=API_TIMEOUT_S
        ) as response:
            self._raise_for(response, path)
            for chunk in response.iter_content(1 << 20):
                data += chunk
                if len(data) > max_bytes:
                    raise UnsafeArchiveError(f"{path}: the archive has more than {max_bytes} bytes")
        return bytes(data)

    def put_archive(self, directory: str, data: bytes, shown: str) -> None:
        """Unpack a tar archive into an existing directory; `shown` is the path that errors name."""
        response = self.client.api.put(self._archive_url, params={"path": directory}, data=data, timeout=API_TIMEOUT_S)
        self._raise_for(response, shown)

    @property
    def _archive_url(self) -> str:
        return f"{self.client.api.base_url}/v{self.client.api.api_version}/containers/{self.id}/archive"

    def _raise_for(self, response: requests.Response, path: str) -> None:
        """Turn what the engine says of a path into the OSError that a file system has for it."""
        if response.ok:
            return
        said = "" if response.request.method == "HEAD" else response.text.lower()
        if response.status_code == 404 and "no such container" not in said:
            self.require_running()
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
        if "too many levels" in said or "too many links" in said:
            raise UnsafePathError(f"{path} is a loop of links")
        for phrase, number in (
            ("read-only", errno.EROFS),
            ("no space left", errno.ENOSPC),
            ("not a directory", errno.ENOTDIR),
            ("name too long", errno.ENAMETOOLONG),
            ("is a directory", errno.EISDIR),
            ("permission denied", errno.EACCES),
            ("file exists", errno.EEXIST),
            ("cannot overwrite", errno.EISDIR),
        ):
            if phrase in said:
                raise OSError(number, os.strerror(number), path)
        self.require_running()
        raise OSError(errno.EIO, f"the Docker engine answered {response.status_code}: {said.strip()}", path)

    def require_running(self) -> None:
        state = self.client.api.inspect_container(self.id)["State"]
        if not state["Running"]:
            reason = f"killed for memory at {self.id}" if state["OOMKilled"] else f"exit code {state['ExitCode']}"
            raise SandboxLostError(f"container {self.short_id} has ended: {reason}")


class _ExecStream:
    """One `docker exec` and the connection that carries its standard streams."""

    def __init__(
        self,
        container: _Container,
        argv: list[str],
        stdin: bytes,
        cwd: str,
        env: Mapping[str, str],
        user: str,
        max_output_bytes: int,
    ) -> None:
        self._container = container
        self.stdout, self.stderr = BoundedOutput(max_output_bytes), BoundedOutput(max_output_bytes)
        self._stdin = memoryview(stdin)
        api = container.client.api
        self._id = api.exec_create(
            container.id, argv, stdin=bool(stdin), workdir=cwd, environment=dict(env), user=user
        )["Id"]
        self._stream: Any = api.exec_start(self._id, socket=True)
        self._socket = _raw_socket(self._stream)
        self._socket.setblocking(False)
        self._frame = bytearray()
        self._output: BoundedOutput = self.stdout
        self._left = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        _close_socket(self._stream)

    def pump(self, deadline: float, cancel_fd: int | None) -> bool:
        """Move bytes until the command's streams end; return False at the deadline or when `cancel_fd` is readable."""
        poll = select.poll()
        if cancel_fd is not None:
            poll.register(cancel_fd, select.POLLIN)
        while True:
            poll.register(self._socket, select.POLLIN | (select.POLLOUT if self._stdin else 0))
            remaining_s = deadline - time.monotonic()
            if remaining_s <= 0:
                return False
            for fd, event in poll.poll(None if remaining_s == float("inf") else remaining_s * 1000 + 1):
                if fd == cancel_fd:
                    return False
                if event & select.POLLOUT:
                    self._send()
                if event & ~select.POLLOUT and not self._receive():
                    return True

    def exit_code(self) -> int:
        """Return the command's exit code, once its streams have ended."""
        deadline = time.monotonic() + KILL_TIMEOUT_S
        while time.monotonic() < deadline:
            try:
                state = self._container.client.api.exec_inspect(self._id)
            except NotFound as error:
                raise SandboxLostError(f"container {self._container.short_id} has ended") from error
            if not state["Running"]:
                return int(state["ExitCode"])
            time.sleep(0.01)
        raise SandboxLostError(f"container {self._container.short_id}: a command ended without an exit code")

    def _send(self) -> None:
        try:
            self._stdin = self._stdin[self._socket.send(self._stdin[: 1 << 16]) :]
        except BlockingIOError:
            return
        except (BrokenPipeError, ConnectionResetError):
            self._stdin = self._stdin[:0]
            return
        if not self._stdin:
            self._socket.shutdown(socket.SHUT_WR)

    def _receive(self) -> bool:
        """Take what has arrived apart: frames of 8 bytes (stream, 0, 0, 0, length) and a payload."""
        try:
            chunk = memoryview(self._socket.recv(1 << 16))
        except BlockingIOError:
            return True
        except ConnectionResetError:
            return False
        if not chunk:
            return False
        while chunk:
            if self._left == 0:
                need = 8 - len(self._frame)
                self._frame += chunk[:need]
                chunk = chunk[need:]
                if len(self._frame) == 8:
                    self._output = self.stderr if self._frame[0] == 2 else self.stdout
                    self._left = int.from_bytes(self._frame[4:], "big")
                    self._frame.clear()
                continue
            payload = chunk[: self._left]
            self._output.add(bytes(payload))
            self._left -= len(payload)
            chunk = chunk[len(payload) :]
        return True


def connect() -> docker.DockerClient:
    """Return a client of the engine that DOCKER_HOST names, or of the local one.

    Raises:
        SandboxUnavailableError: If no engine answers.
    """
    try:
        host = str(parse_host(os.environ.get("DOCKER_HOST")))
        if host.startswith("http+unix://"):
            # Asked first with a socket of our own: when nobody listens the docker library leaks the one it has opened.
            with socket.socket(socket.AF_UNIX) as probe:
                probe.connect(host.removeprefix("http+unix://"))
        return docker.from_env(timeout=API_TIMEOUT_S, max_pool_size=64)
    except (DockerException, OSError) as error:
        raise SandboxUnavailableError(
            f"no Docker engine answers ({error}). Start one (`systemctl start docker`, or `dockerd &` as root), point "
            "DOCKER_HOST at one, or use the process backend"
        ) from error


def docker_failure(image: str | None = None) -> str | None:
    """Return why no container of `image` (None: the base image) can be opened here, or None when one can.

    An image other than the base image may still have to be pulled.
    """
    try:
        client = connect()
    except SandboxUnavailableError as error:
        return str(error)
    try:
        if image is None:
            _require_image(client, None)
    except SandboxUnavailableError as error:
        return str(error)
    finally:
        client.close()
    return None


def reap_docker(run_id: str | None) -> int:
    """Remove the containers of `run_id`, or of every harness of this machine that is gone; return how many."""
    try:
        client = connect()
    except SandboxUnavailableError:
        return 0
    try:
        label = RUN_LABEL if run_id is None else f"{RUN_LABEL}={run_id}"
        count = 0
        for container in client.api.containers(all=True, filters={"label": label}):
            if run_id is not None or is_orphan(container["Labels"].get(OWNER_LABEL, "")):
                _remove(client, container["Id"])
                count += 1
        return count
    finally:
        client.close()


def _require_image(client: docker.DockerClient, image: str | None) -> str:
    name = image or BASE_IMAGE
    try:
        client.images.get(name)
    except ImageNotFound:
        if image is None:
            raise SandboxUnavailableError(f"the base image {BASE_IMAGE} is not there: {BUILD_HINT}") from None
        try:
            client.images.pull(name)
        except (DockerException, requests.RequestException) as error:
            raise SandboxUnavailableError(f"image {name} is not there and could not be pulled: {error}") from error
    except (DockerException, requests.RequestException) as error:
        raise SandboxUnavailableError(f"image {name} cannot be used: {error}") from error
    return name


def _remove(client: docker.DockerClient, container_id: str) -> None:
    """Remove a container and its volumes; on return it is gone, also when somebody else was removing it."""
    deadline = time.monotonic() + API_TIMEOUT_S
    while time.monotonic() < deadline:
        try:
            client.api.remove_container(container_id, force=True, v=True)
        except NotFound:
            return
        except APIError as error:
            if error.status_code != 409:
                raise SandboxLostError(f"container {container_id[:12]} cannot be removed: {error}") from error
            time.sleep(0.02)
        except (DockerException, requests.RequestException):
            return  # the engine is gone; it removes the container when it comes back, or reap does
    raise SandboxLostError(f"container {container_id[:12]} could not be removed within {API_TIMEOUT_S} s")


def _close_socket(stream: Any) -> None:
    """Close a connection that the docker library has handed out, and the response it belongs to."""
    raw = _raw_socket(stream)
    response = getattr(stream, "_response", None)
    if response is not None:
        response.close()
    stream.close()
    raw.close()


def _raw_socket(stream: Any) -> socket.socket:
    """Return the socket under a connection of the docker library: a `SocketIO` for a local engine, itself for TLS."""
    raw: socket.socket = getattr(stream, "_sock", stream)
    return raw


def _require_file(stat: _Stat, path: str) -> None:
    if stat.is_dir:
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), path)
    if not stat.is_file:
        raise OSError(errno.EINVAL, "not a regular file", path)


def _member(name: str, kind: bytes, mode: int, size: int) -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.type, member.mode, member.size, member.mtime = kind, mode, size, int(time.time())
    member.uid = member.gid = int(AGENT_USER.split(":")[0])
    return member
