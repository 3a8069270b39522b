"""Drafts for speculative decoding: guesses at the next ids, checked by the forward that computes the current one.

Agents copy: names from a file into a call, a call's frame from the one before. So the ids that followed the last time
when the same few ids stood at the end are a good guess (prompt lookup; Saxena 2023, "Prompt lookup decoding"). A draft
costs rows in a forward that is made anyway. The id at a position is a function of logits, seed and position alone, and
logits do not depend on what shares a forward: so what is sampled is bit for bit what it is without drafts.
"""

from __future__ import annotations

from collections.abc import Sequence

LONGEST = 8
"""Ids of a draft at most."""
NGRAMS = (4, 2)
"""How many last ids must have occurred before, tried in this order."""
REACH = 16_384
"""How many ids back a prompt is looked through when a session begins."""
PATIENCE = 8
"""After drafts that were all wrong, this many ids are decoded without one."""


class Drafter:
    """Guesses how one session goes on, and learns how far its guesses may go."""

    def __init__(self) -> None:
        self._after: tuple[dict[tuple[int, ...], int], ...] = tuple({} for _ in NGRAMS)
        self._indexed = 0
        self._length = 2
        self._proposed = self._accepted = 0
        self._rest = 0

    def propose(self, ids: Sequence[int], most: int) -> list[int]:
        """Up to `most` ids that may follow; none when nothing like the end occurred before, or guesses fail."""
        self._adapt()
        self._index(ids)
        if self._rest:
            self._rest -= 1
            return []
        for n, after in zip(NGRAMS, self._after, strict=True):
            at = after.get(tuple(ids[-n:]), len(ids))
            if at < len(ids):
                period = len(ids) - at  # what followed may reach up to here: then it is what repeats
                draft = [ids[at + index % period] for index in range(min(self._length, most))]
                self._proposed = len(draft)
                return draft
        return []

    def accepted(self) -> None:
        """The next id of the draft was right."""
        self._accepted += 1

    def _adapt(self) -> None:
        """Twice as far after a draft that was right to its end, else one further than it was right."""
        if self._proposed:
            right = self._accepted == self._proposed
            self._length = min(2 * self._length, LONGEST) if right else self._accepted + 1
            self._rest = 0 if self._accepted else PATIENCE
        self._proposed = self._accepted = 0

    def _index(self, ids: Sequence[int]) -> None:
        """Take in the ids that have a successor. Ids that were cut meanwhile leave wrong guesses, which do no harm."""
        for end in range(max(self._indexed, len(ids) - REACH, 1), len(ids)):
            for n, after in zip(NGRAMS, self._after, strict=True):
                if end >= n:
                    after[tuple(ids[end - n : end])] = end
        self._indexed = len(ids)
