"""The forward of DeepSeek-V4, once, for training and for serving on every backend.

The residual is M parallel streams. A sub-layer (attention or experts) reads one normed vector from them and writes its
output back to all of them (mHC). The forward only calls operations (`agentkit_kernels.ops`); arrays, weights and state
are the backend's. So is the quantisation of activations in DeepSeek's inference (FP8 round trip of KV rows and linear
inputs, Hadamard rotation and FP4 round trip in the indexer): a backend does it if it is asked to. Dimension key:
`model/__init__.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain, pairwise
from typing import TYPE_CHECKING, NamedTuple, Protocol

from torch import Tensor

from agentkit_engine.model.parameters import Attention, Block, MoE, MTPBlock
from agentkit_engine.model.rope import frequencies
from agentkit_engine.spec import ModelSpec, RopeSpec
from agentkit_kernels.ops import Array, Batch, Compressor, Heads, HyperConnection, HyperHead, Ops, Plan, Router, State

if TYPE_CHECKING:
    from agentkit_engine.model.decoder import Decoder

Rotations = dict[RopeSpec, Array]


class SubLayer(Protocol):
    """One half of a layer, between a read and a write of the streams."""

    hc: HyperConnection

    def __call__(self, x: Array, rotations: Rotations, batch: Batch) -> Array:
        """Return the output [N, D] of the normed input [N, D]."""


class AttentionLayer:
    """One layer's attention over its state."""

    def __init__(self, module: Attention, hc: HyperConnection, ops: Ops, state: State, spec: ModelSpec) -> None:
        self.hc, self.ops, self.state = hc, ops, state
        self.layer, self.window, self.top_k = module.layer, module.sliding_window, module.top_k
        main, index = module.projections()
        self.project = ops.weight(*main, detached=index)
        main_latent, index_latent = module.latent_projections()
        self.project_latent = ops.weight(*main_latent, detached=index_latent)
        self.q_norm, self.sink, self.eps = (
            ops.vector(module.q_norm.weight),
            ops.vector(module.attn_sink),
            spec.rms_norm_eps,
        )
        kv_column, index_column = spec.q_lora_rank, sum(part.shape[0] for part in main)
        heads, kv_norm = spec.num_attention_heads, ops.vector(module.kv_norm.weight)
        self.heads = Heads(heads, spec.head_dim, kv_column, kv_norm, self.eps)
        if module.indexer is not None:
            self.heads = Heads(*self.heads[:5], spec.index_n_heads, spec.index_head_dim, index_column)
        inner = [("", kv_column + spec.head_dim, module.compressor)]
        if module.indexer is not None:
            inner.append(("index_", index_column + spec.index_n_heads, module.indexer.compressor))
        angles = ops.vector(frequencies(self.layer.rope, spec.qk_rope_head_dim, module.attn_sink.device))
        self.compressors = [
            Compressor(
                prefix, column, self.layer.compress_ratio, self.layer.series == 2, ops.vector(compressor.ape),
                ops.vector(compressor.norm.weight), self.eps, angles,
            )
            for prefix, column, compressor in inner if compressor is not None
        ]  # fmt: skip
        self.wo_a, self.groups = ops.weight(module.wo_a.weight), module.groups
        self.wo_b = ops.weight(module.wo_b.weight)

    def __call__(self, x: Array, rotations: Rotations, batch: Batch) -> Array:
        ops, state, turns = self.ops, self.state, rotations[self.layer.rope]
        projected = ops.linear(x, self.project)
        latent = ops.linear(ops.rms_norm(projected, self.q_norm, self.eps), self.project_latent)
        q, kv, index_q, index_weights = ops.qkv(latent, projected, turns, self.heads, batch, state)
        for compressor in self.compressors:
            ops.compress(projected, compressor, batch, state)
        ratio, topk = self.layer.compress_ratio, None
        if self.heads.index_heads:
            topk = ops.index_topk(index_q, index_weights, batch, state, ratio=ratio, top_k=self.top_k)
        out = ops.attend(q, kv, turns, self.sink, batch, state, window=self.window, ratio=ratio, topk=topk)
        return ops.linear(ops.grouped_linear(out, self.wo_a, self.groups), self.wo_b)


class ExpertLayer:
    """One layer's mixture of experts."""

    def __init__(self, module: MoE, hc: HyperConnection, ops: Ops, spec: ModelSpec) -> None:
        self.hc, self.ops, self.limit = hc, ops, spec.swiglu_limit
        gate, experts, shared = module.gate, module.experts, module.shared_experts
        self.gate = ops.weight(gate.weight, wide=True)
        hashed = gate.router == "hash"
        self.router = Router(
            ops.table(gate.tid2eid) if hashed else None,
            None if hashed else ops.vector(gate.bias),
            gate.active,
            spec.routed_scaling_factor,
        )
        self.w13, self.w2 = ops.stack(experts.w1, experts.w3), ops.stack(experts.w2)
        self.shared_w13 = ops.weight(shared.w1.weight, shared.w3.weight)
        self.shared_w2 = ops.weight(shared.w2.weight)

    def __call__(self, x: Array, rotations: Rotations, batch: Batch) -> Array:
        ops = self.ops
        experts, weights = ops.route(ops.linear(x, self.gate), self.router, batch)
        shared = ops.linear(ops.swiglu(ops.linear(x, self.shared_w13), self.limit), self.shared_w2)
        return ops.experts(x, experts, weights, self.w13, self.w2, self.limit, shared, batch)


class Computed(NamedTuple):
    """Output of a forward: for each wanted row, the logits [V] and the residual streams [M, D] after the last layer."""

    logits: Tensor
    streams: Tensor


class Forward:
    """A decoder's weights, packed by `ops` over one state per block."""

    def __init__(self, decoder: Decoder, ops: Ops, states: Sequence[State]) -> None:
        spec = self.spec = decoder.spec
        self.ops = ops
        self.embedding = ops.table(decoder.embed.weight)
        self.unembedding = ops.weight(decoder.head.weight, wide=True)
        device = decoder.embed.weight.device
        self.frequencies = {
            layer.rope: ops.vector(frequencies(layer.rope, spec.qk_rope_head_dim, device))
            for layer in (*spec.layers, *spec.mtp_layers)
        }
        sublayers = [_sublayers(block, ops, state, spec) for block, state in zip(decoder.blocks, states, strict=True)]
        self.layers = [*chain(*sublayers[: len(spec.layers)])]
        self.head = _head(decoder, ops, spec)
        if decoder.mtp and isinstance(block := decoder.mtp[0], MTPBlock):
            self.mtp_layers, self.mtp_head = sublayers[-1], _head(block, ops, spec)
            self.e_norm, self.h_norm = ops.vector(block.enorm.weight), ops.vector(block.hnorm.weight)
            self.e_proj, self.h_proj = ops.weight(block.e_proj.weight), ops.weight(block.h_proj.weight)

    def __call__(self, plan: Plan, rows: Sequence[int] | None = None) -> Computed:
        """Write the state of the plan's tokens, and return the output of some `rows` (of all by default)."""
        return self.compute(self.ops.batch(plan), rows)

    def compute(self, batch: Batch, rows: Sequence[int] | None = None) -> Computed:
        """Compute a plan that the backend has prepared; see `__call__`."""
        ops = self.ops
        streams = self._run(self.layers, ops.embed(batch, self.embedding, self.spec.hc_mult), batch)
        if rows is None:
            return self._output(streams, self.head, batch.tokens)
        return self._output(ops.take(streams, rows), self.head, len(rows))

    def draft(self, streams: Tensor, plan: Plan) -> Computed:
        """Run the MTP block: the plan's ids are the tokens after those of `streams` [N, M, D], and it predicts the
        tokens after them. Its own streams draft further."""
        ops, batch, eps = self.ops, self.ops.batch(plan), self.spec.rms_norm_eps
        e = ops.linear(ops.rms_norm(ops.embed(batch, self.embedding, 1)[:, 0], self.e_norm, eps), self.e_proj)
        rows = ops.array(streams, batch)
        flat = ops.rms_norm(rows.reshape(-1, rows.shape[-1]), self.h_norm, eps)
        h = ops.linear(flat, self.h_proj).reshape(rows.shape)
        return self._output(self._run(self.mtp_layers, h + e[:, None], batch), self.mtp_head, batch.tokens)

    def _run(self, sublayers: Sequence[SubLayer], streams: Array, batch: Batch) -> Array:
        ops = self.ops
        rotations = {rope: ops.rotations(batch, angles) for rope, angles in self.frequencies.items()}
        x, mixing = ops.hc_pre(streams, sublayers[0].hc)
        for sublayer, following in pairwise(sublayers):
            y = sublayer(x, rotations, batch)
            streams, x, mixing = ops.hc_post_pre(streams, y, mixing, following.hc)
        return ops.hc_post(streams, sublayers[-1](x, rotations, batch), mixing)

    def _output(self, streams: Array, head: HyperHead, count: int) -> Computed:
        ops = self.ops
        logits = ops.linear(ops.hc_head(streams, head), self.unembedding)
        return Computed(ops.tensor(logits)[:count], ops.tensor(streams)[:count])


def _sublayers(block: Block, ops: Ops, state: State, spec: ModelSpec) -> list[SubLayer]:
    def connection(fn: Tensor, base: Tensor, scale: Tensor, norm: Tensor) -> HyperConnection:
        vectors = ops.vector(base), ops.vector(scale), ops.vector(norm)
        return HyperConnection(ops.weight(fn), *vectors, spec.rms_norm_eps, spec.hc_eps, spec.hc_sinkhorn_iters)

    attn_hc = connection(block.hc_attn_fn, block.hc_attn_base, block.hc_attn_scale, block.attn_norm.weight)
    ffn_hc = connection(block.hc_ffn_fn, block.hc_ffn_base, block.hc_ffn_scale, block.ffn_norm.weight)
    return [AttentionLayer(block.attn, attn_hc, ops, state, spec), ExpertLayer(block.ffn, ffn_hc, ops, spec)]


def _head(module: Decoder | MTPBlock, ops: Ops, spec: ModelSpec) -> HyperHead:
    vectors = ops.vector(module.hc_head_base), ops.vector(module.hc_head_scale), ops.vector(module.norm.weight)
    return HyperHead(ops.weight(module.hc_head_fn), *vectors, spec.rms_norm_eps, spec.hc_eps)
