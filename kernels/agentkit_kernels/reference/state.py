"""Rows that a layer keeps of earlier tokens: in pools that sequences share, or of one forward only.

Dimension key: `reference/batch.py`; S positions.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from agentkit_kernels.reference.batch import Group
from agentkit_kernels.reference.quantize import (
    KV_SCALES,
    decode_e4m3,
    load_kv_rows,
    quantise_keys,
    round_kv_rows,
    store_kv_rows,
)


class LayerState(Protocol):
    """One layer's state, as the operations read and write it."""

    def window(self, group: Group, positions: Tensor, like: Tensor) -> Tensor:
        """Return the window rows of earlier tokens, [B, S, K]."""

    def as_stored(self, kv_BTK: Tensor) -> Tensor:
        """Return rows as `window` will return them once they are stored, so that later tokens read the same bits."""

    def store_window(self, group: Group, kv_BTK: Tensor) -> None:
        """Store the rows of the group's tokens."""

    def open_rows(self, group: Group, prefix: str, positions: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """Return a compressor's values and scores of earlier tokens, [B, S, X]; 0 and -inf before position 0."""

    def store_open_rows(self, group: Group, prefix: str, values_BTX: Tensor, scores_BTX: Tensor) -> None:
        """Store the values and scores of the group's tokens."""

    def entries(self, group: Group, prefix: str, count: int, size: int) -> Tensor:
        """Return the first `count` entries of `size` columns, [B, count, K]; zeros where none is stored."""

    def store_entries(self, group: Group, prefix: str, first: int, entries_BWK: Tensor) -> None:
        """Store entries, from number `first` on."""


class PooledState:
    """State in pools; see `ops.Ops.state`. Not differentiable.

    Pools of floats hold rows as they are. Those of bytes hold key-value rows in the format of `quantize.py`, a span or
    slot being a page, or index keys as E4M3 codes with their scales in a pool of their own.
    """

    def __init__(self, pools: Mapping[str, Tensor]) -> None:
        self.pools = pools

    def window(self, group: Group, positions: Tensor, like: Tensor) -> Tensor:
        kept = self.pools["window"].shape[1]
        return self._read("window", group.slots_B[:, None], positions % kept, like.shape[-1])

    def as_stored(self, kv_BTK: Tensor) -> Tensor:
        pool, size = self.pools["window"], kv_BTK.shape[-1]
        if pool.dtype != torch.uint8:
            return kv_BTK
        return round_kv_rows(kv_BTK.flatten(0, 1), rotary=_rotary(pool, size)).view(kv_BTK.shape)

    def store_window(self, group: Group, kv_BTK: Tensor) -> None:
        self._store(group, "window", kv_BTK)

    def open_rows(self, group: Group, prefix: str, positions: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        values, scores = self.pools[f"{prefix}values"], self.pools[f"{prefix}scores"]
        places = group.slots_B[:, None], positions % values.shape[1]
        return values[places], scores[places]

    def store_open_rows(self, group: Group, prefix: str, values_BTX: Tensor, scores_BTX: Tensor) -> None:
        self._store(group, f"{prefix}values", values_BTX)
        self._store(group, f"{prefix}scores", scores_BTX)

    def entries(self, group: Group, prefix: str, count: int, size: int) -> Tensor:
        pool = self.pools[f"{prefix}entries"]
        numbers = torch.arange(count, device=pool.device)
        columns = numbers // pool.shape[1]
        missing = int(columns[-1]) + 1 - group.block_tables.shape[1]
        tables = F.pad(group.block_tables, (0, max(0, missing)))  # span 0 stays zero
        return self._read(f"{prefix}entries", tables[:, columns], numbers % pool.shape[1], size)

    def store_entries(self, group: Group, prefix: str, first: int, entries_BWK: Tensor) -> None:
        pool = self.pools[f"{prefix}entries"]
        numbers = torch.arange(first, first + entries_BWK.shape[1], device=pool.device)
        pages = group.block_tables[:, numbers // pool.shape[1]]
        self._write(f"{prefix}entries", pages, numbers % pool.shape[1], entries_BWK)

    def _store(self, group: Group, name: str, rows_BTX: Tensor) -> None:
        kept = self.pools[name].shape[1]
        self._write(name, group.slots_B[:, None], group.positions[-kept:] % kept, rows_BTX[:, -kept:])

    def _read(self, name: str, pages: Tensor, places: Tensor, size: int) -> Tensor:
        """Return the rows of `size` columns at these places of these pages."""
        pool = self.pools[name]
        if pool.dtype != torch.uint8:
            return pool[pages, places]
        if pool.shape[2] == size:
            return decode_e4m3(pool[pages, places]) * self.pools["index_scales"][pages, places]
        slots = pages * pool.shape[1] + places
        rows = load_kv_rows(pool, slots.flatten(), size, rotary=_rotary(pool, size), dtype=torch.float32)
        return rows.view(*slots.shape, size)

    def _write(self, name: str, pages: Tensor, places: Tensor, rows_BXK: Tensor) -> None:
        pool, rows = self.pools[name], rows_BXK.flatten(0, 1)
        if pool.dtype != torch.uint8:
            pool[pages, places] = rows_BXK.to(pool.dtype)
        elif pool.shape[2] == rows.shape[1]:
            codes, scales = quantise_keys(rows)
            pool[pages, places] = codes.view(rows_BXK.shape)
            self.pools["index_scales"][pages, places] = scales.view(*rows_BXK.shape[:2], 1)
        else:
            slots = (pages * pool.shape[1] + places).flatten()
            store_kv_rows(rows, slots, pool, rotary=_rotary(pool, rows.shape[1]))


class FreshState:
    """The state of one forward from position 0, which may be differentiated."""

    def __init__(self) -> None:
        self._entries: dict[tuple[int, str], Tensor] = {}

    def window(self, group: Group, positions: Tensor, like: Tensor) -> Tensor:
        _check_fresh(group)
        return like.new_zeros(group.sequences, len(positions), like.shape[-1])

    def as_stored(self, kv_BTK: Tensor) -> Tensor:
        return kv_BTK

    def store_window(self, group: Group, kv_BTK: Tensor) -> None:
        pass

    def open_rows(self, group: Group, prefix: str, positions: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        _check_fresh(group)
        values = like.new_zeros(group.sequences, len(positions), like.shape[-1])
        return values, torch.full_like(values, -torch.inf)

    def store_open_rows(self, group: Group, prefix: str, values_BTX: Tensor, scores_BTX: Tensor) -> None:
        pass

    def entries(self, group: Group, prefix: str, count: int, size: int) -> Tensor:
        entries = self._entries[group.rows.start, prefix][:, :count]
        return F.pad(entries, (0, 0, 0, count - entries.shape[1]))

    def store_entries(self, group: Group, prefix: str, first: int, entries_BWK: Tensor) -> None:
        self._entries[group.rows.start, prefix] = entries_BWK


def _rotary(pool: Tensor, size: int) -> int:
    """Return the rotary columns of a pool of key-value rows, which take two bytes instead of one."""
    return pool.shape[2] - KV_SCALES - size


def _check_fresh(group: Group) -> None:
    if group.start:
        raise ValueError(f"a forward without state pools starts at position 0, not at {group.start}")
