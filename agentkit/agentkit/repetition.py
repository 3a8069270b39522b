"""Runaways: a turn that only repeats itself, found by looking at its last ids now and then.

The bounds weigh two mistakes. A runaway should end within seconds, and 2,048 tokens are a few seconds on one CPU core.
Honest text repeats too: a row of dashes is a handful of tokens, a table or a list has rows that differ. Text that is
*exactly* periodic for 2,048 tokens (some 8 KB) is not prose. A file may hold it (zeros in base64, a log of one line,
blank pixels), so inside a block of calls it takes four times as many.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

MAX_PERIOD: Final = 256
"""Tokens of the longest block whose copies count as repetition."""
CHECK_EVERY: Final = 64
"""Tokens between two checks."""
IN_CALLS: Final = 4
"""Times as many tokens may repeat inside a block of calls."""


def is_due(length: int, bound: int) -> bool:
    """Whether a turn of `length` tokens should be checked against `bound` now."""
    return length >= bound and length % min(CHECK_EVERY, bound) == 0


def repeats(ids: Sequence[int], count: int, bytes_of: Callable[[int], bytes]) -> bool:
    """Whether the last `count` ids only repeat.

    They do when they are copies of one block of at most `MAX_PERIOD` ids (and at most half of `count`), when all are
    digits, or when all are white space; the last two are what a grammar allows in numbers and around JSON.
    """
    if len(ids) < count:
        return False
    tail = ids[-count:]
    last = tail[-1]
    for period in range(1, min(MAX_PERIOD, count // 2) + 1):
        if tail[-1 - period] == last and tail[period:] == tail[:-period]:
            return True
    return any(all(kind(bytes_of(token_id)) for token_id in reversed(tail)) for kind in (bytes.isdigit, bytes.isspace))
