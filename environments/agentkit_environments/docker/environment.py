"""`DockerEnvironment`: the contract, implemented by one container. Calls of the blocking `docker` library run in
threads."""

from __future__ import annotations

import errno
import os
import secrets
import time
from collections.abc import Callable, Sequence
from tarfile import TarInfo
from typing import Self, TypeVar

import anyio
import anyio.lowlevel
import anyio.to_thread

from agentkit_environments.archive import ExportedDir
from agentkit_environments.docker.container import Container
from agentkit_environments.docker.exec_stream import KILLED, ExecStream
from agentkit_environments.docker.files import Files
from agentkit_environments.docker.hardening import AGENT_USER
from agentkit_environments.environment import (
    Environment,
    EnvironmentSpec,
    ExecRequest,
    ExecResult,
    FileOperation,
    input_bytes,
)
from agentkit_environments.errors import SandboxLostError
from agentkit_environments.executor import COOKIE
from agentkit_environments.threads import run_cancellable

# The command's user enters the work directory, and may lack the permission for it. When memory runs out, the kernel
# kills a command before the container's first program. `exec` exits with 126 or 127 if the program cannot be started.
START = 'cd "$1" || exit 126; shift; { echo 1000 >/proc/self/oom_score_adj; } 2>/dev/null; exec "$@"'

ENGINE_COULD_NOT = b"OCI runtime exec failed"
"""Start of the message that the engine prints instead of the command's output, for instance at the process limit."""

T = TypeVar("T")


class DockerEnvironment(Environment):
    """One hardened container. The package's docstring lists the parts."""

    backend = "docker"

    def __init__(self, spec: EnvironmentSpec, run_id: str, container: Container) -> None:
        self.spec, self.run_id = spec, run_id
        self._container, self._files = container, Files(container)
        self._env = {"HOME": spec.workdir, "LANG": "C.UTF-8"}
        self._limiter = anyio.CapacityLimiter(256)
        self._closed = False

    @classmethod
    async def open(cls, spec: EnvironmentSpec, run_id: str) -> Self:
        """Start a container.

        Raises:
            SandboxUnavailableError: If no engine answers, the image is missing and cannot be pulled, the engine
                refuses the container, or the image's files do not fit into the work directory.
        """
        started: list[Container] = []

        def start() -> None:
            container = Container(spec, run_id)
            started.append(container)
            if spec.workdir_from_image:
                Files(container).copy_from_image(str(spec.image), spec.workdir, run_id)

        try:
            # Not abandoned on cancellation, so that a container that was started is known and removed.
            await anyio.to_thread.run_sync(start)
            await anyio.lowlevel.checkpoint_if_cancelled()
        except BaseException:
            with anyio.CancelScope(shield=True):
                for container in started:
                    await anyio.to_thread.run_sync(container.remove)
            raise
        return cls(spec, run_id, started[0])

    async def _exec(self, request: ExecRequest) -> ExecResult:
        data = input_bytes(request.stdin)
        self._require_open()

        def run(cancel_fd: int) -> ExecResult:
            return self._container.guard(lambda: self._run(request, data, cancel_fd))

        return await run_cancellable(run, self._limiter)

    def _run(self, request: ExecRequest, stdin: bytes, cancel_fd: int) -> ExecResult:
        if request.cwd != self.spec.workdir and not self._files.stat(request.cwd).is_dir:
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), request.cwd)
        argv = ["/bin/sh", "-c", START, "sh", request.cwd, *request.argv]
        user, cookie = request.user or AGENT_USER, secrets.token_hex(12)
        env = {**self._env, **request.env, COOKIE: cookie}
        started = time.monotonic()
        deadline = float("inf") if request.timeout_s is None else started + request.timeout_s
        container = self._container
        with ExecStream(container.api, container.id, argv, stdin, "/", env, user, request.max_output_bytes) as stream:
            exit_code = stream.exit_code(deadline, cancel_fd) if stream.pump(deadline, cancel_fd) else None
            if exit_code is None:
                container.kill_command(cookie, user, stream)
        stdout, stderr = stream.stdout.value(), stream.stderr.value()
        if exit_code and stdout.startswith(ENGINE_COULD_NOT):
            stdout, stderr = b"", request.argv[0].encode("utf-8", "surrogateescape") + b": cannot start: " + stdout
        if exit_code == KILLED:
            container.require_running()  # either the command was killed or the whole container
        return ExecResult(
            exit_code=KILLED if exit_code is None else exit_code,
            stdout=stdout.decode("utf-8", "replace"),
            stderr=stderr.decode("utf-8", "replace"),
            truncated=stream.stdout.truncated or stream.stderr.truncated,
            timed_out=exit_code is None,
            duration_s=time.monotonic() - started,
        )

    async def _file(self, operation: FileOperation, path: str, body: bytes = b"", **bounds: int) -> bytes:
        if operation == "write_file" and len(body) > self.spec.limits.file_size_mib << 20:
            raise OSError(errno.EFBIG, os.strerror(errno.EFBIG), path)

        def operate(cancel_fd: int) -> bytes:
            if operation == "read_file":
                return self._files.read_file(path, bounds["max_bytes"], cancel_fd)
            self._files.write_file(path, body, cancel_fd)
            return b""

        return await self._guarded(operate)

    async def _export_dir(self, path: str, *, max_entries: int, max_bytes: int) -> ExportedDir:
        return await self._guarded(lambda _: self._files.export_dir(path, max_entries, max_bytes))

    async def _import_dir(self, path: str, archive: bytes, members: Sequence[TarInfo]) -> None:
        await self._guarded(lambda _: self._files.import_dir(path, archive))

    async def _guarded(self, function: Callable[[int], T]) -> T:
        self._require_open()
        container = self._container
        return await run_cancellable(lambda cancel_fd: container.guard(lambda: function(cancel_fd)), self._limiter)

    async def kill_all(self) -> None:
        self._require_open()
        container = self._container
        await anyio.to_thread.run_sync(container.guard, container.kill_everything, limiter=self._limiter)

    async def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        with anyio.CancelScope(shield=True):
            await anyio.to_thread.run_sync(self._container.remove, limiter=self._limiter)

    def _require_open(self) -> None:
        if self._closed:
            raise SandboxLostError("this docker environment was closed; open another one")
