"""Slots and spans are planned from a device's free memory, and what does not fit is refused before it is allocated."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from agentkit_engine import Engine, ModelSpec, ModelTooLargeError, OutOfMemoryError
from agentkit_engine.benchmarks.gpu.slice import random_decoder, slice_spec
from agentkit_engine.benchmarks.random_checkpoint import flash
from agentkit_engine.engine import PACKAGED_MODELS
from agentkit_engine.model import Decoder
from agentkit_engine.runtime import Pools, Scheduler, capacity
from agentkit_engine.runtime import scheduler as scheduling
from agentkit_engine.runtime.capacity import (
    CHECKPOINTS,
    HEADROOM,
    KV_CACHE_BYTES,
    SLOTS,
    DeviceMemory,
    activation_bytes,
    pending_weights,
    plan,
    within,
)
from agentkit_engine.runtime.state import SPAN
from agentkit_engine.weights import memory
from agentkit_engine.weights.checkpoint import read_layout
from agentkit_engine.weights.export import export_checkpoint
from agentkit_engine.weights.memory import GIB
from agentkit_engine.weights.stored_rows import find_packed
from agentkit_kernels.calls import FLASH as FLASH_SHAPES
from agentkit_kernels.gpu.bench import Bench

from .conftest import make_random_decoder, small_config, some_ids

SPEC = ModelSpec.from_config(small_config(0, 4, 128, sliding_window=48))
META = torch.device("meta")
FLASH = flash(0, 0, *[4, 128] * 20, 4, n_routed_experts=256)


def sizes_of(spec: ModelSpec, kv_cache_dtype: str = "auto") -> Pools:
    return Pools(spec, slots=1, spans=1, device=META, kv_cache_dtype="fp8" if kv_cache_dtype == "fp8" else "auto")


@pytest.fixture(scope="module")
def decoder() -> Decoder:
    return make_random_decoder(SPEC)


@pytest.mark.parametrize("free_gib", [4, 8, 20, 60, 120])
@pytest.mark.parametrize("kv_cache_dtype", ["auto", "fp8"])
def test_what_is_free_beside_weights_and_activations_is_used_but_for_a_span(free_gib: int, kv_cache_dtype: str) -> None:
    sizes, found = sizes_of(FLASH, kv_cache_dtype), DeviceMemory(free_gib * GIB, 140 * GIB)
    found = DeviceMemory(found.free + int(HEADROOM * found.total), found.total)
    planned = plan(FLASH, sizes, found, batched_tokens=512, pending_bytes=GIB)
    available = free_gib * GIB - GIB - activation_bytes(FLASH, 512)
    assert planned.bytes <= available < planned.bytes + planned.bytes_per_span + planned.bytes_per_slot
    assert 1 <= planned.slots <= SLOTS + CHECKPOINTS and planned.slots * planned.bytes_per_slot <= available / 4 + 1
    assert planned.tokens == planned.spans * SPAN > 10_000 * free_gib
    pools = Pools(FLASH, slots=planned.slots, spans=planned.spans, device=META, kv_cache_dtype=sizes.kv_cache_dtype)
    assert planned.bytes == sum(pool.nbytes for pool in (*pools.entries, *pools.tails))


class WithoutMemory(Bench):
    """Data of V4-Flash's shapes on no device."""

    def __init__(self) -> None:
        self.rehearse, self.device, self.shapes = False, META, FLASH_SHAPES

    def floats(self, *shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=META)

    def below(self, bound: int, *shape: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=META)


@pytest.mark.parametrize(("layers", "weights_gb"), [(4, 14.4), (16, 57.7)])
@pytest.mark.parametrize("kv_cache_dtype", ["auto", "fp8"])
def test_slices_of_flash_hold_a_million_tokens_on_one_gpu(layers: int, weights_gb: float, kv_cache_dtype: str) -> None:
    """An H200 has 141 GB."""
    spec = slice_spec(WithoutMemory(), layers)
    decoder = random_decoder(WithoutMemory(), spec)
    weights = sum(part.nbytes for part in (*decoder.packed.values(), *decoder.state_dict().values()))
    assert weights == pytest.approx(weights_gb * 1e9, rel=0.02)
    total = 141 * 10**9
    found = DeviceMemory(total - weights, total)
    pending = pending_weights(decoder)
    planned = plan(spec, sizes_of(spec, kv_cache_dtype), found, batched_tokens=512, pending_bytes=pending)
    assert len(spec.layers) == layers and planned.tokens >= 1 << 20


def test_a_small_model_takes_no_more_than_it_can_use() -> None:
    sizes = sizes_of(SPEC)
    planned = plan(SPEC, sizes, DeviceMemory(120 * GIB, 140 * GIB), batched_tokens=512)
    assert planned.slots == SLOTS + CHECKPOINTS
    assert planned.spans == planned.slots * SPEC.max_position_embeddings // SPAN


def test_activations_grow_with_the_tokens_and_the_widths() -> None:
    assert activation_bytes(FLASH, 1024) == 2 * activation_bytes(FLASH, 512)
    assert 0.5 * GIB < activation_bytes(FLASH, 512) < 4 * GIB
    for wider in (
        replace(FLASH, vocab_size=2 * FLASH.vocab_size),
        replace(FLASH, index_topk=4 * FLASH.index_topk),
        replace(FLASH, num_experts_per_tok=12),
    ):
        assert activation_bytes(wider, 512) > 1.05 * activation_bytes(FLASH, 512)


def test_not_even_one_span() -> None:
    sizes = sizes_of(FLASH)
    least = sizes.bytes_per_slot + 2 * sizes.bytes_per_span
    beside = activation_bytes(FLASH, 512) + int(HEADROOM * 10 * GIB)
    fitting = plan(FLASH, sizes, DeviceMemory(beside + least, 10 * GIB), batched_tokens=512)
    assert (fitting.slots, fitting.spans, fitting.bytes) == (1, 1, least)
    with pytest.raises(OutOfMemoryError) as raised:
        plan(FLASH, sizes, DeviceMemory(beside + least - 1, 10 * GIB), batched_tokens=512)
    assert str(raised.value) == (
        f"one session of 256 tokens needs {least / GIB:.2f} GiB, and the device has {(least - 1) / GIB:.2f} GiB for "
        f"it: of 10.00 GiB, {(10 * GIB - beside - least + 1) / GIB:.2f} GiB in use, 0.00 GiB for weights that are yet "
        f"to be packed, {activation_bytes(FLASH, 512) / GIB:.2f} GiB for a forward of 512 tokens, 0.50 GiB to stay "
        'free; use kv_cache_dtype="fp8", dtype="int8", more devices, or a GPU that nothing else uses'
    )


def test_a_given_limit_is_checked_with_its_slots() -> None:
    sizes = sizes_of(FLASH)
    found = DeviceMemory(20 * GIB, 24 * GIB)
    asked = plan(FLASH, sizes, found, batched_tokens=512, kv_cache_bytes=GIB)
    assert asked == within(sizes, GIB) and asked.slots >= SLOTS
    with pytest.raises(
        OutOfMemoryError, match=rf"kv_cache_bytes={30 * GIB}, with its slots, needs .*; use less, or None"
    ):
        plan(FLASH, sizes, found, batched_tokens=512, kv_cache_bytes=30 * GIB)


def test_host_memory_is_divided_as_it_is_used() -> None:
    sizes = sizes_of(FLASH)
    planned = plan(FLASH, sizes, DeviceMemory(60 * GIB, 140 * GIB), batched_tokens=512, host_cache_bytes=64 * GIB)
    assert 63.9 * GIB < planned.host_bytes <= 64 * GIB
    assert 15 * GIB < planned.host_slots * planned.bytes_per_slot <= 16 * GIB
    assert within(sizes, GIB).host_bytes == 0


def test_weights_in_files_and_joined_copies_are_counted(decoder: Decoder) -> None:
    matrices = {name: weight for name, weight in decoder.named_parameters() if weight.dim() == 2}
    counted = sum(weight.nbytes for weight in matrices.values()) - 2 * decoder.embed.weight.nbytes
    assert pending_weights(decoder) == counted > 0


def test_a_scheduler_allocates_what_was_planned(decoder: Decoder) -> None:
    """The reader stands for a GPU's memory."""
    seen: list[torch.device] = []
    free = activation_bytes(SPEC, 512) + pending_weights(decoder) + (64 << 20)

    def read(device: torch.device) -> DeviceMemory:
        seen.append(device)
        return DeviceMemory(free + int(HEADROOM * 2 * free), 2 * free)

    planned = Scheduler(decoder, memory=read)
    assert seen == [torch.device("cpu")]
    pools = planned.pools
    assert (pools.slots, pools.spans) == (planned.capacity.slots, planned.capacity.spans)
    assert planned.capacity.bytes == sum(pool.nbytes for pool in (*pools.entries, *pools.tails))
    assert 0.9 * (64 << 20) < planned.capacity.bytes <= 64 << 20
    ids = some_ids(40)
    assert torch.equal(planned.logits(ids), Scheduler(decoder, kv_cache_bytes=1 << 20).logits(ids))


def test_nothing_is_allocated_where_nothing_fits(decoder: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scheduling, "Runner", None)  # packs weights
    for kv_cache_bytes in (None, 1 << 20):
        with pytest.raises(OutOfMemoryError, match=r"needs .* GiB, and the device has"):
            Scheduler(decoder, memory=lambda _: DeviceMemory(1 << 20, 1 << 30), kv_cache_bytes=kv_cache_bytes)


def test_more_host_memory_than_there_is(decoder: Decoder) -> None:
    with pytest.raises(
        OutOfMemoryError, match=r"host_cache_bytes=\d+ needs .* GiB of host memory, and this machine has .*; use less"
    ):
        Scheduler(decoder, host_cache_bytes=1 << 60)


def test_on_a_cpu_the_limit_is_two_gib_and_an_engine_tells() -> None:
    engine = Engine.load("tiny")
    told = engine.kv_capacity
    assert told == within(engine.scheduler.pools, KV_CACHE_BYTES)
    assert told.spans * told.bytes_per_span <= KV_CACHE_BYTES < (told.spans + 1) * told.bytes_per_span
    assert told.tokens == SPAN * told.spans and told.host_bytes == 0
    assert Engine.load("tiny", kv_cache_bytes=1 << 20).kv_capacity.tokens < told.tokens / 1000


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_weights_are_checked_against_the_memory_of_their_device(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    free = {"cpu": 20 << 20, "cuda": 20 << 20, ("cuda" if device == "cpu" else "cpu"): 1 << 40}
    monkeypatch.setattr(memory, "available_memory", lambda found: free[found.type])
    folder = PACKAGED_MODELS["tiny"]
    layout = read_layout(folder)
    with pytest.raises(ModelTooLargeError, match=r"needs .* GiB of memory for its weights, has 0\.0 GiB") as raised:
        memory.check_memory(folder, layout.expected, layout.stored, torch.float64, {}, device=torch.device(device))
    assert f"its experts {'on disk' if device == 'cpu' else 'in host memory'}" in str(raised.value)
    assert "loaded as it is stored" in str(raised.value)


def test_gpus_divide_packed_experts_and_processes_on_a_cpu_share_memory(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    export_checkpoint(make_random_decoder(SPEC), tmp_path / "model", format="official")
    layout = read_layout(tmp_path / "model")
    packed = find_packed(layout.expected, layout.stored, int8=False, group_rows=SPEC.o_lora_rank)
    experts = sum(rows.nbytes for rows in packed.values() if len(rows.shape) == 3)
    everything = memory._needed(layout.expected, torch.bfloat16, packed)
    arguments = (tmp_path / "model", layout.expected, layout.stored, torch.bfloat16, packed)
    for device, devices, needed in (
        ("cuda", 1, everything),
        ("cuda", 2, everything - experts // 2),
        ("cuda", 4, everything - 3 * experts // 4),
        ("cpu", 2, everything),
    ):
        monkeypatch.setattr(memory, "available_memory", lambda _, enough=needed: enough)
        memory.check_memory(*arguments, device=torch.device(device), devices=devices)
        monkeypatch.setattr(memory, "available_memory", lambda _, enough=needed: enough - 1)
        with pytest.raises(ModelTooLargeError):
            memory.check_memory(*arguments, device=torch.device(device), devices=devices)


def test_experts_beside_a_gpu_need_host_memory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    export_checkpoint(make_random_decoder(SPEC), tmp_path / "model", format="official")
    layout = read_layout(tmp_path / "model")
    packed = find_packed(layout.expected, layout.stored, int8=False, group_rows=SPEC.o_lora_rank)
    experts = sum(rows.nbytes for rows in packed.values() if len(rows.shape) == 3)
    arguments = (tmp_path / "model", layout.expected, layout.stored, torch.bfloat16, packed, 1)
    for device, host in ((1 << 40, experts), (memory._needed(layout.expected, torch.bfloat16, packed, 1), 1 << 40)):
        monkeypatch.setattr(memory, "available_memory", lambda found=None, h=host, d=device: h if found is None else d)
        memory.check_memory(*arguments, device=torch.device("cuda"))
    monkeypatch.setattr(memory, "available_memory", lambda found=None: experts - 1 if found is None else 1 << 40)
    with pytest.raises(ModelTooLargeError, match="expert_cache_bytes keeps its experts in host memory, which needs"):
        memory.check_memory(*arguments, device=torch.device("cuda"))


def test_a_gpu_gives_its_free_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (3, 4) if device.index == 1 else (1, 2))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    assert capacity.read_memory(torch.device("cuda:1")) == DeviceMemory(3, 4)
    assert memory.available_memory(torch.device("cuda:1")) == 3
    assert memory.available_memory(torch.device("cpu")) > 1 << 20
