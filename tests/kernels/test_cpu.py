"""CPU kernels against independent torch twins, on awkward shapes and row by row."""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from agentkit_kernels.cpu import loops, panels
from agentkit_kernels.cpu.attention import blocks
from agentkit_kernels.cpu.batch import Batch
from agentkit_kernels.cpu.loops import Floats, Ints
from agentkit_kernels.cpu.panels import LANES
from agentkit_kernels.ops import QUERY_BLOCK, Heads, HyperConnection, HyperHead, Plan
from agentkit_kernels.reference import experts as experts_twin
from agentkit_kernels.reference import hyper_connections, quantize
from agentkit_kernels.reference.linear import Weight
from agentkit_kernels.reference.qkv import qkv
from agentkit_kernels.reference.rope import rotate, rotations_at

EPS = np.float32(1e-6)
sizes = st.integers(1, 9)
seeds = st.integers(0, 2**32 - 1)


NO_SCALES = np.empty(0, np.float32)


def randoms(seed: int, *shape: int) -> Floats:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def close(actual: Floats, expected: torch.Tensor, tolerance: float = 2e-5) -> None:
    torch.testing.assert_close(torch.from_numpy(actual), expected, atol=tolerance, rtol=tolerance)


def test_exp_is_within_two_units_of_the_last_place() -> None:
    xs = np.concatenate([np.linspace(-87, 88, 20_001), np.linspace(-1e-3, 1e-3, 101)]).astype(np.float32)
    found = np.array([loops.exp(x) for x in xs])
    expected = np.exp(xs.astype(np.float64))
    assert float(np.max(np.abs(found - expected) / np.spacing(expected.astype(np.float32)))) <= 2
    assert loops.exp(np.float32(-np.inf)) == loops.exp(np.float32(-200)) == 0
    assert np.isnan(loops.exp(np.float32(np.nan))) and np.isfinite(loops.exp(np.float32(1000)))


@settings(deadline=None, max_examples=30)
@given(rows=st.integers(1, 5), inputs=st.integers(1, 70), outputs=st.integers(1, 70), cut=st.integers(0, 70))
def test_products_of_any_columns(rows: int, inputs: int, outputs: int, cut: int) -> None:
    x, weight, cut = randoms(rows, rows, inputs), randoms(inputs, inputs, outputs), min(cut, outputs)
    out = np.full((rows, outputs + 2), np.nan, np.float32)
    loops.multiply(x, weight, 0, cut, out, 1)
    loops.multiply(x, weight, cut, outputs, out, 1)
    close(out[:, 1:-1], torch.from_numpy(x) @ torch.from_numpy(weight))
    assert np.isnan(out[:, [0, -1]]).all()
    one = np.empty((1, outputs), np.float32)
    for row in range(rows):
        loops.multiply(x[row : row + 1], weight, 0, outputs, one, 0)
        assert np.array_equal(one[0], out[row, 1:-1])


@pytest.mark.parametrize("inputs", [150, 37, 3])
def test_wide_products_are_tiled_and_bfloat16_is_exact(inputs: int) -> None:
    outputs = 2 * loops.OUTPUTS_TOGETHER + 17
    x, weight = randoms(0, 3, inputs), torch.from_numpy(randoms(1, inputs, outputs)).bfloat16()
    out, half = np.empty((3, outputs), np.float32), np.empty((3, outputs), np.float32)
    loops.multiply(x, weight.float().numpy(), 0, outputs, out, 0)
    close(out, torch.from_numpy(x) @ weight.float(), 1e-4)
    loops.multiply(x, weight.view(torch.uint16).numpy(), 0, outputs, half, 0)
    assert np.array_equal(out, half)


@settings(deadline=None, max_examples=30)
@given(
    rows=st.integers(1, 6), size=st.integers(1, 5), dim=st.integers(1, 40), iterations=st.integers(1, 20), seed=seeds
)
def test_hyper_connections(rows: int, size: int, dim: int, iterations: int, seed: int) -> None:
    maps = (2 + size) * size
    streams, y = randoms(seed, rows, size, dim), randoms(seed + 1, rows, dim)
    fn, base, scale = (
        torch.from_numpy(randoms(seed + i, *shape)) for i, shape in enumerate([(maps, size * dim), (maps,), (3,)])
    )
    norm = randoms(seed + 5, dim)
    connection = HyperConnection(Weight((fn,)), base, scale, torch.from_numpy(norm), 1e-6, 1e-6, iterations)
    x_ND, mixing = hyper_connections.hc_pre(torch.from_numpy(streams), connection)
    raw = (torch.from_numpy(streams).flatten(1) @ fn.T).numpy()
    x, post, comb = (np.empty(shape, np.float32) for shape in [(rows, dim), (rows, size), (rows, size, size)])
    for first, last in ((0, rows // 2), (rows // 2, rows)):
        loops.connect(streams, raw, base.numpy(), scale.numpy(), norm, EPS, EPS, iterations, first, last, x, post, comb)
    close(post, mixing.post_NM)
    close(comb, mixing.comb_NMM, 1e-4)
    close(x, x_ND, 1e-3)
    out = np.empty_like(streams)
    loops.write(streams, y, post, comb, 0, rows // 2, out)
    loops.write(streams, y, post, comb, rows // 2, rows, out)
    close(out, hyper_connections.hc_post(torch.from_numpy(streams), torch.from_numpy(y), mixing), 1e-3)
    head = HyperHead(Weight((fn[:size],)), base[:size], scale[:1], torch.from_numpy(norm), 1e-6, 1e-6)
    collapsed = np.empty_like(x)
    raw_NM = np.ascontiguousarray(raw[:, :size])
    loops.collapse(streams, raw_NM, base.numpy()[:size], scale.numpy()[:1], norm, EPS, EPS, collapsed)
    close(collapsed, hyper_connections.hc_head(torch.from_numpy(streams), head), 1e-3)


@settings(deadline=None, max_examples=30)
@given(rows=sizes, heads=st.integers(1, 4), index_heads=st.integers(0, 3), size=st.integers(2, 9), seed=seeds)
def test_queries_and_key_value_rows(rows: int, heads: int, index_heads: int, size: int, seed: int) -> None:
    """The columns of the fused projection lie behind and between others."""
    index_size, kv_column, index_column = size + 1, 3, 3 + size + 2
    q = randoms(seed, rows, heads * size + index_heads * index_size)
    projected, kv_norm = randoms(seed + 1, rows, index_column + index_heads + 1), randoms(seed + 2, size)
    turns = rotations_at(torch.arange(7, 7 + rows), torch.tensor([0.7]))
    layout = Heads(heads, size, kv_column, torch.from_numpy(kv_norm), 1e-6, index_heads, index_size, index_column)
    expected = qkv(torch.from_numpy(q), torch.from_numpy(projected), turns, layout)
    shapes = [(rows, heads, size), (rows, size), (rows, index_heads, index_size), (rows, index_heads)]
    outs = [np.full(shape, np.nan, np.float32) for shape in shapes]
    for first, last in ((0, rows // 2), (rows // 2, rows)):
        loops.heads(q, projected, kv_column, index_column, kv_norm, turns.numpy(), EPS, first, last, *outs)
    for out, twin in zip(outs, expected, strict=True):
        if out.size:
            close(out, twin, 1e-4)


@settings(deadline=None, max_examples=40)
@given(
    window=st.integers(1, 20), picking=st.booleans(), ratio=st.sampled_from([0, 2, 5]), heads=st.integers(1, 5),
    chunks=st.lists(st.integers(1, 150), min_size=1, max_size=3), seed=seeds,
)  # fmt: skip
def test_attention_covers_window_and_entries_for_any_chunks(
    window: int, picking: bool, ratio: int, heads: int, chunks: list[int], seed: int
) -> None:
    """Compare with one softmax over all visible keys; spans are scattered, and rings wrap around."""
    length, size, per_span, rotary = sum(chunks), 6, 4, 4
    q, kv = randoms(seed, length, heads, size), randoms(seed + 1, length, size)
    sink = randoms(seed + 2, heads)
    entries = randoms(seed + 3, 4 * (length + 4), size)
    spans = np.random.default_rng(seed).permutation(len(entries) // per_span)[: length // per_span + 1]
    counts = np.zeros(0, np.int64)
    picks = np.empty((length, 0), np.int64)
    if ratio and picking:
        draws = np.random.default_rng(seed)
        seen = (np.arange(length) + 1) // ratio
        counts = np.minimum(seen, 3)
        picks = np.zeros((length, 3), np.int64)
        for n in range(length):
            picks[n, : counts[n]] = np.sort(draws.permutation(seen[n])[: counts[n]])
    turns = np.empty((length, rotary), np.float32)
    loops.rotations(np.arange(length), np.array([0.7, 0.01], np.float32), turns)
    ring = np.zeros((3, window + QUERY_BLOCK, size), np.float32)
    out = np.empty_like(q)
    low = 0
    for chunk in chunks:
        some = slice(low, low + chunk)
        loops.attend(
            q[some], kv[some], turns[some], np.array([0, chunk]), np.arange(low, low + chunk), np.array([1]), ring,
            window, ratio, entries, per_span, spans[None], picks[some], counts[some], sink, 0, heads, out[some],
        )  # fmt: skip
        low += chunk
    for n in range(length):
        seen_rows = [kv[max(0, n + 1 - window) : n + 1]]
        if ratio:
            chosen = picks[n, : counts[n]] if picking else np.arange((n + 1) // ratio)
            seen_rows.append(entries[spans[chosen // per_span] * per_span + chosen % per_span])
        rows = torch.from_numpy(np.concatenate(seen_rows))
        scores = torch.cat((torch.from_numpy(q[n]) @ rows.T, torch.from_numpy(sink).unsqueeze(1)), dim=1)
        expected = scores.softmax(1)[:, :-1] @ rows
        close(out[n], rotate(expected[None], torch.from_numpy(turns[n : n + 1]), inverse=True)[0])


@pytest.mark.parametrize("lengths", [[1], [1, 1, 1], [QUERY_BLOCK, 3], [QUERY_BLOCK + 1], [3, 300, 1]])
def test_threads_share_at_most_a_block_of_each_ring_at_a_time(lengths: list[int]) -> None:
    """A thread that is ahead would overwrite rows that another still reads."""
    count = len(lengths)
    batch = Batch(Plan([0] * sum(lengths), lengths, [5] * count, range(count), [[0]] * count))
    rows = []
    for bounds, some in blocks(batch):
        assert len(bounds) == len(range(count)[some]) + 1
        for first, last, sequence in zip(bounds, bounds[1:], range(count)[some], strict=False):
            assert 0 < last - first <= QUERY_BLOCK
            rows += [(sequence, row) for row in range(first, last)]
    starts = np.cumsum([0, *lengths])
    assert rows == [(b, row) for b in range(count) for row in range(starts[b], starts[b + 1])]


@settings(deadline=None, max_examples=60)
@given(
    heads=st.integers(1, 9), lengths=st.lists(st.integers(1, 700), min_size=1, max_size=3), top_k=st.integers(1, 40),
    queries=st.integers(1, 5), levels=st.sampled_from([1, 3, 1000]), cut=st.integers(0, 15), seed=seeds,
)  # fmt: skip
def test_selection_is_a_stable_sort_for_any_spans_and_cuts(
    heads: int, lengths: list[int], top_k: int, queries: int, levels: int, cut: int, seed: int
) -> None:
    """With few levels most scores tie, and the first entries win. Integers have exact products."""
    draws, size, per_span = np.random.default_rng(seed), 3, 8
    table = draws.permutation(len(lengths) * 100).reshape(len(lengths), 100)
    entries = draws.integers(-levels, levels + 1, (len(lengths) * 100 * per_span, size)).astype(np.float32)
    rows = len(lengths) * queries
    q = draws.integers(-2, 3, (rows, heads, size)).astype(np.float32)
    weights = draws.integers(-2, 3, (rows, heads)).astype(np.float32)
    visible = np.concatenate([np.sort(draws.integers(0, length + 1, queries)) for length in lengths])
    picks, counts = np.full((rows, 2 * top_k + LANES), -1), np.full(rows, -1)
    bounds, cut = np.arange(len(lengths) + 1) * queries, min(cut, rows)
    for first, last in ((cut, rows), (0, cut)):
        panels.choose(
            q, weights, bounds, visible, table, per_span, entries, NO_SCALES, top_k, first, last, picks, counts
        )
    for n in range(rows):
        keys = entries.reshape(-1, per_span, size)[table[n // queries]].reshape(-1, size)[: visible[n]]
        scores = np.einsum("j,js->s", weights[n], np.maximum(q[n] @ keys.T, 0))
        expected = np.sort(np.argsort(-scores, kind="stable")[:top_k])
        assert picks[n, : counts[n]].tolist() == expected.tolist()


@settings(deadline=None, max_examples=30)
@given(tokens=st.integers(1, 30), experts=st.integers(2, 9), seed=seeds)
def test_experts_have_the_same_bits_one_by_one_and_sorted(tokens: int, experts: int, seed: int) -> None:
    active, dim, width = 2, 5, 3
    logits, bias = randoms(seed, tokens, experts), randoms(seed + 1, experts)
    chosen, weights = np.empty((tokens, active), np.int64), np.empty((tokens, active), np.float32)
    loops.route(logits, bias, np.float32(1.5), False, chosen, weights)
    affinity = F.softplus(torch.from_numpy(logits)).sqrt()
    expected = (affinity + torch.from_numpy(bias)).sort(dim=-1, descending=True, stable=True).indices[:, :active]
    assert chosen.tolist() == expected.tolist()
    parts = affinity.gather(1, expected)
    close(weights, parts / parts.sum(-1, keepdim=True) * 1.5)

    x, shared = randoms(seed + 2, tokens, dim), randoms(seed + 3, tokens, dim)
    w13, w2 = randoms(seed + 4, experts, dim, 2 * width), randoms(seed + 5, experts, width, dim)
    limit, one_by_one = np.float32(1.0), np.empty((tokens, dim), np.float32)
    loops.mix_experts(x, chosen, weights, w13, w2, limit, shared, one_by_one)
    twin = torch.from_numpy(shared).clone()
    for n in range(tokens):
        for a in range(active):
            gate_up_X = torch.from_numpy(x[n]) @ torch.from_numpy(w13[chosen[n, a]])
            hidden = experts_twin.swiglu(gate_up_X, 1.0) * weights[n, a]
            twin[n] += hidden @ torch.from_numpy(w2[chosen[n, a]])
    close(one_by_one, twin)

    end = tokens * active
    counts, rows, row_weights = np.empty(experts, np.int64), np.empty(end, np.int64), np.empty(end, np.float32)
    places: Ints = np.empty_like(chosen)
    loops.sort_by_expert(chosen, weights, counts, rows, row_weights, places)
    assert counts.tolist() == np.bincount(chosen.ravel(), minlength=experts).tolist()
    taken, hidden_rows = x[rows], np.empty((end, width), np.float32)
    gate_up, down = np.empty((end, 2 * width), np.float32), np.empty((end, dim), np.float32)
    bounds = np.cumsum([0, *counts])
    for expert in range(experts):
        some = slice(bounds[expert], bounds[expert + 1])
        loops.multiply(taken[some], w13[expert], 0, 2 * width, gate_up[some], 0)
    loops.swiglu(gate_up, row_weights, limit, 0, end // 2, hidden_rows)
    loops.swiglu(gate_up, row_weights, limit, end // 2, end, hidden_rows)
    for expert in range(experts):
        some = slice(bounds[expert], bounds[expert + 1])
        loops.multiply(hidden_rows[some], w2[expert], 0, dim, down[some], 0)
    out = np.empty_like(one_by_one)
    loops.sum_experts(down, places, shared, out)
    assert np.array_equal(out, one_by_one)


@settings(deadline=None, max_examples=40)
@given(
    groups=st.integers(1, 8), rotary=st.integers(0, 5), per_page=st.integers(1, 5), rows=st.integers(1, 9),
    exponents=st.integers(-130, 100), seed=seeds,
)  # fmt: skip
def test_key_value_rows_have_the_bytes_of_their_twin(
    groups: int, rotary: int, per_page: int, rows: int, exponents: int, seed: int
) -> None:
    """Groups differ in magnitude, down to subnormal values; some values are zero, some lie half-way between codes."""
    plain, rotary = groups * quantize.KV_GROUP, 2 * rotary + 2
    draws = np.random.default_rng(seed)
    x = randoms(seed, rows, plain + rotary)
    x *= np.exp2(exponents + draws.integers(-9, 9, (rows, 1))).astype(np.float32)
    x[draws.random(x.shape) < 0.1] = 0.0
    ties = draws.random(x.shape) < 0.2
    x[ties] = ((x[ties].view(np.uint32) & 0xFFF00000) | 0x00080000).view(np.float32)
    pages = -(-rows // per_page)
    slots, found = (
        draws.permutation(pages * per_page)[:rows],
        np.full((pages, per_page, quantize.kv_row_bytes(plain + rotary, rotary)), 0xFF, np.uint8),
    )
    twin, back = torch.from_numpy(found.copy()), np.empty_like(x)
    for n, slot in enumerate(slots):
        loops.encode_row(x[n], found.reshape(-1), slot, per_page, rotary)
        loops.decode_row(found.reshape(-1), slot, per_page, rotary, back, n)
    quantize.store_kv_rows(torch.from_numpy(x), torch.from_numpy(slots), twin, rotary=rotary)
    assert np.array_equal(found, twin.numpy())
    read = quantize.load_kv_rows(twin, torch.from_numpy(slots), plain + rotary, rotary=rotary, dtype=torch.float32)
    assert torch.equal(torch.from_numpy(back), read)
    assert torch.equal(quantize.round_kv_rows(torch.from_numpy(x), rotary=rotary), read)


def test_every_code_is_decoded_and_nan_stays_nan_in_bytes() -> None:
    codes, rows = np.arange(256, dtype=np.uint8), np.empty((4, 66), np.float32)
    for n in range(4):
        page = np.concatenate((codes[64 * n : 64 * (n + 1)], np.zeros(4, np.uint8), np.full(8, 127 + n, np.uint8)))
        loops.decode_row(page, 0, 1, 2, rows, n)
    expected = quantize.decode_e4m3(torch.from_numpy(codes)).view(4, 64) * torch.tensor([[1.0], [2.0], [4.0], [8.0]])
    assert np.array_equal(rows[:, :64], expected.numpy(), equal_nan=True) and np.isnan(rows).sum() == 2
    row, back = randoms(0, 64 + 2), np.empty((1, 66), np.float32)
    row[[3, 65]] = np.nan
    stored = np.empty(64 + 4 + 8, np.uint8)
    loops.encode_row(row, stored, 0, 1, 2)
    loops.decode_row(stored, 0, 1, 2, back, 0)
    assert np.isnan(back[0]).nonzero()[0].tolist() == [3, 65]


@pytest.mark.parametrize("size", [1, 100, 128, 300])
def test_activations_are_rounded_like_their_twin(size: int) -> None:
    x = randoms(size, 5, size) * np.array([[1.0], [1e-6], [0.0], [1e9], [3.0]], np.float32)
    x[4, 0] = np.nan
    out = np.empty_like(x)
    loops.round_activations(x, out)
    twin = quantize.round_activations(torch.from_numpy(x))
    assert np.array_equal(out[:4], twin[:4].numpy()) and np.isnan(out[4, 0])


@pytest.mark.parametrize("size", [32, 64, 128])
def test_index_queries_are_rounded_like_their_twin(size: int) -> None:
    x = randoms(size, 7, 3, size) * np.exp2(np.arange(-3.0, 4.0)).astype(np.float32)[:, None, None]
    x[0, 0] = 0.0
    twin = quantize.round_index(torch.from_numpy(x.copy()))
    loops.round_index(x)
    assert np.array_equal(x, twin.numpy())


def test_nan_stays_nan() -> None:
    nan = np.full((1, 4), np.nan, np.float32)
    out, ones = np.empty((1, 2), np.float32), np.ones(1, np.float32)
    loops.swiglu(nan, ones, np.float32(7), 0, 1, out)
    assert np.isnan(out).all()
    normed = np.empty((1, 4), np.float32)
    loops.rms_norm(nan, np.ones(4, np.float32), EPS, normed)
    assert np.isnan(normed).all()
    weights, chosen = np.empty((1, 2), np.float32), np.empty((1, 2), np.int64)
    loops.route(nan, np.zeros(4, np.float32), np.float32(1), False, chosen, weights)
    assert np.isnan(weights).all() and ((chosen >= 0) & (chosen < 4)).all()
    keys, q, one = np.ones((500, 1), np.float32), np.ones((1, 1, 1), np.float32), np.ones((1, 1), np.float32)
    keys[[7, 300]] = np.nan
    picks, counts = np.empty((1, 2 * 3 + LANES), np.int64), np.zeros(1, np.int64)
    panels.choose(
        q, one, np.array([0, 1]), np.array([500]), np.array([[0]]), 500, keys, NO_SCALES, 3, 0, 1, picks, counts
    )
    assert picks[0, :3].tolist() == [0, 7, 300]


def test_kernels_compile_without_a_writable_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    njit = numba.njit

    def read_only(signature: str | None, *, cache: bool, **options: Any) -> Any:
        if cache:
            raise RuntimeError("cannot cache function: no locator available")
        return njit(signature, cache=cache, **options)

    monkeypatch.setattr(numba, "njit", read_only)

    def twice(x: np.float32) -> np.float32:
        return x + x

    assert loops.strict(twice)(np.float32(4)) == 8


@pytest.mark.parametrize("kernel", [loops.multiply, loops.attend, panels.choose])
def test_kernels_are_cached_on_disk(kernel: object) -> None:
    """A second process loads them; compiling all of them takes ten seconds."""
    assert type(kernel.stats.cache_path) is str  # type: ignore[attr-defined]
