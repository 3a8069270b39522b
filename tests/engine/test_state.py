"""State as data: rows that no layer of V4 keeps are allocated, forked, freed, saved and cached like V4's own.

The sizes are those of published models; the layers exist here only as declarations of their rows.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from agentkit_engine import ModelSpec, OutOfMemoryError, SavedSessionError
from agentkit_engine.runtime import Pools, Sequence, saved
from agentkit_engine.runtime.disk_cache import DiskCache
from agentkit_engine.runtime.prefix_cache import IdChain
from agentkit_engine.runtime.state import ROLLBACK, SPAN, Rows, ring_rows

from .conftest import small_config, some_ids

SPEC = ModelSpec.from_config(small_config(0))
CPU, META = torch.device("cpu"), torch.device("meta")
LENGTH = 2 * SPAN + 40
Layers = list[list[Rows]]


def mla() -> list[Rows]:
    """V3: a latent of 512 and a rotary key of 64 per token (arXiv:2412.19437)."""
    return [Rows("latent", "span", SPAN, 576, torch.bfloat16)]


def mla_with_indexer() -> list[Rows]:
    """V3.2: besides, an index key of every token, in FP8 with one scale (arXiv:2512.02556)."""
    index = [Rows("index_keys", "span", SPAN, 128, torch.uint8), Rows("index_scales", "span", SPAN, 1, torch.float32)]
    return mla() + index


def grouped_heads() -> list[Rows]:
    """Qwen3-235B-A22B: keys and values of 4 heads of 128."""
    return [Rows(name, "span", SPAN, 4 * 128, torch.bfloat16) for name in ("keys", "values")]


def v4_fp8(ratio: int, *, index_bytes: int) -> list[Rows]:
    """V4's storage format: per row 448 FP8 values, 64 rotary ones in bfloat16 and 8 scales. Open rows are float32."""
    kept = [Rows("window", "slot", ring_rows(128), 584, torch.uint8)]
    if ratio:
        kept.append(Rows("entries", "span", SPAN // ratio, 584, torch.uint8))
        kept.append(Rows("scores", "slot", ratio + ROLLBACK, 512, fill=-torch.inf))
    if ratio == 4:
        kept.append(Rows("index_entries", "span", SPAN // ratio, index_bytes, torch.uint8))
    return kept


def v41(ratio: int, source: int | None) -> list[Rows]:
    """V4.1: FP8 window rows with a scale per 32 values; entries of 512 FP4 values with a scale per 16, and index keys
    of 128 with a scale per 32, which belong to the layer `source` or to this one."""
    kept = [Rows("window", "slot", ring_rows(128), 512 + 16, torch.uint8)]
    if ratio:
        kept.append(Rows("entries", "span", SPAN // ratio, 256 + 32, torch.uint8, source=source))
        kept.append(Rows("index_entries", "span", SPAN // ratio, 64 + 4, torch.uint8, source=source))
    return kept


V4_FLASH = [0, 0, *[4, 128] * 20, 4]
V41_FLASH: Layers = [
    *([v41(0, None)] * 2),
    *(v41(2, None if index in (2, 8, 14) else (index - 2) // 6 * 6 + 2) for index in range(2, 20)),
    *(v41(1, None if index == 20 else 20) for index in range(20, 40)),
]
PUBLISHED: list[tuple[str, Layers, int]] = [
    ("V3", [mla()] * 61, 61 * 1152),
    ("V3.2", [mla_with_indexer()] * 61, 61 * (1152 + 132)),
    ("Qwen3-235B-A22B", [grouped_heads()] * 94, 94 * 2 * 1024),
    ("V4-Flash, FP4 index keys", [v4_fp8(ratio, index_bytes=68) for ratio in V4_FLASH], 3514),
    ("V4-Flash, FP8 index keys", [v4_fp8(ratio, index_bytes=132) for ratio in V4_FLASH], 3850),
    ("V4.1-Flash", V41_FLASH, 890),
]
KINDS: dict[str, Layers] = {
    "MLA": [mla()] * 2,
    "MLA with an indexer over every row": [mla_with_indexer()] * 2,
    "keys and values of heads": [grouped_heads()] * 2,
    "FP8 rows": [v4_fp8(ratio, index_bytes=132) for ratio in (0, 4, 128)],
    "shared FP4 rows": [v41(0, None), v41(2, None), v41(2, 1), v41(1, None), v41(1, 3)],
}


@pytest.mark.parametrize(("layers", "bytes_per_token"), [pytest.param(*rest, id=name) for name, *rest in PUBLISHED])
def test_pools_count_the_bytes_of_published_models(layers: Layers, bytes_per_token: int) -> None:
    pools = Pools(SPEC, slots=1, spans=1, device=META, rows=layers)
    assert pools.bytes_per_span // SPAN == bytes_per_token
    assert len(pools.layers) == len(layers)
    for declared, found in zip(layers, pools.layers, strict=True):
        for kind in declared:
            pool = found[kind.name]
            assert (pool.shape[1:], pool.dtype) == ((kind.count, kind.width), kind.dtype)
            assert len(pool) == (2 if kind.per == "span" else 1)  # span 0 stays zero


@pytest.fixture(params=KINDS)
def layers(request: pytest.FixtureRequest) -> Layers:
    return KINDS[request.param]


def make_pools(layers: Layers, *, slots: int = 3, spans: int = 8) -> Pools:
    return Pools(SPEC, slots=slots, spans=spans, device=CPU, rows=layers)


def rows_of(pools: Pools, sequence: Sequence) -> list[Tensor]:
    """Copy the bytes of everything that every layer can read of a sequence, by layer and name."""
    places = {"slot": [sequence.slot], "span": sequence.spans}
    return [
        pools.layers[index][kind.name][places[kind.per]].view(torch.uint8)
        for index, kinds in enumerate(pools.rows)
        for kind in kinds
    ]


def scribble(pools: Pools, sequence: Sequence, *, first_span: int = 0) -> None:
    """Fill a sequence's rows with random bytes, which are NaN in places."""
    for tail in pools.tails:
        tail[sequence.slot].view(torch.uint8).random_()
    for span in sequence.spans[first_span:]:
        for entries in pools.entries:
            entries[span].view(torch.uint8).random_()


def filled(pools: Pools, length: int = LENGTH) -> Sequence:
    sequence = pools.open()
    pools.reserve(sequence, length)
    sequence.length = sequence.written = length
    scribble(pools, sequence)
    return sequence


def same(left: list[Tensor], right: list[Tensor]) -> bool:
    return len(left) == len(right) and all(map(torch.equal, left, right))


def test_a_new_sequence_has_the_declared_values_in_memory_that_was_used_before(layers: Layers) -> None:
    pools = make_pools(layers, slots=1, spans=3)
    pools.close(filled(pools))
    sequence = pools.open()
    pools.reserve(sequence, LENGTH)
    for index, kinds in enumerate(layers):
        for kind in kinds:
            pool = pools.layers[index][kind.name]
            rows, value = (pool[sequence.slot], kind.fill) if kind.per == "slot" else (pool[sequence.spans], 0.0)
            assert bool((rows == value).all()), kind


def test_a_layer_reads_the_rows_of_its_source_which_count_once() -> None:
    layers = KINDS["shared FP4 rows"]
    pools = make_pools(layers)
    for reader, source in ((2, 1), (4, 3)):
        for name in ("entries", "index_entries"):
            assert pools.layers[reader][name] is pools.layers[source][name]
        assert pools.layers[reader]["window"] is not pools.layers[source]["window"]
    assert len(pools.entries) == 4 and len(pools.tails) == 5
    assert pools.bytes_per_span == SPAN * (288 + 68) * 3 // 2
    assert pools.bytes_per_slot == 5 * ring_rows(128) * 528


def test_a_fork_has_the_same_rows_and_neither_changes_the_other(layers: Layers) -> None:
    pools = make_pools(layers)
    source = filled(pools)
    before = rows_of(pools, source)
    fork = pools.fork(source)
    assert (fork.length, fork.written) == (source.length, source.written)
    assert same(rows_of(pools, fork), before)
    assert fork.spans[:2] == source.spans[:2] and fork.spans[2] != source.spans[2]
    assert pools.bytes_held == 2 * pools.bytes_per_slot + 4 * pools.bytes_per_span
    pools.reserve(fork, LENGTH + 1)
    scribble(pools, fork, first_span=2)
    assert same(rows_of(pools, source), before) and not same(rows_of(pools, fork), before)


def test_writing_to_a_shared_span_copies_it_first(layers: Layers) -> None:
    """A fork at the end of a span shares all of them, and writes to the last one after it is shortened."""
    pools = make_pools(layers)
    source = filled(pools, 2 * SPAN)
    before = rows_of(pools, source)
    fork = pools.fork(source)
    assert fork.spans == source.spans
    fork.shorten(2 * SPAN - ROLLBACK)
    pools.reserve(fork, 2 * SPAN)
    assert fork.spans[0] == source.spans[0] and fork.spans[1] != source.spans[1]
    assert same(rows_of(pools, fork), before)
    scribble(pools, fork, first_span=1)
    assert same(rows_of(pools, source), before)


def test_closing_frees_what_no_other_sequence_holds(layers: Layers) -> None:
    pools = make_pools(layers, slots=2, spans=4)
    source = filled(pools)
    fork = pools.fork(source)
    before = rows_of(pools, fork)
    with pytest.raises(OutOfMemoryError, match="1 more spans needed, 0 of 4 are free"):
        pools.reserve(fork, 3 * SPAN + 1)
    pools.close(source)
    assert (pools.free_slots, pools.free_spans) == (1, 1)
    assert same(rows_of(pools, fork), before)
    pools.close(fork)
    assert (pools.free_slots, pools.free_spans, pools.bytes_held) == (2, 4, 0)


def test_a_saved_session_restores_every_byte(layers: Layers, tmp_path: Path) -> None:
    pools, ids = make_pools(layers), some_ids(LENGTH)
    source = filled(pools)
    saved.write(tmp_path / "session", ids, bytes([1] * LENGTH), source, pools, model="toy")
    others = make_pools(layers)
    others.reserve(others.open(), SPAN)  # so that slots and spans differ
    found, _, tensors, length, written = saved.read(tmp_path / "session", model="toy", pools=others)
    assert (found, length, written) == (ids, LENGTH, LENGTH)
    restored = others.open()
    others.reserve(restored, length)
    others.write(restored, 0, tensors)
    assert restored.spans != source.spans
    assert same(rows_of(others, restored), rows_of(pools, source))


def test_the_disk_cache_restores_every_byte(layers: Layers, tmp_path: Path) -> None:
    pools, ids, chain = make_pools(layers), some_ids(LENGTH + 1), IdChain()
    source = filled(pools)
    cache = DiskCache(tmp_path / "cache", pools, model="toy", budget_bytes=1 << 30)
    cache.store(ids, chain, source)
    cache.close()
    others = make_pools(layers)
    others.reserve(others.open(), SPAN)
    later = DiskCache(tmp_path / "cache", others, model="toy", budget_bytes=1 << 30)
    stored = later.find(ids, chain, above=0)
    assert stored is not None and stored.length == LENGTH
    restored = later.load(stored, ids, chain)
    assert restored is not None and restored.spans != source.spans
    assert same(rows_of(others, restored), rows_of(pools, source))


OTHERS: dict[str, tuple[list[Rows], list[Rows]]] = {
    "another kind": (mla(), grouped_heads()),
    "another dtype": (
        [Rows("keys", "span", SPAN, 128, torch.uint8)],
        [Rows("keys", "span", SPAN, 128, torch.int8)],
    ),
    "another order": (
        [Rows("keys", "span", SPAN, 128), Rows("values", "span", SPAN, 128)],
        [Rows("values", "span", SPAN, 128), Rows("keys", "span", SPAN, 128)],
    ),
    "another owner": (
        [Rows("keys", "span", SPAN, 128), Rows("keys", "span", SPAN, 128)],
        [Rows("keys", "span", SPAN, 128), Rows("keys", "span", SPAN, 128, source=0)],
    ),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_state_of_another_layout_is_not_used(kind: str, tmp_path: Path) -> None:
    ours, theirs = ([[rows] for rows in some] if kind == "another owner" else [some] for some in OTHERS[kind])
    pools, others, ids = make_pools(ours), make_pools(theirs), some_ids(LENGTH + 1)
    source = filled(pools)
    saved.write(tmp_path / "session", ids[:-1], bytes([1] * LENGTH), source, pools, model="toy")
    with pytest.raises(SavedSessionError, match="layout is"):  # before any tensor is read
        saved.read(tmp_path / "session", model="toy", pools=others)
    cache = DiskCache(tmp_path / "cache", pools, model="toy", budget_bytes=1 << 30)
    cache.store(ids, IdChain(), source)
    cache.close()
    later = DiskCache(tmp_path / "cache", others, model="toy", budget_bytes=1 << 30)
    assert later.find(ids, IdChain(), above=0) is None
