"""Sample a batch on the device: temperature, a packed grammar mask, and one uniform number per row.

Formula and twin: `reference/sampler.py`. The vocabulary is divided into splits of `SPLIT` ids. `_split_kernel` reduces
each to its highest allowed logit and that logit's id, the sums of exp(logit - highest) that the draw and the raw
log-softmax need, and whether a logit is not finite. `_draw_kernel` adds the splits in order, finds the one in which the
cumulative weight exceeds u times the total, and reads only this one again.

Sums and exponentials are float64, as in the twin. Order and rounding differ from the twin's by a few units in the last
place, so the id differs only if u times the total is within about 1e-13 of a boundary, relative to the total; the
log-probability agrees within float32 rounding.

Floor: the logits once, V / 8 bytes of mask, 8 V flops. At Flash 0.53 MB per row. Dimension key: B rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from agentkit_kernels.calls import Call, Make, Shapes
from agentkit_kernels.reference.sampler import Sampled
from agentkit_kernels.triton.launch import launch

SPLIT = 4096
"""Ids per split."""


@triton.jit
def _read(
    logits_ptr, mask_ptr, row, split, stride_lb, stride_mb, V, MASKED: tl.constexpr, SPLIT: tl.constexpr
):  # fmt: skip
    """Return a split's ids, its raw logits, -inf beyond the vocabulary, and the allowed ones, -inf for all others."""
    v = split * SPLIT + tl.arange(0, SPLIT)
    logits = tl.load(logits_ptr + row * stride_lb + v, mask=v < V, other=float("-inf")).to(tl.float32)
    allowed = logits
    if MASKED:
        w = split * (SPLIT // 32) + tl.arange(0, SPLIT // 32)
        words = tl.load(mask_ptr + row * stride_mb + w, mask=w < (V + 31) // 32, other=0)
        bits = (words[:, None] >> tl.arange(0, 32)[None, :]) & 1
        allowed = tl.where(tl.reshape(bits, [SPLIT]) != 0, logits, float("-inf"))
    return v, logits, allowed


@triton.jit
def _finite(x):
    return tl.where(tl.abs(x) < float("inf"), x, 0.0).to(tl.float64)


@triton.jit
def _weights(logits, highest, temperature):
    """exp((logit - highest) / temperature) in float64; 0 for ids that are not allowed, or have no finite logit."""
    scale = tl.where(temperature == 0.0, 1.0, temperature).to(tl.float64)
    weights = tl.exp((_finite(logits) - _finite(highest)) / scale)
    return tl.where(tl.abs(logits) < float("inf"), weights, 0.0)


@triton.jit
def _split_kernel(
    logits_ptr, mask_ptr, temperatures_ptr, highest_ptr, highest_id_ptr, weight_ptr, raw_ptr, raw_sum_ptr, finite_ptr,
    V, S, stride_lb, stride_mb, MASKED: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    v, logits, allowed = _read(logits_ptr, mask_ptr, row, tl.program_id(1), stride_lb, stride_mb, V, MASKED, SPLIT)
    at = row * S + tl.program_id(1)
    broken = ((v < V) & ~(tl.abs(logits) < float("inf"))).to(tl.int32)
    tl.store(finite_ptr + at, tl.max(broken, 0) == 0)
    highest, raw = tl.max(allowed, 0), tl.max(logits, 0)
    tl.store(highest_ptr + at, highest)
    tl.store(highest_id_ptr + at, tl.min(tl.where((allowed == highest) & (v < V), v, V), 0))
    tl.store(weight_ptr + at, tl.sum(_weights(allowed, highest, tl.load(temperatures_ptr + row)), 0))
    tl.store(raw_ptr + at, raw)
    tl.store(raw_sum_ptr + at, tl.sum(_weights(logits, raw, 0.0), 0))


@triton.jit
def _draw_kernel(
    logits_ptr, mask_ptr, temperatures_ptr, uniforms_ptr, highest_ptr, highest_id_ptr, weight_ptr, raw_ptr,
    raw_sum_ptr, finite_ptr, ids_ptr, logprobs_ptr, row_finite_ptr,
    V, S, stride_lb, stride_mb, MASKED: tl.constexpr, SPLIT: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    s = tl.arange(0, BLOCK_S)
    at = row * S + s
    temperature = tl.load(temperatures_ptr + row)
    highs = tl.load(highest_ptr + at, mask=s < S, other=float("-inf"))
    highest = tl.max(highs, 0)
    some = highest > float("-inf")
    high_ids = tl.load(highest_id_ptr + at, mask=s < S, other=0)
    greedy = tl.min(tl.where((highs == highest) & (s < S), high_ids, V), 0)

    scaled = tl.load(weight_ptr + at, mask=s < S, other=0.0) * _weights(highs, highest, temperature)
    cumulative = tl.cumsum(scaled, 0)
    target = tl.load(uniforms_ptr + row) * tl.sum(tl.where(s == BLOCK_S - 1, cumulative, 0.0), 0)
    last = tl.max(tl.where(scaled > 0.0, s, 0), 0)
    split = tl.minimum(tl.min(tl.where(cumulative > target, s, BLOCK_S), 0), last)
    before = tl.sum(tl.where(s == split - 1, cumulative, 0.0), 0)
    v, _, allowed = _read(logits_ptr, mask_ptr, row, split, stride_lb, stride_mb, V, MASKED, SPLIT)
    weights = _weights(allowed, highest, temperature)
    passed = before + tl.cumsum(weights, 0) > target
    last_id = tl.max(tl.where(weights > 0.0, v, 0), 0)
    drawn = tl.minimum(tl.min(tl.where(passed, v, V), 0), last_id)

    token = tl.where(some, tl.where(temperature == 0.0, greedy, drawn), -1)
    raw = tl.load(raw_ptr + at, mask=s < S, other=float("-inf"))
    raw_highest = tl.max(raw, 0)
    raw_sums = tl.load(raw_sum_ptr + at, mask=s < S, other=0.0) * _weights(raw, raw_highest, 0.0)
    logit = tl.load(logits_ptr + row * stride_lb + tl.maximum(token, 0)).to(tl.float64)
    total = tl.sum(raw_sums, 0)  # 0 only in a row that is not finite
    logprob = logit - _finite(raw_highest) - tl.log(tl.where(total > 0.0, total, 1.0))
    tl.store(ids_ptr + row, token.to(tl.int64))
    tl.store(logprobs_ptr + row, logprob.to(tl.float32))
    tl.store(row_finite_ptr + row, tl.min(tl.load(finite_ptr + at, mask=s < S, other=1).to(tl.int32), 0) != 0)


def sample(logits: Tensor, temperatures: Tensor, uniforms: Tensor, bitmask: Tensor | None = None) -> Sampled:
    """Choose an id for every row, without a copy to the host; see `reference.sampler.sample`.

    Args:
        logits: [B, V]; rows may have any stride.
        temperatures: float64 [B]; 0 takes the highest logit.
        uniforms: float64 [B], in [0, 1).
        bitmask: int32 [B, ceil(V / 32)], 1 for allowed ids; None allows all.
    """
    rows, size = logits.shape
    splits, device = triton.cdiv(size, SPLIT), logits.device
    masked = bitmask is not None
    words = temperatures if bitmask is None else bitmask
    highest, raw = torch.empty(2, rows, splits, dtype=torch.float32, device=device)
    highest_id = torch.empty(rows, splits, dtype=torch.int32, device=device)
    weight, raw_sum = torch.empty(2, rows, splits, dtype=torch.float64, device=device)
    finite = torch.empty(rows, splits, dtype=torch.bool, device=device)
    result = Sampled(
        torch.empty(rows, dtype=torch.int64, device=device),
        torch.empty(rows, dtype=torch.float32, device=device),
        torch.empty(rows, dtype=torch.bool, device=device),
    )
    stride_mask = 0 if bitmask is None else bitmask.stride(0)
    parts = (highest, highest_id, weight, raw, raw_sum, finite)
    launch(
        _split_kernel, (rows, splits), logits, words, temperatures, *parts,
        size, splits, logits.stride(0), stride_mask, MASKED=masked, SPLIT=SPLIT, num_warps=8,
    )  # fmt: skip
    launch(
        _draw_kernel, (rows,), logits, words, temperatures, uniforms, *parts, *result,
        size, splits, logits.stride(0), stride_mask,
        MASKED=masked, SPLIT=SPLIT, BLOCK_S=triton.next_power_of_2(splits), num_warps=8,
    )  # fmt: skip
    return result


def calls(shapes: Shapes, rows: int, make: Make) -> Iterator[Call]:
    """Yield sampling with and without a grammar; see `agentkit_kernels.calls`."""
    size = shapes.vocab_size
    logits = make.floats(rows, size, dtype=torch.float32)
    temperatures = make.floats(rows, dtype=torch.float64)
    uniforms = make.floats(rows, dtype=torch.float64)
    words = -(-size // 32)
    bitmask = make.ints([-1] * (rows * words), dtype=torch.int32).view(rows, words)
    moved = rows * (4 * size + 8 + 8 + 13)
    yield Call("any id", partial(sample, logits, temperatures, uniforms), moved, 8 * rows * size)
    masked = partial(sample, logits, temperatures, uniforms, bitmask)
    yield Call("packed mask", masked, moved + 4 * rows * words, 8 * rows * size)
