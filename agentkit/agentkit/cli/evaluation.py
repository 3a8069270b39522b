"""The part shared by `eval` and `demo`: run one model on one suite into one run directory, and write the report."""

from __future__ import annotations

import dataclasses
import json
import shlex
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console

from agentkit.cli.ending import ExitCode, run
from agentkit.cli.progress import LiveProgress
from agentkit.cli.terminal import visible

if TYPE_CHECKING:
    from agentkit.models.embedded import EmbeddedModel
    from agentkit.models.remote.session import RemoteModel
    from agentkit_evals.record import RunDirectory
    from agentkit_evals.suite import Suite
    from agentkit_evals.verify import Backend


@dataclasses.dataclass(frozen=True, slots=True)
class Finished:
    """A completed or interrupted run and its report."""

    run: RunDirectory
    report: Path
    interrupted: bool


def evaluate(
    suite: Suite,
    model: EmbeddedModel | RemoteModel,
    *,
    directory: Path,
    epochs: int,
    concurrency: int,
    warm: int = 0,
    backend: Backend | None,
    seed: int,
    sampling: dict[str, Any],
    console: Console,
    max_cost_usd: float | None = None,
    model_options: dict[str, str | int] | None = None,
    resume: bool = False,
) -> Finished:
    """Run a suite on a model with live progress on `console`, and write the report, even after Ctrl-C.

    `sampling` holds the overrides of the model's own sampling parameters. For `resume` and `model_options`, see
    `EvalRun`.

    Raises:
        PriceError: `max_cost_usd` is given and the price of the model is unknown.
        EngineError: A grammar was requested and cannot be built.
        ModelError: The API refuses the key, the model or an option.
        SandboxUnavailableError: The first task's sandbox cannot be opened, so the suite cannot run on this machine.
        RunDirectoryError: The directory already exists, or cannot be resumed with these settings.
        KeyboardInterrupt: A signal was received before the run began.
    """
    from agentkit.models.embedded import EmbeddedModel
    from agentkit_environments import ImageBuildError, ImageMissingError
    from agentkit_evals.record import RunDirectory
    from agentkit_evals.report import write_report
    from agentkit_evals.run import EvalRun, agent_for
    from agentkit_evals.verify import backend_for, opened

    drawn = model.sampling.override(**sampling)
    if epochs > 1 and drawn.temperature == 0:
        typer.echo(
            f"Warning: at temperature 0 all {epochs} epochs of a task are the same, so `-k {epochs}` adds no "
            "information. Raise --temperature, or leave out -k.",
            err=True,
        )
    run_ = EvalRun(
        suite,
        model,
        directory,
        model_name=model.name,
        epochs=epochs,
        concurrency=concurrency,
        warm=warm,
        backend=backend,
        seed=seed,
        sampling=drawn,
        max_cost_usd=max_cost_usd,
        model_options=model_options or {},
        resume=resume,
    )
    planned = left = len(suite.cases) * epochs
    if resume:
        found = RunDirectory.open(directory)
        retried = sum(trial.is_retried for trial in found.trials)
        left = found.num_left
        parts = [
            f"{planned - left} of {planned} trials are finished",
            f"{len(found.unfinished)} interrupted" if found.unfinished else "",
            f"{retried} could not be scored and start again" if retried else "",
        ]
        typer.echo(f"resuming {directory}: {', '.join(filter(None, parts))}", err=True)

    async def execute() -> None:
        first = suite.cases[0].task
        with suppress(ImageBuildError, ImageMissingError):  # a fault of this task alone, which its trials report
            async with opened(first, backend_for(first, backend)):
                pass
        agent = agent_for(first, model, drawn)
        async with model, model.open(tools=list(agent.tools.values()), effort=agent.effort, sampling=drawn):
            await run_.execute()

    interrupted = False
    tasks = {case.task.id: case.task for case in suite.cases}
    with LiveProgress(console, left, tasks) as run_.listener:
        try:
            run(execute)
        except KeyboardInterrupt:
            if not (directory / "run.json").exists():
                raise
            interrupted = True
    finished = RunDirectory.open(directory)
    decode = model.tokenizer.decode if isinstance(model, EmbeddedModel) else None  # an API's ids stay numbers
    report = write_report(finished, decode=decode)
    if interrupted:
        typer.echo(
            f"interrupted after {len(finished.trials)} of {planned} trials; continue with "
            f"`agentkit eval --resume {shlex.quote(str(directory))}`",
            err=True,
        )
    elif finished.out_of_budget:
        typer.echo(f"--max-cost reached after {len(finished.trials)} of {planned} trials", err=True)
    return Finished(finished, report, interrupted)


def already_finished(found: RunDirectory) -> Finished:
    """Write the report of a run that has no trial left to run, and remove what a killed process has left of it.

    No model is loaded, and no sandbox is opened.
    """
    from agentkit.cli.view import write_report
    from agentkit_evals.resume import remove_leftovers

    planned = len(found.lock.tasks) * found.lock.epochs
    typer.echo(f"{found.path} is finished: all {planned} trials have a record", err=True)
    run(partial(remove_leftovers, found))
    return Finished(found, write_report(found), interrupted=False)


def ending(finished: Finished, threshold: float | None = None) -> int:
    """Return the exit code of a run: the first that applies of interrupted, not fully scored, unsolved (stopped at the
    cost limit or below the threshold), and success."""
    from agentkit_evals.record import scores_by_task
    from agentkit_evals.statistics import estimate

    if finished.interrupted:
        return ExitCode.RESUMABLE
    if any(trial.reward is None for trial in finished.run.trials):
        return ExitCode.INFRASTRUCTURE
    mean = estimate(scores_by_task(finished.run.trials))
    below = threshold is not None and (not mean or mean.mean < threshold - 1e-6)
    return ExitCode.UNSOLVED if below or finished.run.out_of_budget else ExitCode.OK


def side_by_side(
    finished: Sequence[Finished],
    directory: Path,
    results: Sequence[dict[str, Any]],
    console: Console,
    threshold: float | None,
) -> int:
    """Report runs of several models on one suite, and compare each further one with the first.

    Prints `results` and the comparisons as one JSON object if there are results; otherwise a table of all models and
    the comparisons. Each comparison is also a page in `directory`.

    Returns:
        The exit code: the first of the cases of `ending` that applies to any run.
    """
    from agentkit.cli.compare import print_comparison
    from agentkit.cli.progress import model_table
    from agentkit_evals.compare import compare
    from agentkit_evals.errors import ComparisonError
    from agentkit_evals.report import render_comparison

    comparisons: list[dict[str, Any]] = []
    if not results:
        console.print()
        console.print(model_table([each.run for each in finished]))
    for other in finished[1:]:
        try:
            comparison = compare(finished[0].run, other.run)
        except ComparisonError as exc:  # without a scored trial, there is nothing to compare
            typer.echo(f"Not compared: {visible(str(exc))}", err=True)
            continue
        page = directory / f"{finished[0].run.path.name}-{other.run.path.name}.html"
        page.write_text(render_comparison(comparison), encoding="utf-8")
        comparisons.append({**comparison.as_json(), "page": str(page)})
        if not results:
            console.print()
            print_comparison(console, comparison)
            typer.echo(f"\npage  {page}")
    if results:
        typer.echo(json.dumps({"runs": results, "comparisons": comparisons, "folder": str(directory)}, indent=2))
    else:
        typer.echo(f"\nruns  {directory}")
    codes = {ending(each, threshold) for each in finished}
    for each in finished:
        if each.interrupted:
            return ending(each)
    return ExitCode.INFRASTRUCTURE if ExitCode.INFRASTRUCTURE in codes else max(codes)


def as_json(finished: Finished) -> dict[str, Any]:
    """Return the result of a run as JSON data: scores per family and overall, failures, usage and paths."""
    from agentkit_evals.statistics import estimate, pass_at_k, pass_hat_k

    ran, k = finished.run, finished.run.lock.epochs

    def scores(family: str | None) -> dict[str, Any]:
        trials = [trial for trial in ran.trials if family in (None, trial.family)]
        by_task = ran.scores(family)
        mean = estimate(by_task)
        at, hat = pass_at_k(by_task, k), pass_hat_k(by_task, k)
        return {
            "solved": sum(trial.solved for trial in trials),
            "scored": sum(trial.reward is not None for trial in trials),
            "trials": len(trials),
            "mean": mean and mean.mean,
            "stderr": mean and mean.stderr,
            # None unless every planned task has k scored epochs: the remaining tasks would be a biased sample.
            f"pass@{k}": at.value if at and at.complete else None,
            f"pass^{k}": hat.value if hat and hat.complete else None,
            "tasks": len(by_task),
            f"tasks_with_{k}_scored_epochs": sum(len(task) >= k for task in by_task),
        }

    kinds = (
        *("prompt_tokens", "cache_hit_tokens", "cache_miss_tokens"),
        *("sampled_tokens", "thinking_tokens", "forced_tokens"),
    )
    embedded = [trial.list_cost_usd for trial in ran.trials if trial.list_cost_usd is not None]
    return {
        "suite": ran.lock.name,
        "model": ran.lock.model,
        "seed": ran.lock.seed,
        "interrupted": finished.interrupted,
        **scores(None),
        "families": {family: scores(family) for family in sorted({trial.family for trial in ran.trials})},
        "failures": {
            kind: sum(trial.failure == kind for trial in ran.trials)
            for kind in ("model", "limit", "task", "infrastructure")
        },
        "backends": sorted({trial.backend for trial in ran.trials if trial.backend}),
        "cost_usd": ran.usage.cost_usd,
        "prices_as_of": ran.lock.prices_as_of,
        "max_cost_usd": ran.lock.max_cost_usd,
        "out_of_budget": ran.out_of_budget,
        "list_cost_usd": sum(embedded) if embedded else None,
        "list_price": ran.lock.list_price if embedded else None,
        "usage": {kind: sum(getattr(trial.usage, kind) for trial in ran.trials) for kind in kinds},
        "run": str(ran.path),
        "report": str(finished.report),
    }
