"""Attention over shared rows with sinks, and the indexer's selection."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from agentkit_engine.model.attention import attend
from agentkit_engine.model.indexer import index_scores, select_top_k


def rand(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("tokens", [1, 5])
@pytest.mark.parametrize("sink", [-30.0, 0.5, 60.0])
def test_attend_is_softmax_with_an_extra_term_in_the_denominator(tokens: int, sink: float) -> None:
    q, rows, sinks = rand(2, tokens, 3, 8, seed=0), rand(2, 7, 8, seed=1), torch.full((3,), sink)
    hidden = rand(2, tokens, 7, seed=2) > 0
    hidden[..., 0] = False
    scores = torch.einsum("bthk,bsk->bths", q, rows).double() * 8**-0.5
    weights = scores.exp().masked_fill(hidden.unsqueeze(2), 0.0)
    weights = weights / (weights.sum(-1, keepdim=True) + torch.tensor(sink, dtype=torch.float64).exp())
    expected = torch.einsum("bths,bsk->bthk", weights, rows.double())
    torch.testing.assert_close(attend(q, rows, sinks, hidden), expected.float(), atol=1e-5, rtol=1e-4)


def test_index_scores_are_weighted_relu_dot_products() -> None:
    q, keys, weights = rand(2, 3, 4, 8, seed=3), rand(2, 5, 8, seed=4), rand(2, 3, 4, seed=5)
    expected = (torch.einsum("btjc,bwc->btjw", q, keys).relu() * weights.unsqueeze(-1)).sum(2)
    torch.testing.assert_close(index_scores(q, keys, weights), expected)


def test_ties_go_to_the_lowest_index() -> None:
    scores = torch.tensor([[0.0, 3.0, 0.0, 0.0, 1.0, 0.0], [2.0, 2.0, 2.0, 2.0, 2.0, 2.0]])
    selected = select_top_k(scores, 4)
    assert selected.tolist() == [[True, True, True, False, True, False], [True, True, True, True, False, False]]


def test_invisible_entries_are_never_selected() -> None:
    scores = torch.tensor([[-1.0, -2.0, 9.0, 9.0]])
    visible = torch.tensor([[True, True, False, False]])
    assert select_top_k(scores, 3, visible).tolist() == [[True, True, False, False]]
    assert select_top_k(scores, 8, visible).tolist() == visible.tolist()
    assert not select_top_k(scores, 2, torch.zeros(1, 4, dtype=torch.bool)).any()
    assert not select_top_k(scores, 0, visible).any() and not select_top_k(scores, 0).any()


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
