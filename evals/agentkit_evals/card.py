"""Print the model card's tables in Markdown: `python -m agentkit_evals.card MEASURED.json [TRAINING.jsonl ...]`.

The first file is the output of `python -m agentkit_evals.measure`; the others are training logs, in the order of the
training runs. Every number in the tables comes from these files.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer


def main(
    measured: Annotated[Path, typer.Argument(help="Output of `python -m agentkit_evals.measure`.")],
    training: Annotated[
        list[Path] | None, typer.Argument(help="training.jsonl of each training run, in order.")
    ] = None,
) -> None:
    """Print the model card's tables."""
    try:
        sections = [*measured_tables(json.loads(measured.read_text(encoding="utf-8")))]
        if training:
            sections.append(training_table([read_log(path) for path in training]))
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        files = ", ".join(map(str, [measured, *(training or ())]))
        raise typer.BadParameter(
            f"expected the output of agentkit_evals.measure, then training.jsonl files; got {files}: {error!r}"
        ) from error
    print("\n\n".join(sections))


def measured_tables(measured: dict[str, Any]) -> Iterator[str]:
    """Yield the table of solve rates, then those of grammar, baselines and ablations if they were measured."""
    results = measured["results"]
    families = {**results["families"], "all": results["all"]}
    parts = ("trained_phrasings", "held_out_phrasings")
    yield table(
        ["family", "solved, %", "n", "phrasings trained on, %", "n", "phrasings never trained on, %", "n"],
        (
            [name, *_cells(score), *_cells(score[parts[0]]), *_cells(score[parts[1]])]
            for name, score in families.items()
        ),
    )
    if guided := measured.get("with_grammar"):
        rows = {**guided["families"], "all": guided["all"]}
        yield table(
            ["family", "without a grammar, %", "with one, %"],
            ([name, _percent(families[name]), _percent(score)] for name, score in rows.items()),
        )
    if baselines := measured.get("baselines"):
        yield table(
            ["family", *(f"{name}, %" for name in baselines)],
            (
                [family, *(_percent({**each["families"], "all": each["all"]}[family]) for each in baselines.values())]
                for family in families
            ),
        )
    if ablations := measured.get("ablations"):
        far = next(iter(ablations.values()))["families"]
        yield table(
            ["family", "whole model, %", *(f"{kind.upper()} entries zeroed, %" for kind in ablations)],
            (
                [name, _percent(families[name]), *(_percent(each["families"][name]) for each in ablations.values())]
                for name in far
            ),
        )


def read_log(path: Path) -> list[dict[str, Any]]:
    """Return the entries of a training.jsonl."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def training_table(logs: Sequence[Sequence[dict[str, Any]]]) -> str:
    """Return a table with one column per training run."""
    names = ("rows", "steps", "tokens", "time", "loss at the last step")
    right = ("held-out tokens right, teacher forced", "held-out trajectories right to the last token")
    columns = [_run(entries) for entries in logs]
    return table(
        ["", *(f"run {number}" for number in range(1, len(logs) + 1))],
        [[name, *cells] for name, *cells in zip((*names, *right), *columns, strict=True)],
    )


def _run(entries: Sequence[dict[str, Any]]) -> list[str]:
    """Return the column of one training run. The log counts the tokens of one of its processes."""
    first, last = entries[0], [entry for entry in entries if "loss" in entry][-1]
    final = [entry for entry in entries if "token_accuracy" in entry][-1]
    workers = first["workers"]
    tokens, written = workers * last["tokens"], workers * last["written"]
    planned, done = first["config"]["steps"], last["step"] + 1
    steps = f"{planned:,}" if done == planned else f"{done:,} of {planned:,}"
    return [
        f"{first['rows']:,}",
        f"{steps}, {workers} processes of one thread",
        f"{tokens / 1e6:.1f} M, {written / 1e6:.1f} M of them the assistant's",
        f"{last['s'] / 60:.0f} minutes",
        f"{last['loss']:.3f}",
        f"{100 * final['token_accuracy']:.1f} %",
        f"{100 * final['row_accuracy']:.1f} %",
    ]


def table(header: Sequence[str], rows: Iterator[Sequence[str]] | Sequence[Sequence[str]]) -> str:
    """Return a Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cells(score: dict[str, Any]) -> tuple[str, str]:
    return _percent(score), str(score.get("n", 0))


def _percent(score: dict[str, Any]) -> str:
    if not score.get("n"):
        return "–"
    error = "" if score["stderr"] is None else f" ± {100 * score['stderr']:.1f}"
    return f"{100 * score['mean']:.1f}{error}"


if __name__ == "__main__":
    typer.run(main)
