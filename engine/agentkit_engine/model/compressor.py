"""KV compression: m tokens become one entry, an average of their rows with a gate per channel.

HCA pools the m rows of a window. CSA's rows hold two series, Ca and Cb: entry w pools the Ca half of window w-1 and
the Cb half of window w, so neighbouring entries overlap. Windows are aligned to absolute positions, independent of the
forward's chunks. Source: the DeepSeek-V4 reference. Dimension key: `model/__init__.py`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from agentkit_engine.model.cache import CompressorCache
from agentkit_engine.model.norm import RMSNorm
from agentkit_engine.model.rope import rotate, rotations
from agentkit_engine.spec import LayerSpec, ModelSpec


def pool(values_BWLK: Tensor, scores_BWLK: Tensor) -> Tensor:
    """Average the L rows of each window, weighted per channel by the softmax of the scores over L: [B, W, K]."""
    return (scores_BWLK.softmax(2) * values_BWLK).sum(2)


class Compressor(nn.Module):
    """Turns attention inputs into compressed entries of size `head_dim` (the indexer has its own, smaller one)."""

    def __init__(self, spec: ModelSpec, layer: LayerSpec, head_dim: int) -> None:
        super().__init__()
        self.ratio = layer.compress_ratio
        self.overlap = layer.attention == "csa"
        self.rope = layer.rope
        self.rotary_dim = spec.qk_rope_head_dim
        width = head_dim * (2 if self.overlap else 1)
        self.ape = nn.Parameter(torch.zeros(self.ratio, width))
        self.wkv = nn.Linear(spec.hidden_size, width, bias=False)
        self.wgate = nn.Linear(spec.hidden_size, width, bias=False)
        self.norm = RMSNorm(head_dim, spec.rms_norm_eps)

    def forward(self, x_BTD: Tensor, cache: CompressorCache) -> Tensor:
        """Append these tokens' rows, emit every entry they complete, and return all entries so far [B, W, K]."""
        start, ratio = cache.values.end, self.ratio
        x32_BTD = x_BTD.float()
        offsets_T = torch.arange(start, start + x_BTD.shape[1], device=x_BTD.device) % ratio
        values = cache.values.append(F.linear(x32_BTD, self.wkv.weight.float()))
        scores = cache.scores.append(F.linear(x32_BTD, self.wgate.weight.float()) + self.ape.float()[offsets_T])
        end = cache.values.end
        first, last = start // ratio, end // ratio
        if first == last:
            return cache.entries.rows(x_BTD.new_empty(x_BTD.shape[0], 0, self.norm.weight.shape[0]))
        base = end - values.shape[1]
        values_BWLK = self._windows(values, first, last, base, before_start=0.0)
        scores_BWLK = self._windows(scores, first, last, base, before_start=-torch.inf)
        entries = self.norm(pool(values_BWLK, scores_BWLK).to(x_BTD.dtype))
        positions_W = torch.arange(first, last, device=x_BTD.device) * ratio
        return cache.entries.append(rotate(entries, rotations(self.rope, positions_W, self.rotary_dim)))

    def _windows(self, rows: Tensor, first: int, last: int, base: int, before_start: float) -> Tensor:
        """Return the rows that windows first..last-1 pool, [B, W, L, K]; `rows` starts at position `base`."""
        ratio = self.ratio
        own = rows[:, first * ratio - base : last * ratio - base]
        if not self.overlap:
            return self._in_windows(own)
        half = rows.shape[-1] // 2
        if first == 0:
            previous = F.pad(rows[:, : (last - 1) * ratio, :half], (0, 0, ratio, 0), value=before_start)
        else:
            previous = rows[:, (first - 1) * ratio - base : (last - 1) * ratio - base, :half]
        return torch.cat((self._in_windows(previous), self._in_windows(own[..., half:])), dim=2)

    def _in_windows(self, rows: Tensor) -> Tensor:
        return rows.reshape(rows.shape[0], -1, self.ratio, rows.shape[-1])
