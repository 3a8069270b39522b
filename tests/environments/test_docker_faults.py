"""Hostile commands in a container: deadlines, cancellation and `kill_all` hold, and errors name the true cause."""

from __future__ import annotations

import io
import os
import re
import signal
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anyio
import anyio.to_thread
import pytest
import requests
from tests.engine_proxy import EngineProxy

from agentkit_environments import (
    Environment,
    EnvironmentSpec,
    HostFailureError,
    ResourceLimits,
    SandboxLostError,
    SnapshotError,
    UnsafeArchiveError,
    open_environment,
)
from agentkit_environments.archive import check_archive
from agentkit_environments.docker import DockerEnvironment, docker_failure
from agentkit_environments.docker.files import ATTEMPTS
from agentkit_environments.docker.loss import is_killed_for_host_memory

if TYPE_CHECKING:
    from tests.conftest import Tag

pytestmark = [pytest.mark.anyio, pytest.mark.docker]

SLACK_S = 8.0
"""Extra time for a busy machine. The faults under test took 30 to 70 s, or never ended."""

# A daemon of the commands' user that keeps signalling every other process of this user.
LOOP = """
import os, signal
if os.fork():
    os._exit(0)
os.setsid()
while True:
    try:
        os.kill(-1, signal.{signal})
    except OSError:
        pass
"""

# Starts processes up to the limit.
FILL = """
import os, time
while True:
    try:
        if not os.fork():
            time.sleep(100)
    except OSError:
        os._exit(0)
"""


@pytest.fixture(scope="module", autouse=True)
def _engine() -> None:
    reason = docker_failure()
    if reason is not None:
        pytest.skip(f"docker: {reason}")


@pytest.fixture
async def env() -> AsyncIterator[Environment]:
    async with await open_environment(
        EnvironmentSpec(limits=ResourceLimits(disk_mib=64)), backend="docker"
    ) as environment:
        yield environment


async def start_loop(env: Environment, name: str) -> None:
    await env.write_file("loop.py", LOOP.format(signal=name))
    await env.exec("exec python3 loop.py >/dev/null 2>&1", timeout_s=2)


@pytest.mark.parametrize(
    "command",
    [
        "yes",
        "yes >&2",
        "yes & yes >&2",
        "cat /dev/zero",
        "trap '' TERM INT PIPE; while :; do yes; done",
        'python3 -c \'import os\nwhile True: os.write(1, b"x" * 65536); os.write(2, b"y" * 65536)\'',
    ],
)
async def test_a_flood_past_the_deadline_leaves_the_container_usable(env: Environment, command: str) -> None:
    started = time.monotonic()
    result = await env.exec(command, timeout_s=1, max_output_bytes=1000)
    assert (result.timed_out, result.exit_code, result.truncated) == (True, 137, True)
    assert time.monotonic() - started < 1 + SLACK_S
    assert (await env.exec("echo usable")).stdout == "usable\n"


@pytest.mark.parametrize("command", ["kill -STOP $$", "sleep 100 & kill -STOP $! $$", "kill -STOP -1; kill -STOP $$"])
async def test_a_frozen_command_ends_at_its_deadline(env: Environment, command: str) -> None:
    started = time.monotonic()
    result = await env.exec(command, timeout_s=1)
    assert (result.timed_out, result.exit_code) == (True, 137)
    assert time.monotonic() - started < 1 + SLACK_S
    assert (await env.exec("echo usable")).stdout == "usable\n"


@pytest.mark.hostile
async def test_where_every_process_is_frozen_deadlines_and_cancellation_are_obeyed(env: Environment) -> None:
    await start_loop(env, "SIGSTOP")
    started = time.monotonic()
    result = await env.exec("echo frozen", timeout_s=1)
    assert result.timed_out or result.stdout == "frozen\n"
    assert time.monotonic() - started < 1 + SLACK_S

    await start_loop(env, "SIGSTOP")
    for blocked in (env.exec("sleep 100"), env.read_file("loop.py"), env.write_file("x", b"x" * 1_000_000)):
        started = time.monotonic()
        with anyio.move_on_after(0.5):
            await blocked
        assert time.monotonic() - started < 0.5 + SLACK_S
    await env.kill_all()
    assert (await env.exec("echo usable; ls")).stdout.startswith("usable\nloop.py\n")


async def test_a_timeout_does_not_kill_sibling_commands(env: Environment) -> None:
    results: dict[str, str] = {}

    async def sibling() -> None:
        results["sibling"] = (await env.exec("until [ -e go ]; do sleep 0.1; done; echo done", timeout_s=60)).stdout

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(sibling)
        assert (await env.exec("yes", timeout_s=1)).timed_out
        await env.write_file("go", "")
    assert results["sibling"] == "done\n"


@pytest.mark.parametrize("name", ["SIGKILL", "SIGSTOP", "SIGTERM"])
async def test_kill_all_ends_what_signals_everything(env: Environment, name: str, tag: Tag) -> None:
    await env.write_file("kept", "kept")
    await env.exec(f"(trap '' TERM; exec sleep {tag.value}) >/dev/null 2>&1 &")
    await start_loop(env, name)
    started = time.monotonic()
    await env.kill_all()
    assert time.monotonic() - started < SLACK_S
    assert tag.alive() == 0
    assert (await env.exec("cat kept; pgrep -c python3")).stdout == "kept0\n"


async def test_a_command_killed_by_another_command_has_a_result(env: Environment) -> None:
    await start_loop(env, "SIGKILL")
    for _ in range(3):
        result = await env.exec("sleep 0.5; echo survived", timeout_s=20)
        assert (result.exit_code == 137, result.timed_out, result.stdout) == (True, False, "")
    await env.kill_all()
    assert (await env.exec("echo usable")).stdout == "usable\n"


@pytest.mark.parametrize("user", ["0:0", None])
async def test_no_command_can_signal_or_read_the_executor(env: Environment, user: str | None) -> None:
    await env.exec("for n in $(seq 1 64); do kill -$n -1; done", user=user)
    every = "for p in /proc/[0-9]*; do for n in $(seq 1 64); do kill -$n ${p#/proc/}; done; done"
    await env.exec(every, user=user, timeout_s=20)
    found = await env.exec(
        "echo x > /proc/1/fd/0; cat /proc/1/fd/0 /proc/1/mem /proc/1/environ; readlink /proc/1/fd/0 /proc/1/exe",
        user=user,
        timeout_s=5,
    )
    assert (found.stdout, found.timed_out) == ("", False)
    trace = "import ctypes; c = ctypes.CDLL(None); print(c.ptrace(16, 1, 0, 0), c.ptrace(0x4206, 1, 0, 0))"
    assert (await env.exec(["python3", "-c", trace], user=user)).stdout == "-1 -1\n"
    assert (await env.exec("echo usable")).stdout == "usable\n"


async def test_a_process_without_the_cookie_ends_with_its_command(env: Environment, tag: Tag) -> None:
    """It has left the session and erased its environment: only its descent tells whose it is."""
    erased = f"setsid env -i /bin/sh -c 'sleep {tag.value} & sleep {tag.value} & wait' & sleep {tag.value}; wait"
    assert (await env.exec(erased, timeout_s=1)).timed_out
    assert tag.alive() == 0


async def test_a_signalling_sibling_does_not_protect_a_command(env: Environment, tag: Tag) -> None:
    await start_loop(env, "SIGCONT")
    started = time.monotonic()
    assert (await env.exec(f"setsid sleep {tag.value} & sleep {tag.value}", timeout_s=1)).timed_out
    assert time.monotonic() - started < 1 + SLACK_S
    assert tag.alive() == 0


async def test_thousands_of_commands_leave_nothing_behind(env: Environment) -> None:
    """Descriptors of the executor are counted as root, who may list them; processes by the shell alone, whose pipelines
    start their parts in any order. The executor may still have a pipe of the command that counts, so the lowest count
    of several is taken."""

    async def count() -> list[int]:
        command = "ls /proc/1/fd | wc -l; set -- /proc/[0-9]*; echo $#"
        return min([[*map(int, (await env.exec(command, user="0:0")).stdout.split())] for _ in range(10)])

    async def run(number: int) -> None:
        for _ in range(100):
            assert (await env.exec(["echo", str(number)], stdin="ignored")).stdout == f"{number}\n"

    before = await count()
    async with anyio.create_task_group() as tasks:
        for number in range(20):
            tasks.start_soon(run, number)
    assert await count() == before


async def test_full_volumes_leave_the_container_alive(env: Environment) -> None:
    filled = await env.exec(
        "for d in /workspace /tmp /dev/shm; do head -c 100M /dev/zero > $d/fill; done", timeout_s=60
    )
    assert filled.stderr.count("No space left") == 3
    assert (await env.exec("echo usable")).stdout == "usable\n"
    with pytest.raises(OSError, match="No space left"):
        await env.write_file("more", b"x" * 100_000)
    assert len(await env.read_file("/tmp/fill", max_bytes=1 << 27)) == 64 << 20
    await env.exec("rm fill /tmp/fill")
    await env.write_file("more", b"x" * 100_000)


async def test_full_volumes_and_a_hog_leave_the_container_alive() -> None:
    spec = EnvironmentSpec(limits=ResourceLimits(memory_mib=64, disk_mib=128))
    async with await open_environment(spec, backend="docker") as env:
        await env.exec("for d in /workspace /tmp /dev/shm; do head -c 200M /dev/zero > $d/fill; done", timeout_s=60)
        hog = await env.exec(["python3", "-c", "x = bytearray(512 << 20)"], timeout_s=60)
        assert hog.exit_code == 137
        assert (await env.exec("echo usable")).stdout == "usable\n"


async def test_memory_that_outlives_processes_ends_with_kill_all(env: Environment) -> None:
    code = (
        "import ctypes\nc = ctypes.CDLL(None)\n"
        "print(sum(c.shmget(0, 1 << 20, 0o1666) >= 0 for _ in range(50)))\n"
        "print(sum(c.msgget(0, 0o1666) >= 0 for _ in range(99)))"
    )
    assert (await env.exec(["python3", "-c", code])).stdout == "50\n16\n"
    await env.kill_all()
    assert (await env.exec("tail -n +2 /proc/sysvipc/shm")).stdout == ""


async def test_a_closed_work_directory_is_the_commands_failure(env: Environment) -> None:
    await env.write_file("file", "x")
    await env.exec("chmod 000 /workspace")
    result = await env.exec("echo never")
    assert (result.exit_code, result.stdout, result.timed_out) == (126, "", False)
    assert "OCI" not in result.stderr
    for refused in (env.read_file("file"), env.write_file("new", "x")):
        with pytest.raises(PermissionError):
            await refused
    assert (await env.exec("chmod 755 /workspace && echo again", cwd="/tmp")).stdout == "again\n"
    assert await env.read_file("file") == b"x"


async def test_a_command_that_finds_no_room_for_a_process_says_so() -> None:
    spec = EnvironmentSpec(limits=ResourceLimits(processes=20))
    async with await open_environment(spec, backend="docker") as env:
        await env.write_file("fill.py", FILL)
        await env.exec("exec python3 fill.py >/dev/null 2>&1", timeout_s=20)
        result = await env.exec("ls; echo never")
        # Either the executor or the shell hits the process limit.
        assert result.exit_code != 0 and result.stdout == "" and result.stderr
        await env.kill_all()
        assert (await env.exec("echo usable")).stdout == "usable\n"


async def test_an_archive_that_is_short_is_read_again(env: Environment, monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine ends an archive at a file that a command has made shorter meanwhile."""
    assert isinstance(env, DockerEnvironment)
    api = env._container.api
    whole, left = api.get, 0

    def get(url: str, **options: Any) -> requests.Response:
        nonlocal left
        response = whole(url, **options)
        if left > 0:
            left -= 1
            response.raw = io.BytesIO(response.raw.read(100_000, decode_content=True))
        return response

    monkeypatch.setattr(api, "get", get)
    await env.exec("head -c 300000 /dev/zero >big; echo text >small")
    left = ATTEMPTS - 1
    snapshot = await env.snapshot()
    async with await env.reopen(snapshot) as copy:
        assert (await copy.exec("stat -c %s big small")).stdout == "300000\n5\n"
    left = ATTEMPTS - 1
    exported = await env.export_dir(".")
    assert {member.name: member.size for member in check_archive(exported.data)} == {"big": 300_000, "small": 5}
    left = ATTEMPTS
    with pytest.raises(SnapshotError, match="unexpected end of data"):
        await env.snapshot()
    left = ATTEMPTS
    with pytest.raises(UnsafeArchiveError, match="unexpected end of data"):
        await env.export_dir(".")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can kill the executor, and only from outside")
async def test_a_container_whose_first_program_dies_is_lost_without_blame_on_the_host(
    env: Environment, tag: Tag
) -> None:
    raised: list[SandboxLostError] = []

    async def run() -> None:
        try:
            await env.exec(f"sleep {tag.value}")
        except SandboxLostError as error:
            raised.append(error)

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(run)
        await anyio.to_thread.run_sync(tag.wait, 1)
        label = f"$(docker ps -q --filter label=agentkit.run={env.run_id})"
        inspected = await anyio.run_process(f"docker inspect -f '{{{{.State.Pid}}}}' {label}")
        os.kill(int(inspected.stdout), signal.SIGKILL)
    with pytest.raises(SandboxLostError) as again:
        await env.exec("echo never")
    for error in (*raised, again.value):
        assert re.search(r"container \w+ has ended: its first program ended with exit code 137", str(error))
        assert not isinstance(error, HostFailureError)


async def test_a_container_killed_from_outside_is_the_hosts_failure(env: Environment) -> None:
    await anyio.run_process(f"docker kill $(docker ps -q --filter label=agentkit.run={env.run_id})")
    with pytest.raises(HostFailureError, match="was killed or removed through the Docker engine, from outside"):
        await env.exec("echo never")


async def test_a_command_in_flight_when_its_environment_is_closed_is_lost_without_blame(tag: Tag) -> None:
    errors: list[Exception] = []

    async def run() -> None:
        try:
            await opened.exec(f"sleep {tag.value}")
        except SandboxLostError as error:
            errors.append(error)

    async with anyio.create_task_group() as tasks:
        opened = await open_environment(backend="docker")
        tasks.start_soon(run)
        await anyio.to_thread.run_sync(tag.wait, 1)
        await opened.close()
    assert [type(error) for error in errors] == [SandboxLostError]
    assert "closed" in str(errors[0])


@pytest.fixture
def proxy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[EngineProxy]:
    proxy = EngineProxy(tmp_path / "engine", "/var/run/docker.sock")
    monkeypatch.setenv("DOCKER_HOST", f"unix://{tmp_path / 'engine'}")
    yield proxy
    proxy.close()


async def test_an_engine_that_is_gone_is_the_hosts_failure(proxy: EngineProxy) -> None:
    async with await open_environment(backend="docker") as env:
        assert (await env.exec("echo fine")).stdout == "fine\n"
        proxy.stop()
        for doomed in (env.exec("echo never"), env.kill_all(), env.read_file("x"), env.export_dir(".")):
            with pytest.raises(HostFailureError, match="the Docker engine does not answer"):
                await doomed


async def test_an_engine_lost_during_a_command_is_the_hosts_failure(proxy: EngineProxy, tag: Tag) -> None:
    raised: list[Exception] = []

    async def run() -> None:
        try:
            await opened.exec(f"sleep {tag.value}")
        except SandboxLostError as error:
            raised.append(error)

    async with await open_environment(backend="docker") as opened, anyio.create_task_group() as tasks:
        tasks.start_soon(run)
        await anyio.to_thread.run_sync(tag.wait, 1)
        await anyio.to_thread.run_sync(proxy.stop)
    assert [type(error) for error in raised] == [HostFailureError]


def test_the_kernels_log_tells_the_hosts_memory_from_the_containers(tmp_path: Path) -> None:
    container, log = "5f" * 32, tmp_path / "kmsg"
    line = "6,1,2,-;oom-kill:constraint=CONSTRAINT_{},nodemask=(null),cpuset=/,mems_allowed=0,{},task_memcg=/docker/{}"
    log.write_text(line.format("MEMCG", f"oom_memcg=/docker/{container}", container))
    assert not is_killed_for_host_memory(container, str(log))
    log.write_text(line.format("NONE", "global_oom", "6e" * 32))
    assert not is_killed_for_host_memory(container, str(log))
    log.write_text(line.format("NONE", "global_oom", container))
    assert is_killed_for_host_memory(container, str(log))
    assert not is_killed_for_host_memory(container, str(tmp_path / "missing"))
