"""Load a command's model on `--device` and compile its kernels before any timing starts."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from agentkit.models.embedded import EmbeddedModel


def load_model(name: str, *, device: str | None, cache_dir: Path | None) -> EmbeddedModel:
    """Load the model given by `--model` on `--device` and warm it up. Kernels are compiled, and logged, once per
    machine.

    No event loop is running yet, so Ctrl-C ends the process at once, even inside the compiler.

    Raises:
        EngineError: The model cannot be loaded.
        BadParameter: The device does not exist.
    """
    from agentkit.models.embedded import EmbeddedModel
    from agentkit_engine import Engine

    try:
        engine = Engine.load(name, device=device or "cpu", cache_dir=cache_dir)
    except ValueError as exc:
        if device is None:
            raise
        raise typer.BadParameter(str(exc), param_hint="--device") from exc
    engine.warm_up()
    return EmbeddedModel(engine)
