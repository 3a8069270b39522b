"""Ctrl-C and SIGTERM end a command at any time with one line and status 128 + the signal number.

During start-up a signal ends the process at once: nothing needs cleanup yet, and a KeyboardInterrupt in the middle of
an import would print a traceback or abort inside a C++ library. Inside `ending.run` the first signal cancels the
running function, so that sandboxes are removed and reports are written; a second one ends the process at once.

A signal that the process was started to ignore (`nohup`, a background job of a script) stays ignored.
"""

from __future__ import annotations

import os
import sys
import time

TYPE_CHECKING = False
if TYPE_CHECKING:
    import signal
    from collections.abc import Callable
    from types import FrameType
else:
    import _signal as signal  # importing the enums of `signal` takes 5 ms, during which Ctrl-C prints a traceback

WORDS: dict[int, str] = {signal.SIGINT: "Interrupted.", signal.SIGTERM: "Terminated.", signal.SIGHUP: "Hung up."}
REPEAT_S = 1.0
"""Signals within this many seconds of the first count as the same request: a terminal and `make` may both send one."""

_cancel: Callable[[], object] | None = None
_answer: Callable[[int], bool] | None = None
_received: tuple[int, float] | None = None


def install() -> None:
    """Install the handlers."""
    for number in WORDS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _handle)


def ignore() -> None:
    """Ignore the signals: the work is done and only interpreter shutdown remains."""
    for number in WORDS:
        signal.signal(number, signal.SIG_IGN)


def received() -> int | None:
    """Return the signal that caused the cancellation; None if there was none."""
    return _received[0] if _received else None


def note(number: int) -> None:
    """Record a signal that ends the command in another way than by cancelling it."""
    global _received
    _received = number, time.monotonic()


def status() -> int:
    """Return the exit status for the received signal; that of Ctrl-C for any other KeyboardInterrupt."""
    return 128 + (received() or signal.SIGINT)


def words() -> str:
    """Return the line to print for the received signal; that of Ctrl-C for any other KeyboardInterrupt."""
    return WORDS[received() or signal.SIGINT]


def cancel_with(cancel: Callable[[], object] | None) -> None:
    """Make the first signal call `cancel`; with None, any signal ends the process at once."""
    global _cancel
    _cancel = cancel


def answer_with(answer: Callable[[int], bool] | None) -> None:
    """Call `answer` first for each signal; a signal for which it returns True has no other effect."""
    global _answer
    _answer = answer


def _handle(number: int, frame: FrameType | None) -> None:
    global _received
    if _answer is not None and _answer(number):
        return
    if _received is not None and time.monotonic() - _received[1] < REPEAT_S:
        return
    if _cancel is not None and _received is None:
        _received = number, time.monotonic()
        _cancel()
        return
    if _received is not None:
        line = "Stopped at once. Run `agentkit doctor --reap` to remove sandboxes left behind."
    else:
        line = WORDS[number]
    try:
        sys.stdout.flush()
        if os.isatty(1):
            os.write(1, b"\x1b[?25h")  # the progress display hides the cursor
        os.write(2, f"{line}\n".encode())
    except Exception:  # the stream is closed, or this signal interrupted a write to it
        pass
    os._exit(128 + number)
