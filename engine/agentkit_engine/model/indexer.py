"""The lightning indexer of CSA: scores every compressed entry for every query and selects the best.

I(t, w) = sum_j weight_j(t) * relu(q_j(t) · k_w). Source: DeepSeek-V3.2 (arXiv:2512.02556) and the DeepSeek-V4
reference. Dimension key: `model/__init__.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from agentkit_engine.model.cache import CompressorCache
from agentkit_engine.model.compressor import Compressor
from agentkit_engine.model.rope import rotate
from agentkit_engine.spec import LayerSpec, ModelSpec


def index_scores(q_BTJC: Tensor, keys_BWC: Tensor, weights_BTJ: Tensor) -> Tensor:
    """sum_j weights[j] * relu(q_j · k_w), float32 [B, T, W]."""
    batch, tokens, heads, _ = q_BTJC.shape
    dots_BTJW = (q_BTJC.flatten(1, 2).float() @ keys_BWC.float().mT).view(batch, tokens, heads, -1)
    return (weights_BTJ.float().unsqueeze(2) @ dots_BTJW.relu_()).squeeze(2)


def select_top_k(scores: Tensor, k: int, visible: Tensor | None = None) -> Tensor:
    """Return True for the `k` highest visible scores of the last dimension (for all visible ones if there are fewer).

    Ties go to the lowest index on every device and for every shape, which `torch.topk` does not guarantee. A `k` of 0
    selects nothing.
    """
    if k == 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    if visible is not None:
        scores = scores.masked_fill(~visible, -torch.inf)
    if k >= scores.shape[-1]:
        return torch.ones_like(scores, dtype=torch.bool) if visible is None else visible.expand_as(scores)
    threshold = scores.topk(k, dim=-1).values[..., -1:]
    above, tied = scores > threshold, scores == threshold
    room = k - above.sum(-1, keepdim=True)
    selected = above | (tied & (tied.cumsum(-1) <= room))
    return selected if visible is None else selected & visible


@dataclass(frozen=True, slots=True)
class IndexQueries:
    """Rotated queries [B, T, J, C] and scaled head weights [B, T, J] of one forward, and the keys of all entries."""

    q_BTJC: Tensor
    weights_BTJ: Tensor
    keys_BWC: Tensor

    @property
    def heads(self) -> int:
        """J, the number of index heads."""
        return self.q_BTJC.shape[2]

    def scores(self, first: int, tokens: int, num_entries: int) -> Tensor:
        """Return the index scores [B, tokens, num_entries] of this forward's queries from number `first` on."""
        block = slice(first, first + tokens)
        return index_scores(self.q_BTJC[:, block], self.keys_BWC[:, :num_entries], self.weights_BTJ[:, block])


class Indexer(nn.Module):
    """Queries from the shared query latent, keys from its own compressor, one weight per head and token."""

    def __init__(self, spec: ModelSpec, layer: LayerSpec) -> None:
        super().__init__()
        self.heads, self.head_dim = spec.index_n_heads, spec.index_head_dim
        self.wq_b = nn.Linear(spec.q_lora_rank, self.heads * self.head_dim, bias=False)
        self.weights_proj = nn.Linear(spec.hidden_size, self.heads, bias=False)
        self.compressor = Compressor(spec, layer, self.head_dim)

    def forward(
        self,
        x_BTD: Tensor,
        q_latent_BTQ: Tensor,
        rotations_TR: Tensor,
        cache: CompressorCache,
        top_k: int,
        recording: bool,
    ) -> IndexQueries | None:
        """Append these tokens' index keys and return the queries.

        Returns None when all entries fit in `top_k` and no trace is `recording`.

        The inputs are detached: selection has no gradient, and the indexer's own loss (`indexer_kl`) trains the indexer
        alone. Nothing here is differentiable unless a trace is `recording`.
        """
        with torch.set_grad_enabled(recording and torch.is_grad_enabled()):
            x_BTD, q_latent_BTQ = x_BTD.detach(), q_latent_BTQ.detach()
            keys_BWC = self.compressor(x_BTD, cache)
            if keys_BWC.shape[1] <= top_k and not recording:
                return None
            q_BTJC = rotate(self.wq_b(q_latent_BTQ).view(*x_BTD.shape[:2], self.heads, self.head_dim), rotations_TR)
            weights_BTJ = self.weights_proj(x_BTD).float() * (self.head_dim * self.heads) ** -0.5
        return IndexQueries(q_BTJC, weights_BTJ, keys_BWC)
