"""A warm pool: environments that are opened ahead of their use, so that the next one starts at once."""

from __future__ import annotations

from collections import deque
from collections.abc import Awaitable, Callable
from contextlib import suppress
from itertools import chain
from types import TracebackType
from typing import Literal, Self

import anyio
import anyio.abc

from agentkit_environments.environment import Environment, EnvironmentSpec
from agentkit_environments.errors import SandboxError, SandboxLostError
from agentkit_environments.opening import open_environment
from agentkit_environments.snapshot import Snapshot

AnyBackend = Literal["auto", "docker", "process", "unsafe-local"]


class _Ahead:
    """An environment that was announced. Once it has begun, `done` is set when it is open, or cannot be."""

    def __init__(
        self, spec: EnvironmentSpec, backend: AnyBackend, prepare: Callable[[], Awaitable[object]] | None
    ) -> None:
        self.spec, self.backend, self.prepare = spec, backend, prepare
        self.scope = anyio.CancelScope()
        self.done = anyio.Event()
        self.environment: Environment | None = None


class EnvironmentPool:
    """Opens the environments that `expect` announces in the background, and hands each out once.

        spec = EnvironmentSpec()
        async with EnvironmentPool(1) as pool:
            for _ in range(3):
                pool.expect(spec)
            for _ in range(3):
                async with await pool.open(spec) as environment:
                    await environment.exec("echo hello > greeting")

    At most `size` environments are open or being opened ahead, in the order in which they were announced. `open` takes
    one of exactly the same specification (image, limits, network, variables, ...) and backend, or opens one if there
    is none. An environment never returns to the pool: whoever has opened it closes it. Those that nobody took are
    closed at the end of the block, also after an error or a cancellation.
    """

    def __init__(self, size: int, *, run_id: str | None = None) -> None:
        """Make an empty pool.

        Args:
            size: Maximum number of environments that are open or being opened ahead; 0 opens none.
            run_id: Label of the environments; see `open_environment`.

        Raises:
            ValueError: If `size` is negative.
        """
        if size < 0:
            raise ValueError(f"EnvironmentPool(size) takes at least 0, got {size}")
        self.size = size
        self._run_id = run_id
        self._ahead: list[_Ahead] = []
        self._later: deque[_Ahead] = deque()  # not begun for want of room
        self._tasks: anyio.abc.TaskGroup | None = None

    @property
    def waiting(self) -> int:
        """Number of environments that are open and were not taken yet."""
        return sum(each.environment is not None for each in self._ahead)

    def expect(
        self,
        spec: EnvironmentSpec,
        *,
        backend: AnyBackend = "auto",
        prepare: Callable[[], Awaitable[object]] | None = None,
    ) -> None:
        """Announce that `open` will be called with these arguments. Without room, it is opened ahead later.

        `prepare` is called before it is opened ahead, for example to build its image. If it fails, so does the opening.
        """
        self._later.append(_Ahead(spec, backend, prepare))
        self._fill()

    async def ready(self) -> None:
        """Wait until all that have room are open, or cannot be opened."""
        for each in list(self._ahead):
            await each.done.wait()

    async def open(
        self, spec: EnvironmentSpec, *, backend: AnyBackend = "auto", snapshot: Snapshot | None = None
    ) -> Environment:
        """Return an environment that nobody has used. With a snapshot, it is opened now. Raises as `open_environment`.

        One whose opening ahead has failed, or that has died since, is opened again.
        """
        announced = chain(self._ahead, self._later)
        alike = (each for each in announced if (each.spec, each.backend) == (spec, backend))
        if snapshot is None and (found := next(alike, None)) is not None:
            has_begun = found in self._ahead
            (self._ahead if has_begun else self._later).remove(found)
            self._fill()  # there is room for the next one
            if has_begun and (environment := await _taken(found)) is not None:
                return environment
        return await open_environment(spec, backend=backend, run_id=self._run_id, snapshot=snapshot)

    def _fill(self) -> None:
        while self._tasks is not None and self._later and len(self._ahead) < self.size:
            self._ahead.append(self._later.popleft())
            self._tasks.start_soon(self._open_ahead, self._ahead[-1], name="environment opened ahead")

    async def _open_ahead(self, ahead: _Ahead) -> None:
        try:
            with ahead.scope, suppress(Exception):  # `open` tries again, and raises what it meets
                if ahead.prepare is not None:
                    await ahead.prepare()
                ahead.environment = await open_environment(ahead.spec, backend=ahead.backend, run_id=self._run_id)
        finally:
            ahead.done.set()

    async def __aenter__(self) -> Self:
        self._tasks = await anyio.create_task_group().__aenter__()
        self._fill()
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        tasks, self._tasks = self._tasks, None
        assert tasks is not None
        tasks.cancel_scope.cancel()
        try:
            await tasks.__aexit__(None, None, None)  # its tasks raise nothing
        finally:
            with anyio.CancelScope(shield=True):
                async with anyio.create_task_group() as closing:
                    for each in self._ahead:
                        if each.environment is not None:
                            closing.start_soon(_close, each.environment)
            self._ahead.clear()
            self._later.clear()


async def _taken(ahead: _Ahead) -> Environment | None:
    """Wait until an environment is open, and return it; None if it could not be opened, or has died."""
    try:
        await ahead.done.wait()
        if ahead.environment is None or await _is_alive(ahead.environment):
            return ahead.environment
    except BaseException:
        ahead.scope.cancel()
        with anyio.CancelScope(shield=True):
            await ahead.done.wait()
            if ahead.environment is not None:
                await _close(ahead.environment)
        raise
    await _close(ahead.environment)
    return None


async def _is_alive(environment: Environment) -> bool:
    try:
        await environment.read_file("/")
    except SandboxLostError:
        return False
    except (OSError, SandboxError):  # it is a directory
        pass
    return True


async def _close(environment: Environment) -> None:
    """Close an environment that nobody has used; `reap` removes what is left after an error."""
    with suppress(Exception):
        await environment.close()
