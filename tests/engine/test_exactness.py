"""The machine checks behind exact results, and the guarantees of an engine that is not exact."""

from __future__ import annotations

import copy
import logging
from pathlib import Path
from typing import Any

import numba
import pytest
import torch
from torch import Tensor

import agentkit_engine.engine
from agentkit_engine import Engine, ModelSpec, SamplingParams, SavedSessionError
from agentkit_engine.model import Decoder
from agentkit_engine.runtime import Pools, Request, Runner, Scheduler
from agentkit_engine.runtime.runner import NUMERICS, CpuLimits, machine
from agentkit_kernels import invariance
from agentkit_kernels.cpu import linear as cpu_linear
from agentkit_kernels.cpu import workers as cpu_workers
from agentkit_kernels.cpu.layout import Matrix
from agentkit_kernels.invariance import check_products

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
    ("alike_from", "rows", "exact"), [(0, 8, True), (16, 16, True), (9, 8, False), (17, 16, False)]
)
def test_a_machine_without_exact_products_causes_a_warning(
    alike_from: int, rows: int, exact: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(invariance, "F", products(alike_from=alike_from))
    with caplog.at_level(logging.WARNING):
        assert check_products([torch.eye(16)], rows) == exact
    assert ("results depend on the batch" in caplog.text) != exact


@pytest.fixture(scope="module")
def decoder() -> Decoder:
    spec = ModelSpec.from_config(small_config(0, 4, 128, sliding_window=48, index_topk=8))
    return randomize_(Decoder(spec), torch.Generator().manual_seed(1)).eval()


def engine(decoder: Decoder, *, exact: bool, backend: str = "auto") -> Engine:
    return Engine(decoder, name="small", dialect="v4-preview", folder=Path("none"), exact=exact, backend=backend)


@pytest.mark.usefixtures("two_threads")
def test_without_exactness_logits_are_close(decoder: Decoder) -> None:
    """The `cpu` backend is always exact."""
    ids = some_ids(40, 0)
    exact, other = (engine(decoder, exact=promise, backend="reference") for promise in (True, False))
    torch.testing.assert_close(other.logits(ids), exact.logits(ids), atol=1e-4, rtol=0)
    with other.session() as session:
        session.append(ids)
        (token,) = session.generate(SamplingParams(temperature=0, max_tokens=1))
    assert token.logprob == pytest.approx(exact.logits(ids)[-1].log_softmax(0)[token.id].item(), abs=1e-4)


@pytest.mark.usefixtures("two_threads")
def test_without_exactness_forks_and_restored_sessions_have_the_same_bits(decoder: Decoder, tmp_path: Path) -> None:
    inexact = engine(decoder, exact=False, backend="reference")
    with inexact.session() as session:
        session.append(some_ids(150, 1))
        list(session.generate(PARAMS))
        fork = session.fork()[0]
        session.save(tmp_path / "saved")
        said = list(session.generate(PARAMS))
        assert list(fork.generate(PARAMS)) == said
    restored = engine(decoder, exact=False, backend="reference").open(tmp_path / "saved")
    assert list(restored.generate(PARAMS)) == said


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


def cpu_matrices(decoder: Decoder) -> list[Matrix]:
    """Return the matrices that a runner on a CPU packed."""
    pools = Pools(decoder.spec, slots=1, spans=1, device=torch.device("cpu"))
    found: list[Matrix] = []
    gather(Runner(decoder, pools, backend="cpu").forward, found, set())
    return found


def gather(value: object, found: list[Matrix], seen: set[int]) -> None:
    if id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, Matrix):
        found.append(value)
    elif isinstance(value, (list, tuple)):
        for part in value:
            gather(part, found, seen)
    elif type(value).__module__.startswith(("agentkit_engine.model.forward", "agentkit_kernels.cpu.linear")):
        for part in vars(value).values():
            gather(part, found, seen)


def test_packed_weights_are_held_once_and_the_decoder_still_computes_with_them(decoder: Decoder) -> None:
    packed, ids = copy.deepcopy(decoder), some_ids(40, 0)
    arrays = [matrix.unpacked for matrix in cpu_matrices(packed) if matrix.unpacked is not None]
    spans = [(array.ctypes.data, array.ctypes.data + array.nbytes) for array in arrays]
    for name, parameter in packed.named_parameters():
        if parameter.dim() > 1 and name.startswith("layers") and not name.endswith("ape"):
            assert any(low <= parameter.data_ptr() < high for low, high in spans), name
    with torch.inference_mode():
        torch.testing.assert_close(packed(torch.tensor([ids])), decoder(torch.tensor([ids])))
    packed(torch.tensor([ids])).sum().backward()  # they are still parameters


def test_any_number_of_threads_gives_the_same_bits(decoder: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts of several blocks of queries beside short ones, and decoding; every operation shares its work."""
    for module in (cpu_linear, cpu_workers):
        monkeypatch.setattr(module, "SHARED", 1)
    found = []
    for count in (1, 2, 3, 4):
        limits = CpuLimits(threads=count)
        computing = Engine(decoder, name="s", dialect="v4-preview", folder=Path("none"), backend="cpu", limits=limits)
        scheduler, requests = computing.scheduler, [Request(some_ids(length, length)) for length in (600, 3, 170)]
        while any(request.logits_V is None for request in requests):
            scheduler.step([request for request in requests if request.logits_V is None])
        for request in requests:
            request.push(7)
        scheduler.step(requests)
        found.append([computing.logits(some_ids(600, 0)), *(request.logits_V for request in requests)])
    for others in found[1:]:
        for logits, expected in zip(others, found[0], strict=True):
            assert logits is not None and expected is not None and torch.equal(logits, expected)


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
