"""State that later tokens of a sequence need: raw KV rows of the window, compressed entries, compressor rows.

Layers append rows and get back those they need; nothing is concatenated per token. Dimension key: `model/__init__.py`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from agentkit_engine.spec import LayerSpec, ModelSpec


class RowBuffer:
    """Rows [B, T, width] appended along T: all of them, or only the last `keep`.

    The first rows are stored as given, without a copy, so a forward on a fresh cache is differentiable. Later rows are
    written into storage that doubles when it is full.
    """

    def __init__(self, keep: int | None = None) -> None:
        self.keep = keep
        self.end = 0
        """Rows appended so far: the position of the next row."""
        self._storage: Tensor | None = None
        self._used = 0

    def append(self, rows_BTX: Tensor) -> Tensor:
        """Append rows and return the kept older rows followed by the new ones, ending at position `end`."""
        count = rows_BTX.shape[1]
        self.end += count
        if self._storage is None:
            rows = rows_BTX
            if self.keep is not None and count > self.keep:
                self._storage, self._used = rows[:, count - self.keep :].detach().clone(), self.keep
            else:
                self._storage, self._used = rows, count
            return rows
        with torch.no_grad():
            needed = self._used + count
            if needed > self._storage.shape[1]:
                kept = self._used if self.keep is None else min(self._used, self.keep)
                older = self._storage[:, self._used - kept : self._used]
                capacity = max(2 * (kept if self.keep is None else self.keep), kept + count)
                storage = rows_BTX.new_empty((rows_BTX.shape[0], capacity, rows_BTX.shape[2]))
                storage[:, :kept] = older
                self._storage, self._used, needed = storage, kept, kept + count
            self._storage[:, self._used : needed] = rows_BTX
            self._used = needed
        return self._storage[:, :needed]

    def rows(self, like_BTX: Tensor) -> Tensor:
        """Return the current rows, or an empty [B, 0, width] tensor shaped like `like_BTX` if there are none."""
        return like_BTX[:, :0] if self._storage is None else self._storage[:, : self._used]


class CompressorCache:
    """A compressor's open rows (raw values and scores, ape added) and the entries it has emitted."""

    def __init__(self, layer: LayerSpec) -> None:
        carried = (2 if layer.attention == "csa" else 1) * layer.compress_ratio - 1
        self.values = RowBuffer(carried)
        self.scores = RowBuffer(carried)
        self.entries = RowBuffer()


class LayerCache:
    """The state of one layer: window rows, and for compressed layers the compressor's (and the indexer's)."""

    def __init__(self, layer: LayerSpec, sliding_window: int) -> None:
        self.window = RowBuffer(sliding_window - 1)
        self.compressor = CompressorCache(layer) if layer.compress_ratio else None
        self.indexer = CompressorCache(layer) if layer.attention == "csa" else None


class Cache:
    """The state of a batch of sequences of equal length, extended by every forward that receives it.

    Memory: per CSA layer T/4 rows of head_dim + index_head_dim, per HCA layer T/128 rows of head_dim, plus a
    constant (window and compressor rows). Spare capacity at most doubles it.
    """

    def __init__(self, spec: ModelSpec, batch_size: int = 1) -> None:
        self.batch_size = batch_size
        self.layers = [LayerCache(layer, spec.sliding_window) for layer in spec.layers]
        self.mtp_layers = [LayerCache(layer, spec.sliding_window) for layer in spec.mtp_layers]

    @property
    def length(self) -> int:
        """Tokens seen by the main stack: the position of the next token."""
        return self.layers[0].window.end
