"""Sparse attention (`triton/attention.py`) beside torch's attention over rows that were gathered before the clock.

No head has a sink here and nothing is rotated, so that torch computes the same function; `correctness.py` has both.
Dimension key: `agentkit_kernels.ops`; S keys of a query.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from agentkit_kernels.gpu.bench import Bench, Peer, absent
from agentkit_kernels.gpu.record import Goal, Measurement, Skipped, Unit
from agentkit_kernels.ops import QUERY_BLOCK
from agentkit_kernels.reference.quantize import kv_row_bytes, load_kv_rows, store_kv_rows
from agentkit_kernels.triton.attention import attend

SPAN = 256
"""Tokens of a span."""
_CHUNK = 1 << 18
"""Rows quantised or gathered at once."""


def kv_pages(bench: Bench, pages: int, rows: int, *, fp8: bool = True) -> Tensor:
    """Return pages of random key-value rows: uint8 [pages, rows, bytes of a row] in the 8-bit format, or float32
    [pages, rows, K]."""
    size, rotary = bench.shapes.head_dim, bench.shapes.qk_rope_head_dim
    if not fp8:
        return bench.floats(pages, rows, size, dtype=torch.float32)
    made = torch.zeros(pages, rows, kv_row_bytes(size, rotary), dtype=torch.uint8, device=bench.device)
    fill_kv_pages(bench, made)
    return made


def fill_kv_pages(bench: Bench, pages: Tensor) -> None:
    """Store random key-value rows in every row of pages in the 8-bit format."""
    count = pages.shape[0] * pages.shape[1]
    for low in range(0, count, _CHUNK):
        slots = bench.ints(range(low, min(low + _CHUNK, count)))
        rows = bench.floats(len(slots), bench.shapes.head_dim)
        store_kv_rows(rows, slots, pages, rotary=bench.shapes.qk_rope_head_dim)


@dataclass(frozen=True, slots=True)
class Case:
    """Sequences that compute `tokens` new tokens each from position `start` on.

    Attributes:
        arguments: Of `attend`.
        tokens: New tokens per sequence.
        sequences: How many there are.
    """

    arguments: dict[str, Any]
    tokens: int
    sequences: int

    def run(self, *, decode: bool) -> Tensor:
        """Launch the kernels."""
        return attend(**self.arguments, decode=decode)

    @property
    def keys(self) -> int:
        """Keys that each query sees."""
        topk = self.arguments["topk"]
        if topk is not None:
            return int(self.arguments["window"] + topk[0].shape[1])
        ratio = self.arguments["ratio"]
        return int(self.arguments["window"] + ((int(self.arguments["positions"][0]) + 1) // ratio if ratio else 0))

    @property
    def flops(self) -> int:
        """4 * K per query, head and key."""
        rows, heads, size = self.arguments["q"].shape
        return int(4 * rows * heads * size * self.keys)

    @property
    def bytes(self) -> int:
        """Each distinct row that the queries see once, queries and result once."""
        q, row = self.arguments["q"], self.arguments["window_pool"][0, 0]
        window = self.sequences * (self.arguments["window"] + self.tokens - 1)
        topk, tables = self.arguments["topk"], self.arguments["block_tables"]
        entries = 0
        if topk is not None:
            picks = topk[0].long() + self.arguments["sequences"][:, None] * (1 << 40)
            entries = len(picks.unique())
        elif tables is not None:
            entries = self.sequences * (self.keys - self.arguments["window"])
        return int((window + entries) * row.nbytes + 2 * q.nbytes)

    def rows(self, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        """Return the keys of every query, dequantised: [N, S, K]."""
        count, chunk = len(self.arguments["q"]), max(1, _CHUNK // self.keys)
        return torch.cat([self._rows(low, min(low + chunk, count), dtype) for low in range(0, count, chunk)])

    def _rows(self, low: int, high: int, dtype: torch.dtype) -> Tensor:
        a, size, rotary = self.arguments, self.arguments["q"].shape[2], self.arguments["rotations"].shape[1]
        device = a["q"].device

        def load(pages: Tensor, slots: Tensor) -> Tensor:
            if pages.dtype != torch.uint8:
                return pages.flatten(0, 1)[slots].to(dtype)
            rows = load_kv_rows(pages, slots.flatten(), size, rotary=rotary, dtype=dtype)
            return rows.view(*slots.shape, size)

        n = torch.arange(low, high, device=device)[:, None]
        t, b = a["positions"][low:high, None], a["sequences"][low:high, None]
        ages = torch.arange(a["window"], device=device)
        own = n - ages >= a["cu_seqlens"][b]
        new = load(a["kv"][None], (n - ages).clamp(min=0))
        ring = a["window_pool"].shape[1]
        old = load(a["window_pool"], a["slots"][b] * ring + (t - ages) % ring)
        parts = [torch.where(own[:, :, None], new, old)]
        if a["ratio"]:
            per_span = a["entries"].shape[1]
            entry = torch.arange(self.keys - a["window"], device=device).expand(high - low, -1)
            if a["topk"] is not None:
                entry = a["topk"][0][low:high].long()
            span = a["block_tables"][b, entry // per_span]
            parts.append(load(a["entries"], span * per_span + entry % per_span))
        return torch.cat(parts, dim=1)


def case(
    bench: Bench, sequences: int, tokens: int, start: int, ratio: int, picks: int = 0, *, fp8: bool = True
) -> Case:
    """Make a case whose queries see a whole window, and `picks` random entries each, or all entries.

    Rows are in the 8-bit format, or float32.
    """
    shapes = bench.shapes
    count, rotary, window = sequences * tokens, shapes.qk_rope_head_dim, shapes.sliding_window
    assert start >= window and (not picks or (start + 1) // ratio >= picks), (start, window, picks)
    positions = bench.ints(range(start, start + tokens)).repeat(sequences)
    rotations = bench.floats(count, rotary, dtype=torch.float32)
    rotations[:, 0::2], rotations[:, 1::2] = 1.0, 0.0
    arguments: dict[str, Any] = {
        "q": bench.floats(count, shapes.num_attention_heads, shapes.head_dim) * (3 * shapes.head_dim**-0.5),
        "kv": kv_pages(bench, 1, count, fp8=fp8)[0],
        "rotations": rotations,
        "sink": torch.full((shapes.num_attention_heads,), -1e30, device=bench.device),
        "positions": positions,
        "sequences": bench.ints(range(sequences)).repeat_interleave(tokens),
        "cu_seqlens": bench.ints(range(0, count + 1, tokens)),
        "slots": bench.ints(range(sequences)),
        "window_pool": kv_pages(bench, sequences, window + QUERY_BLOCK, fp8=fp8),
        "window": window,
        "ratio": ratio,
        "entries": None,
        "block_tables": None,
        "topk": None,
    }
    if ratio:
        spans = -(-(start + tokens) // SPAN)
        arguments["entries"] = kv_pages(bench, sequences * spans, SPAN // ratio, fp8=fp8)
        ids = torch.randperm(sequences * spans, generator=bench.generator, device=bench.device)
        arguments["block_tables"] = ids.view(sequences, spans)
    if picks:
        chosen = bench.distinct(count, picks, (positions + 1) // ratio).int()
        arguments["topk"] = (chosen, torch.full((count,), picks, device=bench.device))
    return Case(arguments, tokens, sequences)


def attention(q_NHK: Tensor, rows_NSK: Tensor) -> Tensor:
    """Plain attention of scaled queries."""
    scores = torch.bmm(q_NHK, rows_NSK.mT).float()
    return torch.bmm(scores.softmax(-1).to(rows_NSK.dtype), rows_NSK)


def sdpa(q_NHK: Tensor, rows_NSK: Tensor) -> Tensor:
    """torch's fused attention; the heads of a token are queries over the same rows."""
    rows = rows_NSK[:, None]
    return F.scaled_dot_product_attention(q_NHK[:, None], rows, rows, scale=1.0)[:, 0]


def peers(bench: Bench, made: Case) -> list[Peer]:
    """Return torch's ways over gathered bfloat16 rows."""
    q, rows = made.arguments["q"], made.rows()
    compiled = bench.compiled(attention)
    return [
        Peer("SDPA, gathered bf16 rows", lambda: sdpa(q, rows)),
        Peer("torch.compile, gathered bf16 rows", lambda: compiled(q, rows)),
    ]


def sparse_decode(bench: Bench) -> Iterator[Measurement | Skipped]:
    """H4: 64 sequences decode over 512 chosen entries and the window, 64 heads, at 128K tokens."""
    goals: dict[int, tuple[Unit, float | None, float | None]] = {
        bench.pick(64, 2): ("TFLOPS", 200, 300),
        1: ("us", None, None),
    }
    for sequences, (unit, good, moonshot) in goals.items():
        start, picks = bench.pick(131_071, 199), bench.shapes.index_topk
        made = case(bench, sequences, 1, start, 4, picks)
        yield bench.measure(
            f"B={sequences}, {made.keys} keys",
            lambda made=made: made.run(decode=True),  # type: ignore[misc]
            Goal(unit, good, moonshot),
            bytes=made.bytes,
            flops=made.flops,
            peers=peers(bench, made),
        )
    yield absent("FlashMLA, sparse decoding", "flash_mla")


def hca_decode(bench: Bench) -> Iterator[Measurement]:
    """H5: 1 and 32 sequences decode over all 8,192 entries of a million tokens, and the window."""
    for sequences, good, moonshot in ((1, 12.0, 5.0), (bench.pick(32, 2), 90.0, 65.0)):
        made = case(bench, sequences, 1, bench.pick(1_048_575, 1023), 128)
        yield bench.measure(
            f"B={sequences}, {made.keys} keys",
            lambda made=made: made.run(decode=True),  # type: ignore[misc]
            Goal("us", good, moonshot),
            bytes=made.bytes,
            flops=made.flops,
            peers=peers(bench, made),
        )


def sparse_prefill(bench: Bench) -> Iterator[Measurement | Skipped]:
    """H6: 4,096 queries of one sequence, 512 chosen entries and the window each."""
    tokens = bench.pick(4096, 5)
    made = case(bench, 1, tokens, bench.pick(4096, 60), 4, bench.shapes.index_topk)
    yield bench.measure(
        f"{tokens} queries, {made.keys} keys",
        lambda: made.run(decode=False),
        Goal("TFLOPS", 250, 400),
        bytes=made.bytes,
        flops=made.flops,
        peers=peers(bench, made),
    )
    yield absent("FlashMLA, sparse prefill", "flash_mla")
