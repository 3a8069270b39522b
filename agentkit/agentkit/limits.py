"""How much a run may use, and how wide its calls may run."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, fields

import anyio

from agentkit.checks import check_positive


@dataclass(frozen=True, slots=True)
class Limits:
    """The budget of one `run` (or one `continue_`); None means no limit. A limit inside generation stops at that token.

    All but the thinking budgets end the run with status "limit". A spent thinking budget closes the thought with a
    forced `</think>` and the turn goes on; once `max_thinking_tokens` are spent, later turns do not think.
    """

    max_turns: int | None = 100
    """Turns of the model."""
    max_tokens: int | None = None
    """Tokens sampled, over all turns."""
    max_tokens_per_turn: int | None = 32_768
    """Tokens sampled in one turn, thought included: a model that never ends its turn does not fill its context."""
    max_thinking_tokens: int | None = None
    """Tokens sampled inside thoughts, over all turns."""
    max_thinking_tokens_per_turn: int | None = None
    """Tokens sampled inside the thought of one turn."""
    wall_time_s: float | None = None
    """Seconds from the start of the run."""
    tool_time_s: float | None = None
    """Seconds during which at least one call was running, over all turns."""
    call_timeout_s: float = 60.0
    """Seconds one call may run; a call that exceeds it gets an error result, its siblings keep theirs."""
    max_calls_per_turn: int = 128
    """Calls of one turn that are run; those beyond get an error result."""
    max_repeated_tokens: int | None = 2048
    """Tokens at the end of one turn that only repeat: copies of a block of at most 256 tokens, nothing but digits, or
    nothing but white space. Inside a block of calls it takes four times as many, because what is written to a file may
    well repeat. Looked at every 64 tokens; the run's limit is then called "repetition"."""

    def __post_init__(self) -> None:
        for field in fields(self):
            seconds = field.name.endswith("_s")
            none = field.name not in ("call_timeout_s", "max_calls_per_turn")
            check_positive(f"Limits.{field.name}", getattr(self, field.name), whole=not seconds, none=none)


class ConcurrencyLimits:
    """How many calls run at the same time: in one turn, of one tool, and in all.

    Give one object to several agents and they share its bounds on one tool and in all.
    """

    def __init__(self, *, per_turn: int = 32, per_tool: int = 32, total: int = 64) -> None:
        """Each a number of calls.

        Raises:
            TypeError, ValueError: a bound is no whole number of at least 1.
        """
        for name, value in (("per_turn", per_turn), ("per_tool", per_tool), ("total", total)):
            check_positive(f"ConcurrencyLimits({name}=...)", value, whole=True)
        self.per_turn = per_turn
        self.per_tool = per_tool
        self.total = total
        self.in_all = anyio.Semaphore(total, fast_acquire=True)
        self._of_tool = defaultdict[str, anyio.Semaphore](lambda: anyio.Semaphore(per_tool, fast_acquire=True))

    def turn(self) -> anyio.Semaphore:
        """A new bound for the calls of one turn."""
        return anyio.Semaphore(self.per_turn, fast_acquire=True)

    def of_tool(self, name: str) -> anyio.Semaphore:
        """The bound that all calls of one tool share."""
        return self._of_tool[name]
