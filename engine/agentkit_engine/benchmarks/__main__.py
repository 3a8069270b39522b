"""`python -m agentkit_engine.benchmarks`: measure the engine, print a table, and store the numbers in a JSON file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

import agentkit_engine
from agentkit_engine.benchmarks.command import chosen_benchmarks, measure, show
from agentkit_engine.benchmarks.registry import BENCHMARKS, ELSEWHERE, FULL, NIGHTLY, QUICK

RESULTS = Path("engine/results/cpu.json")


def main(
    only: Annotated[
        str | None, typer.Option(help=f"Benchmarks to run, separated by commas: {', '.join(BENCHMARKS)}.")
    ] = None,
    table: Annotated[bool, typer.Option("--table", help="Print the last results as a Markdown table.")] = False,
    quick: Annotated[bool, typer.Option("--quick", help="Smallest sizes, to check that the benchmarks run.")] = False,
    out: Annotated[
        Path | None, typer.Option(help=f"File to merge the records into; default {RESULTS}, none with --quick.")
    ] = None,
) -> None:
    """Measure the engine beside its peers and replace the benchmarks' records in the results file.

    If a benchmark fails, the failure is reported, its old records stay, the others still run, and the exit status is 1.
    """
    if table:
        show(RESULTS)
        return
    measure(
        "agentkit_engine",
        BENCHMARKS,
        chosen_benchmarks(only, BENCHMARKS, ELSEWHERE, NIGHTLY),
        QUICK if quick else FULL,
        quick=quick,
        out=out or (None if quick else RESULTS),
        rooms=[Path(agentkit_engine.__file__).parent],
    )


if __name__ == "__main__":
    typer.run(main)
