"""Fill in the tables of a model card: `python -m agentkit_evals.card EVERYDAY.json TRAINING.jsonl... --measured FILE`.

The files are the output of `python -m agentkit_evals.everyday`, the training logs in the order of the training runs,
and the output of `python -m agentkit_evals.measure`, for a card that has its sections. Each table replaces the text
between the lines `<!-- NAME -->` and `<!-- end -->` of the card. Every number
in the tables comes from these files.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from agentkit_engine.engine import PACKAGED_MODELS

SECTION = re.compile(r"(?<=^<!-- )(?!end)([a-z]+)( -->\n).*?(?=^<!-- end -->$)", re.DOTALL | re.MULTILINE)


def main(
    everyday: Annotated[Path, typer.Argument(help="Output of `python -m agentkit_evals.everyday`.")],
    training: Annotated[list[Path], typer.Argument(help="training.jsonl of each training run, in order.")],
    measured: Annotated[Path | None, typer.Option(help="Output of `python -m agentkit_evals.measure`.")] = None,
    card: Annotated[Path, typer.Option(help="The model card.")] = PACKAGED_MODELS["tiny"] / "MODEL_CARD.md",
) -> None:
    """Fill in the tables of a model card."""
    try:
        tables = dict(everyday_tables(json.loads(everyday.read_text(encoding="utf-8"))))
        tables["training"] = training_table([read_log(path) for path in training])
        if measured is not None:
            tables |= measured_tables(json.loads(measured.read_text(encoding="utf-8")))
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        files = ", ".join(map(str, [everyday, *training, *([] if measured is None else [measured])]))
        raise typer.BadParameter(
            "expected the output of agentkit_evals.everyday, training.jsonl files, and that of agentkit_evals.measure; "
            f"got {files}: {error!r}"
        ) from error
    card.write_text(filled(card.read_text(encoding="utf-8"), tables), encoding="utf-8")
    print(card)


def filled(card: str, tables: Mapping[str, str]) -> str:
    """Return a card with these tables in their sections.

    Raises:
        typer.BadParameter: the card has a section for which there is no table, or the other way round.
    """
    names = {match[1] for match in SECTION.finditer(card)}
    if names != set(tables):
        raise typer.BadParameter(
            f"the card has the sections {', '.join(sorted(names))}; the files give {', '.join(sorted(tables))}"
        )
    return SECTION.sub(lambda match: f"{match[1]}{match[2]}\n{tables[match[1]]}\n\n", card)


def everyday_tables(everyday: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield the tables of the hand-written suites, and of the kinds of task in them."""
    suites = everyday["suites"]
    rows = [[name, *_cells(found["all"]), *_cells(found["pairs"])] for name, found in suites.items()]
    yield "suites", table(["suite", "solved, %", "n", "pairs solved, %", "n"], rows)
    kinds = [
        [name, kind, *_cells(score)]
        for name, found in suites.items()
        for kind, score in sorted(found["kinds"].items(), key=lambda item: item[1].get("mean", 0))
    ]
    yield "kinds", table(["suite", "kind", "solved, %", "n"], kinds)


def measured_tables(measured: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield the table of solve rates, then those of grammar, baselines and ablations if they were measured."""
    results = measured["results"]
    operations = {**results["operations"], "all": results["all"]}
    parts = ("trained_phrasings", "held_out_phrasings")
    header = ["operation", "solved, %", "n", "phrasings trained on, %", "n", "phrasings never trained on, %", "n"]
    rows = (
        [name, *_cells(score), *_cells(score[parts[0]]), *_cells(score[parts[1]])] for name, score in operations.items()
    )
    yield "operations", table(header, rows)
    if guided := measured.get("with_grammar"):
        scores = {**guided["operations"], "all": guided["all"]}
        yield (
            "grammar",
            table(
                ["operation", "without a grammar, %", "with one, %"],
                ([name, _percent(operations[name]), _percent(score)] for name, score in scores.items()),
            ),
        )
    if baselines := measured.get("baselines"):
        yield (
            "baselines",
            table(
                ["operation", *(f"{name}, %" for name in baselines)],
                (
                    [name, *(_percent({**each["operations"], "all": each["all"]}[name]) for each in baselines.values())]
                    for name in operations
                ),
            ),
        )
    if ablations := measured.get("ablations"):
        far = next(iter(ablations.values()))["operations"]
        yield (
            "ablations",
            table(
                ["operation", "whole model, %", *(f"{kind.upper()} entries zeroed, %" for kind in ablations)],
                (
                    [
                        name,
                        _percent(operations[name]),
                        *(_percent(each["operations"][name]) for each in ablations.values()),
                    ]
                    for name in far
                ),
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
    final = [entry for entry in entries if "token_accuracy" in entry][-1:]  # none if the run was stopped before
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
        *(f"{100 * final[0][key]:.1f} %" if final else "–" for key in ("token_accuracy", "row_accuracy")),
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
