"""Generated work directories ("worlds"), and tasks over them with oracles, verifiers and seeds.

`world.draw_world(seed, split)` returns a directory such as people keep: settings, tables, logs, notes, mail, code. An
`Operation` draws tasks over a world, each with an oracle that runs, a verifier, several phrasings and a difficulty. All
operations are in `operations.OPERATIONS`; they need the packages of the `synth` extra. `bugs` makes tasks from faults
in real packages.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

from agentkit.errors import MissingDependencyError

Split = Literal["train", "heldout"]
SPLITS: tuple[Split, ...] = ("train", "heldout")


@contextmanager
def synth_extra() -> Iterator[None]:
    """Around imports: raise MissingDependencyError, with the command to run, if a package of the extra is missing."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise MissingDependencyError(f"{error.name} is missing; run: pip install 'agentkit-harness[synth]'") from error


__all__ = ["SPLITS", "Split", "synth_extra"]
