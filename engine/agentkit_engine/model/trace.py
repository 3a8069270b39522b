"""Intermediate results of a forward that training needs besides the logits. Dimension key: `model/__init__.py`."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class IndexTrace:
    """One CSA layer's indexer over one block of consecutive queries.

    Attributes:
        layer: Index of the layer.
        start: Position of the first query of the block.
        scores_BTW: Index scores of the entries, differentiable with respect to the indexer only.
        mass_BTW: Attention probability of each entry summed over heads, as if every visible entry were selected;
            detached.
        visible_TW: Entries that a query may select: w < (t + 1) // 4.
    """

    layer: int
    start: int
    scores_BTW: Tensor
    mass_BTW: Tensor
    visible_TW: Tensor


@dataclass(slots=True)
class Trace:
    """Record of one forward; pass it to `Decoder.forward`, which fills it.

    Attributes:
        index_scores: Whether to record the indexers (costs a second softmax per CSA layer).
        index: Their records, in order of layer and block.
        expert_counts: Tokens per expert, int64 [E], by layer index.
        streams_BTMD: The residual streams after the last layer: the input of the MTP block.
    """

    index_scores: bool = True
    index: list[IndexTrace] = field(default_factory=list)
    expert_counts: dict[int, Tensor] = field(default_factory=dict)
    streams_BTMD: Tensor | None = None


def indexer_kl(trace: Trace) -> Tensor:
    """Return the indexers' loss: KL(attention over compressed entries || softmax of the index scores), a scalar.

    Selection has no gradient, so this loss alone trains an indexer, and its gradient reaches nothing else. It is the
    mean over all (layer, sequence, query) with at least two visible entries; 0 if there are none. Source: DeepSeek-V3.2
    (arXiv:2512.02556), section 2.1, with every visible entry as target.
    """
    total, count = torch.zeros(()), 0
    for record in trace.index:
        rows = record.visible_TW.sum(-1) > 1
        num_rows = int(rows.sum())
        if num_rows == 0:
            continue
        visible = record.visible_TW[rows]
        target = record.mass_BTW[:, rows].masked_fill(~visible, 0.0)
        target = target / target.sum(-1, keepdim=True).clamp_min(1e-20)
        log_q = record.scores_BTW[:, rows].masked_fill(~visible, -torch.inf).log_softmax(-1).masked_fill(~visible, 0.0)
        total = total.to(log_q.device) + (torch.xlogy(target, target) - target * log_q).sum()
        count += target.shape[0] * num_rows
    return total / max(count, 1)
