"""Host memory for the state of sequences that the device has no room for.

A slot or a span is one run of bytes here, so moving it over the bus is one copy, and host memory needs no layout of
layers. Rows are packed and unpacked on the device. On a GPU the memory is pinned, and copies are queued on the stream
of the forwards: each sees what the forwards before it wrote, and no forward starts before the copies that it needs.

A span may be in both memories. `link` records such a pair, which is not copied again, in either direction, until the
device's span is written or one of them is free. Forks therefore move a span that they share once.

Dimension key: N slots or spans, X elements, Y bytes of one of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass

import torch
from torch import Tensor

from agentkit_engine.runtime.places import Places

STAGED_SPANS = 64
"""Spans that are packed on the device at a time, which bounds the memory for it."""


@dataclass(slots=True)
class HostStats:
    """Number of copies so far, from the device to host memory and back."""

    stored_slots: int = 0
    stored_spans: int = 0
    loaded_slots: int = 0
    loaded_spans: int = 0


class HostTier:
    """Slots and spans in host memory, for the pools of one rank.

    Attributes:
        slots, spans: The places, and who holds them.
        stats: The copies so far.
    """

    def __init__(
        self, entries: Seq[Tensor], tails: Seq[Tensor], *, slots: int, spans: int, device: torch.device
    ) -> None:
        """`entries` and `tails` are the device's pools, by span and by slot."""
        self.slots, self.spans = Places(slots), Places(spans)
        self.stats = HostStats()
        self._device = device if device.type == "cuda" else torch.device("cpu")
        pinned = self._device.type == "cuda"
        self._slot_rows = _PackedRows("tail", tails, slots, pinned)
        self._span_rows = _PackedRows("entries", entries, spans, pinned)
        self._host_of: dict[int, int] = {}
        self._device_of: dict[int, int] = {}

    @property
    def bytes_held(self) -> int:
        return self.slots.used * self._slot_rows.size + self.spans.used * self._span_rows.size

    def host_span(self, device_span: int) -> int | None:
        """Return the host span with the same bytes as a span of the device, if there is one."""
        return self._host_of.get(device_span)

    def device_span(self, host_span: int) -> int | None:
        """Return the device's span with the same bytes as a host span, if there is one."""
        return self._device_of.get(host_span)

    def link(self, device_span: int, host_span: int) -> None:
        """Record that two spans have the same bytes."""
        self._host_of[device_span], self._device_of[host_span] = host_span, device_span

    def unlink(self, device_span: int) -> None:
        """Forget a pair, before the device's span changes or is freed."""
        if (host_span := self._host_of.pop(device_span, None)) is not None:
            del self._device_of[host_span]

    def release(self, slot: int, spans: Seq[int]) -> None:
        """Remove a holder of a slot and of spans."""
        self.slots.release(slot)
        for span in spans:
            if self.spans.release(span) and (twin := self._device_of.get(span)) is not None:
                self.unlink(twin)

    def store(self, slot: int | None, spans: Seq[int], rows: Mapping[str, Tensor]) -> None:
        """Store the `rows` of a slot and of spans, as `Pools.rows_at` returns them."""
        if slot is not None:
            self._slot_rows.store([slot], {name: row[None] for name, row in rows.items() if name.startswith("tail")})
            self.stats.stored_slots += 1
        self._span_rows.store(spans, rows)
        self.stats.stored_spans += len(spans)

    def load(self, slot: int | None, spans: Seq[int]) -> dict[str, Tensor]:
        """Return rows on the device, as `Pools.write_rows` takes them."""
        self.stats.loaded_slots += slot is not None
        self.stats.loaded_spans += len(spans)
        return self._load(slot, spans, self._device)

    def read(self, slot: int | None, spans: Seq[int]) -> dict[str, Tensor]:
        """Return rows in host memory, as `Pools.read_rows` does."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)  # copies to this memory may be queued
        return self._load(slot, spans, torch.device("cpu"))

    def _load(self, slot: int | None, spans: Seq[int], device: torch.device) -> dict[str, Tensor]:
        rows = {} if slot is None else self._slot_rows.load([slot], device)
        rows = {name: row[0] for name, row in rows.items()}
        return rows | self._span_rows.load(spans, device)


class _PackedRows:
    """Places of `size` bytes, each with the rows of one slot or span in all tensors of the device's pools."""

    def __init__(self, prefix: str, pools: Seq[Tensor], count: int, pinned: bool) -> None:
        self._forms = {f"{prefix}.{index}": (pool.shape[1:], pool.dtype) for index, pool in enumerate(pools)}
        self._sizes = [pool[0].nbytes for pool in pools]
        self.size = sum(self._sizes)
        self._memory_NY = torch.empty(count, self.size, dtype=torch.uint8, pin_memory=pinned)

    def store(self, places: Seq[int], rows: Mapping[str, Tensor]) -> None:
        if not places or not self._forms:
            return
        parts = [rows[name].reshape(len(places), -1).view(torch.uint8) for name in self._forms]
        for place, packed_Y in zip(places, torch.cat(parts, 1), strict=True):
            self._memory_NY[place].copy_(packed_Y, non_blocking=True)

    def load(self, places: Seq[int], device: torch.device) -> dict[str, Tensor]:
        if not places or not self._forms:
            return {}
        packed_NY = torch.empty(len(places), self.size, dtype=torch.uint8, device=device)
        for place, packed_Y in zip(places, packed_NY, strict=True):
            packed_Y.copy_(self._memory_NY[place], non_blocking=True)
        return {
            # a new tensor, because a view of another dtype must be aligned
            name: part.clone(memory_format=torch.contiguous_format).view(-1).view(dtype).view(len(places), *shape)
            for (name, (shape, dtype)), part in zip(
                self._forms.items(), torch.split(packed_NY, self._sizes, 1), strict=True
            )
        }
