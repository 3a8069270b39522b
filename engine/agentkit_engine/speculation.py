"""Drafts for speculative decoding: guesses at the next ids, checked by the forward that computes the current one.

Agents copy: names from a file into a call, a call's frame from the one before. So the ids that followed the last time
when the same few ids stood at the end are a good guess (prompt lookup; Saxena 2023, "Prompt lookup decoding"). The MTP
block of a model that has one guesses the next id, and the lookup goes on from there. A draft costs rows in a forward
that is made anyway. The id at a position is a function of logits, seed and position alone, and logits do not depend on
what shares a forward: so what is sampled is bit for bit what it is without drafts.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

LONGEST = 8
"""Ids of a draft at most."""
NGRAMS = (4, 2)
"""How many last ids must have occurred before, tried in this order."""
REACH = 16_384
"""How many ids back a prompt is looked through when a session begins."""
PATIENCE = 8
"""After drafts that were all wrong, this many ids are decoded without one."""
MISSES = 4
"""After so many wrong guesses in a row, and each that follows, the MTP block is not asked for `PATIENCE` forwards."""


class Drafter:
    """Guesses how one session goes on, and learns how far its guesses may go."""

    def __init__(self) -> None:
        self._after: tuple[dict[tuple[int, ...], int], ...] = tuple({} for _ in NGRAMS)
        self._indexed = 0
        self._length = 2
        self._proposed = self._accepted = 0
        self._rest = 0
        self._asked = False  # whether the last draft began with a guess of the MTP block
        self._misses = self._asking_rest = 0

    def asks(self) -> bool:
        """Whether to ask the MTP block for the first id of the next draft."""
        self._adapt()
        if self._asking_rest:
            self._asking_rest -= 1
            return False
        return True

    def propose(self, ids: Sequence[int], most: int, first: int | None = None) -> list[int]:
        """Up to `most` (at least 1) ids that may follow, the first of them `first` where that is given.

        Without it there are none when nothing like the end occurred before, or guesses fail.
        """
        self._adapt()
        self._index(ids)
        length = min(self._length, most)
        if first is not None:
            draft = [first, *self._follow(ids, [first], length - 1)]
        elif self._rest:
            self._rest -= 1
            return []
        else:
            draft = self._follow(ids, [], length)
        self._proposed, self._asked = len(draft), first is not None
        return draft

    def accepted(self) -> None:
        """The next id of the draft was right."""
        self._accepted += 1

    def _follow(self, ids: Sequence[int], guessed: list[int], count: int) -> list[int]:
        """The `count` ids that followed the last time when `ids` and `guessed` ended alike; none if they never did."""
        last = [*ids[-NGRAMS[0] :], *guessed]
        for n, after in zip(NGRAMS, self._after, strict=True):
            at = after.get(tuple(last[-n:]), len(ids))
            if at < len(ids):  # what followed may reach up to here: then it is what repeats
                return list(itertools.islice(itertools.cycle([*ids[at : at + count], *guessed]), count))
        return []

    def _adapt(self) -> None:
        """Twice as far after a draft that was right to its end, else one further than it was right.

        A wrong guess of the MTP block says nothing of how far what follows would have been right.
        """
        if self._proposed:
            if self._proposed == self._accepted:
                self._length = min(2 * self._length, LONGEST) if self._proposed >= self._length else self._length
            elif self._accepted or not self._asked:
                self._length = self._accepted + 1
            if self._asked:
                self._misses = 0 if self._accepted else self._misses + 1
                self._asking_rest = PATIENCE if self._misses >= MISSES else 0
            else:
                self._rest = 0 if self._accepted else PATIENCE
        self._proposed = self._accepted = 0

    def _index(self, ids: Sequence[int]) -> None:
        """Take in the ids that have a successor. Ids that were cut meanwhile leave wrong guesses, which do no harm."""
        for end in range(max(self._indexed, len(ids) - REACH, 1), len(ids)):
            for n, after in zip(NGRAMS, self._after, strict=True):
                if end >= n:
                    after[tuple(ids[end - n : end])] = end
        self._indexed = len(ids)
