"""Find the group of rows that is the largest, by its number of rows or by a total."""

from __future__ import annotations

from collections import Counter

from agentkit_evals.synth.answers import names_are
from agentkit_evals.synth.artifacts.table import Table
from agentkit_evals.synth.draw import Draw
from agentkit_evals.synth.mention import mention
from agentkit_evals.synth.operations.tables.code import TableOperation, computed, load, value
from agentkit_evals.synth.operations.tables.conditions import column_named, rows_named
from agentkit_evals.synth.phrasing import Phrasing, phrasings
from agentkit_evals.synth.task import Draft
from agentkit_evals.synth.wording import ask
from agentkit_evals.synth.world import World


class TopGroup(TableOperation):
    name = "top_group"
    tries = 8
    phrasings = (
        *phrasings(
            "count",
            train=(
                "Which {group} has the most {noun} in {path}?",
                "Which {group} [appears|occurs|comes up] most often in {path}?",
                "What is the most [common|frequent] {group} in {path}?",
                "[Find|Tell me|Give me] the {group} with the most {noun} in {path}.",
                "In {path}, which {group} is [the most common|the most frequent|listed most often]?",
                "Group {path} by {group}. Which {group} has the most {noun}?",
                "[Most common|Most frequent] {group} in {path}?",
                "{path}: which {group} has the most {noun}?",
                "I [want|need] to know which {group} [is the most common|comes up most often] in {path}.",
                "[Could you|Can you] [check|see] which {group} has the most {noun} in {path}?",
                "Which value of {group} [occurs|appears] most often in {path}?",
            ),
            held_out=(
                "For which {group} does {path} have the largest number of {noun}?",
                "Which {group} leads {path} in number of {noun}?",
                "The {group} seen most in {path} is which one?",
            ),
        ),
        *phrasings(
            "total",
            train=(
                "Which {group} has the [highest|largest|biggest] total {column} in {path}?",
                "Group {path} by {group} and [add up|sum] the {column}. Which {group} [has the most|is on top]?",
                "[Find|Tell me|Give me] the {group} with the [highest|largest] total {column} in {path}.",
                "In {path}, which {group} has the most {column} [in total|altogether|overall]?",
                "Sum the {column} per {group} in {path}: which {group} has the [highest|largest] sum?",
                "{path}: which {group} has the highest [total|sum of] {column}?",
                "When you add up {column} by {group} in {path}, which {group} [comes out on top|is the largest]?",
                "[Per|By] {group}, where is the total {column} [highest|largest] in {path}?",
            ),
            held_out=(
                "For which {group} is the sum of {column} in {path} the greatest?",
                "Total up {column} for every {group} in {path} and name the winner.",
            ),
        ),
    )

    def fits(self, table: Table, kind: str) -> bool:
        return bool(table.of("category")) and (kind != "total" or bool(table.of("int", "decimal")))

    def draft_over(self, table: Table, draw: Draw, world: World, phrasing: Phrasing) -> Draft | None:
        total = phrasing.kind == "total"
        group = draw.choice(table.of("category"))
        column = draw.choice(table.of("int", "decimal")) if total else table.label
        totals: Counter[str] = Counter()
        for name, cell in zip(table.cells(group), table.cells(column), strict=True):
            totals[name] += round(100 * float(cell)) if total else 1
        ranked = totals.most_common()
        if len(ranked) < 2 or ranked[0][1] == ranked[1][1]:
            return None
        request = ask(
            draw,
            phrasing,
            "value",
            path=mention(draw, table.path),
            noun=rows_named(draw, table),
            group=column_named(draw, group),
            column=column_named(draw, column),
        )
        add = value(column) if total else "1"
        code = f"{load(table)}\ntotals = {{}}\nfor row in rows:\n"
        code += f"    totals[row[{group.header!r}]] = totals.get(row[{group.header!r}], 0) + {add}\n"
        code += "print(max(totals, key=totals.get))"
        what = f"add up `{column.header}`" if total else "count the rows"
        return Draft(
            instruction=request.text,
            steps=computed([table], f"I {what} for each `{group.header}`.", code),
            about=[table.shape],
            difficulty=4,
            **names_are([ranked[0][0]], others=[name for name, _ in ranked[1:]], layout=request.layout),
        )
