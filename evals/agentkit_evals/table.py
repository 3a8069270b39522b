"""Tables: many similar tasks in one YAML file, one row per task.

    kind: count
    functions:                                   # tools of this file, by name
      stock:
        about: Return how many of an article are in stock.
        takes: {article: string - in the singular, (limit): integer = 10, (unit): [piece, box]}
        command: echo 7                          # left out if only the calls are scored
    rows:
      - id: failed-logins
        ask: How many failed logins are in auth.log?
        files: {auth.log: "ok ana\\nfailed ben\\n"}
        run: grep -c failed auth.log             # the solution; what it prints is the answer
        answer: 1

Reports group the rows by `kind`, and ids are KIND-ID. A row says what must be true at the end: `answer` (one accepted
value, or a list of them), `lists` (values that the answer must name, in any order), `after` (files and their
contents; null for a file that is gone), `prints` (commands and their output), or `calls` (the calls of the first
turn). `table_verifier.py` has the rules. All other files of the row must be unchanged; `edits` names those that may
change.

A row with a `twin` is a pair. The row itself is an impossible request: the answer must say so, as `REFUSALS` in
`table_verifier.py` defines it. The keys of `twin` replace those of the row and give a task that can be solved. The ids
end in `-impossible` and `-solvable`, and `metadata.pair` is the same.

Parameters are JSON Schema, or in short: `TYPE`, `TYPE[]`, `TYPE = DEFAULT`, each with ` - DESCRIPTION`; a list of
texts for an enum; a mapping for an object; a list with one mapping for an array of objects. Parentheses around the name
mark an optional parameter.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import AfterValidator, Field, ValidationError, model_validator

from agentkit.errors import TaskFileError
from agentkit.task import AgentConfig, Identifier, RelativePath, Shell, Strict, Task, load_yaml
from agentkit_engine.untrusted import describe, shorten
from agentkit_evals import table_verifier

VERIFIER = 'python3 -I "$AGENTKIT_VERIFIER_DIR/check.py"'
TYPES = ("string", "integer", "number", "boolean", "array", "object")
_TYPE = re.compile(r"(string|integer|number|boolean)(\[\])?")


def parameter_schema(entry: Any) -> dict[str, Any]:
    """Return the JSON schema of one parameter in the short notation.

    Raises:
        ValueError: the entry is not in the notation.
    """
    match entry:
        case str():
            return _scalar_schema(entry)
        case [str(), *_] if all(isinstance(each, str) for each in entry):
            return {"type": "string", "enum": entry}
        case [dict() as item]:
            return {"type": "array", "items": parameter_schema(item)}
        case {"type": str() as kind} if kind in TYPES:
            return {**entry}
        case dict():
            return object_schema(entry)
    raise ValueError(
        f"{shorten(entry)} is not a parameter; write TYPE, TYPE[], TYPE = DEFAULT, a list of texts, a mapping, or a "
        "JSON schema"
    )


def object_schema(takes: Mapping[str, Any]) -> dict[str, Any]:
    """Return the JSON schema of an object whose keys are parameters, in parentheses if they are optional."""
    properties = {name.strip("()"): parameter_schema(entry) for name, entry in takes.items()}
    return {"type": "object", "properties": properties, "required": [name for name in takes if name in properties]}


def _scalar_schema(text: str) -> dict[str, Any]:
    found = _TYPE.match(text)
    rest = text[found.end() :] if found else ""
    schema: dict[str, Any] = {}
    if found:
        schema = {"type": "array", "items": {"type": found[1]}} if found[2] else {"type": found[1]}
        if rest.startswith(" = "):
            try:
                schema["default"], end = json.JSONDecoder().raw_decode(rest, 3)
            except ValueError as exc:
                raise ValueError(f"default {shorten(rest[3:])} is not JSON; write text in double quotes") from exc
            rest = rest[end:]
        if rest.startswith(" - ") and rest[3:]:
            schema["description"], rest = rest[3:], ""
    if not schema or rest:
        raise ValueError(
            f"{shorten(text)} is not a parameter; write `TYPE`, `TYPE[]` or `TYPE = DEFAULT`, each with "
            "` - DESCRIPTION` if you like; the types are string, integer, number and boolean"
        )
    return schema


def _parameters(takes: dict[str, Any]) -> dict[str, Any]:
    object_schema(takes)
    return takes


class Function(Strict):
    """A tool of a table: its description, its parameters in the short notation, and the command that it runs."""

    about: str
    takes: Annotated[dict[str, Any], AfterValidator(_parameters)] = Field(default_factory=dict)
    command: Shell | None = None

    def tool(self, name: str) -> dict[str, Any]:
        """Return the tool as an entry of a task's `tools`."""
        entry = {"name": name, "description": self.about, "parameters": object_schema(self.takes)}
        return entry if self.command is None else entry | {"command": self.command}


Value = str | int | float


class Outcome(Strict):
    """The keys of a row that a twin may replace."""

    ask: str | None = Field(default=None, min_length=1)
    files: dict[RelativePath, str] | None = None
    tools: list[str] | None = None  # names of built-in tools and functions; None: all built-in tools, or those called
    run: Shell | None = None
    answer: Value | list[Value] | None = None
    lists: list[Value] | None = None
    never: list[Value] | None = None  # values that the answer must not name
    known: list[Value] | None = None  # values that a refusal may name, besides those of the request and the files
    after: dict[RelativePath, str | None] | None = None
    edits: list[RelativePath] | None = None
    prints: dict[Shell, str] | None = None
    calls: list[dict[str, dict[str, Any]]] | None = None


class Row(Outcome):
    """One task of a table, or a pair of an impossible task and its twin."""

    id: Identifier
    ask: str = Field(min_length=1)
    twin: Outcome | None = None

    @model_validator(mode="after")
    def _has_an_outcome(self) -> Self:
        part = self if self.twin is None else self.twin
        given = [key for key in ("answer", "lists", "after", "prints", "calls") if getattr(part, key) is not None]
        if not given:
            raise ValueError(f"row {self.id} has no outcome; add answer, lists, after, prints or calls")
        if "calls" not in given and self.run is None and part.run is None:
            raise ValueError(f"row {self.id} has no solution; add `run: COMMAND`")
        if "calls" in given and (self.files is not None or self.run is not None):
            raise ValueError(f"row {self.id} scores calls, which do not run; leave out files and run")
        return self


class Table(Strict):
    """Contents of a table."""

    kind: Identifier
    functions: dict[str, Function] = Field(default_factory=dict)
    agent: AgentConfig = AgentConfig(max_turns=8, max_tokens=1000, timeout_s=300.0)
    rows: list[Row] = Field(min_length=1)


def read_table(path: Path) -> Iterator[Task]:
    """Yield the tasks of a table, in order; a pair yields the impossible task first.

    Raises:
        TaskFileError: the file is not a table, or a row is not a task. The message has file and line, or the row's id.
    """
    table = load_yaml(path, Table)
    for row in table.rows:
        try:
            if row.twin is None:
                yield _task(table, row, row.id)
            else:
                yield _task(table, row, f"{row.id}-impossible", pair=row.id)
                given = row.twin.model_dump(exclude_none=True)
                fields = row.model_dump(exclude={"twin", "never", "known"}, exclude_none=True)
                yield _task(table, Row.model_validate(fields | given), f"{row.id}-solvable", pair=row.id, solvable=True)
        except ValidationError as exc:
            raise TaskFileError(f"{path}: row {row.id}: {describe(exc)}") from exc
        except ValueError as exc:
            raise TaskFileError(f"{path}: row {row.id}: {shorten(str(exc), 500, quote=False)}") from exc


def _task(table: Table, row: Row, name: str, *, pair: str | None = None, solvable: bool = False) -> Task:
    metadata: dict[str, Any] = {"family": table.kind}
    if pair is not None:
        metadata |= {"pair": f"{table.kind}-{pair}", "solvable": solvable}
    fields: dict[str, Any] = {
        "id": f"{table.kind}-{name}",
        "instruction": row.ask,
        "agent": table.agent,
        "metadata": metadata,
    }
    names = row.tools
    if names is None and row.calls is not None:
        names = list(dict.fromkeys(tool for call in row.calls for tool in call))
    if names is not None:
        fields["tools"] = [table.functions[each].tool(each) if each in table.functions else each for each in names]
    if row.calls is not None:
        fields["verifier"] = {
            "calls": [
                {tool: expected_arguments(_schema(table, tool), given)}
                for call in row.calls
                for tool, given in call.items()
            ]
        }
        return Task.model_validate(fields)
    files = row.files or {}
    expected = {
        "ask": row.ask,
        "files": files,
        "impossible": pair is not None and not solvable,
        "known": [*(row.known or ()), *(names or ())],
        **row.model_dump(include={"answer", "lists", "never", "after", "edits", "prints"}, exclude_none=True),
    }
    checker = Path(table_verifier.__file__).read_text(encoding="utf-8")
    fields |= {
        "environment": {"files": files},
        "verifier": {
            "command": VERIFIER,
            "files": {"check.py": checker, "expected.json": json.dumps(expected, ensure_ascii=False)},
        },
        "solution": {"command": row.run if row.run is not None else f"echo '{table_verifier.REFUSALS[0]}'"},
    }
    return Task.model_validate(fields)


def _schema(table: Table, tool: str) -> dict[str, Any]:
    if tool not in table.functions:
        raise ValueError(f"calls: no function {tool}; there are {', '.join(table.functions)}")
    return object_schema(table.functions[tool].takes)


def expected_arguments(schema: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, list[Any]]:
    """Return the allowed values of each argument, for `verifier.calls`.

    A given value is the only allowed one; a list gives the allowed ones, in an array parameter as a list of lists.
    An optional parameter with a default may also be passed with it if it is not given.

    Raises:
        ValueError: an argument is not a parameter.
    """
    properties = schema.get("properties", {})
    if unknown := [name for name in given if name not in properties]:
        raise ValueError(f"calls: no parameter {unknown[0]}; there are {', '.join(properties)}")
    allowed: dict[str, list[Any]] = {}
    for name, each in properties.items():
        if name in given:
            allowed[name] = [_expected(each, value) for value in _alternatives(each, given[name])]
        elif "default" in each:
            allowed[name] = [each["default"], ""]
    return allowed


def _alternatives(schema: Mapping[str, Any], value: Any) -> list[Any]:
    if not isinstance(value, list):
        return [value]
    if schema.get("type") == "array":
        return value if value and all(isinstance(each, list) for each in value) else [value]
    return value


def _expected(schema: Mapping[str, Any], value: Any) -> Any:
    """Return a value in which each key of an object has a list of allowed values, as BFCL's checker expects."""
    if isinstance(value, dict):
        return expected_arguments(schema, value)
    if isinstance(value, list):
        return [_expected(schema.get("items", {}), each) for each in value]
    return value
