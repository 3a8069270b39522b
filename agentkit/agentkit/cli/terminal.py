"""Text that somebody else wrote, on its way to the terminal."""

from __future__ import annotations

_PICTURES = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"}
_VISIBLE = {**_PICTURES, 0x7F: 0x2421, **dict.fromkeys(range(0x80, 0xA0), 0xFFFD)}


def visible(text: str) -> str:
    """`text` with every control character but newline and tab as a picture of itself.

    What a model or a tool wrote can then move no cursor, set no title and hide nothing.
    """
    return text.translate(_VISIBLE)
