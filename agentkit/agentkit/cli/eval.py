"""`agentkit eval SUITE`: run a suite of tasks on one or more models and report their scores."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Annotated

import typer

from agentkit.cli.model import load_model
from agentkit.cli.options import (
    BaseUrlFlag,
    CacheFlag,
    DeviceFlag,
    DevicesFlag,
    EnvFlag,
    ExpertCacheFlag,
    GrammarFlag,
    JsonFlag,
    KVCacheDtypeFlag,
    MaxCostFlag,
    MinPFlag,
    ModelsFlag,
    NoGrammarFlag,
    NoKeyFlag,
    NoProviderFlag,
    OutFlag,
    PenaltyFlag,
    SamplingFlags,
    SeedFlag,
    SuiteArgument,
    TemperatureFlag,
    ThreadsFlag,
    TopKFlag,
    TopPFlag,
    output_file,
    refuse_foreign_suite,
    run_directory,
    seed_or_random,
)
from agentkit.cli.terminal import console


def command(
    suite: SuiteArgument,
    model: ModelsFlag,
    base_url: BaseUrlFlag = None,
    device: DeviceFlag = None,
    devices: DevicesFlag = None,
    threads: ThreadsFlag = None,
    expert_cache_bytes: ExpertCacheFlag = None,
    kv_cache_dtype: KVCacheDtypeFlag = None,
    concurrency: Annotated[int, typer.Option("--concurrency", "-n", min=1, help="Number of concurrent trials.")] = 4,
    max_connections: Annotated[
        int | None,
        typer.Option(min=1, help="Maximum API requests in flight. Default: no limit until the API sets one."),
    ] = None,
    epochs: Annotated[int, typer.Option("--epochs", "-k", min=1, help="Runs of each task.")] = 1,
    tasks_per_operation: Annotated[
        int | None, typer.Option(min=1, help="Tasks to generate per operation, for `synth` only. Default: 3.")
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Maximum number of tasks. `synth` takes them from each operation in turn.",
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
    junit: Annotated[
        Path | None, typer.Option("--junit", callback=output_file, help="Also write the results as JUnit XML, for CI.")
    ] = None,
    cache_dir: CacheFlag = None,
    as_json: JsonFlag = False,
    no_key: NoKeyFlag = None,
    no_provider: NoProviderFlag = None,
) -> int:
    """Run a suite of tasks, each in its own sandbox, and write a report.

    With several models, the suite runs on one after the other, each with a run directory of its own in a common folder,
    and each further model is compared with the first one, task by task. --max-cost is for all of them together. If a
    further model fails, the runs before it are reported first.

    Exits with 0 after the run (if every model meets --threshold), 1 below --threshold or if --max-cost stopped the run,
    3 if a trial could not be scored. Trials that --max-cost stopped are not recorded; finished ones are reported.
    """
    from agentkit.cli import evaluation
    from agentkit.cli.ending import ExitCode
    from agentkit.cli.progress import result_table
    from agentkit.models.remote.resolve import is_remote
    from agentkit.prices import check_price
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
    loaded = load_suite(suite, seed=chosen, limit=limit, per_operation=tasks_per_operation)
    if limit is not None and len(loaded.cases) < limit:
        typer.echo(f"Note: the suite has {len(loaded.cases)} tasks, fewer than --limit {limit}.", err=True)
    together = len(model) > 1
    directory = run_directory(out, f"{loaded.name}-{'-'.join(_folders(model))}")
    terminal = console(quiet=as_json)
    finished: list[evaluation.Finished] = []
    remote = [is_remote(name) for name in model]
    mixed = any(remote) and not all(remote)  # then each option applies to the models that have it
    # connected before the first run, so that a missing key is found at once; embedded models take memory, one at a time
    connected = {
        name: load_model(
            name,
            device=None if mixed else device,
            devices=None if mixed else devices,
            threads=None if mixed else threads,
            expert_cache_bytes=None if mixed else expert_cache_bytes,
            kv_cache_dtype=None if mixed else kv_cache_dtype,
            cache_dir=None if mixed else cache_dir,
            base_url=base_url,
            max_connections=max_connections,
        )
        for name, behind_api in zip(model, remote, strict=True)
        if behind_api
    }
    if max_cost is not None:
        for name, hosted in connected.items():
            check_price(hosted, name)
    failure: BaseException | None = None
    for name, folder in zip(model, _folders(model) if together else ["."], strict=True):
        left = None if max_cost is None else max_cost - sum(each.run.usage.cost_usd or 0.0 for each in finished)
        if left is not None and left <= 0:
            typer.echo(f"--max-cost reached before {folder}", err=True)
            break
        if together:
            terminal.print(f"\n[bold]{len(loaded.cases)} tasks on {folder}[/]\n")
        try:
            source = connected.get(name) or load_model(
                name,
                device=device,
                devices=devices,
                threads=threads,
                expert_cache_bytes=expert_cache_bytes,
                kv_cache_dtype=kv_cache_dtype,
                cache_dir=cache_dir,
                base_url=None if mixed else base_url,
                max_connections=None if mixed else max_connections,
            )
            done = evaluation.evaluate(
                loaded,
                source,
                directory=directory / folder,
                epochs=epochs,
                concurrency=concurrency,
                backend=env.value if env else None,
                seed=chosen,
                max_cost_usd=None if mixed and name not in connected else left,
                sampling=flags.changes(),
                console=terminal,
            )
        except (Exception, KeyboardInterrupt) as exc:
            if not finished:
                raise
            failure = exc  # raised once the finished runs are reported
            break
        finished.append(done)
        if finished[-1].interrupted:
            break
    if junit is not None:
        from agentkit_evals.junit import write_junit

        write_junit([each.run for each in finished], junit)
    results = [evaluation.as_json(each) for each in finished] if as_json else []
    if together:
        code = evaluation.side_by_side(finished, directory, results, terminal, threshold)
        if failure is not None:
            raise failure
        return code or (ExitCode.UNSOLVED if len(finished) < len(model) else ExitCode.OK)
    if as_json:
        typer.echo(json.dumps(results[0], indent=2))
    elif finished[0].run.trials or not finished[0].interrupted:
        terminal.print(result_table(finished[0].run))
        for name, value, note in cost_facts(finished[0].run):
            terminal.print(f"{name} {value}{f' {note}' if note else ''}", style="dim", soft_wrap=True)
        typer.echo(f"\nrun     {finished[0].run.path}\nreport  {finished[0].report}")
    return evaluation.ending(finished[0], threshold)


def _folders(models: list[str]) -> list[str]:
    """Return a distinct folder name for the run of each model."""
    names: list[str] = []
    for model in models:
        stem = re.sub(r"[^A-Za-z0-9._-]+", "-", Path(model).resolve().name if Path(model).is_dir() else model)
        stem = stem.strip("-.") or "model"
        number = 1
        while (name := stem if number == 1 else f"{stem}-{number}") in names:
            number += 1
        names.append(name)
    return names
