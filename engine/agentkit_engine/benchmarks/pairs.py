"""The speed of two checkouts, in turn: `python -m agentkit_engine.benchmarks.pairs OLD NEW`.

A shared machine changes its speed by more than what a change costs. So each checkout has a process, the processes
compute in turn, and each pair of neighbouring runs gives one ratio; the result is their median.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated

import typer

from agentkit_engine.benchmarks.errors import BenchmarkError
from agentkit_engine.benchmarks.random_checkpoint import random_model, tiny_v4
from agentkit_engine.benchmarks.record import (
    Bound,
    Measurement,
    current_commit,
    describe_machine,
    make_record,
    merge_records,
)
from agentkit_engine.training.tiny import tiny_spec

NAME = "pairs"
WORKER = Path(__file__).with_name("pairs_worker.py")
TASKS = {
    "decode-256": "decode 128 tokens, one session at 256 tokens",
    "decode-8192": "decode 128 tokens, one session at 8192 tokens",
    "batch-decode": "decode 64 tokens each, 8 sessions at 256 to 2048 tokens",
    "prefill": "prefill of 8192 tokens",
    "restore": "restore a session of 4096 tokens",
    "open": "open a model and generate a token",
    "training": "two training steps of the packaged model's shape, 896 tokens each",
}
LEAST = 0.95
"""The speed that a change may cost."""


class Side:
    """A process that computes with the code of a checkout."""

    def __init__(self, checkout: Path, model: Path, saved: Path) -> None:
        rooms = [str(checkout / room) for room in ("engine", "kernels")]
        self.process = subprocess.Popen(
            [sys.executable, "-P", str(WORKER), str(model), str(saved)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(rooms)},
        )
        self.checkout = checkout

    def __enter__(self) -> Side:
        self.process.__enter__()
        return self

    def __exit__(self, *details: object) -> None:
        self.process.kill()
        self.process.__exit__(None, None, None)

    def start(self) -> None:
        """Wait for the model.

        Raises:
            BenchmarkError: the process ended, or imports the engine from elsewhere.
        """
        found = Path(str(self._answer()))
        if not found.is_relative_to(self.checkout):
            raise BenchmarkError(f"{self.checkout} has no agentkit_engine; {found} was imported instead")

    def seconds(self, task: str) -> float:
        """Return the CPU-seconds of one run."""
        assert self.process.stdin is not None
        print(task, file=self.process.stdin, flush=True)
        return float(str(self._answer()))

    def _answer(self) -> object:
        assert self.process.stdout is not None
        if not (line := self.process.stdout.readline()):
            raise BenchmarkError(f"the process of {self.checkout} ended with exit code {self.process.wait()}")
        return json.loads(line)


def measure(old: Path, new: Path, pairs: int, tasks: Sequence[str]) -> Iterator[Measurement]:
    """Yield the median speed of `new` over that of `old` for each task.

    Raises:
        BenchmarkError: a side failed.
    """
    commit = current_commit(old / "engine")
    with ExitStack() as stack:
        model = stack.enter_context(random_model(tiny_v4()))
        (model / "training.json").write_text(json.dumps(tiny_spec(3072).to_config()))
        saved = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="agentkit-benchmarks-")))
        sides = [stack.enter_context(Side(each.resolve(), model, saved / str(i))) for i, each in enumerate((old, new))]
        for side in sides:
            side.start()
        for task in tasks:
            for side in sides:
                side.seconds(task)  # fills caches
            seconds: list[list[float]] = [[], []]
            for pair in range(pairs):
                for number in ((0, 1), (1, 0))[pair % 2]:
                    seconds[number].append(sides[number].seconds(task))
            ratios = sorted(ours and theirs / ours for theirs, ours in zip(*seconds, strict=True))
            quarter = pairs // 4
            yield Measurement(
                NAME,
                f"{TASKS[task]}, one thread: speed over that of {commit}",
                statistics.median(ratios),
                "x",
                (ratios[-1] - ratios[0]) / statistics.median(ratios),
                target=Bound("value", ">=", LEAST),
                outputs=f"{pairs} interleaved pairs, the middle half from {ratios[quarter]:.3f} to "
                f"{ratios[-1 - quarter]:.3f}; medians {statistics.median(seconds[0]):.4g} and "
                f"{statistics.median(seconds[1]):.4g} CPU-s",
            )


def main(
    old: Annotated[Path, typer.Argument(exists=True, file_okay=False, help="A checkout.")],
    new: Annotated[Path, typer.Argument(exists=True, file_okay=False, help="The checkout compared with it.")],
    pairs: Annotated[int, typer.Option(min=1, help="Runs of each side.")] = 20,
    only: Annotated[str, typer.Option(help="Tasks, separated by commas.")] = ",".join(TASKS),
    out: Annotated[Path | None, typer.Option(help="File to merge the records into.")] = None,
) -> None:
    """Measure two checkouts in interleaved pairs, and print the results."""
    if unknown := [task for task in only.split(",") if task not in TASKS]:
        raise typer.BadParameter(f"unknown task {', '.join(unknown)}; expected {', '.join(TASKS)}", param_hint="--only")
    machine, commit = describe_machine(), current_commit(new / "engine")
    command = f"python -m agentkit_engine.benchmarks.pairs OLD NEW --pairs {pairs}"
    records = []
    for measured in measure(old, new, pairs, only.split(",")):
        records.append(make_record(measured, machine=machine, commit=commit, command=command))
        print(f"{measured.what}: {measured.value:.3f} ({measured.outputs})", flush=True)
        if out is not None:
            merge_records(out, NAME, records)


if __name__ == "__main__":
    typer.run(main)
