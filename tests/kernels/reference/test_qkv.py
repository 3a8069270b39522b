"""Queries and key-value rows, against the formulas in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from agentkit_kernels.ops import Heads
from agentkit_kernels.reference.norm import rms_norm
from agentkit_kernels.reference.qkv import qkv
from agentkit_kernels.reference.rope import rotate, rotations_at

ROWS, HEADS, SIZE, INDEX_SIZE, EPS = 5, 3, 7, 9, 0.1


def rand(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def normed(x: Tensor) -> Tensor:
    wide = x.double()
    return (wide * (wide.square().mean(-1, keepdim=True) + EPS).rsqrt()).float()


def test_a_norm_covers_the_first_columns_only() -> None:
    x, weight = rand(ROWS, 12, seed=0), rand(SIZE, seed=1)
    torch.testing.assert_close(rms_norm(x, weight, EPS), normed(x[:, :SIZE]) * weight)


@pytest.mark.parametrize("index_heads", [0, 2])
def test_queries_and_rows_follow_the_formulas(index_heads: int) -> None:
    """The columns of the fused projection lie behind and between others."""
    kv_column, index_column = 4, 4 + SIZE + 3
    q, kv_norm = rand(ROWS, HEADS * SIZE + index_heads * INDEX_SIZE, seed=2), rand(SIZE, seed=3)
    projected = rand(ROWS, index_column + index_heads + 1, seed=4)
    turns = rotations_at(torch.arange(3, 3 + ROWS), torch.tensor([0.7, 0.01]))
    heads = Heads(HEADS, SIZE, kv_column, kv_norm, EPS, index_heads, INDEX_SIZE, index_column)
    found_q, found_kv, index_q, weights = qkv(q, projected, turns, heads)
    main, index = torch.split(q, [HEADS * SIZE, index_heads * INDEX_SIZE], dim=1)
    expected_q = rotate(normed(main.view(ROWS, HEADS, SIZE)), turns) * SIZE**-0.5
    torch.testing.assert_close(found_q, expected_q)
    kv = normed(projected[:, kv_column : kv_column + SIZE]) * kv_norm
    torch.testing.assert_close(found_kv, rotate(kv, turns))
    assert index_q.shape == (ROWS, index_heads, INDEX_SIZE) and weights.shape == (ROWS, index_heads)
    if index_heads:
        torch.testing.assert_close(index_q, rotate(index.view(ROWS, index_heads, INDEX_SIZE), turns))
        scaled = projected[:, index_column : index_column + index_heads] * (INDEX_SIZE * index_heads) ** -0.5
        torch.testing.assert_close(weights, scaled)
