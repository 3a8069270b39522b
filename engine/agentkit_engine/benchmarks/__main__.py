"""`python -m agentkit_engine.benchmarks`: measure the engine, print a table, keep the numbers in a JSON file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

import agentkit_engine
from agentkit_engine.benchmarks.command import chosen_goals, measure, show
from agentkit_engine.benchmarks.goals import ELSEWHERE, FULL, GOALS, NIGHTLY, QUICK

RESULTS = Path("engine/results/cpu.json")


def main(
    only: Annotated[str | None, typer.Option(help=f"Goals, separated by commas, of {', '.join(GOALS)}.")] = None,
    table: Annotated[bool, typer.Option("--table", help="Print the README's table of the last results.")] = False,
    quick: Annotated[bool, typer.Option("--quick", help="Smallest sizes: shows that it works, not how fast.")] = False,
    out: Annotated[
        Path | None, typer.Option(help=f"File to merge the records into; {RESULTS} unless given or --quick.")
    ] = None,
) -> None:
    """Measure the engine beside its peers; each goal's new records replace its old ones in the results file.

    A goal that fails is reported and leaves its old records; the others still run, and the exit status is 1.
    """
    if table:
        show(RESULTS)
        return
    measure(
        "agentkit_engine",
        GOALS,
        chosen_goals(only, GOALS, ELSEWHERE, NIGHTLY),
        QUICK if quick else FULL,
        quick=quick,
        out=out or (None if quick else RESULTS),
        rooms=[Path(agentkit_engine.__file__).parent],
    )


if __name__ == "__main__":
    typer.run(main)
