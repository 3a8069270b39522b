"""`agentkit overlap EXPORT CORPUS...`: find the longest verbatim copies of a corpus in an export."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from agentkit.cli.ending import ExitCode
from agentkit.cli.options import JsonFlag
from agentkit.cli.terminal import visible_line


def command(
    export: Annotated[
        Path, typer.Argument(metavar="EXPORT", help="Rows (.jsonl), a text file, or a folder.", show_default=False)
    ],
    corpora: Annotated[
        list[Path], typer.Argument(metavar="CORPUS...", help="Texts to look for, likewise.", show_default=False)
    ],
    min_bytes: Annotated[int, typer.Option("--min-bytes", min=8, help="Shortest copy to report.")] = 50,
    top: Annotated[int, typer.Option("--top", min=1, max=10_000, help="Number of copies to report.")] = 20,
    fail_above: Annotated[
        int | None, typer.Option("--fail-above", min=1, help="Exit with 1 if a copy has more bytes than this.")
    ] = None,
    as_json: JsonFlag = False,
) -> ExitCode:
    """Report the longest texts that an export and given corpora have in common, and where they are."""
    from agentkit_evals import overlap

    theirs = [text for corpus in corpora for text in overlap.read_texts(corpus)]
    copies = overlap.longest_copies(overlap.read_texts(export), theirs, min_bytes=min_bytes, most=top)
    if as_json:
        typer.echo(overlap.as_json(copies))
    else:
        for copy in copies:
            place = f"{copy.export} +{copy.export_offset_bytes} = {copy.corpus} +{copy.corpus_offset_bytes}"
            typer.echo(f"{copy.length_bytes:>7,} bytes  {visible_line(place)}\n    {visible_line(copy.text)}")
        typer.echo(f"{len(copies)} copies of at least {min_bytes} bytes")
    longest = copies[0].length_bytes if copies else 0
    return ExitCode.UNSOLVED if fail_above is not None and longest > fail_above else ExitCode.OK
