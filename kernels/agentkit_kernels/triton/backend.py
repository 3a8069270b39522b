"""`Triton`: the operations of this folder, as `agentkit_kernels.ops.Ops`.

Activations have one dtype, bfloat16 or float32; logits are float32. A lookup of rows is torch's, all other operations
are Triton kernels. Only batches of a fixed size, for CUDA graphs, have padding.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from agentkit_kernels.ops import QUERY_BLOCK, Compressor, Heads, HyperConnection, HyperHead, Plan, Router
from agentkit_kernels.packed import FP8_BLOCK, Packed, PackedRows, in_memory
from agentkit_kernels.pinned_experts import PinnedStack, row_groups
from agentkit_kernels.reference import host_zeros
from agentkit_kernels.trace import Trace
from agentkit_kernels.triton import attention, compressor, experts, hyper_connections, indexer, linear, rope, router
from agentkit_kernels.triton.launch import INTERPRET
from agentkit_kernels.triton.norm import rms_norm
from agentkit_kernels.triton.qkv import qkv
from agentkit_kernels.triton.sampler import sample
from agentkit_kernels.triton.swiglu import swiglu

DECODING = 32
"""Up to this many rows, attention divides each row among programs. A row's bits do not depend on it."""

State = Mapping[str, Tensor]
TopK = tuple[Tensor, Tensor]
Matrix = Tensor | Packed


class Batch:
    """The rows of all sequences, end to end; see `ops.Batch`.

    Rows beyond those of the plan belong to no sequence: `sequences` is negative there, and sequences beyond the plan's
    have no rows. Kernels store nothing for them.

    Attributes:
        tokens: Rows, with those beyond the plan's.
        longest: An upper bound of the rows of a sequence.
        block_tables: int64 [B, spans].
    """

    def __init__(self, rows: int, block_tables: Tensor, longest: int) -> None:
        """The plan of the rows is still to be written."""
        sequences = len(block_tables)
        self.trace: Trace | None = None
        self.tokens, self.longest, self.block_tables = rows, longest, block_tables
        self._sizes = (rows, rows, rows, sequences, sequences, sequences + 1)
        size = sum(map(_aligned, self._sizes))
        self._integers = torch.empty(size, dtype=torch.int64, device=block_tables.device)
        self.ids, self.positions, self.sequences, self.starts, self.slots, self.cu_seqlens = self._split(self._integers)

    @property
    def short(self) -> bool:
        """True if a window has room for the forward's rows beside those that its queries read; see `QUERY_BLOCK`."""
        return self.longest <= QUERY_BLOCK

    def write(self, plan: Plan) -> None:
        """Copy all of a plan but its block tables to the device, at once and without waiting for it."""
        rows, sequences = len(plan.ids), len(plan.lengths)
        host = host_integers(len(self._integers), self._integers.device).zero_()
        ids, positions, sequence_ids, starts, slots, cu_seqlens = self._split(host)
        lengths = torch.tensor(plan.lengths, dtype=torch.int64)
        ids[:rows] = torch.as_tensor(plan.ids, dtype=torch.int64)
        starts[:sequences] = torch.tensor(plan.starts, dtype=torch.int64)
        slots[: len(plan.slots)] = torch.tensor(plan.slots, dtype=torch.int64)
        cu_seqlens[1:] = rows
        cu_seqlens[1 : sequences + 1] = lengths.cumsum(0)
        sequence_ids[rows:] = -1
        sequence_ids[:rows] = torch.repeat_interleave(lengths)
        positions[:rows] = torch.arange(rows) + (starts - cu_seqlens[:-1])[sequence_ids[:rows]]
        self._integers.copy_(host, non_blocking=True)

    def _split(self, integers: Tensor) -> list[Tensor]:
        parts = integers.split([*map(_aligned, self._sizes)])
        return [part[:size] for part, size in zip(parts, self._sizes, strict=True)]


class BlockTables:
    """Block tables at one address on the device, for CUDA graphs; a row is copied again only when it changes.

    Attributes:
        rows: int64 [B, spans], 0 beyond the spans of a sequence.
    """

    def __init__(self, sequences: int, spans: int, device: torch.device) -> None:
        self.rows = torch.zeros(sequences, spans, dtype=torch.int64, device=device)
        self._held: list[list[int]] = [[] for _ in range(sequences)]

    def write(self, tables: Sequence[Sequence[int]]) -> None:
        """Hold these span ids of the first sequences, without waiting for the device."""
        for index, (table, held) in enumerate(zip(tables, self._held, strict=False)):
            if table != held:
                host = host_integers(max(len(table), len(held)), self.rows.device).zero_()
                host[: len(table)] = torch.tensor(table, dtype=torch.int64)
                self.rows[index, : len(host)].copy_(host, non_blocking=True)
                self._held[index] = [*table]


def host_integers(count: int, device: torch.device) -> Tensor:
    """Return uninitialised int64 [count] in host memory from which copies to the device need not wait.

    The allocator of page-locked memory gives it to nobody else before the copy is done.
    """
    return torch.empty(count, dtype=torch.int64, pin_memory=device.type == "cuda")


def _aligned(count: int) -> int:
    """Return the number of int64 values that keep the next ones at a multiple of 16 bytes: Triton compiles a kernel
    again for addresses that are not."""
    return count + count % 2


@dataclass(slots=True)
class Weight:
    """Matrices that share an input, in as few pieces as their formats allow.

    Attributes:
        parts: The pieces, each [X, K], or [E, X, K] in a stack.
        wide: Whether products are float32.
        grouped: The only part as a stack [G, O, K], once `grouped_linear` has read it.
        pinned: Experts in host memory, in place of parts.
    """

    parts: list[Matrix]
    wide: bool = False
    grouped: Matrix | None = None
    pinned: PinnedStack | None = None

    @property
    def matrix(self) -> Tensor:
        """The only part, which is not packed."""
        (part,) = self.parts
        assert isinstance(part, Tensor)
        return part


class Triton:
    """See `ops.Ops`."""

    name = "triton"

    def __init__(
        self,
        device: torch.device | str,
        dtype: torch.dtype = torch.bfloat16,
        *,
        expert_cache_bytes: int | None = None,
    ) -> None:
        """`dtype` is that of activations: bfloat16 or float32. With `expert_cache_bytes`, packed experts stay in host
        memory, and this many bytes of them on the device.

        Raises:
            ValueError: The device is no GPU, outside Triton's interpreter.
        """
        self.device, self.dtype = torch.device(device), dtype
        if self.device.type != "cuda" and not INTERPRET:
            raise ValueError(
                f'backend="triton" needs a GPU, and the device is {str(device)!r}; use backend="cpu", or set '
                "TRITON_INTERPRET=1 to interpret the kernels"
            )
        self.exact = True
        self.expert_cache_bytes = expert_cache_bytes
        self.pinned: list[PinnedStack] = []

    # --- memory ---

    def zeros(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        if self.device.type == "cpu":
            return host_zeros(shape, dtype)
        return torch.zeros(*shape, dtype=dtype, device=self.device)

    def state(self, pools: Mapping[str, Tensor]) -> State:
        return pools

    def weight(
        self, *parts_XK: Tensor | PackedRows, detached: Sequence[Tensor | PackedRows] = (), wide: bool = False
    ) -> Weight:
        parts: list[Matrix] = []
        for part in map(self._move, (*parts_XK, *detached)):
            joined = _join(parts[-1], part) if parts else None
            if joined is None:
                parts.append(part)
            else:
                parts[-1] = joined
        return Weight(parts, wide)

    def stack(self, *parts_EXK: Tensor | PackedRows) -> Weight:
        if self.expert_cache_bytes is None:
            return Weight([*map(self._move, parts_EXK)])
        stack = PinnedStack([part for part in map(in_memory, parts_EXK) if isinstance(part, Packed)], self.device)
        self.pinned.append(stack)
        return Weight([], pinned=stack)

    def table(self, rows: Tensor) -> Tensor:
        return rows.detach().to(self.device)

    def vector(self, parameter: Tensor) -> Tensor:
        return parameter.detach().to(self.device, torch.float32).contiguous()

    def settle(self, *, exact: bool, active: int = 1) -> None:
        self.exact = exact
        if self.expert_cache_bytes is not None and self.pinned:
            one = sum(stack.bytes_per_expert for stack in self.pinned)
            slots, least = self.expert_cache_bytes // one, min(active, self.pinned[0].experts)
            if slots < least:
                raise ValueError(
                    f"expert_cache_bytes must hold the experts of each layer that one token chooses, {least} x {one} "
                    f"bytes, got {self.expert_cache_bytes}; pass {least * one} or more for each device, or leave it "
                    "out to keep all experts on the device"
                )
            for stack in self.pinned:
                stack.allocate(slots)

    def batch(self, plan: Plan) -> Batch:
        count, most = len(plan.lengths), max(map(len, plan.block_tables), default=0)
        padded = [span for table in plan.block_tables for span in (*table, *[0] * (most - len(table)))]
        batch = Batch(len(plan.ids), self._to_device(padded).view(count, most), max(plan.lengths, default=0))
        batch.write(plan)
        return batch

    def fixed_batch(self, rows: int, block_tables: Tensor, longest: int) -> Batch:
        """Return a batch for `rows` rows of as many sequences, in which plans are written again; see `Batch`."""
        return Batch(rows, block_tables, longest)

    def fixed_block_tables(self, sequences: int, spans: int) -> BlockTables:
        """Return block tables for as many sequences of up to `spans` spans."""
        return BlockTables(sequences, spans, self.device)

    def _to_device(self, integers: Sequence[int]) -> Tensor:
        host = host_integers(len(integers), self.device)
        host[:] = torch.tensor(integers, dtype=torch.int64)
        return host.to(self.device, non_blocking=True)

    def array(self, rows: Tensor, batch: Batch) -> Tensor:
        return rows.to(self.device, self.dtype)

    def tensor(self, array: Tensor) -> Tensor:
        return array

    def _move(self, part: Tensor | PackedRows) -> Matrix:
        matrix = in_memory(part)
        if isinstance(matrix, Tensor):
            return matrix.detach().to(self.device).contiguous()
        data, scale = matrix.data.to(self.device).contiguous(), matrix.scale.to(self.device).contiguous()
        return Packed(matrix.format, data, scale, matrix.shape)

    # --- rows ---

    def embed(self, batch: Batch, table: Tensor, streams: int) -> Tensor:
        return F.embedding(batch.ids, table).to(self.dtype).unsqueeze(1).repeat(1, streams, 1)

    def linear(self, x: Tensor, weight: Weight, *, rounded: Tensor | None = None) -> Tensor:
        """See `ops.Ops`; packed matrices multiply `rounded`, if it is given."""
        sizes = [part.shape[-2] for part in weight.parts]
        out = x.new_empty(len(x), sum(sizes), dtype=torch.float32 if weight.wide else x.dtype)
        first = 0
        for part, size in zip(weight.parts, sizes, strict=True):
            rows = x if rounded is None or isinstance(part, Tensor) else rounded
            linear.linear(rows, part, out=out[:, first : first + size], exact=self.exact)
            first += size
        return out

    def grouped_linear(self, x: Tensor, weight: Weight, groups: int) -> Tensor:
        if weight.grouped is None:
            weight.grouped = _grouped(weight.parts[0], groups)
        return linear.grouped_linear(x.flatten(1), weight.grouped, exact=self.exact)

    def take(self, x: Tensor, rows: Sequence[int]) -> Tensor:
        return x[self._to_device(rows)]

    rms_norm = staticmethod(rms_norm)
    swiglu = staticmethod(swiglu)
    sample = staticmethod(sample)

    # --- residual streams ---

    def hc_pre(self, streams: Tensor, hc: HyperConnection) -> tuple[Tensor, Tensor]:
        return hyper_connections.hc_pre(streams, hc._replace(fn=hc.fn.matrix), dtype=self.dtype)

    def hc_post(self, streams: Tensor, y: Tensor, mixing: Tensor) -> Tensor:
        return hyper_connections.hc_post(streams, y, mixing)

    def hc_post_pre(
        self, streams: Tensor, y: Tensor, mixing: Tensor, hc: HyperConnection
    ) -> tuple[Tensor, Tensor, Tensor]:
        return hyper_connections.hc_post_pre(streams, y, mixing, hc._replace(fn=hc.fn.matrix), dtype=self.dtype)

    def hc_head(self, streams: Tensor, head: HyperHead) -> Tensor:
        return hyper_connections.hc_head(streams, head._replace(fn=head.fn.matrix), dtype=self.dtype)

    # --- attention ---

    def rotations(self, batch: Batch, frequencies: Tensor) -> Tensor:
        return rope.rotations(batch.positions, frequencies)

    def qkv(
        self,
        q: Tensor,
        projected: Tensor,
        rotations: Tensor,
        heads: Heads,
        batch: Batch,
        state: State,
        *,
        fp4: bool = False,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """See `ops.Ops`; `fp4` rounds index queries."""
        return qkv(
            q, projected, rotations, heads, batch.positions, batch.sequences, batch.slots, state["window"],
            store=batch.short, fp4=fp4,
        )  # fmt: skip

    def compress(
        self, projected: Tensor, parameters: Compressor, batch: Batch, state: State, *, fp4: bool = False
    ) -> None:
        """See `ops.Ops`; `fp4` rounds entries."""
        values, scores, entries = (state[parameters.prefix + name] for name in ("values", "scores", "entries"))
        compressor.compress(
            projected, parameters, batch.cu_seqlens, batch.starts, batch.slots, batch.block_tables, batch.longest,
            values, scores, entries, key_scales=_key_scales(state) if parameters.prefix else None, fp4=fp4,
        )  # fmt: skip

    def index_topk(
        self, index_q: Tensor, index_weights: Tensor, batch: Batch, state: State, *, ratio: int, top_k: int
    ) -> TopK:
        return indexer.index_topk(
            index_q, index_weights, batch.positions, batch.sequences, batch.block_tables, state["index_entries"],
            _key_scales(state), ratio=ratio, top_k=top_k,
        )  # fmt: skip

    def attend(
        self,
        q: Tensor,
        kv: Tensor,
        rotations: Tensor,
        sink: Tensor,
        batch: Batch,
        state: State,
        *,
        window: int,
        ratio: int = 0,
        topk: TopK | None = None,
    ) -> Tensor:
        return attention.attend(
            q, kv, rotations, sink, batch.positions, batch.sequences, batch.cu_seqlens, batch.slots, state["window"],
            window=window, ratio=ratio, entries=state["entries"] if ratio else None,
            block_tables=batch.block_tables if ratio else None, topk=topk, decode=batch.tokens <= DECODING,
            stored=batch.short,
        )  # fmt: skip

    # --- mixture of experts ---

    def route(self, logits: Tensor, parameters: Router, batch: Batch) -> tuple[Tensor, Tensor]:
        return router.route(logits, parameters, batch.ids, batch.sequences)

    def experts(
        self,
        x: Tensor,
        chosen: Tensor,
        weights: Tensor,
        w13: Weight,
        w2: Weight,
        limit: float,
        shared: Tensor,
        batch: Batch,
        *,
        cast: Callable[[Tensor], Tensor] | None = None,
    ) -> Tensor:
        """See `ops.Ops`; `cast` rounds the inputs of both products."""
        if w13.pinned is None or w2.pinned is None:
            w1, w3 = w13.parts
            return experts.experts(x, chosen, weights, w1, w3, w2.parts[0], limit, shared, exact=self.exact, cast=cast)
        out = torch.empty_like(shared)
        for first, last, some in row_groups(chosen.tolist(), w13.pinned.slots):
            (w1, w3), slot_of = w13.pinned.load(some)
            (down,), _ = w2.pinned.load(some)  # in the same slots, because both load the same experts
            out[first:last] = experts.experts(
                x[first:last], slot_of[chosen[first:last]], weights[first:last], w1, w3, down, limit,
                shared[first:last], exact=self.exact, cast=cast,
            )  # fmt: skip
        return out


def _join(above: Matrix, below: Matrix) -> Matrix | None:
    """Return two matrices that share an input as one, or None if their formats differ."""
    if isinstance(above, Tensor) or isinstance(below, Tensor):
        if isinstance(above, Tensor) and isinstance(below, Tensor) and above.dtype == below.dtype:
            return torch.cat((above, below))
        return None
    if (above.format, above.scale.dtype) != (below.format, below.scale.dtype):
        return None
    if above.format == "fp8" and above.shape[0] % FP8_BLOCK:
        return None
    data, scale = torch.cat((above.data, below.data)), torch.cat((above.scale, below.scale))
    return Packed(above.format, data, scale, (above.shape[0] + below.shape[0], above.shape[1]))


def _grouped(matrix: Matrix, groups: int) -> Matrix:
    """Return a matrix [G * O, K] as a stack [G, O, K]; its values, or codes, are not copied."""
    outputs = matrix.shape[0] // groups
    if isinstance(matrix, Tensor):
        return matrix.view(groups, outputs, -1)
    scale = torch.stack([matrix.rows(first, first + outputs).scale for first in range(0, matrix.shape[0], outputs)])
    return Packed(matrix.format, matrix.data.view(groups, outputs, -1), scale, (groups, outputs, matrix.shape[1]))


def _key_scales(state: State) -> Tensor | None:
    """Return the scales of index keys in FP8, [spans, entries per span]; None if they are floats."""
    return state["index_scales"][..., 0] if "index_scales" in state else None
