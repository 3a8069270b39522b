"""The last lines that running commands have written, drawn on a terminal until their results are printed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from agentkit.cli.terminal import visible_line

if TYPE_CHECKING:
    from rich.console import Console
    from rich.live import Live

    from agentkit.events import Event

LINES: Final = 6
TAIL_CHARS: Final = 4096
"""Characters kept of the output of each call."""


class LiveLines:
    """Draws the output of running calls below what was printed, and removes it before anything else is printed.

    Nothing is drawn without a terminal, or where a human may be asked about a call, because other calls may run
    meanwhile.
    """

    def __init__(self, console: Console, *, asks: bool) -> None:
        self._console = console
        self._draws = console.is_terminal and not console.is_dumb_terminal and not asks
        self._tails: dict[str, str] = {}  # by call, the latest last
        self._live: Live | None = None
        self._at_line_start = False

    def hear(self, event: Event) -> None:
        """Draw output of a call. Before any other event, which may be printed next, remove what is drawn."""
        from agentkit.events import CallFinished, CallOutput, CallStarted, TurnFinished
        from agentkit.model import ReasoningDelta, TextDelta

        if isinstance(event, CallOutput):
            self._tails[event.call_id] = (self._tails.pop(event.call_id, "") + event.text)[-TAIL_CHARS:]
            if self._draws and self._at_line_start:
                self._draw()
            return
        self.remove()
        match event:
            case CallStarted():
                self._at_line_start = True
            case CallFinished():
                self._at_line_start = True
                self._tails.pop(event.result.call_id, None)
            case ReasoningDelta() | TextDelta():
                self._at_line_start = False
            case TurnFinished():
                self._tails.clear()

    def remove(self) -> None:
        """Remove what is drawn."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    def _draw(self) -> None:
        from rich.live import Live
        from rich.text import Text

        lines = [line for tail in self._tails.values() for line in tail.removesuffix("\n").split("\n")]
        # as on a terminal, a carriage return starts the line again
        shown = "\n".join(visible_line(line.rstrip("\r").rpartition("\r")[2]) for line in lines[-LINES:])
        text = Text(shown, "dim", no_wrap=True, overflow="ellipsis")
        if self._live is None:
            self._live = Live(
                console=self._console,
                auto_refresh=False,
                transient=True,
                redirect_stdout=False,
                redirect_stderr=False,
            )
            self._live.start()
        self._live.update(text, refresh=True)
