"""The layers of a decoder in plain torch, on any device: the twin of `compiled.py`, and the fallback where it cannot
run.

The rows of all sequences are laid end to end and padded: with enough rows and one thread, a matrix product gives a row
the same bits whatever its neighbours (`invariance.py`). The shapes in attention depend only on a token's position: the
window is a ring of fixed size, read in ring order; CSA gathers exactly top-k entries; HCA reads its entries in fixed
tiles. A key that a query must not see has weight 0.0, which changes no sum.

Dimension key: `runtime/__init__.py` and `model/__init__.py`.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from agentkit_engine.model.attention import Attention
from agentkit_engine.model.block import Block
from agentkit_engine.model.compressor import Compressor
from agentkit_engine.model.decoder import Decoder
from agentkit_engine.model.hyper_connections import half_steps, scale_of_output
from agentkit_engine.model.moe import MoE, clamped_swiglu
from agentkit_engine.model.rope import rotate, rotations
from agentkit_engine.runtime.invariance import least_rows
from agentkit_engine.runtime.segments import Computed, Segment
from agentkit_engine.runtime.state import QUERY_BLOCK, CompressorState, Pools
from agentkit_engine.spec import RopeSpec

DECODING = 16
"""Maximum number of sequences with equally many tokens that are computed side by side."""
FEW_ROWS = 16
"""Up to this many rows, every expert in use computes all rows of the forward."""
COLUMNS = 16
"""The number of index scores per query is a multiple of this."""
LANES = 32
"""Element-wise functions get a multiple of this many values. Scalar code would compute the last few, and its
exponential differs from the vector code's."""
SCORE_BUDGET = 1 << 21
"""Maximum number of index scores held at once (8 MiB); long contexts shrink the query block accordingly."""
SCORE_TILE = 1 << 18
"""Maximum number of per-head index scores held at once (1 MiB), so that they stay in the processor's cache."""
SCORED_ENTRIES = 2048
"""Entries per tile of index scores; tiles start at the first entry."""
HCA_TILES = (0, 32, 64, 128, 256, 512)
"""Starts of the first tiles of HCA entries; from the last start on, every tile has that size."""


@dataclass(frozen=True, slots=True)
class QueryBlock:
    """Tokens [low, high) of a group: their positions, and a mask over the ring rows."""

    low: int
    high: int
    positions_BU: Tensor
    rows_BU: Tensor  # ring rows that the tokens are written to
    bias_BURx: Tensor  # [B, U, 1, R]: 0 or -inf


class Group:
    """Sequences with the same number of new tokens: several that decode, or one that is prefilled."""

    def __init__(self, segments: Seq[Segment], first_row: int, pools: Pools) -> None:
        self.sequences = [segment.sequence for segment in segments]
        self.tokens = len(segments[0])
        self.rows = slice(first_row, first_row + len(segments) * self.tokens)
        self.starts = [sequence.length for sequence in self.sequences]
        self.ends = [start + self.tokens for start in self.starts]
        self.slots_B = torch.tensor([sequence.slot for sequence in self.sequences])
        self.positions_BT = torch.tensor(self.starts)[:, None] + torch.arange(self.tokens)
        self.blocks = self._query_blocks(pools.ring, pools.spec.sliding_window)

    def __len__(self) -> int:
        return len(self.sequences)

    def take(self, rows: Tensor) -> Tensor:
        """Return this group's part of the forward's rows, a view [B, T, ...]."""
        return rows[self.rows].view(len(self), self.tokens, *rows.shape[1:])

    @cached_property
    def tables_BX(self) -> Tensor:
        """Span ids, [B, most spans]; missing ones are 0, the span that stays zero."""
        most = max(sequence.num_spans for sequence in self.sequences)
        tables = torch.zeros(len(self), most, dtype=torch.int64)
        for row, sequence in zip(tables, self.sequences, strict=True):
            row[: sequence.num_spans] = sequence.table[: sequence.num_spans]
        return tables

    def addresses(self, indices: Tensor, per_span: int) -> Tensor:
        """Return the flat pool rows of each sequence's entries `indices` [B, ...]."""
        spans = self.tables_BX.gather(1, (indices // per_span).flatten(1)).view(indices.shape)
        return spans * per_span + indices % per_span

    def _query_blocks(self, ring: int, window: int) -> list[QueryBlock]:
        first = QUERY_BLOCK - self.starts[0] % QUERY_BLOCK if len(self) == 1 else QUERY_BLOCK
        bounds = [0, *range(first, self.tokens, QUERY_BLOCK), self.tokens]
        blocks = []
        for low, high in itertools.pairwise(bounds):
            positions_BU = self.positions_BT[:, low:high]
            last_B1 = positions_BU[:, -1:]
            held_BR = last_B1 - (last_B1 - torch.arange(ring)) % ring
            ages_BUR = positions_BU[:, :, None] - held_BR[:, None]
            seen = (ages_BUR >= 0) & (ages_BUR < window) & (held_BR >= 0)[:, None]
            bias = torch.zeros(seen.shape).masked_fill_(~seen, -torch.inf).unsqueeze(2)
            blocks.append(QueryBlock(low, high, positions_BU, positions_BU % ring, bias))
        return blocks


@dataclass(slots=True)
class Padding:
    """The number of rows in a matrix product is a multiple of this padding."""

    rows: int = 1


class EagerLayers:
    """A decoder's weights, packed once in float32. Not differentiable."""

    def __init__(self, decoder: Decoder, pools: Pools, *, exact: bool) -> None:
        self.spec, self.pools = decoder.spec, pools
        padding = self._padding = Padding()
        self._embed = decoder.embed.weight.float()
        blocks = decoder.blocks[: len(pools.layers)]
        self._layers = [_Layer(block, pools, index, padding) for index, block in enumerate(blocks)]
        self._norm, self._head = decoder.norm.weight.float(), _own(decoder.head.weight)
        self._hc_fn, self._hc_base = _own(decoder.hc_head_fn), decoder.hc_head_base.float()
        self._hc_scale = decoder.hc_head_scale.float()
        self._ropes = {layer.rope for layer in self.spec.layers}
        self._decoder = decoder
        if exact:
            weights = [self._head, self._hc_fn, *(weight for layer in self._layers for weight in layer.weights())]
            padding.rows = least_rows(weights, at_least=-(-LANES // self.spec.hc_mult))

    def mtp_draft(self, streams_BMD: Tensor, ids_B: Seq[int]) -> list[int]:
        """See `Runner.mtp_draft`."""
        streams_B1MD = streams_BMD.unsqueeze(1).to(self._decoder.embed.weight.dtype)
        logits_B1V, _ = self._decoder.draft_logits(streams_B1MD, torch.tensor(ids_B).unsqueeze(1))
        ids: list[int] = logits_B1V[:, 0].argmax(-1).tolist()
        return ids

    def __call__(self, segments: Seq[Segment], firsts: Seq[int]) -> Computed:
        """Run the forward; return the output rows of each segment from its `firsts` on."""
        order = sorted(range(len(segments)), key=lambda index: len(segments[index]))
        groups, rows = [], 0
        for tokens, alike in itertools.groupby(order, key=lambda index: len(segments[index])):
            members = [segments[index] for index in alike]
            together = [members] if tokens <= DECODING else [[member] for member in members]
            for some in together:
                groups.append(Group(some, rows, self.pools))
                rows += len(some) * tokens
        ids = [token_id for index in order for token_id in (*segments[index].ids, *segments[index].draft)]
        missing = -rows % self._padding.rows
        ids_N = torch.tensor(ids + [0] * missing)
        positions_N = F.pad(torch.cat([group.positions_BT.flatten() for group in groups]), (0, missing))
        turns = {rope: rotations(rope, positions_N, self.spec.qk_rope_head_dim) for rope in self._ropes}

        streams_NMD = self._embed[ids_N].unsqueeze(1).repeat(1, self.spec.hc_mult, 1)
        for layer in self._layers:
            streams_NMD = layer(streams_NMD, ids_N, groups, turns)

        starts, row = {}, 0
        for index in order:
            starts[index], row = row, row + len(segments[index])
        ends = [starts[index] + len(segment) for index, segment in enumerate(segments)]
        wanted = torch.cat([torch.arange(starts[index] + firsts[index], end) for index, end in enumerate(ends)])
        count = len(wanted)
        streams_NMD = streams_NMD[F.pad(wanted, (0, -count % self._padding.rows))]
        mix = _mix(streams_NMD, self._hc_fn, self.spec.rms_norm_eps) * self._hc_scale + self._hc_base
        x_ND = _rms_norm(_read(streams_NMD, mix.sigmoid() + self.spec.hc_eps), self._norm, self.spec.rms_norm_eps)
        return Computed(F.linear(x_ND, self._head)[:count], streams_NMD[:count])


class _Layer:
    """One decoder layer over its pools."""

    def __init__(self, block: Block, pools: Pools, index: int, padding: Padding) -> None:
        spec = self.spec = block.spec
        self.eps = spec.rms_norm_eps
        self.attn_connection = _Connection(block.hc_attn_fn, block.hc_attn_base, block.hc_attn_scale, block)
        self.ffn_connection = _Connection(block.hc_ffn_fn, block.hc_ffn_base, block.hc_ffn_scale, block)
        self.attn_norm, self.ffn_norm = block.attn_norm.weight.float(), block.ffn_norm.weight.float()
        self.attention = _Attention(block.attn, pools, index, padding)
        self.experts = _Experts(block.ffn, padding)

    def weights(self) -> list[Tensor]:
        """The weights of the layer's products, [out, in]; one stands for all experts, which have the same shape."""
        attention, experts = self.attention, self.experts
        return [
            self.attn_connection.fn, self.ffn_connection.fn, attention.in_weight, attention.latent_weight,
            attention.wo_b, *attention.wo_a_GXO.mT, experts.gate_weight, experts.w13[0], experts.w2[0],
            experts.shared_w13, experts.shared_w2,
        ]  # fmt: skip

    def __call__(
        self, streams_NMD: Tensor, ids_N: Tensor, groups: list[Group], turns: dict[RopeSpec, Tensor]
    ) -> Tensor:
        x_ND, post, comb = self.attn_connection(streams_NMD)
        y_ND = self.attention(_rms_norm(x_ND, self.attn_norm, self.eps), groups, turns)
        streams_NMD = _write(streams_NMD, y_ND, post, comb)
        x_ND, post, comb = self.ffn_connection(streams_NMD)
        y_ND = self.experts(_rms_norm(x_ND, self.ffn_norm, self.eps), ids_N, groups[-1].rows.stop)
        return _write(streams_NMD, y_ND, post, comb)


class _Attention:
    """One layer's attention: writes the new tokens' state and attends to the visible rows."""

    def __init__(self, attention: Attention, pools: Pools, index: int, padding: Padding) -> None:
        spec, self.padding = pools.spec, padding
        self.spec, self.layer, self.state = spec, attention.layer, pools.layers[index]
        self.heads, self.head_dim, self.groups = spec.num_attention_heads, spec.head_dim, spec.o_groups
        parts = [attention.wq_a.weight, attention.wkv.weight]
        latent_parts = [attention.wq_b.weight]
        self.compressors: list[_Compressor] = []
        if attention.compressor is not None and self.state.compressor is not None:
            self.compressors.append(_Compressor(attention.compressor, self.state.compressor, padding))
        if attention.indexer is not None and self.state.indexer is not None:
            self.compressors.append(_Compressor(attention.indexer.compressor, self.state.indexer, padding))
            parts.append(attention.indexer.weights_proj.weight)
            latent_parts.append(attention.indexer.wq_b.weight)
        for compressor in self.compressors:
            parts += [compressor.module.wkv.weight, compressor.module.wgate.weight]
        self.in_sizes = [part.shape[0] for part in parts]
        self.in_weight = torch.cat([part.float() for part in parts])
        self.latent_sizes = [part.shape[0] for part in latent_parts]
        self.latent_weight = torch.cat([part.float() for part in latent_parts])
        self.q_norm, self.kv_norm = attention.q_norm.weight.float(), attention.kv_norm.weight.float()
        self.sink_H1 = attention.attn_sink.float().unsqueeze(1)
        wo_a = _own(attention.wo_a.weight)
        self.wo_a_GXO = wo_a.view(self.groups, -1, wo_a.shape[1]).mT.contiguous()
        self.wo_b = _own(attention.wo_b.weight)

    def __call__(self, x_ND: Tensor, groups: list[Group], turns: dict[RopeSpec, Tensor]) -> Tensor:
        turn_NR, eps = turns[self.layer.rope], self.spec.rms_norm_eps
        q_latent, kv, *rest = torch.split(F.linear(x_ND, self.in_weight), self.in_sizes, dim=-1)
        q, *q_index = torch.split(
            F.linear(_rms_norm(q_latent, self.q_norm, eps), self.latent_weight), self.latent_sizes, dim=-1
        )
        q_NHK = q.reshape(len(q), self.heads, self.head_dim)
        q_NHK = rotate((q_NHK * _inverse_rms(q_NHK, eps))[None], turn_NR)[0].mul_(self.head_dim**-0.5)
        kv_NK = rotate(_rms_norm(kv, self.kv_norm, eps)[None], turn_NR)[0]
        index: tuple[Tensor, Tensor] | None = None
        if q_index:
            heads, size = self.spec.index_n_heads, self.spec.index_head_dim
            index = (
                rotate(q_index[0].reshape(1, -1, heads, size), turn_NR)[0],
                rest.pop(0) * (size * heads) ** -0.5,
            )
        out_NHK = torch.zeros_like(q_NHK)
        for group in groups:
            for number, compressor in enumerate(self.compressors):
                values, scores = rest[2 * number : 2 * number + 2]
                compressor(group.take(values), group.take(scores), group)
            self._attend_group(q_NHK, kv_NK, index, group, out_NHK)
        o_NHK = rotate(out_NHK[None], turn_NR.conj())[0]
        o_GNX = o_NHK.view(len(x_ND), self.groups, -1).transpose(0, 1)
        return F.linear(torch.bmm(o_GNX, self.wo_a_GXO).transpose(0, 1).flatten(1), self.wo_b)

    def _attend_group(
        self, q_NHK: Tensor, kv_NK: Tensor, index: tuple[Tensor, Tensor] | None, group: Group, out_NHK: Tensor
    ) -> None:
        q_BTHK, kv_BTK, out_BTHK = group.take(q_NHK), group.take(kv_NK), group.take(out_NHK)
        for block in group.blocks:
            span = slice(block.low, block.high)
            self.state.window[group.slots_B[:, None], block.rows_BU] = kv_BTK[:, span]
            q_BUHK = q_BTHK[:, span]
            parts = [(_rows_of(self.state.window, group), block.bias_BURx)]
            if self.layer.compress_ratio:
                visible_BU = (block.positions_BU + 1) // self.layer.compress_ratio
                most = int(visible_BU.max())
                if index is not None and most:
                    queries = [group.take(part)[:, span] for part in index]
                    out_BTHK[:, span] = self._attend_csa(q_BUHK, queries, parts, visible_BU, group)
                    continue
                parts += self._hca_parts(visible_BU, most, group)
            out_BTHK[:, span] = attend(q_BUHK, parts, self.sink_H1, self.padding.rows)

    def _hca_parts(self, visible_BU: Tensor, most: int, group: Group) -> list[tuple[Tensor, Tensor]]:
        """Return all visible entries, in tiles whose bounds are the same for every query."""
        assert self.state.compressor is not None
        entries, parts, low = self.state.compressor.entries, [], 0
        while low < most:
            later = [bound for bound in HCA_TILES if bound > low]
            high = later[0] if later else low + HCA_TILES[-1]
            per_span = self.state.compressor.entries_per_span
            tables = group.tables_BX[:, low // per_span : high // per_span]
            tables = F.pad(tables, (0, (high - low) // per_span - tables.shape[1]))
            rows_BSK = entries[tables].flatten(1, 2)
            hidden = torch.arange(low, high) >= visible_BU.unsqueeze(2)
            parts.append((rows_BSK, torch.zeros(hidden.shape).masked_fill_(hidden, -torch.inf).unsqueeze(2)))
            low = high
        return parts

    def _attend_csa(
        self,
        q_BUHK: Tensor,
        index: list[Tensor],
        parts: list[tuple[Tensor, Tensor]],
        visible_BU: Tensor,
        group: Group,
    ) -> Tensor:
        """Attend to the window and each query's gathered top-k entries, with as many queries at once as
        `SCORE_BUDGET` allows."""
        assert self.state.compressor is not None
        assert self.state.indexer is not None
        top_k, most = self.spec.index_topk, int(visible_BU.max())
        num_entries = max(top_k, -(-most // COLUMNS) * COLUMNS)
        keys_BSC = None
        if most > top_k:
            keys_BSC = _scan(self.state.indexer, num_entries, group)
        budget = max(1, SCORE_BUDGET // (num_entries * len(group)))
        outs = []
        for low in range(0, q_BUHK.shape[1], budget):
            some = slice(low, low + budget)
            visible = visible_BU[:, some]
            if keys_BSC is None:
                picks = torch.arange(top_k).expand(*visible.shape, top_k)
            else:
                picks = _pick(index[0][:, some], index[1][:, some], keys_BSC, visible, top_k, self.padding.rows)
            hidden = torch.arange(top_k) >= visible.clamp(max=top_k).unsqueeze(2)
            picks = picks.masked_fill(hidden, 0)
            addresses = group.addresses(picks, self.state.compressor.entries_per_span)
            chosen_BUSK = self.state.compressor.entries.flatten(0, 1)[addresses]
            bias = torch.zeros(hidden.shape).masked_fill_(hidden, -torch.inf).unsqueeze(2)
            (rows, ring_bias), *_ = parts
            parts_of_some = [(rows, ring_bias[:, some]), (chosen_BUSK, bias)]
            outs.append(attend(q_BUHK[:, some], parts_of_some, self.sink_H1, self.padding.rows))
        return outs[0] if len(outs) == 1 else torch.cat(outs, dim=1)


class _Compressor:
    """Writes open rows, and every entry that they complete."""

    def __init__(self, module: Compressor, state: CompressorState, padding: Padding) -> None:
        self.module, self.state, self.padding = module, state, padding
        self.ape, self.norm = module.ape.float(), module.norm.weight.float()
        self.overlap = module.overlap

    def __call__(self, values_BTX: Tensor, scores_BTX: Tensor, group: Group) -> None:
        ratio, kept = self.state.ratio, self.state.values.shape[1]
        scores_BTX = scores_BTX + self.ape[group.positions_BT % ratio]
        completed = [end // ratio - start // ratio for start, end in zip(group.starts, group.ends, strict=True)]
        for count in sorted({count for count in completed if count}):
            done = [index for index in range(len(group)) if completed[index] == count]
            self._emit(values_BTX[done], scores_BTX[done], count, done, group)
        recent = slice(max(0, group.tokens - kept), None)
        rows_BT = group.positions_BT[:, recent] % kept
        self.state.values[group.slots_B[:, None], rows_BT] = values_BTX[:, recent]
        self.state.scores[group.slots_B[:, None], rows_BT] = scores_BTX[:, recent]

    def _emit(self, values: Tensor, scores: Tensor, count: int, done: list[int], group: Group) -> None:
        """Pool the `count` windows that end within these rows, for each of the sequences `done`."""
        ratio, kept = self.state.ratio, self.state.values.shape[1]
        slots_B1 = group.slots_B[done].unsqueeze(1)
        starts_B1 = torch.tensor([group.starts[index] for index in done]).unsqueeze(1)
        older = (starts_B1 - kept + torch.arange(kept)) % kept
        values = torch.cat((self.state.values[slots_B1, older], values), dim=1)
        scores = torch.cat((self.state.scores[slots_B1, older], scores), dim=1)
        windows_BW = starts_B1 // ratio + torch.arange(count)
        own_BWL = (windows_BW * ratio - starts_B1 + kept).unsqueeze(2) + torch.arange(ratio)
        batch = torch.arange(len(done)).view(-1, 1, 1)
        if self.overlap:
            half = values.shape[-1] // 2
            before = own_BWL - ratio
            values = torch.cat((values[batch, before, :half], values[batch, own_BWL, half:]), dim=2)
            scores = torch.cat((scores[batch, before, :half], scores[batch, own_BWL, half:]), dim=2)
        else:
            values, scores = values[batch, own_BWL], scores[batch, own_BWL]
        pooled = (scores.softmax(2) * values).sum(2).flatten(0, 1)
        missing = -len(pooled) % self.padding.rows
        entries = _rms_norm(F.pad(pooled, (0, 0, 0, missing)), self.norm, self.module.norm.eps)
        turn = rotations(self.module.rope, F.pad(windows_BW.flatten(), (0, missing)) * ratio, self.module.rotary_dim)
        per_span = self.state.entries_per_span
        spans = group.tables_BX[torch.tensor(done).unsqueeze(1), windows_BW // per_span]
        addresses = spans * per_span + windows_BW % per_span
        self.state.entries.flatten(0, 1)[addresses.flatten()] = rotate(entries[None], turn)[0, : len(pooled)]


class _Experts:
    """The mixture of experts."""

    def __init__(self, moe: MoE, padding: Padding) -> None:
        self.padding = padding
        self.gate, self.limit = moe.gate, moe.experts.limit
        self.gate_weight = _own(moe.gate.weight)
        self.bias = moe.gate.bias.float() if moe.gate.router == "score" else None
        experts, shared = moe.experts, moe.shared_experts
        self.w13 = torch.cat((experts.w1.float(), experts.w3.float()), dim=1).unbind()
        self.w2 = _own(experts.w2).unbind()
        self.shared_w13 = torch.cat((shared.w1.weight.float(), shared.w3.weight.float()))
        self.shared_w2 = _own(shared.w2.weight)

    def __call__(self, x_ND: Tensor, ids_N: Tensor, count: int) -> Tensor:
        """Compute the first `count` rows; the padding behind them goes through the shared expert only."""
        affinity_NE = F.softplus(F.linear(x_ND, self.gate_weight)).sqrt()
        if self.bias is None:
            experts_NA = self.gate.tid2eid[ids_N]
        else:
            ranked = (affinity_NE + self.bias).sort(dim=-1, descending=True, stable=True).indices
            experts_NA = ranked[:, : self.gate.active]
        weights_NA = affinity_NE.gather(1, experts_NA)
        weights_NA = weights_NA / weights_NA.sum(-1, keepdim=True) * self.gate.scale
        route = self._few_rows if len(x_ND) <= FEW_ROWS else self._many_rows
        routed = F.pad(route(x_ND, experts_NA[:count], weights_NA[:count]), (0, 0, 0, len(x_ND) - count))
        return routed + F.linear(self._swiglu(F.linear(x_ND, self.shared_w13)), self.shared_w2)

    def _few_rows(self, x_ND: Tensor, experts_NA: Tensor, weights_NA: Tensor) -> Tensor:
        """Compute all rows on every expert that any row chose, which needs neither sorting nor gathering."""
        used = sorted(set(experts_NA.flatten().tolist()))
        place_E = torch.zeros(len(self.w2), dtype=torch.int64)
        place_E[used] = torch.arange(len(used))
        places_NA, rows_N1 = place_E[experts_NA], torch.arange(len(experts_NA)).unsqueeze(1)
        weights_UN = torch.zeros(len(used), len(x_ND))
        weights_UN[places_NA, rows_N1] = weights_NA
        hidden = self._swiglu(torch.cat([F.linear(x_ND, self.w13[expert]) for expert in used]))
        parts = torch.split(hidden.mul_(weights_UN.view(-1, 1)), len(x_ND))
        down_UND = torch.stack([F.linear(part, self.w2[expert]) for expert, part in zip(used, parts, strict=True)])
        return down_UND[places_NA, rows_N1].sum(1)

    def _many_rows(self, x_ND: Tensor, experts_NA: Tensor, weights_NA: Tensor) -> Tensor:
        """Compute each expert on the rows routed to it, padded like all products."""
        order = experts_NA.flatten().argsort(stable=True)
        counts: list[int] = torch.bincount(experts_NA.flatten(), minlength=len(self.w2)).tolist()
        padded, places, at, place = [], [], 0, 0
        for count in counts:
            padded += [order[at : at + count], order[at : at + 1].expand(-count % self.padding.rows if count else 0)]
            places.append(torch.arange(place, place + count))
            at, place = at + count, place + count + (-count % self.padding.rows)
        taken = torch.cat(padded)
        rows = x_ND[taken // experts_NA.shape[1]]
        sizes = [count + (-count % self.padding.rows) for count in counts]
        used = [(expert, part) for expert, part in enumerate(torch.split(rows, sizes)) if len(part)]
        hidden = self._swiglu(torch.cat([F.linear(part, self.w13[expert]) for expert, part in used]))
        hidden *= weights_NA.flatten()[taken].unsqueeze(1)
        parts = torch.split(hidden, [len(part) for _, part in used])
        down = torch.cat([F.linear(part, self.w2[expert]) for (expert, _), part in zip(used, parts, strict=True)])
        place_of_pair = torch.empty_like(order)
        place_of_pair[order] = torch.cat(places)
        return down[place_of_pair].view(*experts_NA.shape, -1).sum(1)

    def _swiglu(self, gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return clamped_swiglu(gate, up, self.limit)


class _Connection:
    """The mHC maps of one sub-layer."""

    def __init__(self, fn: Tensor, base: Tensor, scale: Tensor, block: Block) -> None:
        spec = block.spec
        self.fn, self.base = _own(fn), base.float()
        self.scale = scale.float()[scale_of_output(spec.hc_mult, fn.device)]
        self.size, self.eps, self.norm_eps = spec.hc_mult, spec.hc_eps, spec.rms_norm_eps
        self.steps = half_steps(spec.hc_mult, spec.hc_sinkhorn_iters, spec.hc_eps, fn.device)

    def __call__(self, streams_NMD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the sub-layer's input [N, D], the weights of its output [N, M, 1] and the mixing of the streams [N,
        M, M]."""
        size = self.size
        mix = torch.addcmul(self.base, _mix(streams_NMD, self.fn, self.norm_eps), self.scale)
        pre, post, comb = torch.split(mix, [size, size, size * size], dim=-1)
        matrices = F.pad((comb.reshape(-1, size, size).softmax(-1) + self.eps).flatten(1), (0, 1), value=1.0)
        sums = torch.empty_like(matrices)
        for step in self.steps:
            matrices.div_(torch.mm(matrices, step, out=sums))
        comb = matrices[:, :-1].reshape(-1, size, size)
        return _read(streams_NMD, pre.sigmoid() + self.eps), (2 * post.sigmoid()).unsqueeze(2), comb


def _own(weight: Tensor) -> Tensor:
    """Return the weight as contiguous float32, however compiled layers stored it: the library's bits depend on the
    layout."""
    return weight.float().contiguous()


def _mix(streams_NMD: Tensor, fn: Tensor, eps: float) -> Tensor:
    flat = streams_NMD.flatten(1)
    return F.linear(flat, fn).mul_(_inverse_rms(flat, eps))


def _read(streams_NMD: Tensor, pre_NM: Tensor) -> Tensor:
    return torch.bmm(pre_NM.unsqueeze(1), streams_NMD).squeeze(1)


def _write(streams_NMD: Tensor, y_ND: Tensor, post_NM1: Tensor, comb_NMM: Tensor) -> Tensor:
    return torch.bmm(comb_NMM.mT, streams_NMD).addcmul_(post_NM1, y_ND.unsqueeze(1))


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return (x * _inverse_rms(x, eps)).mul_(weight)


def _inverse_rms(x: Tensor, eps: float) -> Tensor:
    """Return 1 / sqrt(mean(x²) + eps) over the last dimension, which is kept. `F.rms_norm` takes three times as
    long."""
    size = x.shape[-1]
    norm: Tensor = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return norm.square_().mul_(1 / size).add_(eps).rsqrt_()


def _rows_of(pool: Tensor, group: Group) -> Tensor:
    """Return each sequence's slot of a pool, [B, ...]; a single slot is not copied."""
    if len(group) == 1:
        slot = group.sequences[0].slot
        return pool[slot : slot + 1]
    return pool[group.slots_B]


def _scan(state: CompressorState, count: int, group: Group) -> Tensor:
    """Return the first `count` entries of each sequence, [B, count, C]; consecutive spans are not copied."""
    spans = -(-count // state.entries_per_span)
    if len(group) == 1 and group.sequences[0].contiguous:
        first = group.sequences[0].spans[0]
        if first + spans <= len(state.entries):
            return state.entries[first : first + spans].flatten(0, 1)[None, :count]
    tables = group.tables_BX[:, :spans]
    tables = F.pad(tables, (0, spans - tables.shape[1]))
    return state.entries[tables].flatten(1, 2)[:, :count]


def _pick(q_BUJC: Tensor, weights_BUJ: Tensor, keys_BSC: Tensor, visible_BU: Tensor, top_k: int, fewest: int) -> Tensor:
    """Return each query's `top_k` best entries in increasing order, [B, U, top_k]; ties go to the lowest entry.

    There are more entries than `top_k`. A query that sees fewer gets its first `top_k`, masked later.
    """
    scores_BUS = _index_scores(q_BUJC, weights_BUJ, keys_BSC, fewest)
    low = int(visible_BU.min())
    unseen = torch.arange(low, scores_BUS.shape[2]) >= visible_BU.unsqueeze(2)
    scores_BUS[:, :, low:].masked_fill_(unseen, -torch.inf)
    values, picks = scores_BUS.topk(top_k + 1, dim=-1)
    last, next_one = values[:, :, top_k - 1], values[:, :, top_k]
    picks, tied_BU = picks[:, :, :top_k], (last == next_one) & (last > -torch.inf)
    if bool(tied_BU.any()):
        picks[tied_BU] = scores_BUS[tied_BU].sort(dim=-1, descending=True, stable=True).indices[:, :top_k]
    return picks.sort(dim=-1).values


def _index_scores(q_BUJC: Tensor, weights_BUJ: Tensor, keys_BSC: Tensor, fewest: int) -> Tensor:
    """sum_j weights[j] * relu(q_j · k_s), [B, U, S]; see `model/indexer.py`."""
    batch, tokens, heads, _ = q_BUJC.shape
    scores_BUS = torch.empty(batch, tokens, keys_BSC.shape[1])
    together = max(1, SCORE_TILE // (SCORED_ENTRIES * heads * batch))
    for queries in (slice(low, low + together) for low in range(0, tokens, together)):
        q_BXC, weights_X1J = q_BUJC[:, queries].flatten(1, 2), weights_BUJ[:, queries].flatten(0, 1).unsqueeze(1)
        for entries in (slice(low, low + SCORED_ENTRIES) for low in range(0, keys_BSC.shape[1], SCORED_ENTRIES)):
            dots_BXS = _matmul(q_BXC, keys_BSC[:, entries].mT, fewest).relu_()
            some_X1S = torch.bmm(weights_X1J, dots_BXS.reshape(-1, heads, dots_BXS.shape[2]))
            scores_BUS[:, queries, entries] = some_X1S.view(batch, -1, dots_BXS.shape[2])
    return scores_BUS


def _matmul(a: Tensor, b: Tensor, fewest: int) -> Tensor:
    """Batched product whose left rows are padded to `fewest`."""
    rows = a.shape[1]
    if rows >= fewest:
        return torch.bmm(a, b)
    return torch.bmm(F.pad(a, (0, 0, 0, fewest - rows)), b)[:, :rows]


def attend(q_BUHK: Tensor, parts: list[tuple[Tensor, Tensor]], sink_H1: Tensor, fewest: int) -> Tensor:
    """Softmax attention over several sets of rows and a sink, [B, U, H, K].

    Each part is (rows, bias): rows [B, S, K] shared by all queries or [B, U, S, K] per query, and a bias [B, U, 1, S]
    of 0 or -inf. The parts are summed in order, so a part that is masked entirely changes nothing.
    """
    batch, tokens, heads, _ = q_BUHK.shape
    scores, most = [], sink_H1.expand(batch, tokens, heads, 1)
    for rows, bias in parts:
        if rows.dim() == 3:
            product = _matmul(q_BUHK.flatten(1, 2), rows.mT, fewest)
        else:
            product = _matmul(q_BUHK.flatten(0, 1), rows.flatten(0, 1).mT, fewest)
        scores.append(product.view(batch, tokens, heads, -1).add_(bias))
        most = torch.maximum(most, scores[-1].amax(-1, keepdim=True))
    sink = (sink_H1 - most).flatten()
    total = F.pad(sink, (0, -len(sink) % LANES)).exp_()[: len(sink)].view(most.shape)
    out = torch.zeros_like(q_BUHK)
    for (rows, _), score in zip(parts, scores, strict=True):
        mass = score.sub_(most).exp_()
        total = total + mass.sum(-1, keepdim=True)
        if rows.dim() == 3:
            out = out + _matmul(mass.flatten(1, 2), rows, fewest).view(q_BUHK.shape)
        else:
            out = out + _matmul(mass.flatten(0, 1), rows.flatten(0, 1), fewest).view(q_BUHK.shape)
    return out / total
