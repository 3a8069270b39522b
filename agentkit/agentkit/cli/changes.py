"""The flags for the user's folder, and the end of a run on it: show the changes, ask, and write them."""

from __future__ import annotations

import shlex
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from agentkit.cli.terminal import counted, say, visible

if TYPE_CHECKING:
    from rich.console import Console

    from agentkit.cli.workdir import Change
    from agentkit.model import Model

SHOWN_LEFT_OUT = 20
"""Maximum number of left-out entries listed on the terminal; `--json` lists all of them."""


def check_flags(workdir: Path | None, *, patch: Path | None, branch: str | None, **flags: bool) -> None:
    """Check that the flags for the user's folder come with a folder, and that their outputs can be written at the end.

    Raises:
        typer.BadParameter: A flag cannot be used.
    """
    if workdir is None:
        given = {**flags, "patch": patch is not None, "branch": branch is not None}
        for name, is_given in given.items():
            if is_given:
                hint = f"--{name.replace('_', '-')}"
                raise typer.BadParameter("no folder to work on; also give --workdir", param_hint=hint)
        return
    from agentkit.cli.patch import check_branch, check_patch

    if patch is not None:
        check_patch(patch)
    if branch is not None:
        check_branch(workdir, branch)


def name_host(model: Model, folder: Path) -> None:
    """Print on standard error the host that the folder's content is sent to, if the model is behind an API."""
    if host := getattr(model, "host", None):
        typer.echo(visible(f"Files of {folder.resolve()} are sent to {host} as the agent reads them."), err=True)


def print_diff(console: Console, changes: list[Change]) -> None:
    """Print changes as a unified diff."""
    if changes:
        console.print()
    for change in changes:
        for line in change.diff():
            say(console, line, {"+": "green", "-": "red", "@": "cyan"}.get(line[:1], ""))


def is_confirmed(patch: Path | None, branch: str | None) -> bool:
    """Ask a user at a terminal whether to apply the changes, unless they are written to a patch or branch."""
    asks = patch is None and branch is None and sys.stdin.isatty()
    return asks and typer.confirm("Apply these changes?", default=False)


@dataclass(slots=True)
class Written:
    """The outcome of writing the changes to the user's folder."""

    applied: bool = False
    patch: Path | None = None
    branch: str | None = None
    sentences: list[str] = field(default_factory=list)
    """Remarks on the branch for the user, one sentence each."""
    refused: list[str] = field(default_factory=list)
    """The reasons why something was not written."""


def write(
    folder: Path, changes: list[Change], instruction: str, *, apply: bool, patch: Path | None, branch: str | None
) -> Written:
    """Write the changes to a patch, to a branch and into the folder, whichever are requested."""
    from agentkit.cli.git import GitError
    from agentkit.cli.patch import make_branch, make_patch
    from agentkit.cli.workdir import apply as apply_changes

    written = Written()
    stale = [change.path for change in changes if change.is_stale]
    if branch is not None:
        message = f"{instruction.strip().splitlines()[0][:72]}\n\nMade by agentkit.\n"
        try:
            written.sentences += make_branch(folder, branch, changes, message)
            written.branch = branch
        except (GitError, OSError) as error:
            written.refused.append(str(error))
    if patch is not None and stale:
        written.refused += [f"{path}: it changed during the run; use --branch" for path in stale]
    elif patch is not None:
        try:
            data = make_patch(folder, changes)
            with open(patch, "xb") as file:
                file.write(data)
            written.patch = patch
        except (GitError, OSError) as error:
            written.refused.append(str(error))
    if apply:
        refused = apply_changes(folder, changes)
        written.applied = not refused
        written.refused += refused
    return written


def print_written(console: Console, folder: Path, changes: list[Change], left_out: list[str], written: Written) -> None:
    """Print where the changes to the user's folder were written, and the entries that were left out."""
    folder = folder.resolve()
    if written.patch is not None:
        say(console, f"Wrote {written.patch}; `git apply {shlex.quote(str(written.patch))}` applies it.")
    if written.branch is not None:
        say(console, f"Committed {counted(len(changes), 'change')} to the branch {written.branch}.")
    for sentence in written.sentences:
        say(console, sentence)
    if not changes:
        console.print("No files were changed.")
    elif written.applied:
        say(console, f"Applied {counted(len(changes), 'change')} to {folder}.")
    elif written.refused:
        say(console, f"Nothing was applied; {folder} is unchanged:", "yellow")
    elif written.patch is None and written.branch is None:
        say(console, f"{folder} is unchanged. Give --apply, --patch or --branch to keep the changes of the next run.")
    for sentence in written.refused:
        say(console, f"  {sentence}", "yellow")
    for line in left_out[:SHOWN_LEFT_OUT]:
        say(console, f"Left out: {line}", "dim")
    if len(left_out) > SHOWN_LEFT_OUT:
        say(console, f"Left out: {len(left_out) - SHOWN_LEFT_OUT} more entries", "dim")
