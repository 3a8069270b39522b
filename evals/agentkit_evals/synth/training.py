"""The tokenizer and the training rows of the packaged model: `python -m agentkit_evals.synth DIR INSTRUCTIONS`.

Rows are the oracles' conversations that `agentkit synth` wrote and checked, with exactly the ids that a session of the
engine would have.
"""

from __future__ import annotations

import functools
import itertools
import json
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated, Any

import typer

from agentkit.task import Task
from agentkit_engine import chat
from agentkit_engine.chat import Tokenizer
from agentkit_engine.training.data import Rows
from agentkit_engine.training.tokenizer import build_tokenizer
from agentkit_evals.synth import vocabulary
from agentkit_evals.synth.operations import OPERATIONS
from agentkit_evals.synth.tokenizer_texts import between_control_tokens, phrases

LONGEST = 1536  # ids of a row; longer conversations are left out
TOKENIZER_ROWS = 2400
COPIES = 4  # of the frequent words in the tokenizer's corpus
CHUNK = 500  # conversations that a process encodes at a time


def main(
    directory: Annotated[
        Path, typer.Argument(help="Folder for tokenizer.json, train.safetensors, heldout.safetensors.")
    ],
    instructions: Annotated[Path, typer.Argument(help="Folder that agentkit synth --out wrote.")],
    vocab_size: Annotated[int, typer.Option(help="Vocabulary size of the tokenizer, with control tokens.")] = 3072,
    workers: Annotated[int, typer.Option(help="Processes.")] = 2,
) -> None:
    """Build the tokenizer unless it exists, then write the training rows."""
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / "tokenizer.json"
    if not path.exists():
        corpus = [*_texts(instructions), *_words()]
        path.write_text(build_tokenizer(corpus, phrases=phrases(), vocab_size=vocab_size), encoding="utf-8")
    tokenizer = Tokenizer.from_dir(directory)
    control = set(tokenizer.control_ids.values())
    copied = [index for index in range(tokenizer.vocab_size) if index not in control]
    for split in ("train", "heldout"):
        lines = (instructions / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
        with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
            encoded = list(pool.map(functools.partial(_encode, directory), lines, chunksize=CHUNK))
        kept = [row for row in encoded if len(row[0]) <= LONGEST]
        rows = Rows.pack(
            [(ids, mask) for ids, mask, _ in kept], copied=copied, spread=[spread for _, _, spread in kept]
        )
        rows.save(directory / f"{split}.safetensors")
        print(f"{split}: {len(rows)} rows, {len(rows.ids)} tokens, {int(rows.mask.sum())} written by the assistant")


def session_ids(row: dict[str, Any], tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """Return the ids of the session with the messages of a row of `agentkit synth`, and a mask of the sampled ids."""
    task = Task.model_validate(row["task"])
    tools = [tool.spec for tool in task.build_tools()]
    ids: list[int] = []
    mask: list[int] = []
    unread: list[dict[str, Any]] = []
    for message in row["messages"]:
        if message["role"] != "assistant":
            unread.append(message)
            continue
        think = "reasoning_content" in message
        if ids:
            prompt = chat.encode_continuation_ids(unread, tokenizer=tokenizer, think=think)
        else:
            prompt = chat.encode_ids(
                unread, tokenizer=tokenizer, tools=tools or None, effort=task.agent.effort, think=think
            )
        written = chat.encode_completion_ids(message, tokenizer=tokenizer, think=think)
        ids += [*prompt, *written]
        mask += [*[0] * len(prompt), *[1] * len(written)]
        unread = []
    return ids, mask


@functools.cache
def _tokenizer(directory: Path) -> Tokenizer:
    return Tokenizer.from_dir(directory)


def _encode(directory: Path, line: str) -> tuple[list[int], list[int], bool]:
    row = json.loads(line)
    return *session_ids(row, _tokenizer(directory)), OPERATIONS[row["operation"]].spread_fact


def _texts(instructions: Path) -> Iterator[str]:
    """Yield the conversations that the tokenizer is trained on."""
    with (instructions / "train.jsonl").open(encoding="utf-8") as lines:
        for row in map(json.loads, itertools.islice(lines, TOKENIZER_ROWS)):
            specs = [tool.spec for tool in Task.model_validate(row["task"]).build_tools()]
            yield from between_control_tokens(chat.encode(row["messages"], tools=specs or None, effort="high"))


def _words() -> Iterator[str]:
    """Yield words so that frequent ones become one token each, and others few."""
    for _ in range(COPIES):
        yield "\n".join((*vocabulary.common_nouns(), *vocabulary.common()))
    for kind in ("noun", "verb", "adjective"):
        yield "\n".join(vocabulary.words(kind))
    yield "\n".join(word.capitalize() for word in vocabulary.common_nouns())
    for name in vocabulary.POOLS:
        yield "\n".join(vocabulary.pool(name))
