"""Find the row with the largest or smallest number, or the first few rows by a number."""

from __future__ import annotations

from agentkit_evals.synth.answers import names_are
from agentkit_evals.synth.artifacts.table import Column, Table
from agentkit_evals.synth.draw import Draw
from agentkit_evals.synth.mention import mention
from agentkit_evals.synth.operations.tables.code import TableOperation, computed, load, value
from agentkit_evals.synth.operations.tables.conditions import column_named
from agentkit_evals.synth.phrasing import Phrasing, phrasings
from agentkit_evals.synth.task import Draft
from agentkit_evals.synth.wording import ask
from agentkit_evals.synth.world import World

_PRICE, _OLD, _SIZE = ("most expensive|priciest", "cheapest"), ("oldest", "youngest"), ("largest|biggest", "smallest")
SUPERLATIVES: dict[str, tuple[str, str]] = {
    **dict.fromkeys(("price", "unit price", "cost"), _PRICE),
    **dict.fromkeys(("population", "inhabitants"), _SIZE),
    **dict.fromkeys(("minutes", "duration", "length", "pages"), ("longest", "shortest")),
    **dict.fromkeys(("temperature", "temp"), ("warmest|hottest", "coldest")),
    **dict.fromkeys(("salary", "pay"), ("best paid|highest paid", "lowest paid|worst paid")),
    **dict.fromkeys(("weight", "weight kg"), ("heaviest", "lightest")),
    **dict.fromkeys(("distance", "distance km"), ("farthest|most distant", "closest|nearest")),
    **dict.fromkeys(("rating", "grade"), ("best rated|top rated", "worst rated|lowest rated")),
    **dict.fromkeys(("year", "opened", "founded"), ("newest|most recent", "oldest|earliest")),
    "age": _OLD,
}


class TopRows(TableOperation):
    name = "top_rows"
    phrasings = (
        *phrasings(
            "one",
            train=(
                "Which of the {noun} in {path} has the {most} {column}?",
                "Which {label} in {path} has the {most} {column}?",
                "[Find|Look up|Get] the {label} with the {most} {column} in {path}.",
                "In {path}, which {label} has the {most} {column}?",
                "[What|Which] is the {label} with the {most} {column} in {path}?",
                "[Tell me|Give me|I need|Submit] the {label} that has the {most} {column} in {path}.",
                "{path}: which {label} has the {most} {column}?",
                "[Could you|Can you] find the {label} with the {most} {column} in {path}?",
                "{most} {column} in {path}: which {label}?",
                "[Look at|Check|Open] {path}. Which {label} comes [first|out on top] with the {most} {column}?",
            ),
            held_out=(
                "Whose {column} is the {most} in {path}? Give the {label}.",
                "Going by {column}, which {label} in {path} is at the {most} end?",
                "The {label} having the {most} {column} in {path}, please.",
            ),
        ),
        *phrasings(
            "superlative",
            train=(
                "Which of the {noun} in {path} is the {superlative}?",
                "[What|Which] is the {superlative} of the {noun} in {path}? [I need the {label}.|]",
                "[Find|Name|Tell me|Give me] the {superlative} of the {noun} in {path}.",
                "{path}: which {label} is the {superlative}?",
                "In {path}, which one is the {superlative}? [Give me|Submit] the {label}.",
                "which {label} in {path} is {superlative}",
            ),
            held_out=(
                "Among the {noun} in {path}, which is the {superlative} one?",
                "Look for the {superlative} entry of {path}; what is its {label}?",
            ),
        ),
        *phrasings(
            "few",
            train=(
                "Which {count} {noun} in {path} have the {most} {column}?",
                "List the {count} {noun} with the {most} {column} in {path}.",
                "[What|Which] are the {count} {noun} with the {most} {column} in {path}?",
                "[Give me|Show me|I need|Find] the {label} of the {count} {noun} with the {most} {column} in {path}.",
                "[Top|First|The] {count} {noun} in {path} by {column}, {most} first?",
                "Rank the {noun} in {path} by {column}, {most} first, and [give|tell|list] me the first {count}.",
                "Sort {path} by {column}, {most} first. What are the first {count} {noun}?",
            ),
            held_out=(
                "By {column}, {most} first: the leading {count} {noun} in {path}?",
                "Pick the {count} {noun} of {path} whose {column} is {most}.",
            ),
        ),
    )

    def fits(self, table: Table, kind: str) -> bool:
        return len(table.rows) >= 5 and bool(_columns(table, kind))

    def draft_over(self, table: Table, draw: Draw, world: World, phrasing: Phrasing) -> Draft | None:
        column, label, high = draw.choice(_columns(table, phrasing.kind)), table.label, draw.chance(0.65)
        pairs = list(zip(map(float, table.cells(column)), table.cells(label), strict=True))
        ranked = [name for _, name in sorted(pairs, key=lambda pair: pair[0], reverse=high)]
        count = draw.choice((2, 3)) if phrasing.kind == "few" else 1
        request = ask(
            draw,
            phrasing,
            "list" if count > 1 else "value",
            path=mention(draw, table.path),
            noun=table.noun,
            label=column_named(draw, label),
            column=column_named(draw, column),
            count=draw.choice((str(count), ("", "", "two", "three")[count])),
            most=draw.choice(
                ("highest", "largest", "biggest", "greatest") if high else ("lowest", "smallest", "least")
            ),
            superlative=draw.choice(SUPERLATIVES.get(column.spoken, ("", ""))[not high].split("|")),
        )
        if count == 1:
            best = "max" if high else "min"
            end = f"print({best}(rows, key=lambda row: {value(column)})[{label.header!r}])"
        else:
            joint = ", " if request.layout == "commas" else "\\n"
            reverse = ", reverse=True" if high else ""
            end = f"rows.sort(key=lambda row: {value(column)}{reverse})\n"
            end += f"print('{joint}'.join(row[{label.header!r}] for row in rows[:{count}]))"
        code = f"{load(table)}\n{end}"
        order = "largest" if high else "smallest"
        return Draft(
            instruction=request.text,
            steps=computed([table], f"I look for the {order} `{column.header}`.", code),
            about=[table.shape],
            difficulty=3,
            **names_are(ranked[:count], others=ranked[count:], ordered=count > 1, layout=request.layout),
        )


def _columns(table: Table, kind: str) -> list[Column]:
    """Return the columns by which a request of a kind can rank the rows."""
    numbers = [column for column in table.of("int", "decimal") if _ends_differ(table, column)]
    return [one for one in numbers if kind != "superlative" or one.spoken in SUPERLATIVES]


def _ends_differ(table: Table, column: Column) -> bool:
    """Return whether the three largest and the three smallest numbers, and the ones after them, all differ."""
    numbers = sorted(map(float, table.cells(column)))
    return len({*numbers[:4]}) == 4 and len({*numbers[-4:]}) == 4 if len(numbers) >= 4 else False
