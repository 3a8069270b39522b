"""Compressed entries, against the formula in float64 entry by entry."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from agentkit_kernels.ops import Compressor, Plan
from agentkit_kernels.reference.batch import Batch, pad_rows
from agentkit_kernels.reference.compressor import compress
from agentkit_kernels.reference.rope import rotate, rotations_at
from agentkit_kernels.reference.state import FreshState, PooledState

LENGTH, SIZE, COLUMN, EPS, PER_SPAN = 23, 6, 3, 1e-5, 2
TABLE = (5, 2, 7, 1)


def rand(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def make_compressor(ratio: int, *, overlap: bool) -> Compressor:
    ape, norm = rand(ratio, SIZE * (1 + overlap), seed=0), rand(SIZE, seed=1)
    return Compressor("index_", COLUMN, ratio, overlap, ape, norm, EPS, torch.tensor([0.7, 0.01]))


def expected_entries(projected: Tensor, compressor: Compressor) -> Tensor:
    """Pool the rows of each window; with overlap, entry w also pools the first series of the window before it."""
    ratio, width = compressor.ratio, compressor.ape.shape[1]
    values, scores = torch.split(projected[:, COLUMN : COLUMN + 2 * width].double(), width, dim=1)
    scores = scores + compressor.ape.double()[torch.arange(LENGTH) % ratio]
    entries = []
    for w in range(LENGTH // ratio):
        own = slice(w * ratio, (w + 1) * ratio)
        some_values, some_scores = values[own, width - SIZE :], scores[own, width - SIZE :]
        if compressor.overlap and w:
            before = slice((w - 1) * ratio, w * ratio)
            some_values = torch.cat((values[before, :SIZE], some_values))
            some_scores = torch.cat((scores[before, :SIZE], some_scores))
        pooled = (some_scores.softmax(0) * some_values).sum(0)
        entries.append(F.rms_norm(pooled, (SIZE,), compressor.norm.double(), EPS).float())
    return rotate(torch.stack(entries), rotations_at(torch.arange(len(entries)) * ratio, compressor.frequencies))


@pytest.mark.parametrize("chunks", [[23], [1] * 23, [2, 9, 1, 11], [4, 4, 15]])
@pytest.mark.parametrize(("ratio", "overlap"), [(3, False), (4, True)], ids=["hca", "csa"])
def test_entries_follow_the_formula_in_any_chunks(ratio: int, overlap: bool, chunks: list[int]) -> None:
    """Pools begin as NaN except where a new sequence is cleared; spans are scattered, and open rows wrap around."""
    compressor = make_compressor(ratio, overlap=overlap)
    width = compressor.ape.shape[1]
    projected = rand(LENGTH, COLUMN + 2 * width + 1, seed=2)
    pools = {
        "index_entries": torch.full((9, PER_SPAN, SIZE), torch.nan),
        "index_values": torch.full((3, 2 * ratio + 1, width), torch.nan),
        "index_scores": torch.full((3, 2 * ratio + 1, width), torch.nan),
    }
    pools["index_values"][1], pools["index_scores"][1] = 0.0, -torch.inf
    state, start = PooledState(pools), 0
    for count in chunks:
        batch = Batch(Plan([0] * count, [count], [start], [1], [TABLE]), torch.device("cpu"))
        compress(pad_rows(projected[start : start + count]), compressor, batch, state)
        start += count
    expected = expected_entries(projected, compressor)
    found = pools["index_entries"][[*TABLE]].flatten(0, 1)
    torch.testing.assert_close(found[: len(expected)], expected, atol=1e-5, rtol=1e-5)
    untouched = found[len(expected) :].isnan().all() and pools["index_entries"][[0, 3, 4, 6, 8]].isnan().all()
    assert bool(untouched) and bool(pools["index_values"][[0, 2]].isnan().all())


@pytest.mark.parametrize(("ratio", "overlap"), [(3, False), (4, True)], ids=["hca", "csa"])
def test_sequences_of_a_batch_have_the_entries_of_each_alone(ratio: int, overlap: bool) -> None:
    compressor = make_compressor(ratio, overlap=overlap)
    projected = rand(2 * LENGTH, COLUMN + 2 * compressor.ape.shape[1], seed=3)
    batch, state = Batch(Plan([0] * 2 * LENGTH, [LENGTH] * 2, [0, 0]), torch.device("cpu")), FreshState()
    compress(pad_rows(projected), compressor, batch, state)
    entries = state.entries(batch.groups[0], "index_", LENGTH // ratio, SIZE)
    for found, rows in zip(entries, torch.split(projected, LENGTH), strict=True):
        torch.testing.assert_close(found, expected_entries(rows, compressor), atol=1e-5, rtol=1e-5)
