"""Compressed entries (`triton/compressor.py`) beside the same formula in torch, eager and compiled."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from agentkit_kernels.gpu.bench import Bench, Peer
from agentkit_kernels.gpu.record import Goal, Measurement
from agentkit_kernels.ops import Compressor
from agentkit_kernels.reference.quantize import kv_row_bytes
from agentkit_kernels.reference.rope import rotations_at
from agentkit_kernels.triton.compressor import compress

SPAN = 256
RATIOS = {"CSA": 4, "HCA": 128}


def random_compressor(bench: Bench, ratio: int, *, prefix: str = "") -> Compressor:
    """Return random parameters of a compressor of attention entries, or of index keys with the prefix `index_`."""
    size = bench.shapes.index_head_dim if prefix else bench.shapes.head_dim
    width, pairs = size * (2 if ratio == 4 else 1), bench.shapes.qk_rope_head_dim // 2
    frequencies = 10_000.0 ** (-torch.arange(pairs, device=bench.device) / pairs)
    ape, norm = bench.floats(ratio, width, dtype=torch.float32), bench.floats(size, dtype=torch.float32)
    return Compressor(prefix, 0, ratio, ratio == 4, ape, norm, 1e-6, frequencies)


def pooled(projected: Tensor, of: Compressor, rotations: Tensor) -> Tensor:
    """The entries of one sequence from position 0 on, in plain torch: [W, K]."""
    width = of.ape.shape[1]
    values, scores = (part.reshape(-1, of.ratio, width).float() for part in torch.split(projected, width, dim=1))
    scores = scores + of.ape
    if of.overlap:
        half = width // 2
        earlier = F.pad(values[:-1, :, :half], (0, 0, 0, 0, 1, 0))
        earlier_scores = F.pad(scores[:-1, :, :half], (0, 0, 0, 0, 1, 0), value=-torch.inf)
        values = torch.cat((earlier, values[:, :, half:]), dim=1)
        scores = torch.cat((earlier_scores, scores[:, :, half:]), dim=1)
    x = F.rms_norm((scores.softmax(1) * values).sum(1), (len(of.norm),), of.norm, of.eps)
    rotary = rotations.shape[1]
    plain, even, odd = x[:, :-rotary], x[:, -rotary::2], x[:, 1 - rotary :: 2]
    cosine, sine = rotations[:, 0::2], rotations[:, 1::2]
    turned = torch.stack((even * cosine - odd * sine, even * sine + odd * cosine), dim=2).flatten(1)
    return torch.cat((plain, turned), dim=1).to(projected.dtype)


@dataclass(frozen=True, slots=True)
class Prefill:
    """One sequence from position 0 on, and empty pools; the spans are in order."""

    of: Compressor
    projected: Tensor
    values: Tensor
    scores: Tensor
    lengths: Tensor
    start: Tensor
    tables: Tensor

    @classmethod
    def random(cls, bench: Bench, ratio: int, tokens: int) -> Prefill:
        """Return `tokens` random rows."""
        of = random_compressor(bench, ratio)
        width = of.ape.shape[1]
        values = torch.zeros(1, (2 if of.overlap else 1) * ratio + 12, width, device=bench.device)
        return cls(
            of, bench.floats(tokens, 2 * width), values, torch.full_like(values, -torch.inf),
            bench.ints([0, tokens]), bench.ints([0]), bench.ints(range(-(-tokens // SPAN)))[None],
        )  # fmt: skip

    @property
    def bytes(self) -> int:
        """Rows and parameters read, open rows written."""
        return int(self.projected.nbytes + self.of.ape.nbytes + self.values.nbytes + self.scores.nbytes)

    def run(self, entries: Tensor) -> Tensor:
        """Launch the kernels; return the pool's entries, end to end."""
        compress(
            self.projected, self.of, self.lengths, self.start, self.start, self.tables, len(self.projected),
            self.values, self.scores, entries,
        )  # fmt: skip
        return entries.flatten(0, 1)[: len(self.projected) // self.of.ratio]


def prefill(bench: Bench) -> Iterator[Measurement]:
    """H15: the entries of 32,768 tokens, for CSA and for HCA."""
    tokens = bench.pick(32_768, 128)
    size, rotary = bench.shapes.head_dim, bench.shapes.qk_rope_head_dim
    compiled = bench.compiled(pooled)
    for (kind, ratio), goal in zip(RATIOS.items(), (Goal("us", 110, 60), Goal("us", 60, 32)), strict=True):
        made = Prefill.random(bench, ratio, tokens)
        rotations = rotations_at(bench.ints(range(tokens // ratio)) * ratio, made.of.frequencies)
        shape, row = (-(-tokens // SPAN), SPAN // ratio), kv_row_bytes(size, rotary)
        plain = torch.empty(*shape, size, dtype=torch.bfloat16, device=bench.device)
        packed = torch.empty(*shape, row, dtype=torch.uint8, device=bench.device)
        peers = [
            Peer("torch eager", partial(pooled, made.projected, made.of, rotations)),
            Peer("torch.compile", partial(compiled, made.projected, made.of, rotations)),
        ]
        for name, entries in (("bf16", plain), ("FP8", packed)):
            yield bench.measure(
                f"{kind}, {tokens} tokens, {name} entries",
                partial(made.run, entries),
                goal,
                bytes=made.bytes + entries.nbytes,
                peers=peers if entries is plain else (),
            )
