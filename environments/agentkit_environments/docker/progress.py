"""Reading what a Docker engine says during a build: the lines of its first builder or Podman's, or BuildKit's messages.

BuildKit sends protobuf, the message `moby.buildkit.v1.StatusResponse` (api/services/control/control.proto): vertices
(field 1: digest 1, name 3, started 5, completed 6, error 7) and logs (field 3: digest of the vertex 1, text 4).
"""

from __future__ import annotations

import base64
import io
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

MAX_LOG_CHARS = 2_000
_FOR_BUILDKIT = re.compile(
    r"(?:RUN|COPY|ADD)\b(?:(?:\s+--\S+)*?\s+--(?:mount|network|security|chmod|link|parents|exclude|checksum|keep-git-dir)\b"
    r"|.*<<-?[\"']?[A-Za-z_])",
    re.IGNORECASE,
)
_STEP = re.compile(r"(?:Step |(?:\[\d+/\d+\] )?STEP |\[(?:\S+ )?)(\d+)/(\d+)(?:\]| ?:) (.*)", re.DOTALL)
"""A step as Docker's builder, Podman (which also numbers the stages if there are several), or BuildKit writes it."""


def needs_buildkit(dockerfile: Path) -> bool:
    """Return whether a Dockerfile has here-documents, or flags that only BuildKit knows. Raises OSError."""
    lines = re.sub(r"\\[ \t]*\n", " ", dockerfile.read_text("utf-8", "replace")).splitlines()
    return any(_FOR_BUILDKIT.match(line.lstrip()) for line in lines)


class BuildProgress:
    """The step that a build is at, or that failed, and the end of its output."""

    step = "before the first step"

    def __init__(self) -> None:
        self._logs: defaultdict[bytes, str] = defaultdict(str)
        self._vertex = b""
        self._has_failed = False

    @property
    def log(self) -> str:
        return self._logs[self._vertex]

    def read(self, line: Mapping[str, Any]) -> None:
        """Note one of the JSON objects of a build."""
        if line.get("id") == "moby.buildkit.trace":
            self._read_trace(base64.b64decode(line["aux"]))
            return
        text = str(line.get("stream") or line.get("status") or "")
        if match := _STEP.match(text):
            self.step = _titled(match)
            self._logs.clear()
        else:
            self._add(self._vertex, text)

    def _read_trace(self, status: bytes) -> None:
        for number, content in _fields(status):
            part = dict(_fields(content))
            if number == 1 and 3 in part and not self._has_failed and (7 in part or (5 in part and 6 not in part)):
                name = part[3].decode("utf-8", "replace")
                if match := _STEP.match(name):
                    self.step = _titled(match)
                elif "load metadata" in name:  # of a base image
                    self.step = name
                self._vertex = part.get(1, b"")
                self._has_failed = 7 in part  # the vertices after it are cancelled
            elif number == 3:
                self._add(part.get(1, b""), part.get(4, b"").decode("utf-8", "replace"))

    def _add(self, vertex: bytes, text: str) -> None:
        self._logs[vertex] = (self._logs[vertex] + text)[-MAX_LOG_CHARS:]


def _titled(match: re.Match[str]) -> str:
    return f"step {match[1]} of {match[2]}: {match[3].strip()}"


def _fields(message: bytes) -> Iterator[tuple[int, bytes]]:
    """Yield the number and content of a protobuf message's fields that have a length. Ends where it is malformed."""
    stream = io.BytesIO(message)
    while (key := _varint(stream)) is not None:
        kind = key & 7
        if kind == 2 and (length := _varint(stream)) is not None:
            yield key >> 3, stream.read(length)
        elif kind == 0:
            _varint(stream)
        elif kind in (1, 5):
            stream.read(8 if kind == 1 else 4)
        else:
            return


def _varint(stream: io.BytesIO) -> int | None:
    value = 0
    for shift in range(0, 70, 7):
        if not (byte := stream.read(1)):
            return None
        value |= (byte[0] & 0x7F) << shift
        if byte[0] < 0x80:
            return value
    return None
