"""An environment that is opened on first use, for code that may never need one."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from tarfile import TarInfo
from typing import IO

import anyio

from agentkit_environments.archive import ExportedDir
from agentkit_environments.environment import Environment, EnvironmentSpec, ExecRequest, ExecResult, FileOperation
from agentkit_environments.errors import SandboxLostError
from agentkit_environments.network import Phase
from agentkit_environments.snapshot import Snapshot


class DeferredEnvironment(Environment):
    """Opens an environment with `opener(spec)` on first use and delegates to it.

    Every method also raises what `opener` raises. `backend` and `run_id` are set once it is open.
    """

    def __init__(self, spec: EnvironmentSpec, opener: Callable[[EnvironmentSpec], Awaitable[Environment]]) -> None:
        self.spec = spec
        self._opener = opener
        self._environment: Environment | None = None
        self._closed = False
        self._lock = anyio.Lock()

    @property
    def is_open(self) -> bool:
        """True once the environment has been opened. Before that, it has no files and no processes."""
        return self._environment is not None

    async def open(self) -> Environment:
        """Open the environment, unless it is open, and return it.

        Raises:
            SandboxLostError: If `close` was called.
            SandboxUnavailableError and others: See `opener`.
        """
        async with self._lock:
            if self._closed:
                raise SandboxLostError("the environment was closed")
            if self._environment is None:
                self._environment = await self._in_this_phase(self._opener(self.spec))
                self.backend, self.run_id = self._environment.backend, self._environment.run_id
            return self._environment

    async def snapshot(self) -> Snapshot:
        return await (await self.open()).snapshot()

    async def reopen(self, snapshot: Snapshot) -> Environment:
        return await (self._environment or await self.open()).reopen(snapshot)

    def refusals(self) -> list[str]:
        return [] if self._environment is None else self._environment.refusals()

    async def kill_all(self) -> None:
        if self._environment is not None:
            await self._environment.kill_all()

    async def close(self) -> None:
        with anyio.CancelScope(shield=True):
            async with self._lock:
                self._closed = True
                if self._environment is not None:
                    await self._environment.close()

    async def _enter_phase(self, phase: Phase) -> None:
        async with self._lock:
            if self._environment is not None:
                await self._environment.enter_phase(phase)

    async def _exec(self, request: ExecRequest) -> ExecResult:
        return await (await self.open())._exec(request)

    async def _file(self, operation: FileOperation, path: str, body: bytes = b"", **bounds: int) -> bytes:
        return await (await self.open())._file(operation, path, body, **bounds)

    async def _export_dir(self, path: str, *, max_entries: int, max_bytes: int) -> ExportedDir:
        return await (await self.open())._export_dir(path, max_entries=max_entries, max_bytes=max_bytes)

    async def _import_dir(self, path: str, archive: bytes, members: Sequence[TarInfo]) -> None:
        await (await self.open())._import_dir(path, archive, members)

    async def _pack(self, file: IO[bytes], *, max_entries: int, max_bytes: int) -> None:
        await (await self.open())._pack(file, max_entries=max_entries, max_bytes=max_bytes)
