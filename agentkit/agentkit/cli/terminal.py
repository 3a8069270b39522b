"""Terminal output: neutralize control characters in untrusted text, and print in any encoding."""

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
# C1 controls, bidi controls, line and paragraph separators, surrogates, tag characters.
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
    """Return text with every control character except newline and tab replaced by a picture or its code point.

    All output that includes text from a model, a tool, a file or another program passes through this function or
    `visible_line`, so such text cannot move the cursor, set the title, or hide or reorder anything.
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
    """Handle an encoding error on our streams: replace our own symbols by ASCII marks, anything else by a question
    mark."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    text = error.object[error.start : error.end].translate(_PLAIN)
    return "".join(letter if letter.isascii() else "?" for letter in text), error.end


def prepare_streams() -> None:
    """Make standard output and error accept any text in any encoding, and reopen them on the null device if closed."""
    codecs.register_error("agentkit", spell)
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # closed with `>&-`: the next file opened would otherwise become standard output
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
        else:
            stream.reconfigure(errors="agentkit")


def console(*, quiet: bool = False, stderr: bool = False) -> Console:
    """Return a console that prints text without highlighting and raises when its reader has closed the pipe."""
    from rich.console import Console

    class Terminal(Console):
        def on_broken_pipe(self) -> None:
            raise  # rich calls this inside its `except BrokenPipeError` and would otherwise exit with 1

    return Terminal(quiet=quiet, stderr=stderr, highlight=False)


def say(console: Console, text: str, style: str = "", end: str = "\n") -> None:
    """Print text written by a model, a tool or a task, without markup or control characters."""
    from rich.text import Text

    console.print(Text(visible(text), style), end=end, soft_wrap=True)


def counted(count: int, noun: str) -> str:
    """Return the number with its noun, in the plural unless it is 1."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def visible_line(text: str) -> str:
    """Return text as one line without invisible characters, for names and for lines to be compared."""
    text = visible(text).replace("\n", "\u240a")
    if text.isprintable():
        return text
    return "".join(letter if letter.isprintable() or letter == "\t" else f"<U+{ord(letter):04X}>" for letter in text)


def show_traceback(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
    """Print an uncaught exception with control characters neutralized; installed as `sys.excepthook`."""
    sys.stderr.write(visible("".join(format_exception(kind, error, traceback))))
