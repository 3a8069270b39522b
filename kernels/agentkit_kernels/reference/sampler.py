"""Sample a batch: temperature, a packed grammar mask, and one uniform number per row. Twin of the Triton sampler.

    weight_v = exp((logit_v - max) / temperature) for allowed ids, else 0
    id       = the first whose cumulative weight, in the order of ids, exceeds u * the total

At temperature 0 the id is the first with the highest allowed logit. Sums are float64, because float32 rounding over a
large vocabulary would bias the draw. Dimension key: B rows, V vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Sampled(NamedTuple):
    """The choice of every row.

    Attributes:
        ids: int64 [B]; -1 where a mask allows nothing.
        logprobs: Log-softmax of the raw logits at the id, float32 [B].
        finite: False for rows with a NaN or infinite logit, whose id and log-probability mean nothing; bool [B].
    """

    ids: Tensor
    logprobs: Tensor
    finite: Tensor


def sample(logits: Tensor, temperatures: Tensor, uniforms: Tensor, bitmask: Tensor | None = None) -> Sampled:
    """Choose an id for every row.

    Args:
        logits: [B, V].
        temperatures: float64 [B]; 0 takes the highest logit.
        uniforms: float64 [B], in [0, 1).
        bitmask: int32 [B, ceil(V / 32)]; bit v mod 32 of word v // 32 is 1 if id v is allowed. None allows all.
    """
    size = logits.shape[1]
    logits = logits.float()
    allowed = torch.ones_like(logits, dtype=torch.bool)
    if bitmask is not None:
        bits = bitmask.unsqueeze(2) >> torch.arange(32, dtype=torch.int32, device=logits.device) & 1
        allowed = bits.flatten(1)[:, :size].bool()
    masked = logits.masked_fill(~allowed, -torch.inf)
    greedy = temperatures == 0
    scale = torch.where(greedy, 1.0, temperatures).double().unsqueeze(1)
    weights = ((masked.double() - masked.amax(1, keepdim=True).double()) / scale).exp()
    cumulative = weights.cumsum(1)
    drawn = torch.searchsorted(cumulative, uniforms.unsqueeze(1) * cumulative[:, -1:], right=True).squeeze(1)
    last = size - 1 - weights.flip(1).gt(0).to(torch.uint8).argmax(1)  # for rounding at the end
    ids = torch.where(greedy, masked.argmax(1), torch.minimum(drawn, last))
    ids = torch.where(allowed.any(1), ids, -1)
    logprobs = logits.double().log_softmax(1).gather(1, ids.clamp(min=0).unsqueeze(1)).squeeze(1).float()
    return Sampled(ids, logprobs, logits.isfinite().all(1))
