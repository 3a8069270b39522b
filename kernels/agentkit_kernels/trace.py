"""Intermediate results of a forward that training needs besides the logits. Dimension key: `ops.py`, and T tokens of
each of B sequences of equal length."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor


@dataclass(slots=True)
class IndexTrace:
    """One CSA layer's indexer over one block of consecutive queries.

    Attributes:
        start: Position of the first query of the block.
        scores_BTW: Index scores of the entries, differentiable with respect to the indexer only.
        visible_TW: Entries that a query may select: w < (t + 1) // ratio.
        mass_BTW: Attention probability of each entry summed over heads, as if every visible entry were selected;
            detached.
    """

    start: int
    scores_BTW: Tensor
    visible_TW: Tensor
    mass_BTW: Tensor | None = None


@dataclass(slots=True)
class Trace:
    """Record of one forward, filled while it runs.

    Attributes:
        index_scores: Whether to record the indexers (costs a second softmax per CSA layer).
        index: Their records, in order of layer and block.
        expert_counts: Tokens per expert, int64 [E], by layer index; those of the MTP block come last.
        streams_BTMD: The residual streams after the last layer: the input of the MTP block.
    """

    index_scores: bool = True
    index: list[IndexTrace] = field(default_factory=list)
    expert_counts: dict[int, Tensor] = field(default_factory=dict)
    streams_BTMD: Tensor | None = None
