"""`agentkit demo`: the tiny model works on tasks that it was not trained on, in real sandboxes, live.

Half of the tasks are hand-written (the suite `everyday`), half are generated (the suite `generated`).
"""

from __future__ import annotations

import json
import random
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any

import typer

from agentkit.cli.ending import run
from agentkit.cli.model import load_model, model_options
from agentkit.cli.options import (
    BaseUrlFlag,
    DeviceFlag,
    Env,
    GrammarFlag,
    JsonFlag,
    MinPFlag,
    ModelFlag,
    NoGrammarFlag,
    NoKeyFlag,
    NoProviderFlag,
    OutFlag,
    SamplingFlags,
    SeedFlag,
    TemperatureFlag,
    TopKFlag,
    TopPFlag,
    run_directory,
    seed_or_random,
)
from agentkit.cli.terminal import console

if TYPE_CHECKING:
    from rich.console import Console

    from agentkit.models.embedded import EmbeddedModel
    from agentkit.models.remote.session import RemoteModel
    from agentkit_evals.suite import Case, Suite
    from agentkit_evals.verify import Backend

SUITES = ("everyday", "generated")
SHOWN_FIRST = ("setting", "change_setting", "rename", "fix_bug")
"""Preferred kinds of the live task: their agents run commands and change files, so one trajectory shows everything."""


def command(
    seed: SeedFlag = None,
    temperature: TemperatureFlag = None,
    top_p: TopPFlag = None,
    top_k: TopKFlag = None,
    min_p: MinPFlag = None,
    grammar: GrammarFlag = None,
    no_grammar: NoGrammarFlag = False,
    tasks: Annotated[int, typer.Option(min=2, max=60, help="Tasks; half hand-written, half generated.")] = 24,
    model: ModelFlag = "tiny",
    base_url: BaseUrlFlag = None,
    device: DeviceFlag = None,
    concurrency: Annotated[int, typer.Option("--concurrency", "-n", min=1, help="Number of concurrent trials.")] = 4,
    env: Annotated[Env, typer.Option(help="The sandbox backend.")] = Env.PROCESS,
    out: OutFlag = None,
    as_json: JsonFlag = False,
    no_key: NoKeyFlag = None,
    no_provider: NoProviderFlag = None,
) -> int:
    """Run the tiny model on tasks that it was not trained on, each in a sandbox, and show one of them live.

    Half of the tasks are drawn from the hand-written suite `everyday`, half from the suite `generated`: tasks of the
    kinds in its training, but held out. `agentkit eval everyday` runs a whole suite.

    No grammar constrains the calls unless --grammar asks for one. The last line of output is `solved N/M`.
    """
    from agentkit.cli import evaluation
    from agentkit.cli.progress import result_table

    if grammar is None:  # by default the model writes every token: its own solve rate
        no_grammar = True
    flags = SamplingFlags.of(grammar, no_grammar, temperature=temperature, top_p=top_p, top_k=top_k, min_p=min_p)
    chosen = seed_or_random(seed)
    suite = draw_suite(tasks, chosen)
    terminal = console(quiet=as_json)
    terminal.print(
        f"{tasks} tasks outside tiny's training data: {tasks - tasks // 2} hand-written (suite everyday), "
        f"{tasks // 2} generated (suite generated). Model {model}, seed {chosen}, {env.value} sandboxes."
        + (" The model writes every token." if flags.grammar is False else ""),
        soft_wrap=True,
    )
    source = load_model(model, device=device, cache_dir=None, base_url=base_url)
    if not as_json:
        show_one(_first(suite), source, seed=chosen, sampling=flags.changes(), backend=env.value, console=terminal)
    terminal.print(f"\n[bold]All {len(suite.cases)} tasks, {concurrency} at a time[/]\n")
    finished = evaluation.evaluate(
        suite,
        source,
        directory=run_directory(out, f"demo-{source.name}"),
        epochs=1,
        concurrency=concurrency,
        backend=env.value,
        seed=chosen,
        sampling=flags.changes(),
        console=terminal,
        model_options=model_options(model, {"device": device, "base_url": base_url}),
    )
    result = evaluation.as_json(finished)
    if as_json:
        typer.echo(json.dumps(result, indent=2))
    else:
        terminal.print()
        terminal.print(result_table(finished.run))
        typer.echo(f"\nforced ids  {result['usage']['forced_tokens']}")
        typer.echo(f"report      {finished.report.resolve().as_uri()}")
        typer.echo(f"solved {result['solved']}/{result['trials']}")
    return evaluation.ending(finished)


def draw_suite(tasks: int, seed: int) -> Suite:
    """Return a suite of `tasks` tasks: half of each of `SUITES`, of different kinds, grouped in reports by suite."""
    from agentkit_evals.suite import PACKAGED_SUITES, Suite, in_turn, load_suite

    rng = random.Random(seed)
    cases: list[Case] = []
    for name, share in zip(SUITES, (tasks - tasks // 2, tasks // 2), strict=True):
        found = list(load_suite(str(PACKAGED_SUITES[name])).cases)
        rng.shuffle(found)
        cases += (replace(case, family=name) for case in in_turn(found, share))
    return Suite("demo", tuple(cases))


def _first(suite: Suite) -> Case:
    ranks = {kind: rank for rank, kind in enumerate(SHOWN_FIRST)}
    return min(suite.cases, key=lambda case: ranks.get(case.task.metadata["family"], len(ranks)))


def show_one(
    case: Case,
    source: EmbeddedModel | RemoteModel,
    *,
    seed: int,
    sampling: dict[str, Any],
    backend: Backend,
    console: Console,
) -> None:
    """Run one task and print the task, thoughts, calls, results, diff and verdict.

    Uses the seed of the same trial in the evaluation, so this is also the trajectory in its report.

    Raises:
        SandboxError, TaskSetupError, VerifierError, EngineError: See `Job.run`.
    """
    from agentkit.cli.changes import print_diff
    from agentkit.cli.run import Job, print_end
    from agentkit.cli.terminal import say
    from agentkit_evals.run import agent_for, trial_seed

    task = case.task
    drawn = source.sampling.override(**sampling, seed=trial_seed(seed, f"{task.id}.0"))
    say(console, f"\nOne task live: {task.id}", "bold")
    say(console, f"\ntask      {task.instruction}")
    if task.environment.files:
        say(console, f"files     {', '.join(task.environment.files)}", "dim")
    done = run(Job(task, agent_for(task, source, drawn), backend, None, None, console).run)
    print_diff(console, done.changes)
    print_end(console, task, done)
