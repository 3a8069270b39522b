"""Tell a cell of a table's first or last row."""

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


class EndRow(TableOperation):
    name = "end_row"
    phrasings = phrasings(
        train=(
            "What is the {column} of the {end} [row|entry|record] in {path}?",
            "[Which|What] {column} does the {end} [row|entry|record] of {path} have?",
            "[Tell|Give|Show] me the {column} of the {end} [row|entry] in {path}.",
            "[Find|Look up|Get] the {end} [row|entry] of {path} and [submit|report|tell me] its {column}.",
            "{path}: {column} of the {end} [row|entry]?",
            "In {path}, what is the {column} in the {end} [row|entry|line]?",
            "I need the {column} of the {end} of the {noun} in {path}.",
            "Of the {noun} in {path}, take the {end} one. What is its {column}?",
            "[Open|Check|Read] {path}: what {column} [is in|does] the {end} row[| have]?",
            "[Could you|Can you] tell me the {column} in the {end} [row|entry] of {path}?",
            "The {end} of the {noun} in {path} has [which|what] {column}?",
            "What did we [enter|write|put] as {column} in the {end} row of {path}?",
        ),
        held_out=(
            "Which {column} do I find in the {end} row of {path}?",
            "Go to the {end} entry of {path} and read out the {column}.",
            "{path} has some {noun}; for the {end} one, what is the {column}?",
        ),
    )

    def draft_over(self, table: Table, draw: Draw, world: World, phrasing: Phrasing) -> Draft | None:
        end, at = draw.choice((("first", 0), ("last", -1), ("last", -1)))
        column = draw.choice(table.columns)
        cells = table.cells(column)
        answer = cells[at]
        request = ask(
            draw,
            phrasing,
            "number" if column.number else "value",
            path=mention(draw, table.path),
            noun=table.noun,
            column=column_named(draw, column),
            end=end,
        )
        code = f"{load(table)}\nprint(rows[{at}][{column.header!r}])"
        if column.number:
            check = number_is(float(answer), layout=request.layout, decimals=2, ignored=[table.path])
        else:
            others = {*cells} - {answer} if column.kind in ("label", "category") else ()
            check = names_are([answer], others=others, layout=request.layout)
        return Draft(
            instruction=request.text,
            steps=computed([table], f"I print `{column.header}` of the {end} row.", code),
            about=[table.shape],
            difficulty=2,
            **check,
        )
