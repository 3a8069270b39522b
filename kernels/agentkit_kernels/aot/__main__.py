"""Compile kernels for GPUs that are not there, count their traffic, and report: `python -m agentkit_kernels.aot`."""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path

from agentkit_kernels.aot import calls as catalog
from agentkit_kernels.aot.compiling import Outcome, compile_file, joined
from agentkit_kernels.aot.counting import Counted, fault
from agentkit_kernels.aot.report import README, RESULTS, Report, stale, table_is_current, uncounted, write_table
from agentkit_kernels.aot.targets import TARGETS


def main(arguments: Sequence[str] | None = None) -> int:
    """Return 1 if a check failed."""
    options = _options(arguments)
    if options.check:
        return _check()
    started = time.monotonic()
    files = options.files or catalog.kernel_files()
    counted = _count(files, options.jobs) if options.count else []
    outcome = _compile(files, options.targets, options.shapes, options.jobs)
    faults = outcome.faults + [found for one in counted if (found := fault(one))]
    if options.write:
        errors = json.loads(options.errors.read_text()) if options.errors else {}
        report = Report(outcome.programs, outcome.refused, counted, errors, faults)
        report.write()
        write_table(report)
    seconds = time.monotonic() - started
    print(
        f"{len(files)} files, {len(outcome.programs)} programs, {len(counted)} counted calls, {len(faults)} faults, "
        f"{seconds:.0f} s"
    )
    return int(bool(faults))


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m agentkit_kernels.aot", description=__doc__)
    parser.add_argument("files", nargs="*", help="files of agentkit_kernels.triton, such as attention; all by default")
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--shapes", nargs="+", choices=catalog.COMPILED, default=list(catalog.COMPILED))
    parser.add_argument("--no-count", dest="count", action="store_false", help="do not count bytes in the interpreter")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes at once")
    parser.add_argument("--write", action="store_true", help=f"write {RESULTS.name} and the table in {README.name}")
    parser.add_argument("--errors", type=Path, help="what the tests of kernels wrote with --errors, for the table")
    parser.add_argument("--check", action="store_true", help="only check that the report and the table are current")
    return parser.parse_args(arguments)


def _check() -> int:
    try:
        report = Report.read()
    except ValueError as error:
        print(error)
        return 1
    wrong = [f"FAULT: {one}" for one in report.faults]
    wrong += [f"not counted: {file}.py ({call})" for file, call in uncounted(report)]
    wrong += [f"accepted.py has an entry that is not needed: {entry}" for entry in stale(report)]
    if not table_is_current(report):
        wrong.append(
            f"The table in {README.name} is not that of {RESULTS.name}; make it again with `make kernels-table`."
        )
    print(*wrong, sep="\n", end="\n" if wrong else "")
    return int(bool(wrong))


def _compile(files: Iterable[str], targets: Iterable[str], shapes: Iterable[str], jobs: int) -> Outcome:
    work = [(file, target, model) for file in files for model in shapes for target in targets]
    # Forked children would share torch's threads; spawned ones start clean.
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:
        outcomes = []
        for (file, target, model), outcome in zip(work, pool.map(compile_file, *zip(*work, strict=True)), strict=True):
            print(f"{file}.py for {target} at {model} shapes: {len(outcome.programs)} programs", flush=True)
            for line in (*(f"refused: {one}" for one in outcome.refused), *(f"FAULT: {one}" for one in outcome.faults)):
                print(line, flush=True)
            outcomes.append(outcome)
        return joined(outcomes)


def _count(files: Sequence[str], jobs: int) -> list[Counted]:
    counted = []
    with ThreadPoolExecutor(jobs) as pool:
        for file, of_file in zip(files, pool.map(_count_file, files), strict=True):
            print(f"{file}.py counted: {len(of_file)} calls", flush=True)
            for one in of_file:
                if found := fault(one):
                    print(f"FAULT: {found}", flush=True)
            counted += of_file
    return counted


def _count_file(file: str) -> list[Counted]:
    """Count in a process of its own: Triton reads TRITON_INTERPRET when it is imported."""
    command = [sys.executable, "-m", "agentkit_kernels.aot.counting", file]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return [Counted(**counted) for counted in json.loads(done.stdout)]


if __name__ == "__main__":
    sys.exit(main())
