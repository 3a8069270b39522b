"""Drafts for speculative decoding: guesses at the next ids, which the forward of the current id verifies.

Agents repeat themselves: names from a file in a call, the frame of one call in the next. So the ids that followed the
last occurrence of the same n-gram are a good draft (prompt lookup; Saxena 2023, "Prompt lookup decoding"). Where there
is no occurrence, a model's MTP block guesses the next id. The id at a position depends on logits, seed and position
only, and logits do not depend on the batch, so the sampled ids are bit for bit the same with and without drafts.

A draft adds rows to a forward. They cost next to nothing where reading the weights dominates, and much where arithmetic
does. The draft length therefore maximises ids per time, given how often recent drafts were accepted.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace

LONGEST = 8
"""Maximum number of ids in a draft."""
NGRAMS = (4, 2)
"""Lengths of the n-grams to look up, in this order."""
REACH = 16_384
"""Minimum number of ids that the lookup covers; the maximum is twice as many."""
PATIENCE = 8
"""Number of ids decoded without a draft, after drafts stopped paying, before the next attempt."""
ROW_COST, BLOCK_COST = 0.2, 0.5
"""Cost of a draft id and of asking the MTP block, in forwards of one row. With these values drafts save forwards of the
packaged model on a CPU and hardly cost time (benchmark `speculation`)."""
MEMORY = 0.8
"""Factor by which each draft reduces the weight of earlier ones."""


@dataclass(slots=True)
class Odds:
    """Acceptance rate of one kind of draft; recent drafts count most."""

    right: float = 1.5
    tried: float = 2.0

    @property
    def chance(self) -> float:
        return self.right / self.tried

    def note(self, right: int, tried: int) -> None:
        self.right, self.tried = MEMORY * self.right + right, MEMORY * self.tried + tried


def best_length(chance: float, cost: float, most: int) -> int:
    """Return the draft length with the most ids per time, or 0 if no draft pays; `cost` is the cost of a row.

    A draft of k ids gives 1 + p + ... + p^k ids in the time of 1 + k * cost forwards.
    """
    best, best_rate, ids, power = 0, 1.0, 1.0, 1.0
    for length in range(1, most + 1):
        power *= chance
        ids += power
        if ids / (1 + length * cost) > best_rate:
            best, best_rate = length, ids / (1 + length * cost)
    return best


class Drafter:
    """Drafts the next ids of one session, and adapts the length of its drafts."""

    def __init__(self) -> None:
        # keyed by hash: a collision only causes a wrong guess
        self._after: tuple[dict[int, int], ...] = tuple({} for _ in NGRAMS)
        self._since = self._indexed = 0  # range of ids that the tables cover
        self._odds = [Odds() for _ in NGRAMS]  # one per n-gram length
        self._rests = [0 for _ in NGRAMS]
        self._block, self._block_rest = Odds(), 0
        self._kind: int | None = None  # index of the last draft's n-gram length; None for the MTP block
        self._proposed = self._accepted = 0

    def fork(self, ids: Sequence[int]) -> Drafter:
        """Return a drafter with the same tables and rates, for a session with the same `ids`."""
        self._index(ids)
        fork = Drafter()
        fork._after, fork._since, fork._indexed = (
            tuple(after.copy() for after in self._after),
            self._since,
            self._indexed,
        )
        fork._odds, fork._block = [replace(odds) for odds in self._odds], replace(self._block)
        return fork

    def asks(self, ids: Sequence[int]) -> bool:
        """Return whether to ask the MTP block for the next id: no n-gram matches, and its guesses pay."""
        self._learn()
        self._index(ids)
        if any(not rest and self._follow(ids, kind, 1) for kind, rest in enumerate(self._rests)):
            return False
        if self._block_rest:
            self._block_rest -= 1
            return False
        return True

    def propose(self, ids: Sequence[int], most: int, first: int | None = None) -> list[int]:
        """Return up to `most` (at least 1) ids that may follow; only `first` where it is given.

        Returns no ids if no n-gram matches or drafts do not pay.
        """
        self._learn()
        self._index(ids)
        draft, self._kind = [] if first is None else [first], None
        for kind, odds in enumerate(self._odds):
            if not draft and not self._rests[kind]:
                length = max(1, best_length(odds.chance, ROW_COST, LONGEST))
                draft, self._kind = self._follow(ids, kind, min(length, most)), kind
        self._rests = [max(0, rest - 1) for rest in self._rests]
        self._proposed = len(draft)
        return draft

    def accepted(self) -> None:
        """Count the next id of the draft as accepted."""
        self._accepted += 1

    def _follow(self, ids: Sequence[int], kind: int, count: int) -> list[int]:
        """Return the `count` ids after the last occurrence of the current n-gram; none without an occurrence."""
        at = self._after[kind].get(hash(tuple(ids[-NGRAMS[kind] :])), len(ids))
        if at == len(ids):
            return []
        # the ids between the two occurrences repeat
        return list(itertools.islice(itertools.cycle(ids[at : at + count]), count))

    def _learn(self) -> None:
        """Update the rates: the last draft's ids up to the first wrong one were tried, the rest were not."""
        proposed, accepted = self._proposed, self._accepted
        self._proposed = self._accepted = 0
        if not proposed:
            return
        tried = min(proposed, accepted + 1)
        if self._kind is None:
            self._block.note(accepted, tried)
            self._block_rest = 0 if self._block.chance > ROW_COST + BLOCK_COST else PATIENCE
        else:
            odds = self._odds[self._kind]
            odds.note(accepted, tried)
            self._rests[self._kind] = 0 if best_length(odds.chance, ROW_COST, LONGEST) else PATIENCE

    def _index(self, ids: Sequence[int]) -> None:
        """Index the ids that have a successor. Ids that were cut since only cause wrong guesses."""
        if len(ids) - self._since > 2 * REACH:  # keeps the tables bounded
            self._after, self._since = tuple({} for _ in NGRAMS), len(ids) - REACH
            self._indexed = self._since
        first = max(self._indexed, 1)
        begin = max(0, first - max(NGRAMS))
        recent = ids[begin:]
        for end in range(first, len(ids)):
            for n, after in zip(NGRAMS, self._after, strict=True):
                if end >= n:
                    after[hash(tuple(recent[end - n - begin : end - begin]))] = end
        self._indexed = len(ids)
