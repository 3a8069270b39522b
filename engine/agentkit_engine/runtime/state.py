"""The state of live sequences, in pools that are allocated once.

*Spans* hold state that grows with length: the compressed entries and index keys of 256 consecutive tokens, in every
layer, under one id. *Tail slots* hold state of constant size: the ring of window rows and the compressors' open rows.
An unused span or slot costs address space only, because the operating system allocates pages when they are written.

Sequences with a common prefix share its spans; writing to a shared span copies it first. A fork therefore costs a slot
and at most one span at any length, and a checkpoint is simply a fork that is never extended.

A masked row is multiplied by 0.0, which gives NaN where the row holds NaN. So a sequence must never read rows of
another: slots and spans are cleared when they are allocated, and missing spans read as span 0, which stays zero.

Dimension key: `runtime/__init__.py`.
"""

from __future__ import annotations

import math
import mmap
from collections import Counter
from dataclasses import dataclass

import torch
from torch import Tensor

from agentkit_engine.errors import OutOfMemoryError
from agentkit_engine.spec import LayerSpec, ModelSpec

SPAN = 256
"""Tokens per span; a multiple of every compression ratio."""
ROLLBACK = 12
"""Maximum number of tokens by which a sequence can be shortened; the rings keep this many rows more than they need. One
of the remaining tokens is computed again for its logits."""
QUERY_BLOCK = 128
"""Tokens of one sequence whose attention is computed together; blocks start at multiples of this."""


@dataclass(frozen=True, slots=True)
class CompressorState:
    """One compressor's entries, by span, and its open rows, by slot: token t is in row t mod O.

    O is the number of rows that the next entry may pool, plus `ROLLBACK`: 8 for CSA, which pools two windows of 4, and
    128 for HCA.
    """

    ratio: int
    entries: Tensor  # [spans + 1, SPAN // ratio, K]
    values: Tensor  # [slots, O, K or 2K]
    scores: Tensor  # the same shape as `values`; includes `ape`

    @property
    def entries_per_span(self) -> int:
        return self.entries.shape[1]


@dataclass(frozen=True, slots=True)
class LayerState:
    """One layer's state: `window` [slots, R, K] with token t in row t mod R, and the compressors' state."""

    window: Tensor
    compressor: CompressorState | None
    indexer: CompressorState | None


class Sequence:
    """A tail slot, a list of spans, and the number of tokens they hold.

    Made by `Pools.open` and `Pools.fork`, and returned with `Pools.close`.
    """

    def __init__(self, slot: int) -> None:
        self.slot = slot
        self.length = 0
        self.written = 0
        """The largest length so far: tokens that were cut since may have overwritten rows of the rings."""
        self.steady_until = 0
        """Up to this length the batcher adds single ids without checking memory and checkpoints; the batcher sets
        it."""
        self.spans: list[int] = []
        self.table = torch.zeros(4, dtype=torch.int64)
        """The span ids as a tensor, for gathers; the first `num_spans` are valid."""
        self.contiguous = True
        """True if the span ids are consecutive, so that a long scan needs no gather."""

    @property
    def num_spans(self) -> int:
        return len(self.spans)

    def reaches(self, length: int) -> bool:
        """Return whether the sequence can be shortened to `length`: the rings still hold the rows before it."""
        return length <= self.length and self.written - length <= ROLLBACK

    def shorten(self, length: int) -> None:
        """Remove the tokens from `length` on; `reaches(length)` must hold."""
        assert self.reaches(length), (length, self.length, self.written)
        self.length = length
        self.steady_until = 0  # a span that is written again may be shared

    def add_span(self, span: int) -> None:
        if self.num_spans == len(self.table):
            self.table = torch.cat((self.table, torch.zeros_like(self.table)))
        if self.spans and span != self.spans[-1] + 1:
            self.contiguous = False
        self.table[self.num_spans] = span
        self.spans.append(span)

    def replace_span(self, index: int, span: int) -> None:
        self.table[index] = self.spans[index] = span
        self._look_at_steps()

    def share_spans(self, source: Sequence, count: int) -> None:
        """Replace the spans by the first `count` spans of `source`."""
        self.table, self.spans = source.table.clone(), source.spans[:count]
        self._look_at_steps()

    def _look_at_steps(self) -> None:
        steps = self.table[1 : self.num_spans] - self.table[: max(0, self.num_spans - 1)]
        self.contiguous = bool((steps == 1).all())


class Pools:
    """The state of one model, for at most `slots` sequences and `spans` spans.

    `bytes_per_span` and `bytes_per_slot` are exact; `bytes_held` is the memory in use, with shared spans counted once.
    """

    def __init__(self, spec: ModelSpec, *, slots: int, spans: int, device: torch.device) -> None:
        self.spec, self.device = spec, device
        self.slots, self.spans = slots, spans
        self.ring = -(-spec.sliding_window // 32) * 32 + QUERY_BLOCK
        self.layers = [self._layer(layer) for layer in spec.layers]
        self._free_slots = list(range(slots - 1, -1, -1))
        self._unused_spans = spans  # span ids up to `spans - _unused_spans` have been used before
        self._free_spans: list[int] = []
        self._holders: Counter[int] = Counter()  # number of sequences that hold each span in use
        states = [state for layer in self.layers for state in (layer.compressor, layer.indexer) if state is not None]
        self.entries = [state.entries for state in states]
        """The tensors stored by span: their first dimension is the span id."""
        self.tails = [layer.window for layer in self.layers] + [t for s in states for t in (s.values, s.scores)]
        """The tensors stored by slot: their first dimension is the slot."""
        self.bytes_per_span = sum(tensor[0].nbytes for tensor in self.entries)
        self.bytes_per_slot = sum(tensor[0].nbytes for tensor in self.tails)

    @property
    def free_slots(self) -> int:
        return len(self._free_slots)

    @property
    def free_spans(self) -> int:
        return len(self._free_spans) + self._unused_spans

    @property
    def bytes_held(self) -> int:
        return (self.slots - self.free_slots) * self.bytes_per_slot + (
            self.spans - self.free_spans
        ) * self.bytes_per_span

    def open(self) -> Sequence:
        """Return an empty sequence.

        Raises:
            OutOfMemoryError: every slot is taken.
        """
        sequence = self._take_slot()
        for layer in self.layers:
            layer.window[sequence.slot] = 0.0
            for state in (layer.compressor, layer.indexer):
                if state is not None:  # rows before the first token get weight 0 in the first entry
                    state.values[sequence.slot] = 0.0
                    state.scores[sequence.slot] = -torch.inf
        return sequence

    def fork(self, source: Sequence) -> Sequence:
        """Return a second sequence with the same past, at the cost of one slot and at most one span.

        Raises:
            OutOfMemoryError: there is no free slot, or no free span for a copy of the open one.
        """
        full, open_tokens = divmod(source.length, SPAN)
        if open_tokens and not self.free_spans:
            raise OutOfMemoryError(f"a fork needs a span of its own, and none of {self.spans} is free")
        fork = self._take_slot()
        fork.length, fork.written = source.length, source.written
        for tail in self.tails:
            tail[fork.slot] = tail[source.slot]
        self._holders.update(source.spans[:full])
        fork.share_spans(source, full)
        if open_tokens:
            fork.add_span(self._copy_span(source.spans[full]))
        return fork

    def reserve(self, sequence: Sequence, length: int) -> None:
        """Allocate the spans that `sequence` needs for `length` tokens, and copy shared spans that it will write to.

        Either all are allocated or none.

        Raises:
            OutOfMemoryError: there are not enough free spans.
        """
        first, spans = sequence.length // SPAN, sequence.spans
        if first + 1 == len(spans) and length <= len(spans) * SPAN and self._holders[spans[first]] == 1:
            return  # the open span is not shared and has room
        written = range(first, sequence.num_spans)
        shared = [index for index in written if self._holders[sequence.spans[index]] > 1]
        missing = -(-length // SPAN) - sequence.num_spans
        if len(shared) + max(0, missing) > self.free_spans:
            raise OutOfMemoryError(
                f"{len(shared) + max(0, missing)} more spans needed, {self.free_spans} of {self.spans} are free"
            )
        for index in shared:
            span = sequence.spans[index]
            sequence.replace_span(index, self._copy_span(span))
            self._release(span)
        for _ in range(missing):
            span = self._take_span()
            for entries in self.entries:
                entries[span] = 0.0
            sequence.add_span(span)

    def close(self, sequence: Sequence) -> None:
        """Free the slot and the spans."""
        self._free_slots.append(sequence.slot)
        for span in reversed(sequence.spans):
            self._release(span)
        sequence.spans.clear()

    def _take_slot(self) -> Sequence:
        if not self._free_slots:
            raise OutOfMemoryError(f"all {self.slots} slots are taken by live sequences; close one")
        return Sequence(self._free_slots.pop())

    def _take_span(self) -> int:
        if self._free_spans:
            span = self._free_spans.pop()
        else:
            span = self.spans - self._unused_spans + 1
            self._unused_spans -= 1
        self._holders[span] = 1
        return span

    def _copy_span(self, source: int) -> int:
        span = self._take_span()
        for entries in self.entries:
            entries[span] = entries[source]
        return span

    def _release(self, span: int) -> None:
        self._holders[span] -= 1
        if not self._holders[span]:
            del self._holders[span]
            self._free_spans.append(span)

    def _layer(self, layer: LayerSpec) -> LayerState:
        spec = self.spec
        csa = layer.attention == "csa"
        return LayerState(
            self._zeros(self.slots, self.ring, spec.head_dim),
            self._compressor(layer, spec.head_dim) if layer.compress_ratio else None,
            self._compressor(layer, spec.index_head_dim) if csa else None,
        )

    def _compressor(self, layer: LayerSpec, head_dim: int) -> CompressorState:
        ratio, series = layer.compress_ratio, 2 if layer.attention == "csa" else 1
        open_rows = (self.slots, series * ratio + ROLLBACK, series * head_dim)
        return CompressorState(
            ratio,
            self._zeros(self.spans + 1, SPAN // ratio, head_dim),
            self._zeros(*open_rows),
            self._zeros(*open_rows),
        )

    def _zeros(self, *shape: int) -> Tensor:
        """Return float32 zeros; on a CPU each page is allocated when it is first written."""
        if self.device.type != "cpu":
            return torch.zeros(shape, device=self.device)
        return torch.frombuffer(mmap.mmap(-1, 4 * math.prod(shape)), dtype=torch.float32).view(shape)
