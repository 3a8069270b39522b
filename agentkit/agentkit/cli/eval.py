"""`agentkit eval SUITE`: run a suite of tasks and say what it scored."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from agentkit.cli.ending import ExitCode
from agentkit.cli.options import (
    CacheFlag,
    EnvFlag,
    GrammarFlag,
    JsonFlag,
    ModelFlag,
    OutFlag,
    SeedFlag,
    TemperatureFlag,
    run_directory,
    seed_or_random,
)


def command(
    suite: Annotated[
        str, typer.Argument(help="A folder of tasks, a suite or task file, `synth`, or `synth:FAMILY,FAMILY`.")
    ],
    model: ModelFlag = "tiny",
    concurrency: Annotated[int, typer.Option("--concurrency", "-n", min=1, help="Trials at the same time.")] = 4,
    epochs: Annotated[int, typer.Option("--epochs", "-k", min=1, help="How often each task is run.")] = 1,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first so many tasks.")] = None,
    threshold: Annotated[
        float | None, typer.Option(min=0.0, max=1.0, help="Exit with 1 when the mean reward is below.")
    ] = None,
    seed: SeedFlag = None,
    temperature: TemperatureFlag = None,
    grammar: GrammarFlag = None,
    env: EnvFlag = None,
    out: OutFlag = None,
    cache_dir: CacheFlag = None,
    as_json: JsonFlag = False,
) -> ExitCode:
    """Run a suite of tasks, each in a sandbox of its own, and write a report."""
    from rich.console import Console

    from agentkit.cli import evaluation
    from agentkit.cli.progress import result_table
    from agentkit_evals.suite import load_suite

    chosen = seed_or_random(seed)
    loaded = load_suite(suite, seed=chosen, limit=limit)
    console = Console(stderr=as_json, quiet=as_json)
    finished = evaluation.evaluate(
        loaded,
        model=model,
        directory=run_directory(out, f"{loaded.name}-{model}"),
        epochs=epochs,
        concurrency=concurrency,
        backend=env.value if env else None,
        seed=chosen,
        temperature=temperature,
        grammar=grammar,
        cache_dir=cache_dir,
        console=console,
    )
    if as_json:
        typer.echo(json.dumps(evaluation.as_json(finished), indent=2))
    else:
        console.print(result_table(finished.run))
        typer.echo(f"\nrun     {finished.run.path}\nreport  {finished.report}")
    return evaluation.ending(finished, threshold)
