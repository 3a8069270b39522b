"""The record of one part: a JSON file, and lines of the table."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

Status = Literal["running", "done", "cut", "failed"]
"""`cut`: the part's time ran out before its last measurement."""
Unit = Literal["us", "TFLOPS", "of floor", "tokens/s", "overlap", "of line rate", "ratio", "kernels", "error"]


@dataclass(frozen=True, slots=True)
class Goal:
    """The value to reach, in its unit."""

    unit: Unit
    good: float | None = None
    moonshot: float | None = None

    @property
    def higher_is_better(self) -> bool:
        return self.unit in ("TFLOPS", "of floor", "tokens/s", "overlap", "of line rate")

    def meets(self, value: float, bound: float | None) -> bool | None:
        """Return whether `value` reaches `bound`; None without a bound."""
        if bound is None:
            return None
        return value >= bound if self.higher_is_better else value <= bound


@dataclass(frozen=True, slots=True)
class PeerResult:
    """A peer in the same process: its value, or why there is none."""

    name: str
    value: float | None = None
    spread: float | None = None
    outputs: str = ""
    skipped: str = ""


@dataclass(frozen=True, slots=True)
class Measurement:
    """One number.

    Attributes:
        what: Unique within the part.
        value: The median, in the goal's unit.
        goal: Its unit and bounds.
        spread: (max - min) / median of the repeated times.
        us: The median time in microseconds.
        floor_us: The least time of the bytes and flops at an H200's rates.
        peers: What torch offers for the same result.
        launches: Kernels launched by one call.
        note: How outputs were compared, or what was left out.
    """

    what: str
    value: float
    goal: Goal
    spread: float = 0.0
    us: float | None = None
    floor_us: float | None = None
    peers: Sequence[PeerResult] = ()
    launches: dict[str, int] = field(default_factory=dict)
    note: str = ""

    @property
    def of_floor(self) -> float | None:
        """The floor's share of the time: 1 is the limit."""
        return self.floor_us / self.us if self.floor_us and self.us else None

    def as_json(self) -> dict[str, Any]:
        """Return the fields and what follows from them."""
        goal = self.goal
        return asdict(self) | {
            "of_floor": self.of_floor,
            "good_met": goal.meets(self.value, goal.good),
            "moonshot_met": goal.meets(self.value, goal.moonshot),
        }


@dataclass(frozen=True, slots=True)
class Skipped:
    """Something that could not be measured here, and why."""

    what: str
    why: str


@dataclass(slots=True)
class Record:
    """Everything about one part."""

    part: str
    goal: str
    rehearsal: bool
    machine: dict[str, str] = field(default_factory=dict)
    status: Status = "running"
    seconds: float = 0.0
    measurements: list[Measurement] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)
    error: str = ""

    def add(self, result: Measurement | Skipped) -> None:
        """Append a result."""
        if isinstance(result, Measurement):
            self.measurements.append(result)
        else:
            self.skipped.append(result)

    def write(self, folder: Path) -> None:
        """Write `part`.json, so that a part which is killed leaves what it had measured."""
        fields = {name: getattr(self, name) for name in self.__slots__}
        fields["measurements"] = [measurement.as_json() for measurement in self.measurements]
        fields["skipped"] = [asdict(skipped) for skipped in self.skipped]
        folder.mkdir(parents=True, exist_ok=True)
        temporary = folder / f"{self.part}.part"
        temporary.write_text(json.dumps(fields, indent=1) + "\n", encoding="utf-8")
        temporary.replace(folder / f"{self.part}.json")


def table(records: Iterable[dict[str, Any]]) -> str:
    """Return a Markdown table of the parts' JSON files: a line per measurement, skip or failure; parts without a goal
    get one line each."""
    lines = [
        "| part | what | value | spread | of floor | best peer | good | moonshot |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for record in records:
        name = f"{record['part']} {record['goal']}".strip()
        measurements = record["measurements"]
        lines += map(partial(_line, name), measurements) if record["goal"] else [_summary(name, measurements)]
        lines += [f"| {name} | {it['what']} | skipped: {it['why']} | | | | | |" for it in record["skipped"]]
        if record["status"] != "done":
            why = (record["error"].strip().splitlines() or [""])[-1]
            lines.append(f"| {name} | | {record['status']}: {why} | | | | | |")
    return "\n".join(lines)


def _line(part: str, found: dict[str, Any]) -> str:
    goal = Goal(**found["goal"])
    timed = [peer for peer in found["peers"] if peer["value"] is not None]
    best = min(timed, key=lambda peer: -peer["value"] if goal.higher_is_better else peer["value"], default=None)
    cells = (
        part,
        found["what"],
        f"{_number(found['value'])} {goal.unit}",
        f"{found['spread']:.0%}",
        "" if found["of_floor"] is None else f"{found['of_floor']:.0%}",
        "" if best is None else f"{_number(best['value'])} {best['name']}",
        _verdict(goal.good, found["good_met"]),
        _verdict(goal.moonshot, found["moonshot_met"]),
    )
    return f"| {' | '.join(cells)} |"


def _summary(part: str, measurements: Sequence[dict[str, Any]]) -> str:
    shares = [found["of_floor"] for found in measurements if found["of_floor"] is not None]
    kept = sum(found["goal"]["unit"] == "error" and found["good_met"] for found in measurements)
    what = f"{len(measurements)} results" + (f", {kept} within their tolerance" if kept else "")
    if shares:
        worst = min((found for found in measurements if found["of_floor"] is not None), key=lambda it: it["of_floor"])
        what += f"; least of its floor: {worst['what']}, {worst['of_floor']:.0%}"
    middle = f"{statistics.median(shares):.0%} in the middle" if shares else ""
    return f"| {part} | {what} | | | {middle} | | | |"


def _number(value: float) -> str:
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"


def _verdict(bound: float | None, met: bool | None) -> str:
    return "" if bound is None else f"{bound:g} {'met' if met else 'missed'}"
