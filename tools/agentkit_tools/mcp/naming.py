"""The names of a server's tools for the model: `server__tool`, with at most 64 letters, digits, `_` and `-`."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterable

from agentkit_tools.tool import NAME

MAX_CHARS = 64
HASH_CHARS = 8


def tool_names(prefix: str, names: Iterable[str]) -> dict[str, str]:
    """Return a unique name for each tool of a server. It does not depend on the order of `names`.

    Other characters become `_`. A name that is then too long, or the same as another tool's, ends in a hash of the
    original.
    """
    full = {name: f"{prefix}__{name}" if prefix else name for name in set(names)}
    taken = {text for text in full.values() if NAME.fullmatch(text)}
    cleaned = {name: re.sub(r"[^A-Za-z0-9_-]", "_", text) for name, text in full.items()}
    shared = Counter(cleaned.values())
    found = {}
    for name, text in sorted(full.items()):
        chosen = cleaned[name]
        if text != chosen or not NAME.fullmatch(text):
            salt = text
            while not NAME.fullmatch(chosen) or chosen in taken or shared[chosen] > 1:
                digest = hashlib.sha256(salt.encode("utf-8", "surrogatepass")).hexdigest()[:HASH_CHARS]
                chosen = f"{cleaned[name][: MAX_CHARS - HASH_CHARS - 1]}_{digest}"
                salt += "_"
            taken.add(chosen)
        found[name] = chosen
    return found
