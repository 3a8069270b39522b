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


class LayerState(Protocol):
    """One layer's state, as the operations read and write it."""

    def window(self, group: Group, positions: Tensor, like: Tensor) -> Tensor:
        """Return the window rows of earlier tokens, [B, S, K]."""

    def store_window(self, group: Group, kv_BTK: Tensor) -> None:
        """Store the rows of the group's tokens."""

    def open_rows(self, group: Group, prefix: str, positions: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """Return a compressor's values and scores of earlier tokens, [B, S, X]; 0 and -inf before position 0."""

    def store_open_rows(self, group: Group, prefix: str, values_BTX: Tensor, scores_BTX: Tensor) -> None:
        """Store the values and scores of the group's tokens."""

    def entries(self, group: Group, prefix: str, count: int) -> Tensor:
        """Return the first `count` entries, [B, count, K]; zeros where none is stored."""

    def store_entries(self, group: Group, prefix: str, first: int, entries_BWK: Tensor) -> None:
        """Store entries, from number `first` on."""


class PooledState:
    """State in pools; see `ops.Ops.state`. Not differentiable."""

    def __init__(self, pools: Mapping[str, Tensor]) -> None:
        self.pools = pools

    def window(self, group: Group, positions: Tensor, like: Tensor) -> Tensor:
        ring = self.pools["window"]
        return ring[group.slots_B[:, None], positions % ring.shape[1]]

    def store_window(self, group: Group, kv_BTK: Tensor) -> None:
        self._store(group, "window", kv_BTK)

    def open_rows(self, group: Group, prefix: str, positions: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        values, scores = self.pools[f"{prefix}values"], self.pools[f"{prefix}scores"]
        places = group.slots_B[:, None], positions % values.shape[1]
        return values[places], scores[places]

    def store_open_rows(self, group: Group, prefix: str, values_BTX: Tensor, scores_BTX: Tensor) -> None:
        self._store(group, f"{prefix}values", values_BTX)
        self._store(group, f"{prefix}scores", scores_BTX)

    def entries(self, group: Group, prefix: str, count: int) -> Tensor:
        pool = self.pools[f"{prefix}entries"]
        numbers = torch.arange(count, device=pool.device)
        columns = numbers // pool.shape[1]
        missing = int(columns[-1]) + 1 - group.block_tables.shape[1]
        tables = F.pad(group.block_tables, (0, max(0, missing)))  # span 0 stays zero
        return pool[tables[:, columns], numbers % pool.shape[1]]

    def store_entries(self, group: Group, prefix: str, first: int, entries_BWK: Tensor) -> None:
        pool = self.pools[f"{prefix}entries"]
        numbers = torch.arange(first, first + entries_BWK.shape[1], device=pool.device)
        pool[group.block_tables[:, numbers // pool.shape[1]], numbers % pool.shape[1]] = entries_BWK.to(pool.dtype)

    def _store(self, group: Group, name: str, rows_BTX: Tensor) -> None:
        pool = self.pools[name]
        kept = pool.shape[1]
        places = group.slots_B[:, None], group.positions[-kept:] % kept
        pool[places] = rows_BTX[:, -kept:].to(pool.dtype)


class FreshState:
    """The state of one forward from position 0, which may be differentiated."""

    def __init__(self) -> None:
        self._entries: dict[tuple[int, str], Tensor] = {}

    def window(self, group: Group, positions: Tensor, like: Tensor) -> Tensor:
        _check_fresh(group)
        return like.new_zeros(group.sequences, len(positions), like.shape[-1])

    def store_window(self, group: Group, kv_BTK: Tensor) -> None:
        pass

    def open_rows(self, group: Group, prefix: str, positions: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        _check_fresh(group)
        values = like.new_zeros(group.sequences, len(positions), like.shape[-1])
        return values, torch.full_like(values, -torch.inf)

    def store_open_rows(self, group: Group, prefix: str, values_BTX: Tensor, scores_BTX: Tensor) -> None:
        pass

    def entries(self, group: Group, prefix: str, count: int) -> Tensor:
        entries = self._entries[group.rows.start, prefix][:, :count]
        return F.pad(entries, (0, 0, 0, count - entries.shape[1]))

    def store_entries(self, group: Group, prefix: str, first: int, entries_BWK: Tensor) -> None:
        self._entries[group.rows.start, prefix] = entries_BWK


def _check_fresh(group: Group) -> None:
    if group.start:
        raise ValueError(f"a forward without state pools starts at position 0, not at {group.start}")
