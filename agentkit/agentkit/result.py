"""What a run gives back."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

import anyio

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
        """ "submitted" by `submit`, "answered" by a turn without calls, or stopped by a "limit".

        With an `answer_schema` the first two mean that the answer fits; one that does not is an "invalid_answer".
        """
        return self.outcome.status

    @property
    def answer(self) -> str | None:
        """What `submit` was given, else the text of the last turn; None when a limit came first, or it is invalid."""
        return self.outcome.answer

    @property
    def error(self) -> str | None:
        """What is wrong with an invalid answer, and where."""
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
        """`continue_` for code that is not async, after `run_sync`."""
        return anyio.run(self.continue_, text)
