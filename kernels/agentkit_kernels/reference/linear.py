"""Matrix products, and the lookup of rows. Dimension key: `agentkit_kernels.ops`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from agentkit_kernels.reference.batch import Batch, pad_rows


class Weight(NamedTuple):
    """Matrices [.., X, K] that share an input. The parameters themselves, so that training sees every change."""

    parts: tuple[Tensor, ...]
    detached: tuple[Tensor, ...] = ()

    def of(self, expert: int) -> Weight:
        """Return the matrices of one expert."""
        return Weight(tuple(part[expert] for part in self.parts))


def linear(x: Tensor, weight: Weight) -> Tensor:
    outs = [F.linear(x, part.float()) for part in weight.parts]
    outs += [F.linear(x.detach(), part.float()) for part in weight.detached]
    return outs[0] if len(outs) == 1 else torch.cat(outs, dim=-1)


def grouped_linear(x: Tensor, weights: Sequence[Weight]) -> Tensor:
    parts = x.flatten(1).chunk(len(weights), dim=-1)
    return torch.cat([linear(part, weight) for part, weight in zip(parts, weights, strict=True)], dim=-1)


def embed(batch: Batch, table: Tensor, streams: int) -> Tensor:
    return F.embedding(batch.ids, table).float().unsqueeze(1).repeat(1, streams, 1)


def take(x: Tensor, rows: Sequence[int]) -> Tensor:
    return pad_rows(x[torch.tensor(rows, device=x.device)])
