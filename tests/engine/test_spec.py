"""ModelSpec: the official config keys, and the errors for wrong ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from agentkit_engine.spec import ConfigError, ModelSpec, RopeSpec

MakeConfig = Callable[..., dict[str, Any]]

FLASH: dict[str, Any] = {
    "architectures": ["DeepseekV4ForCausalLM"],
    "model_type": "deepseek_v4",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "expert_dtype": "fp4",
    "hc_eps": 1e-6,
    "hc_mult": 4,
    "hc_sinkhorn_iters": 20,
    "head_dim": 512,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "index_head_dim": 128,
    "index_n_heads": 64,
    "index_topk": 512,
    "initializer_range": 0.02,
    "max_position_embeddings": 1048576,
    "moe_intermediate_size": 2048,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 64,
    "num_key_value_heads": 1,
    "num_experts_per_tok": 6,
    "num_hidden_layers": 43,
    "num_hash_layers": 3,
    "num_nextn_predict_layers": 1,
    "o_groups": 8,
    "o_lora_rank": 1024,
    "q_lora_rank": 1024,
    "qk_rope_head_dim": 64,
    "quantization_config": {
        "fmt": "e4m3",
        "quant_method": "fp8",
        "scale_fmt": "ue8m0",
        "weight_block_size": [128, 128],
    },
    "rms_norm_eps": 1e-6,
    "rope_scaling": {
        "beta_fast": 32,
        "beta_slow": 1,
        "factor": 16,
        "original_max_position_embeddings": 65536,
        "type": "yarn",
    },
    "rope_theta": 10000,
    "compress_rope_theta": 160000,
    "routed_scaling_factor": 1.5,
    "scoring_func": "sqrtsoftplus",
    "topk_method": "noaux_tc",
    "sliding_window": 128,
    "swiglu_limit": 10.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.57.1",
    "use_cache": True,
    "vocab_size": 129280,
    "compress_ratios": [0, 0, *[4, 128] * 20, 4, 0],
}


def test_flash_config() -> None:
    spec = ModelSpec.from_config(FLASH)
    kinds = [layer.attention for layer in spec.layers]
    assert (kinds.count("window"), kinds.count("csa"), kinds.count("hca")) == (2, 21, 20)
    assert [layer.router for layer in spec.layers[:4]] == ["hash", "hash", "hash", "score"]
    assert spec.layers[0].rope == RopeSpec(10000.0)
    assert spec.layers[2].rope == spec.layers[3].rope == RopeSpec(160000.0, 16.0)
    assert spec.draft == "mtp"
    (mtp,) = spec.mtp_layers
    assert (mtp.index, mtp.attention, mtp.router, mtp.rope) == (43, "window", "score", RopeSpec(10000.0))
    assert ModelSpec.from_config(spec.to_config()) == spec


def test_dspark_drafts_are_recognised_and_omitted() -> None:
    ratios = [*FLASH["compress_ratios"], 0, 0]
    spec = ModelSpec.from_config({**FLASH, "compress_ratios": ratios, "dspark_block_size": 5})
    assert (spec.draft, spec.mtp_layers, spec.num_hidden_layers) == ("dspark", (), 43)


@pytest.mark.parametrize("ratios", [(0,), (4,), (128, 128), (0, 4, 128)])
@pytest.mark.parametrize("mtp", [False, True])
def test_round_trip(ratios: tuple[int, ...], mtp: bool, make_config: MakeConfig) -> None:
    spec = ModelSpec.from_config(make_config(*ratios, mtp=mtp))
    assert ModelSpec.from_config(spec.to_config()) == spec


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scoring_func": "sigmoid"}, "scoring_func: found 'sigmoid', expected: Input should be 'sqrtsoftplus'"),
        ({"compress_ratios": [0, 8]}, r"compress_ratios.1: found 8, expected: Input should be 0, 4 or 128"),
        ({"compress_ratios": [0]}, "compress_ratios: found 1 entries, expected .* = 2"),
        ({"hidden_size": "64"}, "hidden_size: found '64', expected: Input should be a valid integer"),
        ({"engram_tables": 3}, "engram_tables: unknown key"),
        ({"o_groups": 3}, "o_groups: found 3, expected a divisor of num_attention_heads"),
        ({"qk_rope_head_dim": 7}, "qk_rope_head_dim: found 7, expected an even number"),
        ({"num_experts_per_tok": 9}, "num_experts_per_tok: found 9, expected at most n_routed_experts"),
        ({"rope_scaling": {"type": "linear"}}, "rope_scaling.type: found 'linear', expected: Input should be 'yarn'"),
    ],
)
def test_wrong_values_are_named(change: dict[str, Any], message: str, make_config: MakeConfig) -> None:
    with pytest.raises(ConfigError, match=message):
        ModelSpec.from_config({**make_config(0, 4), **change})


def test_every_missing_key_is_named(make_config: MakeConfig) -> None:
    config = make_config(0)
    del config["head_dim"], config["swiglu_limit"]
    with pytest.raises(ConfigError, match="head_dim: missing; swiglu_limit: missing"):
        ModelSpec.from_config(config)


def test_mtp_block_must_be_window_only(make_config: MakeConfig) -> None:
    with pytest.raises(ConfigError, match="found 4 for the MTP block, expected 0"):
        ModelSpec.from_config({**make_config(0, mtp=True), "compress_ratios": [0, 4]})
