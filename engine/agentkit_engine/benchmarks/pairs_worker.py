"""One side of `pairs.py`: `python -P pairs_worker.py FOLDER`, with the measured checkout on `PYTHONPATH`.

It reads the names of tasks from standard input and answers each with CPU-seconds. It runs in checkouts of many ages, so
it uses only names that they all have, and nothing else of this folder.
"""

from __future__ import annotations

import inspect
import json
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import torch
import torch.nn.functional as F

import agentkit_engine
from agentkit_engine import AsyncEngine, AsyncSession, Engine, ModelSpec, SamplingParams
from agentkit_engine.model import Decoder, Trace, indexer_kl, initialize_
from agentkit_engine.training.train import TrainingConfig, build_optimizers

DECODED = 128
PREFILLED = 8192
RESTORED = 4096
SESSIONS = 8
BATCH = (4, 224)
"""Rows and tokens of a training step."""


class Side:
    """The checkout's engine with a model, and a decoder in training, on one thread."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.draws = folder, torch.Generator().manual_seed(0)
        self.engine = self._load()
        self.engine.warm_up()
        spec = ModelSpec.from_config(json.loads((folder / "training.json").read_text()))
        self.decoder = initialize_(Decoder(spec), torch.Generator().manual_seed(0))
        self.optimizers = build_optimizers(self.decoder, TrainingConfig())
        self.saved = Path(sys.argv[2])
        with self.engine.session() as session:
            session.append(self._ids(RESTORED))
            list(session.generate(SamplingParams(temperature=0, max_tokens=1)))
            session.save(self.saved)
        self.tasks: dict[str, Callable[[], float]] = {
            "decode-256": partial(self.decode, 256),
            "decode-8192": partial(self.decode, 8192),
            "batch-decode": lambda: anyio.run(self.decode_together),
            "prefill": self.prefill,
            "restore": self.restore,
            "open": self.open,
            "training": self.train,
        }

    def decode(self, context: int) -> float:
        """One session."""
        with self.engine.session() as session:
            session.append([id % 4096 for id in range(context)])  # in the prefix cache, but for the first time
            list(session.generate(SamplingParams(temperature=0, max_tokens=1)))
            return _seconds(lambda: list(session.generate(SamplingParams(temperature=0, max_tokens=DECODED))))

    async def decode_together(self) -> float:
        """Sessions of different lengths, half as many tokens each."""

        async def generate(session: AsyncSession, count: int) -> None:
            async for _ in session.generate(SamplingParams(temperature=0, max_tokens=count)):
                pass

        async def generate_all(count: int) -> None:
            async with anyio.create_task_group() as group:
                for session in sessions:
                    group.start_soon(generate, session, count)

        async with AsyncEngine(self.engine) as engine:
            sessions = [engine.session() for _ in range(SESSIONS)]
            for number, session in enumerate(sessions):
                await session.append([number, *range(256 * (number + 1))])
            await generate_all(1)
            start = time.process_time()
            await generate_all(DECODED // 2)
            return time.process_time() - start

    def prefill(self) -> float:
        """A prompt that no cache holds, to its first token."""
        with self.engine.session() as session:
            session.append(self._ids(PREFILLED))
            return _seconds(lambda: list(session.generate(SamplingParams(temperature=0, max_tokens=1))))

    def restore(self) -> float:
        """A saved session, to its next token."""

        def run() -> None:
            with self.engine.open(self.saved) as session:
                list(session.generate(SamplingParams(temperature=0, max_tokens=1)))

        return _seconds(run)

    def open(self) -> float:
        """A model, to its first token."""

        def run() -> None:
            with self._load().session() as session:
                session.append([1])
                list(session.generate(SamplingParams(temperature=0, max_tokens=1)))

        return _seconds(run)

    def train(self) -> float:
        """Two steps: one with the losses of indexers and MTP block, one without."""
        ids_BT = torch.randint(self.decoder.spec.vocab_size, BATCH, generator=self.draws)

        def step(*, whole: bool) -> None:
            trace = Trace(index_scores=whole)
            logits_BTV = self.decoder(ids_BT, trace=trace)
            loss = F.cross_entropy(logits_BTV[:, :-1].flatten(0, 1), ids_BT[:, 1:].flatten())
            if whole and trace.streams_BTMD is not None:
                drafts_BTV, _ = self.decoder.draft_logits(trace.streams_BTMD[:, :-1], ids_BT[:, 1:], trace=trace)
                loss = loss + F.cross_entropy(drafts_BTV[:, :-1].flatten(0, 1), ids_BT[:, 2:].flatten())
                loss = loss + indexer_kl(trace)
            loss.backward()  # type: ignore[no-untyped-call]
            for optimizer in self.optimizers:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)

        def steps() -> None:
            step(whole=True)
            step(whole=False)

        return _seconds(steps)

    def _load(self) -> Engine:
        options: dict[str, Any] = {"threads": 1} if "threads" in inspect.signature(Engine.load).parameters else {}
        engine = Engine.load(self.folder, **options)
        scheduler = getattr(engine, "scheduler", None) or getattr(engine, "batcher")  # noqa: B009
        scheduler.speculate = False  # drafts depend on the last bits, which may differ
        return engine

    def _ids(self, count: int) -> list[int]:
        return torch.randint(self.engine.spec.vocab_size, (count,), generator=self.draws).tolist()


def _seconds(work: Callable[[], object]) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


def main() -> None:
    """Answer until standard input ends; the first line is the file of the package that is measured."""
    torch.set_num_threads(1)
    side = Side(Path(sys.argv[1]))
    print(json.dumps(agentkit_engine.__file__), flush=True)
    for line in sys.stdin:
        print(json.dumps(side.tasks[line.strip()]()), flush=True)


if __name__ == "__main__":
    main()
