"""Look up a cell of one table by way of another: the row of a name, and the row that it refers to."""

from __future__ import annotations

from agentkit_evals.synth.answers import names_are, number_is
from agentkit_evals.synth.artifacts.table import Column, Table, reference_table
from agentkit_evals.synth.draw import Draw
from agentkit_evals.synth.find import is_free
from agentkit_evals.synth.mention import mention, mention_value
from agentkit_evals.synth.operations.tables.code import TableOperation, computed, load, script
from agentkit_evals.synth.operations.tables.conditions import column_named
from agentkit_evals.synth.phrasing import Phrasing, phrasings
from agentkit_evals.synth.task import Draft
from agentkit_evals.synth.wording import ask
from agentkit_evals.synth.world import World


class JoinTables(TableOperation):
    name = "join_tables"
    phrasings = phrasings(
        train=(
            "What is the {wanted} of the {key} of {name}? {a} has the {noun}, {b} [has|lists] each {key}.",
            "[Look up|Find|Take] the {key} of {name} in {a}, then [look up|find|get] its {wanted} in {b}.",
            "{a} gives the {key} of {name}. What is the {wanted} of that {key}, according to {b}?",
            "Using {a} and {b}, [find|tell me|work out] the {wanted} for {name}'s {key}.",
            "[Which|What] {wanted} does the {key} of {name} have? [You need|Look in|Use] {a} and {b}.",
            "In {a} every one of the {noun} has a {key}; {b} has the {wanted} of each {key}. What is it for {name}?",
            "I need the {wanted} that belongs to {name}: the {key} is in {a} and its {wanted} in {b}.",
            "[Join|Combine|Match] {a} and {b} on {key}. What is the {wanted} for {name}?",
            "Find {name} in {a}. What does {b} say about the {wanted} of [its|that] {key}?",
            "{name} is in {a}. [Go|Look] from its {key} to {b} and [tell me|submit] the {wanted}.",
            "[Tell me|Give me|Submit] the {wanted} of {name}'s {key}. The files are {a} and {b}.",
            "{a} and {b} share the {key}. [Which|What] {wanted} goes with {name}?",
        ),
        held_out=(
            "Follow the {key} of {name} from {a} to {b}. Which {wanted} do you end up with?",
            "With the help of {a} and {b}: what {wanted} is {name} connected to, by {key}?",
            "What {wanted} does {b} give for the {key} that {a} shows for {name}?",
        ),
    )

    def fits(self, table: Table, kind: str) -> bool:
        return bool(_keys(table)) and len(table.rows) <= 60

    def draft_over(self, table: Table, draw: Draw, world: World, phrasing: Phrasing) -> Draft | None:
        key = draw.choice(_keys(table))
        other = reference_table(draw, key, table.cells(key))
        labels = table.cells(table.label)
        at = draw.between(0, len(labels) - 1)
        name = draw.named(labels[at])
        if sum(name in label for label in labels) != 1 or not is_free(other.path, world, [table.path]):
            return None
        wanted = draw.choice([column for column in other.columns if column.kind != "label"])
        value = table.cells(key)[at]
        answer = other.cells(wanted)[other.cells(other.label).index(value)]
        request = ask(
            draw,
            phrasing,
            "number" if wanted.number else "value",
            a=mention(draw, table.path),
            b=mention(draw, other.path),
            noun=table.noun,
            key=key.spoken,
            name=mention_value(draw, name),
            wanted=column_named(draw, wanted),
        )
        code = script(
            load(table),
            f"key = next(row[{key.header!r}] for row in rows if {name!r} in row[{table.label.header!r}])",
            load(other),
            f"print(next(row[{wanted.header!r}] for row in rows if row[{other.label.header!r}] == key))",
        )
        if wanted.number:
            check = number_is(float(answer), layout=request.layout, decimals=2, ignored=[table.path, other.path, name])
        else:
            rest = {*other.cells(wanted)} - {answer} if wanted.kind == "category" else ()
            check = names_are([answer], others=rest, layout=request.layout)
        return Draft(
            instruction=request.text,
            steps=computed([table, other], f"I find the `{key.header}` of {name}, then its `{wanted.header}`.", code),
            about=[table.shape, other.shape],
            files={other.path: other.text},
            difficulty=4,
            **check,
        )


def _keys(table: Table) -> list[Column]:
    return [column for column in table.of("category") if len({*table.cells(column)}) >= 2]
