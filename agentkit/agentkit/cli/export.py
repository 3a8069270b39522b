"""`agentkit export RUN... --out FILE`: write the trajectories of runs as training rows, OpenAI messages or ATIF."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from agentkit.cli.ending import ExitCode
from agentkit.cli.options import finite, output_file
from agentkit.cli.terminal import visible_line

if TYPE_CHECKING:
    from agentkit_evals.record import RunDirectory


class OnUnlisted(StrEnum):
    """Actions for rows whose licence is unknown or not accepted."""

    REFUSE = "refuse"
    DROP = "drop"
    KEEP = "keep"


def command(
    runs: Annotated[
        list[Path],
        typer.Argument(
            metavar="RUN...", help="Run directories; with --atif, trajectory files as well.", show_default=False
        ),
    ],
    out: Annotated[
        Path,
        typer.Option("--out", help="The JSON Lines file to write; with --atif, a new folder.", show_default=False),
    ],
    atif: Annotated[
        bool, typer.Option("--atif", help="Write every trajectory as an ATIF 1.8 file, as Harbor does.")
    ] = False,
    openai: Annotated[
        bool, typer.Option("--openai", help="Write only `messages` and `tools`, in the form of OpenAI's fine-tuning.")
    ] = False,
    licences: Annotated[
        str | None,
        typer.Option("--licences", help="Accepted SPDX identifiers, comma-separated. Default: common permissive ones."),
    ] = None,
    unlisted: Annotated[
        OnUnlisted,
        typer.Option(
            "--unlisted", help="Rows without an accepted licence: `refuse` the export, `drop` them, or `keep` them."
        ),
    ] = OnUnlisted.REFUSE,
    min_reward: Annotated[float, typer.Option("--min-reward", callback=finite, help="Lowest reward of a row.")] = 1.0,
) -> ExitCode:
    """Write the trajectories of runs as training rows, each with its provenance.

    A row has token ids, a loss mask, log-probabilities, messages, tools, the reward, and the origin of its task:
    generator, seed, package, version, licence, model and sampling. With --atif, licences and rewards do not matter.

    Exits with 1, and says why, if there is nothing to write.
    """
    from agentkit_evals.provenance import PERMISSIVE
    from agentkit_evals.record import RunDirectory
    from agentkit_evals.rows import export_atif, export_rows

    if atif and openai:
        raise typer.BadParameter("--atif contradicts --openai; give only one", param_hint="--atif")
    if atif:
        if out.exists():
            raise typer.BadParameter(f"{out} already exists; give a new folder", param_hint="--out")
        output_file(out)
        sources = [run if run.is_file() else RunDirectory.open(run) for run in runs]
        count = export_atif(sources, out)
        if not count:
            read = _trials_read([source for source in sources if isinstance(source, RunDirectory)])
            typer.echo(f"No trajectory, so {out} is not written: {read}; none has a trajectory", err=True)
            return ExitCode.UNSOLVED
        typer.echo(f"{out}: {count} trajectories")
        return ExitCode.OK
    output_file(out)
    accepted = PERMISSIVE if licences is None else {name.strip() for name in licences.split(",") if name.strip()}
    if not accepted:
        raise typer.BadParameter("no licence; give SPDX identifiers such as MIT,Apache-2.0", param_hint="--licences")
    found = [RunDirectory.open(run) for run in runs]
    fields = ("messages", "tools") if openai else None
    done = export_rows(found, out, licences=accepted, unlisted=unlisted.value, min_reward=min_reward, fields=fields)
    licences_left_out = [
        f"{count} rows with licence {visible_line(name or 'unknown')}"
        for name, count in sorted(done.unlisted.items(), key=lambda item: str(item[0]))
    ]
    if not done.rows:
        reasons = [
            f"{count} {reason}"
            for count, reason in (
                (done.not_scored, "not scored"),
                (done.no_trajectory, "without a trajectory"),
                (done.below_reward, f"below the reward {min_reward:g} (--min-reward)"),
            )
            if count
        ]
        why = ", ".join([*reasons, *licences_left_out])
        typer.echo(f"No row, so {out} is not written: {_trials_read(found)}{why and f'; left out: {why}'}", err=True)
        return ExitCode.UNSOLVED
    typer.echo(f"{out}: {done.rows} rows; {done.below_reward} below the reward")
    for line in licences_left_out:
        typer.echo(f"left out: {line}")
    return ExitCode.OK


def _trials_read(runs: list[RunDirectory]) -> str:
    planned = sum(len(run.lock.tasks) * run.lock.epochs for run in runs)
    return f"{sum(len(run.trials) for run in runs)} of {planned} trials are finished"
