"""An engine on several devices: data-parallel attention, expert-parallel mixture of experts.

Each device has a process, called a *rank*, with all weights except the experts', of which it packs an equal share, and
with pools of its own. Rank 0 is the process that loaded the engine. It schedules, samples and keeps the prefix cache
for all ranks, exactly as for one device; the others are workers (`agentkit_engine.worker`) that only compute.

A session's state is on one rank, where all its tokens are computed: the least loaded one when the session begins. If
another rank holds a prefix of it, that state is copied instead of computed.

A forward is collective. Rank 0 sends every worker its part, which may be empty: a rank without tokens takes part with
its experts alone (`expert_parallel.py`). No rank decides anything by itself, so they cannot disagree on what comes
next. Changes to a worker's pools are queued and go with the next forward.

If anything fails on a rank, all ranks end: the others see its connections close, or wait for it at most `timeout_s`.
Forwards raise `WorkerLostError` from then on. Workers also end with rank 0, and with the runner.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from agentkit_engine.model.decoder import Decoder
from agentkit_engine.model.forward import Computed, ExpertLayer
from agentkit_engine.runtime.expert_parallel import ExpertParallel
from agentkit_engine.runtime.runner import CpuLimits, Runner, choose_backend, make_ops, plan_of
from agentkit_engine.runtime.scheduled import ScheduledTokens
from agentkit_engine.runtime.sharded_pools import RemotePools, ShardedPools
from agentkit_engine.runtime.state import Pools
from agentkit_engine.runtime.workers import Assignment, Placement, Workers
from agentkit_kernels.ops import Plan

if TYPE_CHECKING:
    from torch.distributed import ProcessGroupGloo


@dataclass(frozen=True, slots=True)
class Part:
    """One rank's part of a forward; without a plan it has no tokens.

    Attributes:
        counts: Tokens of each rank.
        rows: Rows of the output; None for all.
        draft: Whether the MTP block computes.
        streams: Its input.
    """

    counts: Seq[int]
    plan: Plan | None = None
    rows: Seq[int] | None = None
    draft: bool = False
    streams: Tensor | None = None


def join(placement: Placement, rank: int, rendezvous: str) -> ProcessGroupGloo:
    """Return the process group of all ranks, once all have called this. Its traffic stays on this machine."""
    from torch.distributed import FileStore, ProcessGroupGloo  # type: ignore[attr-defined]  # not in all builds

    gloo: Any = ProcessGroupGloo
    options = gloo._Options()
    options._devices = [gloo.create_device(hostname="127.0.0.1")]
    options._timeout = timedelta(seconds=placement.timeout_s)
    store = FileStore(rendezvous, placement.devices)
    store.set_timeout(timedelta(seconds=placement.timeout_s))
    return ProcessGroupGloo(store, rank, placement.devices, options)


class RankRunner(Runner):
    """The forwards of one rank."""

    def __init__(
        self,
        decoder: Decoder,
        pools: Pools,
        group: ProcessGroupGloo,
        *,
        exact: bool,
        backend: str,
        limits: CpuLimits | None = None,
        quantize_activations: bool = False,
    ) -> None:
        chosen, spec, dtype = choose_backend(backend, pools.device), decoder.spec, decoder.embed.weight.dtype
        ops = make_ops(
            chosen, pools.device, dtype, limits, processes=group.size(), quantize_activations=quantize_activations
        )
        self.parallel = ExpertParallel(
            ops,
            group,
            experts=spec.n_routed_experts,
            active=spec.num_experts_per_tok,
            hidden_size=spec.hidden_size,
            dtype=getattr(ops, "dtype", torch.float32),
        )
        super().__init__(decoder, pools, exact=exact, backend=chosen, ops=self.parallel)

    def take_part(self, part: Part) -> Computed | None:
        """Compute this rank's part of a forward, with all other ranks."""
        return self._compute(partial(self._take_part, part))

    def _take_part(self, part: Part) -> Computed | None:
        self.parallel.counts = part.counts
        if part.plan is None:
            for layer in self.forward.mtp_layers if part.draft else self.forward.layers:
                if isinstance(layer, ExpertLayer):
                    self.parallel.serve(layer.w13, layer.w2, layer.limit)
            return None
        if part.streams is not None:
            return self.forward.draft(part.streams, part.plan)
        return self.forward(part.plan, part.rows)


class ParallelRunner(RankRunner):
    """The forwards of all ranks, in rank 0.

    Attributes:
        pools: The pools of all ranks.
        workers: The other ranks' processes.
    """

    def __init__(self, decoder: Decoder, pools: Pools, placement: Placement, *, exact: bool, backend: str) -> None:
        """Start the workers, and load the model on them; `pools` are those of rank 0.

        Raises:
            WorkerLostError: a worker failed.
        """
        spec, self.workers = decoder.spec, Workers(placement)
        with tempfile.TemporaryDirectory(prefix="agentkit-ranks-") as folder, self.workers.talk():
            rendezvous = str(Path(folder, "rendezvous"))
            same = placement, rendezvous, exact, backend, pools.slots, pools.spans, spec.n_routed_experts
            for worker in self.workers.each:
                worker.channel.send(Assignment(worker.rank, *same))
            for worker in self.workers.each:
                worker.receive(patiently=True)  # the weights are in place
            group = join(placement, 0, rendezvous)
            super().__init__(
                decoder,
                pools,
                group,
                exact=exact,
                backend=backend,
                limits=placement.limits,
                quantize_activations=placement.quantize_activations,
            )
            for worker in self.workers.each:
                worker.receive()
        self.pools = ShardedPools([pools, *(RemotePools(pools, worker, self.workers) for worker in self.workers.each)])

    def mtp_draft(self, streams_BMD: Tensor, ids_B: Seq[int]) -> list[int]:
        """See `Runner.mtp_draft`; rank 0 computes all but the experts, because these tokens have no state."""
        count, others = len(ids_B), len(self.workers.each)
        counts = [count, *[0] * others]
        plan = Plan(ids_B, [1] * count, [0] * count, [0] * count, [()] * count)
        own, idle = Part(counts, plan, draft=True, streams=streams_BMD), Part(counts, draft=True)
        computed = self._together([own, *[idle] * others])[0]
        assert computed is not None
        ids: list[int] = computed.logits.cpu().numpy().argmax(-1).tolist()
        return ids

    def _forward(self, scheduled: Seq[ScheduledTokens], *, all_rows: bool) -> Computed:
        ranks = range(self.pools.ranks)
        shares = [[part for part in scheduled if part.sequence.rank == rank] for rank in ranks]
        counts = [sum(map(len, share)) for share in shares]
        plans = [plan_of(share, all_rows=all_rows) if share else (None, None) for share in shares]
        outputs = self._together([Part(counts, plan, rows) for plan, rows in plans])
        rows_of: list[Iterator[tuple[Tensor, ...]]] = []  # each rank's output, sequence by sequence
        for share, output in zip(shares, outputs, strict=True):
            sizes = [len(part) if all_rows else len(part.draft) + 1 for part in share]
            split = [] if output is None else [torch.split(rows, sizes) for rows in output]
            rows_of.append(zip(*split, strict=True))
        logits, streams = zip(*(next(rows_of[part.sequence.rank]) for part in scheduled), strict=True)
        return Computed(torch.cat(logits), torch.cat(streams))

    def _together(self, parts: Seq[Part]) -> list[Computed | None]:
        """Compute a forward on all ranks; return their outputs, None for a rank without tokens."""
        with self.workers.talk():
            for worker, part in zip(self.workers.each, parts[1:], strict=True):
                worker.call("take_part", part)
            return [self.take_part(parts[0]), *(worker.receive() for worker in self.workers.each)]
