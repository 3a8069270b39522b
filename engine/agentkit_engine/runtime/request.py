"""The computation of one session: its ids, and the state computed from them so far.

State derives from ids alone, so the scheduler may drop it when memory is short and compute it again later. Forwards
give the same bits in any batch, so the session cannot tell. For the same reason a request may start from the state of
another one in the prefix cache.

Dimension key: `runtime/__init__.py`.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass

from torch import Tensor

from agentkit_engine.ids import Ids
from agentkit_engine.runtime.prefix_cache import Checkpoint, IdChain
from agentkit_engine.runtime.scheduled import Computed
from agentkit_engine.runtime.state import Sequence
from agentkit_engine.speculation import Drafter

CHECKPOINT_EVERY = 8192
"""Tokens between two checkpoints within a long prompt."""


@dataclass(frozen=True, slots=True)
class PromptUsage:
    """Prompt tokens found in the prefix cache and prompt tokens computed; each token counts once."""

    hit_tokens: int = 0
    miss_tokens: int = 0


class Request:
    """The ids of one session and the state computed from them.

    Attributes:
        ids: all ids, computed or not.
        length: number of ids.
        priority: requests with a higher priority are prefilled first and keep their state longer.
        last_step: the step in which the request last took part in a forward.
        checkpointed: the length at which a checkpoint was last taken or resumed from.
        jumped: whether a grammar forced the ids that were fed last.
        parked: the checkpoint that holds the state while the session is parked.
    """

    def __init__(self, ids: Seq[int] = (), fed: Seq[int] | None = None, *, priority: int = 0) -> None:
        """`fed` holds 1 for each id that was fed and 0 for each that was sampled; by default all ids were fed."""
        self.ids = ids.fork() if isinstance(ids, Ids) else Ids(ids)
        self.length = len(self.ids)
        self.priority = priority
        self.sequence: Sequence | None = None
        self.last_step = -1
        self.chain = IdChain()
        self.checkpointed = 0
        self.jumped = False
        self.parked: Checkpoint | None = None
        self.drafter = Drafter()
        self._said: Computed | None = None  # output of the forward that computed the last id, or sampled it
        self._row = 0
        self._fresh = False  # whether that row holds the logits after the last id
        self._drafted: Seq[int] = ()  # draft ids of the rows after this one
        self._fed = bytearray(b"\1" * len(self.ids) if fed is None else fed)
        self._marks: list[int] = []
        self._counted = self._hits = self._misses = 0

    @property
    def logits_V(self) -> Tensor | None:
        """Logits after the last id; None while ids are pending."""
        return self._said.logits_RV[self._row] if self._fresh and self._said is not None else None

    @property
    def streams_MD(self) -> Tensor | None:
        """Residual streams behind `logits_V`, or those from which the last id was sampled."""
        return None if self._said is None else self._said.streams_RMD[self._row]

    @property
    def usage(self) -> PromptUsage:
        """Cache hits and misses among the ids that were fed."""
        return PromptUsage(self._hits, self._misses)

    @property
    def computed(self) -> int:
        return 0 if self.sequence is None else self.sequence.length

    @property
    def fed(self) -> bytes:
        """1 for each id that was fed, 0 for each that was sampled."""
        return bytes(self._fed)

    def past(self) -> tuple[list[int], list[int]]:
        """All ids, and the sampled ones among them."""
        return list(self.ids), [token_id for token_id, fed in zip(self.ids, self._fed, strict=True) if not fed]

    @property
    def pending(self) -> int:
        """Number of ids that still have to be computed before there are logits."""
        return self.length - self.computed

    def extend(self, ids: Seq[int]) -> None:
        """Append ids that are fed."""
        if ids:
            self.ids.extend(ids)
            self.length += len(ids)
            self._fed += b"\1" * len(ids)
            self.jumped = False
            self.forget()

    def push(self, token_id: int, *, forced: bool = False) -> None:
        """Append an id that was sampled or that a grammar forced. If it was the next draft id, its state and the logits
        after it are already computed.
        """
        self.ids.append(token_id)
        self.length += 1
        self._fed.append(forced)
        self.jumped = forced
        drafted, self._drafted = self._drafted, ()
        self._fresh = self.sequence is not None and bool(drafted) and drafted[0] == token_id
        if self.sequence is not None and self._fresh:
            self.drafter.accepted()
            self.sequence.length += 1
            self.count(self.sequence.length - 1, self.sequence.length, hit=False)
            self._row, self._drafted = self._row + 1, drafted[1:]
        elif forced:
            self._said = None

    @property
    def guessable(self) -> bool:
        """True if a single id is pending and that id was sampled."""
        return self.pending == 1 and not self._fed[-1]

    def draft(self, most: int, first: int | None = None) -> list[int]:
        """Draft up to `most` ids; `first` is the MTP block's guess at the next id, if it was asked."""
        return self.drafter.propose(self.ids, most, first) if self.guessable else []

    def mark(self) -> None:
        """Request a checkpoint at the current length, once it is computed."""
        self._marks.append(self.length)
        if self.sequence is not None:
            self.sequence.steady_until = 0

    def marked(self, length: int) -> bool:
        return length in self._marks

    def next_stop(self) -> int:
        """The length at which the next forward has to end at the latest, so that a checkpoint can be taken there."""
        long = (self.computed // CHECKPOINT_EVERY + 1) * CHECKPOINT_EVERY
        return min((mark for mark in self._marks if mark > self.computed), default=long)

    def goals(self) -> set[bytes]:
        """Hashes under which the cache will find this request once it is computed: of each mark, and of all ids."""
        lengths = {mark for mark in self._marks if mark > self.computed} | {self.length}
        return {self.chain.key(self.ids, length) for length in lengths}

    def cut(self, length: int) -> None:
        """Remove the ids from `length` on."""
        self.ids.cut(length)
        self.length = length
        del self._fed[length:]
        self.chain.cut(length)
        self.forget()
        self._marks = [mark for mark in self._marks if mark <= length]
        self._counted, self.checkpointed = min(self._counted, length), min(self.checkpointed, length)
        if self.parked is not None and self.parked.sequence.length >= length:
            self.parked = None

    def count(self, start: int, end: int, *, hit: bool) -> int:
        """Count the ids from `start` to `end`, which are now part of the state; return how many of them were fed."""
        news = sum(self._fed[max(start, self._counted) : end])
        self._counted = max(self._counted, end)
        if hit:
            self._hits += news
        else:
            self._misses += news
        return sum(self._fed[start:end])

    def fork(self) -> Request:
        """Return a request with the same ids and no state."""
        fork = Request(self.ids, self._fed, priority=self.priority)
        fork._said, fork._row, fork._fresh, fork.chain = self._said, self._row, self._fresh, self.chain.copy()
        fork._counted, fork.checkpointed = self._counted, self.checkpointed
        fork.drafter = self.drafter.fork(self.ids)
        return fork

    def forget(self) -> None:
        """Discard the output of the last forward."""
        self._said, self._fresh, self._drafted = None, False, ()

    def let_go(self) -> None:
        """Keep only this request's row of the last forward, and free the rest of the batch."""
        if self._said is not None:
            self._said, self._row = self._said.only(self._row) if self._fresh else None, 0
        self._drafted = ()
