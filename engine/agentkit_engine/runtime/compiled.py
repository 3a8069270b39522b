"""The layers of a decoder on a CPU: compiled kernels, and the library's matrix products.

The steps are those of `eager.py`, on numpy arrays. Nothing is padded or masked for exactness, because the kernels and
the products (`products.py`) compute each row by itself.

Dimension key: `runtime/__init__.py`, `agentkit_kernels/cpu.py`.
"""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as Seq
from itertools import pairwise
from typing import cast

import numpy as np
import torch
from torch import Tensor

from agentkit_engine.model.attention import Attention
from agentkit_engine.model.block import Block
from agentkit_engine.model.compressor import Compressor
from agentkit_engine.model.decoder import Decoder
from agentkit_engine.model.hyper_connections import scale_of_output
from agentkit_engine.model.moe import MoE
from agentkit_engine.model.mtp import MTPBlock
from agentkit_engine.model.rope import frequencies
from agentkit_engine.runtime.packing import packed, projections
from agentkit_engine.runtime.products import Dots, Product, as_array, by_library, empty, padded_rows, settle
from agentkit_engine.runtime.segments import Computed, Segment
from agentkit_engine.runtime.state import CompressorState, LayerState, Pools, Sequence
from agentkit_engine.spec import ModelSpec, RopeSpec
from agentkit_kernels import cpu
from agentkit_kernels.cpu import Floats, Ints

ROWS_OF_EXPERT = 6
"""With fewer rows per expert than this on average, tokens go through their experts one at a time."""
SCORED_ENTRIES = 2048
"""Index keys per product; tiles start at the first key."""
SCORE_TILE = 1 << 18
"""Maximum number of per-head index scores held at once (1 MiB), so that they stay in the processor's cache."""
COLUMNS = 64
"""The number of index keys in a product is a multiple of this."""


class Batch:
    """The rows of one forward: all sequences, end to end."""

    def __init__(
        self, ids: Seq[int], sequences: Seq[Sequence], sizes: Seq[int], angles: dict[RopeSpec, Floats]
    ) -> None:
        self.sequences = sequences
        self.ids_N = np.array(ids, np.int64)
        self.rows_B1: Ints = np.cumsum([0, *sizes])
        self.slots_B = np.array([sequence.slot for sequence in sequences], np.int64)
        starts = [sequence.length for sequence in sequences]
        self.positions_N: Ints = np.concatenate([np.arange(s, s + n) for s, n in zip(starts, sizes, strict=True)])
        self.tables_BX = np.zeros((len(sequences), max(sequence.num_spans for sequence in sequences)), np.int64)
        for row, sequence in zip(self.tables_BX, sequences, strict=True):
            row[: sequence.num_spans] = sequence.spans
        self.turns_NR = {rope: self._turns(of_rope) for rope, of_rope in angles.items()}

    def __len__(self) -> int:
        return len(self.ids_N)

    def _turns(self, angles: Floats) -> Floats:
        turns_NR = empty(len(self), 2 * len(angles))
        cpu.rotations(self.positions_N, angles, turns_NR)
        return turns_NR


class CompiledLayers:
    """A decoder's weights, packed once; see `runner.Layers`."""

    def __init__(self, decoder: Decoder, pools: Pools, *, exact: bool) -> None:
        spec = self.spec = decoder.spec
        self.embedding = as_array(decoder.embed.weight.detach())
        blocks = decoder.blocks[: len(pools.layers)]
        dots = Dots()
        self.layers = [_Layer(block, state, dots) for block, state in zip(blocks, pools.layers, strict=True)]
        self.output = _Output(decoder)
        self.head = Product(packed(decoder.head.weight))
        self.angles = {layer.rope: _angles(layer.rope, spec) for layer in (*spec.layers, *spec.mtp_layers)}
        self.drafts = _Drafts(block) if decoder.mtp and isinstance(block := decoder.mtp[0], MTPBlock) else None
        products = [self.head, *self.output.products, *(p for layer in self.layers for p in layer.products)]
        if self.drafts is not None:
            products += self.drafts.products
        settle(products, exact=exact)
        if exact and any(layer.attention.index is not None for layer in self.layers):
            dots.settle(spec.index_head_dim, SCORED_ENTRIES, COLUMNS)

    def __call__(self, segments: Seq[Segment], firsts: Seq[int]) -> Computed:
        ids = [token_id for segment in segments for token_id in (*segment.ids, *segment.draft)]
        sizes = [len(segment) for segment in segments]
        batch = Batch(ids, [segment.sequence for segment in segments], sizes, self.angles)
        streams_NMD = np.repeat(self._embedded(batch)[:, None], self.spec.hc_mult, 1)
        for layer in self.layers:
            streams_NMD = layer(streams_NMD, batch)
        counts = [size - first for size, first in zip(sizes, firsts, strict=True)]
        if sum(counts) < len(batch):
            ends = zip(batch.rows_B1[1:], counts, strict=True)
            streams_NMD = streams_NMD[np.concatenate([np.arange(end - count, end) for end, count in ends])]
        return Computed(torch.from_numpy(self.head(self.output(streams_NMD))), torch.from_numpy(streams_NMD))

    def mtp_draft(self, streams_BMD: Tensor, ids_B: Seq[int]) -> list[int]:
        assert self.drafts is not None
        batch = Batch(ids_B, [Sequence(0)] * len(ids_B), [1] * len(ids_B), self.angles)
        x_BD = self.drafts(streams_BMD.numpy(), self._embedded(batch), batch)
        ids: list[int] = self.head(x_BD).argmax(-1).tolist()
        return ids

    def _embedded(self, batch: Batch) -> Floats:
        rows_ND = self.embedding[batch.ids_N]
        if rows_ND.dtype == np.uint16:
            rows_ND = (rows_ND.astype(np.uint32) << 16).view(np.float32)
        return cast(Floats, rows_ND)


class _Layer:
    """One decoder layer over its state."""

    def __init__(self, block: Block, state: LayerState, dots: Dots) -> None:
        self.attn_connection = _Connection(
            block.hc_attn_fn, block.hc_attn_base, block.hc_attn_scale, block.attn_norm.weight, block.spec
        )
        self.ffn_connection = _Connection(
            block.hc_ffn_fn, block.hc_ffn_base, block.hc_ffn_scale, block.ffn_norm.weight, block.spec
        )
        self.attention = _Attention(block.attn, state, dots, block.spec)
        self.experts = _Experts(block.ffn)

    @property
    def products(self) -> list[Product]:
        connections = [self.attn_connection.fn, self.ffn_connection.fn]
        return [*connections, *self.attention.products, *self.experts.products]

    def __call__(self, streams_NMD: Floats, batch: Batch) -> Floats:
        x_ND, post, comb = self.attn_connection(streams_NMD)
        streams_NMD = _write(streams_NMD, self.attention(x_ND, batch), post, comb)
        x_ND, post, comb = self.ffn_connection(streams_NMD)
        return _write(streams_NMD, self.experts(x_ND, batch.ids_N), post, comb)


class _Connection:
    """The mHC maps of one sub-layer, and the norm of its input."""

    def __init__(self, fn: Tensor, base: Tensor, scale: Tensor, norm: Tensor, spec: ModelSpec) -> None:
        self.fn, self.base, self.norm = Product(packed(fn)), _array(base), _array(norm)
        self.scale = _array(scale.float()[scale_of_output(spec.hc_mult, scale.device)])
        self.norm_eps, self.eps = np.float32(spec.rms_norm_eps), np.float32(spec.hc_eps)
        self.iterations = spec.hc_sinkhorn_iters

    def __call__(self, streams_NMD: Floats) -> tuple[Floats, Floats, Floats]:
        rows, size, dim = streams_NMD.shape
        x_ND = empty(rows, dim)
        post_NM, comb_NMM = empty(rows, size), empty(rows, size, size)
        raw_NX = self.fn(streams_NMD.reshape(rows, -1))
        cpu.connect(
            streams_NMD, raw_NX, self.base, self.scale, self.norm, self.norm_eps, self.eps, self.iterations,
            x_ND, post_NM, comb_NMM,
        )  # fmt: skip
        return x_ND, post_NM, comb_NMM


class _Output:
    """The final collapse of the residual streams, of a decoder or of its MTP block."""

    def __init__(self, module: Decoder | MTPBlock) -> None:
        spec = module.spec
        self.fn = Product(packed(module.hc_head_fn))
        self.base, self.norm = _array(module.hc_head_base), _array(module.norm.weight)
        self.scale = np.float32(module.hc_head_scale.item())
        self.norm_eps, self.eps = np.float32(spec.rms_norm_eps), np.float32(spec.hc_eps)

    @property
    def products(self) -> list[Product]:
        return [self.fn]

    def __call__(self, streams_NMD: Floats) -> Floats:
        x_ND = empty(len(streams_NMD), streams_NMD.shape[2])
        raw_NM = self.fn(streams_NMD.reshape(len(streams_NMD), -1))
        cpu.collapse(streams_NMD, raw_NM, self.base, self.scale, self.norm, self.norm_eps, self.eps, x_ND)
        return x_ND


class _Attention:
    """One layer's attention: writes the new tokens' state and attends to the visible rows."""

    def __init__(self, attention: Attention, state: LayerState, dots: Dots, spec: ModelSpec) -> None:
        self.layer, self.spec, self.top_k, self.window = attention.layer, spec, spec.index_topk, spec.sliding_window
        self.heads, self.head_dim, self.groups = spec.num_attention_heads, spec.head_dim, spec.o_groups
        self.eps = np.float32(spec.rms_norm_eps)
        parts, latent_parts = projections(attention)
        self.project, self.project_latent = Product(packed(*parts)), Product(packed(*latent_parts))
        self.index = state.indexer if attention.indexer is not None else None
        self.index_heads = spec.index_n_heads if self.index is not None else 0
        self.dots = dots
        self.kv_column = attention.wq_a.out_features
        self.compressors: list[_Compressor] = []
        column = self.kv_column + attention.wkv.out_features + self.index_heads
        if attention.compressor is not None and state.compressor is not None:
            self.compressors.append(_Compressor(attention.compressor, state.compressor, column, spec))
            column += 2 * attention.compressor.wkv.out_features
        if attention.indexer is not None and state.indexer is not None:
            self.compressors.append(_Compressor(attention.indexer.compressor, state.indexer, column, spec))
        self.q_norm, self.kv_norm = _array(attention.q_norm.weight), _array(attention.kv_norm.weight)
        self.sink_H = _array(attention.attn_sink)
        wo_a_GOX = attention.wo_a.weight.view(self.groups, -1, attention.wo_a.in_features)
        self.outputs = [Product(packed(weight_OX)) for weight_OX in wo_a_GOX]
        self.output = Product(packed(attention.wo_b.weight))
        self.ring: Floats = state.window.numpy()
        assert self.ring.shape[1] >= self.window + cpu.QUERY_BLOCK
        compressor = state.compressor
        self.entries: Floats = np.zeros((1, self.head_dim), np.float32)
        self.per_span = 1
        if compressor is not None:
            self.entries, self.per_span = compressor.entries.flatten(0, 1).numpy(), compressor.entries_per_span

    @property
    def products(self) -> list[Product]:
        return [self.project, self.project_latent, *self.outputs, self.output]

    def __call__(self, x_ND: Floats, batch: Batch) -> Floats:
        rows, heads, size = len(x_ND), self.heads, self.head_dim
        turns_NR = batch.turns_NR[self.layer.rope]
        projected_NX = self.project(x_ND)
        latent_NQ = empty(rows, len(self.q_norm))
        cpu.rms_norm(projected_NX, self.q_norm, self.eps, latent_NQ)
        q_NHK, kv_NK = empty(rows, heads, size), empty(rows, size)
        q_index_NJC = empty(rows, self.index_heads, self.spec.index_head_dim)
        weights_NJ = empty(rows, self.index_heads)
        cpu.heads(
            self.project_latent(latent_NQ), projected_NX, self.kv_column, self.kv_norm, turns_NR, self.eps,
            q_NHK, kv_NK, q_index_NJC, weights_NJ,
        )  # fmt: skip
        for compressor in self.compressors:
            compressor(projected_NX, batch)
        if self.index is None:
            picks_NP, counts_N = np.empty((rows, 0), np.int64), np.empty(0, np.int64)
        else:
            picks_NP, counts_N = self._pick(self.index, q_index_NJC, weights_NJ, batch)
        out_NHK = empty(rows, heads, size)
        cpu.attend(
            q_NHK, kv_NK, turns_NR, batch.rows_B1, batch.positions_N, batch.slots_B, self.ring, self.window,
            self.layer.compress_ratio, self.entries, self.per_span, batch.tables_BX, picks_NP, counts_N, self.sink_H,
            out_NHK,
        )  # fmt: skip
        out_GNX = np.ascontiguousarray(out_NHK.reshape(rows, self.groups, -1).transpose(1, 0, 2))
        return self.output(np.concatenate([product(x) for product, x in zip(self.outputs, out_GNX, strict=True)], 1))

    def _pick(self, index: CompressorState, q_NJC: Floats, weights_NJ: Floats, batch: Batch) -> tuple[Ints, Ints]:
        """Return each query's top-k entries in increasing order, and how many there are."""
        visible_N = (batch.positions_N + 1) // index.ratio
        counts_N = np.minimum(visible_N, self.top_k)
        room = 2 * self.top_k + cpu.TOGETHER
        picks_NP, best_NP = np.empty((len(batch), room), np.int64), empty(len(batch), room)
        least_N = np.full(len(batch), -np.inf, np.float32)
        for sequence, (low, high) in zip(batch.sequences, pairwise(batch.rows_B1.tolist()), strict=True):
            most = int(visible_N[high - 1])
            if most <= self.top_k:
                picks_NP[low:high, : self.top_k] = np.arange(self.top_k)
                continue
            counts_N[low:high] = 0
            for entry, keys_SC in _tiles(index, sequence, most):
                together = max(1, SCORE_TILE // (len(keys_SC) * self.index_heads))
                for some in (slice(first, min(first + together, high)) for first in range(low, high, together)):
                    q_XC = q_NJC[some].reshape(-1, q_NJC.shape[2])
                    dots_XS = self.dots(q_XC, keys_SC)
                    dots_NJS = dots_XS.reshape(-1, self.index_heads, len(keys_SC))
                    cpu.choose(
                        dots_NJS, weights_NJ[some], entry, visible_N[some], self.top_k,
                        best_NP[some], picks_NP[some], counts_N[some], least_N[some],
                    )  # fmt: skip
            cpu.finish(self.top_k, best_NP[low:high], picks_NP[low:high], counts_N[low:high])
        return picks_NP, counts_N


def _tiles(index: CompressorState, sequence: Sequence, count: int) -> Iterable[tuple[int, Tensor]]:
    """Yield the first `count` index keys of a sequence in tiles: the number of the first entry, and the keys [S, C].

    Consecutive spans are not copied. The last tile may hold further keys, up to a multiple of `COLUMNS`.
    """
    per_span = index.entries_per_span
    spans_of_tile = SCORED_ENTRIES // per_span
    for first in range(0, -(-count // per_span), spans_of_tile):
        spans = sequence.spans[first : first + spans_of_tile]
        entries = min(len(spans) * per_span, -(-(count - first * per_span) // COLUMNS) * COLUMNS)
        if sequence.contiguous:
            keys_SC = index.entries[spans[0] : spans[0] + len(spans)]
        else:
            keys_SC = index.entries[sequence.table[first : first + len(spans)]]
        yield first * per_span, keys_SC.flatten(0, 1)[:entries]


class _Compressor:
    """Writes open rows, and every entry that they complete."""

    def __init__(self, module: Compressor, state: CompressorState, column: int, spec: ModelSpec) -> None:
        self.column, self.eps = column, np.float32(spec.rms_norm_eps)
        self.ape, self.norm, self.angles = _array(module.ape), _array(module.norm.weight), _angles(module.rope, spec)
        self.values, self.scores = state.values.numpy(), state.scores.numpy()
        self.entries, self.per_span = state.entries.flatten(0, 1).numpy(), state.entries_per_span

    def __call__(self, projected_NX: Floats, batch: Batch) -> None:
        cpu.compress(
            projected_NX, self.column, self.ape, self.norm, self.eps, self.angles, batch.rows_B1, batch.positions_N,
            batch.slots_B, self.values, self.scores, batch.tables_BX, self.per_span, self.entries,
        )  # fmt: skip


class _Experts:
    """The mixture of experts."""

    def __init__(self, moe: MoE) -> None:
        gate, experts, shared = moe.gate, moe.experts, moe.shared_experts
        self.gate = Product(packed(gate.weight))
        self.limit, self.scale = np.float32(experts.limit), np.float32(gate.scale)
        self.active, self.count = gate.active, len(experts.w2)
        self.table: Ints | None = gate.tid2eid.numpy() if gate.router == "hash" else None
        self.bias = np.zeros(self.count, np.float32) if gate.router == "hash" else _array(gate.bias)
        w13_EDX, w2_EID = packed(experts.w1, experts.w3), packed(experts.w2)
        self.w13_EDX, self.w2_EID = as_array(w13_EDX), as_array(w2_EID)
        self.w13, self.w2 = Product(w13_EDX[0]), Product(w2_EID[0])  # all experts have the same shapes
        self.all_w13, self.all_w2 = w13_EDX.unbind(), w2_EID.unbind()
        self.shared_w13 = Product(packed(shared.w1.weight, shared.w3.weight))
        self.shared_w2 = Product(packed(shared.w2.weight))

    @property
    def products(self) -> list[Product]:
        return [self.gate, self.w13, self.w2, self.shared_w13, self.shared_w2]

    def __call__(self, x_ND: Floats, ids_N: Ints) -> Floats:
        rows = len(x_ND)
        weights_NA = empty(rows, self.active)
        experts_NA = np.empty((rows, self.active), np.int64) if self.table is None else self.table[ids_N]
        cpu.route(self.gate(x_ND), self.bias, self.scale, self.table is not None, experts_NA, weights_NA)
        shared_ND = self.shared_w2(self._swiglu(self.shared_w13(x_ND), np.ones(rows, np.float32)))
        out_ND = empty(*x_ND.shape)
        if experts_NA.size <= ROWS_OF_EXPERT * self.count and self.w13.block and self.w2.block:
            cpu.mix_experts(
                x_ND, experts_NA, weights_NA, self.w13_EDX, self.w13.block, self.w2_EID, self.w2.block, self.limit,
                shared_ND, out_ND,
            )  # fmt: skip
        else:
            self._sort(x_ND, experts_NA, weights_NA, shared_ND, out_ND)
        return out_ND

    def _sort(self, x_ND: Floats, experts_NA: Ints, weights_NA: Floats, shared_ND: Floats, out_ND: Floats) -> None:
        """Compute each expert on the rows routed to it, padded to the row count that the library needs."""
        padding = padded_rows(1, self.w13.rows)
        most = experts_NA.size + self.count * (padding - 1)
        counts_E, taken, weights = np.empty(self.count, np.int64), np.empty(most, np.int64), np.empty(most, np.float32)
        places_NA = np.empty_like(experts_NA)
        places = cpu.sort_by_expert(experts_NA, weights_NA, padding, counts_E, taken, weights, places_NA)
        counts = counts_E.tolist()
        hidden = self._swiglu(_by_expert(x_ND[taken[:places]], counts, self.all_w13), weights[:places])
        cpu.sum_experts(_by_expert(hidden, counts, self.all_w2), places_NA, shared_ND, out_ND)

    def _swiglu(self, gate_up_NX: Floats, weights_N: Floats) -> Floats:
        out_NI = empty(len(gate_up_NX), gate_up_NX.shape[1] // 2)
        cpu.swiglu(gate_up_NX, weights_N, self.limit, out_NI)
        return out_NI


def _by_expert(rows_XK: Floats, counts: list[int], weights_KO: Seq[Tensor]) -> Floats:
    rows = torch.split(torch.from_numpy(rows_XK), counts)
    outs = [by_library(row, weight) for row, weight in zip(rows, weights_KO, strict=True) if len(row)]
    out_XO: Floats = torch.cat(outs).numpy()
    return out_XO


class _Drafts:
    """The MTP block at the start of a text: its input is the streams before a token, and the token.

    A token writes the only row of its window and reads no other row, so all tokens can share one window.
    """

    def __init__(self, block: MTPBlock) -> None:
        spec = self.spec = block.spec
        self.eps = np.float32(spec.rms_norm_eps)
        self.e_norm, self.h_norm = _array(block.enorm.weight), _array(block.hnorm.weight)
        self.e_proj, self.h_proj = Product(packed(block.e_proj.weight)), Product(packed(block.h_proj.weight))
        ring = torch.zeros(1, spec.sliding_window + cpu.QUERY_BLOCK, spec.head_dim)
        self.layer = _Layer(block, LayerState(ring, None, None), Dots())
        self.output = _Output(block)

    @property
    def products(self) -> list[Product]:
        return [self.e_proj, self.h_proj, *self.layer.products, *self.output.products]

    def __call__(self, streams_BMD: Floats, embeddings_BD: Floats, batch: Batch) -> Floats:
        """Return the input of the head, [B, D]."""
        flat = np.ascontiguousarray(streams_BMD.reshape(-1, streams_BMD.shape[2]))
        h = self.h_proj(self._norm(flat, self.h_norm)).reshape(streams_BMD.shape)
        e = self.e_proj(self._norm(embeddings_BD, self.e_norm))
        return self.output(self.layer(h + e[:, None], batch))

    def _norm(self, x_ND: Floats, weight_D: Floats) -> Floats:
        out_ND = empty(*x_ND.shape)
        cpu.rms_norm(x_ND, weight_D, self.eps, out_ND)
        return out_ND


def _write(streams_NMD: Floats, y_ND: Floats, post_NM: Floats, comb_NMM: Floats) -> Floats:
    out_NMD = empty(*streams_NMD.shape)
    cpu.write(streams_NMD, y_ND, post_NM, comb_NMM, out_NMD)
    return out_NMD


def _array(tensor: Tensor) -> Floats:
    array: Floats = tensor.detach().float().contiguous().numpy()
    return array


def _angles(rope: RopeSpec, spec: ModelSpec) -> Floats:
    array: Floats = frequencies(rope, spec.qk_rope_head_dim, torch.device("cpu")).numpy()
    return array
