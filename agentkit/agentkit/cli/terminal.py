"""Text on its way to the terminal: what somebody else wrote is made harmless, and no encoding refuses it."""

from __future__ import annotations

import codecs
import os
import sys
from traceback import format_exception
from types import TracebackType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console


_PICTURES = {code: chr(0x2400 + code) for code in range(32) if chr(code) not in "\n\t"} | {0x7F: "\u2421"}
# C1 controls, bidi controls, line and paragraph separators, halves of surrogate pairs, tag characters.
_HIDDEN = (
    *range(0x80, 0xA0),
    *(0x061C, 0x200E, 0x200F, 0x2028, 0x2029),
    *range(0x202A, 0x202F),
    *range(0x2066, 0x206A),
    *range(0xD800, 0xE000),
    *range(0xE0000, 0xE0080),
)
_VISIBLE = _PICTURES | {code: f"<U+{code:04X}>" for code in _HIDDEN}


def visible(text: str) -> str:
    """Return text with every control character but newline and tab replaced by a picture or its code point.

    Everything printed that a model, a tool, a file or a program outside has a part in goes through here or through
    `visible_line`. It can then move no cursor, set no title, and neither hide nor reorder anything.
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


def visible_line(text: str) -> str:
    """Return text as one line in which nothing is invisible: for names, and for lines that are compared."""
    text = visible(text).replace("\n", "\u240a")
    if text.isprintable():
        return text
    return "".join(letter if letter.isprintable() or letter == "\t" else f"<U+{ord(letter):04X}>" for letter in text)


def show_traceback(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
    """Print an exception that nobody caught: `sys.excepthook` for text that may quote anything."""
    sys.stderr.write(visible("".join(format_exception(kind, error, traceback))))
