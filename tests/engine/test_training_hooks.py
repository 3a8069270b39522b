"""Support for training: gradients wherever they belong, the indexer's loss, expert counts, starting weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from agentkit_engine.model import Decoder, Trace, indexer_kl, initialize_
from agentkit_engine.spec import ModelSpec

MakeConfig = Callable[..., dict[str, Any]]
RandomDecoder = Callable[..., Decoder]


@pytest.fixture
def token_ids() -> Tensor:
    return torch.randint(96, (2, 150), generator=torch.Generator().manual_seed(0))


def test_language_loss_reaches_everything_but_the_indexer(
    make_config: MakeConfig, random_decoder: RandomDecoder, token_ids: Tensor
) -> None:
    decoder = random_decoder(ModelSpec.from_config(make_config(0, 4, 128)))
    with torch.inference_mode():
        decoder(token_ids)  # constants made here must still be usable under autograd
    F.cross_entropy(decoder(token_ids).flatten(0, 1), token_ids.flatten()).backward()  # type: ignore[no-untyped-call]
    for name, parameter in decoder.named_parameters():
        if ".indexer." in name:
            assert parameter.grad is None, name
        else:
            assert parameter.grad is not None and parameter.grad.isfinite().all() and parameter.grad.any(), name


def test_indexer_loss_reaches_only_the_indexer(
    make_config: MakeConfig, random_decoder: RandomDecoder, token_ids: Tensor
) -> None:
    decoder, trace = random_decoder(ModelSpec.from_config(make_config(0, 4, 128))), Trace()
    plain = decoder(token_ids)
    torch.testing.assert_close(decoder(token_ids, trace=trace), plain, atol=1e-5, rtol=0)
    loss = indexer_kl(trace)
    assert float(loss.detach()) > 0
    loss.backward()  # type: ignore[no-untyped-call]
    for name, parameter in decoder.named_parameters():
        assert (parameter.grad is not None and bool(parameter.grad.any())) == (".indexer." in name), name


def test_indexer_loss_is_zero_at_its_target_and_without_entries(
    make_config: MakeConfig, random_decoder: RandomDecoder, token_ids: Tensor
) -> None:
    decoder, trace = random_decoder(ModelSpec.from_config(make_config(0, 4))), Trace()
    decoder(token_ids, trace=trace)
    assert [record.start for record in trace.index] == [0, 128]
    for record in trace.index:
        assert record.mass_BTW is not None
        assert record.scores_BTW.shape == record.mass_BTW.shape == (2, len(record.visible_TW), record.mass_BTW.shape[2])
        record.scores_BTW.data.copy_(record.mass_BTW.clamp_min(1e-30).log())
    assert float(indexer_kl(trace).detach()) == pytest.approx(0.0, abs=1e-5)
    short = Trace()
    decoder(token_ids[:, :5], trace=short)
    assert float(indexer_kl(short)) == 0.0


def test_gradients_equal_finite_differences(make_config: MakeConfig, random_decoder: RandomDecoder) -> None:
    """Check a directional derivative of the loss over all parameters; every entry is selected, so the loss is
    smooth."""
    decoder = random_decoder(ModelSpec.from_config(make_config(0, 4, 128, index_topk=64)))
    token_ids = torch.randint(96, (1, 140), generator=torch.Generator().manual_seed(1))
    parameters = [p for name, p in decoder.named_parameters() if "gate.weight" not in name and "indexer" not in name]
    generator = torch.Generator().manual_seed(2)
    directions = [0.3 * torch.randn(p.shape, generator=generator) for p in parameters]

    def loss() -> Tensor:
        logits: Tensor = decoder(token_ids)
        return logits.double().logsumexp(-1).mean()

    gradients = torch.autograd.grad(loss(), parameters)
    slope = sum(float((g.double() * d.double()).sum()) for g, d in zip(gradients, directions, strict=True))
    step = 1e-4
    values = []
    with torch.no_grad():
        for sign in (1, -2):
            for parameter, direction in zip(parameters, directions, strict=True):
                parameter.add_(direction, alpha=sign * step)
            values.append(float(loss()))
    assert (values[0] - values[1]) / (2 * step) == pytest.approx(slope, rel=0.02, abs=0.02)


def test_trace_counts_experts_and_keeps_the_streams(
    make_config: MakeConfig, random_decoder: RandomDecoder, token_ids: Tensor
) -> None:
    decoder, trace = random_decoder(ModelSpec.from_config(make_config(0, 4, mtp=True))), Trace(index_scores=False)
    decoder(token_ids, trace=trace)
    assert trace.streams_BTMD is not None and trace.streams_BTMD.shape == (2, 150, 4, 64)
    decoder.draft_logits(trace.streams_BTMD, token_ids, trace=trace)
    assert sorted(trace.expert_counts) == [0, 1, 2]
    assert all(int(counts.sum()) == 2 * 150 * 2 for counts in trace.expert_counts.values())


def test_starting_weights_are_seeded_and_trainable(make_config: MakeConfig, token_ids: Tensor) -> None:
    spec = ModelSpec.from_config(make_config(0, 4, 128, mtp=True))
    first, second = (initialize_(Decoder(spec), torch.Generator().manual_seed(4)) for _ in range(2))
    for name, tensor in first.state_dict().items():
        assert torch.equal(tensor, second.state_dict()[name]), name
    assert all(len(set(row)) == 2 for row in first.blocks[0].ffn.gate.tid2eid.tolist())
    optimizer = torch.optim.Adam(first.parameters(), lr=3e-3)
    losses = []
    for _ in range(5):
        loss = F.cross_entropy(first(token_ids)[:, :-1].flatten(0, 1), token_ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] - 0.2
