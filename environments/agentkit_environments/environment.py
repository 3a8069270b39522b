"""The contract of an environment, the same for every backend.

A backend is one subclass of `Environment`: `docker/`, `process.py`, `local.py`. This class defines what callers see; a
backend implements its abstract methods. All backends pass the same tests (`tests/environments/test_contract.py`).
"""

from __future__ import annotations

import errno
import math
import posixpath
import re
import socket
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Awaitable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, fields, replace
from functools import partial
from tarfile import TarInfo
from tempfile import TemporaryFile
from types import MappingProxyType, TracebackType
from typing import IO, Literal, Self, TypeVar

import anyio
import anyio.to_thread

from agentkit_environments.archive import MAX_ARCHIVE_BYTES as MAX_ARCHIVE_BYTES
from agentkit_environments.archive import MAX_ARCHIVE_ENTRIES as MAX_ARCHIVE_ENTRIES
from agentkit_environments.archive import ExportedDir, check_archive, drop_links
from agentkit_environments.errors import FileTooLargeError, SnapshotError, UnsafeArchiveError, UnsafePathError
from agentkit_environments.live_output import LiveOutput, OnChunk, OnOutput
from agentkit_environments.network import PHASES, Network, Phase
from agentkit_environments.proxy import VARIABLES, Proxy
from agentkit_environments.snapshot import MAX_ENTRIES, SLACK_BYTES, Snapshot

Backend = Literal["docker", "process", "unsafe-local"]
"""Isolation of an environment: a container, namespaces on this kernel, or none."""

FileOperation = Literal["read_file", "write_file"]
"""A backend's operations on single files, under the names of `executor.OPERATIONS`."""

MAX_STDIN_BYTES = 64 << 20
"""Maximum bytes of standard input of one `exec`, and of the content of one `write_file`."""


OPENED_AT_ONCE = 8
"""Number of forks that are opened at the same time."""

E = TypeVar("E", bound="Environment")

SYSTEM_DIRECTORIES = {"bin", "boot", "dev", "etc", "lib", "lib32", "lib64", "libx32", "proc", "sbin", "sys", "usr"}
SHARED_DIRECTORIES = {"/", "/home", "/opt", "/root", "/run", "/tmp", "/var", "/var/tmp"}


@dataclass(frozen=True, slots=True)
class ExecResult:
    """Result of a command. A non-zero `exit_code` is a value, never an exception."""

    exit_code: int
    """The command's exit status, 0 to 255; 128 + N when signal N killed it (137 after a timeout)."""
    stdout: str
    """Standard output as UTF-8, undecodable bytes replaced by U+FFFD; cut in the middle if it was too long."""
    stderr: str
    """Standard error, likewise."""
    truncated: bool
    """True if `stdout` or `stderr` was cut; a line `[... N bytes cut ...]` marks the cut."""
    timed_out: bool
    """True if `timeout_s` ran out and the command was killed with everything it had started."""
    duration_s: float
    """Wall-clock seconds from start to exit."""


@dataclass(frozen=True, slots=True)
class ResourceLimits:
    """Limits of one environment. Each backend documents which of them the kernel enforces in total."""

    memory_mib: int = 1024
    """Memory in MiB. Bounds all commands together with the files they write on docker, and on process where a cgroup
    can be made; else each process."""
    processes: int = 256
    """Number of processes and threads at one time."""
    cpus: float = 1.0
    """CPU cores; enforced by docker, and by process where a cgroup can be made."""
    file_size_mib: int = 256
    """Largest single file in MiB."""
    open_files: int = 1024
    """Open file descriptors per process."""
    disk_mib: int = 512
    """MiB of files in the work directory, and the same again in `/tmp`; both are kept in memory."""

    def __post_init__(self) -> None:
        for each in fields(self):
            value = getattr(self, each.name)
            kinds, expected = ((int, float), "number") if each.name == "cpus" else ((int,), "whole number")
            if isinstance(value, bool) or not isinstance(value, kinds):
                raise TypeError(f"limits.{each.name} must be a {expected}, got {value!r}")
            if not 0 < value < math.inf:
                raise ValueError(f"limits.{each.name} must be positive and finite, got {value!r}")


@dataclass(frozen=True, slots=True)
class VolumeMount:
    """A volume at a path of a container."""

    name: str
    read_only: bool = False


@dataclass(frozen=True, slots=True)
class EnvironmentSpec:
    """Specification of an environment: image, work directory, network, variables and limits."""

    image: str | None = None
    """Docker image; None is the base image of `images/base.py`. The other backends refuse an image."""
    workdir: str = "/workspace"
    """Absolute path of the work directory: commands start there, and relative paths begin there. Empty at first."""
    workdir_from_image: bool = False
    """True if the work directory starts with the image's files at its path, owned by the commands' user."""
    as_image: bool = False
    """True if the sandbox is the image as it was built: a writable root file system, the image's user, work directory
    and entry point, and for root the capabilities that package managers need. With it, an empty `workdir` is the
    image's own, and any absolute path is allowed. Docker only."""
    user: str | None = None
    """User of commands, as a name or `uid[:gid]`; None is the image's. Only with `as_image`."""
    volumes: Mapping[str, VolumeMount] = field(default_factory=dict)
    """Path -> volume of the Docker engine, which services beside the sandbox can share. It begins with the image's
    files there, and is not part of a snapshot. Only with `as_image`."""
    network: Network = field(default_factory=Network)
    """Network of commands in each phase; `Network.everywhere("public")` is the same in all."""
    env: Mapping[str, str] = field(default_factory=dict)
    """Environment variables of every command, in addition to PATH, HOME and LANG."""
    limits: ResourceLimits = ResourceLimits()

    def __post_init__(self) -> None:
        for name, kinds, expected in (
            ("image", str | None, "the name of a Docker image or None"),
            ("workdir", str, "an absolute path"),
            ("workdir_from_image", bool, "True or False"),
            ("as_image", bool, "True or False"),
            ("user", str | None, 'a user name, "uid", "uid:gid" or None'),
            ("volumes", Mapping, "a mapping of absolute paths to VolumeMount"),
            ("network", Network, 'a Network such as Network(agent=["pypi.org"])'),
            ("env", Mapping, 'a mapping of names to texts such as {"LANG": "C"}'),
            ("limits", ResourceLimits, "a ResourceLimits"),
        ):
            if not isinstance(getattr(self, name), kinds):
                raise TypeError(f"{name} must be {expected}, got {getattr(self, name)!r}")
        exec_variables(self.env)
        if self.workdir_from_image and self.image is None:
            raise ValueError("workdir_from_image needs an image; the base image has an empty work directory")
        object.__setattr__(self, "env", MappingProxyType(dict(self.env)))
        object.__setattr__(self, "volumes", MappingProxyType(dict(self.volumes)))
        if self.as_image:
            self._check_as_image()
            return
        if self.user is not None:
            raise ValueError(f"user {self.user!r} needs as_image; other sandboxes have one user")
        if self.volumes:
            raise ValueError(f"volumes {[*self.volumes]} need as_image; other sandboxes have none")
        normal = posixpath.normpath(self.workdir)
        if not re.fullmatch(r"(/[\w.-]+)+", normal) or normal in SHARED_DIRECTORIES:
            raise ValueError(f"workdir must be the absolute path of a dedicated directory, got {self.workdir!r}")
        if normal.split("/")[1] in SYSTEM_DIRECTORIES:
            raise ValueError(f"workdir must be outside the system's directories, got {self.workdir!r}")
        object.__setattr__(self, "workdir", normal)

    def _check_as_image(self) -> None:
        if self.image is None or self.workdir_from_image:
            raise ValueError("as_image needs an image, and includes workdir_from_image")
        if not re.fullmatch(r"(/[^\0]*)?", self.workdir):
            raise ValueError(f"workdir must be an absolute path, or empty for the image's own, got {self.workdir!r}")
        if not re.fullmatch(r"[\w.-]+(:[\w.-]+)?", self.user or "root"):
            raise ValueError(f'user must be a user name, "uid" or "uid:gid", got {self.user!r}')
        if wrong := [path for path in self.volumes if not re.fullmatch(r"(/[^/\0:]+)+", path)]:
            raise ValueError(f"volumes must have absolute paths, got {wrong[0]!r}")


@dataclass(frozen=True, slots=True)
class ExecRequest:
    """Arguments of `Environment.exec` as a backend gets them: checked, except for options that only some backends
    have."""

    argv: list[str]
    stdin: str | bytes
    cwd: str
    """An absolute path; links are not resolved."""
    env: dict[str, str]
    """Variables of the spec and of the call."""
    user: str | None
    timeout_s: float | None
    max_output_bytes: int
    on_chunk: OnChunk | None = None
    """Called in the event loop with bytes from the first half of what is kept of a stream, in order, while the command
    runs. A backend may call it late or never, but not after `_exec` has returned."""


class Environment(ABC):
    """An open sandbox: run commands in it, move files in and out, close it.

    Open one with `agentkit_environments.open_environment` and use it as an async context manager: leaving the block
    always kills every process and removes every file. All methods may be called concurrently. Every method raises
    `SandboxLostError` if the sandbox has died or was closed, and then never returns a result.

    Paths are POSIX paths as the sandbox sees them; relative ones start at `spec.workdir`. Links are followed inside the
    sandbox and cannot lead out of it. Only `spec.workdir` and `/tmp` are writable, unless `spec.as_image`; writing
    elsewhere raises an `OSError` (EROFS or EACCES).
    """

    spec: EnvironmentSpec
    backend: Backend
    run_id: str
    """Label of everything that this environment makes; `reap(run_id)` removes its leftovers."""
    phase: Phase = "setup"
    """The phase whose network commands have."""
    _proxy: Proxy | None = None

    async def enter_phase(self, phase: Phase) -> None:
        """Give commands, also those that are running, the network of another phase. Open connections end.

        An `Agent` whose environment is in the phase `setup` enters `agent` by itself.

        Raises:
            ValueError: If there is no such phase.
            SandboxLostError: If the network cannot be changed because the sandbox is gone.
        """
        if phase not in PHASES:
            raise ValueError(f"phase must be one of {', '.join(PHASES)}, got {phase!r}")
        if phase != self.phase:
            await self._enter_phase(phase)
            self.phase = phase

    def refusals(self) -> list[str]:
        """Return one line for each destination that the allowlist kept commands from, with the phase and the reason."""
        return [] if self._proxy is None else self._proxy.refusals()

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
        on_output: OnOutput | None = None,
    ) -> ExecResult:
        """Run one command until it exits.

        The command runs in a session and process group of its own. Its background processes live on until `kill_all` or
        `close`, but their output after the command's exit is discarded. When the caller is cancelled, the command and
        everything it started are killed before the cancellation continues.

        Args:
            command: A string for `/bin/sh -c`, or the program and its arguments. As in a shell, the exit code is 127 if
                the program does not exist, and 126 if it cannot be executed or cannot start in `cwd`.
            stdin: Bytes for standard input, followed by end of file; text is encoded as UTF-8. At most
                `MAX_STDIN_BYTES`.
            cwd: Directory to start in; `spec.workdir` by default.
            env: Variables in addition to `spec.env`; they override it.
            user: A user name or `uid[:gid]`; by default the environment's ordinary user. Docker only.
            timeout_s: Seconds until the command and everything it started are killed; None means no timeout.
            max_output_bytes: Bytes kept of each of stdout and stderr, half from the start and half from the end. The
                rest is read and discarded, so memory stays bounded.
            on_output: Called with the stream (`"stdout"` or `"stderr"`) and text, in the event loop, about 50 ms after
                the command has written it. All texts of a stream together are its text in the result: if the output is
                cut, the half from the start comes while the command runs, and the rest at its end. If it raises, the
                command is killed and `exec` raises the exception.

        Raises:
            SandboxLostError: If the sandbox died before the command ended.
            NotADirectoryError, FileNotFoundError: If `cwd` is not a directory.
            ValueError: If an argument is malformed, `stdin` is too large, or the backend has no such `user`.
        """
        request = ExecRequest(
            argv=exec_argv(command),
            stdin=stdin,
            cwd=self.resolve(cwd) if cwd else self.spec.workdir,
            env=exec_variables(self.spec.env, env),
            user=user,
            timeout_s=timeout_s,
            max_output_bytes=max_output_bytes,
        )
        if on_output is None:
            return await self._exec(request)
        live = LiveOutput(on_output)
        result: ExecResult | None = None
        with live.scope:
            result = await self._exec(replace(request, on_chunk=live.chunk))
        if live.error is not None:
            raise live.error
        assert result is not None
        live.complete(result)
        return result

    async def read_file(self, path: str, *, max_bytes: int = 16 << 20) -> bytes:
        """Return the content of a regular file.

        Raises:
            FileTooLargeError: If the file has more than `max_bytes` bytes.
            FileNotFoundError: If there is no such file.
            IsADirectoryError: If it is a directory.
            OSError: If it is not a regular file (a pipe, a device), or cannot be read.
            UnsafePathError: If `path` is empty, contains a NUL byte or a lone surrogate, or is a loop of links.
            SandboxLostError: If the sandbox is gone.
        """
        return await self._transfer("read_file", path, max_bytes=max_bytes)

    async def write_file(self, path: str, data: str | bytes) -> None:
        """Write a regular file (mode 0644 when new) and replace its content. Missing parent directories are made.

        Args:
            path: The file to write.
            data: At most `MAX_STDIN_BYTES`; text is encoded as UTF-8.

        Raises:
            IsADirectoryError: If `path` is a directory.
            NotADirectoryError: If a parent is a file.
            OSError: If the location is read-only (EROFS, EACCES), the disk is full (ENOSPC), the file would exceed
                `limits.file_size_mib` (EFBIG), or `path` is not a regular file.
            ValueError: If there is too much data.
            UnsafePathError, SandboxLostError: See `read_file`.
        """
        await self._transfer("write_file", path, input_bytes(data))

    async def export_dir(self, path: str, *, max_entries: int | None = None) -> ExportedDir:
        """Return a directory as an uncompressed tar archive with names relative to the directory.

        The archive contains directories, regular files and links that stay inside it, in sorted order, with permission
        bits and modification times and without owners. It passes `archive.check_archive`. Other entries are left out
        and listed in `ExportedDir.dropped`: pipes, sockets and devices (a container engine leaves sockets out
        silently), links that lead out or form a loop, and names that are too long or too deep. Entries and bytes are
        counted before anything is read, or as they arrive.

        Raises:
            UnsafeArchiveError: If the directory has more than `max_entries` (by default `MAX_ARCHIVE_ENTRIES`) entries
                or more than `MAX_ARCHIVE_BYTES` bytes of files and names, or cannot be archived.
            FileNotFoundError, NotADirectoryError: If `path` is not a directory.
            UnsafePathError, SandboxLostError: See `read_file`.
        """
        bounds = {"max_entries": max_entries or MAX_ARCHIVE_ENTRIES, "max_bytes": MAX_ARCHIVE_BYTES}
        try:
            exported = await self._export_dir(self.resolve(path), **bounds)
        except OSError as error:
            if error.errno in (errno.EFBIG, errno.EINVAL, errno.ENOMEM):
                raise UnsafeArchiveError(f"{path}: {error.strerror}") from error
            raise _named(error, path) from error
        return await anyio.to_thread.run_sync(partial(drop_links, exported.data, exported.dropped, **bounds))

    async def import_dir(self, path: str, archive: bytes) -> None:
        """Unpack an uncompressed tar archive into a directory, which is made if missing.

        The archive's files and links replace existing files and links of the same name; everything else stays. Existing
        links are never followed. The owner of a directory can always enter and write it, even if the archive's mode
        forbids it. After an error other than `UnsafeArchiveError`, part of the archive may have been unpacked.

        Raises:
            UnsafeArchiveError: If the archive breaks a rule of `archive.check_archive`; nothing was unpacked.
            FileExistsError: If a directory exists where the archive has a file or link, or a file or link where it has
                a directory; the existing entry stays as it is.
            NotADirectoryError: If `path` or a parent of it is a file.
            OSError: If the location is read-only (EROFS, EACCES) or full (ENOSPC).
            UnsafePathError, SandboxLostError: See `read_file`.
        """
        members = await anyio.to_thread.run_sync(check_archive, archive)
        try:
            await self._import_dir(self.resolve(path), archive, members)
        except OSError as error:
            raise _named(error, path) from error

    async def snapshot(self) -> Snapshot:
        """Return the files of the work directory and /tmp as they are now; all changed files of a sandbox `as_image`.

        Processes are not part of a snapshot. A file that one of them is changing meanwhile may be captured in any
        state; call `kill_all` first if that matters. The environment goes on as before.

        Raises:
            SnapshotError: If there are too many entries, or more than `limits.disk_mib` of files in each directory, or
                if the work directory is an overlay. For a sandbox `as_image`: if more than twice `limits.disk_mib` was
                written, if the image has volumes or there are services beside it, or if the engine is Podman.
            SandboxLostError: If the sandbox is gone.
        """
        with TemporaryFile() as file:
            bounds = {"max_entries": MAX_ENTRIES, "max_bytes": (2 * self.spec.limits.disk_mib << 20) + SLACK_BYTES}
            try:
                await self._pack(file, **bounds)
            except OSError as error:
                raise SnapshotError(f"the files of the environment cannot be captured: {error.strerror}") from error
            file.flush()
            return await anyio.to_thread.run_sync(Snapshot, file.fileno())

    @abstractmethod
    async def reopen(self, snapshot: Snapshot) -> Environment:
        """Open another environment like this one, with the files of a snapshot; this one may be closed already.

        Raises:
            SnapshotError: If the snapshot was closed, or its files do not fit into the environment.
            SandboxUnavailableError: See `open_environment`.
        """

    @asynccontextmanager
    async def fork(self, n: int = 1) -> AsyncIterator[list[Environment]]:
        """Open `n` environments that begin with the files of this one, and close them when the block is left.

        They are independent: a change in one is visible neither here nor in the others. Processes are not forked.

        Raises:
            ValueError: If `n` is negative.
            SnapshotError, SandboxUnavailableError, SandboxLostError: See `snapshot` and `reopen`.
        """
        if n < 0:
            raise ValueError(f"fork(n) takes at least 0, got {n}")
        snapshot = await self.snapshot()
        forks: dict[int, Environment] = {}
        limiter = anyio.CapacityLimiter(OPENED_AT_ONCE)

        async def open_one(index: int) -> None:
            async with limiter:
                forks[index] = await self.reopen(snapshot)

        try:
            try:
                async with anyio.create_task_group() as task_group:
                    for index in range(n):
                        task_group.start_soon(open_one, index)
            except ExceptionGroup as group:
                raise group.exceptions[0] from None
            finally:
                snapshot.close()
            yield [forks[index] for index in range(n)]
        finally:
            with anyio.CancelScope(shield=True):
                async with anyio.create_task_group() as task_group:
                    for fork in forks.values():
                        task_group.start_soon(fork.close)

    @abstractmethod
    async def kill_all(self) -> None:
        """Kill every process that commands have started. All are dead on return; their files stay as they are.

        Raises:
            SandboxLostError: If the sandbox is gone, or a process cannot be killed.
        """

    async def _enter_phase(self, phase: Phase) -> None:
        if self._proxy is not None:
            await anyio.to_thread.run_sync(self._proxy.enter, phase)

    async def _in_this_phase(self, opening: Awaitable[E]) -> E:
        """Return another environment, in the phase of this one."""
        environment = await opening
        try:
            await environment.enter_phase(self.phase)
        except BaseException:
            await environment.close()
            raise
        return environment

    async def _serve_proxy(self, listener: socket.socket | None) -> None:
        """Start a proxy at a listening socket of the sandbox, if there is one."""
        if listener is not None:
            with anyio.CancelScope(shield=True):
                self._proxy = await anyio.to_thread.run_sync(Proxy, listener, self.spec.network)

    async def _close_proxy(self) -> None:
        if self._proxy is not None:
            await anyio.to_thread.run_sync(self._proxy.close)

    @property
    def _proxy_variables(self) -> Mapping[str, str]:
        """Variables that send the clients of commands to the proxy, unless they have a network of their own."""
        return {} if self._proxy is None or self.spec.network.policy(self.phase) == "public" else VARIABLES

    @abstractmethod
    async def close(self) -> None:
        """Kill every process and remove every file. Safe to call twice; shielded from cancellation."""

    @abstractmethod
    async def _exec(self, request: ExecRequest) -> ExecResult:
        """Run `exec` with checked arguments. Raises ValueError for a `user` that the backend does not have."""

    @abstractmethod
    async def _file(self, operation: FileOperation, path: str, body: bytes = b"", **bounds: int) -> bytes:
        """Do one operation on an absolute path and return its bytes, if any.

        Raises:
            OSError: The file system's error, with a path of the sandbox; EFBIG if `bounds` were exceeded.
        """

    @abstractmethod
    async def _export_dir(self, path: str, *, max_entries: int, max_bytes: int) -> ExportedDir:
        """Pack a directory by its absolute path; links are kept as they are.

        Raises:
            OSError: The file system's error; EFBIG if there is too much, before all of it is in memory.
            UnsafeArchiveError: If it cannot be archived.
        """

    @abstractmethod
    async def _import_dir(self, path: str, archive: bytes, members: Sequence[TarInfo]) -> None:
        """Unpack an archive with the entries `members` into a directory by its absolute path.

        Raises:
            OSError: The file system's error, with a path of the sandbox.
        """

    @abstractmethod
    async def _pack(self, file: IO[bytes], *, max_entries: int, max_bytes: int) -> None:
        """Write the work directory and /tmp to a file in the format of `tree`.

        Raises:
            OSError: The file system's error; EFBIG if there is too much.
        """

    async def _transfer(self, operation: FileOperation, path: str, body: bytes = b"", **bounds: int) -> bytes:
        """Do one operation, and raise this package's errors where `OSError` has no equivalent."""
        try:
            return await self._file(operation, self.resolve(path), body, **bounds)
        except OSError as error:
            if operation == "read_file" and error.errno == errno.EFBIG:
                raise FileTooLargeError(f"{path} has more than {bounds['max_bytes']} bytes") from error
            raise _named(error, path) from error

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    def resolve(self, path: str) -> str:
        """Return `path` as an absolute path of the sandbox; links are not resolved.

        Raises:
            UnsafePathError: If it is empty or contains a NUL byte or a lone surrogate.
        """
        if not path or not _is_plain(path):
            raise UnsafePathError(f"a path must be non-empty text without NUL bytes and lone surrogates, got {path!r}")
        return posixpath.join(self.spec.workdir, path)


def _named(error: OSError, path: str) -> OSError | UnsafePathError:
    """Return the error to raise: `UnsafePathError` for a loop of links, else `error`."""
    return UnsafePathError(f"{path} is a loop of links") if error.errno == errno.ELOOP else error


def exec_argv(command: str | Sequence[str]) -> list[str]:
    """Return the argument vector for `Environment.exec`'s command.

    Raises:
        ValueError: If the command is empty or contains a NUL byte or a lone surrogate.
    """
    argv = ["/bin/sh", "-c", command] if isinstance(command, str) else list(command)
    if not argv or not argv[0] or not all(map(_is_plain, argv)):
        raise ValueError(f"command must be non-empty text without NUL bytes and lone surrogates, got {command!r}")
    return argv


def exec_variables(*layers: Mapping[str, str] | None) -> dict[str, str]:
    """Return the variables for `Environment.exec`; a later layer overrides an earlier one.

    Raises:
        TypeError: If a name or a value is not text.
        ValueError: If a name is empty or contains `=`, or a name or value contains a NUL byte or a lone surrogate.
    """
    variables = {name: value for layer in layers if layer for name, value in layer.items()}
    for name, value in variables.items():
        if not isinstance(name, str) or not isinstance(value, str):
            raise TypeError(f"env must map texts to texts, got {name!r}: {value!r}")
        if not name or "=" in name or not _is_plain(name + value):
            raise ValueError(f"env must have plain names and values, got {name!r}: {value!r}")
    return variables


def _is_plain(text: str) -> bool:
    """Return whether text can be an argument or a path: it has no NUL byte and can be encoded as UTF-8."""
    try:
        return b"\0" not in text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        return False


def input_bytes(data: str | bytes) -> bytes:
    """Return text as UTF-8 bytes, and bytes unchanged.

    Raises:
        ValueError: If there are more than `MAX_STDIN_BYTES`, or text contains a lone surrogate.
    """
    raw = data.encode("utf-8", "surrogateescape") if isinstance(data, str) else data
    if len(raw) > MAX_STDIN_BYTES:
        raise ValueError(f"at most {MAX_STDIN_BYTES} bytes can be passed at once, got {len(raw)}")
    return raw
