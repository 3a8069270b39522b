"""What a benchmark result is, and the JSON file that keeps the last one of each."""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, TypeAdapter
from rich.table import Table


@dataclass(frozen=True, slots=True)
class Bound:
    """A limit on a measurement's ratio to its peer, or on its value."""

    quantity: Literal["ratio", "value"]
    relation: Literal[">=", "<="]
    limit: float

    def holds(self, value: float, ratio: float | None) -> bool:
        """Whether the measurement keeps this bound; a bound on a ratio that does not exist is not kept."""
        number = value if self.quantity == "value" else ratio
        if number is None:
            return False
        return number >= self.limit if self.relation == ">=" else number <= self.limit

    def __str__(self) -> str:
        return f"{self.quantity} {self.relation} {self.limit:g}"


@dataclass(frozen=True, slots=True)
class Measurement:
    """One number, its peer's, and what was aimed at.

    Attributes:
        benchmark: its name in `registry.BENCHMARKS`, such as `decode`.
        what: What was measured, unique within the benchmark.
        value: The median over repeats, in `unit`.
        spread: (max - min) / median over the repeats; None for what does not vary.
        peer: Who else was measured in the same run, and how it was set up; None when there is nobody.
        peer_value: The peer's median, in the same unit.
        higher_is_better: Which way the ratio points.
        target: The least to reach; None when nothing was promised.
        stretch: What to aim at.
        outputs: How both sides' outputs were compared and how far they lay apart.
    """

    benchmark: str
    what: str
    value: float
    unit: str
    spread: float | None = None
    peer: str | None = None
    peer_value: float | None = None
    higher_is_better: bool = True
    target: Bound | None = None
    stretch: Bound | None = None
    outputs: str | None = None

    @property
    def ratio(self) -> float | None:
        """How many times better than the peer; None without a peer or when a side is 0."""
        if not self.peer_value or not self.value:
            return None
        return self.value / self.peer_value if self.higher_is_better else self.peer_value / self.value


class BenchmarkRecord(BaseModel):
    """A measurement as the results file keeps it; the fields are those of `Measurement`, and where it comes from.

    `target` and `stretch` read like `ratio >= 2`; `met` and `stretch_met` are None where there is no such bound.
    """

    model_config = ConfigDict(extra="forbid")

    benchmark: str
    what: str
    value: float
    unit: str
    spread: float | None
    peer: str | None
    peer_value: float | None
    ratio: float | None
    target: str | None
    stretch: str | None
    met: bool | None
    stretch_met: bool | None
    outputs: str | None
    machine: str
    commit: str
    command: str


_RECORDS = TypeAdapter(list[BenchmarkRecord])


def make_record(measurement: Measurement, *, machine: str, commit: str, command: str) -> BenchmarkRecord:
    """The record of a measurement made on `machine` at `commit` by `command`."""
    fields = asdict(measurement)
    del fields["higher_is_better"]
    value, ratio = measurement.value, measurement.ratio
    for name, met in (("target", "met"), ("stretch", "stretch_met")):
        bound: Bound | None = getattr(measurement, name)
        fields[name] = bound and str(bound)
        fields[met] = bound and bound.holds(value, ratio)
    return BenchmarkRecord(**fields, ratio=ratio, machine=machine, commit=commit, command=command)


def read_records(path: Path) -> list[BenchmarkRecord]:
    """What a results file holds; nothing when there is none.

    Raises:
        pydantic.ValidationError: the file exists and is not a list of records.
    """
    return _RECORDS.validate_json(path.read_bytes()) if path.is_file() else []


def merge_records(path: Path, benchmark: str, records: Sequence[BenchmarkRecord]) -> None:
    """Replace the benchmark's records in the file, which is made when missing, and keep those of the other benchmarks.

    Raises:
        pydantic.ValidationError: the file exists and is not a list of records.
    """
    kept = [record for record in read_records(path) if record.benchmark != benchmark]
    merged = sorted([*kept, *records], key=lambda record: record.benchmark)  # stable: the order of measuring stays
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".part")
    temporary.write_text(json.dumps(_RECORDS.dump_python(merged), indent=2) + "\n", encoding="utf-8")
    temporary.replace(path)


def table(records: Iterable[BenchmarkRecord]) -> Table:
    """What a terminal has room for: one line per record, without peers' settings and comparisons."""
    rows = Table("benchmark", "what", "value", "spread", "peer", "ratio", "target", "stretch", highlight=False)
    for record in records:
        rows.add_row(
            record.benchmark,
            record.what,
            f"{record.value:.4g} {record.unit}",
            "" if record.spread is None else f"{record.spread:.0%}",
            "" if record.peer_value is None else f"{record.peer_value:.4g}",
            "" if record.ratio is None else f"{record.ratio:.2f}",
            _verdict(record.target, record.met),
            _verdict(record.stretch, record.stretch_met),
        )
    return rows


def markdown(records: Iterable[BenchmarkRecord]) -> str:
    """The table of a README: what was measured, beside whom, and what was aimed at."""
    lines = ["| benchmark | what | value | peer | ratio | at least | stretch |", "|---|---|---|---|---|---|---|"]
    for record in records:
        peer = f"{record.peer_value:.4g}: {record.peer}" if record.peer_value is not None else "–"
        cells = (
            record.benchmark,
            record.what,
            f"{record.value:.4g} {record.unit}",
            peer,
            "–" if record.ratio is None else f"{record.ratio:.2f}",
            _verdict(record.target, record.met) or "–",
            _verdict(record.stretch, record.stretch_met) or "–",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _verdict(bound: str | None, met: bool | None) -> str:
    return "" if bound is None else f"{bound}: {'met' if met else 'not met'}"


def describe_machine() -> str:
    """Processor, cores, memory and the versions that decide the speed."""
    cpu_info = Path("/proc/cpuinfo")
    models = re.findall(r"^model name\s*:\s*(.+)$", cpu_info.read_text(), re.M) if cpu_info.is_file() else []
    memory_gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / (1 << 30)
    return (
        f"{models[0] if models else platform.processor() or platform.machine()}, {os.cpu_count()} cores, "
        f"{memory_gib:.0f} GiB, Python {platform.python_version()}, torch {torch.__version__}"
    )


def current_commit(*rooms: Path) -> str:
    """The commit of the checkout these folders are in, `+changes` when tracked files there differ, or `unknown`."""
    try:
        commit = _git(rooms[0], "rev-parse", "--short=12", "HEAD")
        changes = _git(rooms[0], "status", "--porcelain", "--untracked-files=no", "--", *map(str, rooms))
        return f"{commit}+changes" if changes else commit
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _git(folder: Path, *arguments: str) -> str:
    return subprocess.run(
        ["git", "-C", str(folder), *arguments], check=True, capture_output=True, text=True
    ).stdout.strip()
