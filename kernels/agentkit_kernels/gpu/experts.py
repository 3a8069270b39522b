"""Mixtures of experts (`triton/experts.py`) beside torch's grouped products of a dequantised copy.

Dimension key: `agentkit_kernels.ops`; P (token, expert) pairs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from agentkit_kernels.gpu.bench import Bench, Peer
from agentkit_kernels.gpu.record import Goal, Measurement
from agentkit_kernels.packed import MXFP4_GROUP, Packed
from agentkit_kernels.reference.formats import dequantise
from agentkit_kernels.triton.experts import EXACT_TILE, experts

LIMIT = 10.0
"""V4's clamp of SwiGLU."""


def mxfp4(bench: Bench, *shape: int) -> Packed:
    """Return random MXFP4 matrices of about unit gain: codes are about 3 in size."""
    *lead, outputs, inputs = shape
    codes = bench.below(256, *lead, outputs, inputs // 2, dtype=torch.uint8)
    exponent = 127 - round(math.log2(3 * inputs**0.5))
    scales = bench.below(2, *lead, outputs, inputs // MXFP4_GROUP, dtype=torch.uint8) + exponent
    return Packed("mxfp4", codes, scales.view(torch.float8_e8m0fnu), tuple(shape))


def copy_of(weight: Packed) -> Tensor:
    """Return a bfloat16 copy of a stack, made matrix by matrix."""
    data = torch.empty(weight.shape, dtype=torch.bfloat16, device=weight.data.device)
    for e, out in enumerate(data):
        out.copy_(dequantise(Packed(weight.format, weight.data[e], weight.scale[e], weight.shape[1:])))
    return data


@dataclass(frozen=True, slots=True)
class Layer:
    """The routed experts of one layer, and a bfloat16 copy of them with w1 and w3 joined."""

    w1: Packed
    w3: Packed
    w2: Packed
    copy_w13: Tensor
    copy_w2: Tensor

    @classmethod
    def random(cls, bench: Bench) -> Layer:
        """Return a layer with random weights."""
        number, width, dim = (
            bench.shapes.n_routed_experts,
            bench.shapes.moe_intermediate_size,
            bench.shapes.hidden_size,
        )
        w1, w3, w2 = (mxfp4(bench, number, *size) for size in ((width, dim), (width, dim), (dim, width)))
        return cls(w1, w3, w2, torch.cat((copy_of(w1), copy_of(w3)), dim=1), copy_of(w2))

    @property
    def bytes_per_expert(self) -> int:
        return sum(weight.nbytes // weight.shape[0] for weight in (self.w1, self.w3, self.w2))


@dataclass(frozen=True, slots=True)
class Rows:
    """Tokens with their random experts."""

    x: Tensor
    experts: Tensor
    weights: Tensor
    shared: Tensor

    @classmethod
    def random(cls, bench: Bench, tokens: int) -> Rows:
        """Return `tokens` tokens, whose experts are uniform and distinct."""
        number, active = bench.shapes.n_routed_experts, bench.shapes.num_experts_per_tok
        chosen = torch.rand(tokens, number, generator=bench.generator, device=bench.device).topk(active).indices
        weights = torch.rand(tokens, active, generator=bench.generator, device=bench.device)
        x = bench.floats(tokens, bench.shapes.hidden_size)
        return cls(x, chosen, weights / weights.sum(1, keepdim=True), torch.zeros_like(x))


def swiglu(gate_up: Tensor) -> Tensor:
    """Clamped SwiGLU in plain torch."""
    gate, up = gate_up.float().chunk(2, dim=-1)
    return F.silu(gate.clamp(max=LIMIT)) * up.clamp(-LIMIT, LIMIT)


def grouped(rows: Rows, layer: Layer) -> Tensor:
    """The mixture with torch's grouped products over bfloat16 weights.

    Raises:
        NotImplementedError: This torch has no grouped product.
    """
    product: Callable[..., Any] | None = getattr(F, "grouped_mm", None) or getattr(torch, "_grouped_mm", None)
    if product is None:
        raise NotImplementedError("this torch has no grouped_mm")
    number, active = layer.copy_w2.shape[0], rows.experts.shape[1]
    flat = rows.experts.flatten()
    order = flat.argsort(stable=True)
    ends = (flat[:, None] == torch.arange(number, device=flat.device)).sum(0).cumsum(0).int()
    gate_up = product(rows.x[order // active], layer.copy_w13.mT, offs=ends)
    hidden = (swiglu(gate_up) * rows.weights.flatten()[order, None]).bfloat16()
    sorted_out = product(hidden, layer.copy_w2.mT, offs=ends)
    out = torch.empty_like(sorted_out)
    out[order] = sorted_out
    return out.view(len(rows.x), active, -1).float().sum(1).bfloat16() + rows.shared


def loop(rows: Rows, layer: Layer, chosen: list[int]) -> Tensor:
    """The mixture with one product per expert in `chosen`; every token goes through all of them, unweighted if it did
    not choose them, so the host need not know how many did."""
    out = rows.shared.float()
    for e in chosen:
        weight = (rows.weights * (rows.experts == e)).sum(1, keepdim=True)
        hidden = swiglu(rows.x @ layer.copy_w13[e].mT) * weight
        out = out + (hidden.bfloat16() @ layer.copy_w2[e].mT).float()
    return out.bfloat16()


def moe(bench: Bench) -> Iterator[Measurement]:
    """H9: one layer of 256 MXFP4 experts, 6 active, for 1 to 8,192 tokens: the share of the floor while the weights'
    bytes bind, then TFLOPS."""
    layer = Layer.random(bench)
    for tokens in bench.pick((1, 16, 64, 512, 8192), (1, 40)):
        rows = Rows.random(bench, tokens)
        chosen: list[int] = rows.experts.unique().tolist()  # type: ignore[no-untyped-call]
        pairs, (dim, width) = rows.experts.numel(), layer.w2.shape[1:]
        few = tokens <= 64
        arguments = (rows.x, rows.experts, rows.weights, layer.w1, layer.w3, layer.w2, LIMIT, rows.shared)
        compared = [Peer("grouped_mm over a bf16 copy", partial(grouped, rows, layer))]
        if few:
            compared.append(Peer("a loop over chosen experts, bf16 copy", partial(loop, rows, layer, chosen)))
        for exact in (True, False) if pairs > EXACT_TILE.rows * bench.shapes.n_routed_experts else (True,):
            yield bench.measure(
                f"T={tokens}, {len(chosen)} experts{'' if exact else ', inexact'}",
                partial(experts, *arguments, exact=exact),
                Goal("of floor", 0.5, 0.75) if few else Goal("TFLOPS", 350, 550),
                bytes=len(chosen) * layer.bytes_per_expert + 3 * rows.x.nbytes + 12 * pairs,
                flops=6 * pairs * dim * width,
                peers=compared if exact else (),
            )
