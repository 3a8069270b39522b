"""List prices of hosted models, and the cost of requests in US dollars.

The table is `prices.yaml`. A table of your own, named in the environment variable AGENTKIT_PRICES, comes before it:

    prices:
    - host: localhost:8000
      models: ["*"]
      as_of: 2026-11-29
      source: our own server
      input: 0
      cache_hit: 0
      output: 0

A price that is not listed is unknown, never 0, and a sum with an unknown part is unknown.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator, Sequence
from datetime import UTC, date, datetime, timedelta
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from typing import Annotated, Final, Literal, Protocol, Self, runtime_checkable

from pydantic import AfterValidator, Field, model_validator

from agentkit.errors import PriceError, TaskFileError
from agentkit.events import TurnFinished, TurnStarted
from agentkit.model import TokenSegment, total_cost
from agentkit.models.remote.provider import TokenCounts
from agentkit.task import Strict, load_yaml
from agentkit.trajectory import Trajectory

BUILT_IN: Final = Path(__file__).with_name("prices.yaml")
VARIABLE: Final = "AGENTKIT_PRICES"
REFERENCE: Final = ("api.deepseek.com", "deepseek-flash")
"""Host and model whose list price says what a run of an embedded model would have cost."""

DAYS: Final = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")

Usd = Annotated[float, Field(ge=0, le=1e6)]


def _a_date(text: str) -> str:
    try:
        date.fromisoformat(f"{text}-01" if re.fullmatch(r"\d{4}-\d\d", text) else text)
    except ValueError:
        raise ValueError(f"{text!r} is not a date; write YYYY-MM-DD or YYYY-MM") from None
    return text


def _minutes(hours: str) -> tuple[int, int]:
    """Return the minutes of the day at which "HH:MM-HH:MM" starts (inclusive) and ends (exclusive)."""
    start, end = (int(clock[:2]) * 60 + int(clock[3:]) for clock in hours.split("-"))
    return start, end


def _a_window(text: str) -> str:
    if not re.fullmatch(r"\d\d:[0-5]\d-\d\d:[0-5]\d", text) or not 0 <= _minutes(text)[0] < _minutes(text)[1] <= 1440:
        raise ValueError(f'{text!r} must be hours of one day such as "01:00-04:00", the latest end is 24:00')
    return text


class Rates(Strict):
    """US dollars per million tokens; None means unknown."""

    input: Usd  # prompt tokens that are not in the cache
    cache_hit: Usd | None = None
    cache_write: Usd | None = None
    output: Usd  # includes reasoning

    def cost(self, tokens: TokenCounts) -> float | None:
        """Return the cost of one request in US dollars; None if the price of some of its tokens is unknown."""
        plain = max(0, tokens.input_tokens - tokens.cache_hit_tokens - tokens.cache_write_tokens)
        parts = (
            (plain, self.input),
            (tokens.cache_hit_tokens, self.cache_hit),
            (tokens.cache_write_tokens, self.cache_write),
            (tokens.output_tokens, self.output),
        )
        total = 0.0
        for count, rate in parts:
            if count and rate is None:
                return None
            total += count * (rate or 0.0)
        return total / 1e6


class Tier(Rates):
    """Rates for the requests that meet every condition given."""

    over_input_tokens: int | None = Field(default=None, ge=1)
    utc_hours: list[Annotated[str, AfterValidator(_a_window)]] | None = Field(default=None, min_length=1)
    days: list[Literal["mon", "tue", "wed", "thu", "fri", "sat", "sun"]] | None = Field(default=None, min_length=1)

    @model_validator(mode="after")
    def _conditional(self) -> Self:
        if self.over_input_tokens is None and self.utc_hours is None and self.days is None:
            raise ValueError("a tier needs a condition: over_input_tokens, utc_hours or days")
        return self

    def fits(self, tokens: TokenCounts, at: datetime) -> bool:
        """Return whether a request sent at the time `at` is priced at this tier."""
        minute = at.hour * 60 + at.minute
        return (
            (self.over_input_tokens is None or tokens.input_tokens > self.over_input_tokens)
            and (self.days is None or DAYS[at.weekday()] in self.days)
            and (self.utc_hours is None or any(start <= minute < end for start, end in map(_minutes, self.utc_hours)))
        )


class Price(Rates):
    """The list price of some models of one host."""

    host: str = Field(min_length=1)
    models: list[str] = Field(min_length=1)
    as_of: Annotated[str, AfterValidator(_a_date)]
    source: str = Field(min_length=1)
    tiers: list[Tier] = Field(default_factory=list)

    def lists(self, model: str, host: str) -> bool:
        """Return whether this is a price of the model. Patterns ignore case."""
        return fnmatchcase(host.lower(), self.host.lower()) and any(
            fnmatchcase(model.lower(), pattern.lower()) for pattern in self.models
        )

    def request_cost(self, tokens: TokenCounts, *, at: datetime) -> float | None:
        """Return the cost of one request, sent at the time `at`, in US dollars; None if it is unknown."""
        at = at.astimezone(UTC)
        rates = next((tier for tier in self.tiers if tier.fits(tokens, at)), self)
        return rates.cost(tokens)


class _Table(Strict):
    prices: list[Price]


@cache
def _built_in() -> tuple[Price, ...]:
    return tuple(load_yaml(BUILT_IN, _Table).prices)


class Prices:
    """A table of list prices."""

    def __init__(self, rows: Sequence[Price]) -> None:
        """Create a table from rows. The first row that matches a model counts."""
        self.rows = rows

    @classmethod
    def load(cls, path: str | Path | None = None) -> Self:
        """Read the table at `path`, by default the one named in AGENTKIT_PRICES, followed by the packaged one.

        Raises:
            PriceError: a table cannot be read; the message has one `FILE:LINE: problem` line per problem.
        """
        path = path or os.environ.get(VARIABLE) or None
        try:
            own = () if path is None else load_yaml(path, _Table).prices
            return cls((*own, *_built_in()))
        except TaskFileError as exc:
            raise PriceError(f"The price table cannot be used.\n{exc}") from exc

    def find(self, model: str, *, host: str) -> Price | None:
        """Return the price of a model, by its name in the API of `host`; None if it is unknown."""
        return next((row for row in self.rows if row.lists(model, host)), None)


@runtime_checkable
class PricedModel(Protocol):
    """A model whose tokens have a price."""

    @property
    def price(self) -> Price | None:
        """The list price of its tokens; None if it is unknown."""
        ...


def price_of(model: object) -> Price | None:
    """Return the list price of a model; None if it is unknown, or if nothing is charged for the model."""
    return model.price if isinstance(model, PricedModel) else None


def check_price(model: object, name: str) -> None:
    """Refuse a limit on the cost of a model whose price is unknown.

    Raises:
        PriceError: the price is unknown; the message says what to do.
    """
    if not isinstance(model, PricedModel):
        raise PriceError(f"{name} is not a hosted model, and nothing is charged for it; leave out the limit on cost")
    if model.price is None:
        raise PriceError(
            f"the price of {name} is unknown, so a limit on its cost cannot be kept; put its price into a file in the "
            f"format of {BUILT_IN} and set {VARIABLE} to that file, or leave out the limit on cost"
        )


def reference_price() -> Price:
    """Return the list price that is used to estimate what runs of embedded models would have cost.

    Raises:
        PriceError: see `Prices.load`.
    """
    host, model = REFERENCE
    price = Prices.load().find(model, host=host)
    assert price is not None, "the packaged table has it"
    return price


def requests_of(trajectory: Trajectory) -> Iterator[tuple[datetime, TokenCounts]]:
    """Yield the times and token counts of the API requests that would have generated an embedded model's turns.

    Each request has the whole conversation so far. The tokens of earlier turns count as cache hits, and so do those
    that the engine found in its prefix cache. Forced ids of a turn count as output.
    """
    created = datetime.fromisoformat(trajectory.header.created)
    at, earlier, prompt, output, found, found_before = created, 0, 0, 0, 0, 0
    for time_s, record in zip((*trajectory.times_s, 0.0), (*trajectory.records, None), strict=True):
        match record:
            case TurnStarted() | None:
                if prompt + output:
                    cached = earlier + min(prompt, max(0, found))
                    yield at, TokenCounts(earlier + prompt, cache_hit_tokens=cached, output_tokens=output)
                at, earlier = created + timedelta(seconds=time_s), earlier + prompt + output
                prompt = output = found = 0
            case TokenSegment(kind="prompt"):
                prompt += len(record.ids)
            case TokenSegment():
                output += len(record.ids)
            case TurnFinished(usage=usage):
                # the usage counts from the start of the run, and the record may have several runs
                found = usage.cache_hit_tokens - (found_before if usage.turns > 1 else 0)
                found_before = usage.cache_hit_tokens
            case _:
                pass


def list_cost(trajectory: Trajectory, price: Price) -> float | None:
    """Return what the turns of an embedded model would have cost at a list price, in US dollars; None if unknown.

    The result is also None for a model behind an API: its cost is in the trajectory's usage.
    """
    if trajectory.header.dialect is None:
        return None
    return total_cost(price.request_cost(tokens, at=at) for at, tokens in requests_of(trajectory))


def describe_reference(price: Price) -> str:
    """Return a description of the reference price, such as "deepseek-flash list prices (2026-10-27)"."""
    return f"{REFERENCE[1]} list prices ({price.as_of})"


def dollars(cost: float | None) -> str:
    """Return a cost as text for people, with at least two significant digits; "unknown" for None."""
    if cost is None:
        return "unknown"
    if cost >= 1 or cost == 0:
        return f"${cost:,.2f}"
    return f"${cost:.{max(4, 1 - math.floor(math.log10(cost)))}f}"
