"""The decoder against transformers' DeepSeek-V4 in float32, with every parameter and buffer random."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DeepseekV4Config, DeepseekV4ForCausalLM

from agentkit_engine.model import Decoder, Trace
from agentkit_engine.runtime import Scheduler
from agentkit_engine.spec import ModelSpec
from agentkit_kernels.reference.batch import ROWS

TOLERANCE = 1e-4
TIE = 1e-5
WHOLE = 10_000
FEW = 260
"""Tokens that the reference backend computes in small chunks; one costs it as much as 32 at once."""
CHUNKINGS = (1, 3, 4, 5, 127, 128, 129, WHOLE)
LAYER_TYPES = {
    0: "sliding_attention",
    4: "compressed_sparse_attention",
    128: "heavily_compressed_attention",
}
RENAMES = (
    ("attn.indexer.compressor.", "self_attn.compressor.indexer."),
    ("attn.indexer.wq_b", "self_attn.compressor.indexer.q_b_proj"),
    ("attn.indexer.weights_proj", "self_attn.compressor.indexer.scorer.weights_proj"),
    ("attn.compressor.", "self_attn.compressor."),
    ("attn.", "self_attn."),
    ("wkv.", "kv_proj."),
    ("wgate.", "gate_proj."),
    ("ape", "position_bias"),
    ("wq_a.", "q_a_proj."),
    ("wq_b.", "q_b_proj."),
    ("q_norm.", "q_a_norm."),
    ("wo_a.", "o_a_proj."),
    ("wo_b.", "o_b_proj."),
    ("attn_sink", "sinks"),
    ("hc_attn_", "attn_hc."),
    ("hc_ffn_", "ffn_hc."),
    ("attn_norm.", "input_layernorm."),
    ("ffn_norm.", "post_attention_layernorm."),
    ("ffn.gate.bias", "mlp.gate.e_score_correction_bias"),
    ("ffn.", "mlp."),
    ("shared_experts.w1.", "shared_experts.gate_proj."),
    ("shared_experts.w2.", "shared_experts.down_proj."),
    ("shared_experts.w3.", "shared_experts.up_proj."),
)
TOP_LEVEL = {
    "embed.weight": "model.embed_tokens.weight",
    "head.weight": "lm_head.weight",
    "norm.weight": "model.norm.weight",
    "hc_head_fn": "model.hc_head.hc_fn",
    "hc_head_base": "model.hc_head.hc_base",
    "hc_head_scale": "model.hc_head.hc_scale",
}


def oracle_name(name: str) -> str:
    """Return the name of an official tensor in transformers."""
    if name in TOP_LEVEL:
        return TOP_LEVEL[name]
    layers, index, rest = name.split(".", 2)
    for ours, theirs in RENAMES:
        if rest.startswith(ours) or (ours in rest and f".{ours}" in f".{rest}" and not ours.startswith("attn.")):
            rest = f".{rest}".replace(f".{ours}", f".{theirs}", 1)[1:]
    if "compressor" in rest:
        rest = rest.replace("compressor.norm.", "compressor.kv_norm.").replace("indexer.norm.", "indexer.kv_norm.")
    return f"model.{layers}.{index}.{rest}"


def oracle_config(spec: ModelSpec) -> DeepseekV4Config:
    """Return transformers' configuration of an architecture."""
    config = spec.to_config()
    scaling = config.pop("rope_scaling")
    for key in ("compress_ratios", "num_hash_layers", "num_nextn_predict_layers", "model_type", "architectures"):
        config.pop(key)
    return DeepseekV4Config(
        **config,
        layer_types=[LAYER_TYPES[layer.compress_ratio] for layer in spec.layers],
        mlp_layer_types=["hash_moe" if layer.router == "hash" else "moe" for layer in spec.layers],
        compress_rates={LAYER_TYPES[4]: 4, LAYER_TYPES[128]: 128},
        rope_parameters={"rope_type": scaling.pop("type"), **scaling},
    )


def oracle_of(decoder: Decoder) -> DeepseekV4ForCausalLM:
    """Return transformers' model with the same weights; every one of its tensors must be set."""
    oracle: DeepseekV4ForCausalLM = DeepseekV4ForCausalLM(oracle_config(decoder.spec))
    state: dict[str, Tensor] = {}
    tensors = {name: tensor for name, tensor in decoder.state_dict().items() if not name.startswith("mtp.")}
    for name, tensor in tensors.items():
        if name.endswith("experts.w1"):
            pair = (tensor, tensors[name.removesuffix("w1") + "w3"])
            state[oracle_name(name.removesuffix("w1")) + "gate_up_proj"] = torch.cat(pair, dim=1)
        elif name.endswith("experts.w2"):
            state[oracle_name(name.removesuffix("w2")) + "down_proj"] = tensor
        elif not name.endswith("experts.w3"):
            state[oracle_name(name)] = tensor
    oracle.load_state_dict(state, strict=True)
    return oracle


@torch.inference_mode()
def oracle_logits(decoder: Decoder, token_ids: Tensor) -> Tensor:
    logits: Tensor = oracle_of(decoder)(token_ids, use_cache=False).logits
    return logits


def tied_from(trace: Trace, top_k: int, length: int) -> int:
    """Return the first position at which the k-th entry leads by less than `TIE`; `length` if there is none."""
    first = length
    for record in trace.index:
        if record.scores_BTW.shape[-1] <= top_k:
            continue
        scores = record.scores_BTW.masked_fill(~record.visible_TW, -torch.inf)
        best = scores.topk(top_k + 1, dim=-1).values
        close = (best[..., top_k - 1] - best[..., top_k] < TIE) & (record.visible_TW.sum(-1) > top_k)
        rows = close.any(0).nonzero()
        if len(rows):
            first = min(first, record.start + int(rows[0]))
    return first


@pytest.fixture
def compare(
    make_config: Callable[..., dict[str, Any]],
    random_decoder: Callable[..., Decoder],
    record_property: Callable[[str, object], None],
) -> Callable[..., None]:
    """Compare a stack with the oracle on one random sequence, on both backends, with several chunk sizes."""

    def run(ratios: tuple[int, ...], length: int, chunkings: tuple[int, ...], **overrides: Any) -> None:
        spec = ModelSpec.from_config(make_config(*ratios, **overrides))
        decoder = random_decoder(spec, seed=1)
        token_ids = torch.randint(spec.vocab_size, (1, length), generator=torch.Generator().manual_seed(2))
        expected = oracle_logits(decoder, token_ids)
        trace = Trace()
        with torch.inference_mode():
            decoder(token_ids, trace=trace)
        end = tied_from(trace, spec.index_topk, length)
        record_property("masked_rows", length - end)
        print(f"{ratios}: {length - end} of {length} rows masked for index scores closer than {TIE}")
        assert end > 100, "too few rows left to compare"
        for backend in ("reference", "cpu"):
            scheduler = Scheduler(decoder, kv_cache_bytes=64 << 20, backend=backend)
            for chunk in chunkings:
                count = FEW if backend == "reference" and chunk < ROWS else length
                logits = scheduler.logits(token_ids[0, :count].tolist(), chunk=chunk)
                difference = float((logits[:end] - expected[0, : min(count, end)]).abs().max())
                print(f"{ratios}, {backend}, chunks of {chunk}: max abs difference {difference:.1e}")
                assert difference <= TOLERANCE, f"{backend}, chunks of {chunk}"

    return run


@pytest.mark.parametrize("ratio", LAYER_TYPES)
@pytest.mark.parametrize("router", ["hash", "score"])
def test_each_layer_kind_alone(ratio: int, router: str, compare: Callable[..., None]) -> None:
    chunkings = CHUNKINGS if router == "hash" else CHUNKINGS[-1:]
    compare((ratio,), 1500, chunkings, num_hash_layers=int(router == "hash"))


def test_mixed_stack(compare: Callable[..., None]) -> None:
    compare((0, 4, 128, 4), 450, CHUNKINGS)
    compare((0, 0, 4, 128, 4, 128), 1500, (128, WHOLE))


def test_pro_stack_starts_with_hca(compare: Callable[..., None]) -> None:
    compare((128, 128, 4, 128), 300, (7, WHOLE))


def test_every_entry_selected_needs_no_mask(compare: Callable[..., None]) -> None:
    compare((0, 4, 128, 4), 450, (3, 129, WHOLE), index_topk=150)


def test_positions_beyond_4096(compare: Callable[..., None]) -> None:
    """Far enough for the RoPE sets to diverge; every entry is selected, so that no row is masked."""
    compare((0, 4, 128), 4300, (2000,), index_topk=1100)


@torch.inference_mode()
def test_gathering_entries_equals_masking_them_in_a_long_context(
    make_config: Callable[..., dict[str, Any]], random_decoder: Callable[..., Decoder]
) -> None:
    """The compiled loops gather the entries that a query chose, the reference masks the others."""
    decoder = random_decoder(ModelSpec.from_config(make_config(4)))
    token_ids = torch.randint(96, (1, 4200), generator=torch.Generator().manual_seed(4))
    trace = Trace()
    masked = decoder(token_ids, trace=trace)[0]
    end = tied_from(trace, decoder.spec.index_topk, 4200)
    assert end > 1000
    gathered = Scheduler(decoder, kv_cache_bytes=64 << 20, backend="cpu").logits(token_ids[0].tolist())
    torch.testing.assert_close(gathered[:end], masked[:end], atol=2e-5, rtol=0)


def test_window_shorter_than_the_ratio(compare: Callable[..., None]) -> None:
    compare((0, 4, 128), 300, (3, WHOLE), sliding_window=16)
