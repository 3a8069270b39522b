"""`unsafe-local`: a temporary directory without isolation, for trusted commands that must start fast.

Commands run as the harness's own user, with its files and its network. There is no mount namespace, so the names
`spec.workdir` and `/tmp` are translated: to the temporary directory in paths, commands, text on standard input and
variables, and back in output. The content of files is not translated; in a snapshot, the targets of links are. Only
limits on time and output apply.
"""

from __future__ import annotations

import errno
import os
import re
import secrets
import select
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from tarfile import TarInfo
from typing import IO, Self, TypeVar

import anyio
import anyio.to_thread

from agentkit_environments import executor, tree
from agentkit_environments.archive import ExportedDir, pieces
from agentkit_environments.environment import (
    Environment,
    EnvironmentSpec,
    ExecRequest,
    ExecResult,
    FileOperation,
    input_bytes,
)
from agentkit_environments.errors import SandboxLostError, SandboxUnavailableError, SnapshotError
from agentkit_environments.leftovers import OWNER_FILE, PREFIX, remove_tree
from agentkit_environments.live_output import CHUNK_EVERY_S, OnChunk, OutputStream
from agentkit_environments.owner import owner_token
from agentkit_environments.snapshot import Snapshot
from agentkit_environments.threads import run_cancellable

T = TypeVar("T")


class LocalEnvironment(Environment):
    """A temporary directory on this machine. Not a sandbox: see the module's docstring."""

    backend = "unsafe-local"

    def __init__(self, spec: EnvironmentSpec, run_id: str) -> None:
        if spec.image is not None:
            raise SandboxUnavailableError(f"image {spec.image!r} needs the docker backend, not unsafe-local")
        if spec.network.has_allowlist:
            raise SandboxUnavailableError(
                "a network allowlist needs the docker or the process backend; unsafe-local has the host's network"
            )
        self.spec, self.run_id = spec, run_id
        self._root = Path(tempfile.mkdtemp(prefix=PREFIX)).resolve()
        (self._root / OWNER_FILE).write_text(f"{owner_token()}\n{run_id}\n")
        self._directories = {spec.workdir: str(self._root / "work"), "/tmp": str(self._root / "tmp")}
        for directory in self._directories.values():
            os.mkdir(directory)
        names = "|".join(re.escape(name) for name in self._directories)
        self._name_in_text = re.compile(rf"(?<![\w./}})~*-])(?:{names})(?![\w.-])")
        hosts = "|".join(re.escape(directory) for directory in self._directories.values())
        self._host_name = re.compile(hosts.encode())
        self._names_of_host = {directory.encode(): name.encode() for name, directory in self._directories.items()}
        self._env = {
            "PATH": f"{Path(sys.executable).parent}:{os.environ.get('PATH', os.defpath)}",
            "HOME": self._directories[spec.workdir],
            "TMPDIR": self._directories["/tmp"],
            "LANG": "C.UTF-8",
            "AGENTKIT_ENVIRONMENT": self._root.name,
        }
        self._limiter = anyio.CapacityLimiter(256)
        self._has_run = self._closed = False

    @classmethod
    async def open(cls, spec: EnvironmentSpec, run_id: str, *, snapshot: Snapshot | None = None) -> Self:
        """Make the directory, with the files of a snapshot if one is given.

        Raises:
            SandboxUnavailableError: If `spec` requests an image or a network allowlist.
            SnapshotError: If the snapshot cannot be restored.
        """
        environment = cls(spec, run_id)
        if snapshot is not None:
            try:
                await anyio.to_thread.run_sync(environment._restore, snapshot)
            except BaseException:
                await environment.close()
                raise
        return environment

    def _restore(self, snapshot: Snapshot) -> None:
        try:
            with snapshot.descriptor() as fd:
                tree.unpack(fd, self._trees, retarget=self._to_host)
        except OSError as error:
            raise SnapshotError(f"the snapshot cannot be restored: {error.strerror}") from error

    async def reopen(self, snapshot: Snapshot) -> LocalEnvironment:
        return await self.open(self.spec, self.run_id, snapshot=snapshot)

    async def _pack(self, file: IO[bytes], *, max_entries: int, max_bytes: int) -> None:
        self._require_open()

        def pack() -> None:
            packer = tree.TreePacker(self._trees, max_entries, max_bytes, retarget=self._link_to_sandbox)
            try:
                file.writelines(iter(packer.piece, b""))
            finally:
                packer.close()

        await anyio.to_thread.run_sync(pack, limiter=self._limiter)

    @property
    def _trees(self) -> dict[str, str]:
        return {tree.WORK: self._directories[self.spec.workdir], tree.TMP: self._directories["/tmp"]}

    def _link_to_sandbox(self, target: str) -> str:
        return os.fsdecode(self._name_output(os.fsencode(target)))

    async def _exec(self, request: ExecRequest) -> ExecResult:
        if request.user is not None:
            raise ValueError(
                f"unsafe-local runs everything as its own user; user={request.user!r} needs the docker backend"
            )
        argv = [self._to_host(argument) for argument in request.argv]
        stdin = input_bytes(self._to_host(request.stdin) if isinstance(request.stdin, str) else request.stdin)
        directory = self._path(request.cwd)
        env = {**self._env, **{name: self._to_host(value) for name, value in request.env.items()}}
        self._has_run = True
        commands: list[executor.Command] = []

        def run(cancel_fd: int) -> ExecResult:
            try:
                executor.require_directory(directory)
            except PermissionError:
                pass  # the command gets the same error and fails
            except OSError as error:
                raise self._in_sandbox(error, request.cwd) from error
            try:
                running = _start(argv, stdin, directory, env, request)
            except OSError as error:
                exit_code, message = executor.start_failure(error, argv)
                return ExecResult(exit_code, "", self._to_sandbox(os.fsencode(message)), False, False, 0.0)
            commands.append(running)
            try:
                _run_to_end(running, cancel_fd)
            except TimeoutError as error:
                raise SandboxLostError(f"unsafe-local: {error.strerror}") from error
            finally:
                running.close()
            assert running.exit_code is not None
            return ExecResult(
                exit_code=running.exit_code,
                stdout=self._to_sandbox(running.stdout.value()),
                stderr=self._to_sandbox(running.stderr.value()),
                truncated=running.stdout.truncated or running.stderr.truncated,
                timed_out=running.timed_out,
                duration_s=running.duration_s,
            )

        if (on_chunk := request.on_chunk) is None:
            return await run_cancellable(run, self._limiter)
        return await run_cancellable(run, self._limiter, lambda: self._pass_on(commands, on_chunk))

    async def _pass_on(self, commands: Sequence[executor.Command], on_chunk: OnChunk) -> None:
        """Pass the output of a command on, which a thread has appended to `commands`."""
        held: dict[OutputStream, bytes] = {"stdout": b"", "stderr": b""}
        while True:
            await anyio.sleep(CHUNK_EVERY_S)
            for command in commands:
                for stream, output in zip(held, (command.stdout, command.stderr), strict=True):
                    data = held[stream] + output.take(executor.CHUNK)
                    end = self._end_of_names(data)
                    held[stream] = data[end:]
                    on_chunk(stream, self._name_output(data[:end]))

    def _end_of_names(self, data: bytes) -> int:
        """Return the end of the part of some output in which no name of a directory is incomplete."""
        complete = max((match.end() for match in self._host_name.finditer(data)), default=0)
        longest = max(map(len, self._names_of_host))
        for start in range(max(complete, len(data) - longest), len(data)):
            if any(name.startswith(data[start:]) for name in self._names_of_host):
                return start
        return len(data)

    async def _file(self, operation: FileOperation, path: str, body: bytes = b"", **bounds: int) -> bytes:
        operate = executor.OPERATIONS[operation]
        request = {"path": self._path(path, writing=operation == "write_file"), **bounds}
        return await self._in_thread(lambda: operate(request, body), path)

    async def _export_dir(self, path: str, *, max_entries: int, max_bytes: int) -> ExportedDir:
        directory = self._path(path)

        def pack() -> ExportedDir:
            packer = executor.Packer(directory, max_entries, max_bytes)
            return ExportedDir(b"".join(iter(packer.piece, b"")), packer.drops.lines)

        return await self._in_thread(pack, path)

    async def _import_dir(self, path: str, archive: bytes, members: Sequence[TarInfo]) -> None:
        directory = self._path(path, writing=True)

        def unpack() -> None:
            for entries, content in pieces(archive, members):
                executor.unpack(directory, entries, content)

        await self._in_thread(unpack, path)

    async def _in_thread(self, function: Callable[[], T], path: str) -> T:
        try:
            return await anyio.to_thread.run_sync(function, limiter=self._limiter)
        except OSError as error:
            raise self._in_sandbox(error, path) from error

    async def kill_all(self) -> None:
        self._require_open()
        await anyio.to_thread.run_sync(self._kill, limiter=self._limiter)

    async def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        with anyio.CancelScope(shield=True):
            if self._has_run:
                await anyio.to_thread.run_sync(self._kill, limiter=self._limiter)
            remove_tree(self._root)

    def _kill(self) -> None:
        try:
            executor.kill_processes(cookie=self._root.name)
        except TimeoutError as error:
            raise SandboxLostError(f"unsafe-local: {error.strerror}") from error

    def _require_open(self) -> None:
        if self._closed:
            raise SandboxLostError("this unsafe-local environment was closed; open another one")

    def _path(self, path: str, *, writing: bool = False) -> str:
        """Return the host's path for a sandbox path; refuse to write outside the environment's own directories."""
        self._require_open()
        absolute = os.path.normpath(self.resolve(path))
        for name, directory in self._directories.items():
            if absolute == name or absolute.startswith(name + "/"):
                return directory + absolute[len(name) :]
        if writing:
            raise OSError(errno.EROFS, f"only {self.spec.workdir} and /tmp can be written", path)
        return absolute

    def _to_host(self, text: str) -> str:
        return self._name_in_text.sub(lambda match: self._directories[match[0]], text)

    def _to_sandbox(self, output: bytes) -> str:
        return self._name_output(output).decode("utf-8", "replace")

    def _name_output(self, output: bytes) -> bytes:
        return self._host_name.sub(lambda match: self._names_of_host[match[0]], output)

    def _in_sandbox(self, error: OSError, path: str) -> OSError:
        name = self._to_sandbox(os.fsencode(error.filename)) if error.filename else path
        return OSError(error.errno, error.strerror, name)


def _start(
    argv: list[str], stdin: bytes, directory: str, env: dict[str, str], request: ExecRequest
) -> executor.Command:
    """Start a command in a session of its own. Raises OSError if it cannot be started."""
    cookie = secrets.token_hex(12)
    ends: list[int] = []
    near: list[int] = []
    try:
        for _ in range(3):
            ends += os.pipe2(os.O_CLOEXEC)
        near = [ends[1], ends[2], ends[4]]
        process = subprocess.Popen(
            argv,
            stdin=ends[0] if stdin else subprocess.DEVNULL,
            stdout=ends[3],
            stderr=ends[5],
            cwd=directory,
            env={**env, executor.COOKIE: cookie},
            start_new_session=True,
        )
    except BaseException:
        for fd in near:
            os.close(fd)
        raise
    finally:
        for fd in set(ends) - set(near):
            os.close(fd)
    process.returncode = 0  # the command waits for the process, so this object must not
    return executor.Command(
        process.pid,
        pipes=near,
        stdin=[stdin],
        cookie=cookie,
        timeout_s=request.timeout_s,
        max_output_bytes=request.max_output_bytes,
    )


def _run_to_end(command: executor.Command, cancel_fd: int) -> None:
    """Move the command's pipes until it exits; kill it at its deadline, or when `cancel_fd` becomes readable."""
    exited_fd = os.pidfd_open(command.pid)
    try:
        poll = select.poll()
        poll.register(exited_fd, select.POLLIN)
        poll.register(cancel_fd, select.POLLIN)
        pipes = command.descriptors()
        for fd, events in pipes.items():
            poll.register(fd, events)
        while not command.poll():
            remaining_s = command.deadline - time.monotonic()
            if remaining_s <= 0:
                command.timed_out, command.deadline = True, float("inf")
                command.kill()
                continue
            timeout_ms = None if command.deadline == float("inf") else remaining_s * 1000 + 1
            for fd, _ in poll.poll(timeout_ms):
                if fd == cancel_fd:
                    poll.unregister(cancel_fd)
                    command.kill()
                elif fd in pipes and not command.on_ready(fd):
                    poll.unregister(fd)
                    del pipes[fd]
    finally:
        os.close(exited_fd)
