"""Configuration of the container, as the engine reports it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import docker
import pytest

from agentkit_environments import EnvironmentSpec, ResourceLimits, SandboxUnavailableError, open_environment
from agentkit_environments.docker import docker_failure

pytestmark = [pytest.mark.anyio, pytest.mark.docker]


@pytest.fixture
def client() -> Iterator[docker.DockerClient]:
    reason = docker_failure()
    if reason is not None:
        pytest.skip(f"docker: {reason}")
    client = docker.from_env()
    yield client
    client.close()


def test_hardening_is_what_the_engine_applies(client: docker.DockerClient, anyio_backend: str) -> None:
    import anyio

    limits = ResourceLimits(memory_mib=100, processes=50, cpus=0.5, file_size_mib=10, open_files=64, disk_mib=20)

    async def inspect() -> tuple[Any, str]:
        async with await open_environment(EnvironmentSpec(limits=limits), backend="docker", run_id="inspect") as env:
            found = client.api.containers(filters={"label": "agentkit.run=inspect"})
            status = (await env.exec("cat /proc/self/status; touch /x; ls /sys/class/net")).stdout
            return client.api.inspect_container(found[0]["Id"]), status

    described, status = anyio.run(inspect)
    host, config = described["HostConfig"], described["Config"]
    assert host["CapDrop"] == ["ALL"]
    assert host["CapAdd"] == ["KILL"]  # for the keeper, which runs as root; not for commands, see below
    assert host["SecurityOpt"] == ["no-new-privileges:true"]
    assert host["NetworkMode"] == "none"
    assert host["ReadonlyRootfs"]
    assert host["Init"]
    assert host["AutoRemove"]
    assert not host["Privileged"]
    assert host["PidsLimit"] == 50
    assert host["Memory"] == host["MemorySwap"] == (100 + 2 * 20 + 64) << 20
    assert host["NanoCpus"] == 500_000_000
    assert {limit["Name"]: limit["Hard"] for limit in host["Ulimits"]} == {"nofile": 64, "fsize": 10 << 20, "core": 0}
    assert config["User"] == "0:0"
    assert set(config["Labels"]) >= {"agentkit.run", "agentkit.owner"}
    assert {mount["Destination"] for mount in described["Mounts"]} == {"/workspace", "/tmp"}
    fields = dict(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line)
    assert {fields[name] for name in ("CapInh", "CapPrm", "CapEff", "CapAmb")} == {"0" * 16}
    assert fields["CapBnd"] == f"{1 << 5:016x}"
    assert fields["NoNewPrivs"] == "1"
    assert fields["Seccomp"] == "2"
    assert fields["Uid"].split() == ["1000"] * 4
    assert status.splitlines()[-1] == "lo"


SYSTEM_CALLS = """
import ctypes, errno
libc = ctypes.CDLL(None, use_errno=True)
for name, *arguments in [
    ("mount", b"none", b"/tmp", b"tmpfs", 0, None), ("unshare", 0x10000000), ("setns", 0, 0), ("chroot", b"/"),
    ("ptrace", 16, 1, 0, 0), ("fanotify_init", 0, 0), ("swapon", b"x", 0), ("reboot", 0), ("acct", b"/tmp/x"),
    ("init_module", None, 0, b""), ("open_by_handle_at", 0, None, 0), ("process_vm_readv", 1, None, 0, None, 0, 0),
]:
    ctypes.set_errno(0)
    if getattr(libc, name)(*arguments) != -1 or ctypes.get_errno() not in (errno.EPERM, errno.ENOSYS):
        print(name, ctypes.get_errno())
numbers = {"x86_64": (248, 249, 250, 321, 298, 323), "aarch64": (217, 218, 219, 280, 241, 282)}
for number in numbers[__import__("platform").machine()]:  # add_key, request_key, keyctl, bpf, perf, userfaultfd
    ctypes.set_errno(0)
    if libc.syscall(number, 0, 0, 0, 0, 0) != -1 or ctypes.get_errno() not in (errno.EPERM, errno.ENOSYS):
        print(number, ctypes.get_errno())
"""


async def test_the_engine_filters_system_calls(client: docker.DockerClient) -> None:
    async with await open_environment(backend="docker") as env:
        result = await env.exec(["python3", "-c", SYSTEM_CALLS])
    assert (result.stdout, result.stderr) == ("", "")


async def test_containers_and_volumes_are_gone_after_close(client: docker.DockerClient) -> None:
    volumes = {volume.name for volume in client.volumes.list()}
    async with await open_environment(backend="docker", run_id="gone") as env:
        await env.exec("true")
        assert len({volume.name for volume in client.volumes.list()} - volumes) == 2
    assert client.api.containers(all=True, filters={"label": "agentkit.run=gone"}) == []
    assert {volume.name for volume in client.volumes.list()} <= volumes


async def test_an_image_that_cannot_be_pulled_is_named(client: docker.DockerClient) -> None:
    with pytest.raises(SandboxUnavailableError, match="localhost:1/no/such:image"):
        await open_environment(EnvironmentSpec(image="localhost:1/no/such:image"), backend="docker")
