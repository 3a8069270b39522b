"""Generated tasks: task families with oracles, verifiers and seeds, split into training and held-out tasks.

`sample("combine", seed, "train")` returns one task with its oracle. `generate` runs oracles with the real tools and
yields training rows.
"""

from __future__ import annotations

from agentkit_evals.synth.families.archive import Archive
from agentkit_evals.synth.families.bugfix import Bugfix
from agentkit_evals.synth.families.chat import Chat
from agentkit_evals.synth.families.combine import Combine
from agentkit_evals.synth.families.compute import Compute
from agentkit_evals.synth.families.config import Config
from agentkit_evals.synth.families.ledger import Ledger
from agentkit_evals.synth.families.logs import Logs
from agentkit_evals.synth.families.poll import Poll
from agentkit_evals.synth.families.recover import Recover
from agentkit_evals.synth.families.rename import Rename
from agentkit_evals.synth.families.user_tool import UserTool
from agentkit_evals.synth.family import SPLITS, Family, Oracle, Split, SynthTask, is_held_out

FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        *(Combine(), Bugfix(), Config(), Logs(), Recover(), Compute()),
        *(Rename(), Chat(), UserTool(), Ledger(), Archive(), Poll()),
    )
}


def sample(family: str, seed: int, split: Split) -> SynthTask:
    """Return a family's task for this seed and split; the same on every machine.

    Raises:
        ValueError: the family or the split is unknown.
    """
    if family not in FAMILIES:
        raise ValueError(f"unknown family {family!r}; expected one of {', '.join(FAMILIES)}")
    return FAMILIES[family].sample(seed, split)


__all__ = ["FAMILIES", "SPLITS", "Family", "Oracle", "Split", "SynthTask", "is_held_out", "sample"]
