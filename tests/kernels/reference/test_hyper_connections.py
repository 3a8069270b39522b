"""mHC: Sinkhorn, the direction of mixing, and the hand-written gradients."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DeepseekV4Config
from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4HyperConnection

from agentkit_kernels.ops import HyperConnection, HyperHead
from agentkit_kernels.reference.hyper_connections import (
    Mixing,
    hc_head,
    hc_post_pre,
    hc_pre,
    mix_logits,
    read,
    sinkhorn,
    write,
)
from agentkit_kernels.reference.linear import Weight

EPS = 1e-6
NORM_EPS = 0.5
"""So large that a norm does not hide the scale of its input."""


def rand(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def reference_sinkhorn(logits: Tensor, iterations: int) -> Tensor:
    c = logits.softmax(-1) + EPS
    c = c / (c.sum(1, keepdim=True) + EPS)
    for _ in range(iterations - 1):
        c = c / (c.sum(2, keepdim=True) + EPS)
        c = c / (c.sum(1, keepdim=True) + EPS)
    return c


def reference_mix(streams: Tensor, fn: Tensor, eps: float = EPS) -> Tensor:
    v = streams.flatten(1)
    return v @ fn.T * (v.square().mean(-1, keepdim=True) + eps).rsqrt()


def test_sinkhorn_rows_and_columns_sum_to_one() -> None:
    matrices = sinkhorn(rand(5000, 4, 4, seed=0), 20, EPS)
    torch.testing.assert_close(matrices.sum(1), torch.ones(5000, 4), atol=1e-5, rtol=0)
    torch.testing.assert_close(matrices.sum(2), torch.ones(5000, 4), atol=1e-3, rtol=0)
    torch.testing.assert_close(matrices, reference_sinkhorn(rand(5000, 4, 4, seed=0), 20), atol=1e-6, rtol=0)


def test_sinkhorn_order_matters_and_is_columns_last() -> None:
    """One iteration is a softmax over rows and one column normalisation."""
    logits = rand(3, 4, 4, seed=1)
    torch.testing.assert_close(sinkhorn(logits, 1, EPS), reference_sinkhorn(logits, 1))
    assert not torch.allclose(sinkhorn(logits, 2, EPS).mT, sinkhorn(logits.mT, 2, EPS), atol=1e-3)


def test_streams_move_along_the_first_index() -> None:
    """comb[j, k] moves stream j to stream k; a transposed matrix would fail silently."""
    streams = rand(1, 4, 8, seed=2)
    comb = torch.zeros(1, 4, 4)
    comb[0, 1, 3] = 1.0
    out = write(streams, torch.zeros(1, 8), Mixing(torch.ones(1, 4), comb))
    torch.testing.assert_close(out[0, 3], streams[0, 1])
    assert not out[0, :3].any()


def test_a_read_equals_transformers() -> None:
    config = DeepseekV4Config(
        hidden_size=8, num_hidden_layers=1, layer_types=["sliding_attention"], rms_norm_eps=NORM_EPS
    )
    oracle = DeepseekV4HyperConnection(config)
    streams, fn, base, scale = rand(6, 4, 8, seed=3), rand(24, 32, seed=4), rand(24, seed=5), rand(3, seed=6)
    norm = rand(8, seed=15)
    oracle.load_state_dict({"fn": fn, "base": base, "scale": scale})
    x, mixing = hc_pre(streams, HyperConnection(Weight((fn,)), base, scale, norm, NORM_EPS, EPS, iterations=20))
    post, comb, collapsed = oracle(streams.unsqueeze(0))
    torch.testing.assert_close(x, F.rms_norm(collapsed[0], (8,), norm, NORM_EPS), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(mixing.post_NM, post[0], atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(mixing.comb_NMM, comb[0], atol=1e-6, rtol=1e-5)


def test_a_write_and_the_next_read_in_one_are_both() -> None:
    streams, y, comb = rand(6, 4, 8, seed=16), rand(6, 8, seed=17), rand(6, 4, 4, seed=18)
    base, scale, norm = rand(24, seed=5), rand(3, seed=6), rand(8, seed=15)
    hc = HyperConnection(Weight((rand(24, 32, seed=4),)), base, scale, norm, EPS, EPS, iterations=20)
    mixing = Mixing(rand(6, 4, seed=19), comb)
    written, x, following = hc_post_pre(streams, y, mixing, hc)
    expected = mixing.post_NM.unsqueeze(2) * y.unsqueeze(1) + torch.einsum("njk,njd->nkd", comb, streams)
    torch.testing.assert_close(written, expected)
    x_alone, following_alone = hc_pre(written, hc)
    assert torch.equal(x, x_alone)
    assert torch.equal(following.post_NM, following_alone.post_NM)
    assert torch.equal(following.comb_NMM, following_alone.comb_NMM)


def test_the_head_adds_eps_and_does_not_average() -> None:
    streams, fn, base, scale = rand(6, 4, 8, seed=7), rand(4, 32, seed=8), rand(4, seed=9), rand(1, seed=10)
    norm, eps = rand(8, seed=15), 0.25
    pre = torch.sigmoid(reference_mix(streams, fn, NORM_EPS) * scale + base) + eps
    expected = F.rms_norm((pre.unsqueeze(-1) * streams).sum(1), (8,), norm, NORM_EPS)
    torch.testing.assert_close(hc_head(streams, HyperHead(Weight((fn,)), base, scale, norm, NORM_EPS, eps)), expected)


def test_hand_written_gradients_equal_autograd() -> None:
    def gradients(reference: bool) -> tuple[Tensor, ...]:
        streams, fn, y = rand(5, 4, 8, seed=11), rand(24, 32, seed=12), rand(5, 8, seed=13)
        inputs = [tensor.requires_grad_() for tensor in (streams, fn, y)]
        mix = reference_mix(streams, fn) if reference else mix_logits(streams, Weight((fn,)), EPS)
        pre, post, comb = mix[:, :4], mix[:, 4:8], mix[:, 8:].reshape(5, 4, 4)
        if reference:
            x = (pre.unsqueeze(-1) * streams).sum(1) + y
            mixed = reference_sinkhorn(comb, 20).mT @ streams + post.unsqueeze(2) * x.unsqueeze(1)
        else:
            x = read(streams, pre) + y
            mixed = write(streams, x, Mixing(post, sinkhorn(comb, 20, EPS)))
        return torch.autograd.grad((mixed * rand(5, 4, 8, seed=14)).sum(), inputs)

    for got, expected in zip(gradients(reference=False), gradients(reference=True), strict=True):
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-4)
