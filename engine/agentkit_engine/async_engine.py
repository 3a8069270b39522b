"""AsyncEngine: the only boundary between anyio code and the thread that owns the model.

The model thread repeats three steps: it runs the queued commands, computes one forward for all admitted generations,
and hands the new tokens to their consumers. Sessions join and leave between any two forwards. A generation runs at most
one forward ahead of its consumer, so a slow consumer delays no other, and a token that its consumer never took is
discarded.

A generation is admitted, by priority and then in order of arrival, once its session fits into memory beside those
already admitted. When a higher priority preempts it, it has to be admitted again. So sessions never evict each other in
turns.

While a forward runs, a second thread computes the grammar masks for the next tokens. Only commands change the state
that belongs to the model thread (`Work`, `_Generation.ahead`). The thread uses the engine under its lock, so that
several `AsyncEngine`s over one `Engine` take turns.
"""

from __future__ import annotations

import math
import queue
from collections import deque
from collections.abc import AsyncGenerator, Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TypeVar

import anyio
import anyio.abc
import anyio.to_thread
from anyio.lowlevel import current_token
from torch import Tensor

from agentkit_engine.engine import Engine
from agentkit_engine.errors import EngineClosedError, SessionBusyError, SessionClosedError
from agentkit_engine.ids import Ids
from agentkit_engine.runtime import PromptUsage, Work
from agentkit_engine.runtime.threads import one_thread
from agentkit_engine.sampler import SampledToken, fresh_seed, sample
from agentkit_engine.sampling_params import SamplingParams, check_grammar
from agentkit_engine.session import SessionIds, check_count, check_priority

if TYPE_CHECKING:
    from agentkit_engine.grammar import Grammar, Matcher

T = TypeVar("T")
_Delivery = SampledToken | BaseException | None

TOKENS_AHEAD = 2
"""A generation with this many tokens that its consumer has not taken gets no further forward."""
GIVE_WAY_S = 0.05
"""Seconds for which the thread waits for consumers before it admits a generation that does not fit."""


@dataclass(slots=True, eq=False)
class _Generation:
    """One `generate` call, or (`only_computes`) a request to compute pending ids, whose outcome is None.

    `inbox` and `news` belong to the event loop, all other fields to the model thread.
    """

    work: Work
    params: SamplingParams
    seed: int
    matcher: Matcher | None = None
    only_computes: bool = False
    admitted: bool = False
    ahead: int = 0
    sampled: int = 0
    done: bool = False
    inbox: deque[_Delivery] = field(default_factory=deque)
    news: anyio.Event = field(default_factory=anyio.Event)

    def put(self, outcome: _Delivery) -> None:
        self.inbox.append(outcome)
        self.news.set()

    async def get(self) -> SampledToken | None:
        while not self.inbox:
            self.news = anyio.Event()
            await self.news.wait()
        outcome = self.inbox.popleft()
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome


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
        self._closing = False

    async def __aenter__(self) -> Self:
        if self._task_group is not None:
            raise EngineClosedError("this AsyncEngine is already running")
        task_group = anyio.create_task_group()
        await task_group.__aenter__()
        self._closing = False
        self._soon = _call_soon()
        task_group.start_soon(self._run_model_thread, name="agentkit_engine: model thread")
        self._task_group = task_group
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        task_group, self._task_group = self._task_group, None
        assert task_group is not None
        for session in list(self._sessions):
            await session.close()
        self._commands.put(self._close)
        # without `exc`, which the task group would wrap in an ExceptionGroup
        await task_group.__aexit__(None, None, None)

    def session(self, *, priority: int = 0) -> AsyncSession:
        """Return a new, empty session. Sessions with a higher priority are admitted and prefilled first.

        Raises:
            EngineClosedError: outside the `async with` block.
        """
        self._check_running()
        session = AsyncSession(self, Work(priority=check_priority(priority)), Ids())
        self._sessions.add(session)
        return session

    async def open(self, path: str | Path) -> AsyncSession:
        """Open the session that `save` wrote; see `Engine.open`."""
        engine = self.engine
        batcher = engine.batcher
        work = await self.call(lambda: batcher.open(Path(path), model=engine.fingerprint), undo=batcher.drop)
        session = AsyncSession(self, work, work.ids.fork())
        self._sessions.add(session)
        return session

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
        with anyio.CancelScope(shield=True):
            await anyio.to_thread.run_sync(self._serve, limiter=anyio.CapacityLimiter(1))

    # The methods below run on the model thread.

    def _serve(self) -> None:
        masks = ThreadPoolExecutor(1, thread_name_prefix="agentkit_engine: masks")
        with one_thread() if self.engine.exact else nullcontext(), masks as helper:
            self._serve_with(helper)

    def _serve_with(self, helper: ThreadPoolExecutor) -> None:
        while True:
            with self.engine.lock:  # another AsyncEngine over the same engine may preempt these sessions
                self._admit()
                ready = [
                    generation
                    for generation in self._generations
                    if generation.admitted and (generation.ahead < TOKENS_AHEAD or generation.work.logits_V is not None)
                ]
            idle = not ready and not self._closing
            waiting = self._waiting() if idle else []
            try:
                command = self._commands.get(block=idle, timeout=GIVE_WAY_S if waiting else None)
            except queue.Empty:
                if waiting:  # the consumer of an admitted generation may be waiting for this one
                    waiting[0].admitted = True
                    continue
            else:
                with self.engine.lock:
                    command()
                    for _ in range(self._commands.qsize()):
                        self._commands.get_nowait()()
                continue
            if self._closing:
                with self.engine.lock:
                    self.engine.flush()
                return
            with self.engine.lock:
                outcomes = self._step(ready, helper)
            if outcomes:
                self._soon(_hand_over, outcomes)

    def _waiting(self) -> list[_Generation]:
        """Generations that are not admitted yet, in order of admission."""
        waiting = [generation for generation in self._generations if not generation.admitted]
        return sorted(waiting, key=lambda generation: -generation.work.priority)

    def _admit(self) -> None:
        """Admit the generations that fit beside the admitted ones, in order, up to the first that does not fit."""
        inside = [generation.work for generation in self._generations if generation.admitted]
        batcher = self.engine.batcher
        for generation in self._waiting():  # one that can never fit is admitted, and fails with its error
            if inside and not batcher.too_long(generation.work) and not batcher.fits([*inside, generation.work]):
                return
            generation.admitted = True
            inside.append(generation.work)

    def _close(self) -> None:
        self._closing = True

    def _step(self, ready: list[_Generation], helper: ThreadPoolExecutor) -> list[tuple[_Generation, _Delivery]]:
        """Run one forward; return the outcomes of the generations that have one."""
        outcomes: list[tuple[_Generation, _Delivery]] = []
        for generation in ready:
            outcomes += self._jump(generation)
        waiting = [g for g in ready if g.work.logits_V is None and not g.done]
        held = [g for g in self._generations if g.work.sequence is not None]
        # `_sample` reads the cached mask
        masks = [helper.submit(g.matcher.mask) for g in waiting if g.matcher is not None]
        if waiting:
            try:
                self.engine.batcher.advance([generation.work for generation in waiting])
            except BaseException:
                for generation in waiting:  # one of them caused the failure; the others continue
                    try:
                        self.engine.batcher.advance([generation.work])
                    except BaseException as error:
                        outcomes.append((generation, error))
        for generation in held:
            if generation.work.sequence is None:  # it was preempted, and waits until it fits again
                generation.admitted = False
        if masks:
            wait(masks)
        for generation in ready:  # accepted drafts already have their logits
            while generation.work.logits_V is not None and not generation.done:
                outcomes.append((generation, self._sample(generation, generation.work.logits_V)))
                outcomes += self._jump(generation)
        for generation, outcome in outcomes:
            if generation.done or isinstance(outcome, BaseException):
                self._generations.pop(generation, None)
        return outcomes

    def _sample(self, generation: _Generation, logits_V: Tensor) -> _Delivery:
        work, params = generation.work, generation.params
        if generation.only_computes:
            generation.done = True
            return None
        try:
            mask_V = None if generation.matcher is None else generation.matcher.mask()
            token = sample(logits_V, params, seed=generation.seed, position=work.length, past=work.past, mask_V=mask_V)
        except Exception as error:
            self.engine.batcher.drop(work)  # so that no cache keeps what it computed
            generation.done = True
            return error
        generation.sampled += 1
        generation.ahead += 1
        generation.done = (
            token.id in params.stop_token_ids
            or generation.sampled == params.max_tokens
            or work.length + 1 == self.engine.spec.max_position_embeddings
        )
        work.push(token.id)
        return token

    def _jump(self, generation: _Generation) -> list[tuple[_Generation, _Delivery]]:
        """Append the ids that the generation's grammar forces at this point."""
        outcomes: list[tuple[_Generation, _Delivery]] = []
        work, matcher = generation.work, generation.matcher
        while matcher is not None and not generation.done:
            try:
                matcher.follow(work.ids)
                token_id = matcher.forced()
            except Exception as error:
                generation.done = True
                return [*outcomes, (generation, error)]
            if token_id is None:
                break
            generation.ahead += 1
            generation.done = (
                token_id in generation.params.stop_token_ids
                or work.length + 1 == self.engine.spec.max_position_embeddings
            )
            work.push(token_id, forced=True)
            outcomes.append((generation, SampledToken(token_id, math.nan, forced=True)))
        return outcomes


def _call_soon() -> Callable[..., object]:
    """Return the thread-safe call_soon of asyncio or trio; `anyio.from_thread` would wait for the result."""
    loop: Any = current_token().native_token
    soon: Callable[..., object] = getattr(loop, "call_soon_threadsafe", None) or loop.run_sync_soon
    return soon


def _hand_over(outcomes: list[tuple[_Generation, _Delivery]]) -> None:
    for generation, outcome in outcomes:
        generation.put(outcome)


class AsyncSession(SessionIds):
    """`Session` for async code; made by `AsyncEngine.session()`, freed by `close()` or `async with`."""

    def __init__(self, engine: AsyncEngine, work: Work, ids: Ids) -> None:
        """`ids` are the ids of `work`, which belongs to the model thread."""
        super().__init__(engine.engine.spec, ids)
        self._engine = engine
        self._work = work
        self._in_step = False
        self._generation: _Generation | None = None
        self._known = len(self._ids)  # number of ids that the thread's work has, or will have after the queued commands

    @property
    def usage(self) -> PromptUsage:
        """Prompt tokens found in the prefix cache, and prompt tokens computed."""
        return self._work.usage

    async def append(self, token_ids: Iterable[int]) -> None:
        """Add ids to the end; see `Session.append`.

        Raises:
            SessionBusyError: a step of this session is running for another task.
            TokenIdError, ContextLengthError, SessionClosedError: see `Session.append`.
        """
        self._check_idle()
        self._append(token_ids)

    async def checkpoint(self) -> None:
        """Keep the state at this length for other sessions, once it is computed; see `Session.checkpoint`."""
        work = self._settle()
        self._engine._commands.put(lambda: self._engine.engine.batcher.mark(work))

    async def fork(self, n: int = 1) -> list[AsyncSession]:
        """Return `n` sessions that continue from here; see `Session.fork`.

        Raises:
            SessionBusyError: a step of this session is running.
            OutOfMemoryError, SessionClosedError, EngineClosedError: see `generate`.
        """
        check_count(n)
        work, ids, engine = self._settle(), self._ids.fork(), self._engine.engine
        if len(ids):
            await self._compute(work)

        def drop(forks: list[Work]) -> None:
            for fork in forks:
                engine.batcher.drop(fork)

        works = await self._engine.call(lambda: [engine.batcher.fork(work) for _ in range(n)], undo=drop)
        forks = [AsyncSession(self._engine, fork, ids.fork()) for fork in works]
        self._engine._sessions.update(forks)
        return forks

    async def park(self) -> None:
        """Let the engine evict this session first, for example while a tool runs; see `Session.park`."""
        work = self._settle()
        self._engine._commands.put(lambda: self._engine.engine.batcher.park(work))

    async def save(self, path: str | Path) -> None:
        """Write the session to a file; see `Session.save`."""
        work, engine = self._settle(), self._engine.engine
        await self._engine.call(lambda: engine.batcher.save(work, Path(path), model=engine.fingerprint))

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
        params = params or SamplingParams()
        check_grammar(params, grammar)
        reader = self._engine.engine.reader(params)
        seed = fresh_seed() if params.seed is None else params.seed
        count = 0
        generation = None
        try:
            while True:
                self._check_idle()
                self._check_can_generate()
                self._engine._check_running()
                if generation is None or generation is not self._generation or self._known != len(self._ids):
                    left = None if params.max_tokens is None else params.max_tokens - count
                    rest = params if left == params.max_tokens else replace(params, max_tokens=left)
                    generation = self._start(rest, seed, grammar)
                self._in_step = True
                try:
                    token = await generation.get()
                except BaseException:
                    self._stop(generation)
                    raise
                finally:
                    self._in_step = False
                assert token is not None
                self._ids.append(token.id)
                self._known += 1
                self._engine._commands.put(lambda taken=generation: _take(taken))  # type: ignore[misc]
                count += not token.forced
                ended = token.id in params.stop_token_ids or count == params.max_tokens
                yield reader.read(token, last=ended or self._is_full)
                if ended or reader.stopped:
                    return
        finally:
            if generation is not None:
                self._stop(generation)

    async def close(self) -> None:
        """Free the state, after the current step. Closing twice is harmless."""
        if self._closed:
            return
        self._closed = True
        self._engine._sessions.discard(self)
        if self._generation is not None:
            self._generation.put(SessionClosedError("the session was closed; open a new one with engine.session()"))
            self._stop(self._generation)
        self._engine._commands.put(self._drop)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    def _start(self, params: SamplingParams, seed: int, grammar: Grammar | None) -> _Generation:
        """Send new ids to the model thread, and start a generation there."""
        if self._generation is not None:
            self._stop(self._generation)
        matcher = None if grammar is None else grammar.matcher()
        generation = _Generation(self._take_in(), params, seed, matcher)
        self._begin(generation)
        return generation

    async def _compute(self, work: Work) -> None:
        """Have the model thread restore the state and compute all pending ids."""
        generation = _Generation(work, SamplingParams(), 0, only_computes=True)
        self._in_step = True
        try:
            await self._engine.call(lambda: self._engine.engine.batcher.resume(work))
            self._check_open()
            self._begin(generation)
            await generation.get()
        finally:
            self._in_step = False
            self._stop(generation)

    def _begin(self, generation: _Generation) -> None:
        def command() -> None:
            self._engine._generations[generation] = None

        self._generation = generation
        self._engine._commands.put(command)

    def _take_in(self) -> Work:
        """Queue a command that appends the new ids to the thread's work."""
        work, news, self._known = self._work, self._ids[self._known :], len(self._ids)
        if news:
            self._engine._commands.put(lambda: work.extend(news))
        return work

    def _settle(self) -> Work:
        """Stop the generation and make the thread's work end with the ids of this session."""
        self._check_idle()
        self._check_open()
        self._engine._check_running()
        if self._generation is not None:
            self._stop(self._generation)
        return self._take_in()

    def _stop(self, generation: _Generation) -> None:
        """Queue a command that ends a generation and discards its tokens that were not taken."""
        if generation is not self._generation:
            return
        self._generation = None
        length = self._known

        def command() -> None:
            self._engine._generations.pop(generation, None)
            self._engine.engine.batcher.truncate(generation.work, length)

        self._engine._commands.put(command)

    def _drop(self) -> None:
        """Free the state; runs on the model thread."""
        self._engine.engine.batcher.close(self._work)

    def _check_idle(self) -> None:
        if self._in_step:
            raise SessionBusyError("a step of this session is running for another task; one task drives a session")


def _take(generation: _Generation) -> None:
    generation.ahead -= 1
