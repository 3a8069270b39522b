"""Sandboxes that are an image as it was built: its user, its root file system, and no more rights than they need."""

from __future__ import annotations

from typing import Any

import pytest

from agentkit_environments import EnvironmentSpec, ResourceLimits, available_backends, open_environment
from agentkit_environments.docker.engine import BASE_IMAGE
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
    return EnvironmentSpec(image=BASE_IMAGE, as_image=True, limits=limits, **{"workdir": "", **changes})


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


async def test_a_snapshot_is_refused() -> None:
    """Commands may change files outside the work directory and /tmp, which a snapshot does not have."""
    async with await open_environment(as_image(), backend="docker") as environment:
        with pytest.raises(SnapshotError, match="a sandbox as_image cannot be captured"):
            await environment.snapshot()


async def test_the_processes_of_root_can_be_killed() -> None:
    async with await open_environment(as_image(), backend="docker") as environment:
        await environment.exec("(trap '' TERM; while :; do sleep 1; done) >/dev/null 2>&1 &")
        await environment.kill_all()
        result = await environment.exec("ps -eo comm | grep -cx sleep")
        assert result.stdout == "0\n"
