"""The Typer application with all commands."""

from __future__ import annotations

from typing import Annotated

import typer

from agentkit.cli import (
    cache,
    chat,
    check,
    compare,
    convert,
    demo,
    doctor,
    export,
    mcp,
    overlap,
    replay,
    run,
    synth,
    view,
)
from agentkit.cli import eval as eval_
from agentkit.cli.ending import EXIT_CODES, ends_well

app = typer.Typer(
    name="agentkit",
    help="Run tool-using agents on any model: behind an API, on your own server, or in the same process.",
    epilog=f"{EXIT_CODES} AGENTKIT_HOME is the folder that holds `runs`. Default: the current folder.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)
for module in (run, chat, eval_, compare, demo, check, view, replay, export, overlap, convert, mcp, doctor):
    app.command(module.__name__.rpartition(".")[2])(ends_well(module.command))
app.add_typer(cache.commands, name="cache")
app.add_typer(synth.commands, name="synth")


def _version(wanted: bool) -> None:
    if wanted:
        from agentkit.version import agentkit_version

        typer.echo(f"agentkit {agentkit_version()}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    pass
