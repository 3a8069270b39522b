"""`agentkit eval SUITE`: run a suite of tasks and report its scores."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from agentkit.cli.model import load_model
from agentkit.cli.options import (
    BaseUrlFlag,
    CacheFlag,
    DeviceFlag,
    EnvFlag,
    GrammarFlag,
    JsonFlag,
    MaxCostFlag,
    MinPFlag,
    ModelFlag,
    NoGrammarFlag,
    NoKeyFlag,
    NoProviderFlag,
    OutFlag,
    PenaltyFlag,
    SamplingFlags,
    SeedFlag,
    SuiteArgument,
    TemperatureFlag,
    TopKFlag,
    TopPFlag,
    refuse_foreign_suite,
    run_directory,
    seed_or_random,
)
from agentkit.cli.terminal import console


def command(
    suite: SuiteArgument,
    model: ModelFlag = "tiny",
    base_url: BaseUrlFlag = None,
    device: DeviceFlag = None,
    concurrency: Annotated[int, typer.Option("--concurrency", "-n", min=1, help="Number of concurrent trials.")] = 4,
    max_connections: Annotated[
        int | None, typer.Option(min=1, help="Requests to the API at the same time. Default: until it says too many.")
    ] = None,
    epochs: Annotated[int, typer.Option("--epochs", "-k", min=1, help="Runs of each task.")] = 1,
    tasks_per_family: Annotated[
        int | None, typer.Option(min=1, help="Tasks to generate per family, for `synth` only. Default: 3.")
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Maximum number of tasks. `synth` takes them from each family in turn.",
        ),
    ] = None,
    threshold: Annotated[
        float | None, typer.Option(min=0.0, max=1.0, help="Exit with 1 if the mean reward is lower.")
    ] = None,
    max_cost: MaxCostFlag = None,
    seed: SeedFlag = None,
    temperature: TemperatureFlag = None,
    top_p: TopPFlag = None,
    top_k: TopKFlag = None,
    min_p: MinPFlag = None,
    repetition_penalty: PenaltyFlag = None,
    grammar: GrammarFlag = None,
    no_grammar: NoGrammarFlag = False,
    env: EnvFlag = None,
    out: OutFlag = None,
    cache_dir: CacheFlag = None,
    as_json: JsonFlag = False,
    no_key: NoKeyFlag = None,
    no_provider: NoProviderFlag = None,
) -> int:
    """Run a suite of tasks, each in its own sandbox, and write a report.

    Exits with 0 after the run (if --threshold is met), 1 below --threshold or if --max-cost stopped the run, 3 if a
    trial could not be scored. Trials that --max-cost stopped are not recorded; finished ones are reported.
    """
    from agentkit.cli import evaluation
    from agentkit.cli.progress import result_table
    from agentkit_evals.report import cost_facts
    from agentkit_evals.suite import load_suite

    flags = SamplingFlags.of(
        grammar,
        no_grammar,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
    )
    refuse_foreign_suite(suite)
    chosen = seed_or_random(seed)
    loaded = load_suite(suite, seed=chosen, limit=limit, per_family=tasks_per_family)
    if limit is not None and len(loaded.cases) < limit:
        typer.echo(f"Note: the suite has {len(loaded.cases)} tasks, fewer than --limit {limit}.", err=True)
    directory = run_directory(out, f"{loaded.name}-{model}")
    terminal = console(quiet=as_json)
    source = load_model(model, device=device, cache_dir=cache_dir, base_url=base_url, max_connections=max_connections)
    finished = evaluation.evaluate(
        loaded,
        source,
        directory=directory,
        epochs=epochs,
        concurrency=concurrency,
        backend=env.value if env else None,
        seed=chosen,
        max_cost_usd=max_cost,
        sampling=flags.changes(),
        console=terminal,
    )
    if as_json:
        typer.echo(json.dumps(evaluation.as_json(finished), indent=2))
    elif finished.run.trials or not finished.interrupted:
        terminal.print(result_table(finished.run))
        for name, value, note in cost_facts(finished.run):
            terminal.print(f"{name} {value}{f' {note}' if note else ''}", style="dim", soft_wrap=True)
        typer.echo(f"\nrun     {finished.run.path}\nreport  {finished.report}")
    return evaluation.ending(finished, threshold)
