"""Restrictions of a container: as many as the engine supports.

No capabilities for commands, no new privileges, the engine's seccomp filter, no network, bounds on processes, memory
(without swap), CPU, file size and open files, a read-only root, an unprivileged user. The work directory and /tmp are
in memory and of bounded size: volumes in Docker, whose archives reach no other mounts, and plain mounts in Podman,
which ignores the options of a volume. Podman adds /var/tmp, which hides /tmp in an image where one is a link to the
other, so it gets the same bounds. Another volume holds the executor; only root can write to it.

A sandbox `as_image` has a writable root instead of the two mounts, and commands of root have the capabilities that
package managers and `chown` need. The other restrictions stay.
"""

from __future__ import annotations

import posixpath
from collections.abc import Mapping

import requests
from docker import APIClient
from docker.errors import DockerException
from docker.types import DriverConfig, LogConfig, Mount, Ulimit

from agentkit_environments.docker.engine import OWNER_LABEL, RUN_LABEL
from agentkit_environments.environment import EnvironmentSpec, VolumeMount
from agentkit_environments.errors import SandboxUnavailableError
from agentkit_environments.owner import owner_token
from agentkit_environments.proxy import PORT

AGENT_ID = 1000
EXECUTOR = "/.agentkit/executor"
PROXY_SOCKET = "/.agentkit/proxy"
"""A UNIX socket of the harness in the container, as in executor.c."""
EXECUTOR_USER = "0:0"
EXECUTOR_CAPABILITIES = ["KILL", "SETGID", "SETPCAP", "SETUID"]
"""`executor.c` says what it needs them for. Commands have none, also those of root, except in a sandbox `as_image`."""
AS_IMAGE_CAPABILITIES = {
    "CHOWN": 0,
    "DAC_OVERRIDE": 1,
    "FOWNER": 3,
    "FSETID": 4,
    "KILL": 5,
    "SETGID": 6,
    "SETUID": 7,
    "NET_BIND_SERVICE": 10,
}
"""Capabilities that commands of root have in a sandbox `as_image`, with the numbers of the kernel: a subset of the
engine's default ones, without raw sockets, device nodes, chroot and file capabilities."""
EXECUTOR_MIB = 128
"""Memory for the executor itself: input that arrives, and output that waits for the end of a command."""
EXECUTOR_FILES = 4096
"""Descriptors of the executor: four for each command that runs."""
SHM_MIB = 64


def create_container(
    api: APIClient,
    image: str,
    spec: EnvironmentSpec,
    run_id: str,
    *,
    in_volumes: bool,
    proxy_socket: str | None = None,
) -> str:
    """Create a container without starting it, and return its id.

    Its first program is the executor, which must be put into its volume before the start.

    Args:
        api: The engine.
        image: The image.
        spec: The limits, the work directory and the network.
        run_id: Label of the container.
        in_volumes: True if the work directory and /tmp are volumes. Otherwise the work directory belongs to root. Not
            used if the sandbox is `as_image`.
        proxy_socket: Path of the UNIX socket through which the executor sends the proxy's listening socket.

    Raises:
        SandboxUnavailableError: If the engine refuses the container.
    """
    limits = spec.limits
    in_memory = {} if spec.as_image else {spec.workdir: "0755", "/tmp": "1777"}
    if in_memory and not in_volumes:
        in_memory.setdefault("/var/tmp", "1777")
    lent = AS_IMAGE_CAPABILITIES if spec.as_image else {}
    # The content of these mounts and of /dev/shm counts as the container's memory: full volumes must not kill it.
    memory = (limits.memory_mib + len(in_memory) * limits.disk_mib + SHM_MIB + EXECUTOR_MIB) << 20
    executor = Mount(target=posixpath.dirname(EXECUTOR), source=None, type="volume", no_copy=True)
    options = {path: f"size={limits.disk_mib}m,mode={mode},nosuid,nodev" for path, mode in in_memory.items()}
    volumes = [_memory_volume(path, each) for path, each in options.items()] if in_volumes else []
    tmpfs = {} if in_volumes else {path: f"{each},exec,notmpcopyup" for path, each in options.items()}
    mounts = [executor, *volumes, *volume_mounts(spec.volumes)]
    if proxy_socket is not None:
        mounts.append(Mount(target=PROXY_SOCKET, source=proxy_socket, type="bind", read_only=True))
    capabilities = sum(1 << number for number in lent.values())
    files = max(limits.open_files, EXECUTOR_FILES)
    host_config = api.create_host_config(
        auto_remove=True,
        cap_add=sorted({*EXECUTOR_CAPABILITIES, *lent}),
        cap_drop=["ALL"],
        ipc_mode="private",
        log_config=LogConfig(type="none"),
        mem_limit=memory,
        memswap_limit=memory,
        mounts=mounts,
        nano_cpus=int(limits.cpus * 1e9),
        network_mode="bridge" if spec.network.is_public else "none",
        oom_score_adj=500,
        pids_limit=limits.processes + 1,  # the executor
        privileged=False,
        read_only=not spec.as_image,
        security_opt=["no-new-privileges:true"],
        shm_size=SHM_MIB << 20,
        tmpfs=tmpfs,
        # Without these, System V segments and message queues would outlive the processes that made them.
        sysctls={"kernel.shm_rmid_forced": "1", "kernel.msgmni": "16", "fs.mqueue.queues_max": "16"},
        ulimits=[
            Ulimit(name="nofile", soft=files, hard=files),  # the executor lowers it for commands
            Ulimit(name="fsize", soft=limits.file_size_mib << 20, hard=limits.file_size_mib << 20),
            Ulimit(name="core", soft=0, hard=0),
        ],
    )
    try:
        return str(
            api.create_container(
                image,
                entrypoint=[EXECUTOR],
                command=[
                    *uid_and_gid(spec),
                    *(str(limits.open_files), str(EXECUTOR_MIB << 20), f"{capabilities:x}"),
                    str(0 if proxy_socket is None else PORT),
                ],
                hostname="sandbox",
                host_config=host_config,
                labels={RUN_LABEL: run_id, OWNER_LABEL: owner_token()},
                stdin_open=True,
                user=EXECUTOR_USER,
                working_dir=spec.workdir if spec.as_image else "/",  # the engine makes it if it is missing
            )["Id"]
        )
    except (DockerException, requests.RequestException) as error:
        raise SandboxUnavailableError(f"the Docker engine refused the container: {error}") from error


def volume_mounts(volumes: Mapping[str, VolumeMount]) -> list[Mount]:
    """Return the mounts of volumes, by path in a container."""
    return [Mount(path, each.name, type="volume", read_only=each.read_only) for path, each in volumes.items()]


def _memory_volume(target: str, options: str) -> Mount:
    owned = f"{options},uid={AGENT_ID},gid={AGENT_ID}"
    driver = DriverConfig("local", {"type": "tmpfs", "device": "tmpfs", "o": owned})
    return Mount(target=target, source=None, type="volume", no_copy=True, driver_config=driver)


def uid_and_gid(spec: EnvironmentSpec) -> tuple[str, str]:
    """Return the uid and the gid of commands, as texts; the user of a sandbox `as_image` is already a number."""
    uid, _, gid = (spec.user or f"{AGENT_ID}:{AGENT_ID}").partition(":")
    return uid, gid
