"""AsyncEngine: the only boundary between anyio code and the thread that owns the model.

The model thread repeats three steps: it runs the queued commands, computes one forward for all admitted generations,
and hands the new tokens to their consumers. Sessions join and leave between any two forwards. A generation runs at most
one forward ahead of its consumer, so a slow consumer delays no other, and a token that its consumer never took is
discarded.

A generation is admitted, by priority and then in order of arrival, once its session fits into memory beside those
already admitted. When a higher priority preempts it, it has to be admitted again. So sessions never evict each other in
turns.

While a forward runs, a second thread computes the grammar masks for the next tokens. Only commands change the state
that belongs to the model thread (`Request`, `_Generation.ahead`). The thread uses the engine under its lock, so that
several `AsyncEngine`s over one `Engine` take turns.
"""

from __future__ import annotations

import queue
from collections import deque
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, TypeVar

import anyio
import anyio.abc
import anyio.to_thread
from anyio.lowlevel import checkpoint_if_cancelled, current_token
from torch import Tensor

from agentkit_engine.engine import Engine
from agentkit_engine.errors import EngineClosedError, SessionBusyError, SessionClosedError
from agentkit_engine.generation import Generation, TokenOrError, next_tokens
from agentkit_engine.runtime import Request, Scheduler
from agentkit_engine.runtime.threads import OneThread
from agentkit_engine.sampler import SampledToken
from agentkit_engine.sampling_params import SamplingParams
from agentkit_engine.session import SessionBase, check_whole

if TYPE_CHECKING:
    from agentkit_engine.grammar import Grammar

T = TypeVar("T")
TOKENS_AHEAD = 2
"""A generation with this many tokens that its consumer has not taken gets no further forward."""
GIVE_WAY_S = 0.05
"""Seconds for which the thread waits for consumers before it admits a generation that does not fit."""


class _Generation(Generation):
    """A generation with its consumer.

    Attributes:
        admitted: takes part in forwards. This and `ahead` belong to the model thread, as do those of `Generation`.
        ahead: number of tokens that the consumer has not taken.
        inbox: outcomes, each with the number of ids that may be sampled after it; belongs to the event loop.
        news: set when the inbox is not empty.
    """

    admitted, ahead = False, 0

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.inbox: deque[tuple[TokenOrError, float]] = deque()
        self.news = anyio.Event()

    def put(self, outcome: TokenOrError, left: float) -> None:
        self.inbox.append((outcome, left))
        self.news.set()

    async def get(self) -> tuple[SampledToken | None, float]:
        await checkpoint_if_cancelled()
        while not self.inbox:
            self.news = anyio.Event()
            await self.news.wait()
        outcome, left = self.inbox.popleft()
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome, left

    def taken(self) -> None:
        self.ahead -= 1


_Delivery = tuple[_Generation, TokenOrError, float]


class AsyncEngine:
    """Runs an `Engine` for async code: `async with AsyncEngine(Engine.load("tiny")) as engine: ...`.

    The model thread starts and ends with the block. Leaving the block closes the sessions, finishes the current step
    and frees all state. Within the block, only other `AsyncEngine`s may use the wrapped engine.
    """

    def __init__(self, engine: Engine) -> None:
        """Raises TypeError if `engine` is not an `Engine`."""
        if not isinstance(engine, Engine):
            raise TypeError(f"AsyncEngine(engine) takes an Engine, got {engine!r}; load one with Engine.load(...)")
        self.engine = engine
        self._commands: queue.SimpleQueue[Callable[[], object]] = queue.SimpleQueue()
        self._sessions: set[AsyncSession] = set()
        self._generations: dict[_Generation, None] = {}
        self._task_group: anyio.abc.TaskGroup | None = None
        self._soon: Callable[..., object]  # schedules a function on the event loop without waiting for it

    async def __aenter__(self) -> Self:
        if self._task_group is not None:
            raise EngineClosedError("this AsyncEngine is already running")
        task_group = anyio.create_task_group()
        await task_group.__aenter__()
        loop: Any = current_token().native_token
        # of asyncio, or of trio; `anyio.from_thread` would wait for the result
        self._soon = getattr(loop, "call_soon_threadsafe", None) or loop.run_sync_soon
        task_group.start_soon(self._run_model_thread, name="agentkit_engine: model thread")
        self._task_group = task_group
        return self

    async def __aexit__(self, *error: object) -> None:
        for session in list(self._sessions):
            await session.close()
        task_group, self._task_group = self._task_group, None
        assert task_group is not None
        self._commands.put(lambda: None)  # wakes the thread
        # without `error`, which the task group would wrap in an ExceptionGroup
        await task_group.__aexit__(None, None, None)

    def session(self, *, priority: int = 0) -> AsyncSession:
        """Return a new, empty session. Sessions with a higher priority are admitted and prefilled first.

        Raises:
            EngineClosedError: outside the `async with` block.
        """
        self._check_running()
        return AsyncSession(self, Request(priority=check_whole("priority", priority)))

    async def open(self, path: str | Path) -> AsyncSession:
        """Open the session that `save` wrote; see `Engine.open`."""
        engine, scheduler = self.engine, self.engine.scheduler
        request = await self.call(lambda: scheduler.open(Path(path), model=engine.fingerprint), undo=scheduler.preempt)
        return AsyncSession(self, request)

    async def logits(self, token_ids: Iterable[int]) -> Tensor:
        """Run `Engine.logits` on the model thread: float32 [T, vocab]."""
        ids = list(token_ids)
        return await self.call(lambda: self.engine.logits(ids))

    async def call(self, function: Callable[[], T], *, undo: Callable[[T], object] | None = None) -> T:
        """Run `function` on the model thread, between two forwards.

        If the caller is cancelled, a function that has not started never runs. One that is running is awaited, and its
        result goes to `undo` on the same thread.

        Raises:
            EngineClosedError: outside the `async with` block.
        """
        self._check_running()
        future: Future[T] = Future()
        finished = anyio.Event()

        def command() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                future.set_result(function())
            except BaseException as error:
                future.set_exception(error)
            self._soon(finished.set)

        self._commands.put(command)
        try:
            await finished.wait()
        except BaseException:
            if not future.cancel():
                with anyio.CancelScope(shield=True):
                    await finished.wait()
                if undo is not None and future.exception() is None:
                    self._commands.put(partial(undo, future.result()))
            raise
        return future.result()

    def _check_running(self) -> None:
        if self._task_group is None:
            raise EngineClosedError("the AsyncEngine is not running; use it inside `async with AsyncEngine(...)`")

    async def _run_model_thread(self) -> None:
        serve = partial(OneThread(), self._serve) if self.engine.exact else self._serve
        with anyio.CancelScope(shield=True):
            await anyio.to_thread.run_sync(serve, limiter=anyio.CapacityLimiter(1))

    # The methods below run on the model thread.

    def _serve(self) -> None:
        with ThreadPoolExecutor(1, thread_name_prefix="agentkit_engine: masks") as masks:
            while self._turn(masks):
                pass

    def _turn(self, masks: ThreadPoolExecutor) -> bool:
        """Run the queued commands, or a step if there are none; return False once the block was left."""
        closing = self._task_group is None  # before the queue is found to be empty
        with self.engine.lock:  # another AsyncEngine over the same engine may preempt these sessions
            self._admit()
            ready = [each for each in self._generations if each.admitted and each.ahead < TOKENS_AHEAD]
        idle = not ready and not closing
        waiting = self._waiting() if idle else []
        try:
            command = self._commands.get(block=idle, timeout=GIVE_WAY_S if waiting else None)
        except queue.Empty:
            if waiting:  # the consumer of an admitted generation may be waiting for this one
                waiting[0].admitted = True
                return True
        else:
            with self.engine.lock:
                command()
                for _ in range(self._commands.qsize()):
                    self._commands.get_nowait()()
            return True
        with self.engine.lock:
            if closing:
                self.engine.flush()
                return False
            outcomes = self._step(ready, masks)
        if outcomes:
            self._soon(_hand_over, outcomes)
        return True

    def _waiting(self) -> list[_Generation]:
        """Generations that are not admitted yet, in order of admission."""
        waiting = [generation for generation in self._generations if not generation.admitted]
        return sorted(waiting, key=lambda generation: -generation.request.priority)

    def _admit(self) -> None:
        """Admit the generations that fit beside the admitted ones, in order, up to the first that does not fit."""
        inside = [generation.request for generation in self._generations if generation.admitted]
        scheduler = self.engine.scheduler
        for generation in self._waiting():  # one that can never fit is admitted, and fails with its error
            if (
                inside
                and not scheduler.too_long(generation.request)
                and not scheduler.fits([*inside, generation.request])
            ):
                return
            generation.admitted = True
            inside.append(generation.request)

    def _step(self, ready: list[_Generation], masks: ThreadPoolExecutor) -> list[_Delivery]:
        """Run one forward; return the outcomes of the generations that have one."""
        scheduler = self.engine.scheduler
        outcomes = self._decide(ready)
        waiting = [generation for generation in ready if not generation.ended]
        held = [generation for generation in self._generations if generation.request.sequence is not None]
        # `next_tokens` reads the cached masks
        packed = scheduler.runner.sampler is not None
        matchers = [each.matcher for each in waiting if each.matcher is not None]
        computing = [masks.submit(matcher.bitmask if packed else matcher.mask) for matcher in matchers]
        if waiting:
            try:
                scheduler.step([generation.request for generation in waiting])
            except BaseException:
                for generation in waiting:  # one of them caused the failure; the others continue
                    try:
                        scheduler.step([generation.request])
                    except BaseException as error:
                        generation.ended = True
                        outcomes.append((generation, error, 0))
        for generation in held:
            if generation.request.sequence is None:  # it was preempted, and waits until it fits again
                generation.admitted = False
        wait(computing)
        outcomes += self._decide(waiting)
        for generation, _, _ in outcomes:
            if generation.ended:
                self._generations.pop(generation, None)
        return outcomes

    def _decide(self, generations: list[_Generation]) -> list[_Delivery]:
        """Append all ids that need no forward: forced ids, and ids after accepted drafts."""
        outcomes: list[_Delivery] = []
        while generations:
            decided = next_tokens(generations, self.engine.scheduler)
            generations = [generation for generation, _ in decided]
            for generation, outcome in decided:
                generation.ahead += 1
                outcomes.append((generation, outcome, generation.left))
        return outcomes


def _hand_over(outcomes: list[_Delivery]) -> None:
    for generation, outcome, left in outcomes:
        generation.put(outcome, left)


class AsyncSession(SessionBase):
    """`Session` for async code; made by `AsyncEngine.session()`, freed by `close()` or `async with`."""

    def __init__(self, engine: AsyncEngine, request: Request) -> None:
        """`request` belongs to the model thread."""
        super().__init__(engine.engine.spec, request, request.ids.fork())
        self._engine, self._put = engine, engine._commands.put
        self._in_step = False
        self._generation: _Generation | None = None
        self._known = len(self._ids)  # ids that the thread's request has, or will have after the queued commands
        engine._sessions.add(self)

    @property
    def _scheduler(self) -> Scheduler:
        return self._engine.engine.scheduler

    async def append(self, token_ids: Iterable[int]) -> None:
        """Add ids to the end; see `Session.append`.

        Raises:
            SessionBusyError: a step of this session is running for another task.
            TokenIdError, ContextLengthError, SessionClosedError: see `Session.append`.
        """
        self._check_idle()
        self._ids.extend(self._check_new(token_ids))

    async def checkpoint(self) -> None:
        """Keep the state at this length for other sessions, once it is computed; see `Session.checkpoint`."""
        self._settle()
        self._put(lambda: self._scheduler.mark(self._request))

    async def prefill(self) -> None:
        """Compute the ids so far, so that a later `generate` only has to compute what follows.

        If the caller is cancelled, the session keeps its ids and what was computed of them.

        Raises:
            SessionBusyError: a step of this session is running.
            OutOfMemoryError, NonFiniteLogitsError, SessionClosedError, EngineClosedError: see `generate`.
        """
        self._settle()
        if self._ids:
            await self._busy(self._begin(_Generation(self._request, SamplingParams(), left=0)).get())

    async def fork(self, n: int = 1) -> list[AsyncSession]:
        """Return `n` sessions that continue from here; see `Session.fork`.

        Raises:
            SessionBusyError: a step of this session is running.
            OutOfMemoryError, SessionClosedError, EngineClosedError: see `generate`.
        """
        self._check_forks(n)
        self._settle()
        request, scheduler = self._request, self._scheduler
        if self._ids:
            await self._busy(self._engine.call(lambda: scheduler.resume(request)))
            self._check_open()
            await self._busy(self._begin(_Generation(request, SamplingParams(), left=0)).get())
        forks = await self._engine.call(
            lambda: [scheduler.fork(request) for _ in range(n)], undo=lambda forks: [*map(scheduler.preempt, forks)]
        )
        return [AsyncSession(self._engine, fork) for fork in forks]

    async def park(self) -> None:
        """Let the engine evict this session first, for example while a tool runs; see `Session.park`."""
        self._settle()
        self._put(lambda: self._scheduler.park(self._request))

    async def save(self, path: str | Path) -> None:
        """Write the session to a file; see `Session.save`."""
        self._settle()
        request, engine = self._request, self._engine.engine
        await self._engine.call(lambda: engine.scheduler.save(request, Path(path), model=engine.fingerprint))

    async def generate(
        self, params: SamplingParams | None = None, *, grammar: Grammar | None = None
    ) -> AsyncGenerator[SampledToken, None]:
        """Generate tokens one at a time; see `Session.generate`.

        If the consumer is cancelled or stops iterating, the session keeps exactly the ids that it has seen; a later
        `generate` with the same seed continues where it stopped.

        Raises:
            SessionBusyError: two tasks generate on this session at once.
            EngineClosedError: the AsyncEngine's block was left.
            SessionEmptyError, ContextLengthError, NonFiniteLogitsError, GrammarError, OutOfMemoryError,
                SessionClosedError, TokenizerMissingError: see `Session.generate`.
        """
        generation = _Generation(self._request, params or SamplingParams(), grammar)
        reader, left = self._engine.engine.reader(generation.params), generation.left
        try:
            while left and not reader.stopped:
                self._check_idle()
                self._check_can_generate()
                self._engine._check_running()
                if generation is not self._generation or self._known != len(self._ids):
                    self._settle()
                    again = _Generation(self._request, generation.params, grammar, seed=generation.seed, left=left)
                    generation = self._begin(again)
                token, left = await self._busy(generation.get())
                assert token is not None
                self._ids.append(token.id)
                self._known += 1
                self._put(generation.taken)
                yield reader.read(token, last=not left or len(self._ids) == self._spec.max_position_embeddings)
        finally:
            if generation is self._generation:
                self._stop()

    async def close(self) -> None:
        """Free the state, after the current step. Closing twice is harmless."""
        if self._closed:
            return
        self._closed = True
        self._engine._sessions.discard(self)
        if self._generation is not None:
            self._generation.put(SessionClosedError("the session was closed; open a new one with engine.session()"), 0)
        self._stop()
        self._put(lambda: self._scheduler.close(self._request))

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.close()

    async def _busy(self, step: Awaitable[T]) -> T:
        """Await a step, during which no other task may use the session. A step that fails stops the generation."""
        self._in_step = True
        try:
            return await step
        except BaseException:
            self._stop()
            raise
        finally:
            self._in_step = False

    def _begin(self, generation: _Generation) -> _Generation:
        self._generation = generation
        self._put(lambda: self._engine._generations.setdefault(generation))
        return generation

    def _settle(self) -> None:
        """Stop the generation and make the thread's request end with the ids of this session."""
        self._check_idle()
        self._check_open()
        self._engine._check_running()
        self._stop()
        request, news, self._known = self._request, self._ids[self._known :], len(self._ids)
        if news:
            self._put(lambda: request.extend(news))

    def _stop(self) -> None:
        """Queue a command that ends the generation, if there is one, and discards its tokens that were not taken."""
        generation, self._generation, length = self._generation, None, self._known
        if generation is not None:
            self._put(lambda: self._engine._generations.pop(generation, None))
            self._put(lambda: self._scheduler.truncate(self._request, length))

    def _check_idle(self) -> None:
        if self._in_step:
            raise SessionBusyError("a step of this session is running for another task; one task drives a session")
