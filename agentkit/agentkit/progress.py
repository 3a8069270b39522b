"""A progress line on the terminal for `run_sync`."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TextIO

from agentkit.events import CallFinished, CallStarted, Event, TurnFinished, TurnStarted
from agentkit.model import ReasoningDelta, TextDelta

DELAY_S = 1.0
"""Shorter runs show no progress line."""
EVERY_S = 0.2
ERASE = "\r\x1b[K"


@contextmanager
def shown_progress(
    wanted: bool | None = None, stream: TextIO | None = None, *, delay_s: float = DELAY_S
) -> Iterator[Callable[[Event], None]]:
    """Yield an event handler that keeps a progress line on `stream` up to date; erase the line at the end.

    Args:
        wanted: Whether to show the line. None shows it if the stream is a terminal.
        stream: Output stream; standard error by default.
        delay_s: Seconds before the line appears.
    """
    where = stream or sys.stderr
    if wanted is None:
        wanted = where is not None and where.isatty() and os.environ.get("TERM") != "dumb"
    if not wanted:
        yield lambda event: None
        return
    line = _Line(where)
    over = threading.Event()

    def draw() -> None:
        # A thread, because the line must also move while the event loop waits for a token or is blocked by a tool.
        waited = over.wait(delay_s)
        while not waited:
            line.draw()
            waited = over.wait(EVERY_S)
        line.erase()

    thread = threading.Thread(target=draw, name="agentkit: progress", daemon=True)
    thread.start()
    try:
        yield line.hear
    finally:
        over.set()
        thread.join()


class _Line:
    def __init__(self, stream: TextIO) -> None:
        self.stream = stream
        self.started = time.monotonic()
        self.turn = self.tokens = self.calls = 0
        self.since = 0  # deltas since the last token count
        self.doing = "opening"
        self.drawn = False

    def hear(self, event: Event) -> None:
        match event:
            case TurnStarted():
                self.turn, self.doing = event.turn + 1, "thinking" if event.think else "writing"
            case ReasoningDelta() | TextDelta():
                self.since += 1
            case CallStarted():
                self.calls, self.doing = self.calls + 1, event.call.name
            case CallFinished():
                self.doing = "writing"
            case TurnFinished():
                self.tokens, self.since = event.usage.sampled_tokens, 0

    def draw(self) -> None:
        name = "".join(letter if letter.isprintable() else "?" for letter in self.doing[:40])
        self._write(
            f"{ERASE}turn {self.turn}, {self.tokens + self.since} tokens, {self.calls} calls, "
            f"{time.monotonic() - self.started:.0f} s: {name}"
        )
        self.drawn = True

    def erase(self) -> None:
        if self.drawn:
            self._write(ERASE)

    def _write(self, text: str) -> None:
        try:
            self.stream.write(text)
            self.stream.flush()
        except (OSError, ValueError):  # a closed terminal must not stop the run
            pass
