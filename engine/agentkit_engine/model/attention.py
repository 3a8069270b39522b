"""V4 attention: one KV head whose rows are both key and value, a sliding window, compressed entries and sinks.

A query attends to the raw rows of the last `sliding_window` tokens, and to the entries whose whole window of tokens
lies in its past: all of them (HCA) or the indexer's choice (CSA). One softmax covers both, with a learned sink per
head. Queries are processed in blocks, so that memory does not grow with the length of the chunk. Source: the
DeepSeek-V4 reference.
Dimension key: `model/__init__.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from agentkit_engine.model.cache import LayerCache
from agentkit_engine.model.compressor import Compressor
from agentkit_engine.model.indexer import Indexer, IndexQueries, select_top_k
from agentkit_engine.model.norm import RMSNorm
from agentkit_engine.model.rope import rotate
from agentkit_engine.model.trace import IndexTrace, Trace
from agentkit_engine.spec import LayerSpec, ModelSpec, RopeSpec

QUERY_BLOCK = 128
"""Maximum number of queries of a chunk processed at once."""
SCORE_BUDGET = 1 << 24
"""Maximum number of float32 scores held at once (64 MiB); in long contexts the query block shrinks to stay below it."""
GATHER_ABOVE = 1024
"""Above this many visible entries (and four times top-k) CSA gathers its chosen entries instead of masking scores."""


@dataclass(frozen=True, slots=True)
class ForwardContext:
    """Data that the layers of one forward share.

    Attributes:
        rotations: Rotations of this forward's positions, per RoPE set, complex [T, R/2], with their inverses.
        trace: Filled during the forward unless None.
    """

    rotations: dict[RopeSpec, tuple[Tensor, Tensor]]
    trace: Trace | None


def with_sink(rows_BSK: Tensor) -> Tensor:
    """Return the shared key-value rows plus the sink's, float32 [B, S+1, K+1].

    The sink is an extra key. Queries get one more dimension holding its score, in which only its key is 1; its value
    is 0 in the other K dimensions. It therefore takes probability and contributes nothing.
    """
    rows = F.pad(rows_BSK.float(), (0, 1, 0, 1))
    rows[:, -1, -1] = 1.0
    return rows


def probabilities(q_BTHK: Tensor, rows: Tensor, sink_H: Tensor, hidden: Tensor | None) -> Tensor:
    """Return each head's attention over `with_sink` rows, float32 [B, T*H, S+1]; the sink is last, and rows sum to 1.

    `hidden` ([1 or B, T, S], or None) is True for keys that a query must not attend to. Scores are scaled by K^-0.5;
    `sink_H` is not scaled.
    """
    batch, tokens, heads, head_dim = q_BTHK.shape
    sink = sink_H.float().view(1, 1, heads, 1).expand(batch, tokens, heads, 1)
    q = torch.cat((q_BTHK.float() * head_dim**-0.5, sink), dim=-1).flatten(1, 2)
    if hidden is None:
        return (q @ rows.mT).softmax(-1)
    bias = q.new_zeros(hidden.shape[0], tokens, rows.shape[1]).masked_fill_(F.pad(hidden, (0, 1)), -torch.inf)
    bias = bias.unsqueeze(2).expand(-1, -1, heads, -1).flatten(1, 2).expand(batch, -1, -1)
    return torch.baddbmm(bias, q, rows.mT).softmax(-1)


def attend(q_BTHK: Tensor, rows_BSK: Tensor, sink_H: Tensor, hidden: Tensor | None = None) -> Tensor:
    """Softmax attention over shared key-value rows with a sink per head, float32 [B, T, H, K]."""
    rows = with_sink(rows_BSK)
    return (probabilities(q_BTHK, rows, sink_H, hidden) @ rows)[..., :-1].view(q_BTHK.shape)


@dataclass(frozen=True, slots=True)
class Keys:
    """The rows and entries that the queries of one forward attend to.

    Attributes:
        window_BSK: Raw rows; the last one belongs to the last token of this forward.
        end: Position after the last row.
        entries_BWK: Compressed entries, or None in a window layer.
        index: Queries that choose among the entries, or None to take all visible ones.
        gather: True to gather the chosen entries, False to mask the others.
    """

    window_BSK: Tensor
    end: int
    entries_BWK: Tensor | None
    index: IndexQueries | None
    gather: bool


class Attention(nn.Module):
    """The attention of one layer: a window, plus compressed entries according to `layer.attention`."""

    def __init__(self, spec: ModelSpec, layer: LayerSpec) -> None:
        super().__init__()
        self.layer = layer
        self.heads, self.head_dim = spec.num_attention_heads, spec.head_dim
        self.groups = spec.o_groups
        self.sliding_window, self.top_k = spec.sliding_window, spec.index_topk
        self.eps = spec.rms_norm_eps
        dim, all_heads = spec.hidden_size, spec.num_attention_heads * spec.head_dim
        self.attn_sink = nn.Parameter(torch.zeros(self.heads))
        self.wq_a = nn.Linear(dim, spec.q_lora_rank, bias=False)
        self.q_norm = RMSNorm(spec.q_lora_rank, spec.rms_norm_eps)
        self.wq_b = nn.Linear(spec.q_lora_rank, all_heads, bias=False)
        self.wkv = nn.Linear(dim, spec.head_dim, bias=False)
        self.kv_norm = RMSNorm(spec.head_dim, spec.rms_norm_eps)
        self.wo_a = nn.Linear(all_heads // spec.o_groups, spec.o_groups * spec.o_lora_rank, bias=False)
        self.wo_b = nn.Linear(spec.o_groups * spec.o_lora_rank, dim, bias=False)
        self.compressor = Compressor(spec, layer, spec.head_dim) if layer.compress_ratio else None
        self.indexer = Indexer(spec, layer) if layer.attention == "csa" else None

    def forward(self, x_BTD: Tensor, cache: LayerCache, context: ForwardContext) -> Tensor:
        """Return the attention output [B, T, D] of the normed inputs, and append their rows and entries to `cache`."""
        rotations_TR, inverse_TR = context.rotations[self.layer.rope]
        start, tokens = cache.window.end, x_BTD.shape[1]
        q_latent_BTQ = self.q_norm(self.wq_a(x_BTD))
        q_BTHK = self.wq_b(q_latent_BTQ).view(*x_BTD.shape[:2], self.heads, self.head_dim)
        q_BTHK = rotate(F.rms_norm(q_BTHK.float(), (self.head_dim,), eps=self.eps).to(x_BTD.dtype), rotations_TR)
        window_BSK = cache.window.append(rotate(self.kv_norm(self.wkv(x_BTD)), rotations_TR))
        entries_BWK, index = None, None
        if self.compressor is not None and cache.compressor is not None:
            entries_BWK = self.compressor(x_BTD, cache.compressor)
        if self.indexer is not None and cache.indexer is not None:
            recording = context.trace is not None and context.trace.index_scores
            index = self.indexer(x_BTD, q_latent_BTQ, rotations_TR, cache.indexer, self.top_k, recording)
        gather = False
        if index is not None and entries_BWK is not None:
            gather = not recording and (tokens == 1 or entries_BWK.shape[1] > max(GATHER_ABOVE, 4 * self.top_k))
        keys = Keys(window_BSK, start + tokens, entries_BWK, index, gather)

        size = self._block_size(x_BTD.shape[0], keys)
        blocks = [
            self._attend(q_BTHK[:, i : i + size], start + i, start, keys, context.trace) for i in range(0, tokens, size)
        ]
        o_BTHK = blocks[0] if len(blocks) == 1 else torch.cat(blocks, dim=1)
        o_BTHK = rotate(o_BTHK.to(x_BTD.dtype), inverse_TR)
        o_BTGX = o_BTHK.reshape(*x_BTD.shape[:2], self.groups, -1)
        wo_a_GOX = self.wo_a.weight.view(self.groups, -1, o_BTGX.shape[-1])
        out: Tensor = self.wo_b(torch.einsum("btgx,gox->btgo", o_BTGX, wo_a_GOX).flatten(2))
        return out

    def _block_size(self, batch: int, keys: Keys) -> int:
        num_entries = 0 if keys.entries_BWK is None else keys.entries_BWK.shape[1]
        per_query = self.heads * (self.sliding_window + QUERY_BLOCK + num_entries)
        if keys.index is not None:
            if keys.gather:
                per_query = (self.sliding_window + self.top_k) * (self.heads + 2 * self.head_dim)
            per_query = max(per_query, keys.index.heads * num_entries)
        return max(1, min(QUERY_BLOCK, SCORE_BUDGET // (batch * per_query)))

    def _attend(self, q_BTHK: Tensor, first: int, start: int, keys: Keys, trace: Trace | None) -> Tensor:
        """Attend from queries at positions `first`, `first` + 1, ... of a forward that began at `start`: [B, T, H,
        K]."""
        tokens, device = q_BTHK.shape[1], q_BTHK.device
        stop = first + tokens
        low = max(0, first - self.sliding_window + 1)
        window_start = keys.end - keys.window_BSK.shape[1]
        window = keys.window_BSK[:, low - window_start : stop - window_start]
        positions_T1 = torch.arange(first, stop, device=device).unsqueeze(1)
        ages = positions_T1 - torch.arange(low, stop, device=device)
        hidden = ((ages < 0) | (ages >= self.sliding_window)).unsqueeze(0)
        num_entries = stop // self.layer.compress_ratio if keys.entries_BWK is not None else 0
        if keys.entries_BWK is None or num_entries == 0:
            return attend(q_BTHK, window, self.attn_sink, None if tokens == 1 else hidden)

        entries = keys.entries_BWK[:, :num_entries]
        rows = torch.cat((window, entries), dim=1)
        visible_TW = torch.arange(num_entries, device=device) < (positions_T1 + 1) // self.layer.compress_ratio
        if keys.index is None or (num_entries <= self.top_k and (trace is None or not trace.index_scores)):
            return attend(q_BTHK, rows, self.attn_sink, None if tokens == 1 else _join(hidden, visible_TW[None]))
        scores_BTW = keys.index.scores(first - start, tokens, num_entries)
        chosen_BTW = select_top_k(scores_BTW.detach(), self.top_k, visible_TW)
        if keys.gather:
            return self._attend_gathered(q_BTHK, window, entries, chosen_BTW)
        if trace is not None and trace.index_scores:
            with torch.no_grad():
                mass = probabilities(q_BTHK, with_sink(rows), self.attn_sink, _join(hidden, visible_TW[None]))
                mass_BTW = mass.view(*q_BTHK.shape[:3], -1).sum(2)[..., window.shape[1] : -1]
            trace.index.append(IndexTrace(self.layer.index, first, scores_BTW, mass_BTW, visible_TW))
        return attend(q_BTHK, rows, self.attn_sink, _join(hidden, chosen_BTW))

    def _attend_gathered(self, q_BTHK: Tensor, window_BSK: Tensor, entries_BWK: Tensor, chosen_BTW: Tensor) -> Tensor:
        """Like `_attend`, with a copy of the window and chosen entries for each query: cost grows with top-k only."""
        batch, tokens = q_BTHK.shape[:2]
        missing = self.sliding_window - 1 + tokens - window_BSK.shape[1]
        windows = F.pad(window_BSK, (0, 0, missing, 0)).unfold(1, self.sliding_window, 1).mT
        real, picks = chosen_BTW.to(torch.uint8).topk(min(self.top_k, chosen_BTW.shape[-1]), dim=-1)
        batches = torch.arange(batch, device=picks.device).view(-1, 1, 1)
        rows = torch.cat((windows, entries_BWK[batches, picks]), dim=2).flatten(0, 1)
        slots = torch.arange(tokens + self.sliding_window - 1, device=picks.device).unfold(0, self.sliding_window, 1)
        hidden = torch.cat(((slots < missing).expand(batch, -1, -1), real == 0), dim=-1)
        out = attend(q_BTHK.flatten(0, 1).unsqueeze(1), rows, self.attn_sink, hidden.flatten(0, 1).unsqueeze(1))
        return out.view(q_BTHK.shape)


def _join(hidden_1TS: Tensor, taken_BTW: Tensor) -> Tensor:
    """Join the masks of window rows and entries into one that is True for keys a query must not attend to."""
    return torch.cat((hidden_1TS.expand(taken_BTW.shape[0], -1, -1), ~taken_BTW), dim=-1)
