"""Nothing is left behind when the harness is interrupted or killed."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import anyio
import anyio.to_thread
import docker
import pytest

from agentkit_environments import EnvironmentSpec, SandboxLostError, SandboxUnavailableError, open_environment, reap

if TYPE_CHECKING:
    from tests.conftest import Tag, WaitUntil
    from tests.environments.conftest import Opener

HARNESS = """
import signal
import sys
import anyio
from agentkit_environments import EnvironmentSpec, open_environment
from agentkit_environments.process import ProcessEnvironment

async def main(backend, tag):
    if backend.startswith("process-"):
        opened = ProcessEnvironment.open(EnvironmentSpec(), tag, launcher=backend.removeprefix("process-"))
    else:
        opened = open_environment(backend=backend, run_id=tag)
    async with await opened as env:
        await env.exec(f"sleep {tag} >/dev/null 2>&1 & setsid sleep {tag} >/dev/null 2>&1 & ")
        print("ready", flush=True)
        await env.exec(f"sleep {tag}")

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs are born ignoring it
anyio.run(main, *sys.argv[1:])
"""


def start_harness(backend: str, tag: Tag) -> subprocess.Popen[str]:
    harness = subprocess.Popen(
        [sys.executable, "-c", HARNESS, backend, tag.value],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert harness.stdout is not None
    ready = harness.stdout.readline()
    if ready != "ready\n":
        raise AssertionError(harness.communicate()[1])
    return harness


def sleeping(tag: Tag) -> int:
    """Return the number of `sleep` with the tag; `setsid` has it for a moment, too, before it becomes one."""
    found = 0
    for pid in tag.pids():
        with contextlib.suppress(OSError):
            found += Path(f"/proc/{pid}/comm").read_text() == "sleep\n"
    return found


def containers(tag: Tag) -> int:
    client = docker.from_env()
    try:
        return len(client.api.containers(all=True, filters={"label": f"agentkit.run={tag.value}"}))
    finally:
        client.close()


def test_ctrl_c_leaves_nothing(backend: str, tag: Tag, wait_until: WaitUntil) -> None:
    harness = start_harness(backend, tag)
    wait_until(lambda: sleeping(tag) == 3, "the commands of the sandbox")
    harness.send_signal(signal.SIGINT)
    _, stderr = harness.communicate(timeout=30)
    assert "KeyboardInterrupt" in stderr
    assert harness.returncode != 0
    assert tag.alive() == 0
    if backend == "docker":
        wait_until(lambda: not containers(tag), "the engine to remove the container")


@pytest.mark.anyio
async def test_sigkill_leaves_nothing(backend: str, tag: Tag, wait_until: WaitUntil) -> None:
    harness = start_harness(backend, tag)
    wait_until(lambda: sleeping(tag) == 3, "the commands of the sandbox")
    harness.kill()
    harness.communicate(timeout=30)
    if backend == "unsafe-local":
        assert tag.alive() == 3  # only the next start reaps these
        assert await reap() >= 1
    tag.wait(0)
    if backend == "docker":
        wait_until(lambda: not containers(tag), "the engine to remove the container")


def kill_sandbox(backend: str, tag: Tag) -> None:
    """Kill the sandbox of run `tag` from outside: the container, or the executor that started `sleep <tag>`."""
    tag.wait(1)
    if backend == "docker":
        containers = f"$(docker ps -q --filter label=agentkit.run={tag.value})"
        subprocess.run(f"docker kill {containers}", shell=True, check=True, stdout=subprocess.DEVNULL)
        return
    pid = tag.pids()[0]
    while b"/opt/agentkit/confine.py" not in Path(f"/proc/{pid}/cmdline").read_bytes():
        pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    os.kill(pid, signal.SIGKILL)


@pytest.mark.anyio
async def test_a_sandbox_that_dies_is_an_error_and_never_a_result(backend: str, open_backend: Opener, tag: Tag) -> None:
    if backend == "unsafe-local":
        pytest.skip("unsafe-local has no sandbox that could die")
    raised: list[SandboxLostError] = []

    async def run() -> None:
        try:
            await env.exec(f"sleep {tag.value}")
        except SandboxLostError as error:
            raised.append(error)

    async with await open_backend(backend, EnvironmentSpec(), tag.value) as env:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(run)
            await anyio.to_thread.run_sync(kill_sandbox, backend, tag)
        assert raised
        with pytest.raises(SandboxLostError):
            await env.read_file("x")
    assert tag.alive() == 0


@pytest.mark.anyio
async def test_docker_not_running_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DOCKER_HOST", "unix:///nonexistent.sock")
    with pytest.raises(SandboxUnavailableError, match=r"no Docker engine answers.*dockerd"):
        await open_environment(backend="docker")
    assert await reap("no-such-run") == 0
