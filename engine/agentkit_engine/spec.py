"""`ModelSpec` and `LayerSpec`: a model's architecture as data, read from an official `config.json`.

A layer's attention kind, RoPE set and router are fields of its `LayerSpec`, so no other code has to find out which kind
of layer it has. Source: the `config.json` files of DeepSeek-V4-Flash and DeepSeek-V4-Pro.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from agentkit_engine.untrusted import shorten

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
        try:
            file = _ConfigFile.model_validate(dict(config))
        except ValidationError as exc:
            errors = exc.errors(include_url=False)
            more = f"; and {len(errors) - 20} more" if len(errors) > 20 else ""
            raise ConfigError("config.json: " + "; ".join(map(_problem, errors[:20])) + more) from exc
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
        shared_names = cls.__dataclass_fields__.keys() & _ConfigFile.model_fields.keys()
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


# Far above every released checkpoint, and low enough that a loop over it takes little time and memory.
Width = Annotated[int, Field(gt=0, le=1 << 20)]
Count = Annotated[int, Field(gt=0, le=1 << 14)]
Small = Annotated[int, Field(gt=0, le=1 << 10)]
Positions = Annotated[int, Field(gt=0, le=1 << 26)]
Theta = Annotated[float, Field(gt=1, le=1e12)]
Epsilon = Annotated[float, Field(gt=0, le=1)]
Ratio = Annotated[float, Field(gt=0, le=1e6)]


class _RopeScaling(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    type: Literal["yarn"]
    factor: Ratio
    original_max_position_embeddings: Positions
    beta_fast: Ratio
    beta_slow: Ratio


class _ConfigFile(BaseModel):
    """The official keys; a `Literal` type gives the only value of a key that this engine implements."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    model_type: Literal["deepseek_v4"]
    vocab_size: Width
    hidden_size: Width
    num_hidden_layers: Small
    num_hash_layers: Annotated[int, Field(ge=0, le=1 << 10)]
    num_nextn_predict_layers: Annotated[int, Field(ge=0, le=1 << 10)] = 0
    compress_ratios: Annotated[list[Literal[0, 4, 128]], Field(max_length=1 << 11)]
    num_attention_heads: Count
    num_key_value_heads: Literal[1] = 1
    head_dim: Width
    qk_rope_head_dim: Width
    q_lora_rank: Width
    o_groups: Count
    o_lora_rank: Width
    sliding_window: Count
    index_n_heads: Count
    index_head_dim: Width
    index_topk: Count
    hc_mult: Small
    hc_sinkhorn_iters: Small
    hc_eps: Epsilon
    n_routed_experts: Count
    n_shared_experts: Literal[1] = 1
    num_experts_per_tok: Count
    moe_intermediate_size: Width
    routed_scaling_factor: Ratio
    swiglu_limit: Ratio
    rms_norm_eps: Epsilon
    rope_theta: Theta
    compress_rope_theta: Theta
    rope_scaling: _RopeScaling
    max_position_embeddings: Positions
    bos_token_id: Annotated[int, Field(ge=0)]
    eos_token_id: Annotated[int, Field(ge=0)]
    hidden_act: Literal["silu"] = "silu"
    scoring_func: Literal["sqrtsoftplus"] = "sqrtsoftplus"
    topk_method: Literal["noaux_tc"] = "noaux_tc"
    norm_topk_prob: Literal[True] = True
    tie_word_embeddings: Literal[False] = False
    attention_bias: Literal[False] = False

    # These keys do not change the forward. `quantization_config` and `expert_dtype` give the storage format of the
    # weights, which the loader reads from the tensors instead.
    architectures: list[str] = []
    attention_dropout: float = 0.0
    initializer_range: float = 0.02
    torch_dtype: str | None = None
    dtype: str | None = None
    transformers_version: str | None = None
    use_cache: bool = True
    pad_token_id: int | None = None
    expert_dtype: str | None = None
    quantization_config: dict[str, Any] | None = None
    dspark_keys: dict[str, Any] = {}

    @model_validator(mode="before")
    @classmethod
    def _gather_dspark(cls, data: dict[str, Any]) -> dict[str, Any]:
        dspark = {key: value for key, value in data.items() if key.startswith("dspark_")}
        return {key: value for key, value in data.items() if key not in dspark} | {"dspark_keys": dspark}

    @model_validator(mode="after")
    def _check_sizes(self) -> _ConfigFile:
        num_ratios = self.num_hidden_layers + self.num_nextn_predict_layers
        checks = [
            (
                max(self.bos_token_id, self.eos_token_id) < self.vocab_size,
                f"bos_token_id, eos_token_id: found {shorten(self.bos_token_id)} and {shorten(self.eos_token_id)}, "
                f"expected ids below vocab_size ({self.vocab_size})",
            ),
            (
                # DSpark configs have one ratio per draft block, regardless of num_nextn_predict_layers.
                len(self.compress_ratios) >= self.num_hidden_layers
                if self.dspark_keys
                else len(self.compress_ratios) == num_ratios,
                f"compress_ratios: found {len(self.compress_ratios)} entries, expected num_hidden_layers + "
                f"num_nextn_predict_layers = {num_ratios}",
            ),
            (
                bool(self.dspark_keys) or self.num_nextn_predict_layers <= 1,
                f"num_nextn_predict_layers: found {self.num_nextn_predict_layers}, expected 0 or 1",
            ),
            (
                bool(self.dspark_keys) or not any(self.compress_ratios[self.num_hidden_layers :]),
                f"compress_ratios: found {self.compress_ratios[-1]} for the MTP block, expected 0",
            ),
            (
                self.num_attention_heads % self.o_groups == 0,
                f"o_groups: found {self.o_groups}, expected a divisor of num_attention_heads "
                f"({self.num_attention_heads})",
            ),
            (
                self.qk_rope_head_dim % 2 == 0 and self.qk_rope_head_dim <= min(self.head_dim, self.index_head_dim),
                f"qk_rope_head_dim: found {self.qk_rope_head_dim}, expected an even number of at most "
                f"{min(self.head_dim, self.index_head_dim)} (the smaller of head_dim and index_head_dim)",
            ),
            (
                self.num_experts_per_tok <= self.n_routed_experts,
                f"num_experts_per_tok: found {self.num_experts_per_tok}, expected at most n_routed_experts "
                f"({self.n_routed_experts})",
            ),
        ]
        problems = [text for holds, text in checks if not holds]
        if problems:
            raise ValueError("; ".join(problems))
        return self


def _problem(error: Any) -> str:
    key = shorten(".".join(str(part) for part in error["loc"]), 120, quote=False)
    match error["type"]:
        case "missing":
            return f"{key}: missing"
        case "extra_forbidden":
            return f"{key}: unknown key (found {shorten(error['input'])}); this engine runs the DeepSeek-V4 keys only"
        case "value_error":
            return str(error["ctx"]["error"])
        case _:
            return f"{key}: found {shorten(error['input'])}, expected: {shorten(error['msg'], 200, quote=False)}"
