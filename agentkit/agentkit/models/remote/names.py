"""Names and arguments of calls in the form that every API takes."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from typing import Any

from pydantic_core import from_json

MAX_NAME: int = 64


class ToolNames:
    """Maps the names of tools to names that every API takes, and back: 1 to 64 letters, digits, `_` and `-`."""

    def __init__(self, names: Iterable[str]) -> None:
        self._sent: dict[str, str] = {}
        self._ours: dict[str, str] = {}
        for name in sorted(names, key=lambda name: _plain(name) != name):  # a fitting name stays as it is
            sent = _plain(name)
            if sent in self._ours:
                digest = hashlib.sha256(name.encode("utf-8", "replace")).hexdigest()[:8]
                sent = f"{sent[: MAX_NAME - 9]}_{digest}"
            self._sent[name], self._ours[sent] = sent, name

    def sent(self, name: str) -> str:
        """Return the name that the API gets; for a name that no tool has, one without the characters it refuses."""
        return self._sent.get(name) or _plain(name)

    def ours(self, sent: str) -> str:
        """Return the tool's own name; a name that no tool has comes back unchanged."""
        return self._ours.get(sent, sent)


def _plain(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9_-]", "_", name)[:MAX_NAME] or "unknown"


def arguments_object(text: str) -> dict[str, Any]:
    """Return a call's arguments as the object that APIs insist on. A text that is none becomes the only member."""
    try:
        value = from_json(text or "{}", allow_inf_nan=False)
    except ValueError:
        value = None
    return value if isinstance(value, dict) else {"malformed_arguments": text}
