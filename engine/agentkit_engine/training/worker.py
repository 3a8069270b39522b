"""One process of a training run: from data to a checkpoint."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from pathlib import Path

import torch
import torch.distributed as dist

from agentkit_engine.chat import Tokenizer
from agentkit_engine.chat.tokens import PAD
from agentkit_engine.engine import Engine
from agentkit_engine.model import Decoder, initialize_
from agentkit_engine.training.data import Rows
from agentkit_engine.training.tiny import tiny_spec
from agentkit_engine.training.train import State, TrainingConfig, accuracy, renew_hca_, train
from agentkit_engine.training.vocabulary import transfer_
from agentkit_engine.weights.export import export_checkpoint

CHECKPOINT_STEPS = 250
GENERATION_CONFIG = {"bos_token_id": 0, "eos_token_id": 1, "do_sample": False}


def work(
    rank: int,
    workers: int,
    rendezvous: str,
    data: Path,
    out: Path,
    config: TrainingConfig,
    start: Path | None,
    device: str,
) -> None:
    """Train as process `rank` of `workers`, which meet at `rendezvous`; rank 0 writes the model.

    Weights are loaded from the folder `start`, or random if it is None. If `out` holds the state of a stopped run, that
    run continues.

    Raises:
        ValueError: `out` holds states of different steps.
    """
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=workers)
    tokenizer = Tokenizer.from_dir(data)
    pad_id = tokenizer.control_id(PAD)
    rows, heldout = Rows.load(data / "train.safetensors"), Rows.load(data / "heldout.safetensors")
    model = initialize_(Decoder(tiny_spec(tokenizer.vocab_size)), torch.Generator().manual_seed(config.seed)).to(device)
    saved = out / f"state{rank}.pt"
    state = None
    if saved.exists():
        found = torch.load(saved, map_location=device)
        model.load_state_dict(found["model"])
        state = State(found["step"], found["optimizers"])
    elif start is not None:
        begun = Engine.load(start)
        transfer_(model, tokenizer, begun.decoder, begun.tokenizer)
        if config.renew_hca:
            renew_hca_(model, torch.Generator().manual_seed(config.seed))
    steps: list[int] = [0] * workers
    dist.all_gather_object(steps, 0 if state is None else state.step)
    if len(set(steps)) > 1:
        raise ValueError(f"{out} holds states of different steps, {steps}, because it was killed while it wrote them")
    record = (out / f"training{rank or ''}.jsonl").open("a")

    def log(entry: dict[str, float]) -> None:
        if entry["step"] and entry["step"] % CHECKPOINT_STEPS == 0 and rank == 0:
            entry |= accuracy(model, heldout, pad_id=pad_id)
            _export(model, data, out / f"step-{entry['step']:g}")
        print(json.dumps({name: round(value, 5) for name, value in entry.items()}), file=record, flush=True)

    def save(state: State) -> None:
        partial = saved.with_suffix(".partial")
        torch.save({"model": model.state_dict(), "step": state.step, "optimizers": state.optimizers}, partial)
        dist.barrier()  # no process replaces its state before all have written theirs
        partial.rename(saved)

    with record:
        print(json.dumps({"config": asdict(config), "workers": workers, "rows": len(rows)}), file=record, flush=True)
        train(model, rows, config, pad_id=pad_id, log=log, start=state, save=save)
        if rank == 0:
            log({"step": config.steps, **accuracy(model, heldout, pad_id=pad_id)})
            _export(model, data, out)
    dist.destroy_process_group()


def _export(model: Decoder, data: Path, folder: Path) -> None:
    """Write a folder that `Engine.load` reads, in place of an earlier one."""
    for weights in folder.glob("*.safetensors"):
        weights.unlink()
    export_checkpoint(model, folder, format="bf16")
    shutil.copyfile(data / "tokenizer.json", folder / "tokenizer.json")
    (folder / "generation_config.json").write_text(json.dumps(GENERATION_CONFIG, indent=2) + "\n")
