"""A model whose experts stay on disk, cold and cached.

Run as `python -m agentkit_engine.benchmarks.experts_on_disk FOLDER --layers 9` for a checkpoint that is larger than
memory: V4-Flash at its true width, 3.6 GB per layer of 256 experts and 2.1 GB for the embeddings. It is written to
FOLDER unless it is there. In a control group with a memory limit, the limit holds for the page cache too. Needs Linux.
"""

from __future__ import annotations

import gc
import os
import resource
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

import agentkit_engine
from agentkit_engine.benchmarks.errors import OutputsDifferError
from agentkit_engine.benchmarks.peers import random_ids
from agentkit_engine.benchmarks.random_checkpoint import flash, write_random_checkpoint
from agentkit_engine.benchmarks.record import (
    Bound,
    Measurement,
    current_commit,
    describe_machine,
    make_record,
    merge_records,
)
from agentkit_engine.engine import Engine
from agentkit_engine.sampler import SampledToken
from agentkit_engine.sampling_params import SamplingParams
from agentkit_engine.spec import ModelSpec
from agentkit_kernels.cpu import Cpu
from agentkit_kernels.cpu.expert_store import ExpertStore

NAME = "experts-on-disk"
BEYOND_MEMORY = "experts-beyond-memory"
PROMPT = 16
"""Tokens of the prompt."""
MOST = 1.25
"""Peak memory of a process, over the weights that it holds."""
FEWEST = 200
"""Experts that a run over a large checkpoint must use."""
GROUPS = {
    "": ("", "memory.max", "memory.peak"),
    "memory": ("memory", "memory.limit_in_bytes", "memory.max_usage_in_bytes"),
}
"""Folder, limit and peak of a control group, by the controllers that `/proc/self/cgroup` names: version 2, and 1."""


@dataclass(frozen=True, slots=True)
class Run:
    """One prompt and its continuation.

    Attributes:
        prompt_s: Seconds to the first token.
        token_s: Seconds per further token.
        read: Bytes of experts that were read per further token, from the disk or the page cache.
        from_disk: Bytes that were read from the disk per further token.
        experts: Experts that were read at least once.
        tokens: What was generated.
    """

    prompt_s: float
    token_s: float
    read: float
    from_disk: float
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


def beyond_memory(folder: Path, twin: ModelSpec, cache_bytes: int, decoded: int) -> Iterator[Measurement]:
    """experts-beyond-memory: a checkpoint of any size, after a random one of `twin`, whose experts fit into memory."""
    list(small(twin, decoded))
    gc.collect()  # engines are parts of cycles
    outputs = (
        f"cold = cached; with {len(twin.layers)} layers and {twin.n_routed_experts} experts "
        "= all experts in memory, bit for bit"
    )
    yield from measure(folder, cache_bytes, decoded, name=BEYOND_MEMORY, outputs=outputs)
    if (group := _control_group()) is not None:
        limit, peak = group
        yield Measurement(
            BEYOND_MEMORY,
            f"peak memory of the control group, page cache included, with a limit of {limit / 1e9:.1f} GB",
            peak / 1e9,
            "GB",
            target=Bound("value", "<=", round(limit / 1e9, 3)),
            higher_is_better=False,
        )


def measure(
    folder: Path,
    cache_bytes: int,
    decoded: int,
    expected: list[SampledToken] | None = None,
    *,
    name: str = NAME,
    outputs: str = "cold = cached = all experts in memory, bit for bit",
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
    experts = sum(rows.nbytes for rows in engine.decoder.packed.values() if len(rows.shape) == 3)
    model = f"{size / 1e6:,.0f} MB of weights, {cache_bytes / 1e6:,.0f} MB of experts in memory"
    large = name == BEYOND_MEMORY
    for label, run in (("cold", cold), ("cached", cached)):
        yield Measurement(name, f"prompt of {PROMPT}, {label}; {model}", PROMPT / run.prompt_s, "tokens/s")
        yield Measurement(name, f"decode, {label}; {model}", 1 / run.token_s, "tokens/s", outputs=outputs)
        per_token = f"per decoded token, {label}; {model}"
        yield Measurement(name, f"experts read {per_token}", run.read / 1e6, "MB", higher_is_better=False)
        yield Measurement(
            name,
            f"bytes read from the disk {per_token}",
            run.from_disk / 1e6,
            "MB",
            peer="the experts read",
            peer_value=run.read / 1e6,
            target=Bound("ratio", ">=", 0.9) if large and label == "cold" else None,
            higher_is_better=False,
        )
    yield Measurement(
        name,
        f"experts read at least once; {model}",
        cached.experts,
        "experts",
        target=Bound("value", ">=", FEWEST) if large else None,
    )
    yield Measurement(
        name,
        f"peak memory of the process; {model}",
        peak / 1e9,
        "GB",
        peer="weights outside the experts, and the experts in memory",
        peer_value=(size - experts + cache_bytes) / 1e9,
        target=Bound("ratio", ">=", 1 / MOST) if large else None,
        higher_is_better=False,
    )


def _answer(engine: Engine, decoded: int, store: ExpertStore | None, prompt: int = PROMPT) -> Run:
    engine.scheduler.cache.clear()
    with engine.session() as session:
        session.append(random_ids(engine.spec, prompt))
        start = time.perf_counter()
        answer = session.generate(SamplingParams(temperature=0, max_tokens=decoded + 1))
        tokens = [next(answer)]
        prompted, read, disk = time.perf_counter(), store.read_bytes if store else 0, _read_from_disk()
        tokens += answer
        ended = time.perf_counter()
    return Run(
        prompted - start,
        (ended - prompted) / decoded,
        ((store.read_bytes if store else 0) - read) / decoded,
        (_read_from_disk() - disk) / decoded,
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


def _read_from_disk() -> int:
    """Return the bytes that this process has made the system read from disks."""
    [line] = [line for line in Path("/proc/self/io").read_text().splitlines() if line.startswith("read_bytes:")]
    return int(line.split()[1])


def _control_group() -> tuple[int, int] | None:
    """Return the memory limit of this process's control group, and its peak; None without a limit."""
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers not in GROUPS:
            continue
        top, limit, peak = GROUPS[controllers]
        root = Path("/sys/fs/cgroup", top)
        for group in (root / path.lstrip("/"), root):  # a container sees its own group as the root
            text = (group / limit).read_text().strip() if (group / limit).is_file() else "max"
            if text != "max" and int(text) < os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"):
                return int(text), int((group / peak).read_text())
    return None


def main(
    folder: Annotated[Path, typer.Argument(help="Folder of the checkpoint; written if it does not exist.")],
    layers: Annotated[int, typer.Option(help="Layers of 256 experts, CSA and HCA in turn.")] = 9,
    cache_bytes: Annotated[int, typer.Option(help="Memory for experts.")] = 4 << 30,
    decoded: Annotated[int, typer.Option(help="Tokens to decode.")] = 16,
    out: Annotated[Path | None, typer.Option(help="File to merge the records into.")] = None,
) -> None:
    """Measure V4-Flash at its true width with experts on disk, and print the results."""
    if not folder.exists():
        ratios = [(4, 128)[layer % 2] for layer in range(layers)]
        write_random_checkpoint(folder, flash(*ratios, n_routed_experts=256))
    command = (
        f"python -m agentkit_engine.benchmarks.experts_on_disk FOLDER --layers {layers} --cache-bytes {cache_bytes}"
    )
    machine, commit = describe_machine(), current_commit(Path(agentkit_engine.__file__).parent)
    records = []
    for measured in beyond_memory(folder, flash(4, 128, n_routed_experts=16), cache_bytes, decoded):
        records.append(make_record(measured, machine=machine, commit=commit, command=command))
        print(f"{measured.what}: {measured.value:.3g} {measured.unit}", flush=True)
    if out is not None:
        merge_records(out, BEYOND_MEMORY, records)


if __name__ == "__main__":
    typer.run(main)
