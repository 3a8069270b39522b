"""Reading of untrusted files: regular files of limited size, and JSON of limited size and depth.

Nothing here blocks on a FIFO, opens a device or uses more memory than its limits allow. Functions raise `OSError` for
the file and `ValueError` for its content; callers convert these to their own typed errors.
"""

from __future__ import annotations

import errno
import json
import math
import os
import reprlib
import stat
from io import FileIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pydantic import ValidationError
    from pydantic_core import ErrorDetails

MAX_VALUES = 500_000
"""Default limit on the number of values in one JSON text. Python needs about 200 bytes for each."""

_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFLNK: "a symbolic link",
}


def open_regular(path: str | Path, *, follow: bool = True, dir_fd: int | None = None) -> FileIO:
    """Open a regular file for unbuffered reading. Raises as `open_fd`."""
    return FileIO(open_fd(path, os.O_RDONLY, follow=follow, dir_fd=dir_fd))


def open_fd(path: str | Path, flags: int, *, follow: bool = True, dir_fd: int | None = None) -> int:
    """Open an existing regular file and return its descriptor.

    The file type is checked before opening, because opening a device can have effects, and again afterwards, because
    the file may have been replaced in between. A symbolic link is followed unless `follow` is False.

    Raises:
        OSError: The file does not exist, cannot be opened, or is not a regular file.
    """
    flags |= os.O_NONBLOCK | os.O_CLOEXEC | (0 if follow else os.O_NOFOLLOW)
    try:
        _check_regular(os.stat(path, dir_fd=dir_fd, follow_symlinks=follow), path)
        fd = os.open(path, flags, dir_fd=dir_fd)
    except ValueError as exc:  # the name contains a NUL or a lone surrogate
        raise OSError(errno.EINVAL, f"not a file name: {exc}", str(path)) from exc
    try:
        _check_regular(os.fstat(fd), path)
    except OSError:
        os.close(fd)
        raise
    return fd


def read_regular(path: str | Path, *, max_bytes: int) -> bytes:
    """Return the content of a regular file.

    Raises:
        OSError: As `open_regular`, or the file has more than `max_bytes`.
    """
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > max_bytes:
            raise OSError(errno.EFBIG, f"it has {size:,} bytes, expected at most {max_bytes:,}", str(path))
        parts, left = [], max_bytes + 1
        while left and (part := file.read(min(left, 1 << 20))):  # the file may be longer than its stat size
            parts.append(part)
            left -= len(part)
        if not left:
            raise OSError(errno.EFBIG, f"it has more than {max_bytes:,} bytes", str(path))
        return b"".join(parts)


def parse_json(data: bytes, *, max_values: int = MAX_VALUES) -> Any:
    """Parse a strict JSON text.

    Raises:
        ValueError: It is not JSON in UTF-8, has more than `max_values` values, is nested too deeply, repeats a key in
            one object, or has a number that is not finite.
    """
    check_values(data, max_values)
    try:
        return json.loads(data.decode(), object_pairs_hook=_distinct, parse_constant=_refuse, parse_float=_finite)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def check_values(data: bytes, max_values: int = MAX_VALUES) -> None:
    """Refuse a JSON text that could have more than `max_values` values, before parsing it.

    Each value but the first follows one of `[`, `{`, `,` and `:`. Such characters inside strings count too, so the
    limit should be generous.

    Raises:
        ValueError: There are more.
    """
    if len(data) > max_values and sum(map(data.count, (b"[", b"{", b","))) > max_values:
        raise ValueError(f"more than {max_values:,} values")


def describe(error: ValidationError, most: int = 3) -> str:
    """Return the first few problems of a validation error as one line of limited length."""
    problems = error.errors(include_url=False)
    shown = "; ".join(_problem(item) for item in problems[:most])
    return shown + (f"; and {len(problems) - most} more" if len(problems) > most else "")


def _problem(item: ErrorDetails) -> str:
    where = shorten(".".join(map(str, item["loc"])), 120, quote=False)
    found = "" if item["type"] == "json_invalid" else f"found {shorten(item['input'])}, "
    return f"{where}{': ' if where else ''}{found}{shorten(item['msg'], 200, quote=False)}"


def shorten(value: object, most: int = 60, *, quote: bool = True) -> str:
    """Return `repr(value)` with each part cut to about `most` characters.

    With `quote=False` return a text itself, cut likewise, with its control characters escaped.
    """
    if isinstance(value, str) and not quote:
        shown = value if len(value) <= most else f"{value[: most // 2]}...{value[-(most // 2) :]}"
        return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in shown)
    short = reprlib.Repr()
    short.maxstring = short.maxlong = short.maxother = most
    short.maxlevel = 3
    try:
        return short.repr(value)
    except ValueError:  # an int with thousands of digits
        return f"a huge {type(value).__name__}"


def _check_regular(status: os.stat_result, path: str | Path) -> None:
    if not stat.S_ISREG(status.st_mode):
        kind = _KINDS.get(stat.S_IFMT(status.st_mode), "something else")
        number = errno.EISDIR if stat.S_ISDIR(status.st_mode) else errno.EINVAL
        raise OSError(number, f"it is {kind}, expected a regular file", str(path))


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"key {shorten(twice)} twice in one object")
    return found


def _refuse(constant: str) -> float:
    raise ValueError(f"{constant} is not a JSON number")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"number {shorten(text, quote=False)} is out of range")
    return value
