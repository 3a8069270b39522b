"""Verbatim overlap: the longest texts that an export shares with given corpora.

All texts of the export form one string of bytes and all texts of the corpora another; a suffix array of the two
(`pydivsufsort`) yields every maximal common substring. Separators that UTF-8 never contains keep a match inside one
text.
"""

from __future__ import annotations

import bisect
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from agentkit_engine.untrusted import parse_json
from agentkit_evals.errors import OverlapError
from agentkit_evals.synth import synth_extra

EXPORT_END, CORPUS_END = b"\xf8", b"\xf9"
"""Ends of texts. UTF-8 has no byte above 0xf4."""
MAX_BYTES = 512 << 20
"""Maximum bytes of an export and the corpora together, whose suffix array is kept in memory."""
TEXT_SUFFIXES = frozenset((".txt", ".md", ".rst", ".py", ".json", ".jsonl", ".yaml", ".yml", ".toml", ".csv", ".log"))
MAX_EXCERPT = 200


@dataclass(frozen=True, slots=True)
class Text:
    """A text and its place: a file; in JSON Lines also line and key, such as `rows.jsonl:3 messages.0.content`."""

    place: str
    text: str


@dataclass(frozen=True, slots=True)
class Copy:
    """A text that the export shares with a corpus."""

    length_bytes: int
    export: str
    """Place in the export."""
    export_offset_bytes: int
    corpus: str
    """Place in the corpus."""
    corpus_offset_bytes: int
    text: str
    """The text, cut to `MAX_EXCERPT` characters."""


def read_texts(path: Path) -> list[Text]:
    """Return the texts of a file, or of all text files below a folder.

    A row of JSON Lines yields each of its strings; any other file is one text.

    Raises:
        OverlapError: the path does not exist, is not UTF-8 text, or has no text; or a row is not JSON.
    """
    if not path.exists():
        raise OverlapError(f"{path} does not exist; expected a text file, JSON Lines, or a folder of them")
    files = (
        sorted(each for each in path.rglob("*") if each.is_file() and each.suffix in TEXT_SUFFIXES)
        if path.is_dir()
        else [path]
    )
    texts: list[Text] = []
    for file in files:
        try:
            content = file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as exc:
            raise OverlapError(f"{file} cannot be read as UTF-8 text: {exc}") from exc
        if file.suffix == ".jsonl":
            texts += _rows(file, content)
        else:
            texts.append(Text(str(file), content))
    if not any(each.text for each in texts):
        kinds = f" in files of the kinds {', '.join(sorted(TEXT_SUFFIXES))}" if path.is_dir() else ""
        raise OverlapError(f"{path} has no text{kinds}, so there is nothing to compare")
    return texts


def _rows(file: Path, content: str) -> Iterator[Text]:
    for number, line in enumerate(content.split("\n"), start=1):
        if line.strip():
            try:
                row = parse_json(line.encode())
            except ValueError as exc:
                raise OverlapError(f"{file}:{number}: not a JSON row: {exc}") from exc
            yield from (Text(f"{file}:{number} {key}".rstrip(), text) for key, text in _strings(row))


def _strings(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(value, str):
        yield key, value
    elif isinstance(value, dict):
        for name, item in value.items():
            yield from _strings(item, f"{key}.{name}".lstrip("."))
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from _strings(item, f"{key}.{index}".lstrip("."))


def longest_copies(
    export: Sequence[Text], corpora: Sequence[Text], *, min_bytes: int = 50, most: int = 20
) -> list[Copy]:
    """Return the longest common substrings of at least `min_bytes` bytes of UTF-8, longest first.

    Each part of the export is reported once, with its longest copy.

    Raises:
        ValueError: `min_bytes` or `most` is not positive.
        OverlapError: there is too much text.
        MissingDependencyError: `pydivsufsort` is not installed.
    """
    if min_bytes < 1 or most < 1:
        raise ValueError(f"min_bytes and most must be positive, got {min_bytes} and {most}")
    ours, our_starts = _joined(export, EXPORT_END)
    theirs, their_starts = _joined(corpora, CORPUS_END)
    if len(ours) + len(theirs) > MAX_BYTES:
        raise OverlapError(f"{len(ours) + len(theirs):,} bytes of text, expected at most {MAX_BYTES:,}; give less")
    if not ours or not theirs:
        return []
    with synth_extra():
        from pydivsufsort import common_substrings
    found = sorted(common_substrings(ours, theirs, limit=min_bytes), key=lambda each: (-each[2], each[0], each[1]))
    copies: list[Copy] = []
    covered: list[tuple[int, int]] = []
    for start, where, length in found:
        if any(first < start + length and start < last for first, last in covered):
            continue
        covered.append((start, start + length))
        ours_at, theirs_at = bisect.bisect(our_starts, start) - 1, bisect.bisect(their_starts, where) - 1
        copies.append(
            Copy(
                length_bytes=int(length),
                export=export[ours_at].place,
                export_offset_bytes=int(start) - our_starts[ours_at],
                corpus=corpora[theirs_at].place,
                corpus_offset_bytes=int(where) - their_starts[theirs_at],
                text=ours[start : start + length].decode(errors="replace")[:MAX_EXCERPT],
            )
        )
        if len(copies) == most:
            break
    return copies


def _joined(texts: Iterable[Text], end: bytes) -> tuple[bytes, list[int]]:
    """Return all texts, each followed by `end`, and the offset of each."""
    parts: list[bytes] = []
    starts: list[int] = []
    size = 0
    for each in texts:
        data = each.text.encode(errors="replace") + end
        starts.append(size)
        parts.append(data)
        size += len(data)
    return b"".join(parts), starts


def as_json(copies: Sequence[Copy]) -> str:
    """Return copies as JSON."""
    return json.dumps([asdict(copy) for copy in copies], indent=1)
