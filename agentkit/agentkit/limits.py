"""Limits of a run, and limits on concurrent calls."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, fields

import anyio

from agentkit.checks import check_positive


@dataclass(frozen=True, slots=True)
class Limits:
    """The budget of one `run` or one `continue_`; None means no limit. Generation stops at the exact token.

    Every limit except the thinking budgets ends the run with status "limit". A spent thinking budget closes the
    thinking block with a forced `</think>`, and the turn continues; once `max_thinking_tokens` are spent, later turns
    do not think.
    """

    max_turns: int | None = 100
    """Turns of the model."""
    max_tokens: int | None = None
    """Sampled tokens, over all turns."""
    max_tokens_per_turn: int | None = 32_768
    """Sampled tokens of one turn, including thinking. Keeps a turn that never ends from filling the context."""
    max_thinking_tokens: int | None = None
    """Sampled thinking tokens, over all turns."""
    max_thinking_tokens_per_turn: int | None = None
    """Sampled thinking tokens of one turn."""
    max_cost_usd: float | None = None
    """Cost in US dollars, over all turns. Checked before each turn, because an API reports the cost of a turn at its
    end; the last turn may exceed the limit. The known cost of sub-agents counts too, and no sub-agent starts another
    turn once the limit is reached. The price of the model must be known."""
    wall_time_s: float | None = None
    """Seconds since the start of the run."""
    tool_time_s: float | None = None
    """Seconds during which at least one call was running, over all turns."""
    call_timeout_s: float = 60.0
    """Seconds that one call may run. A call that exceeds it gets an error result; the other calls keep theirs."""
    max_calls_per_turn: int = 128
    """Calls that one turn may run; every further call gets an error result."""
    max_depth: int = 4
    """Maximum levels of sub-agents (`Agent.as_tool`) below the run. A call beyond them gets an error result."""
    max_repeated_tokens: int | None = 2048
    """Repetitive tokens at the end of a turn: copies of one block of at most 256 tokens, only digits, or only white
    space. Inside a block of calls the limit is four times as high, because file contents may well repeat. It is
    checked every 64 tokens, and a run that it ends has the limit "repetition"."""

    def __post_init__(self) -> None:
        for field in fields(self):
            whole = not field.name.endswith(("_s", "_usd"))
            none = field.name not in ("call_timeout_s", "max_calls_per_turn", "max_depth")
            check_positive(f"Limits.{field.name}", getattr(self, field.name), whole=whole, none=none)


class CostBudget:
    """A limit on the total cost of all runs of the agents that share this object.

    Once it is spent, no agent starts another turn, and a run that needs one ends with the limit "max_cost_usd".
    Turns in progress continue. A cost that turns out to be unknown spends the whole budget.

    Attributes:
        max_cost_usd: The maximum, in US dollars.
        cost_usd: The cost so far; None if it is unknown.
    """

    def __init__(self, max_cost_usd: float) -> None:
        """Set the maximum, in US dollars.

        Raises:
            TypeError, ValueError: it is not a positive number.
        """
        check_positive("CostBudget(max_cost_usd)", max_cost_usd, whole=False)
        self.max_cost_usd = max_cost_usd
        self.cost_usd: float | None = 0.0

    def add(self, cost_usd: float | None) -> None:
        """Add the cost of a turn; None if it is unknown."""
        self.cost_usd = None if self.cost_usd is None or cost_usd is None else self.cost_usd + cost_usd

    @property
    def spent(self) -> bool:
        """True if no further turn may start."""
        return self.cost_usd is None or self.cost_usd >= self.max_cost_usd


class ConcurrencyLimits:
    """Maximum number of calls that run at the same time: per turn, per tool, and in total.

    Agents that are given the same object share its per-tool and total limits.
    """

    def __init__(self, *, per_turn: int = 32, per_tool: int = 32, total: int = 64) -> None:
        """Set the limits, each a number of calls.

        Raises:
            TypeError, ValueError: a limit is not a whole number of at least 1.
        """
        for name, value in (("per_turn", per_turn), ("per_tool", per_tool), ("total", total)):
            check_positive(f"ConcurrencyLimits({name}=...)", value, whole=True)
        self.per_turn = per_turn
        self.per_tool = per_tool
        self.total = total
        self.in_all = anyio.Semaphore(total, fast_acquire=True)
        self._of_tool = defaultdict[str, anyio.Semaphore](lambda: anyio.Semaphore(per_tool, fast_acquire=True))

    def turn(self) -> anyio.Semaphore:
        """Return a new semaphore for the calls of one turn."""
        return anyio.Semaphore(self.per_turn, fast_acquire=True)

    def of_tool(self, name: str) -> anyio.Semaphore:
        """Return the semaphore shared by all calls of one tool."""
        return self._of_tool[name]
