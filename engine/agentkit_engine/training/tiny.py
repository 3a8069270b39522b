"""Architecture of the packaged model: every V4 mechanism, small enough to train on a laptop in an hour or two."""

from __future__ import annotations

from agentkit_engine.spec import ModelSpec

COMPRESS_RATIOS = (0, 4, 128, 4, 0)  # window, CSA, HCA, CSA; the last is the MTP block's


def tiny_spec(vocab_size: int) -> ModelSpec:
    """Return the architecture: about 6 M parameters.

    Ratios, streams and Sinkhorn iterations are those of V4-Flash. The window is twice as large.
    """
    return ModelSpec.from_config(
        {
            "architectures": ["DeepseekV4ForCausalLM"],
            "model_type": "deepseek_v4",
            "vocab_size": vocab_size,
            "hidden_size": 256,
            "num_hidden_layers": len(COMPRESS_RATIOS) - 1,
            "num_nextn_predict_layers": 1,
            "compress_ratios": list(COMPRESS_RATIOS),
            "sliding_window": 256,
            "num_attention_heads": 4,
            "num_key_value_heads": 1,
            "head_dim": 96,
            "qk_rope_head_dim": 32,
            "q_lora_rank": 128,
            "o_groups": 2,
            "o_lora_rank": 128,
            "index_n_heads": 8,
            "index_head_dim": 32,
            "index_topk": 16,
            "n_routed_experts": 8,
            "n_shared_experts": 1,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 96,
            "num_hash_layers": 1,
            "routed_scaling_factor": 1.5,
            "swiglu_limit": 10.0,
            "scoring_func": "sqrtsoftplus",
            "topk_method": "noaux_tc",
            "norm_topk_prob": True,
            "hc_mult": 4,
            "hc_sinkhorn_iters": 20,
            "hc_eps": 1e-6,
            "rms_norm_eps": 1e-6,
            "rope_theta": 10000,
            "compress_rope_theta": 160000,
            "rope_scaling": {
                "type": "yarn",
                "factor": 16,
                "original_max_position_embeddings": 65536,
                "beta_fast": 32,
                "beta_slow": 1,
            },
            "max_position_embeddings": 1048576,
            "hidden_act": "silu",
            "attention_bias": False,
            "attention_dropout": 0.0,
            "tie_word_embeddings": False,
            "initializer_range": 0.02,
            "bos_token_id": 0,
            "eos_token_id": 1,
            "torch_dtype": "bfloat16",
            "use_cache": True,
        }
    )
