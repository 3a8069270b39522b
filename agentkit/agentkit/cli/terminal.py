"""Text on its way to the terminal: what somebody else wrote is made harmless, and no encoding refuses it."""

from __future__ import annotations

import codecs
import os
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

_PICTURES = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"}
_VISIBLE = {**_PICTURES, 0x7F: 0x2421, **dict.fromkeys(range(0x80, 0xA0), 0xFFFD)}


def visible(text: str) -> str:
    """`text` with every control character but newline and tab as a picture of itself.

    What a model or a tool wrote can then move no cursor, set no title and hide nothing.
    """
    return text.translate(_VISIBLE)


_PLAIN = str.maketrans(
    {"✓": "+", "✗": "x", "→": "->", "±": "+-", "…": "...", "–": "-", "—": "-", "·": "*", "•": "*", "⏵": ">", "▸": ">"}
    | dict.fromkeys("─━╌═╸╺", "-")
    | dict.fromkeys("│┃║", "|")
    | dict.fromkeys("╭╮╰╯┌┐└┘├┤┬┴┼", "+")
    | {chr(code): "*" for code in range(0x2800, 0x2900)}  # the spinner
)


def spell(error: UnicodeError) -> tuple[str, int]:
    """The codec error handler of our streams: a mark in ASCII for each of ours, a question mark for anything else."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    text = error.object[error.start : error.end].translate(_PLAIN)
    return "".join(letter if letter.isascii() else "?" for letter in text), error.end


def prepare_streams() -> None:
    """Let standard output and error take any text in any encoding, and be there where they were closed."""
    codecs.register_error("agentkit", spell)
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # `>&-`; without a file of our own here the next file opened would be standard output
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
        else:
            stream.reconfigure(errors="agentkit")


def console(*, quiet: bool = False, stderr: bool = False) -> Console:
    """A console that shows text as it is, and lets the command end where its reader has gone."""
    from rich.console import Console

    class Terminal(Console):
        def on_broken_pipe(self) -> None:
            raise  # rich calls this inside its `except BrokenPipeError`, and would exit with 1

    return Terminal(quiet=quiet, stderr=stderr, highlight=False)
