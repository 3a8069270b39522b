"""One layer's state pools as numpy arrays. Dimension key: `agentkit_kernels.ops`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from agentkit_kernels.cpu.loops import Floats, Stored


@dataclass(frozen=True, slots=True)
class Pool:
    """Pools of one compressor: entries by span, [spans * entries per span, K], and open rows by slot.

    `scales` are those of index keys in bytes, by span; otherwise it is empty.
    """

    entries: Stored
    per_span: int
    values: Floats
    scores: Floats
    scales: Floats


class LayerState:
    """See `ops.Ops.state`; `compressors` has one `Pool` per prefix."""

    def __init__(self, pools: Mapping[str, Tensor]) -> None:
        self.ring: Stored = pools["window"].numpy()
        self.compressors = {prefix: _pool(pools, prefix) for prefix in ("", "index_") if f"{prefix}entries" in pools}


def _pool(pools: Mapping[str, Tensor], prefix: str) -> Pool:
    entries = pools[f"{prefix}entries"]
    values, scores = pools[f"{prefix}values"], pools[f"{prefix}scores"]
    scales = pools["index_scales"].flatten() if prefix and "index_scales" in pools else torch.empty(0)
    stored = entries.flatten(0, 1).numpy()
    return Pool(stored, entries.shape[1], values.numpy(), scores.numpy(), scales.numpy())
