"""`agentkit synth`: make instructions over generated worlds; `agentkit synth bugs`: make tasks from real packages."""

from __future__ import annotations

import json
import math
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from agentkit.cli.ending import ExitCode, ends_well, run
from agentkit.cli.options import Env, JsonFlag
from agentkit.cli.terminal import visible_line

commands = typer.Typer(no_args_is_help=True)


@commands.callback(invoke_without_command=True)
def worlds(
    context: typer.Context,
    environments: Annotated[int | None, typer.Option("--environments", min=1, help="Generated worlds.")] = None,
    instructions: Annotated[
        int | None, typer.Option("--instructions", min=1, help="Instructions, after near-duplicates are removed.")
    ] = None,
    seed: Annotated[int, typer.Option("--seed", min=0, max=2**31 - 1, help="Seed of everything that is drawn.")] = 0,
    out: Annotated[
        Path | None, typer.Option("--out", file_okay=False, help="Output folder; a stopped run continues.")
    ] = None,
    jobs: Annotated[int, typer.Option("--jobs", "-n", min=1, max=64, help="Processes.")] = 2,
    env: Annotated[Env, typer.Option("--env", help="The sandbox of oracles and verifiers.")] = Env.PROCESS,
    as_json: JsonFlag = False,
) -> None:
    """Make instructions over generated worlds, each checked by running its oracle and its verifier.

    `agentkit synth bugs` makes tasks from faults in real packages instead.
    """
    if context.invoked_subcommand is None:
        ends_well(_worlds)(environments, instructions, seed, out, jobs, env, as_json)


def _worlds(
    environments: int | None, instructions: int | None, seed: int, out: Path | None, jobs: int, env: Env, as_json: bool
) -> ExitCode:
    from agentkit_evals.synth import synth_extra

    if environments is None or instructions is None or out is None:
        raise typer.BadParameter("give --environments, --instructions and --out")
    with synth_extra():
        from agentkit_evals.synth.produce import Plan, ShardFinished, produce

    def report(progress: ShardFinished) -> None:
        text = f"{progress.finished} of {progress.shards} shards, {progress.instructions} instructions"
        typer.echo(f"{text}, {progress.seconds:.0f} s, {progress.left_s:.0f} s left", err=True)

    path = produce(Plan(environments, instructions, seed, backend=env.value), out, workers=jobs, listener=report)
    card = json.loads(path.read_text(encoding="utf-8"))
    if as_json:
        typer.echo(json.dumps(card, indent=1))
    else:
        typer.echo(f"{card['instructions']} instructions over {card['environments']} worlds; {path}")
        if refused := card["refused"]:
            typer.echo(f"{len(refused)} tasks were left out because their check failed, the first: {refused[0]}")
    if card["instructions"] < instructions:
        typer.echo(f"{instructions} were asked for; more --environments give more that differ", err=True)
        return ExitCode.UNSOLVED
    return ExitCode.OK


def bugs(
    out: Annotated[Path, typer.Option("--out", file_okay=False, help="Output folder; an interrupted run continues.")],
    package: Annotated[
        list[str] | None,
        typer.Option("--package", help="NAME==VERSION, NAME==OLD..VERSION, or debian:NAME; repeat it for more."),
    ] = None,
    packages: Annotated[
        Path | None, typer.Option("--packages", help="A file with one package per line; `#` starts a comment.")
    ] = None,
    source: Annotated[
        list[Path] | None, typer.Option("--source", help="A folder with a package and its tests.")
    ] = None,
    index: Annotated[
        Path | None, typer.Option("--index", help="A folder of source distributions, in place of the package index.")
    ] = None,
    limit: Annotated[int, typer.Option("--limit", min=1, max=10_000, help="Bugs per package.")] = 20,
    seed: Annotated[int, typer.Option("--seed", min=0, max=2**31 - 1, help="Seed of the faults and their order.")] = 0,
    formats: Annotated[str, typer.Option("--formats", help="Formats of the export.")] = "tasks,swebench,harbor",
    jobs: Annotated[int, typer.Option("--jobs", "-n", min=1, max=64, help="Packages at a time.")] = 2,
    timeout: Annotated[
        float | None, typer.Option("--timeout", min=0, help="Seconds after which the search in a package ends.")
    ] = None,
    env: Annotated[Env, typer.Option("--env", help="The sandbox backend that runs the tests.")] = Env.PROCESS,
    as_json: JsonFlag = False,
) -> ExitCode:
    """Inject faults into packages, keep those that their tests notice, and write them as tasks.

    Every bug is confirmed by running all tests twice with it and twice with its fix.
    """
    from agentkit_evals.synth import synth_extra

    with synth_extra():
        from agentkit_evals.synth.bugs import EXPORT_FORMATS, ExportFormat, PackageProgress, PackageSpec, make_bugs

    wanted: list[ExportFormat] = [each for each in EXPORT_FORMATS if each in formats.split(",")]
    if unknown := set(formats.split(",")) - set(EXPORT_FORMATS):
        raise typer.BadParameter(
            f"unknown formats {', '.join(sorted(unknown))}; there are {', '.join(EXPORT_FORMATS)}",
            param_hint="--formats",
        )
    lines = [*(package or [])]
    if packages is not None:
        try:
            lines += [line.partition("#")[0].strip() for line in packages.read_text(encoding="utf-8").splitlines()]
        except (OSError, UnicodeDecodeError) as exc:
            raise typer.BadParameter(f"{packages} cannot be read: {exc}", param_hint="--packages") from exc
    specs: list[PackageSpec | Path] = [*(PackageSpec.parse(line) for line in lines if line), *(source or [])]
    if not specs:
        raise typer.BadParameter("no package; give --package NAME==VERSION, --packages FILE or --source DIR")

    def report(progress: PackageProgress) -> None:
        text = progress.problem or f"{progress.kept} kept of {progress.tried} tried"
        typer.echo(f"{progress.package}: {visible_line(text)}", err=True)

    card = run(
        partial(
            make_bugs,
            specs,
            out,
            limit=limit,
            seed=seed,
            formats=wanted,
            jobs=jobs,
            backend=env.value,
            index=index,
            timeout_s=math.inf if timeout is None else timeout,
            report=report,
        )
    )
    if as_json:
        typer.echo(json.dumps(card, indent=1))
    else:
        typer.echo(
            f"{card['bugs']} bugs in {card['packages_with_bugs']} packages, from {card['tried']} faults; "
            f"{out / 'card.json'}"
        )
    return ExitCode.OK if card["bugs"] else ExitCode.UNSOLVED


commands.command("bugs")(ends_well(bugs))
