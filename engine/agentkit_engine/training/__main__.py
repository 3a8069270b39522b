"""`python -m agentkit_engine.training DATA OUT`: train the tiny model on rows from `python -m agentkit_evals.synth`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from torch.multiprocessing.spawn import spawn

from agentkit_engine.training.train import TrainingConfig, practice_kinds
from agentkit_engine.training.worker import work

DEFAULT = TrainingConfig()


def main(
    data: Annotated[Path, typer.Argument(help="Folder with tokenizer.json, train.safetensors, heldout.safetensors.")],
    out: Annotated[Path, typer.Argument(help="New folder for the model, in the official layout.")],
    start: Annotated[
        Path | None, typer.Option(help="Model folder to continue from; random weights if omitted.")
    ] = None,
    steps: Annotated[int, typer.Option(help="Optimiser steps.")] = DEFAULT.steps,
    learning_rate: Annotated[float, typer.Option(help="Peak learning rate.")] = DEFAULT.learning_rate,
    practice: Annotated[str, typer.Option(help="Kinds of practice, in rotation.")] = ",".join(DEFAULT.practice),
    practice_steps: Annotated[int, typer.Option(help="Initial steps with practice only.")] = DEFAULT.practice_steps,
    mixed_steps: Annotated[
        int, typer.Option(help="Steps after these in which half of the batches are practice.")
    ] = DEFAULT.mixed_steps,
    spread_steps: Annotated[
        int, typer.Option(help="Steps in which only HCA carries facts spread over a stretch of text.")
    ] = DEFAULT.spread_steps,
    renew_hca: Annotated[bool, typer.Option(help="Give the HCA layers new compressors first.")] = False,
    topk_steps: Annotated[
        int, typer.Option(help="Step at which index_topk reaches its final value.")
    ] = DEFAULT.topk_steps,
    workers: Annotated[int, typer.Option(help="Processes of one thread each.")] = 2,
) -> None:
    """Train, measure held-out accuracy under teacher forcing, and export. Progress is logged to OUT/training.jsonl."""
    out.mkdir(parents=True)
    rendezvous = f"file://{(out / 'rendezvous').resolve()}"
    config = TrainingConfig(
        steps=steps,
        learning_rate=learning_rate,
        practice=practice_kinds(practice),
        practice_steps=practice_steps,
        mixed_steps=mixed_steps,
        spread_steps=spread_steps,
        renew_hca=renew_hca,
        topk_steps=topk_steps,
    )
    spawn(work, (workers, rendezvous, data, out, config, start), nprocs=workers)  # type: ignore[no-untyped-call]
    (out / "rendezvous").unlink(missing_ok=True)


if __name__ == "__main__":
    typer.run(main)
