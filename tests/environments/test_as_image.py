"""Sandboxes that are an image as it was built: its user, its root file system, and no more rights than they need."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import anyio
import docker
import pytest

from agentkit_environments import (
    Environment,
    EnvironmentSpec,
    ResourceLimits,
    SandboxUnavailableError,
    Snapshot,
    available_backends,
    open_environment,
    reap,
)
from agentkit_environments.docker import DockerEnvironment, ServiceSpec, open_services
from agentkit_environments.docker.engine import BASE_IMAGE, RUN_LABEL
from agentkit_environments.docker.services import Condition
from agentkit_environments.errors import ServiceError, SnapshotError

DOCKER = available_backends()["docker"]
pytestmark = [
    pytest.mark.anyio,
    pytest.mark.docker,
    pytest.mark.skipif(DOCKER is not None, reason=f"no Docker: {DOCKER}"),
]
CAPABILITIES = "00000000000004fb"
"""CHOWN, DAC_OVERRIDE, FOWNER, FSETID, KILL, SETGID, SETUID and NET_BIND_SERVICE."""
SHOW = 'echo $(id -u) $(id -g) "$HOME"; grep -E "CapEff|CapBnd|NoNewPrivs" /proc/self/status'


def as_image(**changes: Any) -> EnvironmentSpec:
    limits = ResourceLimits(memory_mib=256, processes=64)
    return EnvironmentSpec(as_image=True, **{"image": BASE_IMAGE, "limits": limits, "workdir": "", **changes})


async def test_a_work_directory_that_the_image_lacks_is_made() -> None:
    async with await open_environment(as_image(workdir="/made/for this"), backend="docker") as environment:
        await environment.write_file("f", "text")
        assert (await environment.exec("pwd; cat f")).stdout == "/made/for this\ntext"
    with pytest.raises(SandboxUnavailableError, match="/etc/passwd is not a directory"):
        await open_environment(as_image(workdir="/etc/passwd"), backend="docker")


async def test_root_can_change_the_system_and_has_few_capabilities() -> None:
    async with await open_environment(as_image(), backend="docker") as environment:
        shown = (await environment.exec(SHOW)).stdout.split()
        assert shown[:3] == ["0", "0", "/root"]
        assert shown[3:] == ["CapEff:", CAPABILITIES, "CapBnd:", CAPABILITIES, "NoNewPrivs:", "1"]
        await environment.write_file("/etc/made", "by root")
        command = "import os; os.chown('/etc/made', 1000, 1000); print(os.stat('/etc/made').st_uid)"
        assert (await environment.exec(["python3", "-c", command])).stdout == "1000\n"
        assert (await environment.exec("mount -t tmpfs none /mnt || mknod /x b 1 1 || chroot / true")).exit_code != 0
        assert (await environment.exec("test -e /sys/class/net/eth0 || echo offline")).stdout == "offline\n"
        shown = (await environment.exec(SHOW, user="agent")).stdout.split()
        assert shown[:3] == ["1000", "1000", "/workspace"] and shown[4] == "0000000000000000"


@pytest.mark.parametrize("user", ["agent", "1000:1000"])
async def test_another_user_has_no_rights(user: str) -> None:
    async with await open_environment(as_image(user=user, workdir="/tmp"), backend="docker") as environment:
        shown = (await environment.exec(SHOW)).stdout.split()
        assert shown[:2] == ["1000", "1000"] and shown[4] == "0000000000000000"
        assert (await environment.exec("pwd; touch /etc/made")).stdout == "/tmp\n"
        with pytest.raises(PermissionError):
            await environment.write_file("/etc/made", "no")
        await environment.write_file("made", "yes")
        assert (await environment.exec("ls -n made | cut -d ' ' -f 3")).stdout == "1000\n"
        assert (await environment.exec(SHOW, user="0:0")).stdout.split()[4] == CAPABILITIES


def containers_of(run_id: str) -> list[str]:
    """Return the ids of a run's containers, also of those that were never started."""
    client = docker.from_env()
    try:
        found = client.api.containers(all=True, filters={"label": f"{RUN_LABEL}={run_id}"})
        return [each["Id"] for each in found]
    finally:
        client.close()


@pytest.fixture(scope="module")
def furnished() -> Iterator[str]:
    """An image with folders and files to change and to remove, and a program that has a capability."""
    tag = f"agentkit-test-furnished-{os.getpid()}"
    client = docker.from_env()
    try:
        container = client.api.create_container(BASE_IMAGE, entrypoint=["/"])["Id"]
        try:
            client.api.put_archive(container, "/", furniture())
            client.api.commit(container, tag)
        finally:
            client.api.remove_container(container)
        yield tag
        client.api.remove_image(tag)
    finally:
        client.close()


def furniture() -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for folder in ("stay", "gone", "gone/below", "again", "again/below", "file", "link", "owned", "times"):
            member = tarfile.TarInfo(folder)
            member.type, member.mode, member.mtime = tarfile.DIRTYPE, 0o755, 1_000_000_000
            archive.addfile(member)
        old = ("stay/a", "stay/b", "gone/a", "gone/below/a", "again/a", "again/below/a", "file/a", "link/a", "times/a")
        for path in (*old, "was-file", "was-link", "stay/odd\udcff", "stay/program"):
            member = tarfile.TarInfo(path)
            member.mode, member.size, member.mtime = 0o644, 4, 1_000_000_000
            if path == "stay/program":
                member.pax_headers = {"SCHILY.xattr.security.capability": os.fsdecode(CAPABILITY)}
            archive.addfile(member, io.BytesIO(b"old\n"))
    return out.getvalue()


CAPABILITY = bytes.fromhex("0100000200040000000000000000000000000000")
"""CAP_NET_BIND_SERVICE, as the kernel stores it."""
CHANGE = r"""
set -e
umask 022
cd /
mkdir -p opt/new/deep empty "odd$(printf '\nname')"
printf new >opt/new/deep/file
printf changed >stay/a
rm stay/b
rm -r gone again file link was-link
mkdir again; printf new >again/c
printf now-a-file >file
ln -s stay link
rm was-file; mkdir was-file; printf x >was-file/x
ln -s nowhere was-link
rm "stay/odd$(printf '\377')"; printf odd >"stay/$(printf 'new\376')"
printf '#!/bin/sh\n' >opt/setuid; chmod 4755 opt/setuid
printf secret >opt/secret; chmod 000 opt/secret
printf same >opt/one; ln opt/one two
ln stay/program three
ln opt/setuid four
mkfifo opt/pipe
echo 1 >opt/.wh.secret; echo 2 >stay/.wh.a; echo 3 >opt/.wh..wh..opq; mkdir opt/...; echo 4 >opt/.../..file
chmod 1777 empty
chmod 700 stay/program
rm /etc/group
python3 - <<'.'
import os
os.chown("owned", 1000, 1001)
os.chown("opt/new/deep/file", 33, 44)
os.lchown("link", 55, 66)
os.chmod("opt/setuid", 0o4755)
with open("opt/holes", "wb") as file:
    file.truncate(1 << 20)
for path in ("opt/one", "times"):
    os.utime(path, (1, 1234567890))
.
echo tmp >/tmp/kept; echo work >kept
"""
"""Commands that make every kind of change; `chown`, which the base image has not, is Python's."""
LIST = """
import os, stat
skip = {"/proc", "/sys", "/dev", "/.agentkit", "/.dockerenv"}
skip |= {"/etc/" + name for name in ("mtab", "hosts", "hostname", "resolv.conf")}
found = []
for parent, directories, files in os.walk(b"/"):
    directories[:] = [name for name in directories if os.path.join(parent, name).decode("utf-8", "replace") not in skip]
    found += [os.path.join(parent, name) for name in directories + files]
for path in sorted(found):
    if path.decode("utf-8", "replace") in skip or b"__pycache__" in path:
        continue
    info = os.lstat(path)
    kind = stat.S_IFMT(info.st_mode)
    fields = [path, oct(info.st_mode), info.st_uid, info.st_gid]
    if kind == stat.S_IFREG:
        fields += [info.st_nlink, info.st_size, int(info.st_mtime), open(path, "rb").read()[:20]]
        try:
            fields.append(os.getxattr(path, "security.capability"))
        except OSError:
            pass
    elif kind == stat.S_IFLNK:
        fields += [os.readlink(path), int(info.st_mtime)]
    elif kind == stat.S_IFDIR:
        fields.append(int(info.st_mtime))
    print(fields)
"""


async def listing(environment: Environment) -> list[str]:
    """Return every entry of the root file system with mode, owner, links, time, content and capability."""
    done = await environment.exec(["python3", "-c", LIST], user="0:0", max_output_bytes=1 << 24)
    assert (done.exit_code, done.stderr) == (0, "")
    return done.stdout.splitlines()


@pytest.mark.parametrize("use_layer", [True, False], ids=["layer", "whole-root"])
async def test_a_fork_has_the_whole_root(furnished: str, use_layer: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """With overlay2, and as with a storage driver whose layers cannot be mounted.

    The engine's list of changes has no names that are not UTF-8, and that of overlay2 has no times of directories.
    """

    def is_lost(line: str) -> bool:
        return not use_layer and ("/stay/odd" in line or "/times'" in line)

    if not use_layer:
        monkeypatch.setattr("agentkit_environments.docker.snapshot.DRIVERS_WITH_FOLDERS", ())
    run_id = f"forks-{os.getpid()}"
    async with await open_environment(as_image(image=furnished), backend="docker", run_id=run_id) as environment:
        before = await listing(environment)
        made = await environment.exec(CHANGE)
        assert (made.exit_code, made.stderr) == (0, "")
        files = await listing(environment)
        assert len({*files} - {*before}) > 20 and any(repr(CAPABILITY) in line for line in files)
        left_out = (await environment.snapshot()).left_out
        assert len(left_out) == (not use_layer) and all("stay/odd" in line for line in left_out), left_out
        async with environment.fork(2) as forks:
            for number, fork in enumerate(forks):
                assert [line for line in difference(await listing(fork), files) if not is_lost(line)] == []
                await fork.exec(f"echo {number} >/etc/made; rm /opt/one")
            assert [(await fork.exec("cat /etc/made")).stdout for fork in forks] == ["0\n", "1\n"]
            shown = (await forks[0].exec(SHOW)).stdout.split()
            assert shown[:5] == ["0", "0", "/root", "CapEff:", CAPABILITIES]
            async with forks[1].fork() as [below]:
                assert (await below.exec("cat /etc/made /two /kept; ls /opt/one")).stdout == "1\nsamework\n"
                assert len(containers_of(run_id)) == 4, "those that only read were removed"
        assert difference(await listing(environment), files) == []


def difference(found: list[str], expected: list[str]) -> list[str]:
    """Return the lines that only one of two lists has."""
    return [f"unexpected: {line}" for line in found if line not in {*expected}] + [
        f"missing: {line}" for line in expected if line not in {*found}
    ]


async def test_a_layer_that_the_engine_cannot_mount(monkeypatch: pytest.MonkeyPatch) -> None:
    """As that of an engine in a virtual machine may be."""
    monkeypatch.setattr("agentkit_environments.docker.snapshot._layer_folder", lambda api, inspected: "/no/such/folder")
    async with await open_environment(as_image(), backend="docker") as environment:
        await environment.exec("echo 1 >/etc/made")
        async with environment.fork() as [fork]:
            assert (await fork.exec("cat /etc/made")).stdout == "1\n"


async def test_a_snapshot_is_a_file_without_variables(tmp_path: Path) -> None:
    spec = as_image(env={"TOKEN": "hidden"})
    async with await open_environment(spec, backend="docker") as environment:
        assert (await environment.exec("echo $TOKEN; echo 1 >/etc/made", env={"KEY": "hidden"})).stdout == "hidden\n"
        snapshot = await environment.snapshot()
        assert snapshot.left_out == () and snapshot.entries == 3 and (snapshot.image or "").startswith("sha256:")
    snapshot.save(tmp_path / "file")
    assert b"hidden" not in (tmp_path / "file").read_bytes()
    loaded = Snapshot.load(tmp_path / "file")
    async with await open_environment(as_image(), backend="docker", snapshot=loaded) as first:
        second = await first.reopen(loaded)
        loaded.close()
        assert (await first.exec("cat /etc/made; echo $TOKEN")).stdout == "1\n\n"
    async with second:
        assert (await second.exec("cat /etc/made")).stdout == "1\n"
    with pytest.raises(SnapshotError, match="was closed"):
        await second.reopen(loaded)


async def test_the_work_of_another_user_goes_on() -> None:
    spec = as_image(user="agent", workdir="/tmp")
    async with await open_environment(spec, backend="docker") as environment:
        await environment.exec("mkdir /srv && chmod 755 /srv && echo root >/srv/file && rm -r /run", user="0:0")
        await environment.exec("echo mine >file")
        async with environment.fork() as [fork]:
            again = "ls -d /run; echo more >>file && cat file /srv/file && stat -c %u file /srv/file; touch /srv/file"
            done = await fork.exec(again)
            assert done.stdout == "mine\nmore\nroot\n1000\n0\n" and "Permission denied" in done.stderr


async def test_what_a_snapshot_cannot_be_used_for_is_refused(tmp_path: Path) -> None:
    async with await open_environment(as_image(), backend="docker") as environment:
        snapshot = await environment.snapshot()
        for backend in ("docker", "unsafe-local"):
            with pytest.raises(SnapshotError, match=r"is of a sandbox as_image of sha256:.*only such a sandbox"):
                await open_environment(backend=backend, snapshot=snapshot)
        async with await open_environment(backend="docker") as other:
            of_files = await other.snapshot()
        with pytest.raises(SnapshotError, match="can only begin with the snapshot of another one"):
            await environment.reopen(of_files)
        assert isinstance(environment, DockerEnvironment)
        tag, run_id = f"agentkit-test-{os.getpid()}", f"refused-{os.getpid()}"
        client = docker.from_env()
        try:
            client.api.commit(environment.container_id, tag, changes="VOLUME /data")
            with pytest.raises(
                SnapshotError, match=r"the snapshot is of image sha256:.*, but the sandbox is of sha256:"
            ):
                await open_environment(as_image(image=tag), backend="docker", snapshot=snapshot, run_id=run_id)
            assert containers_of(run_id) == []
            async with await open_environment(as_image(image=tag), backend="docker") as with_volume:
                with pytest.raises(SnapshotError, match="the image has a volume at /data"):
                    await with_volume.snapshot()
        finally:
            client.api.remove_image(tag)
            client.close()


async def test_files_cannot_be_removed_without_a_program_for_it(furnished: str) -> None:
    """From an image without `rm`, nothing can be removed; everything else goes on."""
    tag, run_id = f"agentkit-test-bare-{os.getpid()}", f"bare-{os.getpid()}"
    client = docker.from_env()
    try:
        async with await open_environment(as_image(image=furnished), backend="docker") as environment:
            await environment.exec("rm $(command -v rm)")
            assert isinstance(environment, DockerEnvironment)
            client.api.commit(environment.container_id, tag)
        async with await open_environment(as_image(image=tag), backend="docker", run_id=run_id) as environment:
            await environment.exec("echo 1 >/stay/a")
            async with environment.fork() as [fork]:
                assert (await fork.exec("cat /stay/a")).stdout == "1\n"
            await environment.exec(["python3", "-c", "import os; os.remove('/stay/a')"])
            with pytest.raises(SnapshotError, match="`rm` of the image exited 127"):
                async with environment.fork():
                    pass
            assert len(containers_of(run_id)) == 1
    finally:
        client.api.remove_image(tag)
        client.close()


async def test_a_sandbox_with_services_is_not_captured() -> None:
    service = ServiceSpec("db", BASE_IMAGE, ResourceLimits(memory_mib=64), command=["sleep", "100"])
    async with await open_environment(as_image(), backend="docker") as environment:
        assert isinstance(environment, DockerEnvironment)
        async with open_services(environment, [service], {"db": "service_started"}):
            with pytest.raises(SnapshotError, match="services that cannot be captured: db"):
                await environment.snapshot()
        async with environment.fork():
            pass


async def test_services_reach_the_sandbox_by_its_names() -> None:
    find = "import socket, sys; socket.gethostbyname(sys.argv[1])"
    look = ServiceSpec("look", BASE_IMAGE, ResourceLimits(memory_mib=64), command=["python3", "-c", find, "main"])
    other = replace(look, name="other", command=["python3", "-c", find, "client"])
    done: dict[str, Condition] = {"look": "service_completed_successfully", "other": "service_completed_successfully"}
    async with await open_environment(as_image(), backend="docker") as environment:
        assert isinstance(environment, DockerEnvironment)
        async with open_services(environment, [look, other], done, aliases=["client"]):
            pass
    async with await open_environment(as_image(), backend="docker") as environment:
        assert isinstance(environment, DockerEnvironment)
        with pytest.raises(ServiceError, match="other"):
            async with open_services(environment, [look, other], done):
                pass


async def test_too_much_is_not_captured(furnished: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("agentkit_environments.environment.SLACK_BYTES", 1 << 16)
    limits, run_id = ResourceLimits(memory_mib=256, processes=64, disk_mib=1), f"large-{os.getpid()}"
    spec = as_image(image=furnished, limits=limits)
    async with await open_environment(spec, backend="docker", run_id=run_id) as environment:
        await environment.exec("head -c 3000000 /dev/zero >/etc/big")
        with pytest.raises(SnapshotError, match="cannot be captured: more than 2162688 bytes"):
            await environment.snapshot()
        assert len(containers_of(run_id)) == 1
        await environment.exec("rm /etc/big; for i in 1 2 3 4 5 6; do echo >/etc/$i; done")
        monkeypatch.setattr("agentkit_environments.environment.MAX_ENTRIES", 7)
        with pytest.raises(SnapshotError, match="more than 7 entries"):
            await environment.snapshot()
        await environment.exec("rm /etc/[1-6] /stay/*; rm -r /gone /again /file /link /times")
        with pytest.raises(SnapshotError, match="more than 7 removed paths"):
            await environment.snapshot()


@pytest.mark.parametrize("path", ["/etc/passwd", "/etc/group"])
async def test_a_pipe_in_place_of_a_file_of_users(path: str) -> None:
    """The engine reads these files when it starts a container, and would wait for a pipe without end."""
    async with await open_environment(as_image(), backend="docker") as environment:
        await environment.exec(f"mkfifo /pipe; rm {path}; ln -s /pipe {path}")
        async with environment.fork() as [fork], fork.fork() as [below]:
            assert (await below.exec(f"readlink {path}; test -p /pipe && echo a pipe")).stdout == "/pipe\na pipe\n"


HARNESS = """
import sys
import anyio
from agentkit_environments import EnvironmentSpec, open_environment

async def main(image, run_id):
    spec = EnvironmentSpec(image=image, as_image=True, workdir="")
    async with await open_environment(spec, backend="docker", run_id=run_id) as environment:
        await environment.exec("head -c 50000000 /dev/urandom >/etc/big")
        async with environment.fork() as [fork]:
            print("ready", flush=True)
            while True:
                await fork.snapshot()

anyio.run(main, *sys.argv[1:])
"""


def test_nothing_stays_of_a_harness_that_is_killed_during_a_snapshot() -> None:
    run_id = f"killed-{os.getpid()}"
    with subprocess.Popen([sys.executable, "-c", HARNESS, BASE_IMAGE, run_id], stdout=subprocess.PIPE) as harness:
        try:
            assert harness.stdout is not None
            assert harness.stdout.readline() == b"ready\n"
            while len(containers_of(run_id)) < 3:  # the one that reads the layer
                pass
        finally:
            harness.kill()
    anyio.run(reap)
    assert containers_of(run_id) == []


async def test_the_processes_of_root_can_be_killed() -> None:
    async with await open_environment(as_image(), backend="docker") as environment:
        alive = "ps -eo comm | grep -cx sleep"
        stubborn = "(trap '' TERM; while :; do sleep 1000; done) >/dev/null 2>&1 &"
        await environment.exec(f"{stubborn} until {alive}; do :; done", timeout_s=20)
        assert (await environment.exec(alive)).stdout == "1\n"
        await environment.kill_all()
        assert (await environment.exec(alive)).stdout == "0\n"
