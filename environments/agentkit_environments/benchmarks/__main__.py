"""Time opening, commands and closing on every backend that works here: `python -m agentkit_environments.benchmarks`.

Prints one JSON object per line, in milliseconds: p50 and p99 of 200 runs of `true` in a warm environment, and of the
part of them that is not the command's own time (`over`); the median of ten openings, first commands and closings. The
same for `subprocess.run` in this process, and for `docker exec` in the same kind of container, through the engine's API
and by the command line. Then, for each backend, the median time from the call that opens an environment to the end of
its first command, ten times each in turn: `cold_ms` without a pool, and `warm_ms` from an `EnvironmentPool` in which
one is waiting. Then the medians of five for a world of 100 MB in 2,000 files: `snapshot_ms`; `restore_ms`, opening an
environment from the snapshot with its first command; and `fork_8_ms`, from the call of `fork(8)` to a command in each
of the eight. The last line is the median of ten openings of a process sandbox with its first command, whose work
directory is an overlay of a folder of 50,000 files, of which 1,000 are hidden one by one. Options: `--backends process
docker` measures only these.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import anyio

from agentkit_environments import EnvironmentPool, EnvironmentSpec, available_backends, open_environment
from agentkit_environments.environment import Backend
from agentkit_environments.overlay import Overlay
from agentkit_environments.process import ProcessEnvironment

COMMANDS = 200
OPENINGS = 10
DIRECTORIES, FILES_EACH = 1_000, 50
FORKS, FORKINGS = 8, 5
WORLD_FILES, WORLD_FILE_BYTES = 2_000, 50_000
MAKE_WORLD = f"""
import os
for number in range({WORLD_FILES}):
    os.makedirs(f"d{{number % 40}}", exist_ok=True)
    with open(f"d{{number % 40}}/{{number}}", "wb") as file:
        file.write(os.urandom({WORLD_FILE_BYTES}))
"""


def percentiles(seconds: list[float], prefix: str = "") -> dict[str, float]:
    ordered = sorted(seconds)
    return {
        f"{prefix}p50_ms": round(1e3 * ordered[len(ordered) // 2], 2),
        f"{prefix}p99_ms": round(1e3 * ordered[int(len(ordered) * 0.99)], 2),
    }


def time_calls(call: Callable[[], object]) -> list[float]:
    seconds = []
    for _ in range(COMMANDS):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return seconds


def time_program(*argv: str) -> list[float]:
    return time_calls(lambda: subprocess.run(argv, capture_output=True, check=True))


async def measure_docker_exec() -> list[dict[str, object]]:
    from docker import DockerClient

    async with await open_environment(EnvironmentSpec(), backend="docker", run_id=f"benchmark-{os.getpid()}") as env:
        with contextlib.closing(DockerClient.from_env()) as client:
            (container,) = client.containers.list(filters={"label": f"agentkit.run={env.run_id}"})
            by_api = time_calls(lambda: container.exec_run(["true"], user="1000:1000"))
        by_command = time_program("docker", "exec", "--user", "1000:1000", str(container.id), "true")
    return [
        {"backend": "docker exec by API", **percentiles(by_api)},
        {"backend": "docker exec by command line", **percentiles(by_command)},
    ]


async def measure(backend: Backend) -> dict[str, object]:
    opening, first, closing, commands, over = [], [], [], [], []
    for _ in range(OPENINGS):
        start = time.perf_counter()
        env = await open_environment(EnvironmentSpec(), backend=backend)
        opened = time.perf_counter()
        await env.exec(["true"])
        ran = time.perf_counter()
        await env.close()
        opening.append(opened - start)
        first.append(ran - opened)
        closing.append(time.perf_counter() - ran)
    async with await open_environment(EnvironmentSpec(), backend=backend) as env:
        for _ in range(COMMANDS):
            start = time.perf_counter()
            result = await env.exec(["true"])
            commands.append(time.perf_counter() - start)
            over.append(commands[-1] - result.duration_s)
    return {
        "backend": backend,
        "open_ms": round(1e3 * statistics.median(opening), 1),
        "first_command_ms": round(1e3 * statistics.median(first), 1),
        "close_ms": round(1e3 * statistics.median(closing), 1),
        **percentiles(commands),
        **percentiles(over, "over_"),
    }


async def measure_pool(backend: Backend) -> dict[str, object]:
    """Time opening to the first command, in turn without and with a pool, which refills between the two."""
    cold, warm = [], []
    async with EnvironmentPool(1) as pool:
        for _ in range(OPENINGS):
            start = time.perf_counter()
            async with await open_environment(EnvironmentSpec(), backend=backend) as env:
                await env.exec(["true"])
                cold.append(time.perf_counter() - start)
            pool.expect(EnvironmentSpec(), backend=backend)
            await pool.ready()
            start = time.perf_counter()
            async with await pool.open(EnvironmentSpec(), backend=backend) as env:
                await env.exec(["true"])
                warm.append(time.perf_counter() - start)
    return {
        "backend": backend,
        "cold_ms": round(1e3 * statistics.median(cold), 1),
        "warm_ms": round(1e3 * statistics.median(warm), 1),
    }


async def measure_forks(backend: Backend) -> dict[str, object]:
    taking, restoring, forking = [], [], []
    async with await open_environment(EnvironmentSpec(), backend=backend) as env:
        await env.exec(["python3", "-c", MAKE_WORLD])
        for _ in range(FORKINGS):
            start = time.perf_counter()
            snapshot = await env.snapshot()
            taken = time.perf_counter()
            async with await env.reopen(snapshot) as restored:
                await restored.exec(["true"])
                restoring.append(time.perf_counter() - taken)
            taking.append(taken - start)
            start = time.perf_counter()
            async with env.fork(FORKS) as forks:
                async with anyio.create_task_group() as task_group:
                    for fork in forks:
                        task_group.start_soon(fork.exec, ["true"])
                forking.append(time.perf_counter() - start)
    return {
        "world_mb": WORLD_FILES * WORLD_FILE_BYTES // 10**6,
        "files": WORLD_FILES,
        "backend": backend,
        "snapshot_ms": round(1e3 * statistics.median(taking), 1),
        "restore_ms": round(1e3 * statistics.median(restoring), 1),
        f"fork_{FORKS}_ms": round(1e3 * statistics.median(forking), 1),
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
    backends: tuple[Backend, ...] = ("unsafe-local", "process", "docker")
    parser = argparse.ArgumentParser(prog="python -m agentkit_environments.benchmarks")
    parser.add_argument("--backends", nargs="+", choices=backends, default=backends)
    chosen: list[Backend] = parser.parse_args().backends
    print(json.dumps({"backend": "subprocess.run", **percentiles(time_program("true"))}), flush=True)
    reasons = available_backends()
    for backend in chosen:
        if reasons[backend] is None:
            print(json.dumps(anyio.run(measure, backend)), flush=True)
            print(json.dumps(anyio.run(measure_pool, backend)), flush=True)
            print(json.dumps(anyio.run(measure_forks, backend)), flush=True)
        else:
            print(json.dumps({"backend": backend, "skipped": reasons[backend]}), flush=True)
    if "docker" in chosen and reasons["docker"] is None:
        for line in anyio.run(measure_docker_exec):
            print(json.dumps(line), flush=True)
    if "process" in chosen and reasons["process"] is None:
        print(json.dumps(anyio.run(measure_overlay)), flush=True)


if __name__ == "__main__":
    main()
