"""`python -m agentkit_engine.training DATA OUT`: train the tiny model on rows from `python -m agentkit_evals.synth`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from torch.multiprocessing.spawn import spawn

from agentkit_engine.training.train import TrainingConfig, dtype_of, practice_kinds
from agentkit_engine.training.worker import work

DEFAULT = TrainingConfig()


def main(
    data: Annotated[Path, typer.Argument(help="Folder with tokenizer.json, train.safetensors, heldout.safetensors.")],
    out: Annotated[Path, typer.Argument(help="Folder for the model, in the official layout; new unless --resume.")],
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
    practice_every: Annotated[
        int, typer.Option(help="Pairs of batches per pair of practice after that; 0 for none.")
    ] = DEFAULT.practice_every,
    spread_steps: Annotated[
        int, typer.Option(help="Steps in which only HCA carries facts spread over a stretch of text.")
    ] = DEFAULT.spread_steps,
    renew_hca: Annotated[bool, typer.Option(help="Give the HCA layers new compressors first.")] = False,
    topk_steps: Annotated[
        int, typer.Option(help="Step at which index_topk reaches its final value.")
    ] = DEFAULT.topk_steps,
    decay_steps: Annotated[
        int, typer.Option(help="Last steps, in which the learning rate falls; 0 if another run continues this one.")
    ] = DEFAULT.decay_steps,
    save_steps: Annotated[
        int, typer.Option(help="Steps between states from which --resume continues.")
    ] = DEFAULT.save_steps,
    workers: Annotated[int, typer.Option(help="Processes of one thread each.")] = 2,
    dtype: Annotated[
        str, typer.Option(help="Dtype of matrix products: float32, or bfloat16, faster where the processor has it.")
    ] = DEFAULT.dtype,
    device: Annotated[str, typer.Option(help="cpu, or cuda for one GPU with --workers 1.")] = "cpu",
    resume: Annotated[bool, typer.Option(help="Continue the stopped run in OUT, bit for bit.")] = False,
) -> None:
    """Train, measure held-out accuracy under teacher forcing, and export. Progress is logged to OUT/training.jsonl."""
    states = len(list(out.glob("state*.pt")))  # one per process
    if resume and not states:
        raise typer.BadParameter(f"{out} holds no state of a stopped run (state0.pt); leave out --resume")
    if resume and states != workers:
        raise typer.BadParameter(f"the run in {out} has {states} processes, not {workers}; use --workers {states}")
    out.mkdir(parents=True, exist_ok=resume)
    (out / "rendezvous").unlink(missing_ok=True)
    rendezvous = f"file://{(out / 'rendezvous').resolve()}"
    config = TrainingConfig(
        steps=steps,
        learning_rate=learning_rate,
        practice=practice_kinds(practice),
        practice_steps=practice_steps,
        mixed_steps=mixed_steps,
        practice_every=practice_every,
        spread_steps=spread_steps,
        renew_hca=renew_hca,
        topk_steps=topk_steps,
        decay_steps=decay_steps,
        save_steps=save_steps,
        dtype=dtype_of(dtype),
    )
    spawn(work, (workers, rendezvous, data, out, config, start, device), nprocs=workers)  # type: ignore[no-untyped-call]
    (out / "rendezvous").unlink(missing_ok=True)


if __name__ == "__main__":
    typer.run(main)
