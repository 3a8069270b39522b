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


def print_answer(answer: str) -> str:
    """Return the solution command that only prints an answer."""
    return f"printf '%s\\n' {shlex.quote(answer)}"


def replace_in_file(path: str, old: str, new: str) -> str:
    """Return a shell command that replaces the only occurrence of `old` in a file by `new`."""
    script = "import sys; p, a, b = sys.argv[1:]; t = open(p).read(); assert t.count(a) == 1; "
    script += "open(p, 'w').write(t.replace(a, b))"
    return shlex.join(["python3", "-c", script, path, old, new])
