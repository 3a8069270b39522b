"""A model that costs nothing, for measuring all that goes on around one.

Dimension key: B sequences, N rows of logits, M residual streams, D model width, V vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
from torch import Tensor

from agentkit_engine.runtime import Pools, Runner, Segment
from agentkit_engine.runtime.segments import Computed


class NullRunner(Runner):
    """Forwards that compute nothing: sequences grow as they would, and `favourite` is always the likeliest id.

    Put it in a `Batcher`'s `runner`. `first` is when the first forward since it was last set to None began, and what
    that forward was given, as (position, ids) of each sequence.
    """

    def __init__(self, pools: Pools, *, favourite: int = 0) -> None:
        self.first: tuple[float, list[tuple[int, list[int]]]] | None = None
        logits_1V = torch.zeros(1, pools.spec.vocab_size)
        logits_1V[0, favourite] = 1.0
        self._row = Computed(logits_1V, torch.zeros(1, pools.spec.hc_mult, 1))
        self._favourite = favourite

    def step(self, segments: Sequence[Segment], *, all_rows: bool = False) -> list[Computed]:
        """See `Runner.step`."""
        if self.first is None:
            self.first = time.perf_counter(), [(each.sequence.length, list(each.ids)) for each in segments]
        computed = []
        for segment in segments:
            sequence = segment.sequence
            sequence.written = max(sequence.written, sequence.length + len(segment))
            sequence.length += len(segment.ids)
            rows = len(segment) if all_rows else 1 + len(segment.draft)
            if rows == 1:
                computed.append(self._row)
                continue
            logits_NV, streams_NMD = self._row.logits_NV, self._row.streams_NMD
            computed.append(Computed(logits_NV.expand(rows, -1), streams_NMD.expand(rows, -1, -1)))
        return computed

    def foresee(self, streams_BMD: Tensor, ids_B: Sequence[int]) -> list[int]:
        """See `Runner.foresee`."""
        return [self._favourite] * len(ids_B)
