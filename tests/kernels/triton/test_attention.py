"""Sparse attention against its formula, row by row, over raw and FP8 rows."""

from __future__ import annotations

import mmap
from collections.abc import Sequence
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from agentkit_kernels.reference.quantize import kv_row_bytes, load_kv_rows, store_kv_rows
from agentkit_kernels.triton.attention import SPLIT, attend
from agentkit_kernels.triton.launch import LAUNCHES

NAN = float("nan")


def quantised(rows: Tensor, rotary: int) -> Tensor:
    """Return pages [..., rows, K] as FP8 pages."""
    *pages, count, size = rows.shape
    made = torch.zeros(*pages, count, kv_row_bytes(size, rotary), dtype=torch.uint8)
    flat = rows.reshape(-1, size)
    store_kv_rows(flat, torch.arange(len(flat)), made.view(-1, *made.shape[-2:]), rotary=rotary)
    return made


def dequantised(pages: Tensor, size: int, rotary: int) -> Tensor:
    """Return FP8 pages as float32 [..., rows, K]."""
    slots = torch.arange(pages.shape[:-1].numel())
    rows = load_kv_rows(pages.view(-1, *pages.shape[-2:]), slots, size, rotary=rotary, dtype=torch.float32)
    return rows.view(*pages.shape[:-1], size)


@dataclass
class Case:
    """Arguments of one call. Every row of a pool that no query may see is NaN."""

    q: Tensor
    kv: Tensor
    rotations: Tensor
    sink: Tensor
    positions: Tensor
    sequences: Tensor
    cu_seqlens: Tensor
    slots: Tensor
    window_pool: Tensor
    window: int
    ratio: int = 0
    entries: Tensor | None = None
    block_tables: Tensor | None = None
    topk: tuple[Tensor, Tensor] | None = None

    def run(self, *, decode: bool, stored: bool = False) -> Tensor:
        return attend(**vars(self), decode=decode, stored=stored)

    def rows(self, *chosen: int) -> Case:
        """Return the case of one row of each of some sequences, decoded: its token is the only one."""
        some = torch.tensor(chosen)
        of = self.sequences[some]
        return replace(
            self, q=self.q[some], kv=self.kv[some], rotations=self.rotations[some], positions=self.positions[some],
            sequences=torch.arange(len(some)), cu_seqlens=torch.arange(len(some) + 1), slots=self.slots[of],
            block_tables=None if self.block_tables is None else self.block_tables[of],
            topk=None if self.topk is None else (self.topk[0][some], self.topk[1][some]),
        )  # fmt: skip


def case(
    lengths: Sequence[int],
    starts: Sequence[int],
    *,
    heads: int = 3,
    size: int = 96,
    rotary: int = 32,
    window: int = 8,
    ratio: int = 0,
    per_span: int = 4,
    picks: int = 0,
    seed: int = 0,
) -> Case:
    """Make sequences with `lengths` new tokens after `starts` old ones; with `picks`, rows choose that many entries."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    count, ring = sum(lengths), window + 16
    sequences = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths, dtype=torch.int64))
    positions = torch.cat([torch.arange(start, start + length) for start, length in zip(starts, lengths, strict=True)])
    slots = torch.randperm(len(lengths) + 2, generator=generator)[: len(lengths)]
    pool = torch.full((len(lengths) + 2, ring, size), NAN)
    for slot, start in zip(slots.tolist(), starts, strict=True):
        for token in range(max(0, start - window + 1), start):
            pool[slot, token % ring] = random(size)
    made = Case(
        q=random(count, 2 * heads, size)[:, ::2] * 4 * size**-0.5,
        kv=random(count, 2 * size)[:, :size],
        rotations=torch.randn(count, rotary, generator=generator),
        sink=random(heads),
        positions=positions,
        sequences=sequences,
        cu_seqlens=torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()]),
        slots=slots,
        window_pool=pool,
        window=window,
        ratio=ratio,
    )
    if not ratio:
        return made
    ends = [(start + length) // ratio for start, length in zip(starts, lengths, strict=True)]
    spans = [-(-end // per_span) for end in ends]
    ids = torch.randperm(sum(spans), generator=generator) + 1
    made.entries = torch.full((sum(spans) + 1, per_span, size), NAN)
    made.block_tables = torch.zeros(len(lengths), max(spans) + 1, dtype=torch.int64)
    used = 0
    for b, (end, some) in enumerate(zip(ends, spans, strict=True)):
        made.block_tables[b, :some] = ids[used : used + some]
        used += some
        for entry in range(end):
            made.entries[made.block_tables[b, entry // per_span], entry % per_span] = random(size)
    if picks:
        indices = torch.full((count, picks), 1 << 20, dtype=torch.int32)
        counts = torch.minimum((positions + 1) // ratio, torch.tensor(picks))
        for n, (position, some) in enumerate(zip(positions.tolist(), counts.tolist(), strict=True)):
            chosen = torch.randperm((position + 1) // ratio, generator=generator)[:some].sort().values
            indices[n, :some] = chosen.to(torch.int32)
        made.topk = (indices, counts)
    return made


def expected(case: Case) -> tuple[Tensor, Tensor]:
    """Return the result and the window pool after it, in float64, by the definition."""
    pool = case.window_pool.double()
    outs = []
    for n, (position, b) in enumerate(zip(case.positions.tolist(), case.sequences.tolist(), strict=True)):
        first = int(case.cu_seqlens[b])
        rows = [
            case.kv[n - age] if n - age >= first else pool[case.slots[b], (position - age) % pool.shape[1]]
            for age in range(min(case.window, position + 1))
        ]
        if case.entries is not None and case.block_tables is not None:
            seen = list(range((position + 1) // case.ratio))
            if case.topk is not None:
                seen = case.topk[0][n, : int(case.topk[1][n])].tolist()
            per_span = case.entries.shape[1]
            rows += [case.entries[case.block_tables[b, entry // per_span], entry % per_span] for entry in seen]
        keys = torch.stack([row.double() for row in rows])
        scores = torch.cat((case.q[n].double() @ keys.T, case.sink.double()[:, None]), 1)
        out = scores.softmax(1)[:, :-1] @ keys
        rotary = case.rotations.shape[1]
        pairs = out[:, -rotary:].reshape(len(out), -1, 2)
        cos, sin = case.rotations[n].double().view(-1, 2).unbind(-1)
        even, odd = pairs.unbind(-1)
        turned = torch.stack((even * cos + odd * sin, odd * cos - even * sin), -1).flatten(-2)
        outs.append(torch.cat((out[:, :-rotary], turned), 1))
    for n, (position, b) in enumerate(zip(case.positions.tolist(), case.sequences.tolist(), strict=True)):
        pool[case.slots[b], position % pool.shape[1]] = case.kv[n].double()
    return torch.stack(outs), pool


def check(case: Case, *, decode: bool) -> Tensor:
    """Compare a call with the definition, also what it leaves in the window, and return its result."""
    answer, pool = expected(case)
    result = case.run(decode=decode)
    torch.testing.assert_close(result.double(), answer, atol=4e-6, rtol=2e-5)
    torch.testing.assert_close(case.window_pool.double(), pool, atol=0, rtol=0, equal_nan=True)
    return result


@pytest.mark.parametrize("decode", [True, False])
@pytest.mark.parametrize("position", [0, 6, 7, 40])
def test_one_row_sees_its_window(position: int, decode: bool) -> None:
    check(case([1], [position]), decode=decode)


def test_a_window_of_one_split_has_no_partial_results() -> None:
    for window, merges in ((SPLIT, 0), (SPLIT + 1, 1)):
        before = LAUNCHES["_merge_kernel"]
        case([1], [40], heads=1, window=window).run(decode=True)
        assert LAUNCHES["_merge_kernel"] == before + merges


@pytest.mark.parametrize("decode", [True, False])
def test_rows_that_are_in_the_window_already_are_not_stored_again(decode: bool) -> None:
    made = case([16, 1], [70, 9], ratio=2, picks=3)  # the ring has 16 rows more than the window
    answer, pool = expected(made)
    before = LAUNCHES["_store_kernel"]
    for window_pool in (pool.float(), made.window_pool.clone()):  # its own rows come from `kv`
        result = replace(made, window_pool=window_pool).run(decode=decode, stored=True)
        torch.testing.assert_close(result.double(), answer, atol=2e-6, rtol=2e-5)
    torch.testing.assert_close(window_pool, made.window_pool, atol=0, rtol=0, equal_nan=True)
    assert LAUNCHES["_store_kernel"] == before


RAGGED = case([1, 11, 1, 2], [0, 5, 70, 31], heads=2)
CHOSEN = case([1, 4, 1], [0, 11, 300], heads=2, ratio=2, picks=SPLIT + 5)
ALL = case([1, 2, 2], [0, 3 * SPLIT - 1, 30], heads=2, ratio=3)


@pytest.mark.parametrize("made", [RAGGED, CHOSEN, ALL], ids=["window", "chosen", "all"])
def test_decoding_and_prefill_give_the_same_bits_for_a_ragged_batch(made: Case) -> None:
    split = check(replace(made, window_pool=made.window_pool.clone()), decode=True)
    assert torch.equal(split, check(replace(made, window_pool=made.window_pool.clone()), decode=False))


def test_the_bits_of_a_row_do_not_depend_on_the_other_rows() -> None:
    whole = replace(CHOSEN, window_pool=CHOSEN.window_pool.clone()).run(decode=False)
    alone = CHOSEN.rows(5)  # the only new row of its sequence
    assert torch.equal(replace(alone, window_pool=CHOSEN.window_pool.clone()).run(decode=True)[0], whole[5])


def test_a_chunk_token_by_token_gives_the_bits_of_the_whole_chunk() -> None:
    made = case([3], [SPLIT + 5], heads=1, size=64, rotary=8, window=SPLIT + 2)
    pool = made.window_pool.clone()
    whole = made.run(decode=False)
    for n in (0, 1, 2):
        row = replace(made.rows(n), window_pool=pool)
        assert torch.equal(row.run(decode=True)[0], whole[n])


@pytest.mark.parametrize("count", [1, 31, 32, 33, SPLIT - 1, SPLIT, SPLIT + 1])
def test_numbers_of_entries_around_the_edges_of_tiles_and_splits(count: int) -> None:
    made = case([1, 1], [2 * count - 1, 2 * count], heads=1, size=64, rotary=8, ratio=2)
    pool = made.window_pool.clone()
    whole = check(made, decode=False)
    assert torch.equal(check(replace(made, window_pool=pool), decode=True), whole)


@pytest.mark.parametrize(("heads", "size", "rotary"), [(1, 24, 16), (5, 96, 32), (33, 40, 8)])
def test_sizes_that_are_no_powers_of_two(heads: int, size: int, rotary: int) -> None:
    check(case([2, 1], [9, 0], heads=heads, size=size, rotary=rotary, ratio=2, picks=3), decode=False)


def test_an_empty_batch_launches_nothing() -> None:
    for decode in (True, False):
        assert case([0], [3]).run(decode=decode).shape == (0, 3, 96)


def test_padding_rows_give_zeros_and_store_nothing() -> None:
    for decode in (True, False):
        made = case([1, 2], [3, 9], ratio=2, picks=4)
        answer, pool = expected(made)
        made.sequences[0] = -1
        pool[made.slots[0], 3] = NAN
        result = made.run(decode=decode)
        assert torch.equal(result[0], torch.zeros_like(result[0]))
        torch.testing.assert_close(result[1:].double(), answer[1:], atol=2e-6, rtol=2e-5)
        torch.testing.assert_close(made.window_pool.double(), pool, atol=0, rtol=0, equal_nan=True)


def test_the_ring_keeps_the_last_rows_of_a_long_chunk() -> None:
    made = case([30], [7], heads=1, size=16, rotary=8)
    check(made, decode=False)
    assert made.window_pool.shape[1] < 30 and torch.equal(made.window_pool[made.slots[0], 36 % 24], made.kv[-1])


def test_a_nan_in_a_visible_row_reaches_the_result_of_its_sequence_only() -> None:
    made = case([1, 1], [9, 9])
    made.kv[0, 5] = NAN
    result = made.run(decode=True)
    assert result[0].isnan().any() and not result[1].isnan().any()


def test_a_high_sink_takes_all_the_weight() -> None:
    made = case([1], [9])
    made.sink[:] = 1e4
    assert torch.equal(made.run(decode=True), torch.zeros(1, 3, 96))


@pytest.mark.parametrize("decode", [True, False])
@pytest.mark.parametrize(("size", "rotary"), [(96, 32), (192, 64), (512, 64)])
def test_fp8_rows_give_the_result_of_their_values(size: int, rotary: int, decode: bool) -> None:
    made = case([1, 2], [12, 4], size=size, rotary=rotary, ratio=2, picks=5)
    assert made.entries is not None
    fp8 = replace(
        made,
        kv=quantised(made.kv, rotary),
        window_pool=quantised(made.window_pool, rotary),
        entries=quantised(made.entries, rotary),
    )
    values = replace(
        made,
        kv=dequantised(fp8.kv, size, rotary),
        window_pool=dequantised(fp8.window_pool, size, rotary),
        entries=dequantised(fp8.entries, size, rotary),  # type: ignore[arg-type]
    )
    answer, pool = expected(values)
    torch.testing.assert_close(fp8.run(decode=decode).double(), answer, atol=2e-6, rtol=2e-5)
    after = dequantised(fp8.window_pool, size, rotary).double()
    torch.testing.assert_close(after, pool, atol=0, rtol=0, equal_nan=True)


def test_every_e4m3_code_is_decoded_exactly() -> None:
    codes = torch.arange(256).to(torch.uint8)
    size, rotary = 320, 64
    kv = torch.zeros(1, kv_row_bytes(size, rotary), dtype=torch.uint8)
    kv[0, :256] = torch.where((codes & 0x7F) == 0x7F, 0, codes)  # all but NaN
    kv[0, size + rotary :] = 127
    one = Case(
        q=torch.zeros(1, 1, size), kv=kv, rotations=torch.tensor([[1.0, 0.0] * 32]), sink=torch.full((1,), -1e4),
        positions=torch.tensor([0]), sequences=torch.tensor([0]), cu_seqlens=torch.tensor([0, 1]),
        slots=torch.tensor([0]), window_pool=torch.zeros(1, 4, kv.shape[1], dtype=torch.uint8), window=2,
    )  # fmt: skip
    values = one.run(decode=True)[0, 0, :256]
    assert torch.equal(values, kv[0, :256].view(torch.float8_e4m3fn).float())


def test_addresses_beyond_32_bits() -> None:
    per_span, size, rotary = 64, 80, 16
    stride = per_span * kv_row_bytes(size, rotary)
    spans = (1 << 31) // stride + 8
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS  # pages are allocated when they are first touched
    memory = torch.frombuffer(mmap.mmap(-1, spans * stride, flags=flags), dtype=torch.uint8)
    made = case([1], [63], heads=1, size=size, rotary=rotary, ratio=1, per_span=per_span)
    assert made.entries is not None and made.block_tables is not None
    entries = memory.view(spans, per_span, kv_row_bytes(size, rotary))
    entries[spans - 1] = quantised(made.entries[made.block_tables[0, 0]], rotary)
    fp8 = replace(
        made,
        kv=quantised(made.kv, rotary),
        window_pool=quantised(made.window_pool, rotary),
        entries=entries,
        block_tables=torch.tensor([[spans - 1]]),
    )
    values = replace(
        made,
        kv=dequantised(fp8.kv, size, rotary),
        window_pool=dequantised(fp8.window_pool, size, rotary),
        entries=dequantised(quantised(made.entries, rotary), size, rotary),
    )
    for decode in (True, False):
        answer, _ = expected(values)
        torch.testing.assert_close(fp8.run(decode=decode).double(), answer, atol=2e-6, rtol=2e-5)


@pytest.mark.parametrize("decode", [True, False])
def test_rows_of_queries_and_keys_lie_beyond_32_bits(decode: bool) -> None:
    made, stride = case([3], [9], size=24, rotary=8, ratio=2, picks=3), 1 << 30
    queries = torch.frombuffer(mmap.mmap(-1, 2 * (4 * stride + 8192)), dtype=torch.bfloat16)
    keys = torch.frombuffer(mmap.mmap(-1, 4 * (2 * stride + 24)), dtype=torch.float32)
    near = replace(made, q=made.q.bfloat16(), window_pool=made.window_pool.clone())
    far = replace(
        made,
        q=queries.as_strided(made.q.shape, (stride, stride + 1024, 1)).copy_(made.q),
        kv=keys.as_strided(made.kv.shape, (stride, 1)).copy_(made.kv),
    )
    assert torch.equal(far.run(decode=decode), near.run(decode=decode))
    torch.testing.assert_close(far.window_pool, near.window_pool, atol=0, rtol=0, equal_nan=True)


def test_formats_that_do_not_fit_together_are_refused() -> None:
    made = case([1], [3], ratio=2)
    with pytest.raises(ValueError, match="same dtype"):
        replace(made, kv=made.kv.bfloat16()).run(decode=True)
    with pytest.raises(ValueError, match="needed with a ratio"):
        replace(made, ratio=0).run(decode=True)
