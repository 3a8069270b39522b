"""The progress line of `run_sync`."""

from __future__ import annotations

import io
import threading

import pytest

from agentkit.events import CallStarted, TurnFinished, TurnStarted
from agentkit.model import TextDelta, Usage
from agentkit.progress import ERASE, shown_progress
from agentkit_tools import ToolCall


class Terminal(io.StringIO):
    """A terminal that signals each write."""

    def __init__(self, *, tty: bool = True) -> None:
        super().__init__()
        self.tty = tty
        self.written = threading.Event()

    def isatty(self) -> bool:
        return self.tty

    def write(self, text: str) -> int:
        self.written.set()
        return super().write(text)


def test_the_line_shows_turns_tokens_and_calls_and_is_erased(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    terminal = Terminal()
    with shown_progress(stream=terminal, delay_s=0) as hear:
        hear(TurnStarted(0, think=False))
        hear(TurnFinished(0, Usage(sampled_tokens=40)))
        hear(TurnStarted(1, think=True))
        hear(TextDelta("a"))
        hear(CallStarted(ToolCall("c", "bash\x1b[2J", "{}")))
        terminal.written.clear()
        assert terminal.written.wait(20)
    shown = terminal.getvalue()
    assert "turn 2, 41 tokens, 1 calls, " in shown and shown.endswith(ERASE)
    assert "\x1b[2J" not in shown


@pytest.mark.parametrize(
    ("wanted", "tty", "term"), [(False, True, "xterm"), (None, False, "xterm"), (None, True, "dumb")]
)
def test_no_line_is_shown(wanted: bool | None, tty: bool, term: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", term)
    terminal = Terminal(tty=tty)
    with shown_progress(wanted, terminal, delay_s=0) as hear:
        hear(TurnStarted(0, think=False))
    assert terminal.getvalue() == ""


def test_a_short_run_shows_no_line_and_a_closed_terminal_does_not_stop_a_run() -> None:
    terminal = Terminal()
    with shown_progress(True, terminal, delay_s=60):
        pass
    assert terminal.getvalue() == ""
    terminal.close()
    with shown_progress(True, terminal, delay_s=0) as hear:
        hear(TurnStarted(0, think=False))
