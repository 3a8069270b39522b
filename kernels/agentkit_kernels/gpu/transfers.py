"""Copies that overlap with computing: experts streamed from host memory, spans restored from host memory and disk.

These parts measure what the machine allows with large copies (a whole expert, a whole span), in buffers of their own.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from agentkit_kernels.gpu.bench import Bench, OutputsDifferError
from agentkit_kernels.gpu.experts import LIMIT, Rows, mxfp4
from agentkit_kernels.gpu.record import Goal, Measurement, PeerResult
from agentkit_kernels.packed import MXFP4_GROUP, Packed
from agentkit_kernels.triton.experts import combine, down, experts, gate_up, group
from agentkit_kernels.triton.linear import operand


class Queue:
    """A stream of the device; in a rehearsal, work is done at once."""

    def __init__(self, bench: Bench) -> None:
        self.stream: Any = None if bench.rehearse else torch.cuda.Stream()  # type: ignore[no-untyped-call]

    def submit(self, work: Callable[[], object], after: Sequence[Any] = ()) -> Any:
        """Do `work` once the events in `after` have happened; return the event of its end."""
        if self.stream is None:
            work()
            return None
        for event in after:
            if event is not None:
                self.stream.wait_event(event)
        with torch.cuda.stream(self.stream):
            work()
            return self.stream.record_event()


def pinned(bench: Bench, *shape: int) -> Tensor:
    """Return uninitialised bytes in host memory that the device can read by itself."""
    return torch.empty(*shape, dtype=torch.uint8, pin_memory=not bench.rehearse)


# --- experts -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Streamed:
    """One layer of experts in host memory, each in one piece: w1, w3 and w2 with their scales. Groups of experts are
    copied alternately into two buffers, while the other one is multiplied."""

    host: Tensor
    buffers: tuple[Tensor, Tensor]
    shapes: tuple[tuple[int, int], ...]
    copies: Queue
    products: Queue

    @property
    def count(self) -> int:
        """Experts in a group."""
        return len(self.buffers[0])

    def weights(self, pieces: Tensor) -> list[Packed]:
        """Return the stacks w1, w3 and w2 of a group, as views of its pieces."""
        stacks, low = [], 0
        for outputs, inputs in self.shapes:
            sizes = (outputs, inputs // 2), (outputs, inputs // MXFP4_GROUP)
            views = []
            for rows, columns in sizes:
                views.append(pieces[:, low : low + rows * columns].view(len(pieces), rows, columns))
                low += rows * columns
            scale = views[1].view(torch.float8_e8m0fnu)
            stacks.append(Packed("mxfp4", views[0], scale, (len(pieces), outputs, inputs)))
        return stacks

    def run(self, rows: Rows, *, copy: bool = True, compute: bool = True) -> Tensor:
        """Compute the mixture of `rows`; without `copy` or `compute` do only the other."""
        active = rows.experts.shape[1]
        flat, weights = rows.experts.flatten(), rows.weights.flatten()
        order = flat.argsort(stable=True)
        counts = (flat[:, None] // self.count == torch.arange(len(self.host) // self.count, device=flat.device)).sum(0)
        pieces = torch.split(order, counts.tolist())
        out = rows.x.new_empty(len(flat), rows.x.shape[1])
        done: list[Any] = [None, None]
        for number, pairs in enumerate(pieces):
            buffer, first = self.buffers[number % 2], number * self.count
            copied = None
            if copy:
                source = self.host[first : first + self.count]
                copied = self.copies.submit(partial(buffer.copy_, source, non_blocking=True), [done[number % 2]])
            if compute and len(pairs):
                work = partial(self._multiply, rows.x, flat, weights, active, buffer, pairs, first, out)
                done[number % 2] = self.products.submit(work, [copied])
        if self.products.stream is not None:
            torch.cuda.synchronize()
        return combine(out, rows.shared)

    def _multiply(
        self,
        x: Tensor,
        flat: Tensor,
        weights: Tensor,
        active: int,
        buffer: Tensor,
        pairs: Tensor,
        first: int,
        out: Tensor,
    ) -> None:
        w1, w3, w2 = (operand(weight) for weight in self.weights(buffer))
        groups = group((flat[pairs] - first)[:, None], self.count)
        hidden = gate_up(x[pairs // active], groups, weights[pairs], w1, w3, LIMIT, 1)
        out[pairs] = down(hidden, groups, w2)


def expert_streaming(bench: Bench) -> Iterator[Measurement]:
    """H13: one layer of 256 MXFP4 experts in host memory, for a chunk of 16,384 tokens: the longer of copying and
    computing over the time of both together."""
    shapes = bench.shapes
    dim, width, number = shapes.hidden_size, shapes.moe_intermediate_size, shapes.n_routed_experts
    stacks = [mxfp4(bench, number, *size) for size in ((width, dim), (width, dim), (dim, width))]
    parts = [part.view(torch.uint8).flatten(1) for stack in stacks for part in (stack.data, stack.scale)]
    host = pinned(bench, number, sum(part.shape[1] for part in parts))
    host.copy_(torch.cat(parts, dim=1))
    count = bench.pick(16, 4)
    buffers = [torch.empty(count, host.shape[1], dtype=torch.uint8, device=bench.device) for _ in range(2)]
    sizes = ((width, dim), (width, dim), (dim, width))
    layer = Streamed(host, (buffers[0], buffers[1]), sizes, Queue(bench), Queue(bench))
    tokens = bench.pick(16_384, 5)
    rows = Rows.random(bench, tokens)
    bench.synchronise()
    expected = experts(rows.x, rows.experts, rows.weights, stacks[0], stacks[1], stacks[2], LIMIT, rows.shared)
    if not torch.equal(layer.run(rows), expected):
        raise OutputsDifferError("streamed experts differ from resident ones")
    both = bench.wall(lambda: layer.run(rows))
    copying = bench.wall(lambda: layer.run(rows, compute=False))
    computing = bench.wall(lambda: layer.run(rows, copy=False))
    longest = max(copying.us, computing.us)
    yield Measurement(
        f"{tokens} tokens, {number} experts in groups of {count}",
        longest / both.us,
        Goal("overlap", 0.7, 0.95),
        both.spread,
        both.us,
        peers=[PeerResult("copy, then compute", longest / (copying.us + computing.us))],
        note=f"copying alone {copying.us:.0f} us ({host.nbytes / copying.us / 1e3:.1f} GB/s), computing alone "
        f"{computing.us:.0f} us; the same bits as resident experts",
    )


# --- spans -------------------------------------------------------------------------------------------------------

CSA_LAYERS, HCA_LAYERS = 21, 20
"""Layers of V4-Flash with compressed entries."""


def span_parts() -> list[int]:
    """Return the bytes of each layer's rows in a span of 256 tokens: entries of 584 bytes, index keys of 132."""
    return [64 * 584, 64 * 132] * CSA_LAYERS + [2 * 584] * HCA_LAYERS


def tiers(bench: Bench) -> Iterator[Measurement]:
    """H14: the spans of a session of 131,072 tokens, from host memory and from disk to scattered places on the device,
    in one copy per span."""
    parts = span_parts()
    size, spans = sum(parts), bench.pick(512, 3)
    host = pinned(bench, spans, size)
    for row in host:
        row.copy_(bench.below(256, size, dtype=torch.uint8))
    pool = torch.zeros(2 * spans, size, dtype=torch.uint8, device=bench.device)
    places: list[int] = torch.randperm(2 * spans)[:spans].tolist()
    flat = torch.empty(spans, size, dtype=torch.uint8, device=bench.device)

    def restore() -> None:
        for row, place in zip(host, places, strict=True):
            pool[place].copy_(row, non_blocking=True)

    def restore_parts() -> None:
        for row, place in zip(host, places, strict=True):
            for source, target in zip(torch.split(row, parts), torch.split(pool[place], parts), strict=True):
                target.copy_(source, non_blocking=True)

    def check(name: str) -> None:
        bench.synchronise()
        if not torch.equal(pool[places].cpu(), host):
            raise OutputsDifferError(f"spans restored {name} differ")
        pool.zero_()

    def rate(us: float) -> float:
        return host.nbytes / us / 1e3

    restore()
    check("from host memory")
    line = bench.wall(lambda: flat.copy_(host, non_blocking=True))
    ours, theirs = bench.wall(restore), bench.wall(restore_parts)
    check("from host memory by layer")
    yield Measurement(
        f"host to device, {spans} spans",
        line.us / ours.us,
        Goal("of line rate", None, 0.9),
        ours.spread,
        ours.us,
        peers=[PeerResult(f"{len(parts)} copies per span", line.us / theirs.us, theirs.spread)],
        note=f"{rate(ours.us):.1f} GB/s; one copy of everything {rate(line.us):.1f} GB/s",
    )
    with tempfile.TemporaryDirectory() as folder:
        yield from _disk(bench, Path(folder), host, pool, places, check, rate)


def _disk(
    bench: Bench,
    folder: Path,
    host: Tensor,
    pool: Tensor,
    places: Sequence[int],
    check: Callable[[str], None],
    rate: Callable[[float], float],
) -> Iterator[Measurement]:
    file, saved = folder / "spans", folder / "saved.pt"
    file.write_bytes(host.numpy().tobytes())
    torch.save(host, saved)
    staging = pinned(bench, *host.shape)
    views = [memoryview(row.numpy()) for row in staging]

    def forget(path: Path) -> int:
        """Open a file whose pages are not in memory."""
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        return descriptor

    def read(*, to_device: bool) -> None:
        descriptor = forget(file)
        try:
            for n, (view, place) in enumerate(zip(views, places, strict=True)):
                got = os.preadv(descriptor, [view], n * len(view))
                assert got == len(view), "a regular file gives what it has"
                if to_device:
                    pool[place].copy_(staging[n], non_blocking=True)
        finally:
            os.close(descriptor)

    def load() -> None:
        os.close(forget(saved))
        pool[list(places)] = torch.load(saved, weights_only=True).to(bench.device)

    read(to_device=True)
    check("from disk")
    line, ours, theirs = (
        bench.wall(lambda: read(to_device=False)),
        bench.wall(lambda: read(to_device=True)),
        bench.wall(load),
    )
    yield Measurement(
        f"disk to device, {len(host)} spans",
        line.us / ours.us,
        Goal("of line rate", None, 0.9),
        ours.spread,
        ours.us,
        peers=[PeerResult("torch.load", line.us / theirs.us, theirs.spread)],
        note=f"{rate(ours.us):.2f} GB/s; reading alone {rate(line.us):.2f} GB/s",
    )
