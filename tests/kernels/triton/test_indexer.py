"""The indexer's scores and exact top-k against their definition."""

from __future__ import annotations

import mmap
from collections.abc import Sequence
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from agentkit_kernels.triton import indexer
from agentkit_kernels.triton.indexer import FAN, QUERIES, index_topk
from agentkit_kernels.triton.launch import LAUNCHES

NAN = float("nan")
SPLIT = 128
"""Entries per program of decoding, and candidates per row of prefill, for a top-k of 32 or less."""
PATHS = {"decode": (1 << 20, 0), "prefill": (0, 1), "prefill in parts": (0, 3)}
"""The rows up to which decoding is chosen, and the parts of prefill."""


def take(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    few_rows, parts = PATHS[path]
    monkeypatch.setattr(indexer, "FEW_ROWS", few_rows)
    monkeypatch.setattr(indexer, "_parts", lambda *_: parts)


@pytest.fixture(params=PATHS)
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    take(request.param, monkeypatch)
    return str(request.param)


on_every_path = pytest.mark.usefixtures("path")


@dataclass
class Case:
    """Arguments of one call. Keys that no query may see are NaN."""

    q: Tensor
    weights: Tensor
    positions: Tensor
    sequences: Tensor
    block_tables: Tensor
    entries: Tensor
    ratio: int
    top_k: int
    key_scales: Tensor | None = None

    def run(self) -> tuple[Tensor, Tensor]:
        return index_topk(**vars(self))

    def keys(self, b: int, count: int) -> Tensor:
        """Return the first `count` keys of a sequence."""
        per_span = self.entries.shape[1]
        spans = self.block_tables[b, : -(-count // per_span)]
        return self.entries[spans].flatten(0, 1)[:count]


def case(
    lengths: Sequence[int],
    starts: Sequence[int],
    *,
    heads: int = 3,
    size: int = 24,
    ratio: int = 2,
    per_span: int = 8,
    top_k: int = 5,
    whole: bool = False,
) -> Case:
    """Make sequences with `lengths` queries after `starts` tokens; `whole` numbers have exact scores, with ties."""
    generator = torch.Generator().manual_seed(sum(lengths) + sum(starts))

    def random(*shape: int) -> Tensor:
        if whole:
            return torch.randint(-2, 3, shape, generator=generator).float()
        return torch.randn(*shape, generator=generator)

    count = sum(lengths)
    ends = [(start + length) // ratio for start, length in zip(starts, lengths, strict=True)]
    spans = [-(-end // per_span) for end in ends]
    ids = torch.split(torch.randperm(sum(spans), generator=generator) + 1, spans)
    made = Case(
        q=random(count, 2 * heads, size)[:, ::2],
        weights=random(count, heads + 2)[:, 1:-1],
        positions=torch.cat([torch.arange(s, s + length) for s, length in zip(starts, lengths, strict=True)]),
        sequences=torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths, dtype=torch.int64)),
        block_tables=torch.zeros(len(lengths), max(spans) + 1, dtype=torch.int64),
        entries=torch.full((sum(spans) + 1, per_span, size), NAN),
        ratio=ratio,
        top_k=top_k,
    )
    for b, some in enumerate(ids):
        made.block_tables[b, : len(some)] = some
        for entry in range(ends[b]):
            made.entries[some[entry // per_span], entry % per_span] = random(size)
    return made


def scores(case: Case, n: int) -> Tensor:
    """Return the scores of a query, float64."""
    keys = case.keys(int(case.sequences[n]), int(case.positions[n] + 1) // case.ratio).double()
    return case.weights[n].double() @ (case.q[n].double() @ keys.T).relu()


def check(case: Case) -> None:
    """Compare the choice with that of a stable sort of the scores."""
    indices, counts = case.run()
    for n in range(len(case.q)):
        answer = scores(case, n).sort(descending=True, stable=True).indices[: case.top_k].sort().values
        assert indices[n, : int(counts[n])].tolist() == answer.tolist()


@on_every_path
@pytest.mark.parametrize("whole", [False, True], ids=["random", "ties"])
@pytest.mark.parametrize(("size", "heads", "per_span"), [(24, 3, 8), (16, 8, 1), (32, 17, 64)])
def test_queries_of_a_ragged_batch(size: int, heads: int, per_span: int, whole: bool) -> None:
    check(case([1, 5, 1], [0, 7, 300], size=size, heads=heads, per_span=per_span, whole=whole))


@on_every_path
@pytest.mark.parametrize("count", [4, 5, 6, 63, 64, 65, SPLIT - 1, SPLIT, SPLIT + 1, FAN * SPLIT, FAN * SPLIT + 1])
def test_numbers_of_entries_around_every_edge(count: int) -> None:
    check(case([1, 1], [2 * count - 2, 2 * count - 1], whole=True))


@on_every_path
@pytest.mark.parametrize("top_k", [1, 7, 16, 60])
def test_numbers_of_chosen_entries(top_k: int) -> None:
    check(case([2], [600], top_k=top_k))


@on_every_path
def test_equal_scores_choose_the_first_entries() -> None:
    made = case([1], [2 * 3 * SPLIT - 1])
    made.weights.zero_()
    indices, _ = made.run()
    assert indices[0].tolist() == [0, 1, 2, 3, 4]


@on_every_path
def test_negative_weights_and_no_positive_dot_tie_at_zero() -> None:
    made = case([1], [41])
    made.weights.fill_(-1.0)
    made.entries.zero_()
    made.entries[made.block_tables[0, 0], 0] = made.q[0, 0]  # the only entry below zero
    indices, _ = made.run()
    assert indices[0].tolist() == [1, 2, 3, 4, 5]


@on_every_path
def test_a_nan_score_is_chosen() -> None:
    made = case([1], [2 * 2 * SPLIT - 1])
    made.entries[made.block_tables[0, 150 // 8], 150 % 8] = NAN
    indices, _ = made.run()
    assert 150 in indices[0].tolist()


@on_every_path
def test_an_empty_batch_launches_nothing() -> None:
    indices, counts = case([0], [3]).run()
    assert indices.shape == (0, 5) and counts.shape == (0,)


@on_every_path
def test_padding_rows_choose_nothing() -> None:
    made = case([1, 1], [300, 300])
    made.sequences[0] = -1
    assert made.run()[1].tolist() == [0, 5]


@on_every_path
def test_the_choice_of_a_row_does_not_depend_on_the_other_rows() -> None:
    made = case([1, 3], [500, 90])
    indices, _ = made.run()
    for n in range(4):
        alone = replace(
            made,
            q=made.q[n : n + 1],
            weights=made.weights[n : n + 1],
            positions=made.positions[n : n + 1],
            sequences=torch.zeros(1, dtype=torch.int64),
            block_tables=made.block_tables[made.sequences[n] :][:1],
        )
        assert torch.equal(alone.run()[0][0], indices[n])


def test_each_path_launches_its_kernels(path: str) -> None:
    before = LAUNCHES.copy()
    case([2], [2 * 2 * SPLIT]).run()
    names = {"decode": ["_index_scan", "_index_merge"], "prefill": ["_index_stream"]}
    assert sorted(LAUNCHES - before) == sorted(names.get(path, ["_index_stream", "_index_merge"]))


@pytest.mark.parametrize(("rows", "entries", "parts"), [(2048, 1 << 20, 1), (64, 1 << 18, 8), (64, 1 << 13, 1)])
def test_few_rows_over_many_entries_are_divided(rows: int, entries: int, parts: int) -> None:
    assert indexer._parts(rows // QUERIES, entries, 2048) == parts


@on_every_path
@pytest.mark.parametrize("descending", [False, True])
def test_scores_in_order(*, descending: bool) -> None:
    """Ascending ones are the most that prefill can append; descending ones are appended once."""
    count = 5 * SPLIT + 3
    made = case([1], [2 * count - 1], size=16, heads=1)
    made.q.fill_(1.0)
    made.weights.fill_(1.0)
    for entry in range(count):
        made.entries[made.block_tables[0, entry // 8], entry % 8] = float(count - entry if descending else entry)
    indices, _ = made.run()
    assert indices[0].tolist() == list(range(5) if descending else range(count - 5, count))


@on_every_path
def test_rows_of_one_program_of_several_sequences_in_any_order() -> None:
    lengths, starts = [3, 2, 4, 1], [150, 90, 300, 5]
    made = case(lengths, starts, ratio=1, whole=True)
    order = torch.randperm(sum(lengths), generator=torch.Generator().manual_seed(1))
    check(
        replace(
            made,
            q=made.q[order],
            weights=made.weights[order],
            positions=made.positions[order],
            sequences=made.sequences[order],
        )
    )


def test_every_path_makes_the_same_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    made = case([QUERIES + 1, 2], [400, 90], ratio=1, size=32, heads=8, per_span=64)
    results = []
    for path in PATHS:
        take(path, monkeypatch)
        results.append(made.run())
    for indices, counts in results[1:]:
        assert torch.equal(indices, results[0][0]) and torch.equal(counts, results[0][1])


def fp8(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return rows as E4M3 codes (uint8), and a scale per row."""
    finite = rows.nan_to_num()
    scales = finite.abs().amax(-1).clamp(min=1e-4) / 448
    return (finite / scales[..., None]).to(torch.float8_e4m3fn).view(torch.uint8), scales


def values(codes: Tensor, scales: Tensor) -> Tensor:
    return codes.view(torch.float8_e4m3fn).float() * scales[..., None]


@on_every_path
def test_fp8_keys_give_the_choice_of_their_values() -> None:
    made = case([2, 1], [300, 7])
    codes, scales = fp8(made.entries)
    result = replace(made, entries=codes, key_scales=scales).run()
    twin = replace(made, entries=values(codes, scales))
    check(twin)
    answer, counts = twin.run()
    assert torch.equal(result[1], counts)
    for n in range(3):
        assert torch.equal(result[0][n, : int(counts[n])], answer[n, : int(counts[n])])


@on_every_path
def test_addresses_beyond_32_bits() -> None:
    made = case([1], [15], ratio=1, per_span=16, top_k=3)
    stride = 16 * 24
    spans = (1 << 31) // stride + 8
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS  # pages are allocated when they are first touched
    memory = torch.frombuffer(mmap.mmap(-1, spans * stride, flags=flags), dtype=torch.uint8)
    codes, scales = fp8(made.entries)
    entries = memory.view(spans, 16, 24)
    entries[spans - 1] = codes[made.block_tables[0, 0]]
    all_scales = scales[made.block_tables[0, 0]].expand(spans, -1)
    far = replace(made, entries=entries, key_scales=all_scales, block_tables=torch.tensor([[spans - 1]]))
    answer, _ = replace(made, entries=values(codes, scales)).run()
    assert torch.equal(far.run()[0], answer)


@on_every_path
def test_rows_of_queries_and_weights_lie_beyond_32_bits() -> None:
    near, stride = case([3], [40]), 1 << 30
    queries = torch.frombuffer(mmap.mmap(-1, 4 * (4 * stride + 8192)), dtype=torch.float32)
    weights = torch.frombuffer(mmap.mmap(-1, 4 * (2 * stride + 8)), dtype=torch.float32)
    far = replace(
        near,
        q=queries.as_strided(near.q.shape, (stride, stride + 1024, 1)).copy_(near.q),
        weights=weights.as_strided(near.weights.shape, (stride, 1)).copy_(near.weights),
    )
    assert torch.equal(far.run()[0], near.run()[0])


def test_shapes_that_do_not_fit_together_are_refused() -> None:
    made = case([1], [15])
    with pytest.raises(ValueError, match="contiguous rows of 24 elements"):
        replace(made, entries=made.entries[..., :-1]).run()
    with pytest.raises(ValueError, match="need contiguous rows of scales"):
        replace(made, entries=made.entries.to(torch.uint8)).run()
    with pytest.raises(ValueError, match="at least 1"):
        replace(made, top_k=0).run()
