"""`python -m agentkit_engine.benchmarks`: measure, print a table, keep the numbers in a JSON file."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from agentkit_engine.benchmarks.errors import BenchmarkError
from agentkit_engine.benchmarks.goals import FULL, GOALS, QUICK
from agentkit_engine.benchmarks.record import (
    Record,
    current_commit,
    describe_machine,
    make_record,
    merge_records,
    table,
)
from agentkit_engine.errors import EngineError

RESULTS = Path("engine/results/cpu.json")


def main(
    only: Annotated[str | None, typer.Option(help=f"Goals, separated by commas, of {', '.join(GOALS)}.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Smallest sizes: shows that it works, not how fast.")] = False,
    out: Annotated[
        Path | None, typer.Option(help=f"File to merge the records into; {RESULTS} unless given or --quick.")
    ] = None,
) -> None:
    """Measure the engine beside its peers; each goal's new records replace its old ones in the results file.

    A goal that fails is reported and leaves its old records; the others still run, and the exit status is 1.
    """
    goals = list(GOALS) if only is None else [name.strip() for name in only.split(",")]
    if unknown := [name for name in goals if name not in GOALS]:
        raise typer.BadParameter(
            f"unknown goal {', '.join(map(repr, unknown))}; there are {', '.join(GOALS)}", param_hint="--only"
        )
    out = out or (None if quick else RESULTS)
    machine, commit = describe_machine(), current_commit()
    console = Console() if sys.stdout.isatty() else Console(width=160)
    records: list[Record] = []
    failed = False
    for goal in goals:
        console.print(f"{goal} ...")
        command = f"python -m agentkit_engine.benchmarks --only {goal}{' --quick' if quick else ''}"
        try:
            measured = list(GOALS[goal](QUICK if quick else FULL))
        except (BenchmarkError, EngineError) as error:
            failed = True
            console.print(f"{goal} failed: {error}", style="red", markup=False, soft_wrap=True)
            continue
        news = [make_record(each, machine=machine, commit=commit, command=command) for each in measured]
        if out is not None:
            merge_records(out, goal, news)
        records += news
    console.print(table(records))
    raise typer.Exit(int(failed))


if __name__ == "__main__":
    typer.run(main)
