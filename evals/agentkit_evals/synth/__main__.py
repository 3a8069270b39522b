"""`python -m agentkit_evals.synth DIR`: the tokenizer and the training rows of the tiny model, from seeds alone."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import AsyncIterator
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

TOKENIZER_SEEDS = range(150)  # per family


def main(
    directory: Annotated[
        Path, typer.Argument(help="Where tokenizer.json, train.safetensors and heldout.safetensors go.")
    ],
    per_family: Annotated[int, typer.Option(help="Training trajectories of each family.")] = 2000,
    heldout_per_family: Annotated[int, typer.Option(help="Held-out trajectories of each family.")] = 40,
    vocab_size: Annotated[int, typer.Option(help="Ids of the tokenizer, control tokens included.")] = 1536,
    first_seed: Annotated[int, typer.Option(help="Rows use the seeds from here on.")] = 0,
) -> None:
    """Build the tokenizer (kept when it is there already) and run every oracle for real."""
    directory.mkdir(parents=True, exist_ok=True)
    anyio.run(_write, directory, range(first_seed, first_seed + per_family), range(heldout_per_family), vocab_size)


async def _write(directory: Path, seeds: range, heldout_seeds: range, vocab_size: int) -> None:
    families = list(FAMILIES)
    path = directory / "tokenizer.json"
    if not path.exists():
        corpus = [text async for text in texts(families, TOKENIZER_SEEDS)]
        path.write_text(build_tokenizer(corpus, phrases=phrases(), vocab_size=vocab_size), encoding="utf-8")
    tokenizer = Tokenizer.from_dir(directory)
    splits: tuple[tuple[str, range, Split], ...] = (("train", seeds, "train"), ("heldout", heldout_seeds, "heldout"))
    for name, split_seeds, split in splits:
        started = time.perf_counter()
        tokens: Counter[str] = Counter()

        async def rows(
            split_seeds: range = split_seeds, split: Split = split, tokens: Counter[str] = tokens
        ) -> AsyncIterator[tuple[list[int], list[int]]]:
            async for row in generate(families, split_seeds, split, tokenizer=tokenizer):
                tokens[row.family] += len(row.ids)
                yield row.ids, row.loss_mask

        packed = Rows.pack([row async for row in rows()])
        packed.save(directory / f"{name}.safetensors")
        lengths = ", ".join(f"{family} {count // len(split_seeds)}" for family, count in tokens.items())
        print(
            f"{name}: {len(packed)} rows, {len(packed.ids)} tokens, {int(packed.mask.sum())} written by the assistant,"
        )
        print(f"  {time.perf_counter() - started:.0f} s; mean tokens: {lengths}", flush=True)


if __name__ == "__main__":
    typer.run(main)
