"""`DockerEnvironment`: the contract, kept by one container. Calls of the `docker` library block; each has a thread."""

from __future__ import annotations

import errno
import os
import secrets
import time
from typing import Self

import anyio
import anyio.lowlevel
import anyio.to_thread

from agentkit_environments.docker.container import Container
from agentkit_environments.docker.exec_stream import KILL_TIMEOUT_S, ExecStream
from agentkit_environments.docker.files import Files
from agentkit_environments.docker.hardening import AGENT_USER
from agentkit_environments.docker.killing import KILL_COMMAND, KILL_USER
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


class DockerEnvironment(Environment):
    """One hardened container. See the package's docstring for who does what."""

    backend = "docker"

    def __init__(self, spec: EnvironmentSpec, run_id: str, container: Container) -> None:
        self.spec, self.run_id = spec, run_id
        self._container, self._files = container, Files(container)
        self._env = {"HOME": spec.workdir, "LANG": "C.UTF-8"}
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
        started: list[Container] = []

        def start() -> None:
            started.append(Container(spec, run_id))

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

    async def _exec(self, request: ExecRequest) -> ExecResult:
        data = input_bytes(request.stdin)
        self._require_open()
        self._users.add(request.user or AGENT_USER)

        def run(cancel_fd: int) -> ExecResult:
            return self._container.guard(lambda: self._run(request, data, cancel_fd))

        return await run_cancellable(run, self._limiter)

    def _run(self, request: ExecRequest, stdin: bytes, cancel_fd: int) -> ExecResult:
        if request.cwd != self.spec.workdir and not self._files.stat(request.cwd).is_dir:
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), request.cwd)
        # Through a shell, for its exit codes 126 and 127 for what cannot be started.
        argv = ["/bin/sh", "-c", 'exec "$0" "$@"', *request.argv]
        user, cookie = request.user or AGENT_USER, secrets.token_hex(12)
        env = {**self._env, **request.env, COOKIE: cookie}
        started = time.monotonic()
        container = self._container
        with ExecStream(
            container.api, container.id, argv, stdin, request.cwd, env, user, request.max_output_bytes
        ) as stream:
            deadline = float("inf") if request.timeout_s is None else started + request.timeout_s
            ended = stream.pump(deadline, cancel_fd)
            if not ended:
                container.run_script(KILL_COMMAND, [cookie], user)
                stream.pump(time.monotonic() + KILL_TIMEOUT_S, None)
            exit_code = stream.exit_code()
        if ended and exit_code == 137:
            # The command was killed, or the whole container was and the engine has not noticed yet: only a
            # container whose init is alive can run another command.
            container.require_running()
            if container.run_script(":", [], user) != 0:
                raise SandboxLostError(f"{container} was killed")
        return ExecResult(
            exit_code=exit_code if ended else 137,
            stdout=stream.stdout.value().decode("utf-8", "replace"),
            stderr=stream.stderr.value().decode("utf-8", "replace"),
            truncated=stream.stdout.truncated or stream.stderr.truncated,
            timed_out=not ended,
            duration_s=time.monotonic() - started,
        )

    async def _file(self, operation: FileOperation, path: str, body: bytes = b"", **bounds: int) -> bytes:
        if operation == "write_file" and len(body) > self.spec.limits.file_size_mib << 20:
            raise OSError(errno.EFBIG, os.strerror(errno.EFBIG), path)

        def operate() -> bytes:
            match operation:
                case "read_file":
                    return self._files.read_file(path, bounds["max_bytes"])
                case "export_dir":
                    return self._files.export_dir(path)
                case "write_file":
                    self._files.write_file(path, body)
                case "import_dir":
                    self._files.import_dir(path, body)
            return b""

        self._require_open()
        return await anyio.to_thread.run_sync(self._container.guard, operate, limiter=self._limiter)

    async def kill_all(self) -> None:
        def kill() -> None:
            for user in sorted(self._users):
                if self._container.run_script(KILL_USER, [], user) != 0:
                    raise SandboxLostError(f"{self._container}: processes of {user} would not die")

        self._require_open()
        await anyio.to_thread.run_sync(self._container.guard, kill, limiter=self._limiter)

    async def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        with anyio.CancelScope(shield=True):
            await anyio.to_thread.run_sync(self._container.remove, limiter=self._limiter)

    def _require_open(self) -> None:
        if self._closed:
            raise SandboxLostError("this docker environment was closed; open another one")
