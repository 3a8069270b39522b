"""Mixture of experts: each expert multiplies the rows routed to it. Source: the DeepSeek-V4 reference.

Dimension key: `agentkit_kernels.ops`; P (token, expert) pairs, in the order of the experts, padded per expert.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from agentkit_kernels.packed import Packed
from agentkit_kernels.reference.batch import ROWS, Batch
from agentkit_kernels.reference.linear import Columns, Weight, each_expert, product


def swiglu(gate_up: Tensor | Columns, limit: float) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1) if isinstance(gate_up, Tensor) else gate_up.parts
    return F.silu(gate.clamp(max=limit)) * up.clamp(-limit, limit)


def experts(
    x: Tensor,
    experts: Tensor,
    weights: Tensor,
    w13: Weight,
    w2: Weight,
    limit: float,
    shared: Tensor,
    batch: Batch,
    *,
    cast: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """See `ops.Ops`; `cast` rounds the inputs of both products."""
    active, flat = experts.shape[1], experts[: batch.tokens].flatten()
    order = flat.argsort(stable=True)
    counts: list[int] = torch.bincount(flat, minlength=w2.parts[0].shape[0]).tolist()
    pairs, places, sizes, first = [], [], {}, 0
    for expert, mine in enumerate(torch.split(order, counts)):
        if len(mine):
            sizes[expert] = -(-len(mine) // ROWS) * ROWS
            pairs += [mine, mine[:1].expand(sizes[expert] - len(mine))]
            places.append(torch.arange(first, first + len(mine), device=x.device))
            first += sizes[expert]

    def multiply(rows_PK: Tensor, stack_EXK: Tensor | Packed) -> Tensor:
        parts, weights_XK = torch.split(rows_PK, list(sizes.values())), each_expert(stack_EXK)
        return torch.cat([product(part, weights_XK[e], w2.dtype) for e, part in zip(sizes, parts, strict=True)])

    pairs_P = torch.cat(pairs)
    rows_PD = (cast(x) if cast else x).index_select(0, pairs_P // active)
    gate_up = Columns(tuple(multiply(rows_PD, part) for part in w13.parts))
    hidden = swiglu(gate_up, limit) * weights.flatten()[pairs_P].unsqueeze(1)
    hidden = cast(hidden) if cast else hidden
    place_of_pair = torch.empty_like(order).scatter_(0, order, torch.cat(places))
    routed = multiply(hidden, w2.parts[0]).index_select(0, place_of_pair).view(batch.tokens, active, -1).sum(1)
    padding = len(x) - batch.tokens
    return (F.pad(routed, (0, 0, 0, padding)) if padding else routed) + shared
