"""What `eval` and `demo` share: one model, one suite, one run directory, a report whatever happens."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anyio
from rich.console import Console

from agentkit.cli.ending import ExitCode
from agentkit.cli.progress import LiveProgress

if TYPE_CHECKING:
    from agentkit_evals.record import RunDirectory
    from agentkit_evals.suite import Suite
    from agentkit_evals.verify import Backend


@dataclasses.dataclass(frozen=True, slots=True)
class Finished:
    """A run that ended, by itself or by Ctrl-C, and its report."""

    run: RunDirectory
    report: Path
    interrupted: bool


def evaluate(
    suite: Suite,
    *,
    model: str,
    directory: Path,
    epochs: int,
    concurrency: int,
    backend: Backend | None,
    seed: int,
    temperature: float | None,
    console: Console,
    cache_dir: Path | None = None,
    grammar: bool | None = None,
) -> Finished:
    """Run a suite on an embedded model with live progress on `console`, and write the report, after Ctrl-C too.

    Raises:
        EngineError: the model cannot be loaded, or a grammar is asked for and the library for it is missing.
        SandboxUnavailableError: the first task's sandbox cannot be opened, so the machine lacks what the suite needs.
        RunDirectoryError: the directory exists already.
    """
    from agentkit.models.embedded import EmbeddedModel
    from agentkit_environments import open_environment
    from agentkit_evals.record import RunDirectory
    from agentkit_evals.report import write_report
    from agentkit_evals.run import EvalRun
    from agentkit_evals.verify import backend_for

    embedded = EmbeddedModel(model, cache_dir=cache_dir)
    run = EvalRun(
        suite,
        embedded,
        directory,
        model_name=embedded.name,
        epochs=epochs,
        concurrency=concurrency,
        backend=backend,
        seed=seed,
        sampling=embedded.sampling.override(temperature=temperature, grammar=grammar),
    )

    async def execute() -> None:
        first = suite.cases[0].task
        async with await open_environment(first.environment.spec(), backend=backend_for(first, backend)):
            pass
        async with embedded, embedded.open(tools=(), effort="none", sampling=run.resolved_sampling):
            await run.execute()

    interrupted = False
    with LiveProgress(console, len(suite.cases) * epochs) as run.listener:
        try:
            anyio.run(execute)
        except KeyboardInterrupt:
            if not (directory / "run.json").exists():
                raise
            interrupted = True
    finished = RunDirectory.open(directory)
    return Finished(finished, write_report(finished, decode=embedded.tokenizer.decode), interrupted)


def ending(finished: Finished, threshold: float | None = None) -> ExitCode:
    """The exit code of a run: interrupted, not all scored, below the threshold, or fine, in this order."""
    from agentkit_evals.record import scores_by_task
    from agentkit_evals.statistics import estimate

    if finished.interrupted:
        return ExitCode.INTERRUPTED
    if any(trial.reward is None for trial in finished.run.trials):
        return ExitCode.INFRASTRUCTURE
    mean = estimate(scores_by_task(finished.run.trials))
    below = threshold is not None and (not mean or mean.mean < threshold - 1e-6)
    return ExitCode.BELOW_THRESHOLD if below else ExitCode.OK


def as_json(finished: Finished) -> dict[str, Any]:
    """The result of a run for machines: scores, per family and in all, and where everything is."""
    from agentkit_evals.statistics import estimate, pass_at_k, pass_hat_k

    run, k = finished.run, finished.run.lock.epochs

    def scores(family: str | None) -> dict[str, Any]:
        trials = [trial for trial in run.trials if family in (None, trial.family)]
        by_task = run.scores(family)
        mean = estimate(by_task)
        at, hat = pass_at_k(by_task, k), pass_hat_k(by_task, k)
        return {
            "solved": sum(trial.solved for trial in trials),
            "scored": sum(trial.reward is not None for trial in trials),
            "trials": len(trials),
            "mean": mean and mean.mean,
            "stderr": mean and mean.stderr,
            # A number only where it is of every planned task: those that are left are no fair sample.
            f"pass@{k}": at.value if at and at.complete else None,
            f"pass^{k}": hat.value if hat and hat.complete else None,
            "tasks": len(by_task),
            f"tasks_with_{k}_scored_epochs": sum(len(task) >= k for task in by_task),
        }

    kinds = (
        *("prompt_tokens", "cache_hit_tokens", "cache_miss_tokens"),
        *("sampled_tokens", "thinking_tokens", "forced_tokens"),
    )
    return {
        "suite": run.lock.name,
        "model": run.lock.model,
        "seed": run.lock.seed,
        "interrupted": finished.interrupted,
        **scores(None),
        "families": {family: scores(family) for family in sorted({trial.family for trial in run.trials})},
        "failures": {
            kind: sum(trial.failure == kind for trial in run.trials)
            for kind in ("model", "limit", "task", "infrastructure")
        },
        "backends": sorted({trial.backend for trial in run.trials if trial.backend}),
        "usage": {kind: sum(getattr(trial.usage, kind) for trial in run.trials) for kind in kinds},
        "run": str(run.path),
        "report": str(finished.report),
    }
