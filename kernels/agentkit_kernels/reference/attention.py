"""V4 attention: one KV head whose rows are both key and value, a sliding window, compressed entries and a sink.

A query attends to the raw rows of the last `window` tokens, and to the entries whose whole window of tokens lies in its
past: all of them (HCA) or the indexer's choice (CSA). One softmax covers both, with a learned sink per head.

The products of a block have the same shapes however a text is cut into forwards (`batch.Block`). So a query's bits do
not depend on the other queries, and a forward over a whole text gives the same bits as token by token. Source: the
DeepSeek-V4 reference. Dimension key: `reference/batch.py`; U queries of a block, S keys.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from agentkit_kernels.ops import QUERY_BLOCK
from agentkit_kernels.reference.batch import ROWS, Batch
from agentkit_kernels.reference.indexer import TopK, matmul
from agentkit_kernels.reference.rope import rotate
from agentkit_kernels.reference.state import LayerState


def with_sink(rows_BSK: Tensor) -> Tensor:
    """Return the shared key-value rows plus the sink's, [B, S+1, K+1].

    The sink is an extra key. Queries get one more dimension holding its score, in which only its key is 1; its value
    is 0 in the other K dimensions. It therefore takes probability and contributes nothing.
    """
    rows = F.pad(rows_BSK, (0, 1, 0, 1))
    rows[:, -1, -1] = 1.0
    return rows


def probabilities(q_BUHK: Tensor, rows: Tensor, sink_H: Tensor, seen_BUS: Tensor) -> Tensor:
    """Return each head's attention over `with_sink` rows, [B, U*H, S+1]; the sink is last, and rows sum to 1.

    `seen` [1 or B, U, S] is True for keys that a query attends to.
    """
    batch, tokens, heads, _ = q_BUHK.shape
    sink = sink_H.float().view(1, 1, heads, 1).expand(batch, tokens, heads, 1)
    q = torch.cat((q_BUHK, sink), dim=-1).flatten(1, 2)
    bias = q.new_zeros(seen_BUS.shape[0], tokens, rows.shape[1]).masked_fill_(F.pad(~seen_BUS, (0, 1)), -torch.inf)
    bias = bias.unsqueeze(2).expand(-1, -1, heads, -1).flatten(1, 2).expand(batch, -1, -1)
    if (missing := ROWS - q.shape[1]) > 0:
        q, bias = F.pad(q, (0, 0, 0, missing)), F.pad(bias, (0, 0, 0, missing))
    return torch.baddbmm(bias, q, rows.mT).softmax(-1)[:, : tokens * heads]


def attend_to(q_BUHK: Tensor, rows_BSK: Tensor, sink_H: Tensor, seen_BUS: Tensor) -> Tensor:
    """Softmax attention over shared key-value rows with a sink per head, [B, U, H, K]."""
    rows = with_sink(rows_BSK)
    return matmul(probabilities(q_BUHK, rows, sink_H, seen_BUS), rows)[..., :-1].view(q_BUHK.shape)


def attend(
    q: Tensor,
    kv: Tensor,
    rotations: Tensor,
    sink: Tensor,
    batch: Batch,
    state: LayerState,
    *,
    window: int,
    ratio: int = 0,
    topk: TopK | None = None,
) -> Tensor:
    outs, number = [], 0
    reach = -(-window // ROWS) * ROWS
    for group in batch.groups:
        q_BTHK, kv_BTK = group.take(q), group.take(kv)
        base = max(0, group.start // QUERY_BLOCK * QUERY_BLOCK - reach)
        older = state.window(group, torch.arange(base, group.start, device=kv.device), kv)
        rows_BSK = F.pad(torch.cat((older, state.as_stored(kv_BTK)), dim=1), (0, 0, 0, -group.end % QUERY_BLOCK))
        for block in group.blocks:
            low = max(0, block.end - QUERY_BLOCK - reach)
            ages = block.positions[:, None] - torch.arange(low, block.end, device=kv.device)
            seen = visible = ((ages >= 0) & (ages < window))[None]
            rows = rows_BSK[:, low - base : block.end - base]
            if ratio and (count := block.end // ratio):
                rows = torch.cat((rows, state.entries(group, "", count, kv.shape[-1])), dim=1)
                entries = (torch.arange(count, device=kv.device) < (block.positions[:, None] + 1) // ratio)[None]
                chosen = topk.chosen[number] if topk is not None else None
                visible, seen = _join(seen, entries), _join(seen, entries if chosen is None else chosen)
            q_BUHK = q_BTHK[:, block.tokens]
            if batch.trace is not None and topk is not None and (trace := topk.traces[number]) is not None:
                with torch.no_grad():
                    mass = probabilities(q_BUHK, with_sink(rows), sink, visible).view(*q_BUHK.shape[:3], -1)
                    trace.mass_BTW = mass.sum(2)[..., block.end - low : -1]
                batch.trace.index.append(trace)
            outs.append(attend_to(q_BUHK, rows, sink, seen))
            number += 1
        state.store_window(group, kv_BTK)
        outs[-len(group.blocks) :] = [torch.cat(outs[-len(group.blocks) :], dim=1)]
    return rotate(batch.gather(outs), rotations, inverse=True)


def _join(rows_1US: Tensor, entries_BUS: Tensor) -> Tensor:
    return torch.cat((rows_1US.expand(len(entries_BUS), -1, -1), entries_BUS), dim=-1)
