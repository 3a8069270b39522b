"""The benchmark sandboxes: opening, commands, snapshots and forks on every backend that works here.

A command is `true`; the part of its time that is not the command's own is beside `docker exec` in the same kind of
container, as a harness runs it that has no process of its own there. A world is a work directory of random files.
The environment variable AGENTKIT_MINI_SWE_AGENT_PYTHON names a Python with the package mini-swe-agent, whose Docker
environment is then measured too.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import anyio

from agentkit_engine.benchmarks.errors import OutputsDifferError
from agentkit_engine.benchmarks.record import Bound, Measurement
from agentkit_engine.benchmarks.timing import Median
from agentkit_environments import EnvironmentPool, EnvironmentSpec, available_backends, open_environment
from agentkit_environments.environment import Backend
from agentkit_environments.images.base import TAG
from agentkit_environments.overlay import Overlay
from agentkit_environments.process import ProcessEnvironment

NAME = "sandboxes"
BACKENDS: tuple[Backend, ...] = ("docker", "process", "unsafe-local")
MINI_SWE_AGENT_PYTHON = os.environ.get("AGENTKIT_MINI_SWE_AGENT_PYTHON", "")
MINI_SWE_AGENT = """
import json, sys, time
from minisweagent import __version__
from minisweagent.environments.docker import DockerEnvironment

def run(env):
    start = time.perf_counter()
    found = env.execute({"command": "true"})
    assert found["returncode"] == 0, found
    return 1000 * (time.perf_counter() - start)

openings = []
for _ in range(int(sys.argv[3])):
    start = time.perf_counter()
    env = DockerEnvironment(image=sys.argv[1], cwd="/tmp")
    run(env)
    openings.append(1000 * (time.perf_counter() - start))
commands = [run(env) for _ in range(int(sys.argv[2]))]
json.dump({"version": __version__, "openings": openings, "commands": commands}, sys.stdout)
"""
MAKE_WORLD = """
import os, sys
files, size = map(int, sys.argv[1:])
for number in range(files):
    os.makedirs(f"d{number % 40}", exist_ok=True)
    with open(f"d{number % 40}/{number}", "wb") as file:
        file.write(os.urandom(size))
"""


@dataclass(frozen=True, slots=True)
class Scale:
    """Number of commands, cancellations, openings, snapshots and forks; files of a world, and under an overlay."""

    commands: int
    cancellations: int
    openings: int
    snapshots: int
    forks: int
    files: int
    file_bytes: int
    overlaid: int

    @property
    def world(self) -> str:
        return f"a world of {self.files * self.file_bytes / 1e6:g} MB in {self.files:,} files"


def sandboxes(scale: Scale) -> Iterator[Measurement]:
    """Run sandboxes on the backends that work here."""
    works = [backend for backend in BACKENDS if available_backends()[backend] is None]
    exec_ms = anyio.run(_docker_exec, scale) if "docker" in works else None
    if exec_ms and MINI_SWE_AGENT_PYTHON:
        yield from _mini_swe_agent(scale)
    for backend in works:
        bare = anyio.run(_commands, backend, scale)
        isolated = backend != "unsafe-local"
        for share, peer, most in ((0.5, exec_ms and exec_ms[0], 2), (0.99, exec_ms and exec_ms[1], 10)):
            yield Measurement(
                NAME,
                f"{backend}: beyond the time of a command itself, p{100 * share:g} of {scale.commands}",
                round(_percentile(bare, share), 3),
                "ms",
                peer=None if peer is None else "the whole of `docker exec` by command line",
                peer_value=peer,
                higher_is_better=False,
                target=Bound("value", "<=", most) if isolated else None,
            )
        cold, warm = anyio.run(_openings, backend, scale)
        yield _median(f"{backend}: opening and the first command", cold, Bound("value", "<=", 1000))
        yield _median(f"{backend}: opening from a warm pool and the first command", warm)
        cancelled = anyio.run(_cancellations, backend, scale)
        yield Measurement(
            NAME,
            f"{backend}: from a cancellation to the last process dead, longest of {scale.cancellations}",
            round(max(cancelled), 2),
            "ms",
            target=Bound("value", "<=", 1000) if isolated else None,
            outputs="no process is left after any of them",
        )
        goal = Bound("value", "<=", 2500) if isolated else None
        for size in (replace(scale, files=scale.files // 100), scale):
            taking, restoring, forking = anyio.run(_forks, backend, size)
            yield _median(f"{backend}: snapshot of {size.world}", taking)
            yield _median(f"{backend}: restoring {size.world}, and the first command", restoring)
            what = f"{backend}: fork({size.forks}) of {size.world}, and a command in each"
            yield _median(what, forking, stretch=goal)
    if "process" in works:
        yield _median(f"process: opening over a folder of {scale.overlaid:,} files", anyio.run(_overlay, scale))


def _median(what: str, ms: Sequence[float], target: Bound | None = None, stretch: Bound | None = None) -> Measurement:
    found = Median.of(ms)
    return Measurement(NAME, what, round(found.value, 2), "ms", found.spread, target=target, stretch=stretch)


def _percentile(values: Sequence[float], share: float) -> float:
    return sorted(values)[int(len(values) * share)]


def _ms(start: float) -> float:
    return 1000 * (time.perf_counter() - start)


def _timed(call: Callable[[], object], count: int) -> list[float]:
    found = []
    for _ in range(count):
        start = time.perf_counter()
        call()
        found.append(_ms(start))
    return found


async def _docker_exec(scale: Scale) -> tuple[float, float]:
    """Return p50 and p99 of `docker exec` of `true`, in ms."""
    from docker import DockerClient

    async with await open_environment(EnvironmentSpec(), backend="docker", run_id=f"benchmark-{os.getpid()}") as env:
        with contextlib.closing(DockerClient.from_env()) as client:
            (container,) = client.containers.list(filters={"label": f"agentkit.run={env.run_id}"})
        argv = ["docker", "exec", "--user", "1000:1000", str(container.id), "true"]
        found = _timed(lambda: subprocess.run(argv, capture_output=True, check=True), scale.commands)
    return _percentile(found, 0.5), _percentile(found, 0.99)


def _mini_swe_agent(scale: Scale) -> Iterator[Measurement]:
    """Measure the Docker environment of mini-swe-agent, with its defaults and our base image."""
    argv = [MINI_SWE_AGENT_PYTHON, "-c", MINI_SWE_AGENT, TAG, str(scale.commands), str(scale.openings)]
    done = subprocess.run(argv, stdout=subprocess.PIPE, text=True, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    name = f"mini-swe-agent {found['version']} in Docker"
    for share in (0.5, 0.99):
        what = f"{name}: the whole of a command, p{100 * share:g} of {scale.commands}"
        yield Measurement(NAME, what, round(_percentile(found["commands"], share), 2), "ms")
    yield _median(f"{name}: opening and the first command", found["openings"])


async def _commands(backend: Backend, scale: Scale) -> list[float]:
    """Return the ms that each command took beyond its own time."""
    found = []
    async with await open_environment(EnvironmentSpec(), backend=backend) as env:
        for _ in range(scale.commands):
            start = time.perf_counter()
            result = await env.exec(["true"])
            found.append(_ms(start) - 1000 * result.duration_s)
    return found


async def _openings(backend: Backend, scale: Scale) -> tuple[list[float], list[float]]:
    """Return the ms from the call to the end of the first command, without a pool and, in turn, with one."""
    cold, warm = [], []
    async with EnvironmentPool(1) as pool:
        for _ in range(scale.openings):
            start = time.perf_counter()
            async with await open_environment(EnvironmentSpec(), backend=backend) as env:
                await env.exec(["true"])
                cold.append(_ms(start))
            pool.expect(EnvironmentSpec(), backend=backend)
            await pool.ready()
            start = time.perf_counter()
            async with await pool.open(EnvironmentSpec(), backend=backend) as env:
                await env.exec(["true"])
                warm.append(_ms(start))
    return cold, warm


async def _cancellations(backend: Backend, scale: Scale) -> list[float]:
    """Return the ms from the cancellation of a command, at a random moment, to the end of its last process.

    Among its processes are detached ones, and one that ignores signals.

    Raises:
        OutputsDifferError: If a process outlives a cancellation.
    """
    draw, found, sleep = random.Random(20), [], f"sleep {1_000_000 + os.getpid()}"
    tree = f"{sleep} & setsid {sleep} & ({sleep} & {sleep} &); trap '' TERM INT; {sleep}; {sleep}"
    async with await open_environment(EnvironmentSpec(), backend=backend) as env:
        for _ in range(scale.cancellations):
            with anyio.move_on_after(draw.uniform(0, 0.05)) as scope:
                await env.exec(tree)
            found.append(1000 * (anyio.current_time() - scope.deadline))
            if left := _count_processes(sleep.split()):
                raise OutputsDifferError(f"{left} processes have outlived the cancellation of their command")
    return found


def _count_processes(argv: Sequence[str]) -> int:
    """Return the number of living processes of this machine, in any sandbox, with these arguments."""
    cmdline, count = "\0".join([*argv, ""]).encode(), 0
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            count += path.read_bytes() == cmdline
    return count


async def _forks(backend: Backend, scale: Scale) -> tuple[list[float], list[float], list[float]]:
    """Return the ms of snapshots, of opening an environment from one, and of forks, each with its first command."""
    taking, restoring, forking = [], [], []
    async with await open_environment(EnvironmentSpec(), backend=backend) as env:
        await env.exec(["python3", "-c", MAKE_WORLD, str(scale.files), str(scale.file_bytes)])
        for _ in range(scale.snapshots):
            start = time.perf_counter()
            snapshot = await env.snapshot()
            taking.append(_ms(start))
            start = time.perf_counter()
            async with await env.reopen(snapshot) as restored:
                await restored.exec(["true"])
                restoring.append(_ms(start))
            start = time.perf_counter()
            async with env.fork(scale.forks) as forks:
                async with anyio.create_task_group() as task_group:
                    for fork in forks:
                        task_group.start_soon(fork.exec, ["true"])
                forking.append(_ms(start))
    return taking, restoring, forking


async def _overlay(scale: Scale) -> list[float]:
    """Return the ms of opening a process sandbox over a folder in which one file of 50 is hidden."""
    found = []
    with tempfile.TemporaryDirectory() as folder:
        _fill(folder, scale.overlaid)
        hidden = tuple(f"d{number % 30}/{number}/f0" for number in range(scale.overlaid // 50))
        for _ in range(scale.openings):
            start = time.perf_counter()
            over = Overlay(folder, hidden)
            async with await ProcessEnvironment.open(EnvironmentSpec(), "benchmark", overlay=over) as env:
                await env.exec(["true"])
                found.append(_ms(start))
    return found


def _fill(folder: str, count: int) -> None:
    for number in range(count):
        path = Path(folder, f"d{number // 50 % 30}", str(number // 50), f"f{number % 50}")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(bytes(1000))
