"""Training and serving are one forward: on the reference backend they give the same bits, for every kind of layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from agentkit_engine import ModelSpec
from agentkit_engine.model import Decoder, Trace
from agentkit_engine.runtime import Pools, Runner, ScheduledTokens, Scheduler
from agentkit_kernels.ops import Plan

from .conftest import make_random_decoder, small_config, some_ids

AWKWARD: dict[str, Any] = {
    "hidden_size": 36, "num_attention_heads": 3, "head_dim": 20, "qk_rope_head_dim": 6, "q_lora_rank": 28,
    "o_groups": 3, "o_lora_rank": 9, "index_n_heads": 3, "index_head_dim": 22, "index_topk": 5, "sliding_window": 50,
    "n_routed_experts": 7, "num_experts_per_tok": 3, "moe_intermediate_size": 27, "hc_mult": 3, "vocab_size": 97,
}  # fmt: skip
STACKS = {
    "window": ModelSpec.from_config(small_config(0)),
    "csa": ModelSpec.from_config(small_config(4, num_hash_layers=0)),
    "hca": ModelSpec.from_config(small_config(128)),
    "all kinds": ModelSpec.from_config(small_config(0, 4, 128, 4, sliding_window=48)),
    "all entries fit": ModelSpec.from_config(small_config(4, 128, index_topk=128)),
    "a window shorter than the ratios": ModelSpec.from_config(small_config(0, 4, 128, sliding_window=3)),
    "heads that fill a product": ModelSpec.from_config(small_config(4, num_attention_heads=32, o_groups=4)),
    "awkward sizes": ModelSpec.from_config(small_config(0, 4, 128, **AWKWARD)),
}
LENGTH = 270
"""More than two windows of HCA, and more entries of CSA than a query chooses."""


@pytest.fixture(scope="module", params=STACKS)
def decoder(request: pytest.FixtureRequest) -> Decoder:
    return make_random_decoder(STACKS[request.param], seed=4)


@pytest.fixture(scope="module")
def trained(decoder: Decoder) -> Tensor:
    """The logits of training's forward, with gradients."""
    logits: Tensor = decoder(torch.tensor([some_ids(LENGTH)]))[0]
    assert logits.requires_grad
    return logits.detach()


@pytest.fixture(scope="module")
def served(decoder: Decoder) -> Scheduler:
    return Scheduler(decoder, kv_cache_bytes=64 << 20, backend="reference")


@pytest.mark.parametrize("chunk", [LENGTH, 129, 37])
def test_a_prefill_has_the_bits_of_training(trained: Tensor, served: Scheduler, chunk: int) -> None:
    assert torch.equal(served.logits(some_ids(LENGTH), chunk=chunk), trained)


def test_token_by_token_has_the_bits_of_training(trained: Tensor, served: Scheduler) -> None:
    """Single ids around the ends of windows of both ratios; the ids between them come at once."""
    runner, ids = served.runner, some_ids(LENGTH)
    sequence = runner.pools.open()
    for low, high in ((0, 10), (120, 135), (250, 260)):
        runner.pools.reserve(sequence, high)
        if low:
            runner.step([ScheduledTokens(sequence, ids[sequence.length : low])])
        for position in range(low, high):
            logits = runner.step([ScheduledTokens(sequence, ids[position : position + 1])]).logits_RV
            assert torch.equal(logits, trained[position : position + 1]), position
    runner.pools.close(sequence)


def test_sequences_of_one_batch_have_the_bits_of_training_alone(decoder: Decoder, trained: Tensor) -> None:
    others = torch.tensor([some_ids(LENGTH, seed=2), some_ids(LENGTH, seed=3)])
    token_ids = torch.cat((others[:1], torch.tensor([some_ids(LENGTH)]), others[1:]))
    assert torch.equal(decoder(token_ids)[1], trained)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_ragged_batches_in_chunks_have_the_bits_of_each_sequence_alone(decoder: Decoder, backend: str) -> None:
    """Sequences of equal lengths are computed as one; the last one starts later.

    The decoder is one of its own, because `cpu` transposes the weights where they are, and a product with transposed
    weights may round differently (it does on an AMD EPYC).
    """
    own = make_random_decoder(decoder.spec, seed=4)
    scheduler = Scheduler(own, kv_cache_bytes=64 << 20, backend=backend)
    pools, texts = scheduler.pools, [some_ids(150, seed) for seed in range(4)]
    sequences = [pools.open() for _ in texts]
    rows: list[list[Tensor]] = [[] for _ in texts]
    for low in (0, 67, 134, 201):
        live = [(index, low - 67 * (index == 3)) for index in range(4)]
        live = [(index, start) for index, start in live if 0 <= start < 150]
        scheduled = [ScheduledTokens(sequences[index], texts[index][start : start + 67]) for index, start in live]
        for part in scheduled:
            pools.reserve(part.sequence, part.sequence.length + len(part))
        computed = scheduler.runner.step(scheduled, all_rows=True).logits_RV
        for (index, _), some in zip(live, torch.split(computed, [*map(len, scheduled)]), strict=True):
            rows[index].append(some)
    for ids, parts in zip(texts, rows, strict=True):
        assert torch.equal(torch.cat(parts), scheduler.logits(ids))


def test_some_rows_are_those_of_all(decoder: Decoder, trained: Tensor) -> None:
    pools = Pools(decoder.spec, slots=1, spans=2, device=torch.device("cpu"))
    runner = Runner(decoder, pools, backend="reference")
    sequence = pools.open()
    pools.reserve(sequence, LENGTH)
    plan = Plan(some_ids(LENGTH), [LENGTH], [0], [sequence.slot], [sequence.spans])
    rows: Sequence[int] = [3, 140, LENGTH - 1]
    with torch.inference_mode():
        assert torch.equal(runner.forward(plan, rows).logits, trained[rows])


def test_a_trace_changes_no_bit(decoder: Decoder, trained: Tensor) -> None:
    trace = Trace()
    assert torch.equal(decoder(torch.tensor([some_ids(LENGTH)]), trace=trace)[0], trained)
    assert len(trace.expert_counts) == decoder.spec.num_hidden_layers
    csa = sum(layer.attention == "csa" for layer in decoder.spec.layers)
    assert len(trace.index) == 3 * csa


def test_gradients_reach_every_parameter_but_the_indexers(decoder: Decoder) -> None:
    decoder.zero_grad()
    decoder(torch.tensor([some_ids(LENGTH)])).square().mean().backward()
    for name, parameter in decoder.named_parameters():
        if ".indexer." in name:
            assert parameter.grad is None, name
        else:
            assert parameter.grad is not None and parameter.grad.isfinite().all() and parameter.grad.any(), name
    decoder.zero_grad()


def test_invalid_shapes_are_refused(decoder: Decoder) -> None:
    for shape in ((2, 0), (5,), (1, 2, 3)):
        with pytest.raises(ValueError, match=r"\[B, T\] with T >= 1, got \["):
            decoder(torch.zeros(shape, dtype=torch.int64))


@torch.inference_mode()
def test_bfloat16_weights_run_close_to_float32() -> None:
    decoder = make_random_decoder(ModelSpec.from_config(small_config(0, 128, index_topk=64)))
    token_ids = torch.randint(96, (1, 140), generator=torch.Generator().manual_seed(10))
    expected = decoder(token_ids)
    got = decoder.bfloat16()(token_ids)
    assert got.dtype == torch.float32
    assert float((got - expected).abs().mean()) < 0.05
