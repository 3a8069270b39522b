"""Engines on the Triton backend, loaded from folders in the official layout, against engines on the reference backend.

Activations are float32 unless a test says otherwise. The interpreter takes about 0.1 s per row and layer.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from agentkit_engine import Engine
from agentkit_engine.engine import read_decoder
from agentkit_engine.runtime.scheduled import ScheduledTokens
from agentkit_engine.sampling_params import SamplingParams
from agentkit_engine.weights.checkpoint import load_checkpoint
from agentkit_engine.weights.export import Format, export_checkpoint
from agentkit_kernels.triton.backend import Triton
from agentkit_kernels.triton.launch import LAUNCHES

FLOAT32, BFLOAT16 = 1e-4, 4e-2
"""Tolerances, relative and absolute, for logits of about 1: of float32 activations, and of bfloat16 ones."""
KERNELS = {
    "_attend_kernel", "_combine", "_compress", "_down", "_gate_up", "_index_scan", "_linear", "_merge_kernel", "_qkv",
    "_read", "_rms_norm", "_rotations", "_route_kernel", "_swiglu", "_write_and_mix",
}  # fmt: skip
GREEDY = SamplingParams(temperature=0, max_tokens=3)
MakeFolder = Callable[..., Path]


@pytest.fixture(scope="module")
def make_folder(tmp_path_factory: pytest.TempPathFactory, small_decoder: Callable[..., Any]) -> MakeFolder:
    """Export a random model of the given compression ratios."""

    def make(format: Format, *ratios: int, mtp: bool = False, **sizes: int) -> Path:
        folder = tmp_path_factory.mktemp("model")
        export_checkpoint(small_decoder(*ratios, mtp=mtp, **sizes), folder, format=format)
        return folder

    return make


def some_ids(count: int, seed: int = 0) -> list[int]:
    ids: list[int] = torch.randint(2, 48, (count,), generator=torch.Generator().manual_seed(seed)).tolist()
    return ids


def assert_close(found: Tensor, expected: Tensor, tolerance: float) -> None:
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("format", ["bf16", "official", "int8"])
def test_a_stack_gives_the_logits_of_the_reference(make_folder: MakeFolder, format: Format) -> None:
    folder = make_folder(format, 0, 4, 128)
    triton, reference = Engine.load(folder, backend="triton"), Engine.load(folder, backend="reference")
    assert bool(triton.decoder.packed) == (format != "bf16")
    LAUNCHES.clear()
    text = some_ids(9)
    assert_close(triton.logits(text), reference.logits(text), FLOAT32)
    assert set(LAUNCHES) >= KERNELS


def test_experts_in_host_memory_give_the_bits_of_resident_ones(make_folder: MakeFolder) -> None:
    folder = make_folder("official", 0, 4)
    text, model = some_ids(9), Engine.load(folder, backend="triton")
    resident = model.logits(text)
    spec = model.spec
    stacks = [rows.nbytes for rows in model.decoder.packed.values() if len(rows.shape) == 3]
    one = sum(stacks) // spec.n_routed_experts  # bytes of one expert of every layer
    few = Engine.load(folder, backend="triton", expert_cache_bytes=spec.num_experts_per_tok * one)
    assert torch.equal(few.logits(text), resident)
    assert torch.equal(few.scheduler.logits(text, chunk=4), resident)
    ops = few.scheduler.runner.forward.ops
    assert isinstance(ops, Triton)
    assert len(ops.pinned) == 2 * len(spec.layers)
    assert {stack.slots for stack in ops.pinned} == {spec.num_experts_per_tok}
    assert max(stack.copied for stack in ops.pinned) > spec.n_routed_experts  # some were replaced, and copied again
    for too_few in (2 * one - 1, 7):
        message = (
            rf"experts of each layer that one token chooses, 2 x {one} bytes, got {too_few}; pass {2 * one} or more"
        )
        with pytest.raises(ValueError, match=message):
            Engine.load(folder, backend="triton", expert_cache_bytes=too_few)


def test_entries_of_hca_give_the_logits_of_the_reference(make_folder: MakeFolder) -> None:
    folder = make_folder("official", 128)
    text = some_ids(131)
    found = Engine.load(folder, backend="triton").logits(text)
    assert_close(found, Engine.load(folder, backend="reference").logits(text), FLOAT32)


def test_rows_in_fp8_stay_near_the_reference_in_any_chunks(
    make_folder: MakeFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The interpreter truncates to bfloat16 where the reference rounds."""
    folder = make_folder("official", 4, head_dim=72)
    triton = Engine.load(folder, backend="triton", kv_cache_dtype="fp8")
    reference = Engine.load(folder, backend="reference", kv_cache_dtype="fp8")
    text = some_ids(9)
    whole = triton.logits(text)
    assert_close(whole, reference.logits(text), BFLOAT16)
    assert not torch.equal(whole, Engine.load(folder, backend="triton").logits(text))
    monkeypatch.setattr("agentkit_kernels.triton.backend.DECODING", 2)  # larger chunks are prefilled
    assert torch.equal(triton.scheduler.logits(text, chunk=4), whole)


def test_quantised_activations_give_the_logits_of_the_reference_in_any_chunks(
    make_folder: MakeFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The hidden rows have one group of 128 columns and a part of one; two entries compete for one place."""
    folder, text = make_folder("official", 4, hidden_size=160, index_head_dim=32), some_ids(9)
    options: dict[str, Any] = {"backend": "triton", "quantize_activations": True}
    triton = Engine.load(folder, **options)
    monkeypatch.setattr("agentkit_kernels.triton.backend.DECODING", 2)  # the whole text is prefilled
    LAUNCHES.clear()
    whole = triton.logits(text)
    assert set(LAUNCHES) >= (KERNELS - {"_merge_kernel", "_read"}) | {"_round_activations"}
    assert torch.equal(triton.scheduler.logits(text, chunk=1), whole)
    few = Engine.load(folder, expert_cache_bytes=1 << 17, **options)
    assert torch.equal(few.logits(text[:2]), whole[:2])
    assert few.scheduler.runner.forward.ops.pinned  # type: ignore[attr-defined]
    options["backend"] = "reference"
    errors = (whole - Engine.load(folder, **options).logits(text)).abs().amax(1)
    # A sum in another order may round a value up that another rounds down; the rest of that row then differs.
    assert float(errors.median()) < FLOAT32 and int((errors > 10 * FLOAT32).sum()) <= 1
    plain = Engine.load(folder, backend="reference").logits(text)
    assert float((whole - plain).abs().mean()) > 0.01


def test_a_gpu_holds_bfloat16_where_it_is_exact(make_folder: MakeFolder) -> None:
    folder = make_folder("official", 4)
    for device, dtype in (("meta", torch.bfloat16), ("cpu", torch.float32)):
        decoder, _ = read_decoder(folder, device=torch.device(device), backend="triton", dtype=None)
        assert decoder.embed.weight.dtype == dtype
        assert decoder.hc_head_fn.dtype == torch.float32
        assert decoder.packed


def test_bfloat16_activations_stay_near_the_reference(make_folder: MakeFolder) -> None:
    """As on a GPU: packed weights, bfloat16 for the others, and logits of experts and tokens in float32."""
    folder = make_folder("official", 0, 4)
    decoder, dialect = load_checkpoint(folder, device=torch.device("cpu"), dtype=None, packed=True)
    assert decoder.embed.weight.dtype == torch.bfloat16
    triton = Engine(decoder, name="small", dialect=dialect, folder=folder, backend="triton")
    text = some_ids(7)
    assert_close(triton.logits(text), Engine.load(folder, backend="reference").logits(text), BFLOAT16)


def test_a_row_has_the_same_bits_alone_in_a_batch_in_chunks_and_decoded(
    make_folder: MakeFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    triton = Engine.load(make_folder("official", 0, 4, mtp=True), backend="triton")
    monkeypatch.setattr("agentkit_kernels.triton.backend.DECODING", 2)  # larger chunks are prefilled
    monkeypatch.setattr("agentkit_kernels.triton.indexer.FEW_ROWS", 2)
    text = some_ids(7)
    whole = triton.logits(text)
    assert torch.equal(triton.scheduler.logits(text, chunk=1), whole)
    runner, pools = triton.scheduler.runner, triton.scheduler.pools
    first, second = pools.open(), pools.open()
    for sequence in (first, second):
        pools.reserve(sequence, len(text))
    runner.step([ScheduledTokens(first, text[:4])])
    batch = runner.step([ScheduledTokens(second, text[:3]), ScheduledTokens(first, text[4:])], all_rows=True).logits_RV
    assert torch.equal(batch, torch.cat((whole[:3], whole[4:])))


def test_forks_and_saved_sessions_continue_like_a_live_one(make_folder: MakeFolder, tmp_path: Path) -> None:
    folder = make_folder("bf16", 0, 4, mtp=True)
    triton, reference = Engine.load(folder, backend="triton"), Engine.load(folder, backend="reference")
    expected = reference.session()
    expected.append(some_ids(6))
    with triton.session() as live:
        live.append(some_ids(6))
        [fork] = live.fork()
        live.save(tmp_path / "session")
        tokens = list(live.generate(GREEDY))
        assert list(fork.generate(GREEDY)) == tokens
    with triton.open(tmp_path / "session") as restored:
        assert list(restored.generate(GREEDY)) == tokens
    assert [token.id for token in tokens] == [token.id for token in expected.generate(GREEDY)]
    assert triton.scheduler.mtp_drafted


def test_without_exactness_products_may_depend_on_the_number_of_rows(
    make_folder: MakeFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("agentkit_kernels.triton.linear.FEW_ROWS", 4)  # as for more than 64 rows
    folder, text = make_folder("bf16", 0, hidden_size=320), some_ids(5)
    exact, inexact = (
        Engine.load(folder, backend="triton", dtype="bfloat16", exact=promise).logits(text) for promise in (True, False)
    )
    assert_close(inexact, exact, BFLOAT16)
    assert not torch.equal(inexact, exact)
