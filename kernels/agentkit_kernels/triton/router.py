"""The router: each token's experts, from a table by token id or by score, and their weights.

    affinity_e = sqrt(softplus(logit_e))
    experts    = table[id], or the A experts with the highest affinity_e + bias_e, ties to the lowest
    weight_a   = affinity of expert a / sum of the chosen affinities * scale

The bias affects the choice only. A NaN affinity is chosen, so that the logits show it. One program computes one row;
sums run over the padded chosen experts in a fixed tree. Source: the DeepSeek-V4 reference. Twin: `reference/router.py`.

Floor per row: E logits (or A with a table) and the result once; E (4 + A) flops. At Flash 1.1 KB and 2,560 flops.
Dimension key: `ops.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from agentkit_kernels.calls import Call, Make, Shapes
from agentkit_kernels.ops import Router
from agentkit_kernels.triton.launch import launch


@triton.jit
def _affinity(logit):
    """sqrt(softplus(logit)); log(1 + y) is corrected for the rounding of 1 + y, which matters for small y (Kahan)."""
    y = tl.exp(-tl.abs(logit))
    one = 1.0 + y
    log1p = tl.where(one == 1.0, y, tl.log(one) * (y / tl.where(one == 1.0, 1.0, one - 1.0)))
    return tl.sqrt(tl.maximum(logit, 0.0) + log1p)


@triton.jit
def _route_kernel(
    logits_ptr, ids_ptr, sequences_ptr, table_ptr, bias_ptr, experts_ptr, weights_ptr, stride_ln, stride_tv, scale,
    E: tl.constexpr, A: tl.constexpr, BY_TABLE: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_A: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    n = tl.where(tl.load(sequences_ptr + row) < 0, 0, row)  # padding takes the first row's experts
    a = tl.arange(0, BLOCK_A)
    if BY_TABLE:
        experts = tl.load(table_ptr + tl.load(ids_ptr + n) * stride_tv + a, mask=a < A, other=0)
        logits = tl.load(logits_ptr + n * stride_ln + experts, mask=a < A, other=0.0).to(tl.float32)
        chosen = tl.where(a < A, _affinity(logits), 0.0)
    else:
        e = tl.arange(0, BLOCK_E)
        affinity = _affinity(tl.load(logits_ptr + n * stride_ln + e, mask=e < E, other=0.0).to(tl.float32))
        rank = affinity + tl.load(bias_ptr + e, mask=e < E, other=0.0).to(tl.float32)
        rank = tl.where(rank == rank, rank, float("inf"))
        free = e < E  # neither padding nor chosen already
        experts = tl.zeros([BLOCK_A], tl.int64)
        chosen = tl.zeros([BLOCK_A], tl.float32)
        for i in tl.static_range(A):
            most = tl.max(tl.where(free, rank, float("-inf")), 0)
            best = tl.min(tl.where(free & (rank == most), e, BLOCK_E), 0)
            experts = tl.where(a == i, best, experts)
            chosen = tl.where(a == i, tl.sum(tl.where(e == best, affinity, 0.0), 0), chosen)
            free = free & (e != best)
    weights = chosen / tl.sum(chosen, 0) * scale
    tl.store(experts_ptr + row * A + a, experts, mask=a < A)
    tl.store(weights_ptr + row * A + a, weights.to(weights_ptr.dtype.element_ty), mask=a < A)


def route(logits: Tensor, router: Router, ids: Tensor, sequences: Tensor) -> tuple[Tensor, Tensor]:
    """Return each row's experts, int64 [N, A], and their weights, float32 [N, A]; see `Ops.route`.

    Args:
        logits: [N, E]; rows may have any stride.
        router: Its table, int64 [V, A], or its bias, [E].
        ids: int64 [N], used with a table.
        sequences: int64 [N], the sequence of each row; negative for padding, which gets the experts of the first row,
            so that no weights are read for it alone.

    Raises:
        ValueError: The router has neither a table nor a bias, or more active experts than there are.
    """
    rows, size = logits.shape
    table, bias, active = router.table, router.bias, router.active
    if table is None and bias is None:
        raise ValueError("a router needs a table or a bias")
    if active > size:
        raise ValueError(f"the router chooses {active} of {size} experts")
    experts = torch.empty(rows, active, dtype=torch.int64, device=logits.device)
    weights = torch.empty(rows, active, dtype=torch.float32, device=logits.device)
    launch(
        _route_kernel, (rows,),
        logits, ids, sequences, logits if table is None else table, logits if bias is None else bias, experts, weights,
        logits.stride(0), 0 if table is None else table.stride(0), router.scale,
        E=size, A=active, BY_TABLE=table is not None,
        BLOCK_E=triton.next_power_of_2(size), BLOCK_A=triton.next_power_of_2(active), num_warps=1,
    )  # fmt: skip
    return experts, weights


def calls(shapes: Shapes, rows: int, make: Make) -> Iterator[Call]:
    """Yield both kinds of router; see `agentkit_kernels.calls`."""
    experts, active = shapes.n_routed_experts, shapes.num_experts_per_tok
    logits = make.floats(rows, experts, dtype=torch.float32)
    ids = make.ints([n % shapes.vocab_size for n in range(rows)])
    sequences = make.ints([0] * rows)
    table = make.ints([a for _ in range(shapes.vocab_size) for a in range(active)]).view(-1, active)
    bias = make.floats(experts, dtype=torch.float32)
    result = 12 * rows * active + 8 * rows  # and which rows are padding
    by_table = partial(route, logits, Router(table, None, active, 1.5), ids, sequences)
    yield Call("by table", by_table, result + rows * (8 + 12 * active), 3 * rows * active)
    by_score = partial(route, logits, Router(None, bias, active, 1.5), ids, sequences)
    yield Call("by score", by_score, result + 4 * experts * (rows + 1), rows * experts * (4 + active))
