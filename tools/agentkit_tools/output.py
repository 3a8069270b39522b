"""Limits on the size of results: the middle of a longer text is left out, and the whole text kept in a file."""

from __future__ import annotations

import re
from collections.abc import Sequence
from hashlib import sha256
from typing import TYPE_CHECKING, Final

from agentkit_environments import UnsafePathError
from agentkit_tools.parts import ImagePart, TextPart

if TYPE_CHECKING:
    from agentkit_tools.tool import ToolContext

CUT_NOTICE = re.compile(rb"\n\[\.\.\. (\d{1,18}) bytes cut \.\.\.\]\n")
CUT_NOTICE_BYTES = 48  # upper bound, for any byte count
MIN_OUTPUT_BYTES = 128  # room for the notice and some text on both sides
MAX_IMAGE_BYTES = 5 << 20  # the strictest limit of the APIs that take images
MAX_IMAGES_BYTES = 20 << 20  # in one result, which must fit into a request and into a line of a record
MAX_SPILLED_BYTES: Final = 4 << 20
MAX_CAPTURED_BYTES: Final = 1 << 20
"""Bytes kept of each stream of a command whose output may be written to a file."""


async def bounded(text: str, context: ToolContext, *, path: str | None = None) -> str:
    """Limit `text` to `context.max_output_bytes` as `cut` does. The notice names the file that has the whole text.

    Args:
        text: The text of a result.
        context: The context of the call.
        path: A file that has the text. Default: a new file in `context.spill_dir`, if there is one.

    Raises:
        SandboxLostError: the sandbox is lost.
    """
    if fits(text, context.max_output_bytes):
        return text
    if path is None:
        path = await spill(text, context)
    if path is None:
        return cut(text, context.max_output_bytes)
    lines = text.count("\n") + (not text.endswith("\n"))
    return cut(text, context.max_output_bytes, where=f"; see {path} ({lines} line{'s' * (lines != 1)})")


async def spill(text: str, context: ToolContext) -> str | None:
    """Write `text` to a file in `context.spill_dir`; return its path, None if there is no directory or no room.

    The name depends on nothing but the text, so that a run that is repeated gets the same results.
    """
    if context.spill_dir is None:
        return None
    data = cut(text, MAX_SPILLED_BYTES).encode("utf-8", "replace")
    path = f"{context.spill_dir}/{sha256(data).hexdigest()[:16]}.txt"
    try:
        await context.environment.write_file(path, data)
    except (OSError, UnsafePathError):  # the disk is full, or the agent has put something else there
        return None
    return path


def fits(text: str, max_bytes: int) -> bool:
    """Return whether `text` has at most `max_bytes` bytes of UTF-8."""
    return len(text) * 4 <= max_bytes or len(text.encode("utf-8", "replace")) <= max_bytes


def cut_parts(parts: Sequence[TextPart | ImagePart], max_bytes: int) -> tuple[TextPart | ImagePart, ...]:
    """Limit the text of the parts to about `max_bytes`. Leave out images that are larger than `MAX_IMAGE_BYTES`, or
    that exceed a total of `MAX_IMAGES_BYTES`."""
    texts = sum(isinstance(part, TextPart) for part in parts)
    each = max(MIN_OUTPUT_BYTES, max_bytes // max(texts, 1))
    left = MAX_IMAGES_BYTES
    kept: list[TextPart | ImagePart] = []
    for part in parts:
        if isinstance(part, TextPart):
            kept.append(TextPart(cut(part.text, each)))
        elif (size := len(part.content)) > MAX_IMAGE_BYTES:
            kept.append(TextPart(f"{part} is larger than {MAX_IMAGE_BYTES:,} bytes and was left out"))
        elif size > left:
            kept.append(TextPart(f"{part} was left out: a result has {MAX_IMAGES_BYTES:,} bytes of images at most"))
        else:
            kept.append(part)
            left -= size
    return tuple(kept)


def cut(text: str, max_bytes: int, *, where: str = "") -> str:
    """Limit the UTF-8 size of `text` to `max_bytes` (at least 128): keep head and tail, replace the middle by a notice.

    The notice ends with `where`, if that takes at most a quarter of the size. Characters are not split. If the removed
    part contains an earlier notice, its count is included.
    """
    if fits(text, max_bytes):
        return text
    data = text.encode("utf-8", "replace")
    if not where.isprintable() or len(where.encode()) > max_bytes // 4:
        where = ""
    half = (max_bytes - CUT_NOTICE_BYTES - len(where.encode())) // 2
    head = data[:half].decode("utf-8", "ignore")
    tail = data[-half:].decode("utf-8", "ignore")
    middle = data[len(head.encode()) : len(data) - len(tail.encode())]
    count = len(middle) + sum(int(notice[1]) - len(notice[0]) for notice in CUT_NOTICE.finditer(middle))
    return f"{head}\n[... {count} bytes cut{where} ...]\n{tail}"
