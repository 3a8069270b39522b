"""Time opening, commands and closing on every backend that works here: `python -m agentkit_environments.benchmarks`.

Prints one JSON object per line, in milliseconds: p50 and p99 of 200 runs of `true` in a warm environment, the same for
`subprocess.run` in this process, and the median of ten openings and closings. The last line is the median of ten
openings of a process sandbox with its first command, whose work directory is an overlay of a folder of 50,000 files, of
which 1,000 are hidden one by one.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import tempfile
import time
from pathlib import Path

import anyio

from agentkit_environments import EnvironmentSpec, available_backends, open_environment
from agentkit_environments.environment import Backend
from agentkit_environments.overlay import Overlay
from agentkit_environments.process import ProcessEnvironment

COMMANDS = 200
OPENINGS = 10
DIRECTORIES, FILES_EACH = 1_000, 50


def percentiles(seconds: list[float]) -> dict[str, float]:
    ordered = sorted(seconds)
    return {
        "p50_ms": round(1e3 * ordered[len(ordered) // 2], 2),
        "p99_ms": round(1e3 * ordered[int(len(ordered) * 0.99)], 2),
    }


def time_directly() -> list[float]:
    seconds = []
    for _ in range(COMMANDS):
        start = time.perf_counter()
        subprocess.run(["true"], capture_output=True, check=True)
        seconds.append(time.perf_counter() - start)
    return seconds


async def measure(backend: Backend) -> dict[str, object]:
    opening, closing, commands = [], [], []
    for _ in range(OPENINGS):
        start = time.perf_counter()
        env = await open_environment(EnvironmentSpec(), backend=backend)
        opened = time.perf_counter()
        await env.exec(["true"])
        ran = time.perf_counter()
        await env.close()
        opening.append(opened - start)
        closing.append(time.perf_counter() - ran)
    async with await open_environment(EnvironmentSpec(), backend=backend) as env:
        for _ in range(COMMANDS):
            start = time.perf_counter()
            await env.exec(["true"])
            commands.append(time.perf_counter() - start)
    return {
        "backend": backend,
        "open_ms": round(1e3 * statistics.median(opening), 1),
        "close_ms": round(1e3 * statistics.median(closing), 1),
        **percentiles(commands),
    }


def make_files(folder: str) -> None:
    for number in range(DIRECTORIES):
        directory = Path(folder, f"d{number % 30}", str(number))
        directory.mkdir(parents=True)
        for file in range(FILES_EACH):
            (directory / f"f{file}").write_bytes(bytes(1_000))


async def measure_overlay() -> dict[str, object]:
    seconds = []
    with tempfile.TemporaryDirectory() as folder:
        make_files(folder)
        hidden = tuple(f"d{number % 30}/{number}/f0" for number in range(DIRECTORIES))
        for _ in range(OPENINGS):
            start = time.perf_counter()
            async with await ProcessEnvironment.open(
                EnvironmentSpec(), "benchmark", overlay=Overlay(folder, hidden)
            ) as env:
                await env.exec(["true"])
                seconds.append(time.perf_counter() - start)
    files = DIRECTORIES * FILES_EACH
    return {"overlay_of_files": files, "hidden": len(hidden), "open_ms": round(1e3 * statistics.median(seconds), 1)}


def main() -> None:
    print(json.dumps({"backend": "subprocess.run", **percentiles(time_directly())}), flush=True)
    backends: tuple[Backend, ...] = ("unsafe-local", "process", "docker")
    reasons = available_backends()
    for backend in backends:
        if reasons[backend] is None:
            print(json.dumps(anyio.run(measure, backend)), flush=True)
        else:
            print(json.dumps({"backend": backend, "skipped": reasons[backend]}), flush=True)
    if reasons["process"] is None:
        print(json.dumps(anyio.run(measure_overlay)), flush=True)


if __name__ == "__main__":
    main()
