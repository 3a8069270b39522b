"""The result of a run."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, Generic

from typing_extensions import TypeVar

from agentkit.checks import run_blocking
from agentkit.events import LimitName, Outcome, Status
from agentkit.messages import Prompt
from agentkit.model import Usage
from agentkit.trajectory import Trajectory
from agentkit_environments import Environment

T = TypeVar("T", default=Any)
Continue = Callable[[Prompt, Environment | None], Awaitable["RunResult[T]"]]


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
    _continue: Continue[T] = field(repr=False, compare=False)

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
        a new one that starts with the files of its work directory.

        Raises:
            ValueError: this result was already continued; continue the newer one.
            Other errors: see `Agent.run`.
        """
        return await self._continue(task, environment)

    def continue_sync(self, task: Prompt) -> RunResult[T]:
        """Run `continue_` from synchronous code, after `run_sync`.

        Raises:
            RunningLoopError: an event loop is running, as in a notebook. Use `await result.continue_(...)` there.
        """
        return run_blocking(lambda: self.continue_(task), instead="await result.continue_(...)")
