"""Multi-token prediction: one more block that reads the next token and predicts the one after it.

Embedding and output head are the main model's. Source: DeepSeek-V3 (arXiv:2412.19437), section 2.2, and the
DeepSeek-V4 reference. Dimension key: `model/__init__.py`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from agentkit_engine.model.attention import ForwardContext
from agentkit_engine.model.block import Block
from agentkit_engine.model.cache import LayerCache
from agentkit_engine.model.hyper_connections import collapse
from agentkit_engine.model.norm import RMSNorm
from agentkit_engine.spec import LayerSpec, ModelSpec


class MTPBlock(Block):
    """A window-only decoder block on projections of the main stack's streams and the next token's embedding."""

    def __init__(self, spec: ModelSpec, layer: LayerSpec) -> None:
        super().__init__(spec, layer)
        dim, streams = spec.hidden_size, spec.hc_mult
        self.e_proj = nn.Linear(dim, dim, bias=False)
        self.h_proj = nn.Linear(dim, dim, bias=False)
        self.enorm = RMSNorm(dim, spec.rms_norm_eps)
        self.hnorm = RMSNorm(dim, spec.rms_norm_eps)
        self.norm = RMSNorm(dim, spec.rms_norm_eps)
        self.hc_head_fn = nn.Parameter(torch.zeros(streams, streams * dim))
        self.hc_head_base = nn.Parameter(torch.zeros(streams))
        self.hc_head_scale = nn.Parameter(torch.ones(1))

    def draft(
        self,
        streams_BTMD: Tensor,
        next_embedding_BTD: Tensor,
        next_ids_BT: Tensor,
        cache: LayerCache,
        context: ForwardContext,
    ) -> tuple[Tensor, Tensor]:
        """Return the normed output vectors for the head [B, T, D], and the block's own streams [B, T, M, D]."""
        e_BT1D = self.e_proj(self.enorm(next_embedding_BTD)).unsqueeze(2)
        streams_BTMD = self.h_proj(self.hnorm(streams_BTMD)) + e_BT1D
        streams_BTMD = self(streams_BTMD, next_ids_BT, cache, context)
        x_ND = collapse(
            streams_BTMD.flatten(0, 1),
            self.hc_head_fn,
            self.hc_head_base,
            self.hc_head_scale,
            norm_eps=self.spec.rms_norm_eps,
            eps=self.spec.hc_eps,
        )
        return self.norm(x_ND).view(*streams_BTMD.shape[:2], -1), streams_BTMD
