"""Detection of runaway turns, which only repeat themselves.

The limits weigh two mistakes. A runaway turn should end within seconds, and 2,048 tokens take a few seconds on one CPU
core. Normal text repeats, too, but a row of dashes is only a few tokens, and the rows of a table or list differ. Text
that is *exactly* periodic for 2,048 tokens (about 8 KB) is not prose. A file may contain it (zeros in base64, a log of
identical lines, blank pixels), so the limit is four times as high inside a block of calls.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

MAX_PERIOD: Final = 256
"""Maximum length, in tokens, of the repeated block."""
CHECK_EVERY: Final = 64
"""Tokens between two checks."""
IN_CALLS: Final = 4
"""Factor by which the limit is higher inside a block of calls."""


def is_due(length: int, bound: int) -> bool:
    """Return whether a turn of `length` tokens should be checked against `bound` now."""
    return length >= bound and length % min(CHECK_EVERY, bound) == 0


def repeats(ids: Sequence[int], count: int, bytes_of: Callable[[int], bytes]) -> bool:
    """Return whether the last `count` ids only repeat.

    They do if they are copies of one block of at most `MAX_PERIOD` ids (and at most half of `count`), all digits, or
    all white space. Grammars allow the last two without limit, in numbers and around JSON.
    """
    if len(ids) < count:
        return False
    tail = ids[-count:]
    last = tail[-1]
    for period in range(1, min(MAX_PERIOD, count // 2) + 1):
        if tail[-1 - period] == last and tail[period:] == tail[:-period]:
            return True
    return any(all(kind(bytes_of(token_id)) for token_id in reversed(tail)) for kind in (bytes.isdigit, bytes.isspace))
