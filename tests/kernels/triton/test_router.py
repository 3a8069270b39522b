"""Routing by table and by score against its formula."""

from __future__ import annotations

import mmap

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from agentkit_kernels.ops import Router
from agentkit_kernels.triton.router import route


def expected(logits: Tensor, router: Router, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Return experts and float64 weights by the definition."""
    affinity = F.softplus(logits.double()).sqrt()
    if router.table is not None:
        experts = router.table[ids]
    else:
        assert router.bias is not None
        ranks = (F.softplus(logits.float()).sqrt() + router.bias).nan_to_num(torch.inf)
        experts = ranks.sort(dim=-1, descending=True, stable=True).indices[:, : router.active]
    weights = affinity.gather(1, experts)
    return experts, weights / weights.sum(-1, keepdim=True) * router.scale


def check(logits: Tensor, router: Router, ids: Tensor) -> None:
    experts, weights = route(logits, router, ids, torch.zeros_like(ids))
    answer, answer_weights = expected(logits, router, ids)
    assert torch.equal(experts, answer)
    torch.testing.assert_close(weights.double(), answer_weights, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("rows", [0, 1, 5])
@pytest.mark.parametrize(("size", "active"), [(8, 2), (7, 3), (1, 1), (256, 6), (5, 5)])
def test_routers_match_their_definition(rows: int, size: int, active: int) -> None:
    generator = torch.Generator().manual_seed(rows * size)
    logits = torch.randn(rows, 2 * size, generator=generator)[:, ::2].contiguous() * 6
    strided = torch.full((rows, size + 3), float("nan"))[:, :size].copy_(logits)
    ids = torch.randint(0, 11, (rows,), generator=generator)
    table = torch.stack([torch.randperm(size, generator=generator)[:active] for _ in range(11)])
    bias = torch.randn(size, generator=generator)
    for given in (logits, strided):
        check(given, Router(table, None, active, 1.5), ids)
        check(given, Router(None, bias, active, 2.5), ids)


@pytest.mark.parametrize("router", [Router(None, torch.zeros(6), 2, 1.0), Router(torch.eye(6).long(), None, 2, 1.0)])
def test_padding_gets_the_experts_of_the_first_row(router: Router) -> None:
    logits, ids = torch.randn(4, 6, generator=torch.Generator().manual_seed(0)), torch.arange(4)
    live = route(logits, router, ids, torch.zeros(4, dtype=torch.int64))
    padded = route(logits, router, ids, torch.tensor([0, 1, -1, -1]))
    for result, whole in zip(padded, live, strict=True):
        assert torch.equal(result, whole[[0, 1, 0, 0]])


def test_ties_go_to_the_lowest_expert() -> None:
    logits = torch.tensor([[0.0, 1.0, 1.0, 0.0, 1.0], [2.0] * 5])
    experts, _ = route(logits, Router(None, torch.zeros(5), 4, 1.0), *torch.zeros(2, 2, dtype=torch.int64))
    assert experts.tolist() == [[1, 2, 4, 0], [0, 1, 2, 3]]


def test_small_and_large_logits_keep_their_precision() -> None:
    logits = torch.tensor([[-80.0, -40.0, -17.0, -1e-3, 19.9, 20.1, 90.0, 3e4]])
    router = Router(torch.arange(8)[None], None, 8, 1.0)
    _, weights = route(logits, router, *torch.zeros(2, 1, dtype=torch.int64))
    _, answer = expected(logits, router, torch.zeros(1, dtype=torch.int64))
    torch.testing.assert_close(weights.double(), answer, atol=0, rtol=2e-6)


def test_a_nan_affinity_is_chosen_and_reaches_the_weights_of_its_row_only() -> None:
    logits = torch.zeros(2, 6)
    logits[0, 4] = float("nan")
    experts, weights = route(logits, Router(None, torch.zeros(6), 2, 1.0), *torch.zeros(2, 2, dtype=torch.int64))
    assert experts.tolist() == [[4, 0], [0, 1]]
    assert weights[0].isnan().all() and not weights[1].isnan().any()


def test_the_bits_of_a_row_do_not_depend_on_the_other_rows() -> None:
    logits = torch.randn(9, 12, generator=torch.Generator().manual_seed(1))
    router, ids = Router(None, torch.randn(12, generator=torch.Generator().manual_seed(2)), 3, 1.5), torch.arange(9)
    _, weights = route(logits, router, ids, ids)
    for n in range(9):
        assert torch.equal(route(logits[n : n + 1], router, ids[n : n + 1], ids[n : n + 1])[1][0], weights[n])


def test_routers_that_cannot_choose_are_refused() -> None:
    with pytest.raises(ValueError, match="a table or a bias"):
        route(torch.zeros(1, 3), Router(None, None, 2, 1.0), *torch.zeros(2, 1, dtype=torch.int64))
    with pytest.raises(ValueError, match="4 of 3 experts"):
        route(torch.zeros(1, 3), Router(None, torch.zeros(3), 4, 1.0), *torch.zeros(2, 1, dtype=torch.int64))


def test_rows_lie_beyond_32_bits() -> None:
    stride = 1 << 30
    memory = torch.frombuffer(mmap.mmap(-1, 4 * (2 * stride + 8)), dtype=torch.float32)
    logits = memory.as_strided((3, 8), (stride, 1)).copy_(torch.randn(3, 8))
    ids = torch.tensor([1, 0, 1])
    check(logits, Router(torch.tensor([[3, 1], [0, 7]]), None, 2, 1.5), ids)
    check(logits, Router(None, torch.randn(8), 2, 1.5), ids)
