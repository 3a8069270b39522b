"""One updating line about a run on a terminal, for whoever waits for `run_sync`."""

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
"""A run that is over sooner shows nothing."""
EVERY_S = 0.2
ERASE = "\r\x1b[K"


@contextmanager
def shown_progress(
    wanted: bool | None = None, stream: TextIO | None = None, *, delay_s: float = DELAY_S
) -> Iterator[Callable[[Event], None]]:
    """Give a listener that keeps one line on `stream` (standard error) up to date, and erase the line at the end.

    Args:
        wanted: Whether to show it; None does so where the stream is a terminal.
        stream: Where to.
        delay_s: How long a run may take without a word.
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
        # A thread, not a task: the line must move while the loop waits for a token, or a tool holds the loop.
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
        self.since = 0  # texts heard since the last count of tokens
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
        except (OSError, ValueError):  # a terminal that is gone stops no run
            pass
