"""Experts that stay on disk: the bits of resident ones, within a number of bytes, and less memory to load."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from agentkit_engine import Engine
from agentkit_engine.errors import CheckpointError, ModelTooLargeError
from agentkit_engine.sampling_params import SamplingParams
from agentkit_engine.spec import ModelSpec
from agentkit_engine.weights import memory
from agentkit_engine.weights.export import Format, export_checkpoint
from agentkit_kernels.cpu import Cpu, linear, workers
from agentkit_kernels.cpu.expert_store import ExpertStore

from .conftest import make_random_decoder, small_config, some_ids

IDS = some_ids(150)
GREEDY = SamplingParams(temperature=0, max_tokens=9)


@pytest.fixture(params=["official", "int8"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A folder of packed experts whose width fills no panel, with layers of every kind and a draft block."""
    format: Format = request.param
    spec = ModelSpec.from_config(small_config(0, 4, 128, mtp=True, moe_intermediate_size=96))
    export_checkpoint(make_random_decoder(spec), tmp_path, format=format)
    return tmp_path


def store_of(engine: Engine) -> ExpertStore:
    ops = engine.scheduler.runner.forward.ops
    assert isinstance(ops, Cpu) and ops.expert_store is not None
    return ops.expert_store


@pytest.mark.parametrize("matrices", [1, 3, 1000])
def test_experts_on_disk_give_the_bits_of_resident_ones(folder: Path, matrices: int) -> None:
    resident = Engine.load(folder)
    capacity = matrices * 40_000
    stored = Engine.load(folder, expert_cache_bytes=capacity)
    store = store_of(stored)
    assert store.held == store.read_bytes == 0
    assert torch.equal(stored.logits(IDS), resident.logits(IDS))
    assert 0 < store.held <= capacity
    assert len(store.read_experts) > 3 * 8  # most experts of three layers, two stacks each
    with stored.session() as a, resident.session() as b:
        for session in (a, b):
            session.append(IDS[:40])
        assert list(a.generate(GREEDY)) == list(b.generate(GREEDY))
    assert stored.fingerprint == resident.fingerprint


@pytest.mark.parametrize("folder", ["official"], indirect=True)
def test_experts_in_memory_are_not_read_again(folder: Path) -> None:
    store = store_of(engine := Engine.load(folder, expert_cache_bytes=1 << 30))
    engine.logits(IDS)
    once = store.read_bytes
    assert once == store.held
    engine.logits(IDS)
    assert store.read_bytes == once
    store.clear()
    engine.logits(IDS)
    assert store.read_bytes == store.held == once

    store = store_of(engine := Engine.load(folder, expert_cache_bytes=once // 2))
    engine.logits(IDS)
    first = store.read_bytes
    engine.logits(IDS)
    assert once // 2 >= store.held > once // 3 and once < store.read_bytes <= 2 * first


@pytest.mark.parametrize("folder", ["official"], indirect=True)
def test_the_system_reads_no_more_than_the_experts(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    advised: list[int] = []
    monkeypatch.setattr(os, "posix_fadvise", lambda fd, start, size, advice: advised.append(advice))
    Engine.load(folder).logits(IDS)
    assert not advised
    Engine.load(folder, expert_cache_bytes=1 << 20).logits(IDS)
    assert set(advised) == {os.POSIX_FADV_RANDOM}


@pytest.mark.parametrize("folder", ["official"], indirect=True)
def test_a_cache_that_holds_no_expert_is_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"must hold at least one expert's matrix, \d+ bytes, got 1000$"):
        Engine.load(folder, expert_cache_bytes=1000)


def test_only_packed_experts_stay_on_disk(tmp_path: Path) -> None:
    export_checkpoint(make_random_decoder(ModelSpec.from_config(small_config(0))), tmp_path, format="bf16")
    with pytest.raises(ValueError, match="expert_cache_bytes needs experts that stay packed"):
        Engine.load(tmp_path, expert_cache_bytes=1 << 20)
    resident = Engine.load(tmp_path, dtype="int8")
    stored = Engine.load(tmp_path, dtype="int8", expert_cache_bytes=1 << 20)
    assert torch.equal(stored.logits(IDS), resident.logits(IDS))


@pytest.mark.parametrize(
    ("options", "error", "problem"),
    [
        ({"expert_cache_bytes": 0}, ValueError, "expert_cache_bytes must be at least 1 byte, got 0"),
        ({"expert_cache_bytes": 1.5}, TypeError, "expert_cache_bytes must be a whole number of bytes, got 1.5"),
        ({"threads": 0}, ValueError, "threads must be at least 1, got 0"),
        ({"threads": True}, TypeError, "threads must be a whole number or None, got True"),
        ({"threads": 2, "backend": "reference"}, ValueError, 'threads is an option of backend="cpu"'),
        ({"expert_cache_bytes": 9, "backend": "reference"}, ValueError, "expert_cache_bytes is an option of"),
    ],
)
def test_options_of_the_cpu_backend_are_checked(options: dict[str, Any], error: type[Exception], problem: str) -> None:
    with pytest.raises(error, match=re.escape(problem)):
        Engine.load("tiny", **options)


@pytest.mark.parametrize("folder", ["official"], indirect=True)
def test_experts_on_disk_count_with_their_cache_only(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    experts = sum(rows.nbytes for rows in Engine.load(folder).decoder.packed.values() if len(rows.shape) == 3)
    needed: list[int] = []
    monkeypatch.setattr(memory, "GIB", 1)
    monkeypatch.setattr(memory, "available_memory", lambda *_: 1)
    for cache in (None, 100_000):
        with pytest.raises(ModelTooLargeError, match=r"needs ([\d.]+) GiB of memory") as caught:
            Engine.load(folder, expert_cache_bytes=cache)
        found = re.search(r"needs ([\d.]+) GiB", str(caught.value))
        assert found is not None
        needed.append(int(float(found[1])))
    assert needed[0] - needed[1] == experts - 100_000 > 0


@pytest.mark.parametrize("folder", ["official"], indirect=True)
def test_an_expert_that_is_damaged_is_an_error_when_it_is_used(folder: Path) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    tensors["layers.1.ffn.experts.2.w1.scale"].view(torch.uint8).fill_(255)
    save_file(tensors, path)
    engine = Engine.load(folder, expert_cache_bytes=1 << 20)
    for _ in range(2):
        with pytest.raises(CheckpointError, match="found NaN") as caught:
            engine.logits(IDS)
        assert caught.value.tensor == "layers.1.ffn.experts.2.w1.scale"


def test_any_number_of_threads_gives_the_same_bits(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (linear, workers):
        monkeypatch.setattr(module, "SHARED", 1)  # share products of any size
    found = []
    for threads in (1, 2, 3):
        engine = Engine.load(folder, threads=threads, expert_cache_bytes=None if threads == 2 else 200_000)
        ops = engine.scheduler.runner.forward.ops
        assert isinstance(ops, Cpu) and ops.workers.count == threads
        with engine.session() as session:
            session.append(IDS[:40])
            found.append((engine.logits(IDS), list(session.generate(GREEDY))))
    for logits, tokens in found[1:]:
        assert torch.equal(logits, found[0][0])
        assert tokens == found[0][1]
