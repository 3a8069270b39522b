"""`agentkit synth --environments N --instructions M`: instructions over generated worlds, checked by execution.

Worlds are divided into shards, and processes work on one shard at a time: they draw tasks, run each oracle and its
verifier, and write the shard's file when it is complete. A stopped run continues with the shards that are missing. Then
near-duplicates and too frequent forms are removed from all shards at once, and the card is written.

OUT/shards/*.jsonl       what was drawn and checked
OUT/train.jsonl, heldout.jsonl, worlds.jsonl, card.json

A task whose oracle does not solve it, or that is solved by doing nothing, is refused: it is left out, and the card has
the reason.
"""

from __future__ import annotations

import errno
import functools
import json
import os
import random
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from itertools import pairwise
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import anyio

from agentkit.messages import to_openai_all
from agentkit.thinking import Thinking
from agentkit_evals.contamination import Guard, packaged_texts
from agentkit_evals.errors import SynthError
from agentkit_evals.synth import Split, vocabulary
from agentkit_evals.synth.operations import OPERATIONS
from agentkit_evals.synth.oracle import OracleError
from agentkit_evals.synth.sandbox import OracleSandbox, turns
from agentkit_evals.synth.task import SynthTask, masked
from agentkit_evals.synth.world import draw_world, world_seed
from agentkit_evals.verify import Backend
from agentkit_tools import BUILTINS

HELD_OUT_WORLDS = 10  # one world in ten is held out
IDLE = 10  # one task in ten is also run by an agent that does nothing
LARGEST_SHARE = 0.001  # of all instructions, that one masked form may have
SPARE = 1.15  # tasks drawn for each that is asked for, because duplicates are removed
SIMILAR = 0.9  # Jaccard similarity of the word pairs of two instructions, from which they count as duplicates
THINKING: tuple[Thinking, ...] = ("auto",) * 8 + ("always", "never")
WEIGHTS: dict[str, float] = {
    "read_setting": 2,
    "change_setting": 3,
    "create_file": 3,
    "fix_bug": 5,
    "rename_identifier": 2,
    "two_requests": 6,
    "missing": 3,
    "call_function": 5,
    "call_known_function": 16,
    "call_twice": 6,
    "call_known_twice": 12,
    "no_function": 2,
    "no_known_function": 5,
    "compute_known": 7,
    "create_known_file": 5,
    "run_known_command": 8,
    "small_talk": 0.05,
    "far_note": 0.4,
    "far_name": 0.4,
    "far_poll": 0.4,
}
"""Shares of operations among the instructions; 1 for all others."""


@dataclass(frozen=True, slots=True)
class Plan:
    """One run; the same plan gives the same instructions on every machine.

    Attributes:
        environments: Worlds.
        instructions: Instructions after deduplication.
        seed: Seed of everything that is drawn.
        worlds_per_shard: Worlds in one file.
        backend: The sandbox that oracles and verifiers run in.

    Raises:
        SynthError: `environments` or `instructions` is below 1.
    """

    environments: int
    instructions: int
    seed: int = 0
    worlds_per_shard: int = 20
    backend: Backend = "process"

    def __post_init__(self) -> None:
        if self.environments < 1 or self.instructions < 1:
            raise SynthError(
                f"--environments {self.environments} --instructions {self.instructions}: both must be at least 1"
            )

    @property
    def shards(self) -> int:
        return -(-self.environments // self.worlds_per_shard)

    def worlds(self, shard: int) -> Iterator[tuple[int, Split]]:
        """Yield the worlds of a shard with their splits."""
        first = shard * self.worlds_per_shard
        for index in range(first, min(first + self.worlds_per_shard, self.environments)):
            split: Split = "heldout" if index % HELD_OUT_WORLDS == HELD_OUT_WORLDS - 1 else "train"
            yield world_seed(self.seed, index), split


@dataclass(frozen=True, slots=True)
class ShardFinished:
    """A finished shard.

    Attributes:
        finished: Number of shards that are finished.
        shards: Number of all shards.
        instructions: Number of instructions in the finished ones.
        seconds: Time since the command began.
        left_s: Estimate of the time that the others take.
    """

    finished: int
    shards: int
    instructions: int
    seconds: float
    left_s: float


def produce(
    plan: Plan, out: Path, *, workers: int = 2, listener: Callable[[ShardFinished], None] = lambda _: None
) -> Path:
    """Make all instructions of a plan, or those that are missing, and return the path of the card.

    Raises:
        SynthError: OUT holds another run, or the disk is full.
        SandboxUnavailableError: no sandbox can be opened.
    """
    started = time.perf_counter()
    try:
        folder = _claim(plan, out)
        missing = [shard for shard in range(plan.shards) if not _shard_path(folder, shard).exists()]
        count = sum(_lines(path) for path in folder.glob("*.jsonl"))
        with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
            jobs = {pool.submit(_run_shard, plan, shard, folder) for shard in missing}
            try:
                for made, job in enumerate(as_completed(jobs), 1):
                    count += job.result()
                    seconds, left = time.perf_counter() - started, len(missing) - made
                    listener(ShardFinished(plan.shards - left, plan.shards, count, seconds, seconds / made * left))
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        return _finish(plan, out, folder, seconds=time.perf_counter() - started)
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        raise SynthError(f"the disk of {out} is full; free some space and repeat the command: it continues") from error


def _claim(plan: Plan, out: Path) -> Path:
    """Create the folders of a run, or check that they hold this run."""
    folder = out / "shards"
    folder.mkdir(parents=True, exist_ok=True)
    path = out / "plan.json"
    wanted = {**asdict(plan), "packages": vocabulary.versions()}
    if path.exists():
        if (found := json.loads(path.read_text())) != wanted:
            raise SynthError(f"{out} holds another run: {found}, not {wanted}; choose another --out")
    else:
        _write(path, [json.dumps(wanted)])
    return folder


def _run_shard(plan: Plan, shard: int, folder: Path) -> int:
    """Draw and check the tasks of a shard, write its file, and return how many there are."""
    return anyio.run(functools.partial(_checked, plan, shard, folder))


async def _checked(plan: Plan, shard: int, folder: Path) -> int:
    rows: list[str] = []
    async with OracleSandbox(plan.backend) as sandbox:
        for number, (synth, world) in enumerate(draw_tasks(plan, shard)):
            thinking = THINKING[number % len(THINKING)]
            task = synth.task
            try:
                messages, answer = await sandbox.solve(synth, thinking=thinking)
                if number % IDLE == 0:
                    await sandbox.check_idle(synth)
            except OracleError as error:  # one task in thousands; it must not end a run of hours
                rows.append(json.dumps({"id": task.id, "world": world, "refused": str(error)}, ensure_ascii=False))
                continue
            old = draw_world(world, split_of(task.id)).files
            rows.append(
                json.dumps(
                    {
                        "id": task.id,
                        "operation": synth.operation,
                        "world": world,
                        "instruction": task.instruction,
                        "form": masked(task.instruction, synth.names),
                        "signature": synth.signature,
                        "difficulty": task.metadata["difficulty"],
                        "turns": turns(messages),
                        "tools": [tool.name for tool in task.build_tools()],
                        "provenance": task.metadata["provenance"],
                        "answer": answer,
                        "idle_checked": number % IDLE == 0,
                        "messages": to_openai_all(messages),
                        "task": task.model_dump(
                            mode="json", exclude={"environment", "metadata"}, exclude_defaults=True
                        ),
                        "files": {path: text for path, text in task.environment.files.items() if old.get(path) != text},
                    },
                    ensure_ascii=False,
                )
            )
    _write(_shard_path(folder, shard), rows)
    return len(rows)


@functools.cache
def guard() -> Guard:
    """Return the guard of the packaged suites."""
    return Guard(packaged_texts())


def draw_tasks(plan: Plan, shard: int) -> Iterator[tuple[SynthTask, int]]:
    """Draw the tasks of a shard, each with its world; no instruction occurs twice, or shares a text with a suite."""
    seen: set[str] = set()
    per_world = -(-int(plan.instructions * SPARE) // plan.environments)
    weights = [WEIGHTS.get(name, 1.0) for name in OPERATIONS]
    for world, split in plan.worlds(shard):
        rng = random.Random(f"{plan.seed}/{world}")
        made = 0
        for seed in range(3 * per_world):  # some worlds have nothing for some operations
            (name,) = rng.choices(list(OPERATIONS), weights)
            synth = OPERATIONS[name].sample(world, seed, split)
            if synth is not None and synth.task.instruction not in seen and not guard().shares(synth.task):
                seen.add(synth.task.instruction)
                made += 1
                yield synth, world
            if made == per_world:
                break


def _finish(plan: Plan, out: Path, folder: Path, *, seconds: float) -> Path:
    """Remove duplicates from all shards, and write the instructions by split, the worlds and the card."""
    drawn = list(_read(folder))
    refused = [row["refused"] for row in drawn if "refused" in row]
    checked = (row for row in drawn if "refused" not in row)
    found = list(distinct(checked, limit=max(1, int(plan.instructions * LARGEST_SHARE))))
    count = min(plan.instructions, len(found))
    rows = [found[index * len(found) // count] for index in range(count)]  # evenly, so that every world keeps some
    splits: dict[Split, list[dict[str, Any]]] = {"train": [], "heldout": []}
    for row in rows:
        splits[split_of(row["id"])].append(row)
    for split, kept in splits.items():
        _write(out / f"{split}.jsonl", (json.dumps(row, ensure_ascii=False) for row in kept))
    worlds = {row["world"]: split_of(row["id"]) for row in rows}
    files = ((world, split, dict(draw_world(world, split).files)) for world, split in sorted(worlds.items()))
    _write(
        out / "worlds.jsonl",
        (json.dumps({"world": w, "split": s, "files": each}, ensure_ascii=False) for w, s, each in files),
    )
    forms = Counter(row["form"] for row in rows)
    card = {
        "plan": asdict(plan),
        "instructions": len(rows),
        "environments": len(worlds),
        "drawn": len(drawn),
        "refused": refused,
        "forms": len(forms),
        "largest_share_of_a_form": round(max(forms.values()) / len(rows), 6),
        "share_solved_by_the_oracle": 1.0,
        "share_checked_with_an_idle_agent": round(sum(row["idle_checked"] for row in rows) / len(rows), 4),
        "splits": {split: len(kept) for split, kept in splits.items()},
        "operations": dict(Counter(row["operation"] for row in rows).most_common()),
        "difficulty": dict(sorted(Counter(row["difficulty"] for row in rows).items())),
        "turns": dict(sorted(Counter(row["turns"] for row in rows).items())),
        "tools": dict(Counter(name for row in rows for name in row["tools"] if name in BUILTINS).most_common()),
        "characters": _quantiles([len(row["instruction"]) for row in rows]),
        "packages": {name: [number, vocabulary.PACKAGES[name]] for name, number in vocabulary.versions().items()},
        "seconds": round(seconds, 1),
    }
    _write(out / "card.json", [json.dumps(card, indent=1)])
    return out / "card.json"


def distinct(rows: Iterable[dict[str, Any]], *, limit: int) -> Iterator[dict[str, Any]]:
    """Yield rows without near-duplicates, and at most `limit` rows of one masked form.

    Near-duplicates are instructions over one world whose pairs of words are nearly the same.
    """
    forms: Counter[str] = Counter()
    kept: dict[int, list[frozenset[tuple[str, ...]]]] = {}
    for row in rows:
        words = row["instruction"].split()
        pairs = frozenset(pairwise(words)) or frozenset([tuple(words)])
        others = kept.setdefault(row["world"], [])
        if forms[row["form"]] >= limit or any(len(pairs & one) >= SIMILAR * len(pairs | one) for one in others):
            continue
        forms[row["form"]] += 1
        others.append(pairs)
        yield row


def _read(folder: Path) -> Iterator[dict[str, Any]]:
    for path in sorted(folder.glob("*.jsonl")):
        with path.open(encoding="utf-8") as lines:
            yield from map(json.loads, lines)


def _write(path: Path, lines: Iterable[str]) -> None:
    """Write a file that is either complete or absent."""
    partial = path.with_suffix(".partial")
    with partial.open("w", encoding="utf-8") as file:
        file.writelines(f"{line}\n" for line in lines)
        file.flush()
        os.fsync(file.fileno())
    partial.rename(path)


def _shard_path(folder: Path, shard: int) -> Path:
    return folder / f"{shard:05}.jsonl"


def split_of(task_id: str) -> Split:
    """Return the split that the id of a task over a world names."""
    return "heldout" if "-heldout-" in task_id else "train"


def _lines(path: Path) -> int:
    with path.open("rb") as file:
        return sum(1 for _ in file)


def _quantiles(values: list[int]) -> dict[str, int]:
    ordered = sorted(values)
    return {f"p{percent}": ordered[min(len(ordered) - 1, len(ordered) * percent // 100)] for percent in (5, 50, 95)}
