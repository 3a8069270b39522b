"""`agentkit view PATH`: write an HTML page of a run, a folder of runs or one trajectory."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated
from urllib.parse import quote

import typer

from agentkit.cli.ending import ExitCode
from agentkit.cli.terminal import visible

if TYPE_CHECKING:
    from agentkit_evals.record import RunDirectory
    from agentkit_evals.report import Decode


def command(
    path: Annotated[
        Path,
        typer.Argument(
            help="A run (finished, interrupted or running), a folder of runs, a report, or a trajectory (.jsonl)."
        ),
    ] = Path("runs"),
    open_: Annotated[bool, typer.Option("--open", help="Open the page in the browser.")] = False,
) -> ExitCode:
    """Write an HTML page of a run, of a folder of runs (an index) or of one trajectory, and print its URL."""
    address = _page(path).resolve().as_uri()
    typer.echo(address)
    if open_:
        typer.launch(address)
    return ExitCode.OK


def _page(path: Path) -> Path:
    """Write the page of `path` and return its location. Raises RunDirectoryError if `path` cannot be shown."""
    from agentkit_evals.errors import RunDirectoryError
    from agentkit_evals.record import RunDirectory

    if path.is_dir():
        if (path / "run.json").exists() or not (runs := _runs(path)):
            return write_report(RunDirectory.open(path))
        return _index(path, runs)
    if path.suffix == ".html" and path.is_file():
        return path
    if path.name in ("run.json", "trials.jsonl"):
        return write_report(RunDirectory.open(path.parent))
    if path.is_file():
        return _trajectory(path)
    raise RunDirectoryError(f"{path} does not exist; give a run, a folder of runs, a report or a trajectory (.jsonl)")


def _runs(folder: Path) -> list[Path]:
    """Return the runs in a folder, including runs of several models, which share a folder."""
    return sorted(file.parent for pattern in ("*/run.json", "*/*/run.json") for file in folder.glob(pattern))


def write_report(run: RunDirectory) -> Path:
    """Write the report of a run without loading its model, and return its path: in the run directory, if possible."""
    from agentkit_evals.report import render_report

    model = str(run.lock.model_options.get("model", run.lock.model))
    return _write(run.path / "report.html", render_report(run, decode=_decoder(model)))


def _index(folder: Path, runs: list[Path]) -> Path:
    from agentkit_evals.errors import RunDirectoryError
    from agentkit_evals.record import RunDirectory
    from agentkit_evals.report import render_index

    opened: list[tuple[RunDirectory, str]] = []
    problems: list[str] = []
    for path in runs:
        try:
            run = RunDirectory.open(path)
            report = path / "report.html"
            if not report.exists():  # killed, or still running
                report = write_report(run)
            where = (
                f"{quote(path.relative_to(folder).as_posix())}/report.html"
                if report.parent == path
                else report.as_uri()
            )
            opened.append((run, where))
        except RunDirectoryError as exc:
            problems.append(str(exc))
            typer.echo(f"Left out: {visible(str(exc).partition(chr(10))[0])}", err=True)
    return _write(folder / "index.html", render_index(folder.resolve().name, opened, problems))


def _trajectory(path: Path) -> Path:
    from agentkit.trajectory import Trajectory
    from agentkit_evals.report import render_trajectory

    trajectory = Trajectory.load(path)
    page = render_trajectory(trajectory, path.stem, decode=_decoder(trajectory.header.model))
    return _write(path.with_suffix(".html"), page)


def _write(path: Path, page: str) -> Path:
    """Write a page to `path`, or to a new folder if that is read-only or `path` is a file not written by agentkit."""
    ours = not path.exists() or b'<p class="brand">agentkit' in path.read_bytes()[:200_000]
    if not ours or not os.access(path.parent, os.W_OK):
        path = Path(tempfile.mkdtemp(prefix="agentkit-view-"), path.name)
    path.write_text(page, encoding="utf-8")
    return path


def _decoder(model: str) -> Decode | None:
    """Return the decoder of a packaged model, or of one in a folder (an absolute path), without loading the model.

    None for other models, and if the folder has no usable tokenizer; their pages show ids.
    """
    from agentkit_engine.chat import Tokenizer
    from agentkit_engine.chat.errors import TokenizerError
    from agentkit_engine.engine import PACKAGED_MODELS

    folder = PACKAGED_MODELS.get(model, Path(model))
    if not folder.is_absolute():
        return None
    try:
        return Tokenizer.from_dir(folder).decode
    except TokenizerError:
        return None
