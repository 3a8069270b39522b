"""Prefix cache: checkpoints, found by the ids they were computed from.

A checkpoint is a frozen sequence (`state.py`): a fork that is never extended. The chain of hashes of its full spans
leads to a node; within a node, the ids after the last full span tell checkpoints apart. A session may also resume from
a checkpoint that is a few ids longer than their common prefix, as far as the rings reach back.

Eviction starts with the checkpoints that save only part of a turn, least recently used first. The ends of turns, shared
prefixes and the checkpoints of long prompts follow, also least recently used first. Resuming from a checkpoint counts
as a use of all shorter ones on its path, so the end of a branch is evicted before the prefix it shares with others.
Live sessions hold their own sequences, which eviction never touches.

Where the pools have host memory, an evicted checkpoint moves there first, and is found there. It is dropped once host
memory is full of checkpoints that come later in this order.

Dimension key: `runtime/__init__.py`.
"""

from __future__ import annotations

import hashlib
import itertools
from array import array
from collections.abc import Callable, Iterable, Iterator
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from enum import IntEnum

from agentkit_engine.runtime.state import SPAN, Pools, Sequence


class Keep(IntEnum):
    """Value of a checkpoint; lower values are evicted first."""

    PROMPT = 0
    """The end of a prompt within a turn: saves one prompt if it is sent again."""
    TURN = 1
    """The end of a turn, a prefix that other sessions share, a checkpoint of a long prompt, or a prompt sent again."""


class IdChain:
    """Chained hashes of the full spans of a growing list of ids; each is computed once."""

    def __init__(self) -> None:
        self._hashes: list[bytes] = [b""]

    def upto(self, ids: Seq[int], spans: int) -> list[bytes]:
        """Hashes of the first 0, 1, ... `spans` full spans of `ids`."""
        while len(self._hashes) <= spans:
            start = (len(self._hashes) - 1) * SPAN
            block = array("I", ids[start : start + SPAN]).tobytes()
            self._hashes.append(hashlib.blake2b(self._hashes[-1] + block, digest_size=16).digest())
        return self._hashes[: spans + 1]

    def key(self, ids: Seq[int], length: int) -> bytes:
        """Hash of the first `length` ids."""
        full = length // SPAN
        tail = array("I", ids[full * SPAN : length]).tobytes()
        return hashlib.blake2b(self.upto(ids, full)[-1] + tail, digest_size=16).digest()

    def cut(self, length: int) -> None:
        """Discard the hashes that cover ids from `length` on."""
        del self._hashes[length // SPAN + 1 :]

    def copy(self) -> IdChain:
        chain = IdChain()
        chain._hashes = self._hashes.copy()
        return chain


@dataclass(eq=False, slots=True)
class Checkpoint:
    """A frozen sequence, found by its node and the ids after its last full span.

    Attributes:
        used: clock value of the last use.
        shared: whether more than one session used it.
        spill: called before its state is freed.
    """

    sequence: Sequence
    node: bytes
    tail: tuple[int, ...]
    keep: Keep
    used: int
    shared: bool = False
    spill: Callable[[], None] | None = None


class PrefixCache:
    """All checkpoints of one model, in the memory of its `Pools`."""

    def __init__(self, pools: Pools) -> None:
        self.pools = pools
        self._nodes: dict[bytes, list[Checkpoint]] = {}
        self._on_device: dict[Checkpoint, None] = {}
        self._on_host: dict[Checkpoint, None] = {}
        self._clock = itertools.count(1)

    def __len__(self) -> int:
        return len(self._on_device) + len(self._on_host)

    def __contains__(self, checkpoint: Checkpoint) -> bool:
        return checkpoint in self._on_device or checkpoint in self._on_host

    def find(self, ids: Seq[int], chain: IdChain) -> tuple[Checkpoint, int] | None:
        """Return the checkpoint that saves the most of `ids`, and how many of its tokens are usable.

        At least the last id is always computed, for its logits.
        """
        best: tuple[Checkpoint, int] | None = None
        for checkpoint in self._on_the_way(ids, chain):
            if best is not None and best[1] >= checkpoint.sequence.length:
                continue
            common = _common(ids, len(ids) - 1, checkpoint)
            if checkpoint.sequence.reaches(common) and (best is None or common > best[1]):
                best = (checkpoint, common)
        return best if best is not None and best[1] > 0 else None

    def take(self, ids: Seq[int], chain: IdChain) -> Sequence | None:
        """Return a new sequence with the longest prefix of `ids` that a checkpoint holds; None if there is none.

        Raises:
            OutOfMemoryError: there is no memory for the fork.
        """
        found = self.find(ids, chain)
        if found is None:
            return None
        checkpoint, length = found
        # before the fork, whose memory may have to come from other checkpoints
        checkpoint.used, checkpoint.keep = next(self._clock), Keep.TURN
        sequence = self.pools.branch(checkpoint.sequence)
        sequence.shorten(length)
        checkpoint.shared = True
        for other in self._on_the_way(ids, chain):
            if other is not checkpoint and other.sequence.length <= length:
                other.used = next(self._clock)
        return sequence

    def add(self, ids: Seq[int], chain: IdChain, sequence: Sequence, keep: Keep) -> Checkpoint:
        """Keep `sequence`, which holds the first `sequence.length` of `ids`; the cache owns it from now on.

        Returns:
            The checkpoint of these ids, which may have existed before.
        """
        full, length = sequence.length // SPAN, sequence.length
        node, tail = chain.upto(ids, full)[-1], tuple(ids[full * SPAN : length])
        here = self._nodes.setdefault(node, [])
        same = next((checkpoint for checkpoint in here if checkpoint.tail == tail), None)
        if same is not None:
            if same in self._on_host:
                sequence, same.sequence = same.sequence, sequence
                del self._on_host[same]
                self._on_device[same] = None
            self.pools.close(sequence)
            same.keep, same.used, same.shared = max(same.keep, keep), next(self._clock), True
            return same
        here.append(Checkpoint(sequence, node, tail, keep, next(self._clock)))
        self._on_device[here[-1]] = None
        return here[-1]

    def give_back(self, checkpoint: Checkpoint) -> Sequence | None:
        """Remove a checkpoint that only its owner used, and return its sequence, on the device.

        Returns None if the checkpoint is shared or was dropped.

        Raises:
            OutOfMemoryError: the checkpoint is in host memory, and the device has no room for it.
        """
        if checkpoint.shared or checkpoint not in self:
            return None
        checkpoint.used = next(self._clock)  # see `take`
        self.pools.promote(checkpoint.sequence)
        self._remove(checkpoint)
        return checkpoint.sequence

    def holds(self, ids: Seq[int], chain: IdChain, length: int) -> bool:
        """Return whether there is a checkpoint of exactly the first `length` ids."""
        full = length // SPAN
        here = self._nodes.get(chain.upto(ids, full)[-1], ())
        return any(checkpoint.tail == tuple(ids[full * SPAN : length]) for checkpoint in here)

    def evict(self, at_most: Keep = Keep.TURN, *, rank: int | None = None) -> bool:
        """Free the device's memory of the checkpoint with the lowest value, of one rank or of all; return False if none
        has a value of `at_most` or less."""
        victim = _lowest(self._on_device, rank)
        if victim is None or victim.keep > at_most:
            return False
        while not self.pools.demote(victim.sequence):
            may = self.pools.may_demote(victim.sequence)
            lowest = _lowest(self._on_host, victim.sequence.rank) if may else None
            if lowest is None or _value(lowest) > _value(victim):
                self._drop(victim)
                return True
            self._drop(lowest)
        del self._on_device[victim]
        self._on_host[victim] = None
        return True

    def clear(self) -> None:
        """Drop all checkpoints."""
        for checkpoint in sorted([*self._on_device, *self._on_host], key=_value):
            self._drop(checkpoint)

    def _drop(self, checkpoint: Checkpoint) -> None:
        if checkpoint.spill is not None:
            checkpoint.spill()
        self._remove(checkpoint)
        self.pools.close(checkpoint.sequence)

    def _remove(self, checkpoint: Checkpoint) -> None:
        here = self._nodes[checkpoint.node]
        here.remove(checkpoint)
        if not here:
            del self._nodes[checkpoint.node]
        self._on_device.pop(checkpoint, None)
        self._on_host.pop(checkpoint, None)

    def _on_the_way(self, ids: Seq[int], chain: IdChain) -> Iterator[Checkpoint]:
        """Yield the checkpoints that begin with full spans of `ids`, longest prefix first."""
        for node in reversed(chain.upto(ids, len(ids) // SPAN)):
            yield from self._nodes.get(node, ())


def _value(checkpoint: Checkpoint) -> tuple[Keep, int]:
    return checkpoint.keep, checkpoint.used


def _lowest(checkpoints: Iterable[Checkpoint], rank: int | None) -> Checkpoint | None:
    """Return the checkpoint of a rank, or of all, that is evicted first."""
    some = checkpoints if rank is None else (each for each in checkpoints if each.sequence.rank == rank)
    return min(some, key=_value, default=None)


def _common(ids: Seq[int], most: int, checkpoint: Checkpoint) -> int:
    """Length of the common prefix of a checkpoint and the first `most` ids; their full spans are known to agree."""
    start = checkpoint.sequence.length - len(checkpoint.tail)
    if checkpoint.tail and start < most and checkpoint.tail[0] != ids[start]:
        return start
    pairs = zip(ids[start : min(most, start + len(checkpoint.tail))], checkpoint.tail, strict=False)
    same = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
    return min(start + same, most)
