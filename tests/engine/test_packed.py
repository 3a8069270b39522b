"""Checkpoints whose matrices stay packed: the bits of dequantised ones, little memory, and errors while loading."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from agentkit_engine import Engine
from agentkit_engine.errors import CheckpointError, ModelTooLargeError
from agentkit_engine.model.decoder import Decoder
from agentkit_engine.sampling_params import SamplingParams
from agentkit_engine.spec import ModelSpec
from agentkit_engine.weights import checkpoint, memory
from agentkit_engine.weights.export import Format, export_checkpoint
from agentkit_kernels.packed import Packed

IDS = torch.randint(0, 96, (150,), generator=torch.Generator().manual_seed(3)).tolist()
EXPERT = "layers.1.ffn.experts.2.w1"


@pytest.fixture(params=["official", "int8"])
def folder(
    request: pytest.FixtureRequest,
    tmp_path: Path,
    make_config: Callable[..., dict[str, Any]],
    random_decoder: Callable[[ModelSpec], Decoder],
) -> Path:
    """A folder of random packed weights, with layers of every kind and a draft block."""
    spec = ModelSpec.from_config(make_config(0, 4, 128, mtp=True, o_lora_rank=128))
    format: Format = request.param
    export_checkpoint(random_decoder(spec), tmp_path, format=format)
    return tmp_path


def change(folder: Path, **tensors: torch.Tensor) -> None:
    path = folder / "model.safetensors"
    save_file(load_file(path) | {name.replace("__", "."): tensor for name, tensor in tensors.items()}, path)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_packed_weights_give_the_bits_of_dequantised_ones(folder: Path, backend: str) -> None:
    packed = Engine.load(folder, backend=backend)
    plain = Engine.load(folder, backend=backend, dtype="float32")
    assert {
        "layers.0.attn.wo_a.weight",
        "layers.1.ffn.experts.w1",
        "mtp.0.e_proj.weight",
    } <= packed.decoder.packed.keys()
    assert not plain.decoder.packed
    assert torch.equal(packed.logits(IDS), plain.logits(IDS))
    assert packed.fingerprint == plain.fingerprint  # so they accept each other's states
    greedy = SamplingParams(temperature=0, max_tokens=9)
    with packed.session() as a, plain.session() as b:
        for session in (a, b):
            session.append(IDS[:40])
        assert list(a.generate(greedy)) == list(b.generate(greedy))


def test_groups_of_an_output_projection_that_split_a_block_are_dequantised(
    tmp_path: Path, make_config: Callable[..., dict[str, Any]], random_decoder: Callable[[ModelSpec], Decoder]
) -> None:
    spec = ModelSpec.from_config(make_config(0, 4, o_lora_rank=24))
    export_checkpoint(random_decoder(spec), tmp_path, format="official")
    packed, plain = Engine.load(tmp_path), Engine.load(tmp_path, dtype="float32")
    assert packed.decoder.blocks[0].attn.wo_a.weight.dtype == torch.bfloat16
    assert torch.equal(packed.logits(IDS), plain.logits(IDS))


def test_int8_is_a_load_option_for_any_checkpoint(
    tmp_path: Path, make_config: Callable[..., dict[str, Any]], random_decoder: Callable[[ModelSpec], Decoder]
) -> None:
    decoder = random_decoder(ModelSpec.from_config(make_config(0, 4)))
    for format in ("bf16", "int8"):
        export_checkpoint(decoder, tmp_path / format, format=format)
    for asked in ("int8", torch.int8):
        engine = Engine.load(tmp_path / "bf16", dtype=asked)
        assert {rows.format for rows in engine.decoder.packed.values()} == {"int8"}
        exact = Engine.load(tmp_path / "bf16").logits(IDS)
        found = engine.logits(IDS)
        assert 0 < float((found - exact).abs().max()) < 0.2 * float(exact.abs().max())
    stored = Engine.load(tmp_path / "int8")
    rows, again = stored.decoder.packed["layers.1.ffn.experts.w2"], engine.decoder.packed["layers.1.ffn.experts.w2"]
    for expert in range(rows.shape[0]):
        one, other = (each.rows(0, each.shape[1], expert) for each in (rows, again))
        assert isinstance(one, Packed) and (one.dequantise() - other.dequantise()).abs().max() < 0.02


def test_a_wide_layer_is_read_in_several_pieces(
    tmp_path: Path, make_config: Callable[..., dict[str, Any]], random_decoder: Callable[[ModelSpec], Decoder]
) -> None:
    spec = ModelSpec.from_config(make_config(4, num_attention_heads=40, o_groups=1))
    assert 40 * spec.head_dim > 1024
    export_checkpoint(random_decoder(spec), tmp_path, format="official")
    assert torch.equal(Engine.load(tmp_path).logits(IDS), Engine.load(tmp_path, dtype="float32").logits(IDS))


@pytest.mark.parametrize("folder", ["official"], indirect=True)
@pytest.mark.parametrize(
    ("changed", "problem"),
    [
        ({"layers__0__attn__wq_b__weight": "nan"}, "found NaN, expected finite weights"),
        ({f"{EXPERT}.scale": 250}, "found a scale of 2^123, expected at most 2^113"),
        ({f"{EXPERT}.scale": 255}, "found NaN, expected at most 2^113"),
    ],
)
def test_weights_that_are_not_finite_are_errors_while_loading(
    folder: Path, changed: dict[str, Any], problem: str
) -> None:
    [(name, value)] = changed.items()
    name = name.replace("__", ".")
    tensor = load_file(folder / "model.safetensors")[name].clone()
    tensor.view(torch.uint8).flatten()[-1] = 0xFF if value == "nan" else value
    change(folder, **{name: tensor})
    with pytest.raises(CheckpointError, match=re.escape(problem)) as caught:
        Engine.load(folder)
    assert caught.value.tensor == name


@pytest.mark.parametrize("folder", ["official"], indirect=True)
def test_too_little_memory_names_what_would_fit(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    needed = memory.GIB
    monkeypatch.setattr(memory, "GIB", 1 << 20)
    monkeypatch.setattr(memory, "available_memory", lambda *_: 2 << 20)
    monkeypatch.setattr(checkpoint, "_empty_decoder", lambda *_: pytest.fail("memory is allocated"))
    with pytest.raises(
        ModelTooLargeError,
        match=r"needs [\d.]+ GiB of memory for its weights, has 2.0 GiB; loaded as it is stored, without a dtype it "
        r'needs [\d.]+ GiB; or loaded with dtype="int8" it needs',
    ):
        Engine.load(folder, dtype="float64")
    monkeypatch.setattr(memory, "available_memory", lambda *_: 2 << 10)
    with pytest.raises(ModelTooLargeError, match=r"has 0.0 GiB; the smallest form of it needs [\d.]+ GiB$"):
        Engine.load(folder)
    assert needed == 1 << 30


def test_a_sampled_fingerprint_sees_every_kind_of_weight(folder: Path) -> None:
    before = Engine.load(folder).fingerprint
    tensors = load_file(folder / "model.safetensors")
    for name in ("layers.0.attn.wq_a.weight", "layers.2.ffn.experts.0.w2.weight", "norm.weight"):
        changed = tensors[name].clone()
        changed.view(torch.uint8).flatten()[0] ^= 1
        save_file(tensors | {name: changed}, folder / "model.safetensors")
        assert Engine.load(folder).fingerprint != before, name
    assert json.loads((folder / "config.json").read_text())["vocab_size"] == 96
