"""`ModelSpec` and `LayerSpec`: a model's architecture as data, read from an official `config.json`.

A layer's attention kind, RoPE set and router are fields of its `LayerSpec`, so no other code has to find out which kind
of layer it has. Source: the `config.json` files of DeepSeek-V4-Flash and DeepSeek-V4-Pro.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

Attention = Literal["window", "csa", "hca"]
Router = Literal["hash", "score"]
Draft = Literal["none", "mtp", "dspark"]

ATTENTION_OF_RATIO: dict[int, Attention] = {0: "window", 4: "csa", 128: "hca"}


class ConfigError(ValueError):
    """The engine cannot run this `config.json`; names each offending key, what was found and what was expected."""


@dataclass(frozen=True, slots=True)
class RopeSpec:
    """One set of rotary frequencies; `factor` 1 means no YaRN. cos and sin are never scaled (no mscale)."""

    theta: float
    factor: float = 1.0
    original_max_position_embeddings: int = 65_536
    beta_fast: float = 32.0
    beta_slow: float = 1.0


@dataclass(frozen=True, slots=True)
class LayerSpec:
    """One decoder layer.

    Attributes:
        index: Position in the stack; `num_hidden_layers` for the MTP block.
        attention: `window` (sliding window only), `csa` (plus the indexer's top-k of overlapping compressed entries) or
            `hca` (plus every compressed entry).
        compress_ratio: Tokens per compressed entry; 0 for `window`.
        router: `hash` (experts from a table by token id) or `score`.
        rope: The frequencies of all rotations in this layer.
    """

    index: int
    attention: Attention
    compress_ratio: int
    router: Router
    rope: RopeSpec

    @property
    def series(self) -> int:
        """Rows that a compressor computes of each token: CSA's entries overlap, so it has two series."""
        return 2 if self.attention == "csa" else 1


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """A DeepSeek-V4 decoder. Fields are named as in the official `config.json`; sizes count elements.

    Attributes:
        layers: The main stack, in order.
        mtp_layers: The multi-token-prediction blocks (none or one).
        draft: The kind of draft head in the checkpoint. `dspark` drafts are recognised and not loaded.
    """

    vocab_size: int
    hidden_size: int
    layers: tuple[LayerSpec, ...]
    mtp_layers: tuple[LayerSpec, ...]
    num_hash_layers: int
    num_attention_heads: int
    head_dim: int
    qk_rope_head_dim: int
    q_lora_rank: int
    o_groups: int
    o_lora_rank: int
    sliding_window: int
    index_n_heads: int
    index_head_dim: int
    index_topk: int
    hc_mult: int
    hc_sinkhorn_iters: int
    hc_eps: float
    n_routed_experts: int
    n_shared_experts: int
    num_experts_per_tok: int
    moe_intermediate_size: int
    routed_scaling_factor: float
    swiglu_limit: float
    rms_norm_eps: float
    max_position_embeddings: int
    bos_token_id: int
    eos_token_id: int
    draft: Draft = "none"

    @property
    def num_hidden_layers(self) -> int:
        """Number of layers in the main stack."""
        return len(self.layers)

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> ModelSpec:
        """Read the keys of an official `config.json`.

        Raises:
            ConfigError: A key is missing, unknown or has a value that this engine cannot run; the message lists the
                first 20 such keys with what was found and what was expected.
        """
        from agentkit_engine.config_file import ConfigFile, parse  # pydantic; a spec built in code does without

        file = parse(config)
        ratios = file.compress_ratios
        draft: Draft = "dspark" if file.dspark_keys else "mtp" if file.num_nextn_predict_layers else "none"
        scaling = file.rope_scaling
        plain = RopeSpec(file.rope_theta)
        compressed = RopeSpec(
            file.compress_rope_theta,
            scaling.factor,
            scaling.original_max_position_embeddings,
            scaling.beta_fast,
            scaling.beta_slow,
        )

        def layer(index: int) -> LayerSpec:
            return LayerSpec(
                index=index,
                attention=ATTENTION_OF_RATIO[ratios[index]],
                compress_ratio=ratios[index],
                router="hash" if index < file.num_hash_layers else "score",
                rope=compressed if ratios[index] else plain,
            )

        num_layers = file.num_hidden_layers
        shared_names = cls.__dataclass_fields__.keys() & ConfigFile.model_fields.keys()
        return cls(
            layers=tuple(layer(i) for i in range(num_layers)),
            mtp_layers=(layer(num_layers),) if draft == "mtp" else (),
            draft=draft,
            **{name: getattr(file, name) for name in shared_names},
        )

    def to_config(self) -> dict[str, Any]:
        """Return the official `config.json` of this spec: `from_config(spec.to_config()) == spec`.

        A `dspark` spec is written without its drafts, which are not loaded and cannot be exported.
        """
        config: dict[str, Any] = {
            name: getattr(self, name)
            for name in self.__dataclass_fields__
            if name not in ("layers", "mtp_layers", "draft")
        }
        # without compressed layers YaRN is unused, and the values of the released models are written
        yarn = next((layer.rope for layer in self.layers if layer.compress_ratio), RopeSpec(160_000.0, 16.0))
        plain = next((x.rope for x in self.layers + self.mtp_layers if not x.compress_ratio), RopeSpec(10_000.0))
        return config | {
            "architectures": ["DeepseekV4ForCausalLM"],
            "model_type": "deepseek_v4",
            "num_hidden_layers": len(self.layers),
            "num_nextn_predict_layers": len(self.mtp_layers),
            "compress_ratios": [layer.compress_ratio for layer in self.layers + self.mtp_layers],
            "rope_theta": plain.theta,
            "compress_rope_theta": yarn.theta,
            "rope_scaling": {
                "type": "yarn",
                "factor": yarn.factor,
                "original_max_position_embeddings": yarn.original_max_position_embeddings,
                "beta_fast": yarn.beta_fast,
                "beta_slow": yarn.beta_slow,
            },
            "num_key_value_heads": 1,
            "attention_bias": False,
            "attention_dropout": 0.0,
            "hidden_act": "silu",
            "norm_topk_prob": True,
            "scoring_func": "sqrtsoftplus",
            "topk_method": "noaux_tc",
            "tie_word_embeddings": False,
        }
