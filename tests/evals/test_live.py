"""The output of running commands on a terminal: drawn while they run, removed before their results are printed."""

from __future__ import annotations

import io
import re

import pytest
from rich.console import Console

from agentkit import CallFinished, CallOutput, CallStarted, ReasoningDelta, TextDelta, ToolCall, ToolResult
from agentkit.cli.live import LINES, LiveLines
from agentkit.cli.run import show
from agentkit.events import Event

MOVE = re.compile(r"\x1b\[(\d*)A|\x1b\[2K|\x1b\[[?0-9;]*[mlh]|\r|\n|[^\x1b\r\n]+")
STARTED = CallStarted(ToolCall("a", "bash", "{}"))


class Terminal:
    """A terminal that understands what rich writes."""

    def __init__(self, *, is_terminal: bool = True, asks: bool = False) -> None:
        self._file = io.StringIO()
        self.console = Console(
            file=self._file,
            force_terminal=is_terminal,
            width=40,
            height=20,
            highlight=False,
            _environ={"TERM": "xterm"},
        )
        self.live = LiveLines(self.console, asks=asks)

    def hear(self, *events: Event) -> list[str]:
        """Show events as `agentkit run` does, and return the lines that are then visible."""
        for event in events:
            self.live.hear(event)
            show(self.console, event)
        return self.lines()

    def lines(self) -> list[str]:
        lines, row, column = [""], 0, 0
        written = self._file.getvalue()
        assert "".join(match[0] for match in MOVE.finditer(written)) == written, "an escape that nobody knows"
        for match in MOVE.finditer(written):
            if match[0] == "\n":
                row, column = row + 1, 0
                lines += [""] * (row == len(lines))
            elif match[0] == "\r":
                column = 0
            elif match[0] == "\x1b[2K":
                lines[row] = ""
            elif match[1] is not None:
                row -= int(match[1] or 1)
            elif not match[0].startswith("\x1b"):
                lines[row] = lines[row][:column].ljust(column) + match[0] + lines[row][column + len(match[0]) :]
                column += len(match[0])
        return [line for line in lines if line]


def output(text: str, call_id: str = "a") -> CallOutput:
    return CallOutput(call_id, "stdout", text)


def test_the_last_lines_are_drawn_until_the_result() -> None:
    terminal = Terminal()
    assert terminal.hear(STARTED, output("one\ntw")) == ["→ bash {}", "one", "tw"]
    assert terminal.hear(output("o\n")) == ["→ bash {}", "one", "two"]
    assert terminal.hear(*(output(f"line {n}\n") for n in range(20))) == [
        "→ bash {}",
        *(f"line {n}" for n in range(20 - LINES, 20)),
    ]
    assert terminal.hear(CallFinished(ToolResult("a", "bash", "the result"))) == ["→ bash {}", "the result"]


def test_output_is_neutralized_and_cut_to_the_width() -> None:
    terminal = Terminal()
    shown = terminal.hear(STARTED, output("\x1b[2Jred\u202e\n 10%\r 20%\r\n" + "x" * 1000))
    assert shown == ["→ bash {}", "␛[2Jred<U+202E>", " 20%", "x" * 39 + "…"]
    terminal.live.remove()
    assert terminal.lines() == ["→ bash {}"]


def test_the_call_that_has_just_written_is_shown_last() -> None:
    terminal = Terminal()
    other = CallStarted(ToolCall("b", "bash", "{}"))
    assert terminal.hear(STARTED, other, output("of a\n"), output("of b\n", "b"))[-2:] == ["of a", "of b"]
    assert terminal.hear(output("again\n"))[-3:] == ["of b", "of a", "again"]
    assert terminal.hear(CallFinished(ToolResult("a", "bash", "done"))) == ["→ bash {}", "→ bash {}", "done"]
    assert terminal.hear(output("more\n", "b"))[-3:] == ["done", "of b", "more"]


def test_nothing_is_drawn_after_an_unfinished_line_of_the_model() -> None:
    terminal = Terminal()
    for delta in (TextDelta("Loo"), ReasoningDelta("Hm")):
        terminal.hear(STARTED, delta)
        before = terminal.lines()
        assert terminal.hear(output("hidden\n")) == before
    assert terminal.hear(STARTED, output("seen\n"))[-1] == "seen"


@pytest.mark.parametrize("options", [{"is_terminal": False}, {"asks": True}])
def test_nothing_is_drawn_in_a_file_or_where_a_human_may_be_asked(options: dict[str, bool]) -> None:
    terminal = Terminal(**options)
    assert terminal.hear(STARTED, output("one\n")) == ["→ bash {}"]
