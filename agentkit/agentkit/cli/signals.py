"""Ctrl-C and SIGTERM end a command with one line and with status 128 + the signal's number, whenever they come.

At first a signal ends the process on the spot. Nothing is open that early, and a KeyboardInterrupt in the middle of an
import would end in a traceback or, inside a C++ library, in an abort. Inside `ending.run` the first signal cancels what
runs, so that sandboxes are removed and reports are written; a second one ends the process on the spot after all.

A signal that this process was started to ignore (`nohup`, a background job of a script) stays ignored.
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
    import _signal as signal  # what `signal` wraps in enums; importing those takes 5 ms, in which Ctrl-C is a traceback

WORDS: dict[int, str] = {signal.SIGINT: "Interrupted.", signal.SIGTERM: "Terminated.", signal.SIGHUP: "Hung up."}
REPEAT_S = 1.0
"""Signals that come within this time of the first are the same request: a terminal and `make` may both send one."""

_cancel: Callable[[], object] | None = None
_answer: Callable[[int], bool] | None = None
_received: tuple[int, float] | None = None


def install() -> None:
    """Handle the signals from now on."""
    for number in WORDS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _handle)


def ignore() -> None:
    """Ignore the signals: the work is done, and only the interpreter has yet to shut down."""
    for number in WORDS:
        signal.signal(number, signal.SIG_IGN)


def received() -> int | None:
    """The signal that was answered by cancelling; None when there was none."""
    return _received[0] if _received else None


def status() -> int:
    """The exit status that goes with `received`, or with a KeyboardInterrupt from elsewhere."""
    return 128 + (received() or signal.SIGINT)


def words() -> str:
    """One line for `received`, or for a KeyboardInterrupt from elsewhere."""
    return WORDS[received() or signal.SIGINT]


def cancel_with(cancel: Callable[[], object] | None) -> None:
    """From now on the first signal calls `cancel`; with None, any signal ends the process on the spot."""
    global _cancel
    _cancel = cancel


def answer_with(answer: Callable[[int], bool] | None) -> None:
    """From now on ask `answer` about each signal first; what it returns True for has no other effect."""
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
        line = "Stopped at once. `agentkit doctor --reap` removes sandboxes that were left behind."
    else:
        line = WORDS[number]
    try:
        sys.stdout.flush()
        if os.isatty(1):
            os.write(1, b"\x1b[?25h")  # a progress display hides the cursor
        os.write(2, f"{line}\n".encode())
    except Exception:  # a closed stream, or one that this signal interrupted while it was written
        pass
    os._exit(128 + number)
