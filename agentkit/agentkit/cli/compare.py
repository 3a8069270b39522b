"""`agentkit compare RUN_A RUN_B`: two runs of one suite side by side, task by task."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from agentkit.cli.ending import ExitCode
from agentkit.cli.options import JsonFlag, output_file
from agentkit.cli.terminal import console, visible_line

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from agentkit_evals.compare import Comparison, Flip, Row

MAX_FLIPS = 20
"""Maximum number of tasks listed per direction in the terminal; the HTML page and `--json` have all of them."""


def command(
    run_a: Annotated[Path, typer.Argument(metavar="RUN_A", help="The run directory of the first model.")],
    run_b: Annotated[Path, typer.Argument(metavar="RUN_B", help="The run directory of the second model.")],
    html: Annotated[
        Path | None, typer.Option("--html", callback=output_file, help="Also write the comparison as an HTML page.")
    ] = None,
    as_json: JsonFlag = False,
) -> ExitCode:
    """Compare two runs of one suite, paired by task: differences are RUN_B minus RUN_A.

    Each task counts once, with the mean of its scored epochs. A difference has a standard error, a 95 % interval from a
    paired bootstrap over tasks, and, if every task has one trial with reward 0 or 1 per model, the p-value of McNemar's
    exact test. Tasks in one run only, or without a scored trial in a run, are left out and counted.
    """
    from agentkit_evals.compare import compare
    from agentkit_evals.record import RunDirectory
    from agentkit_evals.report import render_comparison

    comparison = compare(RunDirectory.open(run_a), RunDirectory.open(run_b))
    if html is not None:
        html.write_text(render_comparison(comparison), encoding="utf-8")
    if as_json:
        typer.echo(json.dumps(comparison.as_json(), indent=2))
        return ExitCode.OK
    print_comparison(console(), comparison)
    if html is not None:
        typer.echo(f"\npage  {html}")
    return ExitCode.OK


def print_comparison(terminal: Console, comparison: Comparison) -> None:
    """Print a comparison: both runs, the table, and the tasks that only one model solved."""

    from rich.text import Text

    def say(text: str, style: str = "") -> None:
        terminal.print(Text(text, style), soft_wrap=True)

    for name, run in (("A", comparison.first), ("B", comparison.second)):
        incomplete = "" if run.complete else f"  (incomplete: {len(run.trials)} trials)"
        say(visible_line(f"{name}  {run.lock.model} on {run.lock.name}  {run.path}{incomplete}"))
    say(f"{comparison.total.difference.tasks} tasks compared{_left_out(comparison)}", "dim")
    for setting, one, other in comparison.settings:
        say(visible_line(f"{setting} differs: {one} and {other}"), "yellow")
    terminal.print()
    terminal.print(_table(comparison))
    terminal.print()
    say(verdict(comparison.total))
    for name, flips in (("A", comparison.first_better), ("B", comparison.second_better)):
        if flips:
            say(f"\nsolved more often by {name} ({len(flips)})")
            for line in _lines(flips):
                say(f"    {line}")


def verdict(row: Row) -> str:
    """Return one line about a difference: its size, uncertainty and test."""
    found = row.difference
    parts = [f"B − A: {found}"]
    if found.low is not None and found.high is not None:
        parts.append(f"95 % interval {found.low:+.3f} to {found.high:+.3f} (paired bootstrap over {found.tasks} tasks)")
    if found.p_value is not None:
        parts.append(f"McNemar's exact test p = {found.p_value:.3g}")
    return ", ".join(parts)


def _left_out(comparison: Comparison) -> str:
    return f"; left out: {comparison.left}" if str(comparison.left) else ""


def _lines(flips: Sequence[Flip]) -> list[str]:
    lines = [
        visible_line(f"{flip.task}  A {flip.first[0]}/{flip.first[1]}, B {flip.second[0]}/{flip.second[1]}")
        for flip in flips[:MAX_FLIPS]
    ]
    return lines + ([f"and {len(flips) - MAX_FLIPS} more"] if len(flips) > MAX_FLIPS else [])


def _table(comparison: Comparison) -> Table:
    from rich.text import Text

    from agentkit.cli.progress import number_table
    from agentkit.prices import dollars

    priced = any(side.cost_usd is not None for side in (comparison.total.first, comparison.total.second))
    columns = ["n", "mean\nA", "mean\nB", "B − A\n± stderr", "tokens\nA", "tokens\nB", "time\nA (s)", "time\nB (s)"]
    table = number_table("family", *columns, *(["cost\nA", "cost\nB"] if priced else []))
    families = comparison.families if len(comparison.families) > 1 else ()
    for row in (*families, comparison.total):
        sides = (row.first, row.second)
        table.add_row(
            Text(visible_line("all" if row.family is None else row.family)),
            str(row.difference.tasks),
            *(f"{side.mean:.3f}" for side in sides),
            str(row.difference),
            *(f"{side.tokens:,.0f}" for side in sides),
            *(f"{side.seconds:.1f}" for side in sides),
            *(dollars(side.cost_usd) for side in sides if priced),
            style="bold" if row.family is None else None,
        )
    return table
