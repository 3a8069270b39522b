"""Index scores and top-k (`triton/indexer.py`) beside torch's products and `topk` over gathered bfloat16 keys."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from agentkit_kernels.gpu.bench import Bench, OutputsDifferError, Peer, absent
from agentkit_kernels.gpu.record import Goal, Measurement, Skipped, Unit
from agentkit_kernels.triton.indexer import index_topk

_PER_SPAN = 64
_AGREE = 0.98
"""Least share of chosen entries that the float32 scores choose too; bfloat16 queries and sums may swap near ties."""


def index_keys(bench: Bench, spans: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return index keys as E4M3 codes, uint8 [spans, 64, C], with their scales [spans, 64], and dequantised to bfloat16
    [spans, 64, C]."""
    size = bench.shapes.index_head_dim
    codes = bench.floats(spans, _PER_SPAN, size).to(torch.float8_e4m3fn)
    scales = 2.0 ** bench.below(3, spans, _PER_SPAN).float()
    return codes.view(torch.uint8), scales, (codes.float() * scales[:, :, None]).bfloat16()


def index_scores(q_NJC: Tensor, keys_SC: Tensor, weights_NJ: Tensor) -> Tensor:
    """sum_j weight[n, j] * relu(q[n, j] · key), [N, S]."""
    dots = (q_NJC.flatten(0, 1) @ keys_SC.mT).relu_().view(*q_NJC.shape[:2], -1)
    return (weights_NJ.to(dots.dtype).unsqueeze(1) @ dots).squeeze(1)


def _measure(
    bench: Bench, sequences: int, queries: int, entries: int, unit: Unit, good: float, moonshot: float
) -> Measurement:
    """`queries` queries of each sequence over `entries` entries, all visible."""
    shapes, spans = bench.shapes, -(-entries // _PER_SPAN)
    heads, size, top_k = shapes.index_n_heads, shapes.index_head_dim, shapes.index_topk
    codes, scales, keys = index_keys(bench, sequences * spans)
    ids = torch.randperm(sequences * spans, generator=bench.generator, device=bench.device)
    tables = ids.view(sequences, spans)
    gathered = keys[tables].view(sequences, -1, size)[:, :entries]
    rows = sequences * queries
    q, weights = bench.floats(rows, heads, size), bench.floats(rows, heads, dtype=torch.float32)
    positions = torch.full((rows,), 4 * entries - 1, device=bench.device)
    owner = bench.ints(range(sequences)).repeat_interleave(queries)

    def run() -> tuple[Tensor, Tensor]:
        return index_topk(q, weights, positions, owner, tables, codes, scales, ratio=4, top_k=top_k)

    at_once = max(1, min(queries, (1 << 32) // (2 * heads * entries)))
    agree = _agreement(run()[0], q[:at_once], weights[:at_once], gathered[0], top_k)
    if agree < _AGREE:
        raise OutputsDifferError(f"only {agree:.1%} of the chosen entries are those of the float32 scores")

    def peer(scores: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Tensor:
        for low in range(0, rows, at_once):
            mine = slice(low, min(low + at_once, rows))
            found = scores(q[mine], gathered[low // queries], weights[mine]).topk(top_k, dim=1)
        return found.indices

    compiled = bench.compiled(index_scores)
    width = size + 4
    moved = sequences * entries * width + q.nbytes + weights.nbytes + 4 * rows * top_k
    return bench.measure(
        f"B={sequences}, {queries} queries, {entries} keys",
        run,
        Goal(unit, good, moonshot),
        bytes=moved,
        flops=2 * rows * entries * heads * (size + 1),
        rate="fp8",
        peers=[
            Peer("torch bf16 products and topk", lambda: peer(index_scores), compare=False),
            Peer("the same, scores by torch.compile", lambda: peer(compiled), compare=False),
        ],
        note=f"{agree:.2%} of the chosen entries are those of the float32 scores",
    )


def _agreement(chosen: Tensor, q: Tensor, weights: Tensor, keys: Tensor, top_k: int) -> float:
    """Return the share of the first rows' chosen entries that float32 scores choose too; equal scores, such as zeros of
    queries whose weights are negative, may be chosen in any order."""
    shares = []
    for n in range(min(len(q), 4)):
        scores = index_scores(q[n : n + 1].float(), keys.float(), weights[n : n + 1])[0]
        shares.append((scores[chosen[n].long()] >= scores.topk(top_k).values[-1]).float().mean())
    return float(torch.stack(shares).mean())


def decode(bench: Bench) -> Iterator[Measurement | Skipped]:
    """H7: the best 512 of a million tokens' 262,144 entries, for 1 and 8 sequences."""
    entries = bench.pick(262_144, 200)
    for sequences, good, moonshot in ((1, 45.0, 18.0), (bench.pick(8, 2), 180.0, 115.0)):
        yield _measure(bench, sequences, 1, entries, "us", good, moonshot)
    yield absent("DeepGEMM, FP8 index scores", "deep_gemm")


def prefill(bench: Bench) -> Iterator[Measurement]:
    """H8: 2,048 queries of one sequence over 65,536 entries."""
    yield _measure(bench, 1, bench.pick(2048, 34), bench.pick(65_536, 200), "TFLOPS", 350, 600)
