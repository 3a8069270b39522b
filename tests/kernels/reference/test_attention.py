"""Attention to the window, the entries and the sink, against one softmax in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from agentkit_kernels.ops import QUERY_BLOCK, Plan
from agentkit_kernels.reference.attention import attend
from agentkit_kernels.reference.batch import ROWS, Batch, pad_rows
from agentkit_kernels.reference.indexer import TopK
from agentkit_kernels.reference.rope import rotate, rotations_at
from agentkit_kernels.reference.state import FreshState

SEQUENCES, HEADS, SIZE, RATIO, ENTRIES = 2, 3, 8, 2, QUERY_BLOCK // 2
CPU = torch.device("cpu")


def rand(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("picking", [True, False], ids=["chosen entries", "all entries"])
@pytest.mark.parametrize("tokens", [1, 5])
@pytest.mark.parametrize("sink", [-30.0, 0.5, 60.0])
def test_attend_is_softmax_with_an_extra_term_in_the_denominator(tokens: int, sink: float, picking: bool) -> None:
    window, sinks = 3, torch.full((HEADS,), sink)
    batch = Batch(Plan([0] * SEQUENCES * tokens, [tokens] * SEQUENCES, [0] * SEQUENCES), CPU)
    q, kv = rand(SEQUENCES * tokens, HEADS, SIZE, seed=0), rand(SEQUENCES * tokens, SIZE, seed=1)
    turns, entries = rotations_at(batch.positions, torch.tensor([0.7, 0.01])), rand(SEQUENCES, 2, SIZE, seed=2)
    state = FreshState()
    state.store_entries(batch.groups[0], "", 0, entries[:, : tokens // RATIO])
    chosen = (torch.arange(ENTRIES) < (torch.arange(1, tokens + 1) // RATIO).unsqueeze(1)).expand(SEQUENCES, -1, -1)
    if picking:
        chosen = chosen & (rand(SEQUENCES, tokens, ENTRIES, seed=3) > 0)
    topk = TopK([chosen], [None]) if picking else None
    out = attend(pad_rows(q), pad_rows(kv), turns, sinks, batch, state, window=window, ratio=RATIO, topk=topk)

    q, rows = q.view(SEQUENCES, tokens, HEADS, SIZE), torch.cat((kv.view(SEQUENCES, tokens, SIZE), entries), dim=1)
    ages = torch.arange(tokens).unsqueeze(1) - torch.arange(tokens)
    recent = ((ages >= 0) & (ages < window)).expand(SEQUENCES, -1, -1)
    hidden = ~torch.cat((recent, chosen[..., :2]), dim=-1)
    scores = torch.einsum("bthk,bsk->bths", q, rows).double()
    weights = scores.exp().masked_fill(hidden.unsqueeze(2), 0.0)
    weights = weights / (weights.sum(-1, keepdim=True) + torch.tensor(sink, dtype=torch.float64).exp())
    expected = torch.einsum("bths,bsk->bthk", weights, rows.double()).float().flatten(0, 1)
    expected = rotate(pad_rows(expected), turns, inverse=True)
    assert out.shape == (ROWS, HEADS, SIZE)
    torch.testing.assert_close(out[: batch.tokens], expected[: batch.tokens], atol=1e-5, rtol=1e-4)
