"""Entries and open rows agree with their torch twin, for every division of a text into forwards."""

from __future__ import annotations

import itertools
import mmap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from agentkit_kernels.ops import Compressor, Plan
from agentkit_kernels.reference import quantize
from agentkit_kernels.reference.batch import Batch
from agentkit_kernels.reference.compressor import compress as reference
from agentkit_kernels.reference.quantize import kv_row_bytes
from agentkit_kernels.reference.state import PooledState
from agentkit_kernels.triton.compressor import compress
from agentkit_kernels.triton.launch import LAUNCHES, launch
from agentkit_kernels.triton.quantize import load_kv_rows

SPAN = 256
COLUMN = 5
ROTARY = 16


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def compressor(ratio: int, size: int) -> Compressor:
    width = size * (2 if ratio == 4 else 1)
    frequencies = 0.5 ** torch.arange(ROTARY // 2, dtype=torch.float32)
    return Compressor(
        "", COLUMN, ratio, ratio == 4, normal(ratio, width, seed=1), normal(size, seed=2), 1e-6, frequencies
    )


@dataclass
class Pools:
    """The state of a layer; whatever no forward has written is NaN."""

    values: Tensor
    scores: Tensor
    entries: Tensor

    @classmethod
    def empty(cls, of: Compressor, slots: int, spans: int) -> Pools:
        series = 2 if of.overlap else 1
        rows = slots, series * of.ratio + 12, of.ape.shape[1]
        values, scores = torch.zeros(rows), torch.full(rows, -torch.inf)
        return cls(values, scores, torch.full((spans, SPAN // of.ratio, len(of.norm)), torch.nan))

    def as_state(self) -> PooledState:
        return PooledState({"values": self.values, "scores": self.scores, "entries": self.entries})


def run(
    of: Compressor,
    projected: Tensor,
    pools: Pools,
    lengths: Sequence[int],
    starts: Sequence[int],
    slots: Sequence[int],
    tables: Sequence[Sequence[int]],
    **formats: object,
) -> None:
    """One forward on the kernels."""
    cu_seqlens = torch.tensor([0, *itertools.accumulate(lengths)])
    compress(
        projected, of, cu_seqlens, torch.tensor(starts), torch.tensor(slots), torch.tensor(tables), max(lengths),
        pools.values, pools.scores, pools.entries, **formats,  # type: ignore[arg-type]
    )  # fmt: skip


def forward(rows: int, of: Compressor, seed: int) -> Tensor:
    """The fused projection of a forward: NaN beside the compressor's columns, and three rows of padding."""
    width = of.ape.shape[1]
    projected = torch.full((rows + 3, COLUMN + 2 * width + 4), torch.nan)
    projected[:rows, COLUMN : COLUMN + 2 * width] = normal(rows, 2 * width, seed=seed)
    return projected


def test_no_rows_are_no_launch() -> None:
    of, none, before = compressor(4, 96), torch.empty(0, dtype=torch.int64), LAUNCHES.total()
    pools = Pools.empty(of, 1, 1)
    state = pools.values, pools.scores, pools.entries
    for projected in (forward(5, of, 0)[:0], forward(5, of, 0)):  # padding is of no sequence
        compress(projected, of, torch.tensor([0]), none, none, none.view(0, 1), 0, *state)
    assert LAUNCHES.total() == before


@pytest.mark.parametrize(("ratio", "size"), [(4, 96), (128, 96)])
@pytest.mark.parametrize(
    "lengths",
    [
        [(1,)] * 9,
        [(3,), (1,), (5,), (140,)],
        [(127, 4), (1, 1), (1, 3), (129, 1)],
        [(130, 0, 7), (0, 5, 1), (130, 4, 2)],
    ],
    ids=["decode", "alone", "pairs", "threes"],
)
def test_every_division_into_forwards_equals_the_twin(lengths: list[tuple[int, ...]], ratio: int, size: int) -> None:
    of, sequences = compressor(ratio, size), len(lengths[0])
    slots, tables = [4, 0, 2][:sequences], [[1, 5], [4, 2], [3, 6]][:sequences]
    actual, expected = Pools.empty(of, 5, 7), Pools.empty(of, 5, 7)
    starts = [0] * sequences
    for seed, new in enumerate(lengths):
        projected = forward(sum(new), of, seed)
        run(of, projected, actual, new, starts, slots, tables)
        for b, length in enumerate(new):
            if not length:
                continue  # the twin has no empty sequences
            plan = Plan([0] * length, [length], [starts[b]], [slots[b]], [tables[b]])
            low = sum(new[:b])
            reference(projected[low : low + length], of, Batch(plan, torch.device("cpu")), expected.as_state())
        starts = [start + length for start, length in zip(starts, new, strict=True)]
    for one, other in ((actual.values, expected.values), (actual.scores, expected.scores)):
        torch.testing.assert_close(one, other, rtol=0, atol=0)
    torch.testing.assert_close(actual.entries, expected.entries, rtol=1e-5, atol=1e-5, equal_nan=True)
    completed = sum(start // ratio for start in starts)
    assert int(actual.entries.isfinite().all(-1).sum()) == completed


def test_more_sequences_than_are_searched_at_once_find_their_entries() -> None:
    of, sequences = compressor(4, 32), 66
    starts = [3 if b in (0, 30, 63, 64, 65) else b % 3 for b in range(sequences)]
    slots, tables = list(range(sequences)), [[b + 1] for b in range(sequences)]
    actual, expected = Pools.empty(of, sequences, sequences + 1), Pools.empty(of, sequences, sequences + 1)
    for pools in (actual, expected):
        pools.values.copy_(normal(*pools.values.shape))
        pools.scores.copy_(normal(*pools.scores.shape, seed=1))
        pools.scores[:, 4:] = -torch.inf  # rows before the first token
    projected = forward(sequences, of, 0)
    run(of, projected, actual, [1] * sequences, starts, slots, tables)
    plan = Plan([0] * sequences, [1] * sequences, starts, slots, tables)
    reference(projected[:sequences], of, Batch(plan, torch.device("cpu")), expected.as_state())
    torch.testing.assert_close(actual.entries, expected.entries, rtol=1e-5, atol=1e-5, equal_nan=True)
    torch.testing.assert_close(actual.scores, expected.scores, rtol=0, atol=0)
    assert int(actual.entries.isfinite().all(-1).sum()) == 5


@pytest.mark.parametrize("ratio", [4, 128])
def test_kernel_and_twin_agree_with_float64(ratio: int) -> None:
    of, length = compressor(ratio, 32), 2 * ratio
    projected = forward(length, of, 0)
    pools, expected = Pools.empty(of, 1, 2), Pools.empty(of, 1, 2)
    run(of, projected, pools, [length], [0], [0], [[1]])
    reference(
        projected[:length], of, Batch(Plan([0] * length, [length], [0], [0], [[1]]), torch.device("cpu")),
        expected.as_state(),
    )  # fmt: skip
    width = of.ape.shape[1]
    values, scores = projected[:length, COLUMN : COLUMN + 2 * width].double().tensor_split(2, 1)
    scores = scores + of.ape.double().repeat(2, 1)
    if of.overlap:
        values = torch.cat((values[:ratio, :32], values[ratio:, 32:]))
        scores = torch.cat((scores[:ratio, :32], scores[ratio:, 32:]))
    else:
        values, scores = values[ratio:], scores[ratio:]
    pooled = (scores.softmax(0) * values).sum(0)
    exact = pooled * (pooled.square().mean() + 1e-6).rsqrt() * of.norm.double()
    turns = torch.polar(torch.ones(ROTARY // 2).double(), ratio * of.frequencies.double())
    exact[-ROTARY:] = torch.view_as_real(torch.view_as_complex(exact[-ROTARY:].view(-1, 2)) * turns).flatten()
    for entries in (pools.entries, expected.entries):
        torch.testing.assert_close(entries[1, 1].double(), exact, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("ratio", [4, 128])
def test_entries_have_the_same_bits_for_every_division_and_batch(ratio: int) -> None:
    of, length = compressor(ratio, 32), 260
    projected = forward(length, of, 0)
    whole, parts = Pools.empty(of, 2, 5), Pools.empty(of, 2, 5)
    run(of, projected, whole, [length], [0], [1], [[2, 4]])
    for low, high in itertools.pairwise([0, 1, 3, 130, 255, 256, length]):
        both = torch.cat((forward(2, of, low)[:2], projected[low:high]))  # beside another sequence's tokens
        run(of, both, parts, [2, high - low], [0, low], [0, 1], [[1, 3], [2, 4]])
    for span in (2, 4):
        assert torch.equal(whole.entries[span].nan_to_num(), parts.entries[span].nan_to_num())
    assert torch.equal(whole.values[1], parts.values[1])
    assert torch.equal(whole.scores[1], parts.scores[1])


def test_bfloat16_projections_and_entries_stay_close_to_the_twin() -> None:
    of = compressor(4, 32)
    projected = forward(8, of, 0).bfloat16()
    pools, expected = Pools.empty(of, 1, 2), Pools.empty(of, 1, 2)
    pools.entries = pools.entries.bfloat16()
    run(of, projected, pools, [8], [0], [0], [[1]])
    reference(
        projected[:8].float(), of, Batch(Plan([0] * 8, [8], [0], [0], [[1]]), torch.device("cpu")), expected.as_state()
    )
    torch.testing.assert_close(pools.entries.float(), expected.entries, rtol=2**-6, atol=2**-7, equal_nan=True)


@pytest.mark.parametrize(("ratio", "length"), [(4, 41), (128, 300)])
def test_entries_can_be_key_value_rows(ratio: int, length: int) -> None:
    of, size = compressor(ratio, 80), 80
    projected = forward(length, of, 0)
    plain, packed = Pools.empty(of, 1, 3), Pools.empty(of, 1, 3)
    packed.entries = torch.full((3, SPAN // ratio, kv_row_bytes(size, ROTARY)), 0xAB, dtype=torch.uint8)
    for pools in (plain, packed):
        run(of, projected, pools, [length], [0], [0], [[2, 1]])
    per_span = SPAN // ratio
    slots = torch.tensor([(2, 1)[w // per_span] * per_span + w % per_span for w in range(length // ratio)])
    restored = load_kv_rows(packed.entries, slots, size, rotary=ROTARY, dtype=torch.float32)
    pages = torch.full_like(packed.entries, 0xAB)
    rows = plain.entries.flatten(0, 1)[slots]
    quantize.store_kv_rows(rows, slots, pages, rotary=ROTARY)
    expected = quantize.load_kv_rows(pages, slots, size, rotary=ROTARY, dtype=torch.float32)
    torch.testing.assert_close(restored[:, :-ROTARY], expected[:, :-ROTARY], rtol=0, atol=0)
    torch.testing.assert_close(restored[:, -ROTARY:], rows[:, -ROTARY:], rtol=2**-7, atol=0)
    assert bool((packed.entries[0] == 0xAB).all())


def test_index_keys_can_be_fp8() -> None:
    of = compressor(4, 32)
    projected = forward(40, of, 0)
    plain, packed = Pools.empty(of, 1, 2), Pools.empty(of, 1, 2)
    packed.entries = torch.zeros(2, SPAN // 4, 32, dtype=torch.uint8)
    scales = torch.full((2, SPAN // 4), torch.nan)
    run(of, projected, plain, [40], [0], [0], [[1]])
    run(of, projected, packed, [40], [0], [0], [[1]], key_scales=scales)
    keys = plain.entries[1, :10]
    codes, bytes_ = quantize.quantise_fp8(keys, group=32)
    assert torch.equal(packed.entries[1, :10], codes)
    assert torch.equal(scales[1, :10], quantize.decode_scale(bytes_)[:, 0])
    assert bool(scales[0].isnan().all() and scales[1, 10:].isnan().all())


@pytest.mark.parametrize("size", [32, 128])
def test_index_keys_can_be_rotated_and_rounded_to_fp4(size: int) -> None:
    of = compressor(4, size)
    projected = forward(40, of, 0)
    plain, rounded, packed = (Pools.empty(of, 1, 2) for _ in range(3))
    packed.entries, scales = torch.zeros(2, SPAN // 4, size, dtype=torch.uint8), torch.full((2, SPAN // 4), torch.nan)
    run(of, projected, plain, [40], [0], [0], [[1]])
    run(of, projected, rounded, [40], [0], [0], [[1]], fp4=True)
    run(of, projected, packed, [40], [0], [0], [[1]], fp4=True, key_scales=scales)
    keys = quantize.round_index(plain.entries[1, :10])
    assert torch.equal(rounded.entries[1, :10], keys)
    codes, expected_scales = quantize.quantise_keys(keys)
    assert torch.equal(packed.entries[1, :10], codes)
    assert torch.equal(scales[1, :10], expected_scales[:, 0])
    assert bool(rounded.entries[1, 10:].isnan().all())


def test_pools_and_rows_lie_beyond_32_bits() -> None:
    of = compressor(4, 32)
    stride = 1 << 28
    memory = torch.frombuffer(mmap.mmap(-1, 4 * (9 * stride)), dtype=torch.float32)
    near, far = Pools.empty(of, 9, 9), Pools.empty(of, 1, 1)
    far.values = memory.as_strided(near.values.shape, (stride, *near.values.stride()[1:]), 0)
    far.scores = memory.as_strided(near.scores.shape, (stride, *near.scores.stride()[1:]), 1 << 20)
    far.entries = memory.as_strided(near.entries.shape, (stride, *near.entries.stride()[1:]), 1 << 21)
    projected = forward(9, of, 0)
    far_projected = memory.as_strided(projected.shape, (stride // 2, 1), 1 << 22)
    far_projected.copy_(projected)
    for low, high in ((0, 3), (3, 9)):
        run(of, projected[low:high], near, [high - low], [low], [8], [[8]])
        run(of, far_projected[low:high], far, [high - low], [low], [8], [[8]])
    assert torch.equal(near.values[8, :9], far.values[8, :9])
    assert torch.equal(near.scores[8, :9], far.scores[8, :9])
    assert torch.equal(near.entries[8, :2], far.entries[8, :2])


@pytest.mark.parametrize("ratio", [4, 128])
def test_open_rows_of_a_short_forward_replace_none_that_an_entry_pools(
    ratio: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Programs of one launch run in any order; the interpreter computes entries first."""
    of, start = compressor(ratio, 32), 3 * ratio - 1
    projected, new = forward(start, of, 0), forward(13, of, 1)
    pools = [Pools.empty(of, 1, 3) for _ in range(2)]
    for made in pools:
        run(of, projected, made, [start], [0], [0], [[1, 2]])
    run(of, new, pools[0], [13], [start], [0], [[1, 2]])
    launches = []

    def backwards(kernel: Any, grid: tuple[int], *args: Any, **options: Any) -> None:
        launches.append(args[12])  # programs that compute entries
        launch(kernel, (grid[0] - args[12],), *args[:12], 0, *args[13:], **options)
        launch(kernel, (args[12],), *args, **options)

    monkeypatch.setattr("agentkit_kernels.triton.compressor.launch", backwards)
    run(of, new, pools[1], [13], [start], [0], [[1, 2]])
    assert len(launches) == 1
    for one, other in zip(vars(pools[0]).values(), vars(pools[1]).values(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)
    run(of, forward(14, of, 2), pools[1], [14], [start + 13], [0], [[1, 2]])
    assert len(launches) == 3


def test_tokens_that_complete_nothing_leave_open_rows_only() -> None:
    of, pools = compressor(128, 32), Pools.empty(compressor(128, 32), 1, 2)
    before = LAUNCHES["_compress"]
    run(of, forward(100, of, 0), pools, [100], [0], [0], [[1]])
    assert LAUNCHES["_compress"] == before + 2
    assert bool(pools.entries.isnan().all())
    empty = torch.empty(0, dtype=torch.int64)
    compress(
        forward(0, of, 0)[:0], of, torch.zeros(1, dtype=torch.int64), empty, empty, empty.view(0, 1), 0, pools.values,
        pools.scores, pools.entries,
    )  # fmt: skip
    assert LAUNCHES["_compress"] == before + 2


def test_pools_that_do_not_fit_are_refused() -> None:
    of, pools = compressor(4, 32), Pools.empty(compressor(4, 32), 1, 2)
    arguments = forward(1, of, 0), pools, [1], [0], [0], [[1]]
    with pytest.raises(ValueError, match=r"no format of entries of 32 columns: torch.float32 .* with scales"):
        run(of, *arguments, key_scales=torch.zeros(2, 64))
    with pytest.raises(ValueError, match="power of two of at least 32 columns, got 96"):
        run(compressor(4, 96), forward(1, compressor(4, 96), 0), Pools.empty(compressor(4, 96), 1, 2), [1], [0], [0],
            [[1]], fp4=True)  # fmt: skip
    with pytest.raises(ValueError, match="an entry pools 8 rows, but the pools have 7"):
        pools.values, pools.scores = pools.values[:, :7], pools.scores[:, :7]
        run(of, *arguments)
