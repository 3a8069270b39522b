"""The result of a verification."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from agentkit_environments import ExecResult

RewardSource = Literal["exit", "reward.txt", "reward.json", "calls", "tests", "missing"]

MAX_REWARD = 1e6
"""Maximum magnitude of a reward; sums and squares of larger values could overflow."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """Result of a verification. A verifier that timed out gives reward 0: the agent's files can make it hang."""

    reward: float
    source: RewardSource
    exit_code: int | None  # None: the command did not finish
    output: str  # the end of its standard output and standard error
    timed_out: bool
    duration_s: float
    error: str | None = None  # why the reward is 0, if not by the verifier's own decision
    refused: tuple[str, ...] = ()  # what the network of the verifier's own sandbox refused, from `refusals`
    tests: int = 0  # number of tests with a result, if the source is "tests"

    @property
    def started(self) -> bool:
        """True if the verifier's command ran. A shell exits with 126 or 127 if a command cannot start.

        Tests that must write a reward and did not, and those whose output has no result, count as not started.
        """
        if self.source == "tests":
            return self.timed_out or self.tests > 0
        if self.source == "missing":
            return False
        return self.timed_out or self.exit_code not in (None, 126, 127)


def broken(error: str) -> Verdict:
    """Return a verdict of 0 for work that cannot be scored, where the machine is not at fault."""
    return Verdict(0.0, "exit", None, "", False, 0.0, error)


def tail(result: ExecResult, limit: int = 8_000) -> str:
    """Return the end of a command's standard output and standard error."""
    return "\n".join(part for part in (result.stdout.rstrip(), result.stderr.rstrip()) if part)[-limit:]
