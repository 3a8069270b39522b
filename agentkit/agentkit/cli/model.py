"""The model of a command: load it where `--device` says, and have its kernels compiled before anything is timed."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

    from agentkit.models.embedded import EmbeddedModel
    from agentkit_engine import Engine

WARM_UP_TOKENS = 600
"""Long enough for every kernel: the indexer chooses only where there is more than it may take."""


def load_model(name: str, *, device: str | None, cache_dir: Path | None, console: Console) -> EmbeddedModel:
    """The model of `--model` on `--device`, ready to compute.

    Kernels that are not compiled for this CPU yet are compiled here, which the console says. Nothing async runs yet, so
    Ctrl-C ends the process at once, in the middle of the compiler too.

    Raises:
        EngineError: it cannot be loaded.
    """
    from agentkit.models.embedded import EmbeddedModel
    from agentkit_engine import Engine

    engine = Engine.load(name, device=device or "cpu", cache_dir=cache_dir)
    if engine.compiled and not _kernels_are_compiled():
        started = time.perf_counter()
        console.print("compiling kernels for this CPU (once) …", style="dim", end="")
        warm_up(engine)
        console.print(f" {time.perf_counter() - started:.0f} s", style="dim")
    return EmbeddedModel(engine)


def warm_up(engine: Engine) -> None:
    """Compute a prompt and a few tokens, which compiles every kernel that is not compiled yet."""
    from agentkit_engine import SamplingParams

    length = min(WARM_UP_TOKENS, engine.spec.max_position_embeddings // 2)
    with engine.session() as session:
        session.append([id % engine.spec.vocab_size for id in range(length)])
        for _ in session.generate(SamplingParams(max_tokens=4)):
            pass


def _kernels_are_compiled() -> bool:
    from agentkit_kernels.compiled import is_compiled

    return is_compiled()
