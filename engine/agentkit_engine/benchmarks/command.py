"""What `python -m agentkit_engine.benchmarks` and `python -m agentkit.benchmarks` share: from flags to records.

Each room measures goals of its own. `make bench ONLY=...` hands the same names to all of them, so a name that belongs
elsewhere is skipped, and one that nobody knows is an error.
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
    Measurement,
    Record,
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


def chosen_goals(
    only: str | None, own: Collection[str], elsewhere: Collection[str], nightly: Collection[str] = ()
) -> list[str]:
    """The goals of this room that `only` names; without it all but the `nightly` ones.

    Raises:
        typer.BadParameter: a name that belongs neither here nor elsewhere.
    """
    by_default = [name for name in own if name not in nightly]
    names = by_default if only is None else [name.strip() for name in only.split(",")]
    if unknown := [name for name in names if name not in {*own, *elsewhere}]:
        raise typer.BadParameter(
            f"unknown goal {', '.join(map(repr, unknown))}; there are {', '.join(own)}, "
            f"and elsewhere {', '.join(elsewhere)}",
            param_hint="--only",
        )
    return [name for name in names if name in own]


def show(results: Path) -> None:
    """Print the README's table of what a results file holds."""
    print(markdown(read_records(results)))


def measure(
    package: str,
    goals: Mapping[str, Callable[[S], Iterator[Measurement]]],
    names: Collection[str],
    sizes: S,
    *,
    quick: bool,
    out: Path | None,
    rooms: Collection[Path],
) -> None:
    """Measure the goals called `names`, print a table, and merge the records into `out`.

    A goal that fails is reported and leaves its old records; the others still run, and the exit status is 1. `rooms`
    are the folders of the code that is measured.

    Raises:
        typer.Exit: with status 1, a goal failed.
    """
    if not names:
        return
    machine, commit = describe_machine(), current_commit(*rooms)
    console = Console() if sys.stdout.isatty() else Console(width=160)
    records: list[Record] = []
    failed = False
    for goal in names:
        console.print(f"{goal} ...")
        command = f"python -m {package}.benchmarks --only {goal}{' --quick' if quick else ''}"
        try:
            measured = list(goals[goal](sizes))
        except (BenchmarkError, EngineError) as error:
            failed = True
            console.print(f"{goal} failed: {error}", style="red", markup=False, soft_wrap=True)
            continue
        news = [make_record(each, machine=machine, commit=commit, command=command) for each in measured]
        if out is not None:
            merge_records(out, goal, news)
        records += news
    console.print(table(records))
    if failed:
        raise typer.Exit(1)
