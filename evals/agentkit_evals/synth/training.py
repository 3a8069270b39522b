"""The tokenizer and the training rows of the packaged model: `python -m agentkit_evals.synth DIR`.

Rows are trajectories of oracles over generated worlds (`produce.Plan`), run through the real agent with the real tools,
so a row has exactly the ids of an engine session. Shards are made by several processes; a stopped run continues.
"""

from __future__ import annotations

import functools
import json
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated

import anyio
import torch
import typer

from agentkit.messages import to_openai_all
from agentkit_engine import chat
from agentkit_engine.chat import Tokenizer
from agentkit_engine.training.data import Rows
from agentkit_engine.training.tokenizer import build_tokenizer
from agentkit_evals.synth import vocabulary
from agentkit_evals.synth.operations import OPERATIONS
from agentkit_evals.synth.produce import THINKING, Plan, draw_tasks, split_of
from agentkit_evals.synth.sandbox import OracleSandbox
from agentkit_evals.synth.tokenizer_texts import between_control_tokens, phrases

LONGEST = 1536  # ids of a row; longer trajectories are left out
TOKENIZER_WORLDS = 60
COPIES = 4  # of the frequent words in the tokenizer's corpus


def main(
    directory: Annotated[
        Path, typer.Argument(help="Folder for tokenizer.json, train.safetensors, heldout.safetensors.")
    ],
    worlds: Annotated[int, typer.Option(help="Worlds; one in ten is held out.")] = 400,
    per_world: Annotated[int, typer.Option(help="Trajectories per world.")] = 50,
    seed: Annotated[int, typer.Option(help="Seed of everything that is drawn.")] = 0,
    vocab_size: Annotated[int, typer.Option(help="Vocabulary size of the tokenizer, with control tokens.")] = 3072,
    workers: Annotated[int, typer.Option(help="Processes.")] = 2,
) -> None:
    """Build the tokenizer unless it exists, then run oracles and write the training rows."""
    shards = directory / "rows"
    shards.mkdir(parents=True, exist_ok=True)
    plan = Plan(worlds, worlds * per_world, seed, worlds_per_shard=10, backend="unsafe-local")
    path = directory / "tokenizer.json"
    if not path.exists():
        corpus = [*anyio.run(_texts, Plan(TOKENIZER_WORLDS, 40 * TOKENIZER_WORLDS, seed)), *_words()]
        path.write_text(build_tokenizer(corpus, phrases=phrases(), vocab_size=vocab_size), encoding="utf-8")
    started = time.perf_counter()
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        missing = [shard for shard in range(plan.shards) if not (shards / f"{shard:05}-train.safetensors").exists()]
        jobs = [pool.submit(_write_shard, plan, shard, directory) for shard in missing]
        for number, job in enumerate(as_completed(jobs), 1):
            job.result()
            print(f"{number} of {len(missing)} shards, {time.perf_counter() - started:.0f} s", flush=True)
    for split in ("train", "heldout"):
        rows = join([Rows.load(found) for found in sorted(shards.glob(f"*-{split}.safetensors"))])
        rows.save(directory / f"{split}.safetensors")
        print(f"{split}: {len(rows)} rows, {len(rows.ids)} tokens, {int(rows.mask.sum())} written by the assistant")


def join(parts: list[Rows]) -> Rows:
    """Return the rows of all parts; `copied` is that of the first."""
    starts = torch.tensor([0, *(len(part.ids) for part in parts)]).cumsum(0)
    offsets = [part.offsets[:-1] + start for part, start in zip(parts, starts.tolist(), strict=False)]
    return Rows(
        ids=torch.cat([part.ids for part in parts]),
        mask=torch.cat([part.mask for part in parts]),
        offsets=torch.cat([*offsets, starts[-1:]]),
        copied=parts[0].copied,
        spread=torch.cat([part.spread for part in parts]),
    )


def _write_shard(plan: Plan, shard: int, directory: Path) -> None:
    anyio.run(functools.partial(_run_shard, plan, shard, directory))


async def _run_shard(plan: Plan, shard: int, directory: Path) -> None:
    tokenizer = Tokenizer.from_dir(directory)
    control = set(tokenizer.control_ids.values())
    copied = [index for index in range(tokenizer.vocab_size) if index not in control]
    rows: dict[str, list[tuple[list[int], list[int]]]] = {"train": [], "heldout": []}
    spread: dict[str, list[bool]] = {"train": [], "heldout": []}
    names: dict[str, int] = {}
    async with OracleSandbox(plan.backend) as sandbox:
        for number, (synth, _) in enumerate(draw_tasks(plan, shard)):
            ids, mask = await sandbox.row(synth, tokenizer, thinking=THINKING[number % len(THINKING)])
            if len(ids) <= LONGEST:
                split = split_of(synth.task.id)
                rows[split].append((ids, mask))
                spread[split].append(OPERATIONS[synth.operation].spread_fact)
                names[synth.operation] = names.get(synth.operation, 0) + 1
    (directory / "rows" / f"{shard:05}.json").write_text(json.dumps(names), encoding="utf-8")
    for split in ("heldout", "train"):  # a shard is complete when its training rows are there
        path = directory / "rows" / f"{shard:05}-{split}.safetensors"
        Rows.pack(rows[split], copied=copied, spread=spread[split]).save(path.with_suffix(".partial"))
        path.with_suffix(".partial").rename(path)


async def _texts(plan: Plan) -> list[str]:
    """Return the conversations that the tokenizer is trained on."""
    texts: list[str] = []
    async with OracleSandbox("unsafe-local") as sandbox:
        for shard in range(plan.shards):
            for synth, _ in draw_tasks(plan, shard):
                messages, _ = await sandbox.solve(synth, thinking="always")
                specs = [tool.spec for tool in synth.task.build_tools()]
                text = chat.encode(to_openai_all(messages), tools=specs or None, effort="high")
                texts += between_control_tokens(text)
    return texts


def _words() -> Iterator[str]:
    """Yield words so that frequent ones become one token each, and others few."""
    for _ in range(COPIES):
        yield "\n".join((*vocabulary.common_nouns(), *vocabulary.common()))
    for kind in ("noun", "verb", "adjective"):
        yield "\n".join(vocabulary.words(kind))
    yield "\n".join(word.capitalize() for word in vocabulary.common_nouns())
    for name in vocabulary.POOLS:
        yield "\n".join(vocabulary.pool(name))
