"""Files that the catalog's commands read, with the names by which commands and requests speak of their parts."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date, timedelta
from typing import Any

from agentkit_evals.synth.draw import Draw

LEVELS = {"INFO": 4.0, "WARN": 2.0, "ERROR": 2.0, "DEBUG": 1.0}


@dataclass(frozen=True, slots=True)
class InputFile:
    """A drawn file.

    Attributes:
        content: Its text.
        variables: Its parts by name, for expressions; texts and whole numbers also for requests and commands.
    """

    content: str
    variables: Mapping[str, Any]


def total(rows: Sequence[Mapping[str, str]], column: str) -> int | float:
    """Return the sum of a column; whole numbers have no decimals."""
    found = sum(float(row[column]) for row in rows)
    return int(found) if found == int(found) else found


NAMESPACE: dict[str, Any] = {"total": total, "Counter": Counter, "date": date, "re": re, "json": json}
"""Names that expressions of the catalog may use, beside builtins and the variables of the input."""


def _lines(draw: Draw) -> InputFile:
    makers: tuple[Callable[[], str], ...] = (
        draw.word,
        draw.noun,
        draw.person,
        lambda: draw.thing("city"),
        lambda: draw.thing("dish"),
        lambda: f"{draw.word()} {draw.noun()}",
    )
    make = draw.choice(makers)
    lines = _different(make, draw.between(4, 8))
    item, other = draw.choice(lines), _other(make, lines)
    if draw.chance(0.5):
        lines.insert(draw.between(0, len(lines)), draw.choice(lines))
    return InputFile(_joined(lines), {"lines": lines, "item": item, "other": other, "n": draw.between(2, 4)})


def _numbers(draw: Draw) -> InputFile:
    top = draw.choice((20, 100, 1000, 9999))
    numbers = [draw.between(1, top) for _ in range(draw.between(4, 9))]
    return InputFile(_joined(numbers), {"numbers": numbers, "n": draw.between(2, 4)})


def _text(draw: Draw) -> InputFile:
    lines = []
    for _ in range(draw.between(3, 6)):
        words = [draw.word() for _ in range(draw.between(3, 6))]
        lines.append(draw.named(f"The {draw.noun()} {' '.join(words)}."))
    words = [word for line in lines for word in line[:-1].split()[1:]]
    return InputFile(
        _joined(lines),
        {"lines": lines, "word": draw.named(draw.choice(words)), "other": _other(draw.word, words)},
    )


def _table(draw: Draw) -> InputFile:
    name_col, group_col, number_col = _different(lambda: draw.identifier("snake", parts=1), 3)
    if draw.chance(0.7):
        name_col = draw.choice(("name", "title", "item", "product", "person", "place"))
        group_col = draw.choice(("group", "team", "city", "kind", "category", "country", "status"))
        number_col = draw.choice(("amount", "price", "points", "hours", "quantity", "age", "weight", "score"))
    date_col = draw.choice(("date", "day", "due", "created", "start"))
    count = draw.between(4, 8)
    makers: tuple[Callable[[], str], ...] = (draw.noun, draw.person, lambda: draw.thing("city"))
    names = _different(draw.choice(makers), count)
    groups = _different(draw.word, draw.between(2, 3))
    numbers = [draw.between(1, draw.choice((20, 100, 900))) for _ in range(count)]
    columns = draw.some((name_col, group_col, number_col, date_col), 4)
    rows = []
    for name, number in zip(names, numbers, strict=True):
        row = {
            name_col: name,
            group_col: draw.choice(groups),
            number_col: str(number),
            date_col: draw.date().isoformat(),
        }
        rows.append({column: row[column] for column in columns})
    content = _joined([",".join(columns), *(",".join(row.values()) for row in rows)])
    variables: dict[str, Any] = {
        "rows": rows,
        "columns": columns,
        "name_col": name_col,
        "group_col": group_col,
        "number_col": number_col,
        "date_col": date_col,
        "name": draw.choice(names),
        "group": draw.choice(rows)[group_col],
        "low": draw.between(min(numbers), max(numbers)),
    }
    return InputFile(content, variables)


def _settings(draw: Draw) -> InputFile:
    keys = _different(lambda: draw.identifier(draw.choice(("snake", "upper"))), draw.between(3, 7))
    makers: tuple[Callable[[], str], ...] = (draw.word, draw.noun, lambda: draw.number(1, 9999))
    pairs = {key: draw.choice(makers)() for key in keys}
    key = draw.choice(keys)
    return InputFile(
        _joined([f"{key}={value}" for key, value in pairs.items()]),
        {"pairs": pairs, "key": key, "value": pairs[key], "new": _other(draw.word, [*pairs.values()])},
    )


def _log(draw: Draw) -> InputFile:
    day = draw.date()
    lines, levels, days, words = [], [], [], []
    for _ in range(draw.between(5, 9)):
        day += timedelta(days=draw.weighted({0: 3.0, 1: 1.0}))
        message = [draw.noun(), draw.word(), draw.noun()]
        levels.append(draw.weighted(LEVELS))
        days.append(draw.named(day.isoformat()))
        words += message
        lines.append(f"{days[-1]} {draw.clock()}:{draw.between(0, 59):02} {levels[-1]} {' '.join(message)}")
    variables = {"lines": lines, "level": draw.choice(levels), "day": draw.choice(days), "word": draw.choice(words)}
    return InputFile(_joined(lines), variables)


INPUTS: dict[str, tuple[Callable[[Draw], InputFile], tuple[str, ...]]] = {
    "lines": (_lines, ("txt", "txt", "md", "list")),
    "numbers": (_numbers, ("txt", "dat", "txt")),
    "text": (_text, ("txt", "md")),
    "table": (_table, ("csv",)),
    "settings": (_settings, ("env", "conf", "properties", "cfg")),
    "log": (_log, ("log", "log", "txt")),
}
"""Kinds of files, with the endings of their names."""


def _different(make: Callable[[], str], count: int) -> list[str]:
    found: dict[str, None] = {}
    while len(found) < count:
        found[make()] = None
    return [*found]


def _other(make: Callable[[], str], known: Sequence[str]) -> str:
    while any((text := make()) in one or one in text for one in known):
        pass
    return text


def _joined(lines: Sequence[object]) -> str:
    return "".join(f"{line}\n" for line in lines)
