"""`python -m agentkit_evals.synth DIR`: build the tiny model's tokenizer and training rows from seeds alone."""

from __future__ import annotations

import string
import time
from pathlib import Path
from typing import Annotated

import anyio
import typer

from agentkit_engine.chat import Tokenizer
from agentkit_engine.training.data import Rows
from agentkit_engine.training.tokenizer import build_tokenizer
from agentkit_evals.synth import FAMILIES
from agentkit_evals.synth.family import Split
from agentkit_evals.synth.generate import generate, phrases, texts
from agentkit_evals.synth.words import SYLLABLES

TOKENIZER_SEEDS = range(150)  # per family


def main(
    directory: Annotated[
        Path, typer.Argument(help="Directory for tokenizer.json, train.safetensors and heldout.safetensors.")
    ],
    per_family: Annotated[int, typer.Option(help="Training trajectories per family.")] = 1500,
    heldout_per_family: Annotated[int, typer.Option(help="Held-out trajectories per family.")] = 40,
    vocab_size: Annotated[int, typer.Option(help="Vocabulary size of the tokenizer, including control tokens.")] = 1536,
    first_seed: Annotated[int, typer.Option(help="First seed of the training rows.")] = 0,
) -> None:
    """Build the tokenizer, unless it exists, and run every oracle to write the training rows."""
    directory.mkdir(parents=True, exist_ok=True)
    anyio.run(_write, directory, range(first_seed, first_seed + per_family), range(heldout_per_family), vocab_size)


async def _write(directory: Path, seeds: range, heldout_seeds: range, vocab_size: int) -> None:
    path = directory / "tokenizer.json"
    if not path.exists():
        corpus = [text async for text in texts(list(FAMILIES), TOKENIZER_SEEDS)]
        path.write_text(build_tokenizer(corpus, phrases=phrases(), vocab_size=vocab_size), encoding="utf-8")
    tokenizer = Tokenizer.from_dir(directory)
    await _write_rows(directory / "train.safetensors", seeds, "train", tokenizer)
    await _write_rows(directory / "heldout.safetensors", heldout_seeds, "heldout", tokenizer)


async def _write_rows(path: Path, seeds: range, split: Split, tokenizer: Tokenizer) -> None:
    """Write the rows of every family. Far-fact rows are long, so the train split uses half as many of them."""
    started = time.perf_counter()
    near = [name for name, family in FAMILIES.items() if not family.far_fact]
    far = [name for name, family in FAMILIES.items() if family.far_fact]
    far_seeds = seeds[: len(seeds) // 2] if split == "train" else seeds
    rows = [row async for row in generate(near, seeds, split, tokenizer=tokenizer)]
    rows += [row async for row in generate(far, far_seeds, split, tokenizer=tokenizer)]
    copied = sorted({token for piece in (*SYLLABLES, *string.digits) for token in tokenizer.encode_text(piece)})
    packed = Rows.pack(
        [(row.ids, row.loss_mask) for row in rows],
        copied=copied,
        spread=[FAMILIES[row.family].spread_fact for row in rows],
    )
    packed.save(path)
    print(
        f"{path}: {len(packed)} rows, {len(packed.ids)} tokens, {int(packed.mask.sum())} written by the assistant, "
        f"{time.perf_counter() - started:.0f} s",
        flush=True,
    )


if __name__ == "__main__":
    typer.run(main)
