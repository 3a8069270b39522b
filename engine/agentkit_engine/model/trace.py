"""The indexer's loss, from the record of a forward. Dimension key: `model/__init__.py`."""

from __future__ import annotations

import torch

from agentkit_kernels.trace import Trace


def indexer_kl(trace: Trace) -> torch.Tensor:
    """Return the indexers' loss: KL(attention over compressed entries || softmax of the index scores), a scalar.

    Selection has no gradient, so this loss alone trains an indexer, and its gradient reaches nothing else. It is the
    mean over all (layer, sequence, query) with at least two visible entries; 0 if there are none. Source: DeepSeek-V3.2
    (arXiv:2512.02556), section 2.1, with every visible entry as target.
    """
    total, count = torch.zeros(()), 0
    for record in trace.index:
        assert record.mass_BTW is not None
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
