"""The calls of one turn: concurrent within limits, in order, started early where that is safe, and stopped together."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import replace
from itertools import takewhile

import anyio
import anyio.from_thread
from anyio.abc import TaskGroup
from anyio.lowlevel import checkpoint_if_cancelled, current_token

from agentkit.approval import Approvals, refused, told_of_change
from agentkit.events import CallDecided, CallFinished, CallOutput, CallStarted
from agentkit.limits import ConcurrencyLimits
from agentkit.model import CallMalformed
from agentkit_environments import OutputStream
from agentkit_tools import Tool, ToolCall, ToolContext, ToolResult, unknown_tool
from agentkit_tools.model_texts import ERROR


class TurnCalls:
    """Runs the calls of one turn concurrently; results keep the order of the calls.

    `ready` announces a call, usually while the model is still generating. The call starts at once if it and all calls
    before it are read-only; otherwise it waits for `finish`. A barrier runs alone: it starts after all earlier calls
    have finished, and later calls start after it has ended. A started call first waits for its approval. While it
    waits, it counts neither as a running call nor as tool time.

    A call that fails only affects its own result. Only an infrastructure failure (`SandboxError`) stops all calls,
    through the task group.
    """

    def __init__(
        self,
        tools: Mapping[str, Tool],
        context: ToolContext,
        concurrency: ConcurrencyLimits,
        note: Callable[[CallDecided | CallStarted | CallFinished], None],
        emit: Callable[[CallOutput], None],
        *,
        approvals: Approvals,
        max_calls: int,
    ) -> None:
        """Create the calls of a turn; `open` sets the task group they run in.

        Args:
            tools: Tools by name.
            context: Context passed to each call.
            concurrency: Limits on calls that run at the same time.
            note: Called with each decision, each start and each result, when it happens.
            emit: Called with the output of running calls.
            approvals: Policies that decide on each call.
            max_calls: Number of calls to run; every further call gets an error result.
        """
        self.task_group: TaskGroup
        self.time_s = 0.0
        """Seconds during which at least one call was running."""
        self._tools = tools
        self._context = context
        self._concurrency = concurrency
        self._in_turn = concurrency.turn()
        self._note = note
        self._emit = emit
        self._approvals = approvals
        self._max_calls = max_calls
        self._calls: dict[int, ToolCall] = {}
        self._results: dict[int, ToolResult] = {}
        self._waiting: list[int] = []
        self._pending = 0  # calls started and not finished, including those that wait for a semaphore
        self._scopes: dict[int, anyio.CancelScope] = {}  # of the running calls, by index
        self._running = 0
        self._running_since = 0.0
        self._idle: anyio.Event | None = None  # set while `finish` waits
        self._news: anyio.Event | None = None  # set while `more_in_order` waits

    def open(self, task_group: TaskGroup, *, deadline: float, time_left_s: float | None) -> None:
        """Run in `task_group`, which is cancelled at `deadline`, or after calls have been running for `time_left_s`."""
        task_group.cancel_scope.deadline = deadline
        self.task_group = task_group
        self._deadline = deadline
        self._time_left_s = time_left_s

    def ready(self, index: int, call: ToolCall) -> None:
        """Announce the call at position `index`; positions must increase."""
        self._calls[index] = call
        tool = self._tools.get(call.name)
        if len(self._calls) > self._max_calls:
            self._finish(index, _error(call, f"at most {self._max_calls} calls can be made in one turn; make it again"))
        elif tool is None:
            self._finish(index, unknown_tool(call, self._tools))
        elif tool.read_only and not tool.barrier and not self._waiting:
            self._start(index, early=True)
        else:
            self._waiting.append(index)

    def malformed(self, event: CallMalformed, call_id: str) -> None:
        """Record a call that could not be parsed; it gets an error result at its position."""
        call = ToolCall(call_id, event.name or "", "")
        self._calls[event.index] = call
        self._finish(event.index, _error(call, f"malformed call: {event.error}; write it again"))

    def withdraw(self) -> None:
        """Drop all calls so far, because they were part of a text. Running calls (all read-only) are stopped."""
        for scope in self._scopes.values():
            scope.cancel()
        self._calls.clear()
        self._results.clear()
        self._waiting.clear()

    async def finish(self) -> None:
        """Start the remaining calls, and wait for all calls to finish."""
        while self._waiting:
            index = self._waiting.pop(0)
            barrier = self._tools[self._calls[index].name].barrier
            if barrier:
                await self._all_finished()
            if barrier or not (self._waiting or self._pending):
                self._pending += 1
                await self._run(index, early=False)
            else:
                self._start(index, early=False)
        await self._all_finished()

    @property
    def count(self) -> int:
        """Number of calls."""
        return len(self._calls)

    async def more_in_order(self, count: int) -> list[ToolResult]:
        """Wait until more than `count` of the first calls have finished; return their results, in call order."""
        while True:
            finished = list(takewhile(self._results.__contains__, sorted(self._calls)))
            if len(finished) > count:
                return [self._results[index] for index in finished]
            self._news = anyio.Event()
            await self._news.wait()

    def results(self, stopped: str) -> list[ToolResult]:
        """Return one result per call, in call order; an unfinished call gets an error with the reason `stopped`."""
        for index, call in self._calls.items():
            if index not in self._results:
                self._finish(index, _error(call, f"stopped before it finished: {stopped}"))
        if self._running:
            self.time_s += time.perf_counter() - self._running_since
            self._running = 0
        return [self._results[index] for index in sorted(self._results)]

    def _start(self, index: int, *, early: bool) -> None:
        self._pending += 1
        self.task_group.start_soon(self._run, index, early, name=f"tool:{self._calls[index].name}")

    def _begin(self) -> None:
        """Start the clock. Waiting for a semaphore, which other agents may hold, does not count as tool time."""
        if self._running == 0:
            self._running_since = time.perf_counter()
            if self._time_left_s is not None:
                spent_at = anyio.current_time() + self._time_left_s - self.time_s
                self.task_group.cancel_scope.deadline = min(self._deadline, spent_at)
        self._running += 1

    def _end(self) -> None:
        """Stop the clock of the tool time, if no other call is running."""
        self._running -= 1
        if self._running == 0:
            self.time_s += time.perf_counter() - self._running_since
            if self._time_left_s is not None:
                self.task_group.cancel_scope.deadline = self._deadline

    async def _run(self, index: int, early: bool) -> None:
        call = self._calls.get(index)
        result: ToolResult | None = None
        if call is not None:  # None if the call was withdrawn before it started
            with anyio.CancelScope() as self._scopes[index]:
                result = await self._decide_and_run(call, early)
        self._pending -= 1
        if result is not None and index in self._calls:
            self._finish(index, result)
        if self._idle is not None and self._pending == 0:
            self._idle.set()

    async def _decide_and_run(self, call: ToolCall, early: bool) -> ToolResult:
        tool = self._tools[call.name]
        if self._approvals.is_empty:
            return await self._run_tool(call, tool, early)
        if (invalid := await tool.refusal(call)) is not None:
            return invalid
        decided = await self._approvals.decide(call, tool, self._context)
        self._note(decided)
        if decided.decision == "refused":
            return refused(call, decided)
        approved = replace(call, arguments=decided.modified or call.arguments)
        return told_of_change(await self._run_tool(approved, tool, early), decided)

    async def _run_tool(self, call: ToolCall, tool: Tool, early: bool) -> ToolResult:
        shared = (self._concurrency.of_tool(call.name), self._concurrency.in_all)
        of_tool, in_all = (nullcontext(), nullcontext()) if tool.delegates else shared
        async with self._in_turn, of_tool, in_all:
            self._begin()
            live = _LiveOutput(call, self._emit)
            try:
                self._note(CallStarted(call, early))
                result = await tool.call(call, replace(self._context, on_output=live))
                await checkpoint_if_cancelled()  # discard the output of a command that was just killed
                return result
            finally:
                live.has_ended = True
                self._end()

    def _finish(self, index: int, result: ToolResult) -> None:
        self._results[index] = result
        self._note(CallFinished(result))
        if self._news is not None:
            self._news.set()

    async def _all_finished(self) -> None:
        if self._pending:
            self._idle = anyio.Event()
            await self._idle.wait()


class _LiveOutput:
    """Emits the output of a call until it has ended. Threads of synchronous tools may call it, too."""

    def __init__(self, call: ToolCall, emit: Callable[[CallOutput], None]) -> None:
        self.has_ended = False
        self._call, self._emit = call, emit
        self._thread, self._token = threading.get_ident(), current_token()

    def __call__(self, stream: OutputStream, text: str) -> None:
        if threading.get_ident() == self._thread:
            self._pass_on(stream, text)
        elif not self.has_ended:
            anyio.from_thread.run_sync(self._pass_on, stream, text, token=self._token)

    def _pass_on(self, stream: OutputStream, text: str) -> None:
        if text and not self.has_ended:
            self._emit(CallOutput(self._call.id, stream, text))


def _error(call: ToolCall, what: str) -> ToolResult:
    return ToolResult(call.id, call.name, ERROR.format(message=what), is_error=True)
