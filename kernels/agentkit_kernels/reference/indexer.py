"""The lightning indexer of CSA: scores every compressed entry for every query and selects the best.

I(t, w) = sum_j weight_j(t) * relu(q_j(t) · k_w). Selection has no gradient; the indexer learns from its own loss, for
which a `Trace` records its scores. Source: DeepSeek-V3.2 (arXiv:2512.02556) and the DeepSeek-V4 reference.
Dimension key: `reference/batch.py`; U queries of a block, S entries of its tiles.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from agentkit_kernels.reference.batch import ROWS, Batch
from agentkit_kernels.reference.state import LayerState
from agentkit_kernels.trace import IndexTrace

TILES = (0, 32, 128, 256, 512)
"""Starts of the first tiles of entries; from the last start on, every tile has that size. A library may compute the
columns of a product differently when there are more of them, so products with entries have these sizes only."""


@dataclass(slots=True)
class TopK:
    """The choice of every query block of a batch, in order.

    Attributes:
        chosen: bool [B, U, S] over the tiles' entries, or None if a block's queries attend to all they may see.
        traces: The records of the blocks, if the batch has a trace.
    """

    chosen: list[Tensor | None] = field(default_factory=list)
    traces: list[IndexTrace | None] = field(default_factory=list)


def tiles(count: int) -> list[tuple[int, int]]:
    """Return the bounds of the tiles that hold the first `count` entries."""
    bounds = [start for start in TILES if start < count]
    if bounds and bounds[-1] == TILES[-1]:
        bounds += range(2 * TILES[-1], count, TILES[-1])
    ends = [*bounds[1:], next((start for start in TILES if start >= count), -(-count // TILES[-1]) * TILES[-1])]
    return list(zip(bounds, ends, strict=True)) if bounds else []


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """Batched product [B, X, K] · [B, K, S] whose left rows are padded to `ROWS`."""
    missing = ROWS - a.shape[1]
    if missing <= 0:
        return torch.bmm(a, b)
    return torch.bmm(torch.nn.functional.pad(a, (0, 0, 0, missing)), b)[:, : a.shape[1]]


def index_scores(q_BUJC: Tensor, keys_BSC: Tensor, weights_BUJ: Tensor) -> Tensor:
    """sum_j weights[j] * relu(q_j · k_s), [B, U, S]."""
    dots = matmul(q_BUJC.flatten(1, 2), keys_BSC.mT).relu().view(*q_BUJC.shape[:3], -1)
    return (weights_BUJ.unsqueeze(2) @ dots).squeeze(2)


def select_top_k(scores: Tensor, k: int, visible: Tensor) -> Tensor:
    """Return True for the `k` highest visible scores of the last dimension (for all visible ones if there are fewer).

    Ties go to the lowest index, which `torch.topk` does not guarantee. NaN is chosen, so that the logits show it.
    """
    scores = scores.nan_to_num(torch.inf, torch.inf, -torch.inf).masked_fill(~visible, -torch.inf)
    if k >= scores.shape[-1] or k == 0:
        return visible.expand_as(scores) & (k > 0)
    threshold = scores.topk(k, dim=-1).values[..., -1:]
    above, tied = scores > threshold, scores == threshold
    room = k - above.sum(-1, keepdim=True)
    return (above | (tied & (tied.cumsum(-1) <= room))) & visible


def index_topk(
    index_q: Tensor, index_weights: Tensor, batch: Batch, state: LayerState, *, ratio: int, top_k: int
) -> TopK:
    result = TopK()
    recording = batch.trace is not None and batch.trace.index_scores
    for group in batch.groups:
        q_BTJC, weights_BTJ = group.take(index_q), group.take(index_weights)
        for block in group.blocks:
            counts_U1 = ((block.positions + 1) // ratio).unsqueeze(1)
            most = (group.start + block.high) // ratio
            if most == 0 or (most <= top_k and not recording):
                result.chosen.append(None)
                result.traces.append(None)
                continue
            some = q_BTJC[:, block.tokens], weights_BTJ[:, block.tokens]
            parts = [index_scores(some[0], state.entries(group, "index_", *tile), some[1]) for tile in tiles(most)]
            scores_BUS = torch.cat(parts, dim=-1)
            visible_US = torch.arange(scores_BUS.shape[-1], device=scores_BUS.device) < counts_U1
            result.chosen.append(select_top_k(scores_BUS.detach(), top_k, visible_US))
            start = group.start + block.low
            result.traces.append(IndexTrace(start, scores_BUS, visible_US) if recording else None)
    return result
