"""Drafts for speculative decoding: guesses at the next ids, checked by the forward that computes the current one.

Agents copy: names from a file into a call, a call's frame from the one before. So the ids that followed the last time
when the same few ids stood at the end are a good guess (prompt lookup; Saxena 2023, "Prompt lookup decoding"). The MTP
block of a model that has one guesses the next id where there is nothing to look up. The id at a position is a function
of logits, seed and position alone, and logits do not depend on what shares a forward: so what is sampled is bit for bit
what it is without drafts.

A draft costs rows in a forward that is made anyway: next to nothing where the weights are what takes time, a good part
of a forward where arithmetic is. So it is as long as makes the most of the time, by how often guesses were right.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace

LONGEST = 8
"""Ids of a draft at most."""
NGRAMS = (4, 2)
"""How many last ids must have occurred before, tried in this order."""
REACH = 16_384
"""How many ids back a text is looked through at least, and twice as many at most."""
PATIENCE = 8
"""Where guesses do not pay, this many ids are decoded without one before one is tried again."""
ROW_COST, BLOCK_COST = 0.2, 0.5
"""What a drafted id and asking the MTP block cost, as parts of a forward of one row: with these they save forwards of
the packaged model on a CPU and hardly cost time (benchmark `speculation`)."""
MEMORY = 0.8
"""What each draft leaves of the weight of those before it."""


@dataclass(slots=True)
class Odds:
    """How often guesses of one kind were right, the latest counting most."""

    right: float = 1.5
    tried: float = 2.0

    @property
    def chance(self) -> float:
        return self.right / self.tried

    def note(self, right: int, tried: int) -> None:
        self.right, self.tried = MEMORY * self.right + right, MEMORY * self.tried + tried


def best_length(chance: float, cost: float, most: int) -> int:
    """The draft length that gives most ids for the time, 0 if none does; `cost` is that of a row.

    A draft of k ids gives 1 + p + ... + p^k ids for the time of 1 + k * cost forwards.
    """
    best, best_rate, ids, power = 0, 1.0, 1.0, 1.0
    for length in range(1, most + 1):
        power *= chance
        ids += power
        if ids / (1 + length * cost) > best_rate:
            best, best_rate = length, ids / (1 + length * cost)
    return best


class Drafter:
    """Guesses how one session goes on, and learns how far its guesses may go."""

    def __init__(self) -> None:
        self._after: tuple[dict[int, int], ...] = tuple({} for _ in NGRAMS)  # by hash: a wrong guess does no harm
        self._since = self._indexed = 0  # from which id on, and up to which, the tables know what followed
        self._odds = [Odds() for _ in NGRAMS]  # of ids that followed so many last ids
        self._rests = [0 for _ in NGRAMS]
        self._block, self._block_rest = Odds(), 0
        self._kind: int | None = None  # of which n-gram the last draft was; None for one of the MTP block
        self._proposed = self._accepted = 0

    def fork(self, ids: Sequence[int]) -> Drafter:
        """One that knows as much, for a session with the same `ids`."""
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
        """Whether to ask the MTP block for the next id: nothing better is at hand, and its guesses pay."""
        self._learn()
        self._index(ids)
        if any(not rest and self._follow(ids, kind, 1) for kind, rest in enumerate(self._rests)):
            return False
        if self._block_rest:
            self._block_rest -= 1
            return False
        return True

    def propose(self, ids: Sequence[int], most: int, first: int | None = None) -> list[int]:
        """Up to `most` (at least 1) ids that may follow; `first` alone where that is given.

        There are none when nothing like the end occurred before, or guesses do not pay.
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
        """The next id of the draft was right."""
        self._accepted += 1

    def _follow(self, ids: Sequence[int], kind: int, count: int) -> list[int]:
        """The `count` ids that followed the last time when `ids` ended alike; none if they never did."""
        at = self._after[kind].get(hash(tuple(ids[-NGRAMS[kind] :])), len(ids))
        if at == len(ids):
            return []
        return list(itertools.islice(itertools.cycle(ids[at : at + count]), count))  # up to here: it is what repeats

    def _learn(self) -> None:
        """What the last draft tells: ids up to the first wrong one were tried, and no more."""
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
        """Take in the ids that have a successor. Ids that were cut meanwhile leave wrong guesses, which do no harm."""
        if len(ids) - self._since > 2 * REACH:  # else they would grow with the session
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
