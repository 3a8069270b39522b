"""A file of JSON lines that a run appends to and that a later run continues, whatever stopped the first one."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Generic, TypeVar

from pydantic import ValidationError

from agentkit.task import Strict
from agentkit_engine.untrusted import describe
from agentkit_evals.errors import OutputError, RunDirectoryError

Header = TypeVar("Header", bound=Strict)
Entry = TypeVar("Entry", bound=Strict)


class Journal(Generic[Header, Entry]):
    """A header, which identifies the run, and its entries. Each entry is on disk when `append` returns.

    A line that was cut off by a crash or a full disk is dropped when the file is opened.
    """

    def __init__(self, path: Path, header: Header, entry: type[Entry]) -> None:
        """Open or create a journal.

        Raises:
            RunDirectoryError: the file has another header, or is damaged.
            OutputError: the file cannot be written.
        """
        self.path, self.header = path, header
        self.entries: list[Entry] = []
        first = header.model_dump_json().encode() + b"\n"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            data = path.read_bytes() if path.exists() else b""
            whole = data[: data.rfind(b"\n") + 1]
            lines = whole.splitlines()
            if lines and lines[0] + b"\n" != first:
                raise RunDirectoryError(
                    f"{path} was written with other settings: {lines[0].decode(errors='replace')[:300]}; "
                    f"expected {first.decode()[:300].strip()}. Give another --out, or the same settings"
                )
            for number, line in enumerate(lines[1:], start=2):
                try:
                    self.entries.append(entry.model_validate_json(line))
                except ValidationError as exc:
                    raise RunDirectoryError(f"{path}:{number}: {describe(exc)}") from exc
            if len(whole) < len(data):
                os.truncate(path, len(whole))
            if not lines:
                self._write(first)
        except OSError as exc:
            raise self._failure(exc) from exc

    def append(self, entry: Entry) -> None:
        """Add an entry.

        Raises:
            OutputError: the file cannot be written, for example because the disk is full. Earlier entries are kept.
        """
        try:
            self._write(entry.model_dump_json().encode() + b"\n")
        except OSError as exc:
            raise self._failure(exc) from exc
        self.entries.append(entry)

    def _write(self, line: bytes) -> None:
        with self.path.open("ab", buffering=0) as file:
            written = 0
            while written < len(line):  # a full disk may take a part of the line first
                written += file.write(line[written:])
            os.fsync(file.fileno())

    def _failure(self, exc: OSError) -> OutputError:
        return OutputError(
            f"{self.path} cannot be written: {exc.strerror}. {len(self.entries)} entries are kept; make room, then run "
            "the same command again"
        )
