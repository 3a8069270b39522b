"""Input and output of a forward. Dimension key: `runtime/__init__.py`."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass

from torch import Tensor

from agentkit_engine.runtime.state import Sequence


@dataclass(slots=True)
class ScheduledTokens:
    """Ids, and draft ids after them, that extend one sequence in the next forward."""

    sequence: Sequence
    ids: Seq[int]
    draft: Seq[int] = ()

    def __len__(self) -> int:
        return len(self.ids) + len(self.draft)


@dataclass(frozen=True, slots=True)
class Computed:
    """Output of a forward: for each `ScheduledTokens` in turn, a row for its last id and one for each draft id."""

    logits_RV: Tensor
    streams_RMD: Tensor
    """Residual streams after the last layer, the input of the MTP block."""

    def only(self, row: int) -> Computed:
        """Return a copy of a single row."""
        return Computed(self.logits_RV[row : row + 1].clone(), self.streams_RMD[row : row + 1].clone())
