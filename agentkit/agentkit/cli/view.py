"""`agentkit view RUN`: write a run's report anew and say where it is."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from agentkit.cli.ending import ExitCode

if TYPE_CHECKING:
    from agentkit_evals.report import Decode


def command(
    run: Annotated[Path, typer.Argument(help="A run directory, also one that was interrupted or is still running.")],
    open_: Annotated[bool, typer.Option("--open", help="Open it in the browser.")] = False,
) -> ExitCode:
    """Write the HTML report of a run anew, and print its address."""
    from agentkit_evals.record import RunDirectory
    from agentkit_evals.report import write_report

    finished = RunDirectory.open(run)
    address = write_report(finished, decode=_decoder(finished.lock.model)).resolve().as_uri()
    typer.echo(address)
    if open_:
        typer.launch(address)
    return ExitCode.OK


def _decoder(model: str) -> Decode | None:
    """The tokenizer of a packaged model, found without loading the model; other runs show ids."""
    from agentkit_engine.chat import Tokenizer
    from agentkit_engine.engine import PACKAGED_MODELS

    folder = PACKAGED_MODELS.get(model)
    return Tokenizer.from_dir(folder).decode if folder and (folder / "tokenizer.json").is_file() else None
