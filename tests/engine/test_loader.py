"""The official layout on disk: exports load bit for bit, transformers agrees, and bad input is rejected."""

from __future__ import annotations

import gc
import json
import os
import shutil
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from agentkit_engine import (
    CheckpointError,
    Engine,
    ModelNotFoundError,
    ModelSpec,
    SamplingParams,
    TokenizerMissingError,
)
from agentkit_engine.benchmarks.random_checkpoint import random_decoder
from agentkit_engine.model import Decoder
from agentkit_engine.weights.checkpoint import load_checkpoint, read_sampling
from agentkit_engine.weights.export import Format, export_checkpoint
from agentkit_engine.weights.names import checkpoint_tensors
from agentkit_engine.weights.safetensors_file import read, read_header, runs

CONFIG: dict[str, Any] = {
    "model_type": "deepseek_v4",
    "vocab_size": 96,
    "hidden_size": 256,
    "num_hidden_layers": 4,
    "num_hash_layers": 2,
    "num_nextn_predict_layers": 1,
    "compress_ratios": [0, 4, 128, 4, 0],
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "qk_rope_head_dim": 8,
    "q_lora_rank": 64,
    "o_groups": 2,
    "o_lora_rank": 32,
    "sliding_window": 16,
    "index_n_heads": 16,
    "index_head_dim": 32,
    "index_topk": 512,
    "hc_mult": 4,
    "hc_sinkhorn_iters": 20,
    "hc_eps": 1e-6,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
    "routed_scaling_factor": 1.5,
    "swiglu_limit": 10.0,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "compress_rope_theta": 160000.0,
    "rope_scaling": {
        "type": "yarn",
        "factor": 16.0,
        "original_max_position_embeddings": 65536,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
    },
    "max_position_embeddings": 1048576,
    "bos_token_id": 0,
    "eos_token_id": 1,
}


@pytest.fixture(scope="module")
def decoder() -> Decoder:
    return random_decoder(ModelSpec.from_config(CONFIG))


@pytest.fixture(scope="module")
def bf16_folder(decoder: Decoder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bf16")
    export_checkpoint(decoder, folder)
    return folder


@pytest.fixture(scope="module")
def official_folder(decoder: Decoder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("official")
    export_checkpoint(decoder, folder, format="official", max_shard_bytes=500_000)
    return folder


def load(folder: Path, dtype: torch.dtype = torch.float32) -> Decoder:
    return load_checkpoint(folder, device=torch.device("cpu"), dtype=dtype)[0]


def assert_same_state(found: Decoder, expected: Decoder, convert: Callable[[Tensor], Tensor] = lambda t: t) -> None:
    found_state, expected_state = found.state_dict(), expected.state_dict()
    assert found_state.keys() == expected_state.keys()
    for name, tensor in expected_state.items():
        assert torch.equal(found_state[name].float(), convert(tensor).float()), name


# --- names ---------------------------------------------------------------------------------------------------------


def test_names_and_shapes_are_exactly_the_decoders(decoder: Decoder) -> None:
    from_names: dict[str, tuple[int, ...]] = {}
    for tensor in checkpoint_tensors(decoder.spec).values():
        stacked = () if tensor.expert is None else (decoder.spec.n_routed_experts,)
        from_names[tensor.parameter] = (*stacked, *tensor.shape)
    assert from_names == {name: tuple(tensor.shape) for name, tensor in decoder.state_dict().items()}


FLASH = CONFIG | {
    "vocab_size": 129280,
    "hidden_size": 4096,
    "num_hidden_layers": 43,
    "num_hash_layers": 3,
    "compress_ratios": [0, 0] + [4, 128] * 20 + [4, 0],
    "num_attention_heads": 64,
    "head_dim": 512,
    "qk_rope_head_dim": 64,
    "q_lora_rank": 1024,
    "o_groups": 8,
    "o_lora_rank": 1024,
    "index_n_heads": 64,
    "index_head_dim": 128,
    "n_routed_experts": 256,
    "num_experts_per_tok": 6,
    "moe_intermediate_size": 2048,
}


def test_flash_has_the_tensors_of_its_published_table() -> None:
    tensors = checkpoint_tensors(ModelSpec.from_config(FLASH))
    scales = sum(tensor.storage in ("fp8", "fp4") for tensor in tensors.values())
    assert len(tensors) + scales == 69_187
    published = {
        "head.weight": ((129280, 4096), "bf16"),
        "hc_head_fn": ((4, 16384), "f32"),
        "layers.0.hc_attn_fn": ((24, 16384), "f32"),
        "layers.0.attn.attn_sink": ((64,), "f32"),
        "layers.0.attn.wq_b.weight": ((32768, 1024), "fp8"),
        "layers.0.attn.wo_a.weight": ((8192, 4096), "fp8"),
        "layers.0.attn.wo_b.weight": ((4096, 8192), "fp8"),
        "layers.2.ffn.gate.tid2eid": ((129280, 6), "i64"),
        "layers.2.attn.compressor.ape": ((4, 1024), "f32"),
        "layers.2.attn.compressor.wkv.weight": ((1024, 4096), "bf16"),
        "layers.2.attn.indexer.wq_b.weight": ((8192, 1024), "fp8"),
        "layers.2.attn.indexer.weights_proj.weight": ((64, 4096), "bf16"),
        "layers.2.attn.indexer.compressor.wgate.weight": ((256, 4096), "bf16"),
        "layers.2.attn.indexer.compressor.norm.weight": ((128,), "bf16"),
        "layers.3.attn.compressor.ape": ((128, 512), "f32"),
        "layers.3.attn.compressor.wgate.weight": ((512, 4096), "bf16"),
        "layers.3.ffn.gate.bias": ((256,), "f32"),
        "layers.42.ffn.experts.255.w2.weight": ((4096, 2048), "fp4"),
        "layers.42.ffn.shared_experts.w3.weight": ((2048, 4096), "fp8"),
        "mtp.0.e_proj.weight": ((4096, 4096), "fp8"),
        "mtp.0.hc_head_scale": ((1,), "f32"),
    }
    assert {name: (tensors[name].shape, tensors[name].storage) for name in published} == published
    assert not {"layers.3.ffn.gate.tid2eid", "layers.2.ffn.gate.bias", "layers.1.attn.compressor.ape"} & tensors.keys()


# --- round trips ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("max_shard_bytes", [1 << 30, 100_000], ids=["one file", "sharded"])
@pytest.mark.parametrize("format", ["bf16", "fp32"])
def test_export_and_load_is_bit_equal(decoder: Decoder, tmp_path: Path, format: Format, max_shard_bytes: int) -> None:
    export_checkpoint(decoder, tmp_path, format=format, max_shard_bytes=max_shard_bytes)
    sharded = max_shard_bytes < 1 << 30
    assert (tmp_path / "model.safetensors.index.json").exists() == sharded
    assert (tmp_path / "model.safetensors").exists() != sharded
    stored_as_f32 = {t.parameter for t in checkpoint_tensors(decoder.spec).values() if t.storage == "f32"}
    loaded = load(tmp_path)
    for name, tensor in decoder.state_dict().items():
        keeps = format == "fp32" or name in stored_as_f32 or not tensor.is_floating_point()
        assert torch.equal(loaded.state_dict()[name], tensor if keeps else tensor.bfloat16().float()), name


def test_a_second_round_trip_of_the_official_format_changes_nothing(official_folder: Path, tmp_path: Path) -> None:
    loaded = load(official_folder)
    export_checkpoint(loaded, tmp_path, format="official")
    assert_same_state(load(tmp_path), loaded)


def test_loading_as_bf16_keeps_what_is_stored_as_float32(bf16_folder: Path, decoder: Decoder) -> None:
    loaded = load(bf16_folder, torch.bfloat16).state_dict()
    for tensor in checkpoint_tensors(decoder.spec).values():
        kept = {"f32": torch.float32, "i64": torch.int64}
        assert loaded[tensor.parameter].dtype == kept.get(tensor.storage, torch.bfloat16)
    logits = Engine.load(bf16_folder, dtype=torch.bfloat16).logits([3, 4, 5])
    assert logits.dtype == torch.float32 and bool(torch.isfinite(logits).all())


def test_fp16_weights_and_float32_scales_load(official_folder: Path, decoder: Decoder, tmp_path: Path) -> None:
    tensors = all_tensors(official_folder)
    name = "layers.0.attn.wq_a.weight"
    scale = torch.full(tensors["layers.0.attn.wq_a.scale"].shape, 0.3)
    tensors |= {"layers.0.attn.wq_a.scale": scale, "norm.weight": decoder.norm.weight.half()}
    write_folder(tmp_path, tensors)
    loaded = load(tmp_path).state_dict()
    assert torch.equal(loaded[name], tensors[name].float() * 0.3)
    assert torch.equal(loaded["norm.weight"], decoder.norm.weight.half().float())


def test_routed_experts_may_be_fp8(official_folder: Path, decoder: Decoder, tmp_path: Path) -> None:
    tensors = all_tensors(official_folder)
    prefix = "layers.1.ffn.experts.2.w1"
    codes = torch.ones(64, 256).to(torch.float8_e4m3fn)
    tensors |= {f"{prefix}.weight": codes, f"{prefix}.scale": torch.tensor([[0.25, 4.0]])}
    write_folder(tmp_path, tensors)
    expert = load(tmp_path).state_dict()["layers.1.ffn.experts.w1"][2]
    assert expert[:, :128].unique().tolist() == [0.25] and expert[:, 128:].unique().tolist() == [4.0]


def test_export_refuses_a_folder_with_weights(decoder: Decoder, bf16_folder: Path) -> None:
    with pytest.raises(FileExistsError, match=r"model\.safetensors exists; export into an empty folder"):
        export_checkpoint(decoder, bf16_folder)


@pytest.mark.filterwarnings("default")
def test_loads_what_transformers_loads(official_folder: Path) -> None:
    """transformers dequantises the same files: parameters bit-equal, logits equal."""
    transformers = pytest.importorskip("transformers")
    engine = Engine.load(official_folder, dtype=torch.bfloat16)
    oracle = transformers.AutoModelForCausalLM.from_pretrained(
        official_folder,
        dtype=torch.bfloat16,
        quantization_config=transformers.FineGrainedFP8Config(dequantize=True),
    ).float()
    ours = {name: tensor.contiguous() for name, tensor in engine.decoder.state_dict().items()}
    theirs = oracle.state_dict()
    assert torch.equal(theirs["model.layers.1.self_attn.q_b_proj.weight"], ours["layers.1.attn.wq_b.weight"])
    assert torch.equal(theirs["model.layers.3.mlp.experts.down_proj"], ours["layers.3.ffn.experts.w2"])
    gate_up = torch.cat((ours["layers.3.ffn.experts.w1"], ours["layers.3.ffn.experts.w3"]), dim=1)
    assert torch.equal(theirs["model.layers.3.mlp.experts.gate_up_proj"], gate_up)
    matched = {(tuple(t.shape), float(t.double().sum()), float(t.double().square().sum())) for t in theirs.values()}
    for name, tensor in ours.items():
        if not name.startswith("mtp.") and not name.endswith(("experts.w1", "experts.w3")):
            key = (tuple(tensor.shape), float(tensor.double().sum()), float(tensor.double().square().sum()))
            assert key in matched, name
    ids = torch.randint(0, 96, (300,), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        expected = oracle(ids[None]).logits[0]
    torch.testing.assert_close(engine.logits(ids.tolist()), expected, rtol=0, atol=1e-4)


# --- dialects and drafts -------------------------------------------------------------------------------------------


def all_tensors(folder: Path) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(file)
    return tensors


def write_folder(folder: Path, tensors: dict[str, Tensor], **config: Any) -> Path:
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(CONFIG | config))
    return folder


def test_dialect_comes_from_the_sidecar_or_else_from_the_drafts(bf16_folder: Path, tmp_path: Path) -> None:
    folder = write_folder(tmp_path, all_tensors(bf16_folder))
    assert Engine.load(folder).dialect == "v4-preview"
    (folder / "agentkit.json").write_text('{"format_version": 1, "dialect": "v4-0731"}')
    assert Engine.load(folder).dialect == "v4-0731"
    (folder / "agentkit.json").write_text('{"format_version": 1, "dialect": "v5"}')
    with pytest.raises(CheckpointError, match=r"agentkit\.json: dialect: found 'v5'"):
        Engine.load(folder)


@pytest.mark.parametrize("by", ["config", "tensors"])
def test_dspark_drafts_are_recognised_and_skipped(bf16_folder: Path, tmp_path: Path, by: str) -> None:
    tensors = {name: t for name, t in all_tensors(bf16_folder).items() if not name.startswith("mtp.")}
    tensors["mtp.2.markov_head.markov_w1.weight"] = torch.zeros(3, 5)
    config: dict[str, Any] = {}
    if by == "config":
        config = {"dspark_block_size": 5, "num_nextn_predict_layers": 3, "compress_ratios": [0, 4, 128, 4, 0, 0, 0]}
    else:
        tensors["mtp.0.main_proj.weight"] = torch.zeros(2, 2)
    engine = Engine.load(write_folder(tmp_path, tensors, **config))
    assert engine.dialect == "v4-0731" and engine.spec.draft == "dspark" and not engine.spec.mtp_layers
    assert engine.logits([5, 6]).shape == (2, 96)


def test_mtp_tensors_without_mtp_in_the_config_are_unknown(bf16_folder: Path, tmp_path: Path) -> None:
    config: dict[str, Any] = {"num_nextn_predict_layers": 0, "compress_ratios": [0, 4, 128, 4]}
    with pytest.raises(CheckpointError, match=r"tensor mtp\.0\.\S+: unknown: found"):
        Engine.load(write_folder(tmp_path, all_tensors(bf16_folder), **config))


# --- bad input -----------------------------------------------------------------------------------------------------


def test_a_missing_folder_is_an_error_that_lists_the_packaged_models(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    packaged = tmp_path / "packaged"
    packaged.mkdir()
    (packaged / "config.json").write_text("{}")
    monkeypatch.setattr("agentkit_engine.engine.PACKAGED_MODELS", {"tiny": packaged, "absent": tmp_path / "absent"})
    with pytest.raises(ModelNotFoundError, match=r'no model "nowhere".*packaged model \(tiny\)'):
        Engine.load("nowhere")
    with pytest.raises(ModelNotFoundError, match="absent"):
        Engine.load("absent")


def test_a_folder_without_tokenizer_loads_and_its_tokenizer_is_an_error(bf16_folder: Path) -> None:
    engine = Engine.load(bf16_folder)
    assert engine.name == bf16_folder.name
    with pytest.raises(TokenizerMissingError, match=r"holds no tokenizer\.json"):
        _ = engine.tokenizer


@pytest.fixture
def broken(bf16_folder: Path, tmp_path: Path) -> Path:
    """Return a copy to damage, in one file."""
    return Path(shutil.copytree(bf16_folder, tmp_path / "model"))


def test_a_corrupted_tokenizer_is_named(broken: Path) -> None:
    (broken / "tokenizer.json").write_text('{"model": ')
    with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
        _ = Engine.load(broken).tokenizer


@pytest.fixture
def sharded(official_folder: Path, tmp_path: Path) -> Path:
    """Return a copy to damage, in several files."""
    return Path(shutil.copytree(official_folder, tmp_path / "model"))


def change(folder: Path, **tensors: Tensor | None) -> None:
    """Replace (or, with `None`, remove) tensors of a single-file folder; `__` in a name stands for a dot."""
    stored = all_tensors(folder)
    for name, tensor in tensors.items():
        stored.pop(name.replace("__", "."), None)
        if tensor is not None:
            stored[name.replace("__", ".")] = tensor
    save_file(stored, folder / "model.safetensors")


def fails(folder: Path, *parts: str) -> None:
    """Assert that loading raises a CheckpointError whose message contains all these parts."""
    with pytest.raises(CheckpointError) as info:
        Engine.load(folder)
    for part in parts:
        assert part in str(info.value)


def test_missing_config(broken: Path) -> None:
    (broken / "config.json").unlink()
    fails(broken, "config.json: missing")


@pytest.mark.parametrize("text", ["{", "[1]", "\ufffe"])
def test_config_that_is_not_a_json_object(broken: Path, text: str) -> None:
    (broken / "config.json").write_text(text, encoding="utf-8")
    fails(broken, "config.json: ")


def test_config_with_an_unknown_key(broken: Path) -> None:
    (broken / "config.json").write_text(json.dumps(CONFIG | {"n_group": 8}))
    fails(broken, "config.json", "n_group", "unknown key")


def test_no_weights_at_all(broken: Path) -> None:
    (broken / "model.safetensors").unlink()
    fails(broken, "no weights: expected model.safetensors, or model.safetensors.index.json")


def test_missing_tensor(broken: Path) -> None:
    change(broken, layers__1__attn__indexer__compressor__ape=None)
    name = "layers.1.attn.indexer.compressor.ape"
    fails(broken, f"model.safetensors: tensor {name}: missing; expected shape [4, 64]")


def test_unknown_tensor(broken: Path) -> None:
    change(broken, layers__1__attn__bias=torch.zeros(3))
    fails(broken, "model.safetensors: tensor layers.1.attn.bias: unknown: found F32 [3]", "config.json")


def test_tensor_of_the_wrong_shape(broken: Path) -> None:
    change(broken, layers__0__attn__attn_sink=torch.zeros(5))
    fails(broken, "model.safetensors: tensor layers.0.attn.attn_sink: found F32 [5], expected shape [4]")


@pytest.mark.parametrize("dtype", [torch.int64, torch.int8, torch.float8_e4m3fn])
def test_wrong_dtype(broken: Path, dtype: torch.dtype) -> None:
    scale = torch.ones(1, 1) if dtype != torch.int64 else None
    change(broken, norm__weight=torch.ones(256).to(dtype), norm__scale=scale)
    fails(broken, "tensor norm.weight: found dtype", "expected BF16 or F16 or F32")


@pytest.mark.parametrize(("dtype", "name"), [(torch.float64, "F64"), (torch.float8_e5m2, "F8_E5M2")])
def test_unknown_dtype(broken: Path, dtype: torch.dtype, name: str) -> None:
    change(broken, norm__weight=torch.ones(256).to(dtype))
    fails(
        broken,
        f"tensor norm.weight: found dtype {name}, expected one of BF16",
        "store weights as BF16, F16 or F32, of which `agentkit convert` makes FP8, FP4 or int8",
    )


def test_a_quantised_weight_without_scale_and_a_scale_without_quantised_weight(broken: Path) -> None:
    fp8 = torch.zeros(64, 256).to(torch.float8_e4m3fn)
    change(broken, layers__0__attn__wq_a__weight=fp8)
    fails(broken, "tensor layers.0.attn.wq_a.scale: missing; layers.0.attn.wq_a.weight is F8_E4M3 and needs it")
    change(broken, layers__0__attn__wq_a__weight=torch.zeros(64, 256), layers__0__attn__wq_a__scale=torch.ones(1, 2))
    fails(broken, "tensor layers.0.attn.wq_a.scale: unknown", "scale of a weight that is not quantised")


@pytest.mark.parametrize("scale", [torch.ones(2, 1), torch.ones(1, 2).bfloat16()], ids=["shape", "dtype"])
def test_wrong_scale(broken: Path, scale: Tensor) -> None:
    fp8 = torch.zeros(64, 256).to(torch.float8_e4m3fn)
    change(broken, layers__0__attn__wq_a__weight=fp8, layers__0__attn__wq_a__scale=scale)
    fails(broken, "tensor layers.0.attn.wq_a.scale: found ", "expected F8_E8M0 or F32 [1, 2]")


def test_weights_that_are_not_finite(broken: Path) -> None:
    change(broken, hc_head_base=torch.tensor([0.0, float("nan"), 0.0, 0.0]))
    fails(broken, "tensor hc_head_base: found NaN or infinity")


def test_hash_table_with_an_expert_that_does_not_exist(broken: Path) -> None:
    change(broken, layers__0__ffn__gate__tid2eid=torch.full((96, 2), 4))
    fails(broken, "tensor layers.0.ffn.gate.tid2eid: found expert ids 4 to 4, expected 0 to 3")


def test_truncated_file_names_the_first_truncated_tensor(broken: Path) -> None:
    path = broken / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[:-7])
    header_size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + header_size])
    header.pop("__metadata__", None)
    last = max(header, key=lambda name: header[name]["data_offsets"])
    fails(broken, f"model.safetensors: tensor {last}: truncated", f"found a file of {len(data) - 7} bytes")


def test_a_file_that_shrinks_while_it_is_read_names_the_tensor(tmp_path: Path) -> None:
    save_file({"a": torch.arange(4.0), "b": torch.arange(8.0)}, tmp_path / "x.safetensors")
    [run] = runs(read_header(tmp_path / "x.safetensors").values(), 1 << 20)
    os.truncate(tmp_path / "x.safetensors", run[1].end - 12)
    with pytest.raises(CheckpointError, match="tensor b: found 20 bytes, expected 32"):
        list(read(run))


@given(sizes=st.lists(st.sampled_from([1, 3, 4, 10]), min_size=1, max_size=8), most=st.integers(1, 60))
def test_runs_contain_every_tensor_once_at_any_offset(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[int], most: int
) -> None:
    """The tensor after an odd number of bytes is not aligned for its dtype."""
    path = tmp_path_factory.mktemp("runs") / "x.safetensors"
    tensors = {
        f"{index:02}": torch.arange(size, dtype=torch.int8 if index % 2 else torch.float32)
        for index, size in enumerate(sizes)
    }
    header, end = {}, 0
    for name, tensor in tensors.items():
        dtype = "I8" if tensor.dtype == torch.int8 else "F32"
        header[name] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": [end, end + tensor.nbytes]}
        end += tensor.nbytes
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"".join(t.numpy().tobytes() for t in tensors.values()))
    found = runs(read_header(path).values(), most)
    assert all(len(run) == 1 or run[-1].end - run[0].start <= most for run in found)
    assert most < 60 or len(found) <= 4
    values = {tensor.name: value for run in found for tensor, value in zip(run, read(run), strict=True)}
    assert values.keys() == tensors.keys() and all(torch.equal(values[name], tensors[name]) for name in tensors)


def test_forwards_accept_every_requested_dtype(bf16_folder: Path) -> None:
    ids = list(range(40))
    expected = Engine.load(bf16_folder).logits(ids)
    for dtype in (torch.float16, torch.float64):
        torch.testing.assert_close(Engine.load(bf16_folder, dtype=dtype).logits(ids), expected, atol=0.05, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_are_read_directly_into_their_packed_place(bf16_folder: Path, dtype: torch.dtype) -> None:
    engine = Engine.load(bf16_folder, dtype=dtype)
    before = {name: parameter.data_ptr() for name, parameter in engine.decoder.named_parameters()}
    engine.logits(range(40))
    moved = {name for name, parameter in engine.decoder.named_parameters() if parameter.data_ptr() != before[name]}
    assert moved and all(name.endswith(("_fn", "gate.weight", "e_proj.weight", "h_proj.weight")) for name in moved)


@pytest.mark.parametrize("format", ["bf16", "official"])
def test_bfloat16_is_used_where_it_is_lossless_and_gives_the_same_bits(
    decoder: Decoder, tmp_path: Path, format: Format
) -> None:
    export_checkpoint(decoder, tmp_path, format=format)
    half, whole = (Engine.load(tmp_path, dtype=dtype) for dtype in (torch.bfloat16, torch.float32))
    decoder = load_checkpoint(tmp_path, device=torch.device("cpu"), dtype=None)[0]
    assert_same_state(decoder, half.decoder)
    dtypes = {name: parameter.dtype for name, parameter in decoder.named_parameters()}
    assert dtypes["layers.3.ffn.experts.w1"] == dtypes["layers.1.attn.wq_b.weight"] == torch.bfloat16
    assert dtypes["embed.weight"] == torch.bfloat16 and dtypes["layers.1.hc_attn_fn"] == torch.float32
    assert_same_state(half.decoder, whole.decoder)
    ids = torch.randint(0, 96, (300,), generator=torch.Generator().manual_seed(4)).tolist()
    assert torch.equal(half.logits(ids), whole.logits(ids))
    assert half.fingerprint == whole.fingerprint  # so they accept each other's states
    greedy = SamplingParams(temperature=0, max_tokens=9)
    with half.session() as a, whole.session() as b:
        for session in (a, b):
            session.append(ids[:40])
        assert list(a.generate(greedy)) == list(b.generate(greedy))


def test_float32_is_used_where_it_is_stored_or_layers_are_plain_torch(broken: Path, bf16_folder: Path) -> None:
    assert Engine.load(bf16_folder, backend="reference").decoder.head.weight.dtype == torch.float32
    change(broken, head__weight=torch.randn(96, 256))
    decoder = Engine.load(broken).decoder
    assert (decoder.head.weight.dtype, decoder.embed.weight.dtype) == (torch.float32, torch.bfloat16)
    weight = torch.randn(64, 256).to(torch.float8_e4m3fn)
    change(broken, layers__0__attn__wq_a__weight=weight, layers__0__attn__wq_a__scale=torch.full((1, 2), 0.3))
    decoder = load_checkpoint(broken, device=torch.device("cpu"), dtype=None)[0]
    assert decoder.blocks[0].attn.wq_a.weight.dtype == torch.float32


@pytest.mark.parametrize("size", [0, 5, 8, 100])
def test_file_cut_inside_its_header(broken: Path, size: int) -> None:
    path = broken / "model.safetensors"
    path.write_bytes(path.read_bytes()[:size])
    fails(broken, "model.safetensors: corrupted or truncated")


def test_a_git_lfs_pointer_is_named(broken: Path) -> None:
    (broken / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    fails(broken, "model.safetensors: found a Git LFS pointer", "run `git lfs pull`")


def test_another_architecture_is_named_first(broken: Path) -> None:
    (broken / "config.json").write_text('{"model_type": "llama", "hidden_size": 64}')
    fails(broken, "config.json: model_type: found 'llama', expected 'deepseek_v4': this engine runs DeepSeek-V4 only")


def rewrite_header(path: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    data = path.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    edit(header)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[end:])


def header_damages() -> Iterator[tuple[str, Callable[[dict[str, Any]], None], str]]:
    yield "offsets", lambda h: h["norm.weight"].update(data_offsets=[0, 512]), "corrupted header"
    yield "shape", lambda h: h["norm.weight"].update(shape=[255]), "tensor norm.weight: corrupted header"
    yield "negative", lambda h: h["norm.weight"].update(shape=[-256]), "corrupted safetensors header"
    yield "field", lambda h: h["norm.weight"].update(colour="red"), "corrupted safetensors header"
    yield "gap", lambda h: h.pop("embed.weight"), "corrupted header"


@pytest.mark.parametrize(("edit", "message"), [pytest.param(e, m, id=i) for i, e, m in header_damages()])
def test_header_that_contradicts_itself(broken: Path, edit: Callable[[dict[str, Any]], None], message: str) -> None:
    rewrite_header(broken / "model.safetensors", edit)
    fails(broken, "model.safetensors", message)


@pytest.mark.parametrize("header", [b"\xff" * 40, b"[1, 2]", b'{"a": 1}', b"{", b'{"a": "' + b"x" * 40])
def test_invalid_header(broken: Path, header: bytes) -> None:
    path = broken / "model.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header + b"\0" * 64)
    fails(broken, "model.safetensors: corrupted safetensors header")


def test_bytes_after_the_last_tensor(broken: Path) -> None:
    with (broken / "model.safetensors").open("ab") as file:
        file.write(b"more")
    fails(broken, "model.safetensors", "the remaining bytes belong to no tensor")


def test_missing_shard(sharded: Path) -> None:
    file = sorted(sharded.glob("*.safetensors"))[1]
    file.unlink()
    fails(sharded, f"{file.name}: tensor ", "missing; model.safetensors.index.json expects")


def edit_index(folder: Path, edit: Callable[[dict[str, str]], None]) -> None:
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    edit(index["weight_map"])
    path.write_text(json.dumps(index))


def test_index_that_lists_a_tensor_missing_from_its_shard(sharded: Path) -> None:
    first = sorted(sharded.glob("*.safetensors"))[0].name
    edit_index(sharded, lambda weight_map: weight_map.update({"embed.wait": first}))
    fails(sharded, f"{first}: tensor embed.wait: missing; model.safetensors.index.json expects it here")


def test_shard_with_a_tensor_missing_from_the_index(sharded: Path) -> None:
    edit_index(sharded, lambda weight_map: weight_map.__delitem__("norm.weight"))
    fails(sharded, "tensor norm.weight: unexpected: model.safetensors.index.json places it in no file")


def test_shard_outside_the_folder(sharded: Path) -> None:
    edit_index(sharded, lambda weight_map: weight_map.update({"norm.weight": "../model.safetensors"}))
    fails(sharded, "found file '../model.safetensors', expected the name of a file in the same folder")


def test_safetensors_file_that_is_not_part_of_the_checkpoint(broken: Path) -> None:
    shutil.copy(broken / "model.safetensors", broken / "model-00002-of-00002.safetensors")
    fails(broken, "model-00002-of-00002.safetensors: not part of the checkpoint")


def test_invalid_index(sharded: Path) -> None:
    (sharded / "model.safetensors.index.json").write_text('{"weights": {}}')
    fails(sharded, "model.safetensors.index.json: not a safetensors index")


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (None, SamplingParams()),
        ({"do_sample": True, "temperature": 0.6, "top_p": 0.95, "eos_token_id": 1}, SamplingParams(0.6, 0.95)),
        ({"do_sample": False, "temperature": 0.6}, SamplingParams(temperature=0.0)),
        (
            {"top_k": 20, "min_p": 0.05, "repetition_penalty": 1.1},
            SamplingParams(top_k=20, min_p=0.05, repetition_penalty=1.1),
        ),
        ({"top_k": 0}, SamplingParams()),
    ],
)
def test_sampling_parameters_come_from_generation_config(
    tmp_path: Path, config: dict[str, object] | None, expected: SamplingParams
) -> None:
    if config is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(config))
    assert read_sampling(tmp_path) == expected


@pytest.mark.parametrize("text", ['{"temperature": -1}', '{"top_p": "high"}', "[]", "{"])
def test_an_invalid_generation_config_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "generation_config.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"generation_config\.json"):
        read_sampling(tmp_path)


@pytest.mark.parametrize("enabled", [True, False])
def test_garbage_is_collected_after_loading_as_before(broken: Path, enabled: bool) -> None:
    was = gc.isenabled()
    try:
        (gc.enable if enabled else gc.disable)()
        Engine.load(broken)
        assert gc.isenabled() == enabled
        (broken / "model.safetensors").unlink()
        with pytest.raises(CheckpointError):
            Engine.load(broken)
        assert gc.isenabled() == enabled
    finally:
        (gc.enable if was else gc.disable)()
