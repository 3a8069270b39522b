"""What a run gives back."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

from agentkit.checks import run_blocking
from agentkit.events import LimitName, Outcome, Status
from agentkit.model import Usage
from agentkit.trajectory import Trajectory
from agentkit_environments import Environment

Continue = Callable[[str, Environment | None], Awaitable["RunResult"]]


@dataclass(frozen=True, slots=True)
class RunResult:
    """How a run ended, and its record.

    Attributes:
        outcome: how it ended, as the record has it.
        trajectory: everything that happened; grows when the run is continued.
    """

    outcome: Outcome
    trajectory: Trajectory = field(repr=False)
    _continue: Continue = field(repr=False, compare=False)

    @property
    def status(self) -> Status:
        """How the run ended.

        - "submitted": the model called `submit`.
        - "answered": a turn had text and no calls.
        - "no_answer": a turn had neither: it ended inside its thought, or said nothing but white space.
        - "invalid_output": the answer, by either way, does not fit the agent's `output_schema`.
        - "limit": a limit stopped it; `limit` says which.
        """
        return self.outcome.status

    @property
    def answer(self) -> str | None:
        """What `submit` was given, else the text of the last turn; None with any other status."""
        return self.outcome.answer

    @property
    def output(self) -> Any:
        """The answer as a JSON value, if the agent has an `output_schema`; else its text. None without an answer."""
        if self.answer is None or self.trajectory.header.sampling.output_schema is None:
            return self.answer
        return json.loads(self.answer)

    @property
    def error(self) -> str | None:
        """Why there is no answer, or what is wrong with an invalid one, and where."""
        return self.outcome.error

    @property
    def limit(self) -> LimitName | None:
        """Which limit stopped it."""
        return self.outcome.limit

    @property
    def usage(self) -> Usage:
        """Tokens, calls and seconds of this run."""
        return self.outcome.usage

    async def continue_(self, text: str, *, environment: Environment | None = None) -> RunResult:
        """Say `text` in the same session, in the same trajectory, and run on.

        The model goes on from exactly these ids. The calls run in `environment`, else in the one the run was given;
        if the run had opened its own, they run in a new one that starts with the files of the old one's work directory.

        Raises:
            ValueError: this result was continued already; continue the newer one.
            Other errors: as `Agent.run`.
        """
        return await self._continue(text, environment)

    def continue_sync(self, text: str) -> RunResult:
        """`continue_` for code that is not async, after `run_sync`.

        Raises:
            RunningLoopError: an event loop runs already, as in a notebook; there, `await result.continue_(...)`.
        """
        return run_blocking(lambda: self.continue_(text), instead="await result.continue_(...)")
