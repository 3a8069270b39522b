"""The router and the mixture of experts, against a loop over tokens."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from agentkit_kernels.ops import Plan, Router
from agentkit_kernels.reference.batch import Batch, pad_rows
from agentkit_kernels.reference.experts import experts, swiglu
from agentkit_kernels.reference.linear import Weight, linear
from agentkit_kernels.reference.router import route
from agentkit_kernels.trace import Trace

TOKENS, DIM, WIDTH, EXPERTS, ACTIVE, LIMIT, SCALE = 43, 24, 12, 8, 2, 0.5, 1.5


def rand(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def make_batch(trace: Trace | None = None) -> Batch:
    return Batch(Plan(list(range(TOKENS)), [TOKENS], [0], trace=trace), torch.device("cpu"))


@pytest.mark.parametrize("router", ["hash", "score"])
def test_experts_equal_a_loop_over_tokens(router: str) -> None:
    x, gate, bias = rand(TOKENS, DIM, seed=0), rand(EXPERTS, DIM, seed=1), 0.1 * rand(EXPERTS, seed=2)
    w1, w3 = rand(EXPERTS, WIDTH, DIM, seed=3), rand(EXPERTS, WIDTH, DIM, seed=4)
    w2, shared = rand(EXPERTS, DIM, WIDTH, seed=5), rand(TOKENS, DIM, seed=6)
    table = rand(TOKENS, EXPERTS, seed=7).argsort()[:, :ACTIVE]
    trace = Trace()
    batch, rows = make_batch(trace), pad_rows(x)
    hashed = router == "hash"
    kind = Router(table if hashed else None, None if hashed else bias, ACTIVE, SCALE)
    chosen, weights = route(linear(rows, Weight((gate,))), kind, batch)
    out = experts(rows, chosen, weights, Weight((w1, w3)), Weight((w2,)), LIMIT, pad_rows(shared), batch)

    expected, counts = [], [0] * EXPERTS
    for token in range(TOKENS):
        scores = F.softplus(gate @ x[token]).sqrt()
        best: list[int] = table[token].tolist() if hashed else (scores + bias).topk(ACTIVE).indices.tolist()
        total, y = sum(float(scores[e]) for e in best), shared[token].clone()
        for e in best:
            hidden = F.silu((w1[e] @ x[token]).clamp(max=LIMIT)) * (w3[e] @ x[token]).clamp(-LIMIT, LIMIT)
            y += scores[e] / total * SCALE * (w2[e] @ hidden)
            counts[e] += 1
        expected.append(y)
    torch.testing.assert_close(out[:TOKENS], torch.stack(expected), atol=1e-5, rtol=1e-4)
    assert trace.expert_counts[0].tolist() == counts


def test_ties_between_router_scores_go_to_the_lowest_expert() -> None:
    logits, bias = torch.zeros(64, EXPERTS), torch.zeros(EXPERTS)
    chosen, weights = route(logits, Router(None, bias, ACTIVE, SCALE), make_batch())
    assert chosen.tolist() == [[0, 1]] * 64
    torch.testing.assert_close(weights, torch.full((64, 2), 0.75))


def test_the_bias_affects_the_choice_and_not_the_weights() -> None:
    logits, bias = torch.zeros(64, EXPERTS), torch.zeros(EXPERTS)
    bias[5] = 100.0
    chosen, weights = route(logits, Router(None, bias, ACTIVE, SCALE), make_batch())
    assert chosen.tolist() == [[5, 0]] * 64
    torch.testing.assert_close(weights, torch.full((64, 2), 0.75))


def test_swiglu_clamps_the_gate_from_above_and_up_on_both_sides() -> None:
    gate, up = torch.tensor([[-9.0, 0.3, 9.0]]), torch.tensor([[9.0, 0.2, -9.0]])
    expected = [[F.silu(gate)[0, 0] * LIMIT, F.silu(gate)[0, 1] * 0.2, F.silu(torch.tensor(LIMIT)) * -LIMIT]]
    torch.testing.assert_close(swiglu(torch.cat((gate, up), dim=1), LIMIT), torch.tensor(expected))
