"""`agentkit demo`: the tiny model solves generated tasks that it never saw, in real sandboxes, while you watch."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from agentkit.cli.ending import ExitCode
from agentkit.cli.options import (
    Env,
    JsonFlag,
    ModelFlag,
    OutFlag,
    SeedFlag,
    TemperatureFlag,
    run_directory,
    seed_or_random,
)


def command(
    seed: SeedFlag = None,
    temperature: TemperatureFlag = None,
    tasks_per_family: Annotated[int, typer.Option(min=1, help="Held-out tasks of each family.")] = 3,
    model: ModelFlag = "tiny",
    concurrency: Annotated[int, typer.Option("--concurrency", "-n", min=1, help="Trials at the same time.")] = 4,
    env: Annotated[Env, typer.Option(help="The backend: where commands run.")] = Env.PROCESS,
    out: OutFlag = None,
    as_json: JsonFlag = False,
) -> ExitCode:
    """Let the tiny model solve held-out tasks of every family in sandboxes; the last line is `solved N/M`."""
    from rich.console import Console

    from agentkit.cli import evaluation
    from agentkit.cli.progress import result_table
    from agentkit_evals.suite import SynthSelection, synth_suite

    chosen = seed_or_random(seed)
    suite = synth_suite(SynthSelection(per_family=tasks_per_family), seed=chosen)
    console = Console(stderr=as_json, quiet=as_json)
    console.print(
        f"{len(suite.cases)} held-out tasks of {len({case.family for case in suite.cases})} families, "
        f"model {model}, seed {chosen}, {env.value} sandboxes. The model writes every token.\n"
    )
    finished = evaluation.evaluate(
        suite,
        model=model,
        directory=run_directory(out, f"demo-{model}"),
        epochs=1,
        concurrency=concurrency,
        backend=env.value,
        seed=chosen,
        temperature=temperature,
        grammar=False,  # the headline solve rates are those of the model alone
        console=console,
    )
    result = evaluation.as_json(finished)
    if as_json:
        typer.echo(json.dumps(result, indent=2))
    else:
        console.print()
        console.print(result_table(finished.run))
        typer.echo(f"\nforced ids  {result['usage']['forced_tokens']}")
        typer.echo(f"report      {finished.report.resolve().as_uri()}")
        typer.echo(f"solved {result['solved']}/{result['trials']}")
    return evaluation.ending(finished)
