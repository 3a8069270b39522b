"""`python -m agentkit.benchmarks`: run the benchmarks of the loop, print a table, and store the results as JSON."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

import agentkit
import agentkit_engine
from agentkit.benchmarks.registry import BENCHMARKS, FULL, QUICK
from agentkit_engine.benchmarks import registry as engine_registry
from agentkit_engine.benchmarks.command import chosen_benchmarks, measure, show

RESULTS = Path("agentkit/results/cpu.json")


def main(
    only: Annotated[str | None, typer.Option(help=f"Comma-separated benchmarks: {', '.join(BENCHMARKS)}.")] = None,
    table: Annotated[bool, typer.Option("--table", help="Print the last results as a Markdown table.")] = False,
    quick: Annotated[bool, typer.Option("--quick", help="Smallest sizes, to check that the benchmarks run.")] = False,
    out: Annotated[
        Path | None, typer.Option(help=f"File to merge the records into. Default: {RESULTS}; none with --quick.")
    ] = None,
) -> None:
    """Measure the loop beside its peers; each benchmark's new records replace its old ones in the results file.

    A benchmark that fails is reported and leaves its old records; the others still run, and the exit status is 1.
    """
    if table:
        show(RESULTS)
        return
    measure(
        "agentkit",
        BENCHMARKS,
        chosen_benchmarks(only, BENCHMARKS, engine_registry.BENCHMARKS),
        QUICK if quick else FULL,
        quick=quick,
        out=out or (None if quick else RESULTS),
        rooms=[Path(agentkit.__file__).parent, Path(agentkit_engine.__file__).parent],
    )


if __name__ == "__main__":
    typer.run(main)
