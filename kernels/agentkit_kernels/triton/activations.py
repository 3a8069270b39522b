"""`QuantizedTriton`: activations rounded as in DeepSeek's own inference; see `reference/activations.py`.

Rounding takes a launch of its own (`quantize.round_activations`): a group has 128 columns, and some tiles of products
and of SwiGLU have fewer. The rounded rows keep their dtype, in which they are exact, and are multiplied as others are.
Index queries and keys are rounded by the kernels that compute them.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from agentkit_kernels.ops import Compressor, Heads
from agentkit_kernels.triton.backend import Batch, State, Triton, Weight
from agentkit_kernels.triton.quantize import round_activations


class QuantizedTriton(Triton):
    """See `ops.Ops`. Packed weights are FP8 or FP4."""

    def linear(self, x: Tensor, weight: Weight, *, rounded: Tensor | None = None) -> Tensor:
        packed = not all(isinstance(part, Tensor) for part in weight.parts)
        return super().linear(x, weight, rounded=round_activations(x) if packed else rounded)

    def qkv(
        self,
        q: Tensor,
        projected: Tensor,
        rotations: Tensor,
        heads: Heads,
        batch: Batch,
        state: State,
        *,
        fp4: bool = True,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return super().qkv(q, projected, rotations, heads, batch, state, fp4=fp4 and heads.index_heads > 0)

    def compress(
        self, projected: Tensor, parameters: Compressor, batch: Batch, state: State, *, fp4: bool = True
    ) -> None:
        super().compress(projected, parameters, batch, state, fp4=fp4 and bool(parameters.prefix))

    def experts(
        self,
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
        packed = w2.pinned is not None or not isinstance(w2.parts[0], Tensor)
        return super().experts(x, chosen, weights, w13, w2, limit, shared, batch, cast=cast if packed else None)
