"""mHC reads and writes of the residual streams. Dimension key: `agentkit_kernels.ops`."""

from __future__ import annotations

import numpy as np

from agentkit_kernels.cpu import loops
from agentkit_kernels.cpu.linear import empty, linear
from agentkit_kernels.cpu.loops import Floats
from agentkit_kernels.cpu.workers import Workers
from agentkit_kernels.ops import HyperConnection, HyperHead

OPERATIONS = 8
"""Multiply-adds that take as long as one stream's part in a read or a write, which memory limits."""

Mixing = tuple[Floats, Floats]
"""Weights of a sub-layer's write: its output times post [N, M], stream j to k by comb [N, M, M]."""


def hc_pre(workers: Workers, streams: Floats, hc: HyperConnection) -> tuple[Floats, Mixing]:
    rows, size, dim = streams.shape
    x, post, comb = empty(rows, dim), empty(rows, size), empty(rows, size, size)
    raw = linear(streams.reshape(rows, -1), hc.fn)

    def some_rows(first: int, last: int) -> None:
        loops.connect(
            streams, raw, hc.base, hc.scale, hc.norm, np.float32(hc.norm_eps), np.float32(hc.eps), hc.iterations, first,
            last, x, post, comb,
        )  # fmt: skip

    workers.ranges(some_rows, rows, OPERATIONS * streams.size)
    return x, (post, comb)


def hc_post(workers: Workers, streams: Floats, y: Floats, mixing: Mixing) -> Floats:
    out = empty(*streams.shape)

    def some_rows(first: int, last: int) -> None:
        loops.write(streams, y, *mixing, first, last, out)

    workers.ranges(some_rows, len(streams), OPERATIONS * streams.size)
    return out


def hc_post_pre(
    workers: Workers, streams: Floats, y: Floats, mixing: Mixing, hc: HyperConnection
) -> tuple[Floats, Floats, Mixing]:
    streams = hc_post(workers, streams, y, mixing)
    return streams, *hc_pre(workers, streams, hc)


def hc_head(streams: Floats, head: HyperHead) -> Floats:
    x = empty(len(streams), streams.shape[2])
    loops.collapse(
        streams, linear(streams.reshape(len(streams), -1), head.fn), head.base, head.scale, head.norm,
        np.float32(head.norm_eps), np.float32(head.eps), x,
    )  # fmt: skip
    return x
