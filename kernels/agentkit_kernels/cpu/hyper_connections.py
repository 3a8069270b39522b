"""mHC reads and writes of the residual streams. Dimension key: `agentkit_kernels.ops`."""

from __future__ import annotations

import numpy as np

from agentkit_kernels.cpu import loops
from agentkit_kernels.cpu.linear import empty, linear
from agentkit_kernels.cpu.loops import Floats
from agentkit_kernels.ops import HyperConnection, HyperHead

Mixing = tuple[Floats, Floats]
"""Weights of a sub-layer's write: its output times post [N, M], stream j to k by comb [N, M, M]."""


def hc_pre(streams: Floats, hc: HyperConnection) -> tuple[Floats, Mixing]:
    rows, size, dim = streams.shape
    x, post, comb = empty(rows, dim), empty(rows, size), empty(rows, size, size)
    loops.connect(
        streams, linear(streams.reshape(rows, -1), hc.fn), hc.base, hc.scale, hc.norm, np.float32(hc.norm_eps),
        np.float32(hc.eps), hc.iterations, x, post, comb,
    )  # fmt: skip
    return x, (post, comb)


def hc_post(streams: Floats, y: Floats, mixing: Mixing) -> Floats:
    out = empty(*streams.shape)
    loops.write(streams, y, *mixing, out)
    return out


def hc_post_pre(streams: Floats, y: Floats, mixing: Mixing, hc: HyperConnection) -> tuple[Floats, Floats, Mixing]:
    streams = hc_post(streams, y, mixing)
    return streams, *hc_pre(streams, hc)


def hc_head(streams: Floats, head: HyperHead) -> Floats:
    x = empty(len(streams), streams.shape[2])
    loops.collapse(
        streams, linear(streams.reshape(len(streams), -1), head.fn), head.base, head.scale, head.norm,
        np.float32(head.norm_eps), np.float32(head.eps), x,
    )  # fmt: skip
    return x
