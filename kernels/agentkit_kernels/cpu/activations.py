"""`QuantizedCpu`: activations rounded as in DeepSeek's own inference; see `reference/activations.py`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from agentkit_kernels.cpu import loops
from agentkit_kernels.cpu.backend import Cpu
from agentkit_kernels.cpu.batch import Batch
from agentkit_kernels.cpu.compressor import compress
from agentkit_kernels.cpu.experts import experts
from agentkit_kernels.cpu.linear import Job, Stacked, Weight, compute, empty
from agentkit_kernels.cpu.loops import Floats, Ints
from agentkit_kernels.cpu.qkv import qkv
from agentkit_kernels.cpu.state import LayerState
from agentkit_kernels.cpu.workers import Workers
from agentkit_kernels.ops import Compressor, Heads


def round_activations(x: Floats) -> Floats:
    """Return rows [N, K] rounded to FP8."""
    out = empty(*x.shape)
    loops.round_activations(x, out)
    return out


def _qkv(
    workers: Workers,
    q: Floats,
    projected: Floats,
    rotations: Floats,
    heads: Heads,
    batch: Batch | None = None,
    state: LayerState | None = None,
) -> tuple[Floats, Floats, Floats, Floats]:
    q_NHK, kv_NK, index_NJC, weights_NJ = qkv(workers, q, projected, rotations, heads)
    if heads.index_heads:
        loops.round_index(index_NJC)
    return q_NHK, kv_NK, index_NJC, weights_NJ


class QuantizedCpu(Cpu):
    """See `ops.Ops`. Packed weights are FP8 or FP4."""

    def __init__(self, workers: Workers | None = None, *, expert_cache_bytes: int | None = None) -> None:
        super().__init__(workers, expert_cache_bytes=expert_cache_bytes)
        self.qkv = partial(_qkv, self.workers)

    @staticmethod
    def linear(x: Floats, weight: Weight) -> Floats:
        out = empty(len(x), weight.outputs)
        rounded = round_activations(x)
        inputs = [rounded if matrix.unpacked is None else x for matrix in weight.matrices]
        jobs = [
            Job(rows, matrix, 0, matrix.count, out, column)
            for rows, (matrix, column) in zip(inputs, weight.places, strict=True)
        ]
        compute(jobs, weight.workers)
        return out

    @staticmethod
    def compress(
        projected: Floats, compressor: Compressor, batch: Batch, state: LayerState, *, fp4: bool = True
    ) -> None:
        compress(projected, compressor, batch, state, fp4=fp4 and bool(compressor.prefix))

    @staticmethod
    def experts(
        x: Floats,
        chosen: Ints,
        weights: Floats,
        w13: Stacked,
        w2: Stacked,
        limit: float,
        shared: Floats,
        batch: Batch,
        *,
        cast: Callable[[Floats], Floats] | None = round_activations,
    ) -> Floats:
        cast = cast if w2.unpacked is None else None
        return experts(x, chosen, weights, w13, w2, limit, shared, batch, cast=cast)
