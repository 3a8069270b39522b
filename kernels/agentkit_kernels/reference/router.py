"""The router: experts from a table by token id, or from affinities. Source: the DeepSeek-V4 reference."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from agentkit_kernels.ops import Router
from agentkit_kernels.reference.batch import Batch


def route(logits: Tensor, router: Router, batch: Batch) -> tuple[Tensor, Tensor]:
    affinity_NE = F.softplus(logits).sqrt()
    if router.table is not None:
        experts_NA = router.table[batch.ids]
    else:
        assert router.bias is not None
        biased_NE = affinity_NE.detach() + router.bias.float()
        experts_NA = biased_NE.sort(dim=-1, descending=True, stable=True).indices[:, : router.active]
    weights_NA = affinity_NE.gather(1, experts_NA)
    if batch.trace is not None:
        counts_E = torch.bincount(experts_NA[: batch.tokens].flatten(), minlength=logits.shape[1])
        batch.trace.expert_counts[len(batch.trace.expert_counts)] = counts_E
    return experts_NA, weights_NA / weights_NA.sum(-1, keepdim=True) * router.scale
