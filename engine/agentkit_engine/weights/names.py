"""Every tensor of an official DeepSeek-V4 checkpoint: its name, shape and storage, and its place in the `Decoder`.

`Decoder` parameters have the official names, with one exception. On disk each routed expert has three tensors of its
own (`layers.3.ffn.experts.17.w1.weight`); in the decoder the experts of a layer are stacked (row 17 of
`layers.3.ffn.experts.w1`). Source: the tensor tables of DeepSeek-V4-Flash and -Pro.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from agentkit_engine.spec import LayerSpec, ModelSpec

Storage = Literal["bf16", "f32", "i64", "fp8", "fp4", "int8"]
"""Storage of a tensor; fp8, fp4 and int8 weights have a sibling `.scale`. The released checkpoints have no int8."""


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One tensor of the checkpoint.

    Attributes:
        shape: in elements, [out, in] for matrices, before packing.
        storage: storage in the released checkpoints.
        parameter: the name in `Decoder.state_dict()`.
        expert: the row of a stacked parameter; `None` when the tensor is the whole parameter.
    """

    shape: tuple[int, ...]
    storage: Storage
    parameter: str
    expert: int | None = None


def scale_name(name: str) -> str:
    """Return `X.scale` for `X.weight`."""
    return name.removesuffix("weight") + "scale"


def checkpoint_tensors(spec: ModelSpec) -> dict[str, TensorSpec]:
    """Return all tensors of a checkpoint of this architecture by official name, except scales."""
    tensors: dict[str, TensorSpec] = {}

    def add(name: str, storage: Storage, *shape: int) -> None:
        tensors[name] = TensorSpec(shape, storage, name)

    def add_hyper_connection(prefix: str, streams_out: int, scales: int) -> None:
        add(f"{prefix}_fn", "f32", streams_out, spec.hc_mult * spec.hidden_size)
        add(f"{prefix}_base", "f32", streams_out)
        add(f"{prefix}_scale", "f32", scales)

    def add_compressor(prefix: str, layer: LayerSpec, head_dim: int) -> None:
        width = head_dim * (2 if layer.attention == "csa" else 1)
        add(f"{prefix}.ape", "f32", layer.compress_ratio, width)
        add(f"{prefix}.wkv.weight", "bf16", width, spec.hidden_size)
        add(f"{prefix}.wgate.weight", "bf16", width, spec.hidden_size)
        add(f"{prefix}.norm.weight", "bf16", head_dim)

    def add_attention(prefix: str, layer: LayerSpec) -> None:
        heads_width = spec.num_attention_heads * spec.head_dim
        add(f"{prefix}.attn_sink", "f32", spec.num_attention_heads)
        add(f"{prefix}.wq_a.weight", "fp8", spec.q_lora_rank, spec.hidden_size)
        add(f"{prefix}.q_norm.weight", "bf16", spec.q_lora_rank)
        add(f"{prefix}.wq_b.weight", "fp8", heads_width, spec.q_lora_rank)
        add(f"{prefix}.wkv.weight", "fp8", spec.head_dim, spec.hidden_size)
        add(f"{prefix}.kv_norm.weight", "bf16", spec.head_dim)
        add(f"{prefix}.wo_a.weight", "fp8", spec.o_groups * spec.o_lora_rank, heads_width // spec.o_groups)
        add(f"{prefix}.wo_b.weight", "fp8", spec.hidden_size, spec.o_groups * spec.o_lora_rank)
        if layer.compress_ratio:
            add_compressor(f"{prefix}.compressor", layer, spec.head_dim)
        if layer.attention == "csa":
            add(f"{prefix}.indexer.wq_b.weight", "fp8", spec.index_n_heads * spec.index_head_dim, spec.q_lora_rank)
            add(f"{prefix}.indexer.weights_proj.weight", "bf16", spec.index_n_heads, spec.hidden_size)
            add_compressor(f"{prefix}.indexer.compressor", layer, spec.index_head_dim)

    def add_moe(prefix: str, layer: LayerSpec) -> None:
        add(f"{prefix}.gate.weight", "bf16", spec.n_routed_experts, spec.hidden_size)
        if layer.router == "hash":
            add(f"{prefix}.gate.tid2eid", "i64", spec.vocab_size, spec.num_experts_per_tok)
        else:
            add(f"{prefix}.gate.bias", "f32", spec.n_routed_experts)
        wide, narrow = (spec.moe_intermediate_size, spec.hidden_size), (spec.hidden_size, spec.moe_intermediate_size)
        for matrix, shape in (("w1", wide), ("w2", narrow), ("w3", wide)):
            add(f"{prefix}.shared_experts.{matrix}.weight", "fp8", *shape)
            for expert in range(spec.n_routed_experts):
                name = f"{prefix}.experts.{expert}.{matrix}.weight"
                tensors[name] = TensorSpec(shape, "fp4", f"{prefix}.experts.{matrix}", expert)

    def add_layer(prefix: str, layer: LayerSpec) -> None:
        mixes = (2 + spec.hc_mult) * spec.hc_mult
        for part in ("attn", "ffn"):
            add(f"{prefix}.{part}_norm.weight", "bf16", spec.hidden_size)
            add_hyper_connection(f"{prefix}.hc_{part}", mixes, 3)
        add_attention(f"{prefix}.attn", layer)
        add_moe(f"{prefix}.ffn", layer)

    add("embed.weight", "bf16", spec.vocab_size, spec.hidden_size)
    add("head.weight", "bf16", spec.vocab_size, spec.hidden_size)
    add("norm.weight", "bf16", spec.hidden_size)
    add_hyper_connection("hc_head", spec.hc_mult, 1)
    for index, layer in enumerate(spec.layers):
        add_layer(f"layers.{index}", layer)
    for index, layer in enumerate(spec.mtp_layers):
        prefix = f"mtp.{index}"
        add_layer(prefix, layer)
        for projection in ("e_proj", "h_proj"):
            add(f"{prefix}.{projection}.weight", "fp8", spec.hidden_size, spec.hidden_size)
        for norm in ("enorm", "hnorm", "norm"):
            add(f"{prefix}.{norm}.weight", "bf16", spec.hidden_size)
        add_hyper_connection(f"{prefix}.hc_head", spec.hc_mult, 1)
    return tensors
