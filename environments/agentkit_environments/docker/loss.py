"""The reason why a container was lost, from the engine, its events and the kernel's log, all outside the container.

Only this evidence can blame the host (`HostFailureError`). Any other loss may be the work of the commands inside.
"""

from __future__ import annotations

import contextlib
import errno
import os
import time

import requests
import urllib3
from docker import APIClient
from docker.errors import DockerException

from agentkit_environments.errors import HostFailureError, SandboxLostError

PING_TIMEOUT_S = 5.0
KERNEL_LOG = "/dev/kmsg"


def why_lost(api: APIClient, container_id: str, error: Exception | None, memory_mib: int) -> SandboxLostError:
    """Return the error for a container whose request failed with `error`, or whose connection ended (None)."""
    name = f"container {container_id[:12]}"
    try:
        api.get(f"{api.base_url}/_ping", timeout=PING_TIMEOUT_S).raise_for_status()
        events = _events(api, container_id)
    except (DockerException, requests.RequestException, urllib3.exceptions.HTTPError) as silence:
        return HostFailureError(f"{name}: the Docker engine does not answer: {silence}")
    exit_code = events.get("die")
    if exit_code is None:
        reason = f"the engine answered: {error}" if error else "the connection to its first program has ended"
        return SandboxLostError(f"{name} runs, but cannot be used: {reason}")
    if "oom" in events:
        return SandboxLostError(
            f"{name} has ended: its processes used up its memory (limits.memory_mib is {memory_mib}), and the kernel "
            "killed its first program"
        )
    if "kill" in events:
        return HostFailureError(f"{name} was killed or removed through the Docker engine, from outside the container")
    if is_killed_for_host_memory(container_id):
        return HostFailureError(f"{name} has ended: the machine ran out of memory, and the kernel killed it")
    return SandboxLostError(f"{name} has ended: its first program ended with exit code {exit_code}")


def _events(api: APIClient, container_id: str) -> dict[str, str]:
    """Return the events that show how a container ended; the value of `die` is the exit code.

    Waits one to two seconds, so that an event still on its way is not missed. Podman selects `die` by the name `died`.
    """
    wanted = {"container": container_id, "event": ["die", "died", "kill", "oom"]}
    found: dict[str, str] = {}
    for event in api.events(since=1, until=int(time.time()) + 2, filters=wanted, decode=True):
        found[event["Action"]] = event["Actor"]["Attributes"].get("exitCode", "")
    return found


def is_killed_for_host_memory(container_id: str, path: str = KERNEL_LOG) -> bool:
    """Return whether the kernel's log shows that a process of the container was killed because the host ran out of
    memory.

    Also False if the log cannot be read: that needs root or `kernel.dmesg_restrict=0`, and an engine on this machine.
    """
    with contextlib.suppress(OSError):
        log = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            while True:
                try:
                    # One read is one record. The line names the cgroup of the killed process.
                    record = os.read(log, 1 << 13)
                except OSError as error:
                    if error.errno == errno.EPIPE:  # the record was overwritten before it was read
                        continue
                    return False
                if not record:
                    return False
                if b"global_oom" in record and container_id.encode() in record:
                    return True
        finally:
            os.close(log)
    return False
