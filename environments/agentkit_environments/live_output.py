"""Output of a command while it runs, as text for the caller of `Environment.exec`."""

from __future__ import annotations

from codecs import getincrementaldecoder
from collections.abc import Callable
from typing import TYPE_CHECKING, Literal

import anyio

if TYPE_CHECKING:
    from agentkit_environments.environment import ExecResult

OutputStream = Literal["stdout", "stderr"]

OnOutput = Callable[[OutputStream, str], None]
"""Called with new output of a command."""

OnChunk = Callable[[OutputStream, bytes], None]
"""Called by a backend with the next bytes of a stream. Never raises."""

CHUNK_EVERY_S = 0.05
"""Seconds for which output is gathered, as in the executors. A shorter command sends no chunk."""


class LiveOutput:
    """Decodes chunks for an `OnOutput`, and completes them with the result.

    Chunks are the beginning of what the result keeps of a stream, so that all calls together give the result's text.
    """

    def __init__(self, on_output: OnOutput) -> None:
        self._on_output = on_output
        self._decoders = {name: getincrementaldecoder("utf-8")("replace") for name in ("stdout", "stderr")}
        self._shown = {"stdout": 0, "stderr": 0}  # characters
        self.scope = anyio.CancelScope()
        """Cancelled if the caller's function raises."""
        self.error: BaseException | None = None

    def chunk(self, stream: OutputStream, data: bytes) -> None:
        """Take the next bytes of a stream; an `OnChunk`."""
        if self.error is None:
            try:
                self._show(stream, self._decoders[stream].decode(data))
            except BaseException as error:  # whoever calls this may be another request's task
                self.error = error
                self.scope.cancel()

    def complete(self, result: ExecResult) -> None:
        """Show what the result has and no chunk has had."""
        self._show("stdout", result.stdout[self._shown["stdout"] :])
        self._show("stderr", result.stderr[self._shown["stderr"] :])

    def _show(self, stream: OutputStream, text: str) -> None:
        if text:
            self._shown[stream] += len(text)
            self._on_output(stream, text)
