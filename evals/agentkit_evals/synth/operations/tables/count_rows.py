"""Count the rows of a table, all of them or those that a condition holds for."""

from __future__ import annotations

from agentkit_evals.synth.answers import number_is
from agentkit_evals.synth.artifacts.table import Table
from agentkit_evals.synth.draw import Draw
from agentkit_evals.synth.mention import mention
from agentkit_evals.synth.operations.tables.code import TableOperation, computed, load
from agentkit_evals.synth.operations.tables.conditions import draw_condition, rows_named
from agentkit_evals.synth.phrasing import Phrasing, phrasings
from agentkit_evals.synth.task import Draft
from agentkit_evals.synth.wording import ask
from agentkit_evals.synth.world import World


class CountRows(TableOperation):
    name = "count_rows"
    phrasings = (
        *phrasings(
            "some",
            train=(
                "How many {which} are [there |]in {path}?",
                "How many {noun} in {path} {have}?",
                "Count the {which} in {path}.",
                "[Number|Count] of {which} in {path}?",
                "{path}: how many {which}?",
                "[Tell me|I need to know|Please find out|I'd like to know] how many {which} there are in {path}.",
                "In {path}, [count|find the number of] {which}.",
                "[Could you|Can you|Would you] count the {which} in {path}[, please|]?",
                "I need the number of {which} [from|in] {path}.",
                "[Look at|Open|Check|Go through] {path} and count the {which}.",
                "What is the number of {which} in {path}?",
                "[According to|Going by|Looking at] {path}, how many {noun} {have}?",
                "how many {which} in {path}",
                "{path} lists {noun}. How many [of them |]{have}?",
                "[Check|Have a look at] {path}: how many of the {noun} {have}?",
                "Do you know how many {which} {path} has?",
            ),
            held_out=(
                "Give me a count of {which} based on {path}.",
                "From {path}: the number of {which}, please.",
                "How many {which} can you find in {path}?",
                "I wonder how many {noun} in {path} {have}.",
            ),
        ),
        *phrasings(
            "all",
            train=(
                "How many {noun} are [there |]in {path}?",
                "How many {noun} does {path} [have|list|contain|hold]?",
                "Count [the|all] {noun} in {path}.",
                "[Number|Count|Total number] of {noun} in {path}?",
                "[Tell me|I need|Please report] the number of {noun} in {path}.",
                "{path}: how many {noun} [is that|are in it]?",
                "how many {noun} in {path}",
                "How [big|long] is the table in {path}? I mean the number of {noun}[, without the header|].",
            ),
            held_out=(
                "What number of {noun} do we have in {path}?",
                "Please count how many {noun} {path} comprises.",
            ),
        ),
    )

    def fits(self, table: Table, kind: str) -> bool:
        return bool(table.of("category", "int", "decimal"))

    def draft_over(self, table: Table, draw: Draw, world: World, phrasing: Phrasing) -> Draft | None:
        said: tuple[str, ...] = ()
        slots = {"path": mention(draw, table.path), "noun": rows_named(draw, table)}
        if phrasing.kind == "all":
            count, code = len(table.rows), f"{load(table)}\nprint(len(rows))"
            reasoning = "I count the rows."
        else:
            condition = draw_condition(draw, table)
            if condition is None:
                return None
            slots |= {"which": condition.which, "have": condition.have}
            count = len(condition.rows)
            said = condition.said
            code = f"{load(table)}\nprint(sum({condition.code} for row in rows))"
            reasoning = f"I count the rows with `{condition.code}`."
        request = ask(draw, phrasing, "number", **slots)
        return Draft(
            instruction=request.text,
            steps=computed([table], reasoning, code),
            about=[table.shape],
            difficulty=2 + (phrasing.kind == "some"),
            **number_is(count, layout=request.layout, ignored=[table.path, *said]),
        )
