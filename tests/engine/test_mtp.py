"""The MTP block against its formulas, written with transformers' decoder layer."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DeepseekV4Config
from transformers.masking_utils import create_sliding_window_causal_mask
from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4DecoderLayer, DeepseekV4RotaryEmbedding

from agentkit_engine.model import Decoder, Trace
from agentkit_engine.runtime import Pools, Runner
from agentkit_engine.spec import ModelSpec
from agentkit_kernels.ops import Plan

LAYER_NAMES = {
    "attn_norm.weight": "input_layernorm.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "attn.attn_sink": "self_attn.sinks",
    "attn.wq_a.weight": "self_attn.q_a_proj.weight",
    "attn.q_norm.weight": "self_attn.q_a_norm.weight",
    "attn.wq_b.weight": "self_attn.q_b_proj.weight",
    "attn.wkv.weight": "self_attn.kv_proj.weight",
    "attn.kv_norm.weight": "self_attn.kv_norm.weight",
    "attn.wo_a.weight": "self_attn.o_a_proj.weight",
    "attn.wo_b.weight": "self_attn.o_b_proj.weight",
    "ffn.gate.weight": "mlp.gate.weight",
    "ffn.gate.bias": "mlp.gate.e_score_correction_bias",
    "ffn.shared_experts.w1.weight": "mlp.shared_experts.gate_proj.weight",
    "ffn.shared_experts.w2.weight": "mlp.shared_experts.down_proj.weight",
    "ffn.shared_experts.w3.weight": "mlp.shared_experts.up_proj.weight",
    "ffn.experts.w2": "mlp.experts.down_proj",
    **{f"hc_{part}_{name}": f"{part}_hc.{name}" for part in ("attn", "ffn") for name in ("fn", "base", "scale")},
}


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    return weight * x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt()


def expected_draft(decoder: Decoder, streams: Tensor, next_ids: Tensor) -> Tensor:
    """Compute the formulas of the MTP block around transformers' decoder layer."""
    spec, state = decoder.spec, decoder.state_dict()
    own = {name.removeprefix("mtp.0."): tensor for name, tensor in state.items() if name.startswith("mtp.0.")}
    config = DeepseekV4Config(
        **{name: getattr(spec, name) for name in SHARED_KEYS},
        num_hidden_layers=1,
        layer_types=["sliding_attention"],
        mlp_layer_types=["moe"],
        rope_parameters={"rope_type": "default"},
        attn_implementation="eager",  # type: ignore[call-arg]
    )
    layer = DeepseekV4DecoderLayer(config, 0).eval()
    weights = {theirs: own[ours] for ours, theirs in LAYER_NAMES.items()}
    weights["mlp.experts.gate_up_proj"] = torch.cat((own["ffn.experts.w1"], own["ffn.experts.w3"]), dim=1)
    layer.load_state_dict(weights, strict=True)

    embedding = state["embed.weight"][next_ids]
    e = rms_norm(embedding, own["enorm.weight"]) @ own["e_proj.weight"].T
    mixed = rms_norm(streams, own["hnorm.weight"]) @ own["h_proj.weight"].T + e.unsqueeze(2)
    positions = torch.arange(next_ids.shape[1]).unsqueeze(0)
    mask = create_sliding_window_causal_mask(
        config=config, inputs_embeds=e, attention_mask=None, past_key_values=None, position_ids=positions
    )
    rotary = DeepseekV4RotaryEmbedding(config)
    out = layer(
        mixed,
        position_embeddings={kind: rotary(e, position_ids=positions, layer_type=kind) for kind in ("main", "compress")},
        position_ids=positions,
        attention_mask=mask,
        input_ids=next_ids,
        past_key_values=None,
    )
    flat = out.flatten(2)
    mix = flat @ own["hc_head_fn"].T * (flat.square().mean(-1, keepdim=True) + 1e-6).rsqrt()
    pre = torch.sigmoid(mix * own["hc_head_scale"] + own["hc_head_base"]) + spec.hc_eps
    x = (pre.unsqueeze(-1) * out).sum(2)
    logits: Tensor = rms_norm(x, own["norm.weight"]) @ state["head.weight"].T
    return logits


SHARED_KEYS = (
    "vocab_size hidden_size moe_intermediate_size num_attention_heads head_dim q_lora_rank qk_rope_head_dim "
    "num_experts_per_tok n_routed_experts routed_scaling_factor sliding_window o_groups o_lora_rank hc_mult "
    "hc_sinkhorn_iters hc_eps swiglu_limit rms_norm_eps max_position_embeddings"
).split()


@pytest.fixture
def decoder(make_config: Callable[..., dict[str, Any]], random_decoder: Callable[..., Decoder]) -> Decoder:
    logging.getLogger("transformers").setLevel(logging.ERROR)
    return random_decoder(ModelSpec.from_config(make_config(0, 4, mtp=True, swiglu_limit=1.0)), seed=5)


@torch.inference_mode()
def test_drafts_follow_the_formulas(decoder: Decoder) -> None:
    token_ids = torch.randint(96, (2, 301), generator=torch.Generator().manual_seed(6))
    trace = Trace(index_scores=False)
    decoder(token_ids[:, :-1], trace=trace)
    assert trace.streams_BTMD is not None
    got, own_streams = decoder.draft_logits(trace.streams_BTMD, token_ids[:, 1:])
    difference = float((got - expected_draft(decoder, trace.streams_BTMD, token_ids[:, 1:])).abs().max())
    print(f"max abs difference {difference:.1e}")
    assert difference <= 1e-4
    assert own_streams.shape == (2, 300, 4, 64)
    assert trace.index == []


@torch.inference_mode()
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_a_served_draft_is_the_blocks_at_the_start_of_a_text(decoder: Decoder, backend: str) -> None:
    """Its guesses are computed together, and see no earlier token."""
    token_ids = torch.randint(96, (1, 41), generator=torch.Generator().manual_seed(7))
    trace = Trace(index_scores=False)
    decoder(token_ids[:, :-1], trace=trace)
    assert trace.streams_BTMD is not None
    streams, next_ids = trace.streams_BTMD[0], token_ids[0, 1:]
    alone = [decoder.draft_logits(streams[t : t + 1, None], next_ids[t : t + 1, None])[0][0, 0] for t in range(40)]
    runner = Runner(decoder, Pools(decoder.spec, slots=1, spans=1, device=torch.device("cpu")), backend=backend)
    plan = Plan(next_ids, [1] * 40, [0] * 40, [0] * 40, [()] * 40)
    together = runner.forward.draft(streams, plan).logits
    if backend == "reference":
        assert torch.equal(together, torch.stack(alone))
    torch.testing.assert_close(together, torch.stack(alone), atol=2e-5, rtol=0)
    assert runner.mtp_draft(streams, next_ids.tolist()) == together.argmax(-1).tolist()


def test_a_model_without_the_block_is_an_error(
    make_config: Callable[..., dict[str, Any]], random_decoder: Callable[..., Decoder]
) -> None:
    decoder = random_decoder(ModelSpec.from_config(make_config(0)))
    with pytest.raises(ValueError, match="no MTP block"):
        decoder.draft_logits(torch.zeros(1, 1, 4, 64), torch.zeros(1, 1, dtype=torch.int64))
