"""The state of one run, shared by the steps of the loop, and the bookkeeping that keeps its record complete."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from math import inf
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anyio
import anyio.to_thread

from agentkit.approval import Approvals
from agentkit.events import (
    Compacted,
    Event,
    LimitName,
    MessageAdded,
    Outcome,
    Record,
    Status,
    SubagentFinished,
    SubagentStarted,
)
from agentkit.forks import World, Worlds
from agentkit.interrupted import NOTHING
from agentkit.limits import CostBudget, Limits
from agentkit.model import GenerationLimits, ModelSession, StopReason, Usage, total_usage
from agentkit.saved import save_snapshot
from agentkit.trajectory import Trajectory
from agentkit_environments import DeferredEnvironment, Environment
from agentkit_tools import ToolCall, ToolContext
from agentkit_tools.tool import Deps

if TYPE_CHECKING:
    from agentkit.agent import Agent


class Run:
    """One `Agent.run` in progress.

    Attributes:
        agent: The agent that runs.
        session: The conversation with the model.
        trajectory: The record.
        context: The context that calls run in.
        limits: The run's budget.
        budget: A budget shared with other runs, if any.
        approvals: The policies that decide on the run's calls.
        worlds: The files before each turn, if the run keeps them.
        save_snapshots: True if the files are saved beside the record.
        depth: Levels of sub-agents that may run below this run.
        is_guest: True if this is the run of a sub-agent in the environment of the run above it.
        emit: Passes an event to the caller.
        turn: Number of the next turn, counted from 0 over the session.
        deadline: Time at which the wall time is spent, on anyio's clock.
        calls, tool_time_s: Number of calls made, and seconds during which at least one was running.
        refused: True if the API's filter stopped the last turn.
    """

    def __init__(
        self,
        session: ModelSession,
        trajectory: Trajectory,
        environment: Environment,
        limits: Limits,
        emit: Callable[[Event], None],
        budget: CostBudget | None = None,
        *,
        agent: Agent[Any],
        approvals: Approvals,
        deps: Any = None,
        spill_dir: str | None = None,
        above: RunContext | None = None,
        shared: Usage = NOTHING,
        spent: Usage = NOTHING,
        start: World | None = None,
        worlds: Worlds | None = None,
        save_snapshots: bool = False,
    ) -> None:
        """Begin a run, or go on with one.

        `spent` is the usage of a resumed run so far. `shared` is the usage of turns that a fork shares with another
        run; it counts towards the limits only.
        """
        before = total_usage([shared, spent])
        self._shared_tool_time_s = shared.tool_time_s
        self._spent = replace(spent, subagents=None)
        self._before = replace(before, subagents=None)
        self.agent = agent
        self.session = session
        self.trajectory = trajectory
        self.context = RunContext(
            environment, timeout_s=limits.call_timeout_s, deps=deps, spill_dir=spill_dir, run=self
        )
        self.limits = limits
        self.worlds = worlds
        self.save_snapshots = save_snapshots
        self._start_world = start
        self.approvals = approvals
        self.depth: int = limits.max_depth if above is None else min(limits.max_depth, above.run.depth - 1)
        self.is_guest = above is not None and above.environment is environment
        if above is not None and self.is_guest:
            self.context.lock = above.lock
        self.emit = emit
        self.budget = budget
        self.turn = session.turns
        self.deadline = inf
        if limits.wall_time_s is not None:
            self.deadline = anyio.current_time() + limits.wall_time_s - before.wall_time_s
        self.calls = spent.calls
        self.tool_time_s = spent.tool_time_s
        self.refused = False
        self._charged: float | None = 0.0
        self._subagents = spent.subagents
        self._subagents_cost_usd = (
            before.subagents and before.subagents.total.cost_usd
        ) or 0.0  # as far as it is known
        self._above = None if above is None else above.run
        self._start = time.perf_counter() - spent.wall_time_s
        self._recorded_messages = len(session.messages)
        self._recorded_segments = len(session.segments)

    def note(self, record: Record) -> None:
        """Write a record, then emit it."""
        self.trajectory.append(record)
        self.emit(record)

    def note_session(self) -> None:
        """Record new content of the session: segments first, then messages."""
        while self._recorded_segments < len(self.session.segments):
            self._recorded_segments += 1
            self.note(self.session.segments[self._recorded_segments - 1])
        while self._recorded_messages < len(self.session.messages):
            self._recorded_messages += 1
            self.note(MessageAdded(self.session.messages[self._recorded_messages - 1]))

    def note_compaction(self, compacted: Compacted) -> None:
        """Record that the session was restarted with the messages of `compacted`."""
        self._recorded_segments, self._recorded_messages = 0, len(compacted.messages)
        self.note(compacted)

    @property
    def usage(self) -> Usage:
        """Usage of the run so far."""
        return replace(
            self._tokens,
            calls=self.calls,
            tool_time_s=self.tool_time_s,
            wall_time_s=time.perf_counter() - self._start,
            subagents=self._subagents,
        )

    @property
    def _tokens(self) -> Usage:
        """Tokens, turns and cost of the run so far, without its sub-agents."""
        return _sum(self._spent, self.session.usage)

    def subagent_path(self) -> Path | None:
        """Return the file for the record of the next sub-agent, beside the file of this one, if any."""
        path, records = self.trajectory.path, self.trajectory.records
        number = sum(isinstance(record, SubagentStarted) for record in records) + 1
        return None if path is None else path.with_name(f"{path.stem}.agent{number}{path.suffix}")

    @contextmanager
    def subagent(self, call: ToolCall, trajectory: Trajectory) -> Iterator[None]:
        """Record that `call` runs an agent, keep that agent's record, and count its usage at the end."""
        self.trajectory.subagents.append(trajectory)
        file = None if trajectory.path is None else trajectory.path.name
        self.note(SubagentStarted(call.id, call.name, trajectory.header.id, file))
        try:
            yield
        finally:
            if (outcome := trajectory.outcome) is not None:
                self._subagents = total_usage([*filter(None, [self._subagents]), outcome.usage])
                self.note(SubagentFinished(call.id, outcome))

    async def world(self) -> World | None:
        """Return the files of the environment; None if it was never opened."""
        environment = self.context.environment
        if isinstance(environment, DeferredEnvironment) and not environment.is_open:
            return self._start_world
        return await World.of(environment)

    async def keep_world(self) -> None:
        """Keep the files for the turn that comes next, if the run keeps them."""
        if self.worlds is not None:
            self.worlds[self.turn] = await self.world()

    async def save_world(self) -> None:
        """Save the files beside the record, if the environment was opened.

        Raises:
            SnapshotError: see `Environment.snapshot`.
            TrajectoryWriteError: the file cannot be written.
        """
        world = await self.world()
        if world is not None:
            await anyio.to_thread.run_sync(save_snapshot, world.snapshot, self.trajectory)
            if world is not self._start_world:
                world.snapshot.close()

    def outcome(
        self, status: Status, answer: str | None = None, *, limit: LimitName | None = None, error: str | None = None
    ) -> Outcome:
        """Return the outcome of the run, including its usage."""
        return Outcome(status, answer, self.usage, limit, error)

    @property
    def spent_limit(self) -> LimitName | None:
        """The limit that forbids another turn, if any."""
        usage, limits = self._counted, self.limits
        if limits.max_turns is not None and usage.turns >= limits.max_turns:
            return "max_turns"
        if self._tokens_left is not None and self._tokens_left <= 0:
            return "max_tokens"
        if self._cost_spent:
            return "max_cost_usd"
        if limits.wall_time_s is not None and anyio.current_time() >= self.deadline:
            return "wall_time_s"
        if self.tool_time_left_s is not None and self.tool_time_left_s <= 0:
            return "tool_time_s"
        return None

    @property
    def _counted(self) -> Usage:
        """Tokens, turns and cost that count towards the limits, without sub-agents."""
        return _sum(self._before, self.session.usage)

    def charge(self) -> None:
        """Charge the cost since the previous charge to the shared budget and to the runs above this one."""
        cost = self.session.usage.cost_usd
        new = None if cost is None or self._charged is None else cost - self._charged
        if self.budget is not None and self._charged is not None:
            self.budget.add(new)
        above = self._above
        while above is not None:
            above._subagents_cost_usd += new or 0.0
            above = above._above
        self._charged = cost

    @property
    def _cost_spent(self) -> bool:
        usage, limit = self._counted, self.limits.max_cost_usd
        known = None if usage.cost_usd is None else usage.cost_usd + self._subagents_cost_usd
        over = limit is not None and usage.turns > 0 and (known is None or known >= limit)
        above = self._above is not None and self._above._cost_spent
        return over or above or (self.budget is not None and self.budget.spent)

    @property
    def tool_time_left_s(self) -> float | None:
        """Seconds that calls may still run; None without a limit."""
        if self.limits.tool_time_s is None:
            return None
        return self.limits.tool_time_s - self._shared_tool_time_s - self.tool_time_s

    @property
    def generation_limits(self) -> GenerationLimits:
        """Limits of the next turn. A thinking budget of 0 means that it must not think."""
        usage, limits = self._counted, self.limits
        thought = [limits.max_thinking_tokens_per_turn] if limits.max_thinking_tokens_per_turn is not None else []
        if limits.max_thinking_tokens is not None:
            thought.append(max(0, limits.max_thinking_tokens - usage.thinking_tokens))
        sampled = [bound for bound in (limits.max_tokens_per_turn, self._tokens_left) if bound is not None]
        return GenerationLimits(
            max_tokens=min(sampled, default=None),
            max_thinking_tokens=min(thought, default=None),
            max_repeated_tokens=limits.max_repeated_tokens,
        )

    def limit_of(self, reason: StopReason) -> LimitName | None:
        """Return the limit that ended a generation, if any."""
        self.refused = reason == "refused"
        if reason == "stop" or reason == "refused":
            return None
        left = self._tokens_left
        return "max_tokens_per_turn" if reason == "max_tokens" and (left is None or left > 0) else reason

    @property
    def _tokens_left(self) -> int | None:
        """Tokens that may still be sampled; None without a limit."""
        return None if self.limits.max_tokens is None else self.limits.max_tokens - self._counted.sampled_tokens


def _sum(before: Usage, now: Usage) -> Usage:
    return now if before == NOTHING else total_usage([before, now])


@dataclass(slots=True)
class RunContext(ToolContext[Deps]):
    """The context of the calls of a `Run`."""

    run: Run = field(kw_only=True, repr=False)
    call: ToolCall | None = field(kw_only=True, default=None)
    """The call that runs in this context, if it runs a sub-agent."""
