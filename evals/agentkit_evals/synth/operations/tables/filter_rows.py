"""List the rows of a table that a condition holds for, by name."""

from __future__ import annotations

from agentkit_evals.synth.answers import names_are
from agentkit_evals.synth.artifacts.table import Table
from agentkit_evals.synth.draw import Draw
from agentkit_evals.synth.mention import mention
from agentkit_evals.synth.operations.tables.code import TableOperation, computed, load
from agentkit_evals.synth.operations.tables.conditions import column_named, draw_condition
from agentkit_evals.synth.phrasing import Phrasing, phrasings
from agentkit_evals.synth.task import Draft
from agentkit_evals.synth.wording import ask
from agentkit_evals.synth.world import World

MOST = 7  # names in an answer


class FilterRows(TableOperation):
    name = "filter_rows"
    tries = 6
    phrasings = phrasings(
        train=(
            "Which {noun} in {path} {have}?",
            "List the {which} in {path}.",
            "[Show|Give|Tell] me the {which} from {path}, [by {label}|just the {label}].",
            "[Find|Get|Look up|Pull out] all {which} in {path} and [give|tell] me [the|their] {label}.",
            "In {path}, which {noun} {have}?",
            "[What|Which] are the {which} in {path}?",
            "{path}: which {noun} {have}?",
            "I need the {label} of [all|every one of] the {which} in {path}.",
            "[Could you|Can you|Would you] list the {which} [from|in] {path}[, please|]?",
            "[Go through|Read|Open|Check] {path} and list the {label} of [the|all] {which}.",
            "Who or what are the {which}? [See|It's in|Look in] {path}.",
            "[According to|Going by] {path}, which {noun} {have}?",
            "which {noun} {have}, see {path}",
            "Search {path} for {which}; I [need|want] [each|the] {label}.",
            "Make a list of the {which} in {path}.",
            "[Submit|Report|Return] the {label} of the {which} in {path}.",
        ),
        held_out=(
            "Name the {which} that {path} contains.",
            "For every one of the {which} in {path}, give the {label}.",
            "Of the {noun} in {path}, which ones {have}?",
            "I'm looking for the {which} in {path}. Which are they?",
        ),
    )

    def fits(self, table: Table, kind: str) -> bool:
        return bool(table.of("category", "int", "decimal"))

    def draft_over(self, table: Table, draw: Draw, world: World, phrasing: Phrasing) -> Draft | None:
        condition = draw_condition(draw, table, most=MOST)
        if condition is None:
            return None
        label = table.label
        request = ask(
            draw,
            phrasing,
            "list",
            path=mention(draw, table.path),
            noun=table.noun,
            label=column_named(draw, label),
            which=condition.which,
            have=condition.have,
        )
        joint = ", " if request.layout == "commas" else "\\n"
        code = f"{load(table)}\nprint('{joint}'.join(row[{label.header!r}] for row in rows if {condition.code}))"
        at = table.columns.index(label)
        names = [row[at] for row in condition.rows]
        return Draft(
            instruction=request.text,
            steps=computed([table], f"I list `{label.header}` of the rows with `{condition.code}`.", code),
            about=[table.shape],
            difficulty=3,
            **names_are(
                names, others=[name for name in table.cells(label) if name not in names], layout=request.layout
            ),
        )
