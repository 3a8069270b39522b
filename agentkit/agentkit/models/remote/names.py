"""Names and arguments of calls in the form that every API accepts."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from typing import Any

from pydantic_core import from_json

MAX_NAME: int = 64


class ToolNames:
    """Maps tool names to names that every API accepts (1 to 64 letters, digits, `_` and `-`), and back."""

    def __init__(self, names: Iterable[str]) -> None:
        self._sent: dict[str, str] = {}
        self._ours: dict[str, str] = {}
        for name in sorted(names, key=lambda name: _plain(name) != name):  # first the valid names, which stay unchanged
            sent = _plain(name)
            if sent in self._ours:
                digest = hashlib.sha256(name.encode("utf-8", "replace")).hexdigest()[:8]
                sent = f"{sent[: MAX_NAME - 9]}_{digest}"
            self._sent[name], self._ours[sent] = sent, name

    def sent(self, name: str) -> str:
        """Return the name that is sent. For a name that no tool has, replace the characters that APIs refuse."""
        return self._sent.get(name) or _plain(name)

    def ours(self, sent: str) -> str:
        """Return the tool's own name; a name that no tool has is returned unchanged."""
        return self._ours.get(sent, sent)


def _plain(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9_-]", "_", name)[:MAX_NAME] or "unknown"


def arguments_object(text: str) -> dict[str, Any]:
    """Return a call's arguments as a JSON object, which APIs require. Other text becomes the only member of one."""
    try:
        value = from_json(text or "{}", allow_inf_nan=False)
    except ValueError:
        value = None
    return value if isinstance(value, dict) else {"malformed_arguments": text}
