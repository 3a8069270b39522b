"""One decoder layer: attention and MoE, each between an mHC read and an mHC write of the residual streams.

Dimension key: `model/__init__.py`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from agentkit_engine.model.attention import Attention, ForwardContext
from agentkit_engine.model.cache import LayerCache
from agentkit_engine.model.hyper_connections import connect, write
from agentkit_engine.model.moe import MoE
from agentkit_engine.model.norm import RMSNorm
from agentkit_engine.spec import LayerSpec, ModelSpec


class Block(nn.Module):
    """A layer of the main stack (and the body of the MTP block). mHC parameters have their official flat names."""

    def __init__(self, spec: ModelSpec, layer: LayerSpec) -> None:
        super().__init__()
        self.spec = spec
        self.attn_norm = RMSNorm(spec.hidden_size, spec.rms_norm_eps)
        self.attn = Attention(spec, layer)
        self.ffn_norm = RMSNorm(spec.hidden_size, spec.rms_norm_eps)
        self.ffn = MoE(spec, layer)
        streams = spec.hc_mult
        maps = (2 + streams) * streams
        self.hc_attn_fn = nn.Parameter(torch.zeros(maps, streams * spec.hidden_size))
        self.hc_attn_base = nn.Parameter(torch.zeros(maps))
        self.hc_attn_scale = nn.Parameter(torch.ones(3))
        self.hc_ffn_fn = nn.Parameter(torch.zeros(maps, streams * spec.hidden_size))
        self.hc_ffn_base = nn.Parameter(torch.zeros(maps))
        self.hc_ffn_scale = nn.Parameter(torch.ones(3))

    def forward(self, streams_BTMD: Tensor, token_ids_BT: Tensor, cache: LayerCache, context: ForwardContext) -> Tensor:
        """Residual streams in and out, [B, T, M, D]."""
        spec, shape = self.spec, streams_BTMD.shape
        hc = {"norm_eps": spec.rms_norm_eps, "eps": spec.hc_eps}
        streams_NMD = streams_BTMD.flatten(0, 1)
        x_ND, mixing = connect(
            streams_NMD, self.hc_attn_fn, self.hc_attn_base, self.hc_attn_scale, iterations=spec.hc_sinkhorn_iters, **hc
        )
        x_BTD = self.attn_norm(x_ND).view(*shape[:2], -1)
        streams_NMD = write(streams_NMD, self.attn(x_BTD, cache, context).flatten(0, 1), mixing)
        x_ND, mixing = connect(
            streams_NMD, self.hc_ffn_fn, self.hc_ffn_base, self.hc_ffn_scale, iterations=spec.hc_sinkhorn_iters, **hc
        )
        y_ND = self.ffn(self.ffn_norm(x_ND), token_ids_BT.flatten(), context.trace)
        return write(streams_NMD, y_ND, mixing).view(shape)
