"""Forwards of small random models on the Triton backend against the reference backend."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from agentkit_engine.model.decoder import Decoder
from agentkit_engine.model.forward import Forward
from agentkit_engine.runtime.state import Pools
from agentkit_engine.spec import ModelSpec
from agentkit_kernels.ops import Ops, Plan
from agentkit_kernels.reference import Reference
from agentkit_kernels.triton.backend import Triton
from agentkit_kernels.triton.launch import LAUNCHES

CONFIG: dict[str, Any] = {
    "model_type": "deepseek_v4", "vocab_size": 48, "hidden_size": 32, "num_hash_layers": 1, "num_attention_heads": 2,
    "head_dim": 24, "qk_rope_head_dim": 8, "q_lora_rank": 16, "o_groups": 2, "o_lora_rank": 8, "sliding_window": 5,
    "index_n_heads": 4, "index_head_dim": 16, "index_topk": 1, "hc_mult": 4, "hc_sinkhorn_iters": 3, "hc_eps": 1e-6,
    "n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
    "routed_scaling_factor": 1.5, "swiglu_limit": 10.0, "rms_norm_eps": 1e-6, "rope_theta": 10000.0,
    "compress_rope_theta": 160000.0, "max_position_embeddings": 4096, "bos_token_id": 0, "eos_token_id": 1,
    "rope_scaling": {
        "type": "yarn", "factor": 16.0, "original_max_position_embeddings": 512, "beta_fast": 32.0, "beta_slow": 1.0,
    },
}  # fmt: skip
SPEC = ModelSpec.from_config(
    {**CONFIG, "num_hidden_layers": 3, "compress_ratios": [0, 4, 128], "num_nextn_predict_layers": 0}
)


@pytest.fixture(scope="module")
def decoder() -> Decoder:
    made = Decoder(SPEC).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, tensor in made.state_dict().items():
            if name.endswith("tid2eid"):
                draws = torch.rand(tensor.shape[0], SPEC.n_routed_experts, generator=generator)
                tensor.copy_(draws.argsort(-1)[:, : tensor.shape[1]])
                continue
            noise = torch.randn(tensor.shape, generator=generator)
            if name.endswith(("norm.weight", "scale")):
                tensor.copy_(1.0 + 0.2 * noise)
            else:
                tensor.copy_(noise / (tensor.shape[-1] ** 0.5 if tensor.dim() > 1 and "ape" not in name else 1.0))
    return made


class Served:
    """Sequences that one backend computes over its own pools."""

    def __init__(self, decoder: Decoder, ops: Ops, sequences: int) -> None:
        pools = Pools(SPEC, slots=sequences, spans=2 * sequences, device=torch.device("cpu"))
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
        "_attend_kernel", "_combine", "_down", "_entries", "_gate_up", "_linear", "_merge_kernel", "_qkv", "_read",
        "_rms_norm", "_rotations", "_route_kernel", "_scan_kernel", "_store_open_rows", "_swiglu", "_write_and_mix",
    }  # fmt: skip
    assert kernels <= set(LAUNCHES)


def test_a_row_has_the_same_bits_alone_in_a_batch_and_in_any_chunk(
    decoder: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("agentkit_kernels.triton.backend.DECODING", 2)  # larger chunks are prefilled
    text, other = ids(10), ids(2, seed=1)
    whole = Served(decoder, Triton("cpu", torch.float32), 1).step([0], [text])
    served = Served(decoder, Triton("cpu", torch.float32), 2)
    rows = [served.step([1, 0], [other[:1], text[:6]])[1:], served.step([0, 1], [text[6:9], other[1:]])[:3]]
    rows.append(served.step([0], [text[9:]]))
    assert torch.equal(torch.cat(rows), whole)


def test_a_cpu_is_refused_outside_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("agentkit_kernels.triton.backend.INTERPRET", False)
    with pytest.raises(ValueError, match="needs a GPU"):
        Triton("cpu")
