"""Index scores, and the selection of the best entries."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from agentkit_kernels.reference.indexer import index_scores, select_top_k


def rand(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_index_scores_are_weighted_relu_dot_products() -> None:
    q, keys, weights = rand(2, 3, 4, 8, seed=3), rand(2, 5, 8, seed=4), rand(2, 3, 4, seed=5)
    expected = (torch.einsum("btjc,bwc->btjw", q, keys).relu() * weights.unsqueeze(-1)).sum(2)
    torch.testing.assert_close(index_scores(q, keys, weights), expected)


def test_ties_go_to_the_lowest_index() -> None:
    scores = torch.tensor([[0.0, 3.0, 0.0, 0.0, 1.0, 0.0], [2.0, 2.0, 2.0, 2.0, 2.0, 2.0]])
    selected = select_top_k(scores, 4, torch.ones(6, dtype=torch.bool))
    assert selected.tolist() == [[True, True, True, False, True, False], [True, True, True, True, False, False]]


def test_invisible_entries_are_never_selected() -> None:
    scores = torch.tensor([[-1.0, -2.0, 9.0, 9.0]])
    visible = torch.tensor([[True, True, False, False]])
    assert select_top_k(scores, 3, visible).tolist() == [[True, True, False, False]]
    assert select_top_k(scores, 8, visible).tolist() == visible.tolist()
    assert not select_top_k(scores, 2, torch.zeros(1, 4, dtype=torch.bool)).any()
    assert not select_top_k(scores, 0, visible).any()


def test_nan_is_selected() -> None:
    scores = torch.tensor([[1.0, 2.0, torch.nan, 3.0, torch.nan]])
    visible = torch.tensor([[True, True, True, True, False]])
    assert select_top_k(scores, 2, visible).tolist() == [[False, False, True, True, False]]


@settings(deadline=None)
@given(
    values=st.lists(st.integers(-2, 3), min_size=1, max_size=40),
    k=st.integers(1, 45),
    num_visible=st.integers(0, 40),
)
def test_selection_equals_a_stable_sort(values: list[int], k: int, num_visible: int) -> None:
    visible = torch.arange(len(values)) < num_visible
    selected = select_top_k(torch.tensor(values, dtype=torch.float32), k, visible)
    candidates = range(min(num_visible, len(values)))
    expected = sorted(sorted(candidates, key=lambda index: -values[index])[:k])
    assert selected.nonzero().flatten().tolist() == expected
