"""`agentkit cache info DIR` and `agentkit cache prune DIR --bytes N`: inspect and shrink a `--cache-dir` folder."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from agentkit.cli.ending import ExitCode, ends_well
from agentkit.cli.options import JsonFlag
from agentkit.cli.terminal import visible_line

commands = typer.Typer(help="Inspect and prune the prefix cache on disk.", no_args_is_help=True)

FolderArgument = Annotated[
    Path, typer.Argument(metavar="DIR", help="The folder given as `--cache-dir`.", show_default=False)
]


def info(folder: FolderArgument, as_json: JsonFlag = False) -> ExitCode:
    """List the contents of a cache folder by model. Reads and checks every byte, so a large folder takes a while."""
    from agentkit_engine.runtime.disk_cache import survey

    models = survey(_existing(folder))
    total = sum(model.bytes for model in models)
    if as_json:
        typer.echo(json.dumps({"bytes": total, "models": [asdict(model) for model in models]}, indent=2))
        return ExitCode.OK
    for model in models:
        typer.echo(
            f"{visible_line(model.name)}  {model.segments} segments, {model.bytes:,} bytes: {model.spans} spans, "
            f"{model.checkpoints} checkpoints, {model.damaged} damaged"
        )
    typer.echo(f"{len(models)} models, {total:,} bytes")
    return ExitCode.OK


def prune(
    folder: FolderArgument,
    budget_bytes: Annotated[
        int, typer.Option("--bytes", min=0, help="Bytes to keep, over all models.", show_default=False)
    ],
    as_json: JsonFlag = False,
) -> ExitCode:
    """Remove the least recently used segments until at most `--bytes` remain."""
    from agentkit_engine.runtime import disk_cache

    removed, left = disk_cache.prune(_existing(folder), budget_bytes)
    if as_json:
        typer.echo(json.dumps({"removed_segments": removed, "bytes": left}, indent=2))
    else:
        typer.echo(f"removed {removed} segments, {left:,} bytes left")
    return ExitCode.OK


commands.command("info")(ends_well(info))
commands.command("prune")(ends_well(prune))


def _existing(folder: Path) -> Path:
    if not folder.is_dir():
        raise typer.BadParameter(
            f"there is no folder {folder}; give the --cache-dir of an earlier command",
            param_hint="DIR",
        )
    return folder
