"""The state of live sequences, in pools that are allocated once.

*Spans* hold state that grows with length: the compressed entries and index keys of 256 consecutive tokens, in every
layer, under one id. *Tail slots* hold state of constant size: the ring of window rows and the compressors' open rows.
An unused span or slot costs address space only, because the operating system allocates pages when they are written.

Sequences with a common prefix share its spans; writing to a shared span copies it first. A fork therefore costs a slot
and at most one span at any length, and a checkpoint is simply a fork that is never extended.

A sequence that the device has no room for can be moved to host memory (`host_tier.py`) and back. In host memory it can
be forked, read and closed, but not extended.

A masked row is multiplied by 0.0, which gives NaN where the row holds NaN. So a sequence must never read rows of
another: slots and spans are cleared when they are allocated, and missing spans read as span 0, which stays zero.

Dimension key: `runtime/__init__.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from agentkit_engine.errors import OutOfMemoryError
from agentkit_engine.runtime.host_tier import STAGED_SPANS, HostTier
from agentkit_engine.runtime.places import Places
from agentkit_engine.spec import LayerSpec, ModelSpec
from agentkit_kernels.ops import QUERY_BLOCK
from agentkit_kernels.reference import Reference
from agentkit_kernels.reference.quantize import kv_row_bytes

SPAN = 256
"""Tokens per span; a multiple of every compression ratio."""
ROLLBACK = 12
"""Maximum number of tokens by which a sequence can be shortened; the rings keep this many rows more than they need. One
of the remaining tokens is computed again for its logits."""


KVCacheDtype = Literal["auto", "fp8"]
"""Format of window rows, entries and index keys: `auto` is float32. `fp8` is DeepSeek's: a row of E4M3 values with a
power of two per 64 of them, whose rotary columns are bfloat16, and index keys of E4M3 values with a float32 scale."""


@dataclass(frozen=True, slots=True)
class Rows:
    """Rows of one kind that a layer keeps of earlier tokens. Pools, forks, saved sessions and the disk cache need no
    more than this to store them.

    Attributes:
        name: Their name within the layer; see `agentkit_kernels.ops.Ops.state`.
        per: Where they lie: `span` for state that grows with length, `slot` for state of constant size.
        count: Rows per span of `SPAN` tokens, or per slot.
        width: Elements per row.
        dtype: Dtype of the elements; uint8 for rows in a packed format.
        fill: Value of the elements in a new sequence. Rows of spans start as zeros.
        source: Index of the layer that owns the rows, if this layer only reads them.
    """

    name: str
    per: Literal["span", "slot"]
    count: int
    width: int
    dtype: torch.dtype = torch.float32
    fill: float = 0.0
    source: int | None = None


def ring_rows(window: int) -> int:
    """Rows of a window's ring: a whole number of vectors, and a block of queries more than the window."""
    return -(-window // 32) * 32 + QUERY_BLOCK


def rows_of(layer: LayerSpec, spec: ModelSpec, kv_cache_dtype: KVCacheDtype = "auto") -> list[Rows]:
    """Return what a layer of DeepSeek-V4 keeps: the window's ring, and the entries and open rows of its compressors.

    A compressor keeps as many open rows as the next entry may pool, and `ROLLBACK` more: CSA pools two windows of 4
    tokens, HCA one of 128. They are float32.

    Raises:
        ValueError: `fp8` does not fit the model's head size.
    """
    fp8 = kv_cache_dtype == "fp8"
    dtype, width = (torch.uint8, _fp8_row_bytes(spec)) if fp8 else (torch.float32, spec.head_dim)
    kept = [Rows("window", "slot", ring_rows(spec.sliding_window), width, dtype)]
    compressors = [("", spec.head_dim)] if layer.compress_ratio else []
    if layer.attention == "csa":
        compressors.append(("index_", spec.index_head_dim))
    for prefix, size in compressors:
        entries, rows = SPAN // layer.compress_ratio, layer.series * layer.compress_ratio + ROLLBACK
        kept.append(Rows(f"{prefix}entries", "span", entries, size if prefix else width, dtype))
        if prefix and fp8:
            kept.append(Rows("index_scales", "span", entries, 1))
        kept += [
            Rows(f"{prefix}values", "slot", rows, layer.series * size),
            Rows(f"{prefix}scores", "slot", rows, layer.series * size, fill=-torch.inf),  # weight 0 before token 0
        ]
    return kept


def _fp8_row_bytes(spec: ModelSpec) -> int:
    try:
        return kv_row_bytes(spec.head_dim, spec.qk_rope_head_dim)
    except ValueError as error:
        raise ValueError(
            f'kv_cache_dtype="fp8" does not fit this model, whose head_dim - qk_rope_head_dim is {spec.head_dim} - '
            f'{spec.qk_rope_head_dim}: {error}; load it with kv_cache_dtype="auto"'
        ) from error


class Sequence:
    """A tail slot, a list of spans, and the number of tokens they hold.

    Made by `Pools.open` and `Pools.fork`, and returned with `Pools.close`. Slot and spans are those of one `rank`; see
    `parallel.py`.
    """

    def __init__(self, slot: int, rank: int = 0) -> None:
        self.slot, self.rank = slot, rank
        self.on_host = False
        """True if slot and spans are those of host memory."""
        self.length = 0
        self.written = 0
        """The largest length so far: tokens that were cut since may have overwritten rows of the rings."""
        self.steady_until = 0
        """Up to this length the scheduler adds single ids without checking memory and checkpoints; the scheduler sets
        it."""
        self.spans: list[int] = []

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


class Pools:
    """The state of one model, for at most `slots` sequences and `spans` spans.

    They are those of one rank; `ranks` is the number of ranks among which sequences are distributed (`parallel.py`).
    `bytes_per_span` and `bytes_per_slot` are exact; `bytes_held` is the memory in use on the device, and
    `host_bytes_held` in host memory, with shared spans counted once. `kv_cache_dtype` is the format of the rows.
    """

    ranks = 1
    host: HostTier | None = None

    def __init__(
        self,
        spec: ModelSpec,
        *,
        slots: int,
        spans: int,
        device: torch.device,
        kv_cache_dtype: KVCacheDtype = "auto",
        rows: Seq[Seq[Rows]] | None = None,
        rank: int = 0,
        host_slots: int = 0,
        host_spans: int = 0,
    ) -> None:
        """`rows` lists what each layer keeps; by default what the layers of `spec` do. With `host_slots`, sequences can
        be moved to host memory."""
        self.spec, self.device, self.rank, self.kv_cache_dtype = spec, device, rank, kv_cache_dtype
        self.slots, self.spans, self.host_slots, self.host_spans = slots, spans, host_slots, host_spans
        self.rows = [rows_of(layer, spec, kv_cache_dtype) for layer in spec.layers] if rows is None else rows
        self.layers: list[dict[str, Tensor]] = []
        """Each layer's pools by name; their first dimension is the span id or the slot."""
        owned: list[tuple[Rows, Tensor]] = []
        for kinds in self.rows:
            pools = {}
            for kind in kinds:
                if kind.source is not None:
                    pools[kind.name] = self.layers[kind.source][kind.name]
                    continue
                number = spans + 1 if kind.per == "span" else slots
                pools[kind.name] = Reference(device).zeros((number, kind.count, kind.width), kind.dtype)
                owned.append((kind, pools[kind.name]))
            self.layers.append(pools)
        self._slots, self._spans = Places(slots), Places(spans, first=1)
        self.entries = [pool for kind, pool in owned if kind.per == "span"]
        """The tensors stored by span."""
        self.tails = [pool for kind, pool in owned if kind.per == "slot"]
        """The tensors stored by slot."""
        self._fills = [kind.fill for kind, _ in owned if kind.per == "slot"]
        self.bytes_per_span = sum(tensor[0].nbytes for tensor in self.entries)
        self.bytes_per_slot = sum(tensor[0].nbytes for tensor in self.tails)
        if host_slots:
            self.host = HostTier(self.entries, self.tails, slots=host_slots, spans=host_spans, device=device)

    @property
    def free_slots(self) -> int:
        return self._slots.free

    @property
    def free_spans(self) -> int:
        return self._spans.free

    @property
    def bytes_held(self) -> int:
        return self._slots.used * self.bytes_per_slot + self._spans.used * self.bytes_per_span

    @property
    def tiered(self) -> bool:
        """True if sequences can be moved to host memory."""
        return self.host is not None

    @property
    def host_bytes_held(self) -> int:
        return 0 if self.host is None else self.host.bytes_held

    def open(self) -> Sequence:
        """Return an empty sequence.

        Raises:
            OutOfMemoryError: every slot is taken.
        """
        sequence = self._take_slot()
        self.clear_slot(sequence.slot)
        return sequence

    def fork(self, source: Sequence) -> Sequence:
        """Return a second sequence with the same past, on the device.

        It costs one slot and at most one span, or as many spans as are in host memory only.

        Raises:
            OutOfMemoryError: there is no free slot, or not enough free spans.
        """
        if source.on_host:
            return self._restore(source)
        full, open_tokens = divmod(source.length, SPAN)
        if open_tokens and not self.free_spans:
            raise OutOfMemoryError(f"a fork needs a span of its own, and none of {self.spans} is free")
        fork = self._take_slot()
        fork.length, fork.written = source.length, source.written
        self.copy_slot(source.slot, fork.slot)
        self._spans.hold(source.spans[:full])
        fork.spans = source.spans[:full]
        if open_tokens:
            fork.spans.append(self._copy_span(source.spans[full]))
        return fork

    def branch(self, source: Sequence) -> Sequence:
        """Return a fork for another session."""
        return self.fork(source)

    def fits(self, needs: Seq[tuple[Sequence | None, int]]) -> bool:
        """Return whether sequences of given lengths, with one more span each, fit at once; None is one to be opened."""
        held: set[int] = set()
        missing = 0
        for sequence, length in needs:
            spans = [] if sequence is None else sequence.spans
            held.update(spans)
            missing += max(0, -(-length // SPAN) + 1 - len(spans))
        return len(held) + missing <= self.spans and len(needs) <= self.slots

    def reserve(self, sequence: Sequence, length: int) -> None:
        """Allocate the spans that `sequence` needs for `length` tokens, and copy shared spans that it will write to.

        Either all are allocated or none.

        Raises:
            OutOfMemoryError: there are not enough free spans.
        """
        assert not sequence.on_host
        first, spans, holders = sequence.length // SPAN, sequence.spans, self._spans.holders
        if self.host is not None:
            for span in spans[first:]:
                self.host.unlink(span)
        if first + 1 == len(spans) and length <= len(spans) * SPAN and holders[spans[first]] == 1:
            return  # the open span is not shared and has room
        written = range(first, sequence.num_spans)
        shared = [index for index in written if holders[sequence.spans[index]] > 1]
        missing = -(-length // SPAN) - sequence.num_spans
        if len(shared) + max(0, missing) > self.free_spans:
            raise OutOfMemoryError(
                f"{len(shared) + max(0, missing)} more spans needed, {self.free_spans} of {self.spans} are free"
            )
        for index in shared:
            span = sequence.spans[index]
            sequence.spans[index] = self._copy_span(span)
            self._release(span)
        for _ in range(missing):
            span = self._spans.take()
            self.clear_span(span)
            sequence.spans.append(span)

    def close(self, sequence: Sequence) -> None:
        """Free the slot and the spans."""
        if sequence.on_host:
            assert self.host is not None
            self.host.release(sequence.slot, sequence.spans)
        else:
            self._slots.release(sequence.slot)
            for span in reversed(sequence.spans):
                self._release(span)
        sequence.spans.clear()

    def may_demote(self, sequence: Sequence) -> bool:
        """Return whether `demote` would succeed if host memory were empty."""
        return self.host is not None and -(-sequence.length // SPAN) <= self.host.spans.count

    def demote(self, sequence: Sequence) -> bool:
        """Move a sequence to host memory if that has room, and return whether it had. `promote` is the inverse.

        Copies the slot, and the spans that are not in host memory already.
        """
        host = self.host
        if host is None:
            return False
        used = sequence.spans[: -(-sequence.length // SPAN)]
        known = [host.host_span(span) for span in used]
        if not host.slots.free or known.count(None) > host.spans.free:
            return False
        host.spans.hold(span for span in known if span is not None)
        slot, targets = host.slots.take(), [host.spans.take() if span is None else span for span in known]
        missing = [index for index, span in enumerate(known) if span is None]
        try:
            for first in range(0, len(missing), STAGED_SPANS):
                staged = missing[first : first + STAGED_SPANS]
                rows = self.rows_at(None, [used[index] for index in staged])
                host.store(None, [targets[index] for index in staged], rows)
            host.store(slot, [], self.rows_at(sequence.slot, []))
        except BaseException:
            host.release(slot, targets)
            raise
        for device_span, host_span in zip(used, targets, strict=True):
            host.link(device_span, host_span)
        self.close(sequence)
        sequence.slot, sequence.spans, sequence.on_host = slot, targets, True
        return True

    def promote(self, sequence: Sequence) -> None:
        """Move a sequence back from host memory, if it is there.

        Raises:
            OutOfMemoryError: there is no free slot, or not enough free spans; the sequence stays where it is.
        """
        if sequence.on_host:
            restored = self._restore(sequence)
            self.close(sequence)
            sequence.slot, sequence.spans, sequence.on_host = restored.slot, restored.spans, False
            sequence.steady_until = 0

    def _restore(self, source: Sequence) -> Sequence:
        """Return a fork on the device of a sequence in host memory, which stays there. See `promote`."""
        host = self.host
        assert host is not None
        known = [host.device_span(span) for span in source.spans]
        if known.count(None) > self.free_spans:
            raise OutOfMemoryError(
                f"{known.count(None)} spans are in host memory, and {self.free_spans} of {self.spans} are free"
            )
        restored = self._take_slot()
        restored.length, restored.written = source.length, source.written
        self._spans.hold(span for span in known if span is not None)
        restored.spans = [self._spans.take() if span is None else span for span in known]
        missing = [index for index, span in enumerate(known) if span is None]
        try:
            for first in range(0, len(missing), STAGED_SPANS):
                staged = missing[first : first + STAGED_SPANS]
                rows = host.load(None, [source.spans[index] for index in staged])
                self.write_rows(restored.slot, [restored.spans[index] for index in staged], rows)
            self.write_rows(restored.slot, [], host.load(source.slot, []))
        except BaseException:
            self.close(restored)
            raise
        for device_span, host_span in zip(restored.spans, source.spans, strict=True):
            host.link(device_span, host_span)
        return restored

    def read(self, sequence: Sequence, first: int, last: int, *, tail: bool = True) -> dict[str, Tensor]:
        """Return copies in host memory of the spans `first` to `last`, `entries.N` [spans, rows, width] for each of the
        `entries`, and with `tail` of the slot, `tail.N` [rows, width] for each of the `tails`."""
        slot, spans = sequence.slot if tail else None, sequence.spans[first:last]
        if sequence.on_host:
            assert self.host is not None
            return self.host.read(slot, spans)
        return self.read_rows(slot, spans)

    def write(self, sequence: Sequence, first: int, tensors: Mapping[str, Tensor]) -> None:
        """Write what `read` returned for the spans from `first` on; they must be reserved."""
        count = len(tensors["entries.0"]) if "entries.0" in tensors else 0
        self.write_rows(sequence.slot, sequence.spans[first : first + count], tensors)

    # The rows of slots and spans. These methods alone touch the device's memory.

    def clear_slot(self, slot: int) -> None:
        for tail, fill in zip(self.tails, self._fills, strict=True):
            tail[slot] = fill

    def clear_span(self, span: int) -> None:
        for entries in self.entries:
            entries[span] = 0.0

    def copy_slot(self, source: int, target: int) -> None:
        for tail in self.tails:
            tail[target] = tail[source]

    def copy_span(self, source: int, target: int) -> None:
        for entries in self.entries:
            entries[target] = entries[source]

    def rows_at(self, slot: int | None, spans: Seq[int]) -> dict[str, Tensor]:
        """Return copies as `read_rows` does, but on the device."""
        rows: dict[str, Tensor] = {}
        if slot is not None:
            rows |= {f"tail.{index}": tail[slot].clone() for index, tail in enumerate(self.tails)}
        if spans:
            places = torch.tensor(spans, device=self.device)
            rows |= {f"entries.{index}": entries[places] for index, entries in enumerate(self.entries)}
        return rows

    def read_rows(self, slot: int | None, spans: Seq[int]) -> dict[str, Tensor]:
        """See `read`; without a slot there are no tails."""
        return {name: rows.cpu() for name, rows in self.rows_at(slot, spans).items()}

    def write_rows(self, slot: int, spans: Seq[int], tensors: Mapping[str, Tensor]) -> None:
        """See `write`."""
        for index, tail in enumerate(self.tails):
            if f"tail.{index}" in tensors:
                tail[slot] = tensors[f"tail.{index}"].to(tail.device)
        places = torch.tensor(spans, dtype=torch.int64, device=self.device)
        for index, entries in enumerate(self.entries if spans else ()):
            entries[places] = tensors[f"entries.{index}"].to(entries.device)

    def _take_slot(self) -> Sequence:
        if not self._slots.free:
            raise OutOfMemoryError(f"all {self.slots} slots are taken by live sequences; close one")
        return Sequence(self._slots.take(), self.rank)

    def _copy_span(self, source: int) -> int:
        span = self._spans.take()
        self.copy_span(source, span)
        return span

    def _release(self, span: int) -> None:
        if self._spans.release(span) and self.host is not None:
            self.host.unlink(span)
