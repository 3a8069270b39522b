"""Measure how well a model copies names: `python -m agentkit_engine.training.copied MODEL`.

A row has eight names of four to eight ids, each behind an id of its own, and then four of them again in another order.
A name is right if all of its ids and its end are the most likely ones, under teacher forcing.
Dimension key: B rows, T tokens, V vocabulary.
"""

from __future__ import annotations

import json
import random
import string
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import Tensor

from agentkit_engine.chat import Tokenizer
from agentkit_engine.engine import Engine

NAMES, REPEATED, LENGTHS = 8, 4, (4, 8)


def main(
    model: Annotated[Path, typer.Argument(help="Model folder.")],
    rows: Annotated[int, typer.Option(help="Rows of each alphabet, with four names to copy.")] = 100,
    seed: Annotated[int, typer.Option(help="Seed of the names.")] = 0,
) -> None:
    """Print one JSON object: for each alphabet of names, the share of names that are copied right."""
    engine = Engine.load(model)
    with torch.inference_mode():
        shares = {
            kind: copied(engine.decoder, alphabet, ordinary_ids(engine.tokenizer), rows=rows, seed=seed)
            for kind, alphabet in alphabets(engine.tokenizer).items()
        }
    print(json.dumps({"model": engine.name, "rows": rows, "seed": seed, "torch": torch.__version__, "copied": shares}))


def alphabets(tokenizer: Tokenizer) -> dict[str, list[int] | int]:
    """Return the ids that names are made of, or their number if each row draws them from all ordinary ids."""
    characters = {"digits": string.digits, "hexadecimal": string.hexdigits[:16], "letters": string.ascii_lowercase}
    named = {kind: [tokenizer.encode(each)[0] for each in text] for kind, text in characters.items()}
    return {**named, "16 ids": 16, "any ids": len(ordinary_ids(tokenizer))}


def ordinary_ids(tokenizer: Tokenizer) -> list[int]:
    """Return every id but those of control tokens."""
    control = set(tokenizer.control_ids.values())
    return [each for each in range(tokenizer.vocab_size) if each not in control]


def copied(
    model: Callable[[Tensor], Tensor], alphabet: Sequence[int] | int, ordinary: Sequence[int], *, rows: int, seed: int
) -> float:
    """Return the share of names that `model`, from ids [B, T] to logits [B, T, V], copies right."""
    rng = random.Random(seed)
    right = 0
    for _ in range(rows):
        ids = rng.sample(ordinary, alphabet) if isinstance(alphabet, int) else alphabet
        end, *keys = rng.sample([each for each in ordinary if isinstance(alphabet, int) or each not in ids], NAMES + 1)
        names = [[key, *rng.choices(ids, k=rng.randint(*LENGTHS)), end] for key in keys]
        row = [token for name in names for token in name]
        starts = []
        for name in rng.sample(names, REPEATED):
            starts.append((len(row), len(row) + len(name)))
            row += name
        said = model(torch.tensor([row]))[0].argmax(-1).tolist()
        right += sum(said[start : stop - 1] == row[start + 1 : stop] for start, stop in starts)
    return right / (rows * REPEATED)


if __name__ == "__main__":
    typer.run(main)
