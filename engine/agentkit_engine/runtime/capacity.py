"""The number of slots and spans that fit into a device's memory.

A CPU takes memory only as it is used, so there the limit is given. On a GPU the pools are allocated once, before the
first forward, and nothing else may run out of memory later. So `plan` divides what is left of the free memory after
the weights that a backend has yet to pack, the activations of the largest forward, and `HEADROOM`.

The activations are those of the `triton` backend. `reference` is for tests and keeps scores of all heads and entries:
on a GPU it needs a limit, `kv_cache_bytes`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch

from agentkit_engine.errors import OutOfMemoryError
from agentkit_engine.model.decoder import Decoder
from agentkit_engine.runtime.state import SPAN, Pools
from agentkit_engine.spec import ModelSpec
from agentkit_engine.weights.memory import GIB

KV_CACHE_BYTES = 2 << 30
"""Default limit on a CPU."""
SLOTS = 64
"""Minimum number of live sequences on a CPU. When no slot is free, the least recently used session loses its slot."""
CHECKPOINTS = 192
"""Additional slots for checkpoints, limited to a quarter of the memory for spans."""
MAX_SPANS = 1 << 20
"""Most spans of a pool, which hold 2^28 tokens."""
HEADROOM = 0.05
"""Part of a GPU's memory that stays free: for CUDA graphs, libraries, fragmentation, and blocks of other sizes."""


class DeviceMemory(NamedTuple):
    """Bytes of a device's memory, free and in all."""

    free: int
    total: int


MemoryReader = Callable[[torch.device], DeviceMemory]


def read_memory(device: torch.device) -> DeviceMemory:
    """Return the memory of a GPU, after torch has given back what it does not use."""
    torch.cuda.empty_cache()
    return DeviceMemory(*torch.cuda.mem_get_info(device))


@dataclass(frozen=True, slots=True)
class KVCapacity:
    """The state of all sessions that an engine can hold, on each of its devices.

    Attributes:
        slots: Live sequences and checkpoints.
        spans: Spans of 256 tokens.
        bytes_per_slot, bytes_per_span: Bytes of each.
        host_slots, host_spans: The same in host memory, for evicted state.
    """

    slots: int
    spans: int
    bytes_per_slot: int
    bytes_per_span: int
    host_slots: int = 0
    host_spans: int = 0

    @property
    def tokens(self) -> int:
        """Tokens that fit at once, each counted once where sessions share it."""
        return self.spans * SPAN

    @property
    def bytes(self) -> int:
        """Bytes of the pools on the device; one more span stays zero."""
        return self.slots * self.bytes_per_slot + (self.spans + 1) * self.bytes_per_span

    @property
    def host_bytes(self) -> int:
        """Bytes of host memory."""
        return self.host_slots * self.bytes_per_slot + self.host_spans * self.bytes_per_span


def within(sizes: Pools, kv_cache_bytes: int, host_cache_bytes: int = 0) -> KVCapacity:
    """Return the capacity of `kv_cache_bytes` for spans, with slots on top, and of host memory.

    `sizes` are pools of any size.
    """
    slot, span = sizes.bytes_per_slot, max(1, sizes.bytes_per_span)
    spans = max(1, min(kv_cache_bytes // span, MAX_SPANS))
    slots = SLOTS + min(CHECKPOINTS, kv_cache_bytes // 4 // slot)
    host_slots = host_cache_bytes // 4 // slot
    host_spans = (host_cache_bytes - host_slots * slot) // span
    return KVCapacity(slots, spans, slot, sizes.bytes_per_span, host_slots, host_spans)


def plan(
    spec: ModelSpec,
    sizes: Pools,
    memory: DeviceMemory,
    *,
    batched_tokens: int,
    pending_bytes: int = 0,
    kv_cache_bytes: int | None = None,
    host_cache_bytes: int = 0,
) -> KVCapacity:
    """Return the capacity of a device with this memory, or check that `kv_cache_bytes` fit.

    Args:
        spec: The model.
        sizes: Its pools, of any size.
        memory: The device's memory, with the decoder in it.
        batched_tokens: Most tokens of a forward.
        pending_bytes: Weights that the backend will allocate; see `pending_weights`.
        kv_cache_bytes: Memory for spans, with slots on top; None to use what is free, at most a quarter of it for
            slots.
        host_cache_bytes: See `within`.

    Raises:
        OutOfMemoryError: not even one session of one span fits, or not `kv_cache_bytes`.
    """
    activations, headroom = activation_bytes(spec, batched_tokens), int(HEADROOM * memory.total)
    available = max(0, memory.free - pending_bytes - activations - headroom)
    slot, span = sizes.bytes_per_slot, sizes.bytes_per_span
    capacity = within(sizes, kv_cache_bytes or 0, host_cache_bytes)
    if kv_cache_bytes is None:
        most = SLOTS + CHECKPOINTS
        slots = max(1, min(most, available // 4 // slot))
        useful = most * -(-spec.max_position_embeddings // SPAN)
        spans = max(1, min((available - slots * slot) // max(1, span) - 1, useful, MAX_SPANS))
        capacity = KVCapacity(slots, spans, slot, span, capacity.host_slots, capacity.host_spans)
    if capacity.bytes <= available:
        return capacity
    shown = ", ".join(
        f"{size / GIB:.2f} GiB {use}"
        for size, use in (
            (memory.total - memory.free, "in use"),
            (pending_bytes, "for weights that are yet to be packed"),
            (activations, f"for a forward of {batched_tokens} tokens"),
            (headroom, "to stay free"),
        )
    )
    if kv_cache_bytes is None:
        what = f"one session of {SPAN} tokens"
        remedy = 'use kv_cache_dtype="fp8", dtype="int8", more devices, or a GPU that nothing else uses'
    else:
        what, remedy = f"kv_cache_bytes={kv_cache_bytes}, with its slots,", "use less, or None for what is free"
    raise OutOfMemoryError(
        f"{what} needs {capacity.bytes / GIB:.2f} GiB, and the device has {available / GIB:.2f} GiB for it: of "
        f"{memory.total / GIB:.2f} GiB, {shown}; {remedy}"
    )


def activation_bytes(spec: ModelSpec, tokens: int) -> int:
    """Return a bound on the memory for activations of a forward of `tokens` tokens.

    Elements count as float32, twice what most of them take, because results live beside their inputs.
    """
    inner, active = spec.moe_intermediate_size, spec.num_experts_per_tok + spec.n_shared_experts
    compressors = 4 * (spec.head_dim + spec.index_head_dim)  # values and scores of two overlapping windows
    elements = (
        3 * spec.hc_mult * spec.hidden_size  # streams: before, after, and mixed
        + spec.q_lora_rank + spec.head_dim + compressors + spec.index_n_heads
        + 3 * spec.num_attention_heads * spec.head_dim  # queries, with rotation, and outputs
        + 2 * spec.index_n_heads * spec.index_head_dim
        + active * (3 * inner + spec.hidden_size)  # gate and up, their product, and outputs
        + 3 * spec.vocab_size  # logits, probabilities, and a copy
    )  # fmt: skip
    indexed = any(layer.attention == "csa" for layer in spec.layers)
    best = max(32, 1 << (spec.index_topk - 1).bit_length())
    candidates = 8 * 8 * (4 * best + best) if indexed else 0  # 8 bytes each, in 8 parts, as buffers and lists
    return tokens * (4 * elements + candidates)


def pending_weights(decoder: Decoder, *, ranks: int = 1, expert_cache_bytes: int | None = None) -> int:
    """Return a bound on the bytes that a backend allocates when it packs a decoder for one of `ranks` devices.

    These are matrices that are still in files, and copies of those that share an input, which are joined. Of routed
    experts a device packs its share, and holds `expert_cache_bytes` of it at most.
    """
    stored = sum(rows.nbytes for rows in decoder.packed.values() if len(rows.shape) == 2)
    experts = sum(rows.nbytes for rows in decoder.packed.values() if len(rows.shape) == 3) // ranks
    stored += experts if expert_cache_bytes is None else min(experts, expert_cache_bytes)
    joined = [
        weight.nbytes
        for name, weight in decoder.named_parameters()
        if weight.dim() == 2 and name not in ("embed.weight", "head.weight")
    ]
    return stored + sum(joined)
