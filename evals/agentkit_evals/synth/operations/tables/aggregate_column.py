"""Compute the sum, average, largest or smallest number of a table's column, or the sum of price times count."""

from __future__ import annotations

from agentkit_evals.synth.answers import number_is
from agentkit_evals.synth.artifacts.table import Column, Table, draw_table
from agentkit_evals.synth.draw import Draw
from agentkit_evals.synth.mention import mention
from agentkit_evals.synth.operations.tables.code import TableOperation, computed, load, value
from agentkit_evals.synth.operations.tables.conditions import column_named, draw_condition
from agentkit_evals.synth.phrasing import Phrasing, phrasings
from agentkit_evals.synth.task import Draft
from agentkit_evals.synth.wording import ask
from agentkit_evals.synth.world import World

RESULTS = {
    "sum": "round(sum(values), 2)",
    "average": "round(sum(values) / len(values), 2)",
    "largest": "max(values)",
    "smallest": "min(values)",
}


class AggregateColumn(TableOperation):
    name = "aggregate_column"
    phrasings = (
        *phrasings(
            "sum",
            train=(
                "What is the [total|sum of the|total of the|overall] {column}{of} in {path}?",
                "[Add up|Sum|Sum up|Total] the {column} [column|values|numbers]{of} in {path}.",
                "[Compute|Calculate|Work out] the [total|sum of] {column}{of} in {path}.",
                "How much is the {column}{of} in {path} [altogether|in total|all together]?",
                "[Total|Sum of] {column}{of} in {path}?",
                "I need the [total|sum of the] {column}{of} from {path}.",
                "{path}: total {column}{of}?",
                "[Could you|Can you] [add up|sum] the {column}{of} in {path}[ for me|]?",
                "In {path}, what do the {column} [numbers|values]{of} add up to?",
                "What does the {column} column{of} of {path} sum to?",
                "[Open|Read|Take] {path} and [tell me|give me|submit] the total {column}{of}.",
            ),
            held_out=(
                "If you add all {column} values{of} in {path}, what do you get?",
                "Please give the grand total of {column}{of} in {path}.",
                "What is the {column}{of} in {path} when summed up?",
            ),
        ),
        *phrasings(
            "average",
            train=(
                "What is the [average|mean] {column}{of} in {path}?",
                "[Compute|Calculate|Work out|Find] the [average|mean] {column}{of} in {path}.",
                "[Average|Mean] {column}{of} in {path}?",
                "[Tell me|I need|Give me] the [average|mean] [of the |]{column}{of} [in|from] {path}.",
                "{path}: average {column}{of}?",
                "How high is the {column}{of} in {path} on average?",
                "[Could you|Can you] [work out|compute] the average {column}{of} in {path}[, please|]?",
                "On average, what is the {column}{of} in {path}?",
                "[Take|Average] the {column} [values|numbers]{of} in {path} and give me the mean.",
            ),
            held_out=(
                "What {column}{of} does {path} have on average?",
                "Please determine the mean {column}{of} from {path}.",
            ),
        ),
        *phrasings(
            "largest",
            train=(
                "What is the [highest|largest|maximum|biggest|greatest] {column}{of} in {path}?",
                "[Find|Get|Give me|Tell me] the [highest|largest|maximum] {column}{of} in {path}.",
                "[Maximum|Highest|Max] {column}{of} in {path}?",
                "{path}: [max|highest] {column}{of}?",
                "How high does {column} [go|get]{of} in {path}?",
                "I need [to know |]the [maximum|largest|highest] {column}{of} from {path}.",
            ),
            held_out=(
                "Which {column} is the highest one{of} in {path}?",
                "What is the top value of {column}{of} in {path}?",
            ),
        ),
        *phrasings(
            "smallest",
            train=(
                "What is the [lowest|smallest|minimum] {column}{of} in {path}?",
                "[Find|Get|Give me|Tell me] the [lowest|smallest|minimum] {column}{of} in {path}.",
                "[Minimum|Lowest|Min] {column}{of} in {path}?",
                "{path}: [min|lowest] {column}{of}?",
                "How low does {column} [go|get]{of} in {path}?",
                "I need [to know |]the [minimum|smallest|lowest] {column}{of} from {path}.",
            ),
            held_out=(
                "Which {column} is the lowest one{of} in {path}?",
                "What is the bottom value of {column}{of} in {path}?",
            ),
        ),
        *phrasings(
            "product",
            train=(
                "What are the {noun} in {path} worth [in total|altogether]? It's {column} times {count}.",
                "[Multiply {column} by|Take {column} times] {count} for each [row|line] of {path} and sum the results.",
                "[Compute|Calculate|Work out] the total of {column} times {count} over all {noun} in {path}.",
                "What is the sum of {column} x {count} in {path}?",
                "{path} has {column} and {count}. What is the [total value|overall worth|grand total]?",
                "How much do all {noun} in {path} come to, {count} times {column} each?",
                "[Total|Sum] of {column} * {count} in {path}?",
                "I need the total value of {path}, that is {column} times {count} for every row[, added up|].",
            ),
            held_out=(
                "For every row in {path}, {column} has to be multiplied by {count}; what is the sum?",
                "What is {path} worth when each row counts {column} times {count}?",
            ),
        ),
    )

    def new(self, draw: Draw, kind: str) -> Table:
        return draw_table(draw, priced=kind == "product")

    def fits(self, table: Table, kind: str) -> bool:
        return bool(table.of("int", "decimal")) if kind != "product" else _price_and_count(table) is not None

    def draft_over(self, table: Table, draw: Draw, world: World, phrasing: Phrasing) -> Draft | None:
        if phrasing.kind == "product":
            return self._product(table, draw, phrasing)
        column = draw.choice(table.of("int", "decimal"))
        condition = draw_condition(draw, table) if draw.chance(0.3) else None
        rows = condition.rows if condition else table.rows
        only = f" if {condition.code}" if condition else ""
        kind = phrasing.kind
        code = f"{load(table)}\nvalues = [{value(column)} for row in rows{only}]\nprint({RESULTS[kind]})"
        at = table.columns.index(column)
        numbers = [float(row[at]) for row in rows]
        result = {
            "sum": sum(numbers),
            "average": sum(numbers) / len(numbers),
            "largest": max(numbers),
            "smallest": min(numbers),
        }[kind]
        request = ask(
            draw,
            phrasing,
            "number",
            path=mention(draw, table.path),
            column=column_named(draw, column),
            of=draw.phrase("[ of| for|, counting only] the {which}", which=condition.which) if condition else "",
        )
        said = condition.said if condition else ()
        return Draft(
            instruction=request.text,
            steps=computed([table], f"I compute the {kind} of `{column.header}`{only}.", code),
            about=[table.shape],
            difficulty=3 + bool(condition),
            **number_is(
                result,
                layout=request.layout,
                decimals=1 if kind == "average" else 2 if column.kind == "decimal" else 0,
                ignored=[table.path, *said],
            ),
        )

    def _product(self, table: Table, draw: Draw, phrasing: Phrasing) -> Draft | None:
        pair = _price_and_count(table)
        if pair is None:
            return None
        price, count = pair
        code = f"{load(table)}\nvalues = [{value(price)} * {value(count)} for row in rows]\nprint({RESULTS['sum']})"
        total = sum(float(a) * int(b) for a, b in zip(table.cells(price), table.cells(count), strict=True))
        request = ask(
            draw,
            phrasing,
            "number",
            path=mention(draw, table.path),
            noun=table.noun,
            column=column_named(draw, price),
            count=column_named(draw, count),
        )
        return Draft(
            instruction=request.text,
            steps=computed([table], f"I add up `{price.header}` times `{count.header}`.", code),
            about=[table.shape],
            difficulty=4,
            **number_is(round(total, 2), layout=request.layout, decimals=2, ignored=[table.path]),
        )


PRICES = {"price", "unit price", "cost"}
COUNTS = {"quantity", "qty", "count", "units", "pieces", "stock", "in stock", "available"}


def _price_and_count(table: Table) -> tuple[Column, Column] | None:
    """Return a column of prices and one of counts, if the table has both."""
    prices = [column for column in table.of("decimal") if column.spoken in PRICES]
    counts = [column for column in table.of("int") if column.spoken in COUNTS]
    return (prices[0], counts[0]) if prices and counts else None
