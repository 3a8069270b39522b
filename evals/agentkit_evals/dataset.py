"""Tasks from the rows of another project's data set: a JSON Lines file, recognised by its first row.

| rows | recognised by | reader |
|---|---|---|
| BFCL | `id` and `question` | `bfcl.py` |
| SWE-bench | `instance_id` | `swebench.py` |
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from agentkit.errors import TaskFileError
from agentkit.task import Task
from agentkit_engine.untrusted import describe, open_regular, parse_json, shorten

MAX_ROW_BYTES = 16 << 20


@dataclass(frozen=True, slots=True)
class Row:
    """One row, with its file and line for error messages."""

    path: Path
    line: int
    data: dict[str, Any]

    def error(self, problem: str) -> TaskFileError:
        """Return an error about this row, to be raised."""
        return TaskFileError(f"{self.path}:{self.line}: {problem}")

    def get(self, key: str, kind: type | tuple[type, ...], expected: str, *, default: Any = None) -> Any:
        """Return the value of `key`, which has the type `kind`. Without a default it must be present.

        Raises:
            TaskFileError: the key is missing, or its value has another type.
        """
        if key not in self.data and default is not None:
            return default
        if key not in self.data:
            raise self.error(f'missing key "{key}", expected {expected}')
        if not isinstance(value := self.data[key], kind):
            raise self.error(f"{key}: {type(value).__name__} {shorten(value)}, expected {expected}")
        return value

    def task(self, **fields: Any) -> Task:
        """Return a task. Raises TaskFileError if a field is invalid."""
        try:
            return Task.model_validate(fields)
        except ValidationError as exc:
            raise self.error(describe(exc)) from exc


def read_rows(path: Path) -> Iterator[Row]:
    """Yield the rows of a JSON Lines file; blank lines are skipped.

    Raises:
        TaskFileError: the file cannot be read, or a line is not a JSON object. The message has file and line.
    """
    try:
        with io.BufferedReader(open_regular(path)) as file:
            number = 0
            while line := file.readline(MAX_ROW_BYTES + 1):
                number += 1
                if len(line) > MAX_ROW_BYTES:
                    raise TaskFileError(f"{path}:{number}: more than {MAX_ROW_BYTES:,} bytes in one row")
                if not line.strip():
                    continue
                try:
                    data = parse_json(line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line)
                except ValueError as exc:
                    problem = shorten(str(exc), 200, quote=False)
                    raise TaskFileError(
                        f"{path}:{number}: not a JSON row: {problem}; expected one JSON object per line"
                    ) from exc
                if not isinstance(data, dict):
                    raise TaskFileError(
                        f"{path}:{number}: {type(data).__name__} {shorten(data)}, expected one JSON object per line"
                    )
                yield Row(path, number, data)
    except OSError as exc:
        raise TaskFileError(f"{path}: cannot be read: {exc.strerror}") from exc
