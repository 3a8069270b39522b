"""Forwards of small random models on the Triton backend against the reference backend."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from agentkit_engine.model.decoder import Decoder
from agentkit_engine.model.forward import Forward
from agentkit_engine.runtime.state import Pools
from agentkit_kernels.ops import Heads, Ops, Plan
from agentkit_kernels.reference import Reference
from agentkit_kernels.triton.backend import Triton
from agentkit_kernels.triton.launch import LAUNCHES


@pytest.fixture(scope="module")
def decoder(small_decoder: Callable[..., Decoder]) -> Decoder:
    return small_decoder(0, 4, 128)


class Served:
    """Sequences that one backend computes over its own pools."""

    def __init__(self, decoder: Decoder, ops: Ops, sequences: int) -> None:
        pools = Pools(decoder.spec, slots=sequences, spans=2 * sequences, device=torch.device("cpu"))
        with torch.inference_mode(False), torch.no_grad():
            self.forward = Forward(decoder, ops, [ops.state(layer) for layer in pools.layers])
            ops.settle(exact=True)
        self.sequences = [pools.open() for _ in range(sequences)]
        self.pools = pools

    def continue_from(self, other: Served) -> None:
        """Take over the state of the same sequences of another backend."""
        for sequence, source in zip(self.sequences, other.sequences, strict=True):
            self.pools.reserve(sequence, source.length)
            assert (sequence.slot, sequence.spans) == (source.slot, source.spans)
            sequence.length = source.length
        for pools, sources in zip(self.pools.layers, other.pools.layers, strict=True):
            for name, pool in pools.items():
                pool.copy_(sources[name])

    def step(self, which: Sequence[int], texts: Sequence[Tensor]) -> Tensor:
        """Extend some sequences, and return the logits after every id."""
        some = [self.sequences[index] for index in which]
        for sequence, ids in zip(some, texts, strict=True):
            self.pools.reserve(sequence, sequence.length + len(ids))
        plan = Plan(
            torch.cat([*texts]),
            [len(ids) for ids in texts],
            [sequence.length for sequence in some],
            [sequence.slot for sequence in some],
            [sequence.spans for sequence in some],
        )
        with torch.inference_mode():
            logits = self.forward(plan).logits
        for sequence, ids in zip(some, texts, strict=True):
            sequence.length += len(ids)
        return logits


def ids(count: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 48, (count,), generator=torch.Generator().manual_seed(seed))


def test_prefill_and_decoding_match_the_reference(decoder: Decoder) -> None:
    """A prompt continues from the reference's state, where its first window of HCA ends, beside one that starts."""
    text, other = ids(130), ids(11, seed=1)
    answer, served = Served(decoder, Reference(), 2), Served(decoder, Triton("cpu", torch.float32), 2)
    answer.step([0], [text[:126]])
    served.continue_from(answer)
    LAUNCHES.clear()
    for which, texts in [([1], [other[:9]]), ([0, 1], [text[126:129], other[9:10]]), ([0], [text[129:]])]:
        torch.testing.assert_close(served.step(which, texts), answer.step(which, texts), atol=1e-4, rtol=1e-4)
    kernels = {
        "_attend_kernel", "_combine", "_compress", "_down", "_gate_up", "_index_scan", "_linear", "_merge_kernel",
        "_qkv", "_read", "_rms_norm", "_rotations", "_route_kernel", "_swiglu", "_write_and_mix",
    }  # fmt: skip
    assert kernels <= set(LAUNCHES)


def test_only_forwards_longer_than_a_block_store_their_rows_after_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    """A ring of a window and a block has no room for more rows beside those that their queries read."""
    block, size, window = 16, 24, 5
    monkeypatch.setattr("agentkit_kernels.triton.backend.QUERY_BLOCK", block)
    ops, heads = Triton("cpu", torch.float32), Heads(1, size, size, torch.ones(size), 1e-6)
    generator = torch.Generator().manual_seed(0)
    text, frequencies = torch.randn(30, 2 * size, generator=generator), torch.tensor([1.0, 0.3, 0.1, 0.02])

    def outputs(*lengths: int) -> tuple[Tensor, Tensor]:
        state, start, outs = {"window": torch.zeros(1, window + block, size)}, 0, []
        for length in lengths:
            batch = ops.batch(Plan([0] * length, [length], [start], [0], [()]))
            rows, turns = text[start : start + length], ops.rotations(batch, frequencies)
            q, kv, *_ = ops.qkv(rows, rows, turns, heads, batch, state)
            outs.append(ops.attend(q, kv, turns, torch.zeros(1), batch, state, window=window))
            start += length
        return torch.cat(outs), state["window"]

    before = LAUNCHES["_store_kernel"]
    in_blocks = outputs(10, block, 4)
    assert LAUNCHES["_store_kernel"] == before
    whole = outputs(10, block + 4)
    assert LAUNCHES["_store_kernel"] == before + 1
    for one, other in zip(whole, in_blocks, strict=True):
        assert torch.equal(one, other)


def test_a_wide_product_of_bfloat16_rows_is_not_rounded() -> None:
    x, weight = torch.randn(3, 32).bfloat16(), torch.randn(5, 32).bfloat16()
    ops = Triton("cpu")
    product = ops.linear(x, ops.weight(weight, wide=True))
    torch.testing.assert_close(product, x.float() @ weight.float().T)
    assert ops.linear(x, ops.weight(weight)).dtype == torch.bfloat16


def test_a_cpu_is_refused_outside_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("agentkit_kernels.triton.backend.INTERPRET", False)
    with pytest.raises(ValueError, match="needs a GPU"):
        Triton("cpu")
