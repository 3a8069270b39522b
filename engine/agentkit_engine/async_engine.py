"""AsyncEngine: the one boundary between anyio code and the thread that owns the model.

Every model step is a request in one first-in-first-out queue, served by one thread. A session has at most one request
in the queue and asks again only after its consumer took the last answer, so sessions take turns step by step (a long
append is many steps), nobody runs ahead of its consumer, and no lock is needed anywhere.
"""

from __future__ import annotations

import contextlib
import queue
from collections.abc import AsyncGenerator, Callable, Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self, TypeVar

import anyio
import anyio.abc
import anyio.from_thread
import anyio.to_thread
from torch import Tensor

from agentkit_engine.engine import Engine
from agentkit_engine.errors import EngineClosedError, SessionBusyError
from agentkit_engine.sampler import SampledToken, SamplingParams, fresh_seed
from agentkit_engine.session import Session

T = TypeVar("T")


@dataclass(frozen=True, slots=True, eq=False)
class _Request:
    """A call for the model thread; `finished` is set, in the event loop, once `future` has its outcome."""

    function: Callable[[], Any]
    future: Future[Any] = field(default_factory=Future)
    finished: anyio.Event = field(default_factory=anyio.Event)


class AsyncEngine:
    """Runs an `Engine` for async code: `async with AsyncEngine(Engine.load("tiny")) as engine: ...`.

    The thread starts with the block and ends with it. Leaving the block lets the step in progress finish, gives every
    request still waiting an `EngineClosedError`, and closes the sessions. While the block lasts nothing else may use
    the wrapped engine's model.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._requests: queue.SimpleQueue[_Request | None] = queue.SimpleQueue()
        self._sessions: set[AsyncSession] = set()
        self._task_group: anyio.abc.TaskGroup | None = None

    async def __aenter__(self) -> Self:
        if self._task_group is not None:
            raise EngineClosedError("this AsyncEngine is already running")
        task_group = anyio.create_task_group()
        await task_group.__aenter__()
        task_group.start_soon(self._run_model_thread, name="agentkit_engine: model thread")
        self._task_group = task_group
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        task_group, self._task_group = self._task_group, None
        assert task_group is not None
        self._refuse_waiting_requests()
        self._requests.put(None)
        try:
            await task_group.__aexit__(None, None, None)  # without `exc`: an error of the block is not to be wrapped
        finally:
            for session in list(self._sessions):
                await session.close()

    def session(self) -> AsyncSession:
        """A new, empty session.

        Raises:
            EngineClosedError: outside the `async with` block.
        """
        self._check_running()
        session = AsyncSession(self, self.engine.session())
        self._sessions.add(session)
        return session

    async def logits(self, token_ids: Iterable[int]) -> Tensor:
        """`Engine.logits`, on the model thread: float32 [T, vocab]."""
        ids = list(token_ids)
        return await self.call(lambda: self.engine.logits(ids))

    async def call(self, function: Callable[[], T]) -> T:
        """Run `function` on the model thread, after what is already queued.

        When the caller is cancelled a function that has not begun never runs, and one that is running is awaited.

        Raises:
            EngineClosedError: outside the `async with` block.
        """
        self._check_running()
        request = _Request(function)
        self._requests.put(request)
        try:
            await request.finished.wait()
        except BaseException:
            if not request.future.cancel():
                with anyio.CancelScope(shield=True):
                    await request.finished.wait()
            raise
        result: T = request.future.result()
        return result

    def _check_running(self) -> None:
        if self._task_group is None:
            raise EngineClosedError("the AsyncEngine is not running; use it inside `async with AsyncEngine(...)`")

    def _refuse_waiting_requests(self) -> None:
        with contextlib.suppress(queue.Empty):
            while True:
                request = self._requests.get_nowait()
                if request is not None and request.future.set_running_or_notify_cancel():
                    request.future.set_exception(EngineClosedError("the AsyncEngine was closed before this step ran"))
                    request.finished.set()

    async def _run_model_thread(self) -> None:
        with anyio.CancelScope(shield=True):
            await anyio.to_thread.run_sync(self._serve, limiter=anyio.CapacityLimiter(1))

    def _serve(self) -> None:
        while (request := self._requests.get()) is not None:
            if not request.future.set_running_or_notify_cancel():
                continue
            try:
                request.future.set_result(request.function())
            except BaseException as error:
                request.future.set_exception(error)
            anyio.from_thread.run_sync(request.finished.set)


class AsyncSession:
    """`Session` for async code; made by `AsyncEngine.session()`, freed by `close()` or `async with`."""

    def __init__(self, engine: AsyncEngine, session: Session) -> None:
        self._engine = engine
        self._session = session
        self._in_step = False
        self._closing = False

    @property
    def token_ids(self) -> Sequence[int]:
        """Every id so far, as a tuple; see `Session.token_ids`."""
        return self._session.token_ids

    async def append(self, token_ids: Iterable[int]) -> None:
        """Add ids to the end; see `Session.append`.

        Raises:
            SessionBusyError: another task's step of this session is running.
            TokenIdError, ContextLengthError, SessionClosedError: as `Session.append`.
        """
        self._check_idle()
        self._session.append(token_ids)

    async def generate(self, params: SamplingParams | None = None) -> AsyncGenerator[SampledToken, None]:
        """Sample on, one token at a time; see `Session.generate`.

        The model runs only while the consumer waits for a token. A consumer that is cancelled or stops asking leaves
        no id behind that it has not seen; a later `generate` with the same seed goes on where it stopped.

        Raises:
            SessionBusyError: two tasks generate on this session at once.
            EngineClosedError: the AsyncEngine's block was left.
            SessionEmptyError, ContextLengthError, NonFiniteLogitsError, SessionClosedError: as `Session.generate`.
        """
        params = params or SamplingParams()
        seed = fresh_seed() if params.seed is None else params.seed
        count = 0
        while True:
            token = await self._next_token(params, seed)
            yield token
            count += 1
            if token.id in params.stop_ids or count == params.max_tokens:
                return

    async def close(self) -> None:
        """Free the cache, after the step in progress if there is one. Closing twice is fine."""
        self._engine._sessions.discard(self)
        self._closing = True
        if not self._in_step:
            self._session.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    async def _next_token(self, params: SamplingParams, seed: int) -> SampledToken:
        self._check_idle()
        token = None
        while token is None:
            self._session.check_can_generate()
            self._in_step = True
            try:
                token = await self._engine.call(lambda: self._session.step(params, seed))
            finally:
                self._in_step = False
                if self._closing:
                    self._session.close()
        self._session.check_can_generate()
        self._session.commit(token)
        return token

    def _check_idle(self) -> None:
        if self._in_step:
            raise SessionBusyError("a step of this session is running for another task; one task drives a session")
