"""Count or list the different values of a table's column."""

from __future__ import annotations

from agentkit_evals.synth.answers import names_are, number_is
from agentkit_evals.synth.artifacts.table import Table
from agentkit_evals.synth.draw import Draw
from agentkit_evals.synth.mention import mention
from agentkit_evals.synth.operations.tables.code import TableOperation, computed, load
from agentkit_evals.synth.operations.tables.conditions import column_named
from agentkit_evals.synth.phrasing import Phrasing, phrasings
from agentkit_evals.synth.task import Draft
from agentkit_evals.synth.wording import ask
from agentkit_evals.synth.world import World


class DistinctValues(TableOperation):
    name = "distinct_values"
    phrasings = (
        *phrasings(
            "count",
            train=(
                "How many [different|distinct|unique] values does {column} have in {path}?",
                "How many [different|distinct|unique] {column} values are [there |]in {path}?",
                "Count the [different|distinct|unique] values of {column} in {path}.",
                "[Number of|How many] [different|distinct|unique] values in the {column} column of {path}?",
                "In {path}, how many different values [are there for|does the column] {column}[ have|]?",
                "{path}: how many [distinct|unique|different] {column} values?",
                "[Tell me|I need|Find out] the number of [different|distinct|unique] {column} values in {path}.",
                "[Ignoring|Without] repetitions, how many {column} values does {path} have?",
                "[Could you|Can you] count how many different {column} values [appear|occur] in {path}?",
                "How many [different|unique] entries are in the column {column} of {path}?",
            ),
            held_out=(
                "Not counting repeats, how many values of {column} occur in {path}?",
                "How varied is {column} in {path}? Give the number of different values.",
                "In the {column} column of {path}, how many values are there once duplicates are removed?",
            ),
        ),
        *phrasings(
            "list",
            train=(
                "[Which|What] [different|distinct|unique] values does {column} have in {path}?",
                "List the [different|distinct|unique] values of {column} in {path}.",
                "[Show|Give] me [all|the] [different|distinct|unique] {column} values in {path}.",
                "[Which|What] {column} values [appear|occur|are used] in {path}?",
                "What are the [possible|different] values of {column} in {path}?",
                "List every {column} in {path} once.",
                "{path}: [all|list the] {column} values[, no duplicates|, each once|, without repeats]?",
                "[Collect|Extract|Get] the unique {column} values from {path}.",
            ),
            held_out=(
                "Which values does the column {column} of {path} take?",
                "I'd like every {column} that {path} has, without duplicates.",
            ),
        ),
    )

    def fits(self, table: Table, kind: str) -> bool:
        return bool(table.of("category"))

    def draft_over(self, table: Table, draw: Draw, world: World, phrasing: Phrasing) -> Draft | None:
        column = draw.choice(table.of("category"))
        values = sorted({*table.cells(column)})
        request = ask(
            draw,
            phrasing,
            "number" if phrasing.kind == "count" else "list",
            path=mention(draw, table.path),
            column=column_named(draw, column),
        )
        different = f"{{row[{column.header!r}] for row in rows}}"
        if phrasing.kind == "count":
            code = f"{load(table)}\nprint(len({different}))"
            check = number_is(len(values), layout=request.layout, ignored=[table.path])
        else:
            joint = ", " if request.layout == "commas" else "\\n"
            code = f"{load(table)}\nprint('{joint}'.join(sorted({different})))"
            check = names_are(values, layout=request.layout)
        return Draft(
            instruction=request.text,
            steps=computed([table], f"I collect the values of `{column.header}`.", code),
            about=[table.shape],
            difficulty=3,
            **check,
        )
