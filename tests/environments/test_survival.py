"""Attacks on a process sandbox's executor, memory and shared resources: commands fail as values, the executor
survives."""

from __future__ import annotations

import ctypes
import errno
import json
import os
import signal
import sys
import time
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import anyio
import anyio.to_thread
import pytest

from agentkit_environments import (
    Environment,
    EnvironmentSpec,
    HostFailureError,
    ResourceLimits,
    SandboxLostError,
    open_environment,
)
from agentkit_environments import cgroups as cgroups_module
from agentkit_environments.cgroups import PREFIX, CommandGroup, hierarchies
from agentkit_environments.process import Launcher, ProcessEnvironment, launcher_failure

if TYPE_CHECKING:
    from tests.conftest import Tag, WaitUntil

pytestmark = [pytest.mark.anyio, pytest.mark.sandbox]
SMALL = EnvironmentSpec(limits=ResourceLimits(memory_mib=128, disk_mib=64))
MIB = 1 << 20


@pytest.fixture(scope="module", params=["bwrap", "unshare", pytest.param("bwrap-plain", marks=pytest.mark.hostile)])
def launcher(request: pytest.FixtureRequest) -> Launcher:
    chosen: Launcher = request.param
    reason = launcher_failure(chosen)
    if reason is not None:
        pytest.skip(f"process-{chosen}: {reason}")
    return chosen


@pytest.fixture(scope="module", params=["cgroup", "no-cgroup"])
def has_cgroup(request: pytest.FixtureRequest) -> bool:
    if request.param == "cgroup":
        group = CommandGroup.create(ResourceLimits())
        bounds_memory = group.bounds_memory
        group.remove()
        if not bounds_memory:
            pytest.skip("not applicable: no memory cgroup can be made here")
    return bool(request.param == "cgroup")


@pytest.fixture(scope="module")
async def env(launcher: Launcher, anyio_backend: str) -> AsyncIterator[Environment]:
    async with await ProcessEnvironment.open(EnvironmentSpec(), "survival", launcher=launcher) as environment:
        yield environment


@pytest.fixture
async def small(launcher: Launcher, has_cgroup: bool, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Environment]:
    if not has_cgroup:
        monkeypatch.setattr(cgroups_module, "hierarchies", list)
    async with await ProcessEnvironment.open(SMALL, "survival", launcher=launcher) as environment:
        yield environment


async def python(env: Environment, code: str, timeout_s: float = 60) -> str:
    """Run Python code in the sandbox; return its output, or the last line of its error."""
    result = await env.exec(["python3", "-c", code], timeout_s=timeout_s)
    return (result.stdout + result.stderr.strip().rpartition("\n")[2]).strip()


async def is_alive(env: Environment) -> bool:
    return (await env.exec("echo alive", timeout_s=30)).stdout == "alive\n"


LOOP = """
import os, signal
if os.fork(): os._exit(0)
os.setsid()
for fd in range(3): os.close(fd)
while True:
    try: os.kill(-1, signal.{})
    except OSError: pass
"""


async def test_a_loop_that_stops_everything_affects_only_commands(env: Environment) -> None:
    await python(env, LOOP.format("SIGSTOP"))
    for _ in range(2):
        started = time.monotonic()
        result = await env.exec("echo out", timeout_s=1)
        assert (result.exit_code, result.timed_out) in ((137, True), (0, False))
        assert time.monotonic() - started < 8
    await env.write_file("kept", "kept")
    assert await env.read_file("kept") == b"kept"
    started = time.monotonic()
    with anyio.move_on_after(0.2):
        await env.exec("sleep 100")
    assert time.monotonic() - started < 5
    await env.kill_all()
    assert await is_alive(env)


@pytest.mark.hostile
async def test_a_command_that_is_stopped_before_its_program_runs_is_killed_without_a_deadline(env: Environment) -> None:
    await python(env, LOOP.format("SIGSTOP"))
    with anyio.fail_after(60):
        # A command that reaches its program first is stopped too, and has no deadline: it ends with this scope.
        while True:
            with anyio.move_on_after(20):
                result = await env.exec("sleep 0.1")
                if result.exit_code == 137:
                    break
    assert "stopped this command before its program ran" in result.stderr
    assert 0 < result.duration_s < 60
    await env.kill_all()
    assert await is_alive(env)


async def test_a_loop_that_kills_everything_affects_only_commands(env: Environment) -> None:
    await python(env, LOOP.format("SIGKILL"))
    for _ in range(5):
        assert (await env.exec("echo out", timeout_s=20)).exit_code in (0, 137)
    await env.write_file("kept", "kept")
    assert await env.read_file("kept") == b"kept"
    await env.kill_all()
    assert await is_alive(env)


@pytest.mark.parametrize("number", ["STOP", "KILL", "TERM", "INT", "HUP"])
async def test_a_signal_to_everything_does_not_reach_the_next_command(env: Environment, number: str) -> None:
    await env.exec(f"kill -{number} -1", timeout_s=10)
    await env.kill_all()
    assert await is_alive(env)


async def test_a_work_directory_without_permissions(env: Environment) -> None:
    await env.exec("mkdir -p closed/inside; chmod 000 closed .")
    for cwd, name in ((None, "/workspace"), ("closed/inside", "/workspace/closed/inside")):
        result = await env.exec("true", cwd=cwd)
        assert (result.exit_code, result.stderr) == (126, f"cannot start in {name}: Permission denied\n")
    assert (await env.exec("chmod 755 /workspace; chmod 755 /workspace/closed", cwd="/")).exit_code == 0
    assert await is_alive(env)
    with pytest.raises(FileNotFoundError):
        await env.exec("true", cwd="missing")


async def test_dates_beyond_the_range_of_archives(env: Environment) -> None:
    for moment in ("@9223372036854775807", "@-9223372036854775808", "@99999999999"):
        await env.exec(f"mkdir -p dates; touch -d {moment} dates/file")
        with suppress(OSError):
            await env.export_dir("dates")
        assert await is_alive(env)


async def test_arguments_that_no_kernel_accepts(env: Environment) -> None:
    for size in (200_000, 3_000_000, 20_000_000):
        result = await env.exec(["echo", "x" * size])
        assert (result.exit_code, result.stderr) == (126, "echo: cannot execute: Argument list too long\n")
    with pytest.raises(OSError, match="too long"):
        await env.read_file("x" * 20_000_000)
    with pytest.raises(OSError, match="too long"):
        await env.read_file("d/" * 3000)
    assert await is_alive(env)


async def test_deep_directories(env: Environment) -> None:
    await python(env, "import os\nfor name in ['deep'] + ['d' * 100] * 300: os.mkdir(name); os.chdir(name)")
    with suppress(Exception):
        await env.export_dir("deep")
    assert await is_alive(env)


BOMB = """
import os
if os.fork(): os._exit(0)
os.setsid()
while True:
    try: os.fork()
    except OSError: pass
"""


async def test_a_fork_bomb_leaves_room_for_the_next_command(launcher: Launcher) -> None:
    spec = EnvironmentSpec(limits=ResourceLimits(processes=32))
    async with await ProcessEnvironment.open(spec, "bomb", launcher=launcher) as env:
        await env.exec(["python3", "-c", BOMB], timeout_s=2)
        for _ in range(3):
            assert (await env.exec(["true"], timeout_s=20)).exit_code in (0, 126)
        await env.kill_all()
        assert await is_alive(env)


STARVE = """
import ctypes, os, resource, signal
libc = ctypes.CDLL(None, use_errno=True)
limits = [getattr(resource, name) for name in dir(resource) if name.startswith("RLIMIT_")]
attempts = [
    *[lambda number=number: resource.prlimit(1, number, (0, 0)) for number in limits],
    lambda: os.setpriority(os.PRIO_PROCESS, 1, 19),
    lambda: os.setpriority(os.PRIO_PGRP, 1, 19),
    lambda: os.setpriority(os.PRIO_USER, 0, 19),
    lambda: os.setpriority(os.PRIO_USER, os.getuid(), 19),
    lambda: os.sched_setaffinity(1, [0]),
    lambda: os.sched_setscheduler(1, os.SCHED_IDLE, os.sched_param(0)),
    lambda: os.sched_setscheduler(1, os.SCHED_BATCH, os.sched_param(0)),
    lambda: os.sched_setparam(1, os.sched_param(0)),
]
for attempt in attempts:
    try:
        attempt()
        print("it worked:", attempts.index(attempt))
    except PermissionError:
        pass
os.sched_setaffinity(0, os.sched_getaffinity(0)); os.nice(1); resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
"""


async def test_the_executor_cannot_be_starved_of_time_or_descriptors(env: Environment) -> None:
    assert await python(env, STARVE) == ""
    assert await is_alive(env)


async def test_proc_cannot_change_the_executors_settings(env: Environment) -> None:
    for path in ("/proc/1/timerslack_ns", "/proc/self/timerslack_ns", "/proc/self/comm", "/proc/self/oom_score_adj"):
        with pytest.raises(OSError, match=r"Permission denied|Read-only"):
            await env.write_file(path, "999")
    await env.exec("ln -s /proc/1/timerslack_ns slack")
    with pytest.raises(OSError, match=r"Permission denied|Read-only"):
        await env.write_file("slack", "999")


async def test_the_limits_of_the_next_command_can_be_lowered_but_it_fails_as_a_value(env: Environment) -> None:
    code = """
import os, resource
for name in os.listdir("/proc"):
    if name.isdecimal() and name not in ("1", str(os.getpid())):
        resource.prlimit(int(name), resource.RLIMIT_NOFILE, (4, 4))
"""
    await python(env, code)
    assert (await env.exec("true")).exit_code in (0, 126)
    assert await is_alive(env)


async def test_a_flood_of_signals_does_not_keep_the_executor_busy(env: Environment) -> None:
    flood = "import os, signal\nwhile True:\n    for number in (17, 2): os.kill(1, number)"
    async with anyio.create_task_group() as tasks:
        for _ in range(3):
            tasks.start_soon(env.exec, ["python3", "-c", flood])
        for _ in range(5):
            assert await is_alive(env)
        tasks.cancel_scope.cancel()
    assert await is_alive(env)


# Memory


MEMFD = """
import os
written = 0
try:
    while written < 1 << 30:
        fd = os.memfd_create("x")
        for _ in range(4):
            written += os.write(fd, bytes(1 << 22))
        print(written >> 20, flush=True)
except OSError as error:
    print("refused")
"""
SHARED = """
import ctypes, os
libc = ctypes.CDLL(None); libc.shmat.restype = ctypes.c_void_p
total, kept = 0, []
while total < 1 << 30:
    key = libc.shmget(0, 16 << 20, 0o1600)
    place = libc.shmat(key, None, 0) if key >= 0 else 2**64 - 1
    if place == 2**64 - 1: break
    ctypes.memset(place, 1, 16 << 20); total += 16 << 20
    print(total >> 20, flush=True)
"""
MESSAGES = """
import ctypes
libc = ctypes.CDLL(None)
total, message = 0, ctypes.create_string_buffer(bytes([1] * 8) + bytes(8192))
while total < 1 << 30:
    queue = libc.msgget(0, 0o1600)
    if queue < 0: break
    while libc.msgsnd(queue, message, 8192, 0o4000) == 0: total += 8192
    print(total >> 20, flush=True)
"""
EMPTY_FILES = """
import os
made = 0
for directory in ("/tmp", "/workspace", "/dev/shm"):
    try:
        for number in range(100_000):
            os.mknod(f"{directory}/{number}"); made += 1
            if made % 1000 == 0: print(made // 1000, flush=True)
    except OSError: pass
"""


@pytest.mark.parametrize(
    ("code", "most"),
    [(MEMFD, 128), (SHARED, 128), (MESSAGES, 128), (EMPTY_FILES, 140)],
    ids=["memfd", "shared", "messages", "files"],
)
async def test_memory_that_belongs_to_no_process_is_bounded(
    small: Environment, launcher: Launcher, has_cgroup: bool, code: str, most: int
) -> None:
    """Sizes are in MiB; empty files in thousands, at about 1 KiB each."""
    if (launcher, has_cgroup, code) == ("bwrap-plain", False, EMPTY_FILES):
        pytest.skip("not applicable: bubblewrap cannot bound the number of files")
    result = await small.exec(["python3", "-c", code], timeout_s=120)
    assert not result.timed_out
    numbers = [int(line) for line in result.stdout.split() if line.isdecimal()]
    assert max(numbers, default=0) <= most
    assert await small.read_file("/etc/passwd")


async def test_shared_memory_ends_with_its_last_process(small: Environment, launcher: Launcher) -> None:
    if launcher != "bwrap":
        pytest.skip("not applicable: only bubblewrap's IPC namespace lets us set it")
    await small.exec(["python3", "-c", SHARED], timeout_s=60)
    assert len((await small.exec("cat /proc/sysvipc/shm")).stdout.splitlines()) == 1


HOG = """
import os, time
for _ in range(6):
    if os.fork() == 0:
        data = bytearray(60 << 20); data[::4096] = b"x" * len(data[::4096])
        time.sleep(60)
print([os.waitstatus_to_exitcode(os.wait()[1]) for _ in range(3)])
"""


async def test_commands_that_use_too_much_memory_together_are_killed(launcher: Launcher, has_cgroup: bool) -> None:
    if not has_cgroup:
        pytest.skip("not applicable: without a cgroup memory is bounded for each process only")
    async with await ProcessEnvironment.open(SMALL, "hog", launcher=launcher) as env:
        assert await python(env, HOG) == "[-9, -9, -9]"
        await env.kill_all()
        files = "head -c 60M /dev/zero > f; head -c 50M /dev/zero > /tmp/f"
        alone = await env.exec(f"{files}; exec python3 -c 'b\"x\" * (60 << 20)'")
        assert alone.exit_code == 137
        assert "128 MiB of memory" in alone.stderr
        result = await env.exec("for file in a /tmp/a /dev/shm/a; do head -c 60M /dev/zero > $file; done")
        assert result.exit_code in (1, 137)
        with suppress(OSError):
            await env.write_file("more", bytes(8 << 20))  # the executor's own memory does not count as the commands'
        assert len(await env.read_file("a", max_bytes=64 << 20)) > 0
        assert (await env.exec("true")).exit_code in (0, 126, 137)


async def test_cpu_time_is_bounded(launcher: Launcher, has_cgroup: bool) -> None:
    if not has_cgroup or not any("cpu" in h.controllers for h in hierarchies() if os.access(h.parent, os.W_OK)):
        pytest.skip("not applicable: no cpu cgroup can be made here")
    spec = EnvironmentSpec(limits=ResourceLimits(cpus=0.2))
    async with await ProcessEnvironment.open(spec, "cpu", launcher=launcher) as env:
        code = "import os, time\nend = time.time() + 1.5\nwhile time.time() < end: pass\nprint(sum(os.times()[:2]))"
        assert float(await python(env, code)) < 0.9


async def test_groups_are_gone_with_the_sandbox_and_with_a_killed_harness(
    launcher: Launcher, has_cgroup: bool, wait_until: WaitUntil
) -> None:
    if not has_cgroup:
        pytest.skip("not applicable: no cgroup")
    parents = {h.parent for h in hierarchies()}

    def groups(pid: int) -> list[Path]:
        return [path for parent in parents for path in parent.glob(f"{PREFIX}*~{pid}~*")]

    before = groups(os.getpid())
    async with await ProcessEnvironment.open(SMALL, "groups", launcher=launcher):
        assert len(groups(os.getpid())) > len(before)
    assert groups(os.getpid()) == before
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:  # a harness that is killed before it can clean up
        group = CommandGroup.create(ResourceLimits())
        os.write(writing, b"x")
        signal.pause()
        del group
    os.read(reading, 1)
    os.close(reading)
    os.close(writing)
    assert groups(pid)
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: os.waitpid(pid, os.WNOHANG)[0] == pid, "the harness to die")
    async with await ProcessEnvironment.open(SMALL, "groups", launcher=launcher):
        assert not groups(pid)


async def test_inotify_instances_are_bounded(env: Environment) -> None:
    code = "import ctypes; libc = ctypes.CDLL(None); print(sum(libc.inotify_init() >= 0 for _ in range(200)))"
    assert int(await python(env, code)) <= 16


async def test_the_limits_of_the_namespaces_cannot_be_changed_back(env: Environment, launcher: Launcher) -> None:
    if launcher == "bwrap-plain":
        pytest.skip("not applicable: there are none")
    for name in ("user/max_inotify_instances", "user/max_user_namespaces", "kernel/shmall", "kernel/shm_rmid_forced"):
        assert (await env.exec(f"cat /proc/sys/{name} > /proc/sys/{name}")).exit_code != 0, name


# Losing the sandbox


async def kill_executor(env: ProcessEnvironment, tag: Tag) -> SandboxLostError:
    """Kill the executor from outside while a command runs; return the error that the command's caller gets."""
    raised: list[SandboxLostError] = []

    async def run() -> None:
        try:
            await env.exec(f"sleep {tag.value}")
        except SandboxLostError as error:
            raised.append(error)

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(run)
        await anyio.to_thread.run_sync(tag.wait, 1)
        os.kill(executor_of(tag.pids()[0]), signal.SIGKILL)
    return raised[0]


def executor_of(pid: int) -> int:
    """Return the executor that is an ancestor of a command's process."""
    while b"/opt/agentkit/confine.py" not in Path(f"/proc/{pid}/cmdline").read_bytes():
        pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    return pid


@pytest.mark.parametrize("kills", [0, 1])
async def test_only_the_hosts_own_counter_blames_the_host(
    launcher: Launcher, tag: Tag, tmp_path: Path, kills: int
) -> None:
    events = tmp_path / "memory.events.local"
    events.write_text("oom_kill 5\n")
    async with await ProcessEnvironment.open(EnvironmentSpec(), "lost", launcher=launcher) as env:
        env._group._own_events, env._group._kills_before = events, 5
        events.write_text(f"oom_kill {5 + kills}\n")
        error = await kill_executor(env, tag)
        assert isinstance(error, HostFailureError) == bool(kills)
        assert ("host ran out of memory" in str(error)) == bool(kills)
        with pytest.raises(HostFailureError if kills else SandboxLostError):
            await env.read_file("x")


# Keys and system calls


KEYCTL = {"x86_64": 250, "aarch64": 219}[os.uname().machine]


async def test_the_harness_keys_are_hidden(launcher: Launcher, tag: Tag) -> None:
    add_key = {"x86_64": 248, "aarch64": 217}[os.uname().machine]
    session_keyring = -3
    name = f"secret-{tag.value}".encode()
    key = ctypes.CDLL(None, use_errno=True).syscall(add_key, b"user", name, b"secret", 6, session_keyring)
    if key < 0:
        pytest.skip("not applicable: this machine has no keyrings")
    try:
        async with await ProcessEnvironment.open(EnvironmentSpec(), "keys", launcher=launcher) as env:
            assert (await env.exec("cat /proc/keys /proc/key-users")).stdout == ""
            code = f"import ctypes; print(ctypes.CDLL(None).syscall({add_key}, b'user', b'x', b'x', 1, -3))"
            assert await python(env, code) == "-1"
        # `enter.py` always leaves the session keyring. This test runs it without the filter, which would forbid
        # looking.
        enter = Path(cgroups_module.__file__).with_name("enter.py")
        search = f"import ctypes; print(ctypes.CDLL(None).syscall({KEYCTL}, 10, -3, b'user', {name!r}, 0))"
        for prefix, found in (([sys.executable, str(enter), str(os.getpid()), "-", "", "-"], False), ([], True)):
            command = [*prefix, sys.executable, "-c", search]
            said = await anyio.run_process(command)
            assert (int(said.stdout) == key) == found
    finally:
        revoke = 3
        ctypes.CDLL(None).syscall(KEYCTL, revoke, key)


CALLS = """
import ctypes, json, os, socket, sys
libc = ctypes.CDLL(None, use_errno=True)
numbers, families = json.loads(sys.argv[1])
done = {}
for name, number in numbers.items():
    ctypes.set_errno(0)
    done[name] = [libc.syscall(number, *[ctypes.c_long(0)] * 6), ctypes.get_errno()]
for family, kind, protocol in families:
    try:
        socket.socket(family, kind, protocol)
        done[f"{family},{kind},{protocol}"] = [0, 0]
    except OSError as error:
        done[f"{family},{kind},{protocol}"] = [-1, error.errno]
print(json.dumps(done))
"""


async def test_forbidden_system_calls_fail(env: Environment) -> None:
    from agentkit_environments.seccomp import FORBIDDEN, MISSING

    column = ("x86_64", "aarch64").index(os.uname().machine)
    eperm = {name: numbers[column] for name, numbers in FORBIDDEN.items() if numbers[column] is not None}
    enosys = {name: numbers[column] for name, numbers in MISSING.items()} | {"new": 463, "newest": 1000}
    enosys |= {"x32 getpid": 0x40000000 + 39} if column == 0 else {}
    # VSOCK, ALG, PACKET, CAN, TIPC, XDP, SMC; SCTP, MPTCP and DCCP; netfilter over netlink
    families = [[family, 1, 0] for family in (40, 38, 17, 29, 30, 44, 43)]
    families += [[2, 1, 132], [2, 1, 262], [2, 6, 33], [16, 3, 12]]
    argument = json.dumps([{**eperm, **enosys}, families])
    result = await env.exec(["python3", "-c", CALLS, argument])
    done = json.loads(result.stdout)
    assert {name for name in eperm if done[name] != [-1, errno.EPERM]} == set()
    assert {name for name in enosys if done[name] != [-1, errno.ENOSYS]} == set()
    refused = {errno.EAFNOSUPPORT, errno.ESOCKTNOSUPPORT, errno.EPROTONOSUPPORT}
    assert {key for key in done if "," in key and done[key][1] not in refused} == set()


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="int 0x80 is of x86")
async def test_calls_through_the_32_bit_entry_fail(env: Environment) -> None:
    code = """
import ctypes, mmap
page = mmap.mmap(-1, 4096, prot=7)
page.write(bytes.fromhex("b814000000cd80c3"))  # mov eax, 20 (getpid); int 0x80; ret
function = ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(page)))
print(function())
"""
    assert await python(env, code) == str(-errno.ENOSYS)


ORDINARY = """
import asyncio, concurrent.futures, ctypes, fcntl, multiprocessing, os, select, signal, socket, sqlite3, subprocess
import tempfile, threading, mmap

async def talk():
    async def serve(reader, writer):
        writer.write(await reader.readline()); writer.close()
    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
    writer.write(b"line\\n")
    assert await reader.readline() == b"line\\n"
    process = await asyncio.create_subprocess_exec("echo", "x", stdout=subprocess.PIPE)
    assert (await process.communicate())[0] == b"x\\n"
    writer.close(); server.close()

if __name__ == "__main__":
    asyncio.run(talk())
    with concurrent.futures.ThreadPoolExecutor(8) as pool: assert sum(pool.map(int, "123")) == 6
    with multiprocessing.Pool(2) as pool: assert pool.map(abs, [-1, -2]) == [1, 2]
    lock = multiprocessing.Lock()
    with lock: pass
    sqlite3.connect("x.db").execute("create table t (a)")
    a, b = socket.socketpair(); a.send(b"x"); assert b.recv(1) == b"x"
    assert socket.if_nameindex() == [(1, "lo")]
    assert socket.getaddrinfo("localhost", 80)
    select.epoll().close()
    pidfd = os.pidfd_open(os.getpid()); os.close(pidfd)
    with tempfile.TemporaryFile() as file: fcntl.flock(file, fcntl.LOCK_EX)
    mmap.mmap(-1, 4096).close()
    master, slave = os.openpty()
    assert subprocess.run("seq 3 | sort -r | head -1", shell=True, capture_output=True).stdout == b"3\\n"
    print("fine")
"""


async def test_ordinary_programs_work(env: Environment) -> None:
    await env.write_file("ordinary.py", ORDINARY)
    result = await env.exec(["python3", "ordinary.py"], timeout_s=60)
    assert result.stdout == "fine\n", result.stderr
    assert (await env.exec("yes | head -1; ls -la / >/dev/null; timeout 5 sort ordinary.py >/dev/null")).exit_code == 0


async def test_the_process_backend_opens_here() -> None:
    async with await open_environment(backend="process") as env:
        assert await is_alive(env)
