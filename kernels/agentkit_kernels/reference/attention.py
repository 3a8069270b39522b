"""V4 attention: one KV head whose rows are both key and value, a sliding window, compressed entries and a sink.

A query attends to the raw rows of the last `window` tokens, and to the entries whose whole window of tokens lies in its
past: all of them (HCA) or the indexer's choice (CSA). One softmax covers both, with a learned sink per head.

The products have sizes that depend on a query's position only: all rows from `window` before its block on, and entries
in fixed tiles. A key that a query must not see gets weight 0.0, which changes no sum. So a query's bits do not depend
on the other queries, and a forward over a whole text gives the same bits as token by token. Source: the DeepSeek-V4
reference. Dimension key: `reference/batch.py`; U queries of a block, S keys.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from agentkit_kernels.ops import QUERY_BLOCK
from agentkit_kernels.reference.batch import ROWS, Batch
from agentkit_kernels.reference.indexer import TopK, matmul, tiles
from agentkit_kernels.reference.rope import rotate
from agentkit_kernels.reference.state import LayerState


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
        base = group.start // QUERY_BLOCK * QUERY_BLOCK - reach
        older = state.window(group, torch.arange(base, group.start, device=kv.device), kv)
        rows_BSK = F.pad(torch.cat((older, kv_BTK), dim=1), (0, 0, 0, -group.end % QUERY_BLOCK))
        blocks = []
        for block in group.blocks:
            low = (group.start + block.low) // QUERY_BLOCK * QUERY_BLOCK - reach
            size = reach + QUERY_BLOCK
            parts = [rows_BSK[:, low - base : low - base + size]]
            keys = torch.arange(low, low + size, device=kv.device)
            ages = block.positions.unsqueeze(1) - keys
            seen = ((ages >= 0) & (ages < window) & (keys >= 0)).unsqueeze(0)
            visible = chosen = seen
            if ratio and (most := (group.start + block.high) // ratio):
                parts += [state.entries(group, "", *tile) for tile in tiles(most)]
                entries = torch.arange(sum(part.shape[1] for part in parts[1:]), device=kv.device)
                visible_US = entries < ((block.positions + 1) // ratio).unsqueeze(1)
                picked = None if topk is None else topk.chosen[number]
                visible, chosen = (
                    _join(seen, visible_US[None]),
                    _join(seen, visible_US[None] if picked is None else picked),
                )
            scores = _scores(q_BTHK[:, block.tokens], parts, sink)
            if topk is not None and (trace := topk.traces[number]) is not None and batch.trace is not None:
                with torch.no_grad():
                    trace.mass_BTW = _weights(scores, visible).sum(2)[..., ROWS + size :]
                batch.trace.index.append(trace)
            blocks.append(_sum(_weights(scores, chosen), parts))
            number += 1
        state.store_window(group, kv_BTK)
        outs.append(torch.cat(blocks, dim=1))
    return rotate(batch.gather(outs), rotations, inverse=True)


def _scores(q_BUHK: Tensor, parts: list[Tensor], sink_H: Tensor) -> Tensor:
    """Return the scores [B, U, H, ROWS + S] of all rows. The first one of the `ROWS` columns before them is the sink's,
    the others are -inf: a softmax over whole vectors has the same bits with any number of hidden keys after them."""
    batch, tokens, heads, _ = q_BUHK.shape
    sink = F.pad(sink_H.float().unsqueeze(1), (0, ROWS - 1), value=-torch.inf).expand(batch, tokens, heads, ROWS)
    products = [matmul(q_BUHK.flatten(1, 2), rows.mT).view(batch, tokens, heads, -1) for rows in parts]
    return torch.cat((sink, *products), dim=-1)


def _weights(scores_BUHS: Tensor, seen_BUS: Tensor) -> Tensor:
    bias = torch.zeros(seen_BUS.shape, device=scores_BUHS.device).masked_fill_(~seen_BUS, -torch.inf)
    return (scores_BUHS + F.pad(bias, (ROWS, 0)).unsqueeze(2)).softmax(-1)


def _sum(weights_BUHS: Tensor, parts: list[Tensor]) -> Tensor:
    """Return the weighted sum of the rows, [B, U, H, K], added part by part."""
    sizes = [ROWS, *(rows.shape[1] for rows in parts)]
    _, *masses = torch.split(weights_BUHS.flatten(1, 2), sizes, dim=-1)
    outs = [matmul(mass, rows) for mass, rows in zip(masses, parts, strict=True)]
    total = outs[0]
    for out in outs[1:]:
        total = total + out
    return total.view(*weights_BUHS.shape[:3], -1)


def _join(rows_1US: Tensor, entries_BUS: Tensor) -> Tensor:
    return torch.cat((rows_1US.expand(len(entries_BUS), -1, -1), entries_BUS), dim=-1)
