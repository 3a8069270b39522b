"""`agentkit eval SUITE`: run a suite of tasks on one or more models and report their scores."""

from __future__ import annotations

import json
import re
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from agentkit.cli.model import load_model, model_name, model_options, recorded_options
from agentkit.cli.options import (
    SUITE,
    BaseUrlFlag,
    CacheFlag,
    CompactAtFlag,
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
    SnapshotsFlag,
    TemperatureFlag,
    ThreadsFlag,
    TopKFlag,
    TopPFlag,
    given_parameters,
    output_file,
    refuse_foreign_suite,
    run_directory,
    seed_or_random,
    with_snapshots,
)
from agentkit.cli.terminal import console

if TYPE_CHECKING:
    from rich.console import Console

    from agentkit.cli.evaluation import Finished
    from agentkit.task import Task
    from agentkit_evals.suite import Suite


OF_THE_TASKS = {"limit", "tasks_per_operation", "compact_at", "snapshots"}
"""Parameters that choose or change tasks, which a run that is resumed has."""


def command(
    ctx: typer.Context,
    model: ModelsFlag,
    suite: Annotated[str | None, SUITE] = None,
    resume: Annotated[
        Path | None,
        typer.Option("--resume", metavar="RUN", exists=True, file_okay=False, help="Continue an interrupted run."),
    ] = None,
    base_url: BaseUrlFlag = None,
    device: DeviceFlag = None,
    devices: DevicesFlag = None,
    threads: ThreadsFlag = None,
    expert_cache_bytes: ExpertCacheFlag = None,
    kv_cache_dtype: KVCacheDtypeFlag = None,
    concurrency: Annotated[int, typer.Option("--concurrency", "-n", min=1, help="Number of concurrent trials.")] = 4,
    warm: Annotated[
        int, typer.Option("--warm", min=0, help="Sandboxes opened ahead, so that the next trials start at once.")
    ] = 0,
    max_connections: Annotated[
        int | None,
        typer.Option(min=1, help="Maximum API requests in flight. Default: no limit until the API sets one."),
    ] = None,
    epochs: Annotated[int, typer.Option("--epochs", "-k", min=1, max=1 << 20, help="Runs of each task.")] = 1,
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
    compact_at: CompactAtFlag = None,
    snapshots: SnapshotsFlag = False,
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
    3 if a trial could not be scored, 4 if it was interrupted. Trials that --max-cost stopped are not recorded; finished
    ones are reported.

    --resume RUN continues an interrupted run, with its tasks, model and settings; other ones are refused. Finished
    trials are kept, interrupted ones go on, and those that could not be scored start again.
    """
    from agentkit.cli import evaluation
    from agentkit.cli.ending import ExitCode
    from agentkit.models.remote.resolve import is_remote
    from agentkit.prices import check_price
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
    if resume is not None:
        return _resume(ctx, resume, flags)
    if suite is None:
        raise typer.BadParameter("give a suite, or a run with --resume", param_hint="SUITE")
    refuse_foreign_suite(suite)
    chosen = seed_or_random(seed)
    loaded = load_suite(suite, seed=chosen, limit=limit, per_operation=tasks_per_operation)
    loaded = _with_options(loaded, compact_at, snapshots=snapshots)
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
                warm=warm,
                backend=env.value if env else None,
                seed=chosen,
                max_cost_usd=None if mixed and name not in connected else left,
                sampling=flags.changes(),
                console=terminal,
                model_options=model_options(name, ctx.params),
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
    return _report(finished[0], terminal, threshold, as_json=as_json)


def _report(finished: Finished, terminal: Console, threshold: float | None, *, as_json: bool) -> int:
    """Print the scores of a run of one model, and return the exit code."""
    from agentkit.cli import evaluation
    from agentkit.cli.progress import result_table
    from agentkit_evals.report import cost_facts

    if as_json:
        typer.echo(json.dumps(evaluation.as_json(finished), indent=2))
    elif finished.run.trials or not finished.interrupted:
        terminal.print(result_table(finished.run))
        for name, value, note in cost_facts(finished.run):
            terminal.print(f"{name} {value}{f' {note}' if note else ''}", style="dim", soft_wrap=True)
        typer.echo(f"\nrun     {finished.run.path}\nreport  {finished.report}")
    return evaluation.ending(finished, threshold)


def _resume(ctx: typer.Context, directory: Path, flags: SamplingFlags) -> int:
    """Continue a run with its own settings, except those that are given, or report it if nothing is left to run.

    Settings that the run has fixed are refused before the model is loaded, and other weights afterwards.
    """
    from agentkit.cli import evaluation
    from agentkit_evals.record import RunDirectory
    from agentkit_evals.resume import check_same, suite_of
    from agentkit_evals.suite import load_suite

    chosen = ctx.params
    given = given_parameters(ctx)
    found = RunDirectory.open(directory)
    lock = found.lock
    if "out" in given:
        raise typer.BadParameter(f"a resumed run stays in {directory}; leave it out", param_hint="--out")
    seed = chosen["seed"] if "seed" in given else lock.seed
    if chosen["suite"] is None and (fixed := sorted(given & OF_THE_TASKS)):
        option = f"--{fixed[0].replace('_', '-')}"
        raise typer.BadParameter("the run has its tasks; leave it out", param_hint=option)
    suite = suite_of(lock)
    if chosen["suite"] is not None:
        per_operation = chosen["tasks_per_operation"]
        suite = load_suite(chosen["suite"], seed=seed, limit=chosen["limit"], per_operation=per_operation)
        suite = _with_options(suite, chosen["compact_at"], snapshots=chosen["snapshots"])
    if "model" in given and len(chosen["model"]) > 1:
        raise typer.BadParameter("a run has one model; leave it out", param_hint="--model")
    name = chosen["model"][0] if "model" in given else str(lock.model_options.get("model", lock.model))
    now = lock.model_copy(
        update={
            "name": suite.name,
            "tasks": [case.task for case in suite.cases],
            "model": model_name(name) if "model" in given else lock.model,
            "epochs": chosen["epochs"] if "epochs" in given else lock.epochs,
            "backend": chosen["env"].value if "env" in given else lock.backend,
            "seed": seed,
            "sampling": lock.sampling.override(**flags.changes()),
        }
    )
    check_same(directory, lock, now)
    terminal = console(quiet=chosen["as_json"])
    if found.num_left == 0:
        finished = evaluation.already_finished(found)
    else:
        options = recorded_options(lock.model_options, ctx, given)
        finished = evaluation.evaluate(
            suite,
            load_model(name, **options),
            directory=directory,
            epochs=now.epochs,
            warm=chosen["warm"] if "warm" in given else lock.warm,
            concurrency=chosen["concurrency"] if "concurrency" in given else lock.concurrency,
            backend=now.backend,
            seed=seed,
            max_cost_usd=chosen["max_cost"] if "max_cost" in given else lock.max_cost_usd,
            sampling={field.name: getattr(now.sampling, field.name) for field in fields(now.sampling)},
            console=terminal,
            model_options=model_options(name, options),
            resume=True,
        )
    if chosen["junit"] is not None:
        from agentkit_evals.junit import write_junit

        write_junit([finished.run], chosen["junit"])
    return _report(finished, terminal, chosen["threshold"], as_json=chosen["as_json"])


def _with_options(suite: Suite, compact_at: int | None, *, snapshots: bool) -> Suite:
    """Return a suite whose tasks have the options of the command."""
    from agentkit.task import HarborConfig

    def changed(task: Task) -> Task:
        if compact_at is not None:
            agent = task.agent.model_copy(update={"compact_at_tokens": compact_at})
            task = task.model_copy(update={"agent": agent})
        if not snapshots:
            return task
        if isinstance(task.verifier, HarborConfig) and (state := task.verifier.beside_the_sandbox) is not None:
            typer.echo(f"Note: task {task.id} is run without snapshots, which would not have {state}.", err=True)
            return task
        return with_snapshots(task)

    return replace(suite, cases=tuple(replace(case, task=changed(case.task)) for case in suite.cases))


def _folders(models: list[str]) -> list[str]:
    """Return a distinct folder name for the run of each model."""
    names: list[str] = []
    for model in models:
        stem = re.sub(r"[^A-Za-z0-9._-]+", "-", model_name(model))
        stem = stem.strip("-.") or "model"
        number = 1
        while (name := stem if number == 1 else f"{stem}-{number}") in names:
            number += 1
        names.append(name)
    return names
