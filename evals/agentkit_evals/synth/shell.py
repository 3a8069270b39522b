"""Shell commands as a fluent user writes them."""

from __future__ import annotations

import re
import shlex

_PLAIN = re.compile(r"[\w@%+=:,./-]+")


def quote(text: str) -> str:
    """Quote an argument if it needs quotes; letters of any script need none."""
    return text if _PLAIN.fullmatch(text) else shlex.quote(text)


def fixed(text: str) -> str:
    """Return the arguments that make grep look for this text: `-F` if it has characters that a pattern would use."""
    flag = "-F " if re.search(r"[][.*^$\\]", text) else ""
    return flag + ("-e " if text.startswith("-") else "") + quote(text)
