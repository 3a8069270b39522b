"""The result of a run."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Generic

from typing_extensions import TypeVar

from agentkit.checks import run_blocking
from agentkit.events import LimitName, Outcome, Status
from agentkit.forks import BestOf, Judge, Origin, best_of
from agentkit.messages import Prompt
from agentkit.model import Usage
from agentkit.trajectory import Trajectory
from agentkit_environments import Environment

T = TypeVar("T", default=Any)


@dataclass(frozen=True, slots=True)
class RunResult(Generic[T]):
    """The outcome of a run, and its trajectory.

    Attributes:
        outcome: The outcome, as recorded.
        output: The answer as a value of the agent's `output_type`, or as a JSON value if it has an `output_schema`,
            else its text; None without an answer.
        trajectory: The record of the session; it grows when the run is continued.
    """

    outcome: Outcome
    output: T | None
    trajectory: Trajectory = field(repr=False)
    _origin: Origin[T] = field(repr=False, compare=False)

    @property
    def status(self) -> Status:
        """The reason the run ended.

        - "submitted": the model called `submit`.
        - "answered": a turn had text and no calls.
        - "no_answer": a turn had neither: it ended while thinking, or its text was empty or white space.
        - "invalid_output": the answer (submitted or not) does not fit the agent's `output_type` or `output_schema`,
          even after the model was told why and answered once more.
        - "limit": a limit stopped the run; `limit` names it.
        """
        return self.outcome.status

    @property
    def answer(self) -> str | None:
        """The argument of `submit`, or the text of the last turn; None with any other status.

        A Markdown fence around an answer that must be JSON is removed.
        """
        return self.outcome.answer

    @property
    def error(self) -> str | None:
        """The reason why there is no answer, or why the answer is invalid."""
        return self.outcome.error

    @property
    def limit(self) -> LimitName | None:
        """The limit that stopped the run."""
        return self.outcome.limit

    @property
    def usage(self) -> Usage:
        """Tokens, calls and seconds of this run; `usage.total` includes those of its sub-agents."""
        return self.outcome.usage

    async def continue_(self, task: Prompt, *, environment: Environment | None = None) -> RunResult[T]:
        """Send `task` in the same session and trajectory, and run again.

        The model continues from exactly the recorded token ids. Tools get the `deps` of the run. Calls run in
        `environment` if given, else in the environment given to the run. If the run opened its own sandbox, they run in
        a new one that starts with its files: the work directory and /tmp.

        Raises:
            ValueError: this result was already continued; continue the newer one.
            Other errors: see `Agent.run`.
        """
        return await self._origin.go_on(task, environment)

    def continue_sync(self, task: Prompt) -> RunResult[T]:
        """Run `continue_` from synchronous code, after `run_sync`.

        Raises:
            RunningLoopError: an event loop is running, as in a notebook. Use `await result.continue_(...)` there.
        """
        return run_blocking(lambda: self.continue_(task), instead="await result.continue_(...)")

    async def fork(self, *, at_turn: int, n: int = 1, seed: int | None = None) -> list[RunResult[T]]:
        """Run `n` branches, which share the turns before `at_turn` with this run and generate that turn anew.

        The branches run at the same time, each in a new sandbox with the files from before the turn (processes are not
        forked) and with its own record, beside that of this run if it has a file (`run.fork1.jsonl`). The shared token
        ids are in every branch, and the engine computes none of them again that it still has. A branch with the seed of
        this run repeats it, as long as its tools do. Limits count the shared turns; usage does not.

        Args:
            at_turn: Number of a turn of this session, as in `TurnStarted`: 0 shares only the prompt.
            n: Number of branches.
            seed: Sampling seed of the first branch; the others have the numbers after it. Default: the number after
                the seed of this run. Without any seed, each branch draws its own.

        Raises:
            ValueError: there is no such turn, or the run used an environment and was not run with `snapshots=True`.
            Other errors: see `Agent.run`. They stop all branches.
        """
        return (await self._origin.fork(at_turn, n, seed, None))[0]

    def fork_sync(self, *, at_turn: int, n: int = 1, seed: int | None = None) -> list[RunResult[T]]:
        """Run `fork` from synchronous code, after `run_sync`.

        Raises:
            RunningLoopError: an event loop is running, as in a notebook. Use `await result.fork(...)` there.
        """
        return run_blocking(lambda: self.fork(at_turn=at_turn, n=n, seed=seed), instead="await result.fork(...)")

    async def best_of(self, n: int, judge: Judge, *, at_turn: int, seed: int | None = None) -> BestOf[T]:
        """Run `n` branches as `fork` does, score each, and return them with the best one.

        Args:
            n: Number of branches.
            judge: A function, async or not, of a result and its environment, which is still open; it returns a number.
            at_turn: See `fork`.
            seed: See `fork`.

        Raises:
            TypeError, ValueError: the judge returns no number.
            Other errors: see `fork`.
        """
        return best_of(*await self._origin.fork(at_turn, n, seed, judge))

    def best_of_sync(self, n: int, judge: Judge, *, at_turn: int, seed: int | None = None) -> BestOf[T]:
        """Run `best_of` from synchronous code, after `run_sync`.

        Raises:
            RunningLoopError: an event loop is running, as in a notebook. Use `await result.best_of(...)` there.
        """
        return run_blocking(
            lambda: self.best_of(n, judge, at_turn=at_turn, seed=seed), instead="await result.best_of(...)"
        )
