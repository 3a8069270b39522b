"""Kinds of files in a world. To add one: a module with a dataclass and a `draw_…` function, and an entry here."""

from __future__ import annotations

from collections.abc import Callable

from agentkit_evals.synth.artifacts.code import draw_module
from agentkit_evals.synth.artifacts.items import draw_items
from agentkit_evals.synth.artifacts.ledger import draw_ledger
from agentkit_evals.synth.artifacts.log import draw_log
from agentkit_evals.synth.artifacts.settings import draw_settings
from agentkit_evals.synth.artifacts.table import draw_table
from agentkit_evals.synth.artifacts.texts import draw_agenda, draw_mail, draw_note
from agentkit_evals.synth.draw import Draw
from agentkit_evals.synth.world import Artifact

ARTIFACTS: dict[Callable[[Draw], Artifact], float] = {
    draw_settings: 3,
    draw_note: 3,
    draw_mail: 1.5,
    draw_agenda: 1,
    draw_module: 1.5,
    draw_table: 3,
    draw_log: 1.5,
    draw_items: 1.5,
    draw_ledger: 1,
}
"""Each kind's share of a world's files."""
