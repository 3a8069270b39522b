"""Ledgers: a name and a number on each line, such as receipts, measurements and scores."""

from __future__ import annotations

from dataclasses import dataclass

from agentkit_evals.synth.draw import Draw
from agentkit_evals.synth.world import Artifact


@dataclass(frozen=True, slots=True)
class Ledger(Artifact):
    """Names with a number each. `field` is the awk expression of the number, `noun` what the lines are, in the plural.

    `entries` has the numbers as they are written. `decimal` says that they have decimals.
    """

    entries: tuple[tuple[str, str], ...]
    field: str
    decimal: bool
    noun: str

    @property
    def shape(self) -> str:
        """The number's place and kind: what makes a task over this ledger differ from others."""
        return f"{self.field} {self.decimal} {self.noun}"

    @property
    def total(self) -> float:
        return sum(float(number) for _, number in self.entries)


_LINES = (
    *("{name}: {number}", "{name}: {number}", "{name} {number}", "{name} = {number}", "{name} - {number}"),
    *("{name}\t{number}", "{name}: {number} {unit}", "{name} {number} {unit}", "- {name}: {number}"),
)
_KINDS: tuple[tuple[str, tuple[str, ...], str, int, int, str], ...] = (
    ("items", ("receipt", "shopping", "groceries", "bill", "supermarket"), "food", 60, 2, "EUR USD GBP CHF"),
    ("costs", ("costs", "expenses", "budget", "spending", "trip"), "noun", 900, 2, "EUR USD GBP kr"),
    ("expenses", ("expenses", "travel", "office", "monthly"), "noun", 400, 2, "EUR USD GBP kr"),
    ("donations", ("donations", "gifts", "fundraiser"), "first_name", 250, 0, "EUR USD"),
    ("scores", ("scores", "points", "results", "quiz"), "first_name", 100, 0, "points"),
    ("hours", ("hours", "timesheet", "work", "overtime"), "first_name", 12, 1, "h"),
    ("hours", ("hours", "timesheet", "effort"), "noun", 12, 1, "h"),
    ("measurements", ("measurements", "readings", "lab", "samples"), "noun", 99, 2, "mm cm V kg"),
    ("temperatures", ("temperatures", "weather", "climate"), "city", 38, 1, "C"),
    ("distances", ("distances", "route", "stages", "tour"), "city", 300, 1, "km"),
    ("votes", ("votes", "poll", "election", "survey"), "noun", 400, 0, "votes"),
    ("calories", ("calories", "meals", "diet"), "dish", 900, 0, "kcal"),
    ("sizes", ("sizes", "usage", "storage"), "noun", 5000, 0, "MB KB"),
)


def draw_ledger(draw: Draw) -> Ledger:
    """Draw a ledger of 3 to 25 lines; names differ."""
    noun, stems, names, top, digits, units = draw.choice(_KINDS)
    line = draw.choice(_LINES)
    unit = draw.choice(units.split())
    inner = Draw(str(draw.rng.random()))
    entries: dict[str, str] = {}
    for _ in range(inner.weighted({inner.between(3, 8): 5, inner.between(9, 25): 3})):
        name = inner.noun() if names == "noun" else inner.thing(_food(inner) if names == "food" else names)
        number = f"{inner.between(1, top)}" + (f".{inner.between(0, 10**digits - 1):0{digits}}" if digits else "")
        if not any(name in other or other in name for other in entries):
            entries[name] = number
    lines = [line.format(name=name, number=number, unit=unit) for name, number in entries.items()]
    if draw.chance(0.2):
        lines.insert(0, f"{draw.noun().capitalize()}")
    field = "$(NF-1)" if "{unit}" in line else "$NF"
    path = draw.usual_path(draw.choice(("txt", "txt", "txt", "md", "dat")), stems)
    return Ledger(path, "".join(f"{text}\n" for text in lines), tuple(entries.items()), field, bool(digits), noun)


def _food(draw: Draw) -> str:
    return draw.choice(("fruit", "vegetable", "dish", "drink"))
