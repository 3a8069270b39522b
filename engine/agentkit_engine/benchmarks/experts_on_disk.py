"""A model whose experts stay on disk, cold and cached.

Run as `python -m agentkit_engine.benchmarks.experts_on_disk FOLDER --layers 9` for a checkpoint that is larger than
memory: V4-Flash at its true width, 3.6 GB per layer of 256 experts and 2.1 GB for the embeddings. It is written to
FOLDER unless it is there. Needs Linux or another system with `posix_fadvise`.
"""

from __future__ import annotations

import os
import resource
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from agentkit_engine.benchmarks.errors import OutputsDifferError
from agentkit_engine.benchmarks.peers import random_ids
from agentkit_engine.benchmarks.random_checkpoint import flash, write_random_checkpoint
from agentkit_engine.benchmarks.record import Measurement
from agentkit_engine.engine import Engine
from agentkit_engine.sampler import SampledToken
from agentkit_engine.sampling_params import SamplingParams
from agentkit_engine.spec import ModelSpec
from agentkit_kernels.cpu import Cpu
from agentkit_kernels.cpu.expert_store import ExpertStore

NAME = "experts-on-disk"
PROMPT = 16
"""Tokens of the prompt."""


@dataclass(frozen=True, slots=True)
class Run:
    """One prompt and its continuation.

    Attributes:
        prompt_s: Seconds to the first token.
        token_s: Seconds per further token.
        read: Bytes of experts that were read per further token.
        experts: Experts that were read at least once.
        tokens: What was generated.
    """

    prompt_s: float
    token_s: float
    read: float
    experts: int
    tokens: list[SampledToken]


def small(spec: ModelSpec, decoded: int) -> Iterator[Measurement]:
    """experts-on-disk: a third of the experts of a small model in memory, compared with all of them."""
    with tempfile.TemporaryDirectory(prefix="agentkit-benchmarks-") as name:
        folder = Path(name)
        write_random_checkpoint(folder, spec)
        resident = Engine.load(folder)
        experts = sum(rows.nbytes for rows in resident.decoder.packed.values() if len(rows.shape) == 3)
        expected = _answer(resident, decoded, None).tokens
        yield from measure(folder, experts // 3, decoded, expected)


def measure(
    folder: Path, cache_bytes: int, decoded: int, expected: list[SampledToken] | None = None
) -> Iterator[Measurement]:
    """Answer a prompt with files and experts out of memory, and again.

    Raises:
        OutputsDifferError: an answer differs from the other, or from `expected`.
    """
    engine = Engine.load(folder, expert_cache_bytes=cache_bytes)
    store = _store(engine)
    _answer(engine, 1, store, prompt=2)  # compiles the kernels
    store.clear()
    drop_cached_files(folder)
    cold = _answer(engine, decoded, store)
    cached = _answer(engine, decoded, store)
    if not cold.tokens == cached.tokens == (expected or cold.tokens):
        raise OutputsDifferError("experts on disk give other tokens than experts in memory; nothing was measured")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    model = f"{size / 1e6:,.0f} MB of weights, {cache_bytes / 1e6:,.0f} MB of experts in memory"
    compared = "cold = cached" if expected is None else "cold = cached = all experts in memory, bit for bit"
    for label, run in (("cold", cold), ("cached", cached)):
        yield Measurement(NAME, f"prompt of {PROMPT}, {label}; {model}", PROMPT / run.prompt_s, "tokens/s")
        yield Measurement(NAME, f"decode, {label}; {model}", 1 / run.token_s, "tokens/s", outputs=compared)
        yield Measurement(
            NAME, f"experts read per decoded token, {label}; {model}", run.read / 1e6, "MB", higher_is_better=False
        )
    yield Measurement(NAME, f"experts read at least once; {model}", cached.experts, "experts")
    yield Measurement(NAME, f"peak memory of the process; {model}", peak / 1e9, "GB", higher_is_better=False)


def _answer(engine: Engine, decoded: int, store: ExpertStore | None, prompt: int = PROMPT) -> Run:
    engine.scheduler.cache.clear()
    with engine.session() as session:
        session.append(random_ids(engine.spec, prompt))
        start = time.perf_counter()
        answer = session.generate(SamplingParams(temperature=0, max_tokens=decoded + 1))
        tokens = [next(answer)]
        prompted, read = time.perf_counter(), store.read_bytes if store else 0
        tokens += answer
        ended = time.perf_counter()
    return Run(
        prompted - start,
        (ended - prompted) / decoded,
        ((store.read_bytes if store else 0) - read) / decoded,
        len(store.read_experts) // 2 if store else 0,  # an expert has two stacks: w1 beside w3, and w2
        tokens,
    )


def _store(engine: Engine) -> ExpertStore:
    ops = engine.scheduler.runner.forward.ops
    assert isinstance(ops, Cpu) and ops.expert_store is not None
    return ops.expert_store


def drop_cached_files(folder: Path) -> None:
    """Let the system forget what it has read, so that the next read comes from the disk."""
    os.sync()
    for path in folder.glob("*.safetensors"):
        file = os.open(path, os.O_RDONLY)
        try:
            os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(file)


def main(
    folder: Annotated[Path, typer.Argument(help="Folder of the checkpoint; written if it does not exist.")],
    layers: Annotated[int, typer.Option(help="Layers of 256 experts, CSA and HCA in turn.")] = 9,
    cache_bytes: Annotated[int, typer.Option(help="Memory for experts.")] = 4 << 30,
    decoded: Annotated[int, typer.Option(help="Tokens to decode.")] = 16,
) -> None:
    """Measure V4-Flash at its true width with experts on disk, and print the results."""
    if not folder.exists():
        ratios = [(4, 128)[layer % 2] for layer in range(layers)]
        write_random_checkpoint(folder, flash(*ratios, n_routed_experts=256))
    for measured in measure(folder, cache_bytes, decoded):
        print(f"{measured.what}: {measured.value:.3g} {measured.unit}", flush=True)


if __name__ == "__main__":
    typer.run(main)
