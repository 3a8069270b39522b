"""Change a table in place: add a row, remove a row, change a cell."""

from __future__ import annotations

from agentkit_evals.synth.artifacts.table import (
    Column,
    Row,
    Table,
    new_cell,
    new_row,
    to_object,
    write,
)
from agentkit_evals.synth.draw import Draw
from agentkit_evals.synth.mention import mention, mention_value
from agentkit_evals.synth.operations.steps import run
from agentkit_evals.synth.operations.tables.code import TableOperation, dump, load, look, script, solution, written
from agentkit_evals.synth.operations.tables.conditions import column_named
from agentkit_evals.synth.operations.tables.write_table import same_table
from agentkit_evals.synth.oracle import Act, Step, submit
from agentkit_evals.synth.phrasing import Phrasing, phrasings
from agentkit_evals.synth.shell import fixed, quote
from agentkit_evals.synth.task import Draft
from agentkit_evals.synth.wording import ask
from agentkit_evals.synth.world import World


def line(table: Table, row: Row) -> str:
    """Return a row as its table writes it; not for JSON lists, whose rows have several lines."""
    return write(table.format, table.delimiter, table.columns, [row]).splitlines()[-1]


def draw_row(draw: Draw, table: Table) -> int | None:
    """Draw the index of a row whose label is in no other line of the file."""
    labels = table.cells(table.label)
    at = draw.between(0, len(labels) - 1)
    draw.named(labels[at])
    return at if table.text.count(labels[at]) == 1 else None


class AddRow(TableOperation):
    """Append a row whose cells the request gives."""

    name = "add_row"
    phrasings = phrasings(
        train=(
            "Add a row to {path}: {cells}.",
            "[Append|Add] [a new entry|a row|an entry|a record] [to|at the end of] {path} with {cells}.",
            "[Please add|Add] {label} to {path}: {rest}.",
            "{path} is missing {label} ({rest}). [Add it|Please add it].",
            "New entry for {path}: {cells}.",
            "[Could you|Can you] add {label} to {path}? [The values are|It has] {rest}.",
            "[Put|Write|Enter] {label} [in|into] {path}, with {rest}.",
            "One more row for {path}: {cells}.",
            "[Extend|Update] {path} [with|by] one row: {cells}.",
            "We have a new one for {path}: {label}, {rest}.",
            "[Insert|Add] at the end of {path}: {cells}.",
            "add to {path}: {cells}",
        ),
        held_out=(
            "Please record {label} in {path}; the details are {rest}.",
            "{label} has to be in {path} as well: {rest}.",
            "Complete {path} by this entry: {cells}.",
        ),
    )

    def fits(self, table: Table, kind: str) -> bool:
        return len(table.columns) <= 5

    def draft_over(self, table: Table, draw: Draw, world: World, phrasing: Phrasing) -> Draft | None:
        row = new_row(draw, table)
        pattern = draw.choice(("{name}: {cell}", "{name} {cell}", "{name} = {cell}", "{name}={cell}"))
        cells = {
            column: pattern.format(name=_named(draw, column), cell=cell)
            for column, cell in zip(table.columns, row, strict=True)
        }
        joint = draw.choice((", ", ", ", "; "))
        request = ask(
            draw,
            phrasing,
            "done",
            path=mention(draw, table.path),
            cells=joint.join(cells.values()),
            label=mention_value(draw, row[table.columns.index(table.label)]),
            rest=joint.join(text for column, text in cells.items() if column != table.label),
        )
        check = same_table(table.path, table.records([*table.rows, row]))
        if table.format == "json":
            item = to_object(table.columns, row)
            code = script(load(table), f"rows.append({item!r})", dump("json", table.path))
            steps, way = written([table], "I append an object.", code), solution(code)
        else:
            text = line(table, row)
            command = f"echo {quote(text)} >> {quote(table.path)}"
            if table.format == "tsv":
                template = text.replace("\t", r"\t")
                command = f"printf {quote(template + chr(92) + 'n')} >> {quote(table.path)}"
            steps = [
                lambda results: look(table),
                lambda results: Act("I append a line.", [run(command)]),
                lambda results: submit("The row is added."),
            ]
            way = command
        return Draft(instruction=request.text, steps=steps, solution=way, about=[table.shape], difficulty=3, **check)


class RemoveRow(TableOperation):
    """Delete the row with a name."""

    name = "remove_row"
    phrasings = phrasings(
        train=(
            "[Remove|Delete|Drop] {label} from {path}.",
            "[Remove|Delete] the [row|entry|line|record] [of|for|with] {label} [in|from] {path}.",
            "{label} should no longer be in {path}. [Remove it|Delete the row|Take it out].",
            "[Please delete|Please remove|Take out] {label} in {path}[ and keep all the rest|].",
            "[Could you|Can you|Would you] [remove|delete] {label} from {path}[, please|]?",
            "We [cancelled|lost|sold|no longer have] {label}; [remove it from|delete it in] {path}.",
            "In {path}, [delete|remove] the [row|entry] whose {name} is {label}.",
            "The row {label} in {path} is [wrong|a mistake|obsolete|a test]. [Delete it|Remove it].",
            "{path}: [remove|delete] {label}.",
            "[Clean up|Edit] {path}: {label} [has to go|must go|is not needed].",
            "[Get rid of|Erase] [the row of |]{label} in {path}.",
            "Take the entry with {name} {label} out of {path}.",
        ),
        held_out=(
            "There is no need for {label} in {path} any longer, so take it out.",
            "Strike {label} off {path}, but touch nothing else.",
            "Let {label} disappear from {path}.",
        ),
    )

    def draft_over(self, table: Table, draw: Draw, world: World, phrasing: Phrasing) -> Draft | None:
        at = draw_row(draw, table)
        if at is None:
            return None
        header, label = table.label.header, table.cells(table.label)[at]
        request = ask(
            draw,
            phrasing,
            "done",
            path=mention(draw, table.path),
            label=mention_value(draw, label),
            name=column_named(draw, table.label),
        )
        path = quote(table.path)
        steps: list[Step]
        if table.format == "json":
            keep = f"rows = [row for row in rows if row[{header!r}] != {label!r}]"
            code = script(load(table), keep, dump("json", table.path))
            steps, way = written([table], f"I keep all rows but {label}.", code), solution(code)
        else:
            steps = [
                lambda results: Act(f"I look for {label}.", [run(f"grep -n {fixed(label)} {path}")]),
                lambda results: _delete(table, results[0].split(":")[0]),
                lambda results: submit("The row is removed."),
            ]
            way = f"sed -i {1 + table.text.splitlines().index(line(table, table.rows[at]))}d {path}"
        return Draft(
            instruction=request.text,
            steps=steps,
            solution=way,
            about=[table.shape],
            difficulty=2,
            **same_table(table.path, table.records([*table.rows[:at], *table.rows[at + 1 :]])),
        )


class ChangeCell(TableOperation):
    """Change one cell of the row with a name."""

    name = "change_cell"
    phrasings = phrasings(
        train=(
            "[Set|Change] the {name} of {label} to {new} in {path}.",
            "In {path}, [set|change|update] {label}'s {name} to {new}.",
            "[Update|Change|Correct] {path}: the {name} of {label} is [now |]{new}.",
            "The {name} of {label} in {path} [should|must] be {new}[, not {old}|]. [Fix|Change|Correct] it.",
            "{label} has a new {name}: {new}. [Update|Put it in|Change it in] {path}.",
            "[Could you|Can you] [change|set] the {name} of {label} [from {old} |]to {new} in {path}?",
            "[Please update|Update] {label} in {path}: {name} {new}.",
            "[Edit|Open] {path} and [set|change] {name} to {new} for {label}.",
            "For {label}, [change|replace] the {name} {old} [to|by] {new} in {path}.",
            "{path}: {name} of {label} is {new} now.",
            "[Give|Assign] {label} the {name} {new} in {path}.",
            "[There's a mistake in|An error in] {path}: the {name} of {label} is {new}. [Correct it|Fix that].",
        ),
        held_out=(
            "From now on {label} has the {name} {new}; adapt {path}.",
            "Make {new} the {name} of {label} in {path}.",
            "Please see to it that {path} shows {new} as the {name} of {label}.",
        ),
    )

    def fits(self, table: Table, kind: str) -> bool:
        return len(table.columns) > 1

    def draft_over(self, table: Table, draw: Draw, world: World, phrasing: Phrasing) -> Draft | None:
        at = draw_row(draw, table)
        if at is None:
            return None
        columns = [one for one in table.columns if one.kind != "label" and len({*table.cells(one)}) > 1]
        if not columns:
            return None
        column = draw.choice(columns)
        where, label = table.columns.index(column), table.cells(table.label)[at]
        old = table.rows[at]
        while (cell := new_cell(draw, table, column)) == old[where]:
            pass
        new = (*old[:where], cell, *old[where + 1 :])
        request = ask(
            draw,
            phrasing,
            "done",
            path=mention(draw, table.path),
            label=mention_value(draw, label),
            name=column_named(draw, column),
            old=mention_value(draw, draw.named(old[where])),
            new=mention_value(draw, cell),
        )
        value = repr(to_object(table.columns, new)[column.header])
        loop = f"for row in rows:\n    if row[{table.label.header!r}] == {label!r}:\n"
        loop += f"        row[{column.header!r}] = {value}"
        code = script(load(table), loop, dump(table.format, table.path))
        steps: list[Step]
        if table.format == "json":
            steps = written([table], f"I set `{column.header}` of {label}.", code)
        else:
            edit = {"path": table.path, "old": line(table, old), "new": line(table, new)}
            if table.text.count(edit["old"]) != 1:
                return None
            find_row = f"head -n 1 {quote(table.path)}; grep {fixed(label)} {quote(table.path)}"
            steps = [
                lambda results: Act(f"I look for {label}.", [run(find_row)]),
                lambda results: Act(f"I change `{column.header}` to {cell}.", [("edit_file", edit)]),
                lambda results: submit("The cell is changed."),
            ]
        changed = [*table.rows[:at], new, *table.rows[at + 1 :]]
        text = write(table.format, table.delimiter, table.columns, changed)
        return Draft(
            instruction=request.text,
            steps=steps,
            solution=f"printf %s {quote(text)} > {quote(table.path)}",
            about=[table.shape],
            difficulty=2,
            **same_table(table.path, table.records(changed)),
        )


def _named(draw: Draw, column: Column) -> str:
    return column.spoken if draw.chance(0.6) else column.header


def _delete(table: Table, number: str) -> Act:
    return Act(f"I delete line {number}.", [run(f"sed -i {number}d {quote(table.path)}")])
