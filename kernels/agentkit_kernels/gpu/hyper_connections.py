"""The fused mHC boundary (`triton/hyper_connections.py`) beside the same formula in torch, eager and compiled."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from agentkit_kernels.gpu.bench import Bench, Peer
from agentkit_kernels.gpu.record import Goal, Measurement
from agentkit_kernels.ops import HyperConnection
from agentkit_kernels.triton.hyper_connections import hc_post_pre


def random_hc(bench: Bench) -> HyperConnection:
    """Return random parameters, whose streams mix moderately."""
    size, dim = bench.shapes.hc_mult, bench.shapes.hidden_size
    fn = bench.floats((2 + size) * size, size * dim, dtype=torch.float32) * (size * dim) ** -0.5
    base, scale = bench.floats(len(fn), dtype=torch.float32), bench.floats(3, dtype=torch.float32)
    norm = bench.floats(dim, dtype=torch.float32)
    return HyperConnection(fn, base, scale, norm, 1e-6, 1e-6, bench.shapes.hc_sinkhorn_iters)


def boundary(streams: Tensor, y: Tensor, mixing: Tensor, hc: HyperConnection) -> tuple[Tensor, Tensor, Tensor]:
    """`hc_post`, then `hc_pre`, in plain torch; see `triton/hyper_connections.py` for the formula."""
    size = streams.shape[1]
    post, comb = mixing[:, :size], mixing[:, size:].view(-1, size, size)
    new = (post[:, :, None] * y[:, None].float() + comb.mT @ streams.float()).to(streams.dtype)
    flat = new.flatten(1).float()
    mix = F.linear(flat, hc.fn) * torch.rsqrt(flat.square().mean(1, keepdim=True) + hc.norm_eps)
    parts = zip(torch.split(mix, [size, size, size * size], dim=1), hc.scale, strict=True)
    mix = torch.cat([part * scale for part, scale in parts], dim=1) + hc.base
    pre, post, comb = torch.split(mix, [size, size, size * size], dim=1)
    comb = comb.reshape(-1, size, size).softmax(-1) + hc.eps
    comb = comb / (comb.sum(1, keepdim=True) + hc.eps)
    for _ in range(hc.iterations - 1):
        comb = comb / (comb.sum(2, keepdim=True) + hc.eps)
        comb = comb / (comb.sum(1, keepdim=True) + hc.eps)
    x = ((pre.sigmoid() + hc.eps)[:, :, None] * new.float()).sum(1)
    x = F.rms_norm(x, (x.shape[1],), hc.norm, hc.norm_eps).to(y.dtype)
    return new, x, torch.cat((2 * post.sigmoid(), comb.flatten(1)), dim=1)


def hc_boundary(bench: Bench) -> Iterator[Measurement]:
    """H10: the boundary between two sub-layers for 1, 64 and 4,096 tokens with bfloat16 streams."""
    hc, (size, dim) = random_hc(bench), (bench.shapes.hc_mult, bench.shapes.hidden_size)
    goals = {1: Goal("us", 10, 4), bench.pick(64, 3): Goal("us"), bench.pick(4096, 17): Goal("of floor", 0.6, 0.85)}
    compiled = bench.compiled(boundary)
    for tokens, goal in goals.items():
        streams, y = bench.floats(tokens, size, dim), bench.floats(tokens, dim)
        mixing = torch.rand(tokens, size + size * size, generator=bench.generator, device=bench.device)
        yield bench.measure(
            f"T={tokens}",
            partial(hc_post_pre, streams, y, mixing, hc, dtype=y.dtype),
            goal,
            bytes=2 * streams.nbytes + 2 * y.nbytes + 2 * mixing.nbytes + hc.fn.nbytes,
            flops=tokens * 2 * dim * size * (size + 1 + len(hc.fn) + 2),
            peers=[
                Peer("torch eager", partial(boundary, streams, y, mixing, hc)),
                Peer("torch.compile", partial(compiled, streams, y, mixing, hc)),
            ],
        )
