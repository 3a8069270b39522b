"""A model that computes nothing, for measuring the code around it.

Dimension key: B sequences, N rows of logits, M residual streams, D model width, V vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
from torch import Tensor

from agentkit_engine.runtime import Pools, Runner, ScheduledTokens
from agentkit_engine.runtime.scheduled import Computed


class NullRunner(Runner):
    """Runner whose forwards only lengthen the sequences; `favourite` is always the most likely id.

    Replaces the `runner` of a `Scheduler`. `first` describes the first forward since it was last set to None: its start
    time, and the (position, ids) of each sequence.
    """

    def __init__(self, pools: Pools, *, favourite: int = 0) -> None:
        self.first: tuple[float, list[tuple[int, list[int]]]] | None = None
        logits_1V = torch.zeros(1, pools.spec.vocab_size)
        logits_1V[0, favourite] = 1.0
        self._computed = Computed(logits_1V, torch.zeros(1, pools.spec.hc_mult, 1))
        self._rows = 1
        self.sampler = None
        self._favourite = favourite

    def step(self, scheduled: Sequence[ScheduledTokens], *, all_rows: bool = False) -> Computed:
        """See `Runner.step`."""
        if self.first is None:
            self.first = time.perf_counter(), [(each.sequence.length, list(each.ids)) for each in scheduled]
        rows = 0
        for part in scheduled:
            sequence, draft = part.sequence, part.draft
            count = len(part.ids)
            rows += count + len(draft) if all_rows else 1 + len(draft)
            sequence.length += count
            if (written := sequence.length + len(draft)) > sequence.written:
                sequence.written = written
        if self._rows < rows:
            self._rows = rows
            logits_RV, streams_RMD = self._computed.logits_RV[:1], self._computed.streams_RMD[:1]
            self._computed = Computed(logits_RV.expand(rows, -1), streams_RMD.expand(rows, -1, -1))
        return self._computed

    def mtp_draft(self, streams_BMD: Tensor, ids_B: Sequence[int]) -> list[int]:
        """See `Runner.mtp_draft`."""
        return [self._favourite] * len(ids_B)
