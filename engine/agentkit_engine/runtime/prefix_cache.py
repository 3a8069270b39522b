"""Checkpoints by the ids they were computed from, so that no session computes what another one has.

A checkpoint is a frozen sequence (`state.py`): a fork that nobody extends. It is found by its ids: the chain of hashes
of their full spans leads to a node, where the ids behind the last full span tell checkpoints apart. A session may take
one up that is a few ids longer than what they have in common, as far as the rings reach back.

What goes first when memory is short: checkpoints that only save part of a turn, least recently used first; then turn
ends, heads and the checkpoints of long prompts, least recently used first. Taking up a checkpoint also counts as use of
those that lie on the way to it, and for more: so the end of a branch goes before what it shares with others. Sessions
at work hold their own sequences, and no eviction touches those.

Dimension key: `runtime/__init__.py`.
"""

from __future__ import annotations

import hashlib
import itertools
from array import array
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from enum import IntEnum

from agentkit_engine.runtime.state import SPAN, Pools, Sequence


class Keep(IntEnum):
    """How long a checkpoint is worth keeping: lower ones are evicted first."""

    PROMPT = 0
    """The end of a prompt inside a turn: saves one prompt when it is asked again."""
    TURN = 1
    """The end of a turn, a head that others share, or one of the checkpoints of a long prompt."""


class IdChain:
    """The hash of every full span of a growing list of ids, each chained to the one before; computed once."""

    def __init__(self) -> None:
        self._hashes: list[bytes] = [b""]

    def upto(self, ids: Seq[int], spans: int) -> list[bytes]:
        """The hashes of the first 0, 1, ... `spans` full spans of `ids`."""
        while len(self._hashes) <= spans:
            start = (len(self._hashes) - 1) * SPAN
            block = array("I", ids[start : start + SPAN]).tobytes()
            self._hashes.append(hashlib.blake2b(self._hashes[-1] + block, digest_size=16).digest())
        return self._hashes[: spans + 1]

    def key(self, ids: Seq[int], length: int) -> bytes:
        """A hash of the first `length` of `ids`."""
        full = length // SPAN
        tail = array("I", ids[full * SPAN : length]).tobytes()
        return hashlib.blake2b(self.upto(ids, full)[-1] + tail, digest_size=16).digest()

    def cut(self, length: int) -> None:
        """Forget what covers ids from `length` on."""
        del self._hashes[length // SPAN + 1 :]

    def copy(self) -> IdChain:
        chain = IdChain()
        chain._hashes = self._hashes.copy()
        return chain


@dataclass(eq=False, slots=True)
class Checkpoint:
    """A frozen sequence, found by its node and the ids behind its last full span.

    Attributes:
        used: when it was last of use.
        shared: whether it was to more than one session.
        spill: what is done before its state is freed.
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
        self._clock = itertools.count(1)

    def __len__(self) -> int:
        return sum(len(found) for found in self._nodes.values())

    def __contains__(self, checkpoint: Checkpoint) -> bool:
        return checkpoint in self._nodes.get(checkpoint.node, ())

    def find(self, ids: Seq[int], chain: IdChain) -> tuple[Checkpoint, int] | None:
        """The checkpoint that saves most of `ids`, and how many of its tokens count.

        Never all of `ids`: the last one is computed for its logits.
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
        """A sequence of its own that starts with as many of `ids` as any checkpoint has, if one has any.

        Raises:
            OutOfMemoryError: there is no room for the fork.
        """
        found = self.find(ids, chain)
        if found is None:
            return None
        checkpoint, length = found
        sequence = self.pools.fork(checkpoint.sequence)
        sequence.shorten(length)
        checkpoint.used, checkpoint.shared = next(self._clock), True
        for other in self._on_the_way(ids, chain):
            if other is not checkpoint and other.sequence.length <= length:
                other.used = next(self._clock)
        return sequence

    def add(self, ids: Seq[int], chain: IdChain, sequence: Sequence, keep: Keep) -> Checkpoint:
        """Keep `sequence`, which holds the first `sequence.length` of `ids` and belongs to the cache from now on.

        Returns:
            The checkpoint of these ids; where there was one already, that one.
        """
        full, length = sequence.length // SPAN, sequence.length
        node, tail = chain.upto(ids, full)[-1], tuple(ids[full * SPAN : length])
        here = self._nodes.setdefault(node, [])
        same = next((checkpoint for checkpoint in here if checkpoint.tail == tail), None)
        if same is not None:
            self.pools.close(sequence)
            same.keep, same.used, same.shared = max(same.keep, keep), next(self._clock), True
            return same
        here.append(Checkpoint(sequence, node, tail, keep, next(self._clock)))
        return here[-1]

    def give_back(self, checkpoint: Checkpoint) -> Sequence | None:
        """The sequence of a checkpoint that only its maker had use of; the cache then no longer has it.

        None when it is shared, or was evicted meanwhile.
        """
        if checkpoint.shared or checkpoint not in self:
            return None
        self._remove(checkpoint)
        return checkpoint.sequence

    def holds(self, ids: Seq[int], chain: IdChain, length: int) -> bool:
        """Whether there is a checkpoint of exactly the first `length` of `ids`."""
        full = length // SPAN
        here = self._nodes.get(chain.upto(ids, full)[-1], ())
        return any(checkpoint.tail == tuple(ids[full * SPAN : length]) for checkpoint in here)

    def evict(self, at_most: Keep = Keep.TURN) -> bool:
        """Free the checkpoint that is worth least; False when none is worth `at_most` or less."""
        every = itertools.chain.from_iterable(self._nodes.values())
        victim = min(every, key=lambda checkpoint: (checkpoint.keep, checkpoint.used), default=None)
        if victim is None or victim.keep > at_most:
            return False
        if victim.spill is not None:
            victim.spill()
        self._remove(victim)
        self.pools.close(victim.sequence)
        return True

    def clear(self) -> None:
        while self.evict():
            pass

    def _remove(self, checkpoint: Checkpoint) -> None:
        here = self._nodes[checkpoint.node]
        here.remove(checkpoint)
        if not here:
            del self._nodes[checkpoint.node]

    def _on_the_way(self, ids: Seq[int], chain: IdChain) -> Iterator[Checkpoint]:
        """The checkpoints that start with full spans of `ids`, those with most of them first."""
        for node in reversed(chain.upto(ids, len(ids) // SPAN)):
            yield from self._nodes.get(node, ())


def _common(ids: Seq[int], most: int, checkpoint: Checkpoint) -> int:
    """How many ids a checkpoint has in common with the first `most` of `ids`; its full spans are known to agree."""
    start = checkpoint.sequence.length - len(checkpoint.tail)
    if checkpoint.tail and start < most and checkpoint.tail[0] != ids[start]:
        return start
    pairs = zip(ids[start : min(most, start + len(checkpoint.tail))], checkpoint.tail, strict=False)
    same = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
    return min(start + same, most)
