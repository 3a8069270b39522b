"""The parameters of a decoder, under their official names. The forward over them is in `forward.py`.

Parameter names are the official tensor names, except that routed experts are stacked:
`layers.N.ffn.experts.{w1,w2,w3}` of shape [experts, out, in].
"""

from __future__ import annotations

from itertools import chain

import torch
from torch import Tensor, nn

from agentkit_engine.spec import LayerSpec, ModelSpec


class RMSNorm(nn.Module):
    """The scale of an RMSNorm."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))


class Compressor(nn.Module):
    """Turns attention inputs into compressed entries of size `head_dim` (the indexer has its own, smaller one)."""

    def __init__(self, spec: ModelSpec, layer: LayerSpec, head_dim: int) -> None:
        super().__init__()
        width = head_dim * layer.series
        self.ape = nn.Parameter(torch.zeros(layer.compress_ratio, width))
        self.wkv = nn.Linear(spec.hidden_size, width, bias=False)
        self.wgate = nn.Linear(spec.hidden_size, width, bias=False)
        self.norm = RMSNorm(head_dim)


class Indexer(nn.Module):
    """Queries from the shared query latent, keys from its own compressor, one weight per head and token."""

    def __init__(self, spec: ModelSpec, layer: LayerSpec) -> None:
        super().__init__()
        self.wq_b = nn.Linear(spec.q_lora_rank, spec.index_n_heads * spec.index_head_dim, bias=False)
        self.weights_proj = nn.Linear(spec.hidden_size, spec.index_n_heads, bias=False)
        self.compressor = Compressor(spec, layer, spec.index_head_dim)


class Attention(nn.Module):
    """The attention of one layer: a window, plus compressed entries according to `layer.attention`.

    Training changes `sliding_window` and `top_k` between forwards.
    """

    def __init__(self, spec: ModelSpec, layer: LayerSpec) -> None:
        super().__init__()
        self.layer = layer
        self.head_dim = spec.head_dim
        self.groups = spec.o_groups
        self.sliding_window, self.top_k = spec.sliding_window, spec.index_topk
        dim, all_heads = spec.hidden_size, spec.num_attention_heads * spec.head_dim
        self.attn_sink = nn.Parameter(torch.zeros(spec.num_attention_heads))
        self.wq_a = nn.Linear(dim, spec.q_lora_rank, bias=False)
        self.q_norm = RMSNorm(spec.q_lora_rank)
        self.wq_b = nn.Linear(spec.q_lora_rank, all_heads, bias=False)
        self.wkv = nn.Linear(dim, spec.head_dim, bias=False)
        self.kv_norm = RMSNorm(spec.head_dim)
        self.wo_a = nn.Linear(all_heads // spec.o_groups, spec.o_groups * spec.o_lora_rank, bias=False)
        self.wo_b = nn.Linear(spec.o_groups * spec.o_lora_rank, dim, bias=False)
        self.compressor = Compressor(spec, layer, spec.head_dim) if layer.compress_ratio else None
        self.indexer = Indexer(spec, layer) if layer.attention == "csa" else None

    def projections(self) -> tuple[list[Tensor], list[Tensor]]:
        """Return the weights that multiply the layer's input: the attention's and, apart, the indexer's."""
        parts, index = [self.wq_a.weight, self.wkv.weight], []
        if self.compressor is not None:
            parts += [self.compressor.wkv.weight, self.compressor.wgate.weight]
        if self.indexer is not None:
            compressor = self.indexer.compressor
            index = [self.indexer.weights_proj.weight, compressor.wkv.weight, compressor.wgate.weight]
        return parts, index

    def latent_projections(self) -> tuple[list[Tensor], list[Tensor]]:
        """Return the weights that multiply the query latent: the attention's and, apart, the indexer's."""
        return [self.wq_b.weight], [] if self.indexer is None else [self.indexer.wq_b.weight]


class Gate(nn.Module):
    """The router: experts from a table by token id (`hash`), or from affinities plus a bias (`score`).

    The bias affects the choice only, never the weights. It has no gradient; training nudges it by load.
    """

    tid2eid: Tensor
    bias: Tensor

    def __init__(self, spec: ModelSpec, layer: LayerSpec) -> None:
        super().__init__()
        self.router = layer.router
        self.active = spec.num_experts_per_tok
        self.weight = nn.Parameter(torch.empty(spec.n_routed_experts, spec.hidden_size))
        nn.init.normal_(self.weight, std=0.02)
        if self.router == "hash":
            table = torch.tensor(range(self.active)).expand(spec.vocab_size, -1).contiguous()
            self.register_buffer("tid2eid", table)
        else:
            self.register_buffer("bias", torch.zeros(spec.n_routed_experts))


class Experts(nn.Module):
    """The routed experts, stacked: w1 (gate) and w3 (up) [E, I, D], w2 (down) [E, D, I]."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        experts, dim, width = spec.n_routed_experts, spec.hidden_size, spec.moe_intermediate_size
        self.w1 = nn.Parameter(torch.empty(experts, width, dim))
        self.w2 = nn.Parameter(torch.empty(experts, dim, width))
        self.w3 = nn.Parameter(torch.empty(experts, width, dim))
        for weight in (self.w1, self.w2, self.w3):
            nn.init.normal_(weight, std=0.02)


class SharedExpert(nn.Module):
    """The expert that every token uses, neither gated nor scaled; its SwiGLU is clamped too."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        dim, width = spec.hidden_size, spec.moe_intermediate_size
        self.w1 = nn.Linear(dim, width, bias=False)
        self.w2 = nn.Linear(width, dim, bias=False)
        self.w3 = nn.Linear(dim, width, bias=False)


class MoE(nn.Module):
    """The feed-forward part of one layer: A of E routed experts per token, plus a shared one."""

    def __init__(self, spec: ModelSpec, layer: LayerSpec) -> None:
        super().__init__()
        self.layer = layer
        self.gate = Gate(spec, layer)
        self.experts = Experts(spec)
        self.shared_experts = SharedExpert(spec)


class Block(nn.Module):
    """A layer of the main stack (and the body of the MTP block). mHC parameters have their official flat names."""

    def __init__(self, spec: ModelSpec, layer: LayerSpec) -> None:
        super().__init__()
        self.attn_norm = RMSNorm(spec.hidden_size)
        self.attn = Attention(spec, layer)
        self.ffn_norm = RMSNorm(spec.hidden_size)
        self.ffn = MoE(spec, layer)
        streams = spec.hc_mult
        maps = (2 + streams) * streams
        self.hc_attn_fn = nn.Parameter(torch.zeros(maps, streams * spec.hidden_size))
        self.hc_attn_base = nn.Parameter(torch.zeros(maps))
        self.hc_attn_scale = nn.Parameter(torch.ones(3))
        self.hc_ffn_fn = nn.Parameter(torch.zeros(maps, streams * spec.hidden_size))
        self.hc_ffn_base = nn.Parameter(torch.zeros(maps))
        self.hc_ffn_scale = nn.Parameter(torch.ones(3))

    def fused_weights(self) -> list[list[Tensor]]:
        """Return the large weights, in the groups that share an input: backends pack each group side by side."""
        experts, shared = self.ffn.experts, self.ffn.shared_experts
        return [
            [*chain(*self.attn.projections())],
            [*chain(*self.attn.latent_projections())],
            [self.attn.wo_a.weight],
            [self.attn.wo_b.weight],
            [experts.w1, experts.w3],
            [experts.w2],
            [shared.w1.weight, shared.w3.weight],
            [shared.w2.weight],
        ]


class MTPBlock(Block):
    """A window-only block on projections of the main stack's streams and the next token's embedding.

    It predicts the token after the next one. Embedding and output head are the main model's. Source: DeepSeek-V3
    (arXiv:2412.19437), section 2.2, and the DeepSeek-V4 reference.
    """

    def __init__(self, spec: ModelSpec, layer: LayerSpec) -> None:
        super().__init__(spec, layer)
        dim, streams = spec.hidden_size, spec.hc_mult
        self.e_proj = nn.Linear(dim, dim, bias=False)
        self.h_proj = nn.Linear(dim, dim, bias=False)
        self.enorm = RMSNorm(dim)
        self.hnorm = RMSNorm(dim)
        self.norm = RMSNorm(dim)
        self.hc_head_fn = nn.Parameter(torch.zeros(streams, streams * dim))
        self.hc_head_base = nn.Parameter(torch.zeros(streams))
        self.hc_head_scale = nn.Parameter(torch.ones(1))
