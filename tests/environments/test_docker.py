"""Configuration of the container, as the engine reports it."""

from __future__ import annotations

import io
import secrets
import tarfile
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import docker
import pytest

from agentkit_environments import EnvironmentSpec, ResourceLimits, SandboxUnavailableError, open_environment
from agentkit_environments.docker import docker_failure
from agentkit_environments.docker.engine import BASE_IMAGE

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
            status = (await env.exec("cat /proc/self/status; touch /x; ulimit -n; ls /sys/class/net")).stdout
            return client.api.inspect_container(found[0]["Id"]), status

    described, status = anyio.run(inspect)
    host, config = described["HostConfig"], described["Config"]
    assert host["CapDrop"] == ["ALL"]
    # For the executor, which runs as root; not for commands, see below. Podman adds a prefix.
    assert [name.removeprefix("CAP_") for name in host["CapAdd"]] == ["KILL", "SETGID", "SETPCAP", "SETUID"]
    assert host["SecurityOpt"] == ["no-new-privileges:true"]
    assert host["NetworkMode"] == "none"
    assert host["ReadonlyRootfs"]
    assert host["AutoRemove"]
    assert not host["Privileged"]
    assert host["PidsLimit"] == 50 + 1
    assert host["Memory"] == host["MemorySwap"] == (100 + 2 * 20 + 64 + 128) << 20
    assert host["NanoCpus"] == 500_000_000
    assert {limit["Name"]: limit["Hard"] for limit in host["Ulimits"]} == {"nofile": 4096, "fsize": 10 << 20, "core": 0}
    assert config["User"] == "0:0"
    assert set(config["Labels"]) >= {"agentkit.run", "agentkit.owner"}
    assert {mount["Destination"] for mount in described["Mounts"]} == {"/workspace", "/tmp", "/.agentkit"}
    fields = dict(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line)
    assert {fields[name] for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")} == {"0" * 16}
    assert fields["NoNewPrivs"] == "1"
    assert fields["Seccomp"] == "2"
    assert fields["Uid"].split() == ["1000"] * 4
    assert status.splitlines()[-2:] == ["64", "lo"]


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
        own = {volume.name for volume in client.volumes.list()} - volumes
        (found,) = client.api.containers(filters={"label": "agentkit.run=gone"})
        own &= {mount.get("Name") for mount in found["Mounts"]}  # other tests make volumes at the same time
        assert len(own) == 3
    assert client.api.containers(all=True, filters={"label": "agentkit.run=gone"}) == []
    assert not own & {volume.name for volume in client.volumes.list()}


async def test_an_image_that_cannot_be_pulled_is_named(client: docker.DockerClient) -> None:
    with pytest.raises(SandboxUnavailableError, match="localhost:1/no/such:image"):
        await open_environment(EnvironmentSpec(image="localhost:1/no/such:image"), backend="docker")


async def test_the_work_directory_can_start_with_the_images_files(client: docker.DockerClient) -> None:
    files = {"data/a/b.txt": b"text\n", "data/tool.sh": b"#!/bin/sh\necho ran\n"}
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w") as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size, member.mode = len(data), 0o755 if name.endswith(".sh") else 0o600
            tar.addfile(member, io.BytesIO(data))
        for kind, target in ((tarfile.SYMTYPE, "a/b.txt"), (tarfile.LNKTYPE, "data/a/b.txt"), (tarfile.FIFOTYPE, "")):
            member = tarfile.TarInfo(f"data/{kind.decode()}")
            member.type, member.linkname, member.mode = kind, target, 0o600
            tar.addfile(member)
    name = f"agentkit-test-{secrets.token_hex(4)}"
    source = client.api.create_container(BASE_IMAGE, command=["true"])["Id"]
    try:
        client.api.put_archive(source, "/", archive.getvalue())
        client.api.commit(source, name)
        spec = EnvironmentSpec(image=name, workdir="/data", workdir_from_image=True)
        async with await open_environment(spec, backend="docker") as env:
            found = await env.exec("find . -printf '%p %u %m\\n' | sort; ./tool.sh; cat 2; echo more >> a/b.txt; cat 1")
            assert found.stdout.split("\n") == [
                ". agent 755", "./1 agent 600", "./2 agent 777", "./a agent 755", "./a/b.txt agent 600",
                "./tool.sh agent 755", "ran", "text", "text", "more", ""
            ]  # fmt: skip
        # nothing is left over, and the image is as it was
        async with await open_environment(spec, backend="docker") as env:
            assert await env.read_file("a/b.txt") == b"text\n"
        with pytest.raises(SandboxUnavailableError, match=f"image {name} has no directory /nowhere"):
            await open_environment(replace(spec, workdir="/nowhere"), backend="docker", run_id="unfilled")
        assert not client.api.containers(all=True, filters={"label": "agentkit.run=unfilled"})
    finally:
        client.api.remove_container(source, force=True)
        client.images.remove(name, force=True)


async def test_an_image_that_does_not_fit_the_work_directory_is_refused(client: docker.DockerClient) -> None:
    spec = EnvironmentSpec(
        image=BASE_IMAGE, workdir="/workspace/big", workdir_from_image=True, limits=ResourceLimits(disk_mib=1)
    )
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w") as tar:
        member = tarfile.TarInfo("big/file")
        member.size = 2 << 20
        tar.addfile(member, io.BytesIO(secrets.token_bytes(2 << 20)))
    name = f"agentkit-test-{secrets.token_hex(4)}"
    source = client.api.create_container(BASE_IMAGE, command=["true"])["Id"]
    try:
        client.api.put_archive(source, "/workspace", archive.getvalue())
        client.api.commit(source, name)
        with pytest.raises(SandboxUnavailableError, match=r"raise limits\.disk_mib"):
            await open_environment(replace(spec, image=name), backend="docker")
    finally:
        client.api.remove_container(source, force=True)
        client.images.remove(name, force=True)
