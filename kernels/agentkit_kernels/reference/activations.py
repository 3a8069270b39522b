"""`QuantizedReference`: activations rounded as in DeepSeek's own inference, for results that are closest to it.

Inputs of products with FP8 and FP4 weights are rounded to FP8, with a power of two per row and 128 columns; the output
projection's groups, whose product DeepSeek computes in bfloat16, are not. Index queries and keys are rotated by the
Hadamard matrix and rounded to FP4. Everything else is as in `Reference`. Source: DeepSeek-V4 `inference/model.py` and
`kernel.py`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

from agentkit_kernels.ops import Array, Compressor, Heads
from agentkit_kernels.packed import Packed
from agentkit_kernels.reference.backend import Reference
from agentkit_kernels.reference.batch import Batch
from agentkit_kernels.reference.compressor import compress
from agentkit_kernels.reference.experts import experts
from agentkit_kernels.reference.linear import Columns, Weight, values
from agentkit_kernels.reference.qkv import qkv
from agentkit_kernels.reference.quantize import round_activations, round_index
from agentkit_kernels.reference.state import LayerState


class QuantizedReference(Reference):
    """See `ops.Ops`. Packed weights are FP8 or FP4."""

    @staticmethod
    def linear(x: Tensor, weight: Weight) -> Array:
        rounded, parts = round_activations(x), (*weight.parts, *weight.detached)
        outs = [F.linear(rounded if isinstance(part, Packed) else x, values(part)) for part in parts]
        return outs[0] if len(outs) == 1 else Columns(tuple(outs))

    @staticmethod
    def qkv(
        q: Tensor | Columns,
        projected: Tensor | Columns,
        rotations: Tensor,
        heads: Heads,
        batch: Batch | None = None,
        state: LayerState | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        q_NHK, kv_NK, index_NJC, weights_NJ = qkv(q, projected, rotations, heads)
        return q_NHK, kv_NK, round_index(index_NJC) if heads.index_heads else index_NJC, weights_NJ

    @staticmethod
    def compress(
        projected: Tensor | Columns,
        compressor: Compressor,
        batch: Batch,
        state: LayerState,
        *,
        cast: Callable[[Tensor], Tensor] | None = round_index,
    ) -> None:
        compress(projected, compressor, batch, state, cast=cast if compressor.prefix else None)

    @staticmethod
    def experts(
        x: Tensor,
        chosen: Tensor,
        weights: Tensor,
        w13: Weight,
        w2: Weight,
        limit: float,
        shared: Tensor,
        batch: Batch,
        *,
        cast: Callable[[Tensor], Tensor] | None = round_activations,
    ) -> Tensor:
        cast = cast if isinstance(w2.parts[0], Packed) else None
        return experts(x, chosen, weights, w13, w2, limit, shared, batch, cast=cast)
