"""What a forward is asked for and what it says. Dimension key: `runtime/__init__.py`."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass

from torch import Tensor

from agentkit_engine.runtime.state import Sequence


@dataclass(slots=True)
class Segment:
    """Ids that extend one sequence in the next forward, and guesses at those that follow."""

    sequence: Sequence
    ids: Seq[int]
    draft: Seq[int] = ()

    def __len__(self) -> int:
        return len(self.ids) + len(self.draft)


@dataclass(frozen=True, slots=True)
class Computed:
    """What a forward says: of each segment, end to end, a row for its last id and one for every drafted id."""

    logits_RV: Tensor
    streams_RMD: Tensor
    """The residual streams after the last layer: what the MTP block guesses from."""

    def only(self, row: int) -> Computed:
        """One row, in memory of its own."""
        return Computed(self.logits_RV[row : row + 1].clone(), self.streams_RMD[row : row + 1].clone())
