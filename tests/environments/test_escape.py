"""Escape attempts of hostile commands in a process sandbox."""

from __future__ import annotations

import os
import secrets
import socket
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import TYPE_CHECKING

import anyio
import anyio.to_thread
import pytest

from agentkit_environments import Environment, EnvironmentSpec, SandboxUnavailableError, open_environment
from agentkit_environments.process import Launcher, ProcessEnvironment, launcher_failure

if TYPE_CHECKING:
    from tests.conftest import Tag

pytestmark = [pytest.mark.anyio, pytest.mark.sandbox]
PREFIX = os.path.realpath(sys.base_prefix)


@pytest.fixture(scope="module", params=["bwrap", "unshare", pytest.param("bwrap-plain", marks=pytest.mark.hostile)])
def launcher(request: pytest.FixtureRequest) -> Launcher:
    chosen: Launcher = request.param
    reason = launcher_failure(chosen)
    if reason is not None:
        pytest.skip(f"process-{chosen}: {reason}")
    return chosen


@pytest.fixture(scope="module")
async def env(launcher: Launcher, anyio_backend: str) -> AsyncIterator[Environment]:
    async with await ProcessEnvironment.open(EnvironmentSpec(), "escape", launcher=launcher) as environment:
        yield environment


async def python(env: Environment, code: str) -> str:
    """Run Python code in the sandbox; return its output, or the last line of its error."""
    result = await env.exec(["python3", "-c", code], timeout_s=60)
    return (result.stdout + result.stderr.strip().rpartition("\n")[2]).strip()


async def test_no_privilege_is_left(env: Environment) -> None:
    status = (await env.exec("cat /proc/self/status")).stdout
    fields = dict(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line)
    assert {fields[name] for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")} == {"0" * 16}
    assert fields["NoNewPrivs"] == "1"
    assert fields["Uid"].split() == ["1000"] * 4
    assert fields["Groups"].split() in ([], ["1000"], ["65534"])


async def test_the_system_is_read_only(env: Environment) -> None:
    for path in ("/usr/x", "/usr/bin/sh", "/etc/x", "/etc/passwd", "/opt/agentkit/confine.py", "/x", "/dev/x"):
        result = await env.exec(f"echo x > {path}")
        assert result.exit_code != 0, path
    assert (await env.exec(f"touch {PREFIX}/x || rm {PREFIX}/bin/python3")).exit_code != 0
    assert (await env.exec(["ls", f"{PREFIX}/x"])).exit_code != 0


@pytest.mark.parametrize(
    "command",
    [
        "mount -o remount,rw /usr",
        "mount -o remount,bind,rw /usr",
        "mount -o remount,rw /",
        "mount -t tmpfs none /tmp",
        "mount --bind /tmp /etc",
        "umount /usr",
        "umount -l /proc",
        "unshare -U true",
        "unshare -Urm mount -o remount,bind,rw /usr",
        "unshare -m true",
        "unshare -n true",
        "chroot / true",
        "mknod /tmp/disk b 254 0",
        "nsenter -t 1 -m true",
        "su -c true",
        "echo 1 > /proc/sys/user/max_user_namespaces",
        "echo 1 > /proc/sysrq-trigger",
        "echo core > /proc/sys/kernel/core_pattern",
    ],
)
async def test_a_privileged_operation_fails(env: Environment, command: str) -> None:
    result = await env.exec(command, timeout_s=10)
    assert result.exit_code != 0, result
    assert not result.timed_out
    assert result.exit_code == 127 or (await env.exec("touch /usr/x")).exit_code != 0


async def test_system_calls_that_escape_fail(env: Environment) -> None:
    code = """
import ctypes, errno
libc = ctypes.CDLL(None, use_errno=True)
def refused(name, *arguments):
    ctypes.set_errno(0)
    return getattr(libc, name)(*arguments) == -1 and ctypes.get_errno() in (errno.EPERM, errno.ENOSPC, errno.EINVAL)
print([name for name, *arguments in [
    ("mount", b"none", b"/usr", None, 32 | 4096, None), ("umount2", b"/usr", 2), ("pivot_root", b"/", b"/"),
    ("unshare", 0x10000000), ("unshare", 0x20000), ("unshare", 0x40000000), ("chroot", b"/"), ("setuid", 0),
    ("setgroups", 1, (ctypes.c_uint * 1)(0)), ("sethostname", b"x", 1), ("ptrace", 16, 1, 0, 0),
] if not refused(name, *arguments)])
"""
    assert await python(env, code) == "[]"


async def test_the_hosts_secrets_and_homes_are_not_there(env: Environment, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("secret")
    for path in (
        "/etc/shadow",
        "/etc/gshadow",
        "/etc/ssh",
        "/etc/sudoers",
        "/var/lib",
        "/run/docker.sock",
        str(secret),
    ):
        assert (await env.exec(["ls", path])).exit_code != 0, path
    names = (await env.exec("ls -A /")).stdout.split()
    prefix = PREFIX.split("/")
    allowed = {"bin", "dev", "etc", "lib", "lib32", "lib64", "libx32", "opt", "proc", "sbin", "tmp", "usr", "var"}
    assert set(names) <= allowed | {"workspace", prefix[1]}
    if prefix[1] in ("root", "home"):
        assert (await env.exec(["ls", "-A", f"/{prefix[1]}"])).stdout.split() == [prefix[2]]
    assert (await env.exec("cat /proc/*/environ | tr '\\0' '\\n' | grep -c ^PWD=/proc")).exit_code == 1
    assert (await env.exec("echo ~nobody; ls /home")).exit_code != 0


async def test_other_processes_are_out_of_sight_and_reach(env: Environment) -> None:
    pids = (await env.exec("ls /proc | grep -E '^[0-9]+$'")).stdout.split()
    assert len(pids) < 8
    assert (await env.exec(f"kill -9 {os.getpid()}")).exit_code != 0


async def test_the_executor_can_be_neither_killed_nor_impersonated(env: Environment) -> None:
    await env.exec("kill -9 1; kill -TERM 1; kill -INT 1; kill -STOP 1; kill -CHLD 1; kill -SEGV 1; kill -9 -1")
    await env.exec("for signal in $(seq 1 64); do kill -$signal 1; done")
    for path in ("/proc/1/mem", "/proc/1/environ", "/proc/1/fd/0", "/proc/1/fd/1", "/proc/1/fd/3", "/proc/1/fd/4"):
        assert (await env.exec(f"echo x > {path}")).exit_code != 0, path
        assert (await env.exec(f"head -c 1 {path}")).exit_code != 0, path
    assert (await env.exec("ls /proc/1/fd")).exit_code != 0
    code = "import os; print(sorted(os.readlink(f'/proc/self/fd/{fd}')[:4] for fd in os.listdir('/proc/self/fd')[:3]))"
    assert await python(env, code) == "['/dev', 'pipe', 'pipe']"
    assert (await env.exec("echo alive")).stdout == "alive\n"


async def test_there_is_no_network_but_loopback(env: Environment) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        code = f"import socket; socket.create_connection(('127.0.0.1', {port}), 5)"
        assert "ConnectionRefusedError" in await python(env, code)
    code = "import socket; socket.create_connection(('192.0.2.1', 80), 5)"
    assert "OSError" in await python(env, code)
    code = "import os; print(os.listdir('/sys/class/net') if os.path.exists('/sys') else open('/proc/net/dev').read())"
    assert (await python(env, code)).count(":") == 1
    code = """
import socket
server = socket.create_server(("127.0.0.1", 0))
socket.create_connection(server.getsockname())
print("connected")
"""
    assert await python(env, code) == "connected"


async def test_abstract_sockets_and_shared_memory_of_the_host_are_apart(env: Environment) -> None:
    name = f"agentkit-{secrets.token_hex(4)}"
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("\0" + name)
        server.listen()
        code = f"import socket; socket.socket(socket.AF_UNIX).connect('\\0{name}')"
        assert "ConnectionRefusedError" in await python(env, code)
    assert (await env.exec("ls -A /dev/shm")).stdout == ""


async def test_limits_bind_and_cannot_be_raised(env: Environment) -> None:
    code = """
import resource
for name in ("NPROC", "DATA", "AS", "FSIZE", "NOFILE", "CORE"):
    soft, hard = resource.getrlimit(getattr(resource, "RLIMIT_" + name))
    try:
        resource.setrlimit(getattr(resource, "RLIMIT_" + name), (hard + 1, hard + 1))
        print(name, "was raised")
    except (ValueError, PermissionError):
        pass
    if soft != hard or hard == resource.RLIM_INFINITY:
        print(name, soft, hard)
"""
    assert await python(env, code) == ""


async def test_a_fork_bomb_stays_inside_and_ends(env: Environment) -> None:
    await env.write_file("bomb.py", "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass\n")
    code = "import os, subprocess; subprocess.Popen(['python3', 'bomb.py'], start_new_session=True); os._exit(0)"
    await env.exec(["python3", "-c", code])
    with anyio.fail_after(30):
        assert (await env.exec(["true"], timeout_s=20)).exit_code in (0, 126)
        await env.kill_all()
        assert (await env.exec("echo alive")).stdout == "alive\n"


async def test_a_detached_process_does_not_outlive_the_sandbox(launcher: Launcher, tag: Tag) -> None:
    detach = "import os; os.fork() and os._exit(0); os.setsid(); os.execve('/usr/bin/sleep', ['sleep', '{}'], {{}})"
    async with await ProcessEnvironment.open(EnvironmentSpec(), "escape", launcher=launcher) as env:
        await env.exec(["python3", "-c", detach.format(tag.value)])
        await anyio.to_thread.run_sync(tag.wait, 1)
    assert tag.alive() == 0


async def test_opening_fails_without_any_sandbox(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("DOCKER_HOST", "unix:///nonexistent.sock")
    with pytest.raises(
        SandboxUnavailableError, match=r"bwrap is not installed; unshare is not installed\. Install bubblewrap"
    ):
        await open_environment(backend="auto")
    with pytest.raises(SandboxUnavailableError, match="docker backend"):
        await open_environment(EnvironmentSpec(image="debian:12"), backend="process")
