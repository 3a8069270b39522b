"""The machine checks behind exact results, and the guarantees of an engine that is not exact."""

from __future__ import annotations

import copy
import logging
from pathlib import Path
from typing import Any

import numba
import numpy as np
import pytest
import torch
from torch import Tensor

import agentkit_engine.engine
from agentkit_engine import Engine, ModelSpec, SamplingParams, SavedSessionError
from agentkit_engine.model import Decoder
from agentkit_engine.runtime import Pools, Runner, Scheduler
from agentkit_engine.runtime.runner import NUMERICS, machine
from agentkit_kernels import invariance
from agentkit_kernels.cpu import Cpu, loops
from agentkit_kernels.cpu import linear as products_module
from agentkit_kernels.cpu.linear import chain_block
from agentkit_kernels.invariance import least_rows

from .conftest import make_random_decoder, randomize_, small_config, some_ids

PARAMS = SamplingParams(temperature=0, max_tokens=6)


def products(*, alike_from: int) -> object:
    """Return a product whose rows have other bits when there are fewer than `alike_from` of them."""

    class Functional:
        @staticmethod
        def linear(x_NK: Tensor, weight_OK: Tensor) -> Tensor:
            return x_NK @ weight_OK.mT if len(x_NK) >= alike_from else x_NK @ weight_OK.mT + 1e-6

    return Functional


@pytest.mark.parametrize(
    ("alike_from", "candidates", "rows"),
    [(0, (8, 16, 32), 8), (8, (8, 16, 32), 8), (0, (16, 32), 16), (9, (8, 16, 32), 16), (17, (8, 16, 32), 32)],
)
def test_the_smallest_sufficient_number_of_rows_is_used(
    monkeypatch: pytest.MonkeyPatch, alike_from: int, candidates: tuple[int, ...], rows: int
) -> None:
    monkeypatch.setattr(invariance, "F", products(alike_from=alike_from))
    assert least_rows([torch.eye(16)], candidates=candidates) == rows


def test_a_machine_without_exact_products_causes_a_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(invariance, "F", products(alike_from=1000))
    with caplog.at_level(logging.WARNING):
        assert least_rows([torch.eye(16)]) == 32
    assert "results depend on the batch" in caplog.text


@pytest.fixture(scope="module")
def decoder() -> Decoder:
    spec = ModelSpec.from_config(small_config(0, 4, 128, sliding_window=48, index_topk=8))
    return randomize_(Decoder(spec), torch.Generator().manual_seed(1)).eval()


def engine(decoder: Decoder, *, exact: bool) -> Engine:
    return Engine(decoder, name="small", dialect="v4-preview", folder=Path("none"), exact=exact)


@pytest.mark.usefixtures("two_threads")
def test_without_exactness_logits_are_close(decoder: Decoder) -> None:
    ids = some_ids(600, 0)
    exact, other = engine(decoder, exact=True), engine(decoder, exact=False)
    torch.testing.assert_close(other.logits(ids), exact.logits(ids), atol=1e-4, rtol=0)
    with other.session() as session:
        session.append(ids)
        (token,) = session.generate(SamplingParams(temperature=0, max_tokens=1))
    assert token.logprob == pytest.approx(exact.logits(ids)[-1].log_softmax(0)[token.id].item(), abs=1e-4)


@pytest.mark.usefixtures("two_threads")
def test_without_exactness_forks_and_restored_sessions_have_the_same_bits(decoder: Decoder, tmp_path: Path) -> None:
    inexact = engine(decoder, exact=False)
    with inexact.session() as session:
        session.append(some_ids(300, 1))
        list(session.generate(PARAMS))
        fork = session.fork()[0]
        session.save(tmp_path / "saved")
        said = list(session.generate(PARAMS))
        assert list(fork.generate(PARAMS)) == said
        assert list(engine(decoder, exact=False).open(tmp_path / "saved").generate(PARAMS)) == said


def test_states_of_other_numerics_are_not_used(decoder: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    now = engine(decoder, exact=True).fingerprint
    monkeypatch.setattr(agentkit_engine.engine, "NUMERICS", NUMERICS + 1)
    assert engine(decoder, exact=True).fingerprint != now


def test_states_that_other_kernels_computed_are_foreign(decoder: Decoder) -> None:
    cpu, reference = (
        Engine(decoder, name="small", dialect="v4-preview", folder=Path("none"), backend=backend).fingerprint
        for backend in ("cpu", "reference")
    )
    assert cpu != reference


def test_an_exact_engine_uses_no_state_of_an_inexact_one(decoder: Decoder, tmp_path: Path) -> None:
    with engine(decoder, exact=False).session() as session:
        session.append(some_ids(30, 1))
        list(session.generate(PARAMS))
        session.save(tmp_path / "saved")
    with pytest.raises(SavedSessionError, match="model is"):
        engine(decoder, exact=True).open(tmp_path / "saved")


def test_another_machines_disk_cache_is_ignored_but_its_saved_sessions_open(
    decoder: Decoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def engine_here() -> Engine:
        folder = tmp_path / "cache"
        return Engine(decoder, name="small", dialect="v4-preview", folder=Path("none"), cache_dir=folder)

    ids = some_ids(60, 1)

    def found_by(engine: Engine) -> int:
        with engine.session() as session:
            session.append(ids)
            ids.extend(token.id for token in session.generate(PARAMS))
            session.save(tmp_path / "saved")
        engine.flush()
        return session.usage.hit_tokens

    assert [found_by(engine_here()), found_by(engine_here())] == [0, 65]
    monkeypatch.setattr(agentkit_engine.engine, "machine", lambda device: (device.type, "another"))
    assert [found_by(engine_here()), found_by(engine_here())] == [0, 77]
    monkeypatch.undo()
    with engine_here().open(tmp_path / "saved") as session:
        assert session.token_ids == tuple(ids)


def test_a_machine_is_its_device_its_processor_and_its_libraries() -> None:
    here = machine(torch.device("cpu"))
    assert {torch.__version__, numba.__version__, "cpu"} < set(here)
    assert here != machine(torch.device("meta"))


def test_bfloat16_is_widened_for_the_library_inside_and_outside_of_inference() -> None:
    """Memory allocated under inference mode is reused outside it by the next engine of the same thread."""
    x_NK, weight_KO = torch.randn(64, 48), torch.randn(48, 7000).bfloat16()
    with torch.inference_mode():
        inside = products_module.by_library(x_NK, weight_KO)
    assert torch.equal(products_module.by_library(x_NK, weight_KO), inside)
    assert torch.equal(products_module.by_library(x_NK, weight_KO.float()), inside)


def cpu_ops(decoder: Decoder) -> Cpu:
    """Return the operations that packed the decoder's weights."""
    pools = Pools(decoder.spec, slots=1, spans=1, device=torch.device("cpu"))
    ops = Runner(decoder, pools, backend="cpu").forward.ops
    assert isinstance(ops, Cpu)
    return ops


def test_packed_weights_are_held_once_and_the_decoder_still_computes_with_them(decoder: Decoder) -> None:
    packed, ids = copy.deepcopy(decoder), some_ids(40, 0)
    storages = {product.weight.untyped_storage().data_ptr() for product in cpu_ops(packed).products}
    for name, parameter in packed.named_parameters():
        if parameter.dim() > 1 and name.startswith("layers") and not name.endswith(("ape", "wo_a.weight")):
            assert parameter.untyped_storage().data_ptr() in storages, name
    with torch.inference_mode():
        torch.testing.assert_close(packed(torch.tensor([ids])), decoder(torch.tensor([ids])))
    packed(torch.tensor([ids])).sum().backward()  # they are still parameters


def test_a_few_rows_are_multiplied_as_the_library_multiplies_many(decoder: Decoder) -> None:
    """Products are padded on a machine whose library's sums cannot be reproduced."""
    for product in cpu_ops(decoder).products:
        x_NK = np.random.default_rng(0).standard_normal((40, len(product.weight)), dtype=np.float32)
        many = product(x_NK)
        for rows in range(1, 40):
            assert np.array_equal(product(x_NK[:rows]), many[:rows]), (product.weight.shape, rows)


@pytest.mark.parametrize(("inputs", "block"), [(1, 1), (3, 3), (6, 3), (192, 96), (1000, 256), (300, 7)])
def test_the_chains_of_a_library_are_found(inputs: int, block: int) -> None:
    def library(x_NK: Tensor, weight_KO: Tensor) -> Tensor:
        out_NO = torch.empty(len(x_NK), weight_KO.shape[1])
        loops.multiply(x_NK.numpy(), weight_KO.numpy(), block, out_NO.numpy())
        return out_NO

    weight_KO = torch.randn(inputs, 9, generator=torch.Generator().manual_seed(0))
    # no library sums in sevens, so products are padded
    assert chain_block(weight_KO, 8, by=library) == (0 if block == 7 else block)


@pytest.mark.parametrize("few", [0, products_module.FEW_QUERIES])
def test_other_libraries_and_code_paths_are_exact_too(
    decoder: Decoder, few: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Covers a torch without oneDNN, and one whose BLAS has other bits for few queries than oneDNN for many."""
    ids = some_ids(600, 0)
    expected = engine(decoder, exact=True).logits(ids)
    if few:
        monkeypatch.setattr(products_module, "_ONEDNN", None)
    monkeypatch.setattr(products_module, "FEW_QUERIES", few)
    scheduler = Scheduler(decoder, kv_cache_bytes=64 << 20, backend="cpu")
    logits = scheduler.logits(ids)
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)
    for chunk in (1, 7, 130):
        assert torch.equal(scheduler.logits(ids, chunk=chunk), logits)


def test_sizes_without_divisors() -> None:
    """Plain torch is not exact here, because BLAS treats products of one or five outputs differently; the engine
    warns."""
    sizes: dict[str, Any] = {
        "hidden_size": 20, "num_attention_heads": 3, "head_dim": 12, "qk_rope_head_dim": 4, "q_lora_rank": 7,
        "o_groups": 3, "o_lora_rank": 1, "index_n_heads": 1, "index_head_dim": 10, "index_topk": 5, "sliding_window": 5,
        "n_routed_experts": 5, "num_experts_per_tok": 5, "moe_intermediate_size": 5, "hc_mult": 3,
    }  # fmt: skip
    decoder = make_random_decoder(ModelSpec.from_config(small_config(0, 4, 128, **sizes)))
    scheduler, ids = Scheduler(decoder, kv_cache_bytes=64 << 20, backend="cpu"), some_ids(600, 0)
    logits = scheduler.logits(ids)
    with torch.inference_mode():
        torch.testing.assert_close(logits, decoder(torch.tensor([ids]))[0], atol=1e-4, rtol=0)
    for chunk in (1, 7, 129):
        assert torch.equal(scheduler.logits(ids, chunk=chunk), logits)
