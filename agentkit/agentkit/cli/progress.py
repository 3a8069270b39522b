"""Live progress of an evaluation, and the result table at its end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Final, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from agentkit.cli.terminal import visible

if TYPE_CHECKING:
    from agentkit.task import Task
    from agentkit_evals.record import RunDirectory, TrialRecord
    from agentkit_evals.run import Update

MARKS = {
    None: ("green", "✓", "solved"),
    "model": ("red", "✗", "not solved"),
    "limit": ("yellow", "✗", "limit reached"),
    "task": ("magenta", "!", "task defect"),
    "infrastructure": ("bright_black", "!", "infrastructure"),
}

MAX_ERROR: Final = 1000
"""Maximum characters of an error's first line. The advice is at its end, so this is generous."""


class LiveProgress:
    """A listener for `EvalRun` that prints one line per finished trial and, on a terminal, a progress bar and the
    running trials."""

    def __init__(self, console: Console, total: int, tasks: Mapping[str, Task]) -> None:
        self.console = console
        self.progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self.overall = self.progress.add_task("trials", total=total)
        self.running: dict[str, TaskID] = {}
        self.done = self.solved = 0
        self.total = total
        self.tasks = tasks

    def __enter__(self) -> Self:
        self.progress.start()
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.progress.stop()

    def __call__(self, update: Update) -> None:
        from agentkit_evals.run import TrialActed, TrialFinished, TrialStarted

        match update:
            case TrialStarted():
                if update.kept_turns or update.attempt > 1:
                    how = f"goes on after turn {update.kept_turns}" if update.kept_turns else "starts again"
                    how = "is scored: its agent had ended" if update.has_ended else how
                    line = f"{update.trial}  {how}" + (f", attempt {update.attempt}" if update.attempt > 1 else "")
                    line += f": {update.why_again}" if update.why_again else ""
                    self.console.print(Text(visible(line), "dim"), soft_wrap=True)
                self.running[update.trial] = self.progress.add_task(f"{update.trial}  opening", total=None)
            case TrialActed():
                doing = visible(f"{update.trial}  turn {update.turn}: {update.doing}")
                self.progress.update(self.running[update.trial], description=doing)
            case TrialFinished():
                self.progress.remove_task(self.running.pop(update.record.trial))
                self._finished(update.record)

    def _finished(self, record: TrialRecord) -> None:
        from agentkit.prices import dollars
        from agentkit_evals.expected import why_not

        self.done += 1
        self.solved += record.solved
        colour, mark, words = MARKS[record.failure]
        line = Text.assemble(
            (f"{mark} ", colour),
            f"{record.trial}  ",
            (f"{record.usage.turns} turns, {record.usage.sampled_tokens} tokens, {record.agent_s:.1f} s", "dim"),
            ("" if record.usage.cost_usd is None else f", {dollars(record.usage.cost_usd)}", "dim"),
        )
        if record.failure is not None:
            line.append(f"  {words}", colour)
        if record.error:
            line.append(f": {visible(record.error.splitlines()[0][:MAX_ERROR])}", "dim")
        if not self.console.is_terminal:
            line.append(f"  [{self.done}/{self.total}]", "dim")
        self.console.print(line, soft_wrap=True, highlight=False)
        if record.failure in ("model", "limit"):
            for label, text in why_not(self.tasks[record.task], record.answer, record.verifier_output):
                shown = Text(f"    {label:9} {visible(text)[:200]}", "yellow")
                self.console.print(shown, soft_wrap=True, highlight=False)
        self.progress.update(self.overall, advance=1, description=f"solved {self.solved}/{self.done}")


def number_table(heading: str, *columns: str) -> Table:
    """Return an empty table of names and numbers. In a narrow terminal, names wrap before numbers do."""
    between = 2 if len(columns) <= 8 else 1
    table = Table(header_style="dim", box=None, pad_edge=False, padding=(0, between, 0, 0))
    table.add_column(heading, overflow="fold")
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    return table


def result_table(run: RunDirectory) -> Table:
    """Return a table of scores per family and overall, with the cost of all trials if anything was charged."""
    families: dict[str, list[TrialRecord]] = {}
    for trial in sorted(run.trials, key=lambda trial: trial.family):
        families.setdefault(trial.family, []).append(trial)
    return _score_table("family", [*families.items(), *([("all", run.trials)] if len(families) != 1 else [])])


def model_table(runs: Sequence[RunDirectory]) -> Table:
    """Return a table of the overall scores of several models, named after their run directories."""
    return _score_table("model", [(run.path.name, run.trials) for run in runs])


def _score_table(heading: str, rows: Sequence[tuple[str, Sequence[TrialRecord]]]) -> Table:
    from agentkit.model import total_usage
    from agentkit.prices import dollars
    from agentkit_evals.record import scores_by_task
    from agentkit_evals.statistics import estimate

    charged = any(trial.usage.cost_usd is not None for _, trials in rows for trial in trials)
    columns = ("solved", "mean\n± stderr", "turns", "tokens", "seconds", "not\nscored", *(["cost"] * charged))
    table = number_table(heading, *columns)
    for name, trials in rows:
        scored = [trial for trial in trials if trial.reward is not None]
        mean = estimate(scores_by_task(trials))
        share = len(scored) or 1
        table.add_row(
            Text(visible(name)),
            f"{sum(trial.solved for trial in scored)}/{len(scored)}",
            str(mean) if mean else "-",
            f"{sum(trial.usage.turns for trial in scored) / share:.1f}",
            f"{sum(trial.usage.sampled_tokens for trial in scored) / share:.0f}",
            f"{sum(trial.agent_s for trial in scored) / share:.1f}",
            str(len(trials) - len(scored)),
            *([dollars(total_usage(trial.usage for trial in trials).cost_usd)] * charged),
            style="bold" if name == "all" else None,
        )
    return table
