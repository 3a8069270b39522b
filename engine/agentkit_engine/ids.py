"""A growing list of token ids whose forks share their common prefix."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import overload

BLOCK = 4096
"""Ids per full block. A full block never changes, so forks can share it."""


class Ids(Sequence[int]):
    """Ids in blocks. A fork copies the last block, and a reference to each full one.

    Attributes:
        last: the last 1 to `BLOCK` ids, for fast access.
    """

    __slots__ = ("_full", "last")

    def __init__(self, ids: Iterable[int] = ()) -> None:
        self._full: list[list[int]] = []
        self.last: list[int] = []
        self.extend(ids)

    def __len__(self) -> int:
        return len(self._full) * BLOCK + len(self.last)

    def __iter__(self) -> Iterator[int]:
        return itertools.chain(*self._full, self.last)

    @overload
    def __getitem__(self, index: int) -> int: ...
    @overload
    def __getitem__(self, index: slice) -> list[int]: ...
    def __getitem__(self, index: int | slice) -> int | list[int]:
        before = len(self._full) * BLOCK
        if isinstance(index, int):
            index += len(self) if index < 0 else 0
            if not 0 <= index < len(self):
                raise IndexError(f"found index {index}, expected one of {len(self)} ids")
            return self.last[index - before] if index >= before else self._full[index // BLOCK][index % BLOCK]
        start, stop, step = index.indices(len(self))
        if start >= before and step > 0:
            return self.last[start - before : max(start, stop) - before : step]
        if step != 1:
            return list(self)[index]
        first = start // BLOCK
        if start < stop <= (first + 1) * BLOCK:
            return self._full[first][start - first * BLOCK : stop - first * BLOCK]
        blocks = (*self._full[first : max(0, stop - 1) // BLOCK + 1], self.last)
        some = itertools.chain(*blocks)
        return list(itertools.islice(some, start - first * BLOCK, max(start, stop) - first * BLOCK))

    def append(self, token_id: int) -> None:
        if len(self.last) == BLOCK:
            self._full.append(self.last)
            self.last = []
        self.last.append(token_id)

    def extend(self, ids: Iterable[int]) -> None:
        some = [*self.last, *ids]
        full = max(0, len(some) - 1) // BLOCK * BLOCK
        self._full += [some[start : start + BLOCK] for start in range(0, full, BLOCK)]
        self.last = some[full:]

    def cut(self, length: int) -> None:
        """Remove the ids from `length` on."""
        full = max(0, length - 1) // BLOCK
        if full < len(self._full):
            self.last = self._full[full].copy()
            del self._full[full:]
        del self.last[length - full * BLOCK :]

    def fork(self) -> Ids:
        fork = Ids()
        fork._full, fork.last = self._full.copy(), self.last.copy()
        return fork
