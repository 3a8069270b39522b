"""`DockerEnvironment`: the contract, implemented by one container and its executor."""

from __future__ import annotations

import socket
from collections.abc import Callable, Sequence
from functools import partial
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
from agentkit_environments.docker.hardening import uid_and_gid
from agentkit_environments.docker.image import user_files, with_image_settings
from agentkit_environments.docker.users import home_of, resolve_user
from agentkit_environments.environment import Environment, EnvironmentSpec, ExecRequest, ExecResult, FileOperation
from agentkit_environments.errors import SandboxLostError, SandboxUnavailableError, SnapshotError
from agentkit_environments.network import Phase
from agentkit_environments.snapshot import Snapshot

PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
"""The engine's PATH for an image that sets none."""
USER_FILE_BYTES = 1 << 20
NO_FILES = bytes(1024)
"""An empty archive."""

T = TypeVar("T")


class DockerEnvironment(Environment):
    """One hardened container. The package's docstring lists the parts."""

    backend = "docker"
    services: tuple[str, ...] = ()
    """Names of the services that `open_services` has started beside it."""

    def __init__(self, spec: EnvironmentSpec, run_id: str, container: Container, connection: Connection) -> None:
        self.spec, self.run_id = spec, run_id
        self._container, self._connection = container, connection
        self._files = Files(container, int(uid_and_gid(spec)[0]))
        own = {} if spec.as_image else {"HOME": spec.workdir, "LANG": "C.UTF-8"}
        self._env = {"PATH": PATH, **container.env, **own}
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
        started: list[tuple[EnvironmentSpec, Container]] = []

        def start() -> None:
            settled = with_image_settings(spec) if spec.as_image else spec
            container = Container(settled, run_id)
            started.append((settled, container))
            if snapshot is not None:
                if not spec.as_image:  # else commands must remove files first
                    container.guard(lambda: snapshots.restore(container, spec, snapshot))
            elif spec.workdir_from_image:
                Files(container).copy_from_image(str(spec.image), spec.workdir, run_id)
            elif spec.as_image and container.is_podman:
                Files(container, 0).import_dir(settled.workdir, NO_FILES)  # its builder does not make the WORKDIR

        connection: Connection | None = None
        listener: socket.socket | None = None
        try:
            # Not abandoned on cancellation, so that a container that was started is known and removed.
            await anyio.to_thread.run_sync(start)
            settled, container = started[0]
            connection = Connection(AttachedPeer(container))
            with anyio.fail_after(START_TIMEOUT_S):
                await connection.ready()
            listener = None if container.handover is None else container.handover.receive()
            environment = cls(settled, run_id, container, connection)
            if spec.as_image and snapshot is not None:
                await environment._restore_root(snapshot)
        except BaseException as error:
            if listener is not None:
                listener.close()
            with anyio.CancelScope(shield=True):
                if connection is not None:
                    await connection.close()
                else:
                    for _, container in started:
                        await anyio.to_thread.run_sync(container.remove)
            if isinstance(error, TimeoutError | SandboxLostError):
                raise SandboxUnavailableError(f"the container did not start: {error}") from error
            raise
        await environment._serve_proxy(listener)
        return environment

    @property
    def container_id(self) -> str:
        return self._container.id

    async def reopen(self, snapshot: Snapshot) -> DockerEnvironment:
        return await self._in_this_phase(self.open(self.spec, self.run_id, snapshot=snapshot))

    async def snapshot(self) -> Snapshot:
        if not self.spec.as_image:
            return await super().snapshot()
        if self._container.is_podman:
            raise SnapshotError("with Podman, a sandbox as_image cannot be captured; use Docker's engine")
        if self.services:
            raise SnapshotError(f"the sandbox has services that cannot be captured: {', '.join(self.services)}")
        return await super().snapshot()

    async def _restore_root(self, snapshot: Snapshot) -> None:
        """Change the root file system, as it is in the image, to that of a snapshot. Raises SnapshotError."""
        container = self._container
        for paths in await anyio.to_thread.run_sync(snapshots.removed_paths, container, snapshot):
            request = ExecRequest(["rm", "-rf", "--", *paths], b"", "/", {}, None, FILE_TIMEOUT_S, 4096)
            result = await self._connection.exec(request, self._env, ["0", "0"])
            if result.exit_code != 0:
                raise SnapshotError(
                    f"the snapshot cannot be restored: `rm` of the image exited {result.exit_code}: "
                    f"{result.stderr.strip()[:500] or 'no output'}"
                )
        await self._guarded(lambda: snapshots.restore(container, self.spec, snapshot))

    async def _enter_phase(self, phase: Phase) -> None:
        is_public = self.spec.network.policy(phase) == "public"
        await self._guarded(lambda: self._container.set_public(is_public))
        await super()._enter_phase(phase)

    async def _pack(self, file: IO[bytes], *, max_entries: int, max_bytes: int) -> None:
        packed = partial(snapshots.pack, self._container, self.spec, self.run_id, file)
        await self._guarded(lambda: packed(max_entries=max_entries, max_bytes=max_bytes))

    async def _exec(self, request: ExecRequest) -> ExecResult:
        if request.user is None:
            return await self._connection.exec(request, {**self._env, **self._proxy_variables, **request.env}, None)
        user = await self._find_user(request.user)
        env = {**self._env, **self._proxy_variables, **request.env}
        if self.spec.as_image:
            env["HOME"] = home_of(user[0], (await self._user_files())[0])
        return await self._connection.exec(request, env, user)

    async def _find_user(self, user: str) -> list[str]:
        return resolve_user(user, *await self._user_files())

    async def _user_files(self) -> tuple[str, str]:
        """Return the texts of /etc/passwd and /etc/group; those of the image if commands could have changed them."""
        if self.spec.as_image:
            return await anyio.to_thread.run_sync(user_files, self._container.image_id)
        texts = []
        for path in ("/etc/passwd", "/etc/group"):
            try:
                texts.append(
                    (await self._file("read_file", path, max_bytes=USER_FILE_BYTES)).decode("utf-8", "replace")
                )
            except FileNotFoundError:
                texts.append("")
        return texts[0], texts[1]

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
            await self._close_proxy()
