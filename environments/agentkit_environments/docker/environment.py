"""`DockerEnvironment`: the contract, implemented by one container and its executor."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from tarfile import TarInfo
from typing import IO, Self, TypeVar

import anyio
import anyio.lowlevel
import anyio.to_thread

from agentkit_environments.archive import ExportedDir
from agentkit_environments.connection import FILE_TIMEOUT_S, START_TIMEOUT_S, Connection
from agentkit_environments.docker import snapshot as snapshots
from agentkit_environments.docker.attachment import AttachedPeer
from agentkit_environments.docker.container import Container
from agentkit_environments.docker.files import Files
from agentkit_environments.docker.users import resolve_user
from agentkit_environments.environment import Environment, EnvironmentSpec, ExecRequest, ExecResult, FileOperation
from agentkit_environments.errors import SandboxLostError, SandboxUnavailableError
from agentkit_environments.snapshot import Snapshot

PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
"""The engine's PATH for an image that sets none."""
USER_FILE_BYTES = 1 << 20

T = TypeVar("T")


class DockerEnvironment(Environment):
    """One hardened container. The package's docstring lists the parts."""

    backend = "docker"

    def __init__(self, spec: EnvironmentSpec, run_id: str, container: Container, connection: Connection) -> None:
        self.spec, self.run_id = spec, run_id
        self._container, self._connection, self._files = container, connection, Files(container)
        self._env = {"PATH": PATH, **container.env, "HOME": spec.workdir, "LANG": "C.UTF-8"}
        self._limiter = anyio.CapacityLimiter(256)
        self._closed = False

    @classmethod
    async def open(cls, spec: EnvironmentSpec, run_id: str, *, snapshot: Snapshot | None = None) -> Self:
        """Start a container, with the files of a snapshot if one is given.

        Raises:
            SnapshotError: If the snapshot cannot be restored.
            SandboxUnavailableError: If no engine answers, the image is missing and cannot be pulled, the engine
                refuses the container, the container does not start, or the image's files do not fit into the work
                directory.
        """
        started: list[Container] = []

        def start() -> None:
            container = Container(spec, run_id)
            started.append(container)
            if snapshot is not None:
                trees = snapshots.trees_of(spec)
                container.guard(lambda: snapshots.restore(container.api, container.id, trees, snapshot))
            elif spec.workdir_from_image:
                Files(container).copy_from_image(str(spec.image), spec.workdir, run_id)

        connection: Connection | None = None
        try:
            # Not abandoned on cancellation, so that a container that was started is known and removed.
            await anyio.to_thread.run_sync(start)
            connection = Connection(AttachedPeer(started[0]))
            with anyio.fail_after(START_TIMEOUT_S):
                await connection.ready()
        except BaseException as error:
            with anyio.CancelScope(shield=True):
                if connection is not None:
                    await connection.close()
                else:
                    for container in started:
                        await anyio.to_thread.run_sync(container.remove)
            if isinstance(error, TimeoutError | SandboxLostError):
                raise SandboxUnavailableError(f"the container did not start: {error}") from error
            raise
        return cls(spec, run_id, started[0], connection)

    async def reopen(self, snapshot: Snapshot) -> DockerEnvironment:
        return await self.open(self.spec, self.run_id, snapshot=snapshot)

    async def _pack(self, file: IO[bytes], *, max_entries: int, max_bytes: int) -> None:
        trees, container = snapshots.trees_of(self.spec), self._container
        bounds = {"max_entries": max_entries, "max_bytes": max_bytes}
        await self._guarded(lambda: snapshots.pack(container.api, container.id, trees, file, **bounds))

    async def _exec(self, request: ExecRequest) -> ExecResult:
        user = None if request.user is None else await self._find_user(request.user)
        return await self._connection.exec(request, {**self._env, **request.env}, user)

    async def _find_user(self, user: str) -> list[str]:
        texts = []
        for path in ("/etc/passwd", "/etc/group"):
            try:
                texts.append(
                    (await self._file("read_file", path, max_bytes=USER_FILE_BYTES)).decode("utf-8", "replace")
                )
            except FileNotFoundError:
                texts.append("")
        return resolve_user(user, *texts)

    async def _file(self, operation: FileOperation, path: str, body: bytes = b"", **bounds: int) -> bytes:
        return (await self._connection.request(operation, {"path": path, **bounds}, body, FILE_TIMEOUT_S))[1]

    async def _export_dir(self, path: str, *, max_entries: int, max_bytes: int) -> ExportedDir:
        return await self._guarded(lambda: self._files.export_dir(path, max_entries, max_bytes))

    async def _import_dir(self, path: str, archive: bytes, members: Sequence[TarInfo]) -> None:
        await self._guarded(lambda: self._files.import_dir(path, archive))

    async def _guarded(self, function: Callable[[], T]) -> T:
        """Run a blocking function that uses the engine in a thread."""
        if self._closed:
            raise SandboxLostError("this docker environment was closed; open another one")
        return await anyio.to_thread.run_sync(self._container.guard, function, limiter=self._limiter)

    async def kill_all(self) -> None:
        await self._connection.kill_all()

    async def close(self) -> None:
        if not self._closed:
            self._closed = True
            await self._connection.close()
