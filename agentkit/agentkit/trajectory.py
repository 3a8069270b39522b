"""The append-only record of a run, from which everything the model read can be rebuilt.

A file is JSON lines. Each line is `{"seq": n, "time_s": seconds since the start, "record": {...}, "crc32": "..."}`,
where the checksum covers the bytes before `,"crc32"`. Line 0 is the `Header`. Lines are written as events happen, so a
killed process loses at most the line it was writing. That torn tail is not read, and moves to a file `.torn` beside it
when the record continues. Reasoning and text deltas have no lines, because the message and the token ids of their turn
contain them.
"""

from __future__ import annotations

import fcntl
import io
import json
import os
import time
import zlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Final, Literal
from uuid import uuid4

from pydantic import AfterValidator, FailFast, Field, TypeAdapter, ValidationError
from pydantic_core import PydanticSerializationError

from agentkit.errors import TrajectoryCorruptError, TrajectoryError, TrajectoryFormatError, TrajectoryWriteError
from agentkit.events import CallFinished, Compacted, MessageAdded, Outcome, Record, TurnFinished
from agentkit.messages import STRICT, AssistantMessage, Message
from agentkit.model import Dialect, Effort, TokenSegment, Usage, total_usage
from agentkit_engine.sampling_params import SamplingParams
from agentkit_engine.untrusted import check_values, describe, open_fd, open_regular, parse_json, shorten
from agentkit_tools import ToolResult

FORMAT: Final = "agentkit.trajectory"
VERSION: Final = 3
MAX_FILE_BYTES: Final = 256 << 20
MAX_LINE_BYTES: Final = 32 << 20
"""A line holds one message, or the ids of one turn at up to 40 bytes per id with its log-probability."""
MAX_LINE_NUMBERS: Final = 2_500_000
MAX_LINE_TEXTS: Final = 50_000
"""Lower than for numbers: validation stops at the first error in a list of ids, but reports every error among texts."""


def _tool(tool: dict[str, Any]) -> dict[str, Any]:
    match tool:
        case {"function": {"name": str()}}:
            return tool
    raise ValueError("expected a tool as an OpenAI dict, with a name")


@dataclass(frozen=True, slots=True)
class Header:
    """Settings that are fixed when the session opens. The header and the messages determine all prompt ids."""

    model: str
    dialect: Dialect | None
    effort: Effort
    sampling: SamplingParams
    """Effective parameters: those of the checkpoint folder with the caller's changes."""
    tools: Annotated[tuple[Annotated[dict[str, Any], AfterValidator(_tool)], ...], FailFast()]
    """The tools as OpenAI dicts, in prompt order."""
    thinking: str
    grammar_off: str | None = None
    """The reason why calls were not constrained to the tools' schemas; None if they were."""
    prices_as_of: str | None = None
    """The date of the list price of `Usage.cost_usd`; None if there is no price."""
    metadata: dict[str, Any] = field(default_factory=dict)
    id: str = field(default_factory=lambda: uuid4().hex)
    created: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="milliseconds"))
    format: Literal["agentkit.trajectory"] = FORMAT
    version: Literal[3] = VERSION
    type: Literal["header"] = "header"
    __pydantic_config__ = STRICT


@dataclass(frozen=True, slots=True)
class _Line:
    seq: int
    time_s: float
    record: Annotated[Header | Record, Field(discriminator="type")]
    __pydantic_config__ = STRICT


_LINES: TypeAdapter[_Line] = TypeAdapter(_Line)
_CRC = b',"crc32":"%08x"}\n'
_CRC_SIZE = len(_CRC % 0)


class Trajectory:
    """A header and its records, in memory and optionally in a file.

    `append` writes to the file at once. `load` reads a file, and `save` writes a trajectory that is only in memory.
    """

    def __init__(self, header: Header, path: str | Path | None = None) -> None:
        """Start a trajectory; with `path`, create the file, which must not exist yet.

        Raises:
            TrajectoryWriteError: the file exists already, or cannot be written.
        """
        self.header = header
        self.path: Path | None = None
        self.records: list[Record] = []
        self.times_s: list[float] = []
        self.subagents: list[Trajectory] = []
        """The trajectories of sub-agents that ran in this process; empty after `load`."""
        self._file: int | None = None
        self._ends: list[int] = []  # offsets in the file of the ends of the header and of each record
        self._start_ns = time.monotonic_ns()
        if path is not None:
            self._open(Path(path), os.O_WRONLY | os.O_CREAT | os.O_EXCL)
            self._write(0, 0.0, header)

    @classmethod
    def load(cls, path: str | Path) -> Trajectory:
        """Read a file. A torn tail is left out, and moves to a file `.torn` when the record continues.

        Raises:
            TrajectoryFormatError: the file is not a trajectory, has another format version, or exceeds
                `MAX_FILE_BYTES` or `MAX_LINE_BYTES`.
            TrajectoryCorruptError: a line before the last one is damaged.
            TrajectoryError: the file cannot be read.
        """
        path = Path(path)
        try:
            with io.BufferedReader(open_regular(path), 1 << 20) as file:
                if (size := os.fstat(file.fileno()).st_size) > MAX_FILE_BYTES:
                    raise TrajectoryFormatError(f"{path} has {size:,} bytes, expected at most {MAX_FILE_BYTES:,}.")
                return cls._read(file, path)
        except OSError as exc:
            raise TrajectoryError(f"Cannot read trajectory {path}: {exc.strerror}.") from exc

    @classmethod
    def _read(cls, file: io.BufferedReader[io.FileIO], path: Path) -> Trajectory:
        text = _next_line(file, path, 0)
        header = _parse(text, path, 0)
        if header is None or not isinstance(header.record, Header):
            raise TrajectoryFormatError(f"{path} is not a trajectory: it has no complete {FORMAT} header.")
        self = cls(header.record)
        self.path, self._ends = path, [len(text)]
        while text := _next_line(file, path, seq := len(self.records) + 1):
            line = _parse(text, path, seq)
            if line is None and not file.peek(1):
                break
            if line is None or isinstance(line.record, Header):
                raise TrajectoryCorruptError(
                    f"{path}, line {seq + 1} of {seq + 1 + _count_lines(file)} is damaged. The {seq} lines before it "
                    "are valid; truncate the file there to read them."
                )
            self.records.append(line.record)
            self.times_s.append(line.time_s)
            self._ends.append(self._ends[-1] + len(text))
        self._start_ns = time.monotonic_ns() - round(1e9 * self.times_s[-1] if self.times_s else 0)
        return self

    def append(self, record: Record) -> None:
        """Add a record. On return the operating system has it.

        Raises:
            TrajectoryWriteError: the file cannot be written. The record stays in memory; later records are not written.
        """
        time_s = (time.monotonic_ns() - self._start_ns) // 1000 / 1e6  # whole microseconds
        self.records.append(record)
        self.times_s.append(time_s)
        if self._file is not None:
            self._write(len(self.records), time_s, record)

    def save(self, path: str | Path) -> None:
        """Write the whole trajectory to a new file. A trajectory without a file continues in the new one.

        Raises:
            TrajectoryWriteError: the file exists already, or cannot be written.
        """
        copy = self.branch(self.header, path, len(self.records))
        if self.path is None:
            self.path, self._ends = copy.path, copy._ends

    def rewind(self, length: int) -> None:
        """Keep only the first `length` records of a closed trajectory. `reopen` cuts the others from the file, too."""
        assert self._file is None, "the trajectory is open"
        del self.records[length:], self.times_s[length:], self._ends[length + 1 :]

    def branch(self, header: Header, path: str | Path | None, count: int) -> Trajectory:
        """Return a new, closed trajectory that begins with the first `count` records of this one.

        Raises:
            TrajectoryWriteError: the file exists already, or cannot be written.
        """
        copy = Trajectory(header, path)
        copy.records, copy.times_s = self.records[:count], self.times_s[:count]
        if path is not None:
            for seq, (time_s, record) in enumerate(zip(copy.times_s, copy.records, strict=True), start=1):
                copy._write(seq, time_s, record)
        copy.close()
        copy._start_ns = time.monotonic_ns() - round(1e9 * copy.times_s[-1] if count else 0)
        return copy

    def reopen(self) -> None:
        """Reopen a closed trajectory for more records.

        Bytes of its file after the last record move to a file with the suffix `.torn`, and are never overwritten.

        Raises:
            TrajectoryWriteError: one of the files cannot be written.
        """
        if self._file is not None or self.path is None:
            return
        self._open(self.path, os.O_RDWR)
        assert self._file is not None
        try:
            if torn := os.pread(self._file, os.fstat(self._file).st_size - self._ends[-1], self._ends[-1]):
                with self.path.with_suffix(f"{self.path.suffix}.torn").open("ab") as kept:
                    kept.write(torn if torn.endswith(b"\n") else torn + b"\n")
                os.ftruncate(self._file, self._ends[-1])
            os.lseek(self._file, 0, os.SEEK_END)
        except OSError as exc:
            self.close()
            raise TrajectoryWriteError(
                f"Cannot continue trajectory {self.path}: {exc.strerror}. Free space on that disk, or copy "
                "it to another."
            ) from exc

    def sync(self) -> None:
        """Wait until the disk has all records of an open file. Raises OSError."""
        if self._file is not None:
            os.fsync(self._file)

    def close(self) -> None:
        """Close the file; the trajectory can still be read."""
        if self._file is not None:
            os.close(self._file)
            self._file = None

    @property
    def messages(self) -> list[Message]:
        """All messages of the conversation; those that compaction has left, and those after it, if there was one."""
        return messages_of(self.records)

    @property
    def segments(self) -> list[TokenSegment]:
        """The token segments of the conversation: all, or those since the ids began anew.

        They begin anew when the conversation is compacted, and when a server renders it again from the start.
        """
        segments: list[TokenSegment] = []
        for record in self.records:
            if isinstance(record, Compacted) or (isinstance(record, TokenSegment) and record.restart):
                segments.clear()
            if isinstance(record, TokenSegment):
                segments.append(record)
        return segments

    @property
    def turns(self) -> int:
        """Number of turns of the session, including those that compaction has left out."""
        turns = 0
        for record in self.records:
            if isinstance(record, Compacted):
                turns = record.turns
            elif isinstance(record, MessageAdded):
                turns += isinstance(record.message, AssistantMessage)
        return turns

    @property
    def token_ids(self) -> list[int]:
        """The token ids of `segments` in order; equal to the engine's own list."""
        return [token for segment in self.segments for token in segment.ids]

    @property
    def loss_mask(self) -> list[int]:
        """One number per id of `token_ids`: 1 if the model sampled it, 0 if it was fed or forced."""
        return [int(segment.kind == "sampled") for segment in self.segments for _ in segment.ids]

    @property
    def logprobs(self) -> list[float | None]:
        """One log-probability per id of `token_ids`; None if the id was not sampled or none was reported."""
        return [logprob for segment in self.segments for logprob in segment.logprobs or [None] * len(segment.ids)]

    @property
    def results(self) -> list[ToolResult]:
        """The tool results, in the order in which the calls finished."""
        return [record.result for record in self.records if isinstance(record, CallFinished)]

    @property
    def usage(self) -> Usage:
        """Usage of all runs of the session together, including one that was cut off."""
        runs: list[Usage] = []
        unfinished: list[Usage] = []
        for record in self.records:
            if isinstance(record, TurnFinished):
                if unfinished and record.usage.turns <= unfinished[0].turns:  # the run before it has no outcome
                    runs += unfinished
                unfinished = [record.usage]
            elif isinstance(record, Outcome):
                runs.append(record.usage)
                unfinished = []
        return total_usage(runs + unfinished)

    @property
    def outcome(self) -> Outcome | None:
        """The last recorded outcome; None while the first run is in progress, or if its process was killed."""
        return next((record for record in reversed(self.records) if isinstance(record, Outcome)), None)

    def _open(self, path: Path, flags: int) -> None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if flags & os.O_CREAT:
                self._file = os.open(path, os.O_CLOEXEC | flags, 0o644)
            else:
                self._file = open_fd(path, flags)
        except OSError as exc:
            reason = exc.strerror
            if isinstance(exc, FileExistsError) and Path(exc.filename) == path:
                reason = "it exists already, and trajectories are never overwritten"
            raise TrajectoryWriteError(f"Cannot write trajectory {path}: {reason}. Choose another path.") from exc
        self.path = path
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as exc:
            self.close()
            raise TrajectoryWriteError(f"Trajectory {path} is in use by another process; wait until it ends.") from exc
        except OSError:  # a file system without locks
            pass

    def _write(self, seq: int, time_s: float, record: Header | Record) -> None:
        assert self._file is not None
        line = _line_bytes(seq, time_s, record)
        rest = memoryview(line)
        try:
            while rest:
                rest = rest[os.write(self._file, rest) :]
        except OSError as exc:
            self.close()
            raise TrajectoryWriteError(
                f"Cannot write record {seq} of trajectory {self.path}: {exc.strerror}. The {seq} records before it can "
                "be read. Free space on that disk, or write trajectories to another one."
            ) from exc
        self._ends.append((self._ends[-1] if self._ends else 0) + len(line))


def messages_of(records: Iterable[Record]) -> list[Message]:
    """Return the messages of the conversation that records end with; see `Trajectory.messages`."""
    messages: list[Message] = []
    for record in records:
        if isinstance(record, MessageAdded):
            messages.append(record.message)
        elif isinstance(record, Compacted):
            messages = list(record.messages)
    return messages


def _line_bytes(seq: int, time_s: float, record: Header | Record) -> bytes:
    line = _Line(seq, time_s, record)
    try:
        body = _LINES.dump_json(line)[:-1]
    except PydanticSerializationError:  # a lone surrogate; the tokenizer replaces it with U+FFFD, too
        text = json.dumps(_LINES.dump_python(line, mode="json"), ensure_ascii=False, separators=(",", ":"))
        body = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace").encode()[:-1]
    return body + _CRC % zlib.crc32(body)


def _parse(text: bytes, path: Path, seq: int) -> _Line | None:
    """Return the line, or None if it is torn, damaged or not number `seq`.

    Raises:
        TrajectoryFormatError: the line is intact, but of another format version or not a valid record.
    """
    body, tail = text[:-_CRC_SIZE], text[-_CRC_SIZE:]
    if tail != _CRC % zlib.crc32(body):
        return None
    try:
        check_values(body, MAX_LINE_NUMBERS)
        if body.count(b'"') - body.count(b'\\"') > 2 * MAX_LINE_TEXTS:
            raise ValueError(f"more than {MAX_LINE_TEXTS:,} strings")
        line = _LINES.validate_json(body + b"}", strict=True)
        _check_numbers(line, body)
    except ValidationError as exc:
        if (version := _version(body)) != VERSION:
            raise TrajectoryFormatError(
                f"{path} has trajectory format version {shorten(version)}; this agentkit reads version {VERSION}. "
                "Open it with the agentkit version that wrote it."
            ) from exc
        raise TrajectoryFormatError(
            f"{path}, line {seq + 1} is intact but not a valid {FORMAT} record: {describe(exc)}"
        ) from exc
    except ValueError as exc:
        raise TrajectoryFormatError(f"{path}, line {seq + 1} is intact but not a valid {FORMAT} record: {exc}") from exc
    return line if line.seq == seq else None


def _check_numbers(line: _Line, body: bytes) -> None:
    """Refuse numbers that the schema allows but that are out of range. Raises ValueError."""
    if not 0 <= line.time_s < 1e9:
        raise ValueError(f"time_s is {shorten(line.time_s)}, expected 0 to 1e9 seconds")
    if isinstance(line.record, TokenSegment) and line.record.ids:
        low, high = min(line.record.ids), max(line.record.ids)
        if low < 0 or high >= 1 << 31:
            raise ValueError(f"ids from {shorten(low)} to {shorten(high)}, expected token ids below 2**31")
    if b"NaN" in body or b"Infinity" in body:  # the schema allows them inside values of any type
        parse_json(body + b"}", max_values=MAX_LINE_NUMBERS)


def _version(body: bytes) -> object:
    """Return the format version in a line, or the current one if the line has none."""
    try:
        record = parse_json(body + b"}")["record"]
        return record.get("version", VERSION) if isinstance(record, dict) else VERSION
    except (ValueError, TypeError, KeyError):
        return VERSION


def _next_line(file: io.BufferedReader[io.FileIO], path: Path, seq: int) -> bytes:
    text = file.readline(MAX_LINE_BYTES + 1)
    if len(text) > MAX_LINE_BYTES:
        raise TrajectoryFormatError(f"{path}, line {seq + 1} has more than {MAX_LINE_BYTES:,} bytes.")
    return text


def _count_lines(file: io.BufferedReader[io.FileIO]) -> int:
    """Count the remaining lines, including an unfinished last one."""
    count, chunk = 0, b"\n"
    while more := file.read(1 << 20):
        count, chunk = count + more.count(b"\n"), more
    return count + (not chunk.endswith(b"\n"))
