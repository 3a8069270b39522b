"""Look up one cell of the row with a name, or the name of the row with a value."""

from __future__ import annotations

from agentkit_evals.synth.answers import names_are, number_is
from agentkit_evals.synth.artifacts.table import Column, Table
from agentkit_evals.synth.draw import Draw
from agentkit_evals.synth.mention import mention, mention_value
from agentkit_evals.synth.operations.tables.code import TableOperation, computed, load
from agentkit_evals.synth.operations.tables.conditions import column_named
from agentkit_evals.synth.phrasing import Phrasing, phrasings
from agentkit_evals.synth.task import Draft
from agentkit_evals.synth.wording import ask
from agentkit_evals.synth.world import World


class LookUpRow(TableOperation):
    name = "look_up_row"
    phrasings = (
        *phrasings(
            "cell",
            train=(
                "What is the {column} of {name} in {path}?",
                "What is {name}'s {column}[ in {path}|? It is in {path}|, according to {path}]?",
                "[Find|Look up|Get|Give me|Tell me] the {column} of {name} in {path}.",
                "[Which|What] {column} does {name} have in {path}?",
                "In {path}, what is the {column} [of|for] {name}?",
                "{path}: {column} of {name}?",
                "I need the {column} [of|for] {name}. [It's in|See|Look in] {path}.",
                "[Check|Open|Look at] {path} and [tell me|give me|report] the {column} of {name}.",
                "[Could you|Can you|Would you] look up {name}'s {column} in {path}[, please|]?",
                "[Submit|Return|Report] the {column} [listed|given] for {name} in {path}.",
                "According to {path}, what {column} does {name} have?",
                "{name} is [listed|somewhere] in {path}. What is the {column}?",
                "Look for {name} in {path} and [tell me|submit] the {column}.",
                "{column} of {name} ([see|in] {path})?",
                "Search {path} for {name}; [which|what] {column} is [given|listed|there]?",
            ),
            held_out=(
                "What does {path} give as the {column} of {name}?",
                "For {name}, what is the {column}? Use {path}.",
                "{name}: which {column} is on record in {path}?",
                "I forgot {name}'s {column}; it must be in {path}.",
            ),
        ),
        *phrasings(
            "row",
            train=(
                "Which {label} in {path} has the {column} {value}?",
                "[Find|Look up|Tell me|Give me] the {label} with {column} {value} in {path}.",
                "{value} is the {column} of which {label} in {path}?",
                "[Who or what|Which entry] has {value} as {column} in {path}? [Submit|Give me] the {label}.",
                "In {path}, which {label} [has|belongs to] {column} {value}?",
                "{path}: which {label} has {column} {value}?",
                "I have {column} {value}. Which {label} [is that|does it belong to] in {path}?",
                "Whose {column} is {value}, according to {path}?",
            ),
            held_out=(
                "To which {label} in {path} does the {column} {value} belong?",
                "Use {path} to find out which {label} goes with {column} {value}.",
            ),
        ),
    )

    def fits(self, table: Table, kind: str) -> bool:
        return bool(_pairs(table, kind))

    def draft_over(self, table: Table, draw: Draw, world: World, phrasing: Phrasing) -> Draft | None:
        column = draw.choice(_pairs(table, phrasing.kind))
        key, wanted = (table.label, column) if phrasing.kind == "cell" else (column, table.label)
        at = draw.choice([at for at, cell in enumerate(table.cells(key)) if _once(cell, table.cells(key))])
        name, answer = table.cells(key)[at], table.cells(wanted)[at]
        first = name.split(" ")[0]
        if phrasing.kind == "cell" and draw.chance(0.25) and first.isalpha() and _once(first, table.cells(key)):
            name = first  # people say "Anna" for "Anna Berg"
        draw.named(name)
        request = ask(
            draw,
            phrasing,
            "number" if wanted.number else "value",
            path=mention(draw, table.path),
            name=mention_value(draw, name),
            value=mention_value(draw, name),
            column=column_named(draw, column),
            label=column_named(draw, table.label),
        )
        test = f"row[{key.header!r}] == {name!r}" if key.number else f"{name!r} in row[{key.header!r}]"
        code = f"{load(table)}\nprint(next(row[{wanted.header!r}] for row in rows if {test}))"
        if wanted.number:
            check = number_is(float(answer), layout=request.layout, decimals=2, ignored=[table.path, name])
        else:
            others = [] if wanted.kind != "label" else [cell for cell in table.cells(wanted) if cell != answer]
            check = names_are([answer], others=others, layout=request.layout)
        return Draft(
            instruction=request.text,
            steps=computed([table], f"I look up `{wanted.header}` where `{key.header}` has {name}.", code),
            about=[table.shape],
            difficulty=3,
            **check,
        )


def _pairs(table: Table, kind: str) -> list[Column]:
    """Return the columns whose cell a request can ask for, or by whose cell it can ask for a row."""
    labels = table.cells(table.label)
    if not any(_once(label, labels) for label in labels):
        return []
    if kind == "cell":
        return [column for column in table.columns if column.kind != "label"]
    return [one for one in table.of("text") if any(_once(cell, table.cells(one)) for cell in table.cells(one))]


def _once(text: str, cells: list[str]) -> bool:
    return sum(text in cell for cell in cells) == 1
