"""The model of a command: loaded where `--device` says, with its kernels compiled before anything is timed."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from agentkit.models.embedded import EmbeddedModel


def load_model(name: str, *, device: str | None, cache_dir: Path | None) -> EmbeddedModel:
    """The model of `--model` on `--device`, ready to compute; compiling its kernels, once per machine, is logged.

    Nothing async runs yet, so Ctrl-C ends the process at once, in the middle of the compiler too.

    Raises:
        EngineError: it cannot be loaded.
        BadParameter: there is no such kind of device.
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
