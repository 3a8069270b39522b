"""Conditions on the rows of a table, as a request words them and as Python tests them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from agentkit_evals.synth.artifacts.table import Column, Row, Table
from agentkit_evals.synth.draw import Draw
from agentkit_evals.synth.mention import mention_value
from agentkit_evals.synth.operations.tables.code import value


@dataclass(frozen=True, slots=True)
class Condition:
    """A condition on rows.

    Attributes:
        which: The rows in words: `orders with status paid`.
        have: What they do, after `Which orders`: `have status paid`.
        code: A Python expression of `row`.
        rows: The rows that it holds for.
        said: The texts with digits that the request repeats.
    """

    which: str
    have: str
    code: str
    rows: tuple[Row, ...]
    said: tuple[str, ...]


def rows_named(draw: Draw, table: Table) -> str:
    """Return what a request calls the rows: the table's noun, or at times just rows."""
    return table.noun if draw.chance(0.75) else draw.choice(("rows", "entries", "records"))


def column_named(draw: Draw, column: Column) -> str:
    """Return a column as people mention it: in words, by its header or by its header in backticks."""
    kind = draw.rng.random()
    return column.spoken if kind < 0.55 else column.header if kind < 0.8 else f"`{column.header}`"


def draw_condition(draw: Draw, table: Table, *, most: int = 1000) -> Condition | None:
    """Draw a condition that holds for 1 to `most` rows, but not for all; None if the table has no fitting column."""
    for _ in range(12):
        kind = draw.weighted({"category": 6, "number": 3, "date": 1})
        columns = [column for column in table.columns if kind in (column.kind, "number" if column.number else "")]
        if not columns:
            continue
        column = draw.choice(columns)
        made = _equals(draw, table, column) if column.kind == "category" else _compared(draw, table, column)
        if made is not None and 0 < len(made.rows) <= most and len(made.rows) < len(table.rows):
            return made
    return None


# Adjectives go before the noun: "paid invoices".
_BEFORE = {"status", "state", "priority", "severity", "color", "colour", "level", "size", "genre"}
_PLACES = {"city", "town", "location", "country", "state", "region", "place"}


def _equals(draw: Draw, table: Table, column: Column) -> Condition:
    text = draw.choice(sorted({*table.cells(column)}))
    draw.named(text)
    noun, said, name = rows_named(draw, table), mention_value(draw, text), column_named(draw, column)
    which = [
        *("{noun} with {name} {said}", "{noun} with {said} as {name}", "{noun} where {name} is {said}"),
        *("{noun} whose {name} is {said}", "{noun} with {name}={said}", "{noun} that have {name} {said}"),
    ]
    have = ["have {name} {said}", "have {said} as {name}", "have the {name} {said}"]
    if column.spoken in _BEFORE and text.isascii():
        which += ["{said} {noun}", "{said} {noun}", "{said} {noun}"]
        have += ["are {said}", "are {said}"]
    if column.spoken in _PLACES:
        which += ["{noun} [from|in] {said}", "{noun} [from|in] {said}", "{noun} located in {said}"]
        have += ["are [from|in] {said}", "come from {said}"]
    at = table.columns.index(column)
    return Condition(
        draw.phrase(draw.choice(which), noun=noun, name=name, said=said),
        draw.phrase(draw.choice(have), name=name, said=said),
        f"row[{column.header!r}] == {text!r}",
        tuple(row for row in table.rows if row[at] == text),
        (text,),
    )


_MORE = ("[more than|over|above|greater than|higher than]", ">", lambda cell, limit: cell > limit)
_LESS = ("[less than|under|below|lower than|smaller than]", "<", lambda cell, limit: cell < limit)
_LEAST = ("[at least|no less than]", ">=", lambda cell, limit: cell >= limit)
_MOST = ("[at most|no more than|up to]", "<=", lambda cell, limit: cell <= limit)
_AFTER = ("[after|later than]", ">", lambda cell, limit: cell > limit)
_BEFORE_DAY = ("[before|earlier than]", "<", lambda cell, limit: cell < limit)
Comparison = tuple[str, str, Callable[..., bool]]


def _compared(draw: Draw, table: Table, column: Column) -> Condition:
    limit = draw.choice(table.cells(column))
    at, noun, name = table.columns.index(column), rows_named(draw, table), column_named(draw, column)
    words, sign, holds = _comparison(draw, column)
    if column.kind == "date":
        rows = tuple(row for row in table.rows if holds(row[at], limit))
        code = f"row[{column.header!r}] {sign} {limit!r}"
        which = ["{noun} with a {name} {words} {limit}", "{noun} whose {name} is {words} {limit}"]
        have = ["have a {name} {words} {limit}", "are dated {words} {limit}"]
    else:
        limit = str(int(float(limit)))
        rows = tuple(row for row in table.rows if holds(float(row[at]), float(limit)))
        code = f"{value(column)} {sign} {limit}"
        which = [
            *("{noun} with [a |]{name} {words} {limit}", "{noun} where {name} is {words} {limit}"),
            *("{noun} whose {name} is {words} {limit}", "{noun} with {name} {sign} {limit}"),
            "{noun} that have [a |]{name} [of |]{words} {limit}",
        ]
        have = ["have [a |]{name} [of |]{words} {limit}", "have {name} {sign} {limit}"]
    draw.named(limit)
    slots = {"noun": noun, "name": name, "words": draw.phrase(words), "sign": sign, "limit": limit}
    return Condition(
        draw.phrase(draw.choice(which), **slots), draw.phrase(draw.choice(have), **slots), code, rows, (limit,)
    )


def _comparison(draw: Draw, column: Column) -> Comparison:
    if column.kind == "date":
        return draw.choice((_AFTER, _BEFORE_DAY))
    return draw.weighted({_MORE: 4, _LESS: 3, _LEAST: 1.5, _MOST: 1})
