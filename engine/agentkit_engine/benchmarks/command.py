"""The command line of `python -m agentkit_engine.benchmarks` and `python -m agentkit.benchmarks`.

Each room has its own benchmarks. `make bench ONLY=...` passes the same names to all rooms, so a room skips the names of
the others, and a name that no room has is an error.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import TypeVar

import typer
from rich.console import Console

from agentkit_engine.benchmarks.errors import BenchmarkError
from agentkit_engine.benchmarks.record import (
    BenchmarkRecord,
    Measurement,
    current_commit,
    describe_machine,
    make_record,
    markdown,
    merge_records,
    read_records,
    table,
)
from agentkit_engine.errors import EngineError

S = TypeVar("S")


def chosen_benchmarks(
    only: str | None, own: Collection[str], elsewhere: Collection[str], nightly: Collection[str] = ()
) -> list[str]:
    """Return the benchmarks of this room named in `only`, or without it all except the `nightly` ones.

    Raises:
        typer.BadParameter: a name that belongs neither here nor elsewhere.
    """
    by_default = [name for name in own if name not in nightly]
    names = by_default if only is None else [name.strip() for name in only.split(",")]
    if unknown := [name for name in names if name not in {*own, *elsewhere}]:
        raise typer.BadParameter(
            f"unknown benchmark {', '.join(map(repr, unknown))}; expected {', '.join(own)}, "
            f"or in the other rooms {', '.join(elsewhere)}",
            param_hint="--only",
        )
    return [name for name in names if name in own]


def show(results: Path) -> None:
    """Print a results file as a Markdown table."""
    print(markdown(read_records(results)))


def measure(
    package: str,
    benchmarks: Mapping[str, Callable[[S], Iterator[Measurement]]],
    names: Collection[str],
    sizes: S,
    *,
    quick: bool,
    out: Path | None,
    rooms: Collection[Path],
) -> None:
    """Measure the benchmarks called `names`, print a table, and merge the records into `out`.

    If a benchmark fails, the failure is reported, its old records stay, and the others still run. `rooms` are the
    folders of the measured code.

    Raises:
        typer.Exit: with status 1, if a benchmark failed.
    """
    if not names:
        return
    machine, commit = describe_machine(), current_commit(*rooms)
    console = Console() if sys.stdout.isatty() else Console(width=160)
    records: list[BenchmarkRecord] = []
    failed = False
    for benchmark in names:
        console.print(f"{benchmark} ...")
        command = f"python -m {package}.benchmarks --only {benchmark}{' --quick' if quick else ''}"
        try:
            measured = list(benchmarks[benchmark](sizes))
        except (BenchmarkError, EngineError) as error:
            failed = True
            console.print(f"{benchmark} failed: {error}", style="red", markup=False, soft_wrap=True)
            continue
        news = [make_record(each, machine=machine, commit=commit, command=command) for each in measured]
        if out is not None:
            merge_records(out, benchmark, news)
        records += news
    console.print(table(records))
    if failed:
        raise typer.Exit(1)
