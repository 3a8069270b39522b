"""Write a table into a new file: in another format, sorted, or with some of its rows."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from agentkit_evals.synth.artifacts.table import ENDINGS, Column, Row, Table, TableFormat
from agentkit_evals.synth.draw import Draw
from agentkit_evals.synth.find import new_path
from agentkit_evals.synth.mention import mention
from agentkit_evals.synth.operations.tables.code import TableOperation, dump, load, script, solution, value, written
from agentkit_evals.synth.operations.tables.conditions import column_named, draw_condition
from agentkit_evals.synth.phrasing import Phrasing, phrasings
from agentkit_evals.synth.task import Draft
from agentkit_evals.synth.wording import ask
from agentkit_evals.synth.world import World

SAME_TABLE = '''\
"""Compare a table with the rows expected: by header and value, in any format that the file's ending says."""
import csv, json, os, sys

with open(os.path.join(os.environ["AGENTKIT_VERIFIER_DIR"], "table.json"), encoding="utf-8") as file:
    expected = json.load(file)
path = expected["path"]
if not os.path.isfile(path):
    sys.exit(path + " is missing")
with open(path, encoding="utf-8", newline="") as file:
    text = file.read()
if path.endswith(".jsonl"):
    rows = [json.loads(line) for line in text.splitlines() if line.strip()]
elif path.endswith(".json"):
    rows = json.loads(text)
elif path.endswith(".md"):
    lines = [line.strip().strip("|").split("|") for line in text.splitlines() if line.strip().startswith("|")]
    cells = [[cell.strip() for cell in line] for line in lines]
    rows = [dict(zip(cells[0], row)) for row in cells[2:]]
else:
    first = text.partition("\\n")[0]
    mark = "\\t" if path.endswith(".tsv") else max(",;\\t", key=first.count)
    rows = list(csv.DictReader(text.splitlines(), delimiter=mark))

def plain(value):
    try:
        return float(value)
    except (TypeError, ValueError):
        return str(value).strip()

def same(row):
    return {str(key).strip(): plain(value) for key, value in row.items()}

if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
    sys.exit(path + " is not a list of objects")
if [same(row) for row in rows] != [same(row) for row in expected["rows"]]:
    sys.exit(path + " does not have the rows expected")
'''


def same_table(path: str, rows: Sequence[dict[str, str]]) -> dict[str, Any]:
    """Return the `verifier` and `verifier_files` of a draft after which a file has these rows, in any layout."""
    return {
        "verifier": 'python3 "$AGENTKIT_VERIFIER_DIR/same_table.py"',
        "verifier_files": {
            "same_table.py": SAME_TABLE,
            "table.json": json.dumps({"path": path, "rows": list(rows)}, ensure_ascii=False),
        },
    }


NAMES: dict[TableFormat, str] = {
    "csv": "CSV|CSV|csv",
    "tsv": "TSV|tab-separated values",
    "json": "JSON|JSON|a JSON list|json",
    "jsonl": "JSONL|JSON Lines|jsonl",
    "md": "a Markdown table|Markdown",
}
_SMALL = 60  # rows of a table that is written again


def _written(
    draw: Draw,
    phrasing: Phrasing,
    table: Table,
    new: str,
    form: TableFormat,
    rows: Sequence[Row],
    change: str,
    thought: str,
    **slots: str,
) -> Draft:
    code = script(load(table), change, dump(form, new))
    request = ask(
        draw, phrasing, "done", path=mention(draw, table.path), new=mention(draw, new), noun=table.noun, **slots
    )
    return Draft(
        instruction=request.text,
        steps=written([table], thought, code),
        solution=solution(code),
        about=[table.shape, form],
        difficulty=3,
        **same_table(new, table.records(rows)),
    )


class ConvertTable(TableOperation):
    """Write a table in another format."""

    name = "convert_table"
    phrasings = phrasings(
        train=(
            "Convert {path} to {as_format} and [save|write] it [as|to] {new}.",
            "[Turn|Change|Transform] {path} into {as_format}[: the new file is|, in a new file called|, named] {new}.",
            "[Write|Save|Export] {path} as {as_format} [to|in] {new}.",
            "[Make|Create] {new} from {path}[, as {as_format}|, in {as_format}|].",
            "I need {path} as {as_format}. [Call it|Save it as|Write it to] {new}.",
            "[Could you|Can you] convert {path} to {as_format}? [Write the result to|The result goes to] {new}.",
            "[Please convert|Convert] the {noun} in {path} into {as_format}; [put them in|the output file is] {new}.",
            "{path} should also [exist|be there] as {as_format}: [write|create] {new}.",
            "convert {path} to {new}",
            "Our tool [only reads|needs] {as_format}. [Convert|Please convert] {path} and name the file {new}.",
            "[Read|Load] {path} and write the same {noun} as {as_format} to {new}.",
            "[Generate|Produce] {new} with the [data|content|{noun}] of {path}[ in {as_format}|].",
            "From {path} make {as_format}, saved as {new}.",
        ),
        held_out=(
            "Please provide the data of {path} in {as_format}, under the name {new}.",
            "{new} should be the {as_format} version of {path}.",
            "I can't work with {path}; give me {as_format} in {new} instead.",
            "Translate {path} to {as_format}. Output: {new}.",
        ),
    )

    def fits(self, table: Table, kind: str) -> bool:
        return len(table.rows) <= _SMALL

    def draft_over(self, table: Table, draw: Draw, world: World, phrasing: Phrasing) -> Draft | None:
        forms: dict[TableFormat, float] = {"csv": 4, "json": 4, "jsonl": 2, "tsv": 1, "md": 1}
        forms.pop(table.format)
        form: TableFormat = draw.weighted(forms)
        new = new_path(draw, world, table.path, ENDINGS[form][0])
        return _written(
            draw,
            phrasing,
            table,
            new,
            form,
            table.rows,
            "",
            f"I write the rows as {form}.",
            as_format=draw.choice(NAMES[form].split("|")),
        )


class SortTable(TableOperation):
    """Write a table sorted by a column."""

    name = "sort_table"
    phrasings = phrasings(
        train=(
            "Sort {path} by {column}, {order}, and [save|write] [it|the result] [as|to] {new}.",
            "[Write|Save] the {noun} of {path} [sorted|ordered] by {column} ({order}) to {new}.",
            "[Make|Create] {new}: the {noun} of {path}, sorted by {column}, {order}.",
            "Order the {noun} in {path} by {column}, {order}. [The result goes to|Write them to|Save as] {new}.",
            "I need {path} sorted by {column} ({order}) [in|as] {new}.",
            "[Could you|Can you] sort {path} by {column}, {order}, and write the result to {new}?",
            "[Read|Load|Take] {path}, sort it by {column} with {order}, and [write|save] {new}.",
            "{path} by {column}, {order}: write that to {new}.",
            "[Produce|Generate] a sorted copy of {path} in {new}, by {column}, {order}.",
            "Please write {new} with the same {noun} as {path}, but sorted by {column}, {order}.",
        ),
        held_out=(
            "{new} should have the {noun} of {path} in order of {column}, {order}.",
            "Arrange {path} by {column}, {order}; the outcome belongs in {new}.",
            "In {new} I want what {path} has, with {column} deciding the order, {order}.",
        ),
    )

    def fits(self, table: Table, kind: str) -> bool:
        return table.format != "md" and bool(_orders(table))

    def draft_over(self, table: Table, draw: Draw, world: World, phrasing: Phrasing) -> Draft | None:
        column, high = draw.choice(_orders(table)), draw.chance(0.5)
        at = table.columns.index(column)
        if column.number:
            rows = sorted(table.rows, key=lambda row: float(row[at]), reverse=high)
            orders = "[highest|largest|biggest] first|descending" if high else "[lowest|smallest] first|ascending"
        else:
            rows = sorted(table.rows, key=lambda row: row[at], reverse=high)
            orders = "[newest|latest|most recent] first" if high else "[oldest|earliest] first"
        order = draw.phrase(f"[{orders}]")
        new = new_path(draw, world, table.path, ENDINGS[table.format][0])
        reverse = ", reverse=True" if high else ""
        return _written(
            draw,
            phrasing,
            table,
            new,
            table.format,
            rows,
            f"rows.sort(key=lambda row: {value(column)}{reverse})",
            f"I sort by `{column.header}`.",
            column=column_named(draw, column),
            order=order,
        )


class ExtractRows(TableOperation):
    """Write the rows that a condition holds for."""

    name = "extract_rows"
    phrasings = phrasings(
        train=(
            "[Write|Save|Copy|Extract] the {which} [from|in] {path} to {new}.",
            "[Make|Create] {new} with [just|only] the {which} [from|of] {path}.",
            "Filter {path}: [only the|keep the] {which}[.|,] [The result goes to|Write them to|Save it as] {new}.",
            "I need a file {new} with the {which} [from|of] {path}.",
            "[Put|Collect] [all|the] {which} [from|of] {path} [in|into] {new}.",
            "[Could you|Can you] [write|save] the {which} in {path} to {new}[, please|]?",
            "From {path}, take the {which} and [write|save] them to {new}.",
            "[Read|Go through] {path} and write [all|the] {which} to {new}[, in the same format|].",
            "{new} [should|must] have the {which} of {path}[ and nothing else|].",
            "[Export|Pull out] the {which} of {path} [as|into] {new}.",
        ),
        held_out=(
            "Only the {which} of {path} interest me; store them in {new}.",
            "Split off the {which} of {path} into {new}.",
            "Let {new} contain what {path} has on {which}.",
        ),
    )

    def fits(self, table: Table, kind: str) -> bool:
        return table.format != "md" and bool(table.of("category", "int", "decimal"))

    def draft_over(self, table: Table, draw: Draw, world: World, phrasing: Phrasing) -> Draft | None:
        condition = draw_condition(draw, table, most=_SMALL)
        if condition is None:
            return None
        new = new_path(draw, world, table.path, ENDINGS[table.format][0])
        return _written(
            draw,
            phrasing,
            table,
            new,
            table.format,
            condition.rows,
            f"rows = [row for row in rows if {condition.code}]",
            f"I keep the rows with `{condition.code}`.",
            which=condition.which,
        )


def _orders(table: Table) -> list[Column]:
    """Return the columns that give the rows of a small table an order."""
    columns = table.of("int", "decimal", "date")
    return [column for column in columns if len({*table.cells(column)}) == len(table.rows) <= _SMALL]
