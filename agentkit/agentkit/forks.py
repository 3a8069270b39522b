"""Forks of a run: branches that share its first turns, and the best of several.

A branch begins with the exact token ids (or messages, behind an API) of the turns before it, and with the files that
the sandbox had then. It gets a session and a sandbox of its own; the engine finds the shared ids in its prefix cache.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Awaitable, Callable, Sequence
from copy import copy
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic
from uuid import uuid4

import anyio
from typing_extensions import TypeVar

from agentkit.checks import check_positive, check_type
from agentkit.errors import first_cause
from agentkit.events import Event, TurnStarted
from agentkit.interrupted import fork_point
from agentkit.messages import Prompt
from agentkit_environments import Environment, EnvironmentSpec, Snapshot, open_environment

if TYPE_CHECKING:
    from agentkit.agent import Agent
    from agentkit.result import RunResult
    from agentkit.trajectory import Trajectory

T = TypeVar("T", default=Any)

Judge = Callable[["RunResult[Any]", Environment], "float | Awaitable[float]"]
"""A function of a result and its environment, which is still open; returns a number, and larger is better."""


@dataclass(frozen=True, slots=True)
class BestOf(Generic[T]):
    """Several runs of the same task with their scores.

    Attributes:
        best: The result with the highest score; the first of them, if several have it.
        results: All results, in the order of their seeds.
        scores: The judge's scores of `results`.
    """

    best: RunResult[T]
    results: tuple[RunResult[T], ...]
    scores: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class World:
    """The files of a sandbox at one moment, and the environment that they were captured in; None if they are from a
    file."""

    environment: Environment | None
    snapshot: Snapshot

    @classmethod
    async def of(cls, environment: Environment) -> World:
        """Capture the files of an environment."""
        return cls(environment, await environment.snapshot())

    async def open(self, spec: EnvironmentSpec) -> Environment:
        """Open an environment with these files."""
        if self.environment is None:
            return await open_environment(spec, snapshot=self.snapshot)
        return await self.environment.reopen(self.snapshot)

    @property
    def spec(self) -> EnvironmentSpec:
        """The specification of the environment that the files came from; the default one if they are from a file."""
        return EnvironmentSpec() if self.environment is None else self.environment.spec


Worlds = dict[int, World | None]
"""The files before each turn, by its number; None if the run had not opened its sandbox yet."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin(Generic[T]):
    """The state from which a finished run is continued and forked.

    Attributes:
        agent: The agent of the run.
        trajectory: Its record, which grows when the run is continued.
        environment: The environment that the caller gave to the run, if any.
        world: The files at the end of a run in its own sandbox; None if the sandbox was never opened.
        is_saved: False if these files could not be captured.
        worlds: The files before each turn, if the run kept them.
        deps: The run's object for the tools.
        end: Number of records of the trajectory at the end of the run.
    """

    agent: Agent[T]
    trajectory: Trajectory
    environment: Environment | None
    world: World | None
    is_saved: bool
    worlds: Worlds | None
    deps: object
    end: int = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "end", len(self.trajectory.records))

    async def go_on(self, task: Prompt, elsewhere: Environment | None) -> RunResult[T]:
        """See `RunResult.continue_`."""
        if len(self.trajectory.records) != self.end:
            raise ValueError("this result was already continued; continue the newer result")
        here = elsewhere or self.environment
        if here is None and not self.is_saved:
            raise ValueError("the work directory of that run was not saved; pass environment= to continue")
        return await self.agent._run(
            task,
            ignore,
            environment=here,
            history=self.trajectory,
            deps=self.deps,
            world=None if here else self.world,
            worlds=None if self.worlds is None else {**self.worlds},
        )

    async def fork(
        self, at_turn: int, n: int, seed: int | None, judge: Judge | None
    ) -> tuple[list[RunResult[T]], list[float]]:
        """Run `n` branches; see `RunResult.fork` and `best_of`."""
        check_positive("fork(n)", n, whole=True)
        count = self._records_before(at_turn)
        world = self._world(at_turn)
        header = self.trajectory.header
        metadata = {**header.metadata, "forked_from": header.id, "at_turn": at_turn}

        def start(agent: Agent[T], path: Path | None) -> Start:
            own = replace(header, id=uuid4().hex, sampling=agent.sampling, metadata=metadata)
            branch = self.trajectory.branch(own, path, count)
            worlds = None
            if self.worlds is not None:
                worlds = {turn: kept for turn, kept in self.worlds.items() if turn <= at_turn}
            return lambda visit: agent._run(
                None,
                ignore,
                environment=None,
                history=branch,
                point=fork_point(branch),
                deps=self.deps,
                world=world,
                worlds=worlds,
                visit=visit,
            )

        if seed is None and self.agent.sampling.seed is not None:
            seed = self.agent.sampling.seed + 1
        agents, paths = seeded(self.agent, n, seed), fork_paths(self.trajectory.path, n)
        return await run_all([start(*each) for each in zip(agents, paths, strict=True)], judge)

    def _records_before(self, turn: int) -> int:
        """Return the number of records before a turn."""
        check_type("at_turn", turn, int, "the number of a turn")
        records = self.trajectory.records[: self.end]
        starts = {record.turn: index for index, record in enumerate(records) if isinstance(record, TurnStarted)}
        if turn not in starts:
            known = f"{min(starts)} to {max(starts)}" if starts else "but it has none"
            raise ValueError(f"at_turn must be the number of a turn of this session, {known}; got {turn}")
        return starts[turn]

    def _world(self, turn: int) -> World | None:
        if self.worlds is not None and turn in self.worlds:
            return self.worlds[turn]
        if self.environment is not None or self.world is not None or not self.is_saved:
            raise ValueError("the run kept no snapshots of its environment; run it with snapshots=True to fork it")
        return None


Visit = Callable[["RunResult[Any]", Environment], Awaitable[None]]
"""Called with the result of a run while its environment is open."""
Start = Callable[[Visit], Awaitable["RunResult[Any]"]]


async def run_all(starts: Sequence[Start], judge: Judge | None) -> tuple[list[RunResult[T]], list[float]]:
    """Run branches at the same time; return their results and, with a judge, their scores, both in order."""
    results: dict[int, RunResult[T]] = {}
    scores: dict[int, float] = {}

    async def run(index: int, start: Start) -> None:
        async def visit(result: RunResult[T], environment: Environment) -> None:
            if judge is not None:
                scores[index] = await score_of(judge, result, environment)

        results[index] = await start(visit)

    try:
        async with anyio.create_task_group() as task_group:
            for index, start in enumerate(starts):
                task_group.start_soon(run, index, start, name=f"agentkit: branch {index}")
    except BaseExceptionGroup as group:
        error = first_cause(group)
        raise error from error.__cause__
    return [results[index] for index in sorted(results)], [scores[index] for index in sorted(scores)]


def best_of(results: Sequence[RunResult[T]], scores: Sequence[float]) -> BestOf[T]:
    """Return the results with the best of them."""
    return BestOf(results[scores.index(max(scores))], tuple(results), tuple(scores))


async def score_of(judge: Judge, result: RunResult[T], environment: Environment) -> float:
    """Return the judge's score.

    Raises:
        TypeError, ValueError: it is not a number.
    """
    score = judge(result, environment)
    if inspect.isawaitable(score):
        score = await score
    if isinstance(score, bool):
        score = float(score)
    if not isinstance(score, int | float):
        raise TypeError(f"a judge must return a number, got {score!r}")
    if math.isnan(score):
        raise ValueError("a judge must return a number, got NaN")
    return score


def seeded(agent: Agent[T], n: int, seed: int | None) -> list[Agent[T]]:
    """Return copies of the agent with the sampling seeds `seed`, `seed + 1` and so on; without one, none has a seed."""
    agents = [copy(agent) for _ in range(n)]
    for index, each in enumerate(agents):
        each.sampling = agent.sampling.override(seed=None if seed is None else seed + index)
    return agents


def fork_paths(path: Path | None, n: int) -> list[Path | None]:
    """Return `n` new files beside the record of a run (`run.fork1.jsonl` beside `run.jsonl`), if it has a file."""
    if path is None:
        return [None] * n
    paths: list[Path | None] = []
    number = 1
    while len(paths) < n:
        each = path.with_name(f"{path.stem}.fork{number}{path.suffix}")
        if not each.exists():
            paths.append(each)
        number += 1
    return paths


def ignore(event: Event) -> None:
    """Discard an event of a run that is not streamed."""
