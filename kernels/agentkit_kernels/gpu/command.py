"""The command line of `python -m agentkit_kernels.gpu`, shared with the engine's parts.

Nothing here imports Triton, since a rehearsal sets TRITON_INTERPRET before Triton is first imported.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from agentkit_kernels.gpu.record import Record, table

if TYPE_CHECKING:
    from agentkit_kernels.gpu.bench import Bench

SECONDS = 240
"""A part is ended after this time on a GPU."""
REHEARSAL_SECONDS = 1800
"""A part is ended after this time in a rehearsal, whose times depend on what else the CPU does."""
_RESERVE = 30
"""No measurement begins in a part's last seconds."""
OUT = Path("runs/gpu")
_BENCH = "agentkit_kernels.gpu.bench"


@dataclass(frozen=True, slots=True)
class Part:
    """One part: `function` is `module:name`, a generator of results for a `Bench`. `goal` is its number, if any."""

    name: str
    goal: str
    function: str


def main(program: str, parts: Sequence[Part], arguments: Sequence[str] | None = None) -> int:
    """Run parts, each in a process of its own, and print a table. Returns the exit status: 1 if a part failed."""
    options = _options(program, parts, arguments)
    if problem := _prepare(rehearse=options.rehearse):
        print(f"{program}: {problem}", file=sys.stderr)
        return 2
    processes = multiprocessing.get_context("forkserver")
    modules = {part.function.partition(":")[0] for part in options.parts}
    processes.set_forkserver_preload([_BENCH, *sorted(modules)])  # imported once for all parts
    files, seconds = [], REHEARSAL_SECONDS if options.rehearse else SECONDS
    for part in options.parts:
        print(f"{part.name} ...", end=" ", flush=True)
        start = time.monotonic()
        file = options.out / f"{part.name}.json"
        file.unlink(missing_ok=True)
        process = processes.Process(target=_run, args=(part, options.rehearse, options.out, seconds))
        process.start()
        process.join(seconds)
        if process.is_alive():
            process.kill()
            process.join()
        status = _settle(part, file, process.exitcode, seconds, rehearse=options.rehearse)
        print(f"{status}, {time.monotonic() - start:.0f} s", flush=True)
        files.append(file)
    records = [json.loads(file.read_text(encoding="utf-8")) for file in files]
    if options.rehearse:
        print("\nA rehearsal: these times mean nothing.")
    print(f"\n{table(records)}")
    return int(any(record["status"] == "failed" for record in records))


def _options(program: str, parts: Sequence[Part], arguments: Sequence[str] | None) -> Any:
    parser = argparse.ArgumentParser(prog=program, description="Measure on a GPU; each part writes one JSON file.")
    parser.add_argument("--rehearse", action="store_true", help="run the same code on a CPU with toy shapes")
    names = ", ".join(part.name for part in parts)
    parser.add_argument("--only", default="", metavar="NAME,...", help=f"of {names}")
    parser.add_argument("--out", type=Path, default=OUT, metavar="DIR", help="default %(default)s")
    options = parser.parse_args(arguments)
    wanted = [name for name in options.only.split(",") if name]
    if unknown := sorted({*wanted} - {part.name for part in parts}):
        parser.error(f"no part {', '.join(unknown)}; choose from {names}")
    options.parts = [part for part in parts if not options.only or part.name in wanted]
    return options


def _prepare(*, rehearse: bool) -> str:
    """Set up the environment of the processes; return what is wrong, if anything."""
    if rehearse:
        os.environ["TRITON_INTERPRET"] = "1"
        return ""
    if os.environ.get("TRITON_INTERPRET") == "1":
        return "TRITON_INTERPRET=1 keeps kernels off the GPU; unset it, or rehearse with --rehearse"
    import torch

    if not torch.cuda.is_available():
        return (
            f"torch {torch.__version__} finds no GPU. Install the build of torch for this GPU's driver (CUDA or ROCm), "
            "or add --rehearse to run the same code on this CPU with toy shapes"
        )
    return ""


def _run(part: Part, rehearse: bool, out: Path, seconds: int) -> None:
    """Run one part, in its own process."""
    record, start = Record(part.name, part.goal, rehearse), time.monotonic()
    try:
        from agentkit_kernels.gpu.bench import Bench, OutOfTimeError, machine

        bench: Bench = Bench(rehearse=rehearse, seconds=seconds - _RESERVE)
        record.machine = machine(bench)
        module, _, name = part.function.partition(":")
        try:
            for result in getattr(import_module(module), name)(bench):
                record.add(result)
                record.seconds = time.monotonic() - start
                record.write(out)
            record.status = "done"
        except OutOfTimeError as error:
            record.status, record.error = "cut", str(error)
    except Exception:  # the record holds every failure of a part, so that the other parts still run
        record.status, record.error = "failed", traceback.format_exc()
    record.seconds = time.monotonic() - start
    record.write(out)


def _settle(part: Part, file: Path, exit_code: int | None, seconds: int, *, rehearse: bool) -> str:
    """Return a part's status; a process that died leaves the record of a failure, with what it had measured."""
    fields = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None
    if fields is None:
        Record(part.name, part.goal, rehearse).write(file.parent)
        fields = json.loads(file.read_text(encoding="utf-8"))
    if fields["status"] == "running":
        fields["status"] = "failed"
        fields["error"] = f"its process ended with status {exit_code}, or was ended after {seconds} s"
        file.write_text(json.dumps(fields, indent=1) + "\n", encoding="utf-8")
    return str(fields["status"])
