"""The model card's tables, in Markdown: `python -m agentkit_evals.card MEASURED.json [TRAINING.jsonl]`.

The first file is what `python -m agentkit_evals.measure` wrote, the second what training logged. Nothing is computed
here, so a number in the card is a number in a file.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer


def main(
    measured: Annotated[Path, typer.Argument(help="What `python -m agentkit_evals.measure` wrote.")],
    training: Annotated[Path | None, typer.Argument(help="training.jsonl of the run that made the model.")] = None,
) -> None:
    """Print the tables."""
    sections = [*measured_tables(json.loads(measured.read_text(encoding="utf-8")))]
    if training is not None:
        entries = [json.loads(line) for line in training.read_text(encoding="utf-8").splitlines()]
        sections.append(training_table(entries))
    print("\n\n".join(sections))


def measured_tables(measured: dict[str, Any]) -> Iterator[str]:
    """Solve rates by family and phrasing, then baselines and ablations where they were measured."""
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


def training_table(entries: Sequence[dict[str, Any]]) -> str:
    """What one training run was, from its log: the first process's share of tokens, times the processes."""
    first, last = entries[0], [entry for entry in entries if "loss" in entry][-1]
    final = [entry for entry in entries if "token_accuracy" in entry][-1]
    workers = first["workers"]
    tokens, written = workers * last["tokens"], workers * last["written"]
    planned, done = first["config"]["steps"], last["step"] + 1
    steps = f"{planned:,}" if done == planned else f"{done:,} of {planned:,}"
    return table(
        ["this run", ""],
        [
            ["rows", f"{first['rows']:,}"],
            ["steps", f"{steps}, {workers} processes of one thread"],
            ["tokens", f"{tokens / 1e6:.1f} M, {written / 1e6:.1f} M of them the assistant's"],
            ["time", f"{last['s'] / 60:.0f} minutes"],
            ["loss at the last step", f"{last['loss']:.3f}"],
            ["held-out tokens right, teacher forced", f"{100 * final['token_accuracy']:.1f} %"],
            ["held-out trajectories right to the last token", f"{100 * final['row_accuracy']:.1f} %"],
        ],
    )


def table(header: Sequence[str], rows: Iterator[Sequence[str]] | Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
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
