"""`agentkit convert SOURCE TARGET --to FORMAT`: write a model folder in another number format."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Literal

import typer

from agentkit.cli.ending import ExitCode


class To(StrEnum):
    """The formats of matrices that a model folder can have."""

    BF16 = "bf16"
    FP8_FP4 = "fp8+fp4"
    INT8 = "int8"


_FORMATS: dict[To, Literal["bf16", "official", "int8"]] = {To.BF16: "bf16", To.FP8_FP4: "official", To.INT8: "int8"}


def command(
    source: Annotated[
        Path, typer.Argument(metavar="SOURCE", help="A model folder in the official layout.", show_default=False)
    ],
    target: Annotated[
        Path, typer.Argument(metavar="TARGET", help="The folder to write; new or without weights.", show_default=False)
    ],
    to: Annotated[
        To,
        typer.Option(
            help="`fp8+fp4`: FP8 matrices and FP4 experts, as in the official checkpoints; `int8`: 8 bits with a scale "
            "per output; `bf16`: 16 bits.",
            show_default=False,
        ),
    ],
) -> ExitCode:
    """Write a model folder in another number format, and print what that changed in each kind of tensor."""
    from agentkit_engine.weights.convert import convert_checkpoint

    if not source.is_dir():
        raise typer.BadParameter(f"there is no folder {source}", param_hint="SOURCE")
    try:
        kinds = convert_checkpoint(source, target, format=_FORMATS[to])
    except FileExistsError as error:
        raise typer.BadParameter(str(error), param_hint="TARGET") from error
    width = max(len(kind.name) for kind in kinds)
    typer.echo(f"{'tensor':{width}}  stored  tensors  relative error  largest error")
    for kind in kinds:
        typer.echo(
            f"{kind.name:{width}}  {kind.storage:6}  {kind.tensors:7}  {kind.relative:14.2e}  {kind.largest:13.2e}"
        )
    size = sum(path.stat().st_size for path in target.glob("*.safetensors"))
    typer.echo(f"{target}: {size:,} bytes of weights")
    return ExitCode.OK
