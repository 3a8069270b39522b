"""Sandboxes that are an image as it was built: its user, its root file system, and no more rights than they need."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import anyio
import docker
import pytest

from agentkit_environments import EnvironmentSpec, ResourceLimits, available_backends, open_environment, reap
from agentkit_environments.docker import DockerEnvironment, ServiceSpec, open_services
from agentkit_environments.docker.engine import BASE_IMAGE, RUN_LABEL, SNAPSHOTS
from agentkit_environments.errors import SnapshotError

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


def snapshots_of(run_id: str) -> list[str]:
    """Return the ids of the images of a run's snapshots."""
    client = docker.from_env()
    try:
        found = client.api.images(SNAPSHOTS, quiet=True, all=True, filters={"label": f"{RUN_LABEL}={run_id}"})
        return [*map(str, found)]
    finally:
        client.close()


CHANGE = """echo new >/etc/made && rm /etc/group && echo work >kept && echo tmp >/tmp/kept && chmod 750 kept &&
    python3 -c 'import os; os.chown("kept", 1000, 1000); os.utime("kept", (1, 1234567890.5))'"""
READ = """cat /etc/made kept /tmp/kept; test -e /etc/group || echo removed
    python3 -c 'import os; s = os.stat("kept"); print(s.st_uid, oct(s.st_mode), int(s.st_mtime))'"""


async def test_forks_have_the_whole_root_and_are_independent() -> None:
    run_id = f"forks-{os.getpid()}"
    async with await open_environment(as_image(), backend="docker", run_id=run_id) as environment:
        changed = await environment.exec(CHANGE)
        assert changed.exit_code == 0, changed.stderr
        files = (await environment.exec(READ)).stdout
        assert files == "new\nwork\ntmp\nremoved\n1000 0o100750 1234567890\n"
        async with environment.fork(2) as forks:
            assert len(snapshots_of(run_id)) == 1
            for number, fork in enumerate(forks):
                assert (await fork.exec(READ)).stdout == files
                await fork.exec(f"echo {number} >/etc/made")
            assert [(await fork.exec("cat /etc/made")).stdout for fork in forks] == ["0\n", "1\n"]
            shown = (await forks[0].exec(SHOW)).stdout.split()
            assert shown[:5] == ["0", "0", "/root", "CapEff:", CAPABILITIES]
            async with forks[1].fork() as [below]:
                assert (await below.exec("cat /etc/made kept")).stdout == "1\nwork\n"
                assert len(snapshots_of(run_id)) == 2
        assert snapshots_of(run_id) == []
        assert (await environment.exec(READ)).stdout == files


async def test_a_snapshot_lasts_until_its_sandboxes_are_closed_and_has_no_variables() -> None:
    run_id, spec = f"kept-{os.getpid()}", as_image(env={"TOKEN": "hidden"})
    async with await open_environment(spec, backend="docker", run_id=run_id) as environment:
        assert (await environment.exec("echo $TOKEN; echo 1 >/etc/made", env={"KEY": "hidden"})).stdout == "hidden\n"
        snapshot = await environment.snapshot()
    [image] = snapshots_of(run_id)
    client = docker.from_env()
    try:
        stored = client.images.get(image)
        assert "hidden" not in f"{stored.attrs} {stored.history()}"
    finally:
        client.close()
    async with await open_environment(as_image(), backend="docker", run_id=run_id, snapshot=snapshot) as first:
        second = await first.reopen(snapshot)
        snapshot.close()
        snapshot.close()
        assert (await first.exec("cat /etc/made; echo $TOKEN")).stdout == "1\n\n"
    async with second:
        assert snapshots_of(run_id) == [image]
        assert (await second.exec("cat /etc/made")).stdout == "1\n"
    assert snapshots_of(run_id) == []
    with pytest.raises(SnapshotError, match="was closed"):
        await second.reopen(snapshot)


async def test_what_a_snapshot_cannot_be_used_for_is_refused(tmp_path: Path) -> None:
    async with await open_environment(as_image(), backend="docker") as environment:
        snapshot = await environment.snapshot()
        with pytest.raises(SnapshotError, match="cannot be saved to"):
            snapshot.save(tmp_path / "file")
        with pytest.raises(SnapshotError, match="only sandboxes as_image can begin with it"):
            await open_environment(backend="docker", snapshot=snapshot)
        async with await open_environment(backend="docker") as other:
            of_files = await other.snapshot()
        with pytest.raises(SnapshotError, match="can only begin with the snapshot of another one"):
            await environment.reopen(of_files)
        assert isinstance(environment, DockerEnvironment)
        tag = f"agentkit-test-{os.getpid()}"
        client = docker.from_env()
        try:
            client.api.commit(environment.container_id, tag, changes="VOLUME /data")
            with pytest.raises(SnapshotError, match=f"the snapshot is of image sha256:.*, but {tag} is sha256:"):
                await open_environment(as_image(image=tag), backend="docker", snapshot=snapshot)
            async with await open_environment(as_image(image=tag), backend="docker") as with_volume:
                with pytest.raises(SnapshotError, match="the image has a volume at /data"):
                    await with_volume.snapshot()
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


async def test_too_much_is_not_captured() -> None:
    limits = ResourceLimits(memory_mib=256, processes=64, disk_mib=1)
    async with await open_environment(as_image(limits=limits), backend="docker") as environment:
        await environment.exec("head -c 3000000 /dev/zero >/etc/big")
        with pytest.raises(SnapshotError, match="and a snapshot holds 2097152"):
            await environment.snapshot()


@pytest.mark.parametrize("path", ["/etc/passwd", "/etc/group"])
async def test_a_pipe_that_the_engine_would_wait_for_is_refused(path: str) -> None:
    async with await open_environment(as_image(), backend="docker") as environment:
        await environment.exec(f"mkfifo /pipe; rm {path}; ln -s /pipe {path}")
        with pytest.raises(SnapshotError, match=f"{path} of the snapshot is not a regular file"):
            async with environment.fork():
                pass


async def test_forgotten_snapshots_are_removed_with_those_that_they_began_with() -> None:
    """In one collection of garbage, whose order is the interpreter's."""
    run_id = f"forgotten-{os.getpid()}"
    forgotten: list[Any] = []
    forgotten.append(forgotten)
    async with await open_environment(as_image(), backend="docker", run_id=run_id) as environment:
        forgotten.append(await environment.snapshot())
        async with await environment.reopen(forgotten[1]) as child:
            forgotten.append(await child.snapshot())
        async with await environment.reopen(forgotten[2]) as grandchild:
            forgotten.append(await grandchild.snapshot())
    assert len(snapshots_of(run_id)) == 3
    del forgotten
    gc.collect()
    assert snapshots_of(run_id) == []


HARNESS = """
import sys
import anyio
from agentkit_environments import EnvironmentSpec, open_environment

async def main(image, run_id):
    spec = EnvironmentSpec(image=image, as_image=True, workdir="")
    async with await open_environment(spec, backend="docker", run_id=run_id) as environment:
        async with environment.fork() as [fork], fork.fork():
            print("ready", flush=True)
            await anyio.sleep_forever()

anyio.run(main, *sys.argv[1:])
"""


def test_the_snapshots_of_a_killed_harness_are_reaped() -> None:
    run_id = f"killed-{os.getpid()}"
    with subprocess.Popen([sys.executable, "-c", HARNESS, BASE_IMAGE, run_id], stdout=subprocess.PIPE) as harness:
        try:
            assert harness.stdout is not None
            assert harness.stdout.readline() == b"ready\n"
            anyio.run(reap)
            assert len(snapshots_of(run_id)) == 2  # its owner lives
        finally:
            harness.kill()
    assert len(snapshots_of(run_id)) == 2
    anyio.run(reap)
    assert snapshots_of(run_id) == []


async def test_the_processes_of_root_can_be_killed() -> None:
    async with await open_environment(as_image(), backend="docker") as environment:
        alive = "ps -eo comm | grep -cx sleep"
        stubborn = "(trap '' TERM; while :; do sleep 1000; done) >/dev/null 2>&1 &"
        await environment.exec(f"{stubborn} until {alive}; do :; done", timeout_s=20)
        assert (await environment.exec(alive)).stdout == "1\n"
        await environment.kill_all()
        assert (await environment.exec(alive)).stdout == "0\n"
