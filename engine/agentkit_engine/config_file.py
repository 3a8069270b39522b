"""The keys of an official `config.json` and their checks, for `spec.ModelSpec.from_config`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from agentkit_engine.spec import ConfigError
from agentkit_engine.untrusted import shorten

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


class ConfigFile(BaseModel):
    """The official keys; a `Literal` type gives the only value of a key that this engine implements."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    model_type: Literal["deepseek_v4"]
    vocab_size: Width
    hidden_size: Width
    num_hidden_layers: Small
    num_hash_layers: Annotated[int, Field(ge=0, le=1 << 10)]
    num_nextn_predict_layers: Annotated[int, Field(ge=0, le=1 << 10)] = 0
    compress_ratios: Annotated[list[Literal[0, 4, 128]], Field(min_length=1, max_length=1 << 11)]
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
    def _check_sizes(self) -> ConfigFile:
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


def parse(config: Mapping[str, Any]) -> ConfigFile:
    """Check the keys of a `config.json`.

    Raises:
        ConfigError: As in `ModelSpec.from_config`.
    """
    if (found := config.get("model_type", "deepseek_v4")) != "deepseek_v4":
        raise ConfigError(
            f"config.json: model_type: found {shorten(found)}, expected 'deepseek_v4': this engine runs DeepSeek-V4 "
            "only; serve other models with vLLM or SGLang, for example, and use them behind their API"
        )
    try:
        return ConfigFile.model_validate(dict(config))
    except ValidationError as exc:
        errors = exc.errors(include_url=False)
        more = f"; and {len(errors) - 20} more" if len(errors) > 20 else ""
        raise ConfigError("config.json: " + "; ".join(map(_problem, errors[:20])) + more) from exc


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
