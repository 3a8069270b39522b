"""Activations rounded as in DeepSeek's own inference, on random stacks of every layer kind in the official formats.

Implementations sum in different orders, so one may round a value up that the other rounds down. The rest of that row
then differs by as much as a rounding error of FP8. The tests allow this in a few rows. Tests of the `triton` backend
are in `tests/kernels/triton/test_engine.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from agentkit_engine import Engine, ModelSpec, SamplingParams
from agentkit_engine.weights.checkpoint import load_checkpoint
from agentkit_engine.weights.export import Format, export_checkpoint

from .conftest import make_random_decoder, small_config, some_ids
from .emulation import Emulation

SIZES: dict[str, Any] = {  # inputs of more than one group of 128, and of a part of one
    "hidden_size": 192, "head_dim": 72, "q_lora_rank": 160, "moe_intermediate_size": 160, "index_topk": 4,
    "o_lora_rank": 80, "sliding_window": 24,
}  # fmt: skip
LENGTHS = {(0, 0): 40, (4, 4): 40, (128,): 140}
PARAMS = SamplingParams(temperature=0, max_tokens=4)
MakeFolder = Callable[..., Path]


@pytest.fixture(scope="module")
def make_folder(tmp_path_factory: pytest.TempPathFactory) -> MakeFolder:
    def make(*ratios: int, format: Format = "official", **sizes: Any) -> Path:
        folder = tmp_path_factory.mktemp("model")
        spec = ModelSpec.from_config(small_config(*ratios, **(SIZES | sizes)))
        export_checkpoint(make_random_decoder(spec), folder, format=format)
        return folder

    return make


@pytest.fixture(params=["reference", "cpu"])
def backend(request: pytest.FixtureRequest) -> str:
    backend: str = request.param
    return backend


@pytest.mark.parametrize("kv_cache_dtype", ["auto", "fp8"])
@pytest.mark.parametrize("ratios", LENGTHS)
def test_logits_are_those_of_an_emulation(
    make_folder: MakeFolder, ratios: tuple[int, ...], kv_cache_dtype: str, backend: str
) -> None:
    folder, ids = make_folder(*ratios), some_ids(LENGTHS[ratios])
    whole, _ = load_checkpoint(folder, device=torch.device("cpu"), dtype=torch.float32)
    emulation = Emulation(whole.spec, whole.state_dict(), activations=True, rows=kv_cache_dtype == "fp8")
    expected = emulation.logits(ids)
    engine = Engine.load(folder, backend=backend, kv_cache_dtype=kv_cache_dtype, quantize_activations=True)
    errors = (engine.logits(ids) - expected).abs().amax(1)
    assert float(errors.median()) < 2e-5
    assert int((errors > 1e-3).sum()) <= 2 and float(errors.max()) < 0.1
    plain = Engine.load(folder, backend=backend, kv_cache_dtype=kv_cache_dtype).logits(ids)
    assert float((plain - expected).abs().mean()) > 0.02


def test_any_chunks_forks_and_saved_sessions_give_the_same_bits(
    make_folder: MakeFolder, backend: str, tmp_path: Path
) -> None:
    folder, ids = make_folder(0, 4, mtp=True), some_ids(60)
    options: dict[str, Any] = {"backend": backend, "quantize_activations": True}
    engine = Engine.load(folder, **options)
    whole = engine.logits(ids)
    for chunk in (17, 1):
        assert torch.equal(engine.scheduler.logits(ids, chunk=chunk), whole)
    with engine.session() as live:
        live.append(ids)
        [fork] = live.fork()
        live.save(tmp_path / "session")
        tokens = list(live.generate(PARAMS))
        assert list(fork.generate(PARAMS)) == tokens
    with Engine.load(folder, **options).open(tmp_path / "session") as restored:
        assert list(restored.generate(PARAMS)) == tokens
    assert Engine.load(folder, backend=backend).fingerprint != engine.fingerprint


def test_threads_and_experts_on_disk_do_not_change_a_bit(make_folder: MakeFolder) -> None:
    folder, ids = make_folder(4), some_ids(40)
    one, two = (Engine.load(folder, threads=count, quantize_activations=True).logits(ids) for count in (1, 2))
    assert torch.equal(one, two)
    stored = Engine.load(folder, expert_cache_bytes=1 << 20, quantize_activations=True)
    assert torch.equal(stored.logits(ids), one)


def test_several_devices_give_the_same_bits(make_folder: MakeFolder) -> None:
    folder, ids = make_folder(0), some_ids(20)
    options: dict[str, Any] = {"backend": "reference", "quantize_activations": True}
    expected = Engine.load(folder, **options).logits(ids)[-1].log_softmax(0)
    both = Engine.load(folder, devices=2, **options)
    try:
        for session in [both.session(), both.session()]:
            session.append(ids)
            [token] = session.generate(SamplingParams(temperature=0, max_tokens=1))
            assert token.logprob == expected[token.id].item()
    finally:
        both.close()


@pytest.mark.parametrize(
    ("format", "dtype", "found"),
    [
        ("bf16", None, "held as float32 or bfloat16"),
        ("official", "float32", "held as float32 or bfloat16"),
        ("official", "int8", "held as int8, mxfp4|held as int8"),
    ],
)
def test_models_without_fp8_and_fp4_matrices_are_refused(
    make_folder: MakeFolder, format: Format, dtype: str | None, found: str
) -> None:
    folder = make_folder(0, format=format)
    with pytest.raises(ValueError, match=f"rounds the inputs of FP8 and FP4 matrices, .*({found}); load a checkpoint"):
        Engine.load(folder, dtype=dtype, quantize_activations=True)


def test_index_keys_that_do_not_fit_into_fp4_are_refused(make_folder: MakeFolder) -> None:
    folder = make_folder(4, index_head_dim=48)
    with pytest.raises(ValueError, match=r"index_head_dim that is a power of two of at least 32, and .* is 48"):
        Engine.load(folder, quantize_activations=True)
    Engine.load(make_folder(0, index_head_dim=48), quantize_activations=True)  # there is no indexer


def test_a_value_that_is_no_flag_is_refused() -> None:
    with pytest.raises(TypeError, match="quantize_activations must be True or False, got 'fp8'"):
        Engine.load("tiny", quantize_activations="fp8")  # type: ignore[arg-type]
