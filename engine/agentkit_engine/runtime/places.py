"""Numbered places of a pool, and the number of sequences that hold each."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable


class Places:
    """`count` places, numbered from `first` on.

    Attributes:
        holders: number of sequences that hold each place in use.
    """

    def __init__(self, count: int, *, first: int = 0) -> None:
        self.count = count
        self.holders: Counter[int] = Counter()
        self._end = first + count
        self._next = first  # places from here on have never been used
        self._freed: list[int] = []

    @property
    def free(self) -> int:
        return len(self._freed) + self._end - self._next

    @property
    def used(self) -> int:
        return self.count - self.free

    def take(self) -> int:
        """Return a free place, which then has one holder; there must be one."""
        if self._freed:
            place = self._freed.pop()
        else:
            assert self._next < self._end, f"all {self.count} places are taken"
            place = self._next
            self._next += 1
        self.holders[place] = 1
        return place

    def hold(self, places: Iterable[int]) -> None:
        """Add a holder to each place, all of which are in use."""
        self.holders.update(places)

    def release(self, place: int) -> bool:
        """Remove a holder; return whether it was the last one, and the place is free now."""
        self.holders[place] -= 1
        if self.holders[place]:
            return False
        del self.holders[place]
        self._freed.append(place)
        return True
