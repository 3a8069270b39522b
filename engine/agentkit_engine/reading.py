"""Text of sampled ids, for display: whole characters only, and nothing of a stop text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from agentkit_engine.chat import Tokenizer
from agentkit_engine.sampler import SampledToken
from agentkit_engine.sampling_params import SamplingParams


class StopFilter:
    """Passes text on up to the first stop text, and holds back what may be the beginning of one.

    The first stop text is the one that ends first; among those that end together, the longest.
    """

    def __init__(self, stop: Sequence[str]) -> None:
        self.stopped = False
        self._stop = sorted(stop, key=len, reverse=True)
        self._most_held = len(self._stop[0]) - 1 if stop else 0
        self._held = ""

    def feed(self, text: str) -> str:
        """Return the text that can be shown now; nothing once `stopped`."""
        if self.stopped:
            return ""
        self._held += text
        ends = [(at + len(stop), at) for stop in self._stop if (at := self._held.find(stop)) >= 0]
        if ends:
            self.stopped = True
            shown, self._held = self._held[: min(ends)[1]], ""
            return shown
        longest = min(len(self._held), self._most_held)
        keep = next((n for n in range(longest, 0, -1) if self._may_begin(self._held[-n:])), 0)
        shown, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return shown

    def finish(self) -> str:
        """Return the text that was held back, when nothing follows it."""
        held, self._held = self._held, ""
        return held

    def _may_begin(self, text: str) -> bool:
        return any(stop.startswith(text) for stop in self._stop)


class Reader:
    """Adds text to the tokens of one generation, and detects stop texts."""

    def __init__(self, tokenizer: Tokenizer | None, params: SamplingParams) -> None:
        """Without a `tokenizer` tokens have no text; stop texts require one, which the caller checks."""
        self._stream = None if tokenizer is None else tokenizer.stream()
        self._filter = StopFilter(params.stop)
        self._stop_ids = params.stop_token_ids

    @property
    def stopped(self) -> bool:
        """True if a stop text is complete."""
        return self._filter.stopped

    def read(self, token: SampledToken, *, last: bool) -> SampledToken:
        """Return the token with its text. The `last` token includes the text held back; a stop id adds no text."""
        if self._stream is None:
            return token
        text = "" if token.id in self._stop_ids else self._filter.feed(self._stream.feed(token.id))
        if last and not self.stopped:
            text += self._filter.feed(self._stream.finish())
            text += self._filter.finish()
        return replace(token, text=text) if text else token
