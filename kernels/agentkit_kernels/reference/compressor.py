"""KV compression: r tokens become one entry, an average of their rows with a gate per channel.

HCA pools the r rows of a window. CSA's rows hold two series: entry w pools the first half of the rows of window w - 1
and the second half of those of window w, so neighbouring entries overlap. Windows are aligned to absolute positions,
independent of the forward's chunks. Source: the DeepSeek-V4 reference. Dimension key: `reference/batch.py`; L rows per
window.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from agentkit_kernels.ops import Compressor
from agentkit_kernels.reference.batch import Batch, Group, pad_rows
from agentkit_kernels.reference.linear import Columns, columns
from agentkit_kernels.reference.norm import rms_norm
from agentkit_kernels.reference.rope import rotate, rotations_at
from agentkit_kernels.reference.state import LayerState

CHANNELS = 32
"""Over fewer channels, torch's softmax over rows gives a window other bits beside other windows."""


def compress(
    projected: Tensor | Columns,
    compressor: Compressor,
    batch: Batch,
    state: LayerState,
    *,
    cast: Callable[[Tensor], Tensor] | None = None,
) -> None:
    """See `ops.Ops`; `cast` rounds entries before they are stored."""
    width = compressor.ape.shape[1]
    values = columns(projected, compressor.column, width)
    scores = columns(projected, compressor.column + width, width)
    for group in batch.groups:
        values_BTX = group.take(values)
        scores_BTX = group.take(scores) + compressor.ape.float()[group.positions % compressor.ratio]
        first, last = group.start // compressor.ratio, group.end // compressor.ratio
        entries_BWK = values.new_empty(group.sequences, 0, len(compressor.norm))
        if last > first:
            entries_BWK = _entries(values_BTX, scores_BTX, first, last, compressor, group, state)
        state.store_entries(group, compressor.prefix, first, cast(entries_BWK) if cast else entries_BWK)
        state.store_open_rows(group, compressor.prefix, values_BTX, scores_BTX)


def pool(values_BWLK: Tensor, scores_BWLK: Tensor) -> Tensor:
    """Average the L rows of each window, weighted per channel by the softmax of the scores over L: [B, W, K]."""
    channels = scores_BWLK.shape[-1]
    padded = F.pad(scores_BWLK, (0, max(0, CHANNELS - channels)))
    return (padded.softmax(2)[..., :channels] * values_BWLK).sum(2)


def _entries(
    values_BTX: Tensor,
    scores_BTX: Tensor,
    first: int,
    last: int,
    compressor: Compressor,
    group: Group,
    state: LayerState,
) -> Tensor:
    """Return the entries of the windows `first` to `last` - 1, which this group's tokens complete: [B, W, K]."""
    ratio, overlap = compressor.ratio, compressor.overlap
    oldest = (first - overlap) * ratio
    positions = torch.arange(oldest, group.start, device=values_BTX.device)
    older = state.open_rows(group, compressor.prefix, positions, values_BTX)
    pooled = []
    for earlier, rows in zip(older, (values_BTX, scores_BTX), strict=True):
        whole = torch.cat((earlier, rows), dim=1)[:, : last * ratio - oldest]
        windows_BWLX = whole.view(len(whole), -1, ratio, whole.shape[-1])
        if overlap:
            half = whole.shape[-1] // 2
            windows_BWLX = torch.cat((windows_BWLX[:, :-1, :, :half], windows_BWLX[:, 1:, :, half:]), dim=2)
        pooled.append(windows_BWLX)
    entries_BWK = pool(*pooled)
    starts = torch.arange(first, last, device=values_BTX.device) * ratio
    rotations = rotations_at(pad_rows(starts.repeat(len(entries_BWK))), compressor.frequencies)
    flat = rms_norm(pad_rows(entries_BWK.flatten(0, 1)), compressor.norm, compressor.eps)
    return rotate(flat, rotations)[: len(entries_BWK) * len(starts)].view(entries_BWK.shape)
