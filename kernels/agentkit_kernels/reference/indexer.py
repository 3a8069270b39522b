"""The lightning indexer of CSA: scores every compressed entry for every query and selects the best.

I(t, w) = sum_j weight_j(t) * relu(q_j(t) · k_w). Selection has no gradient; the indexer learns from its own loss, for
which a `Trace` records its scores. Source: DeepSeek-V3.2 (arXiv:2512.02556) and the DeepSeek-V4 reference.
Dimension key: `reference/batch.py`; U queries of a block, S entries up to its end.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from agentkit_kernels.reference.batch import ROWS, Batch
from agentkit_kernels.reference.state import LayerState
from agentkit_kernels.trace import IndexTrace


@dataclass(slots=True)
class TopK:
    """The choice of every query block of a batch, in order.

    Attributes:
        chosen: bool [B, U, S], or None if a block's queries attend to all they may see.
        traces: The records of the blocks, if the batch has a trace.
    """

    chosen: list[Tensor | None] = field(default_factory=list)
    traces: list[IndexTrace | None] = field(default_factory=list)


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """Batched product [B, X, K] · [B, K, S] whose left rows are padded to `ROWS`."""
    missing = ROWS - a.shape[1]
    if missing <= 0:
        return torch.bmm(a, b)
    return torch.bmm(F.pad(a, (0, 0, 0, missing)), b)[:, : a.shape[1]]


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
            visible = int(block.positions[-1] + 1) // ratio
            if visible == 0 or (visible <= top_k and not recording):
                result.chosen.append(None)
                result.traces.append(None)
                continue
            keys_BSC = state.entries(group, "index_", block.end // ratio, index_q.shape[-1])
            scores_BUS = index_scores(q_BTJC[:, block.tokens], keys_BSC, weights_BTJ[:, block.tokens])
            visible_US = (
                torch.arange(keys_BSC.shape[1], device=keys_BSC.device) < (block.positions[:, None] + 1) // ratio
            )
            result.chosen.append(select_top_k(scores_BUS.detach(), top_k, visible_US))
            start = group.start + block.tokens.start
            result.traces.append(IndexTrace(start, scores_BUS, visible_US) if recording else None)
    return result
