"""Benchmark results, and the JSON file with the latest one of each."""

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
    """A bound on a measurement's ratio to its peer, or on its value."""

    quantity: Literal["ratio", "value"]
    relation: Literal[">=", "<="]
    limit: float

    def holds(self, value: float, ratio: float | None) -> bool:
        """Return whether the measurement meets this bound; a missing ratio does not."""
        number = value if self.quantity == "value" else ratio
        if number is None:
            return False
        return number >= self.limit if self.relation == ">=" else number <= self.limit

    def __str__(self) -> str:
        return f"{self.quantity} {self.relation} {self.limit:g}"


@dataclass(frozen=True, slots=True)
class Measurement:
    """One number, the peer's number, and the targets.

    Attributes:
        benchmark: Its name in `registry.BENCHMARKS`, such as `decode`.
        what: What was measured, unique within the benchmark.
        value: The median over repeats, in `unit`.
        spread: (max - min) / median over the repeats; None for deterministic values.
        peer: The peer measured in the same run, with its settings; None without a peer.
        peer_value: The peer's median, in the same unit.
        higher_is_better: Direction of the ratio.
        target: The required minimum; None without one.
        stretch: The goal beyond it.
        outputs: How both sides' outputs were compared, and how much they differed.
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
        """The factor by which the value is better than the peer's; None without a peer or when a side is 0."""
        if not self.peer_value or not self.value:
            return None
        return self.value / self.peer_value if self.higher_is_better else self.peer_value / self.value


class BenchmarkRecord(BaseModel):
    """A measurement as stored in the results file: the fields of `Measurement`, and its origin.

    `target` and `stretch` read like `ratio >= 2`; `met` and `stretch_met` are None without such a bound.
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
    """Return the record of a measurement made on `machine` at `commit` by `command`."""
    fields = asdict(measurement)
    del fields["higher_is_better"]
    value, ratio = measurement.value, measurement.ratio
    for name, met in (("target", "met"), ("stretch", "stretch_met")):
        bound: Bound | None = getattr(measurement, name)
        fields[name] = bound and str(bound)
        fields[met] = bound and bound.holds(value, ratio)
    return BenchmarkRecord(**fields, ratio=ratio, machine=machine, commit=commit, command=command)


def read_records(path: Path) -> list[BenchmarkRecord]:
    """Return the records in a results file; an empty list if it does not exist.

    Raises:
        pydantic.ValidationError: the file exists and is not a list of records.
    """
    return _RECORDS.validate_json(path.read_bytes()) if path.is_file() else []


def merge_records(path: Path, benchmark: str, records: Sequence[BenchmarkRecord]) -> None:
    """Replace the benchmark's records in the file, keeping those of other benchmarks; create the file if missing.

    Raises:
        pydantic.ValidationError: the file exists and is not a list of records.
    """
    kept = [record for record in read_records(path) if record.benchmark != benchmark]
    # stable sort: records of a benchmark stay in the order of measurement
    merged = sorted([*kept, *records], key=lambda record: record.benchmark)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".part")
    temporary.write_text(json.dumps(_RECORDS.dump_python(merged), indent=2) + "\n", encoding="utf-8")
    temporary.replace(path)


def table(records: Iterable[BenchmarkRecord]) -> Table:
    """Return a table for a terminal: one line per record, without peers' settings and comparisons."""
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
    """Return a table for a README: what was measured, the peer, and the targets."""
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
    """Return the processor, cores, memory and the versions that affect speed."""
    cpu_info = Path("/proc/cpuinfo")
    models = re.findall(r"^model name\s*:\s*(.+)$", cpu_info.read_text(), re.M) if cpu_info.is_file() else []
    memory_gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / (1 << 30)
    return (
        f"{models[0] if models else platform.processor() or platform.machine()}, {os.cpu_count()} cores, "
        f"{memory_gib:.0f} GiB, Python {platform.python_version()}, torch {torch.__version__}"
    )


def current_commit(*rooms: Path) -> str:
    """Return the commit of the checkout that contains these folders, or `unknown`.

    The commit ends with `+changes` if tracked files in the folders differ from it.
    """
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
