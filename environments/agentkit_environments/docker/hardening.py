"""Restrictions of a container: as many as the engine supports.

No capabilities for commands, no new privileges, the engine's seccomp filter, no network, bounds on processes, memory
(without swap), CPU, file size and open files, a read-only root, an unprivileged user, an init process. The work
directory and /tmp are memory-backed volumes of bounded size.
"""

from __future__ import annotations

import requests
from docker import APIClient
from docker.errors import DockerException
from docker.types import DriverConfig, LogConfig, Mount, Ulimit

from agentkit_environments.docker.engine import OWNER_LABEL, RUN_LABEL
from agentkit_environments.environment import EnvironmentSpec
from agentkit_environments.errors import SandboxUnavailableError
from agentkit_environments.owner import owner_token

AGENT_ID = 1000
AGENT_USER = f"{AGENT_ID}:{AGENT_ID}"
KEEPER_USER = "0:0"
KEEPER_CAPABILITIES = ["KILL"]
SHM_MIB = 64


def create_container(api: APIClient, image: str, spec: EnvironmentSpec, run_id: str) -> str:
    """Create a container without starting it, and return its id.

    Its first program is the keeper's shell. The shell's user differs from the commands' user, so that they cannot kill
    it.

    Raises:
        SandboxUnavailableError: If the engine refuses the container.
    """
    limits = spec.limits
    # The content of the two volumes and of /dev/shm counts as the container's memory: full volumes must not kill it.
    memory = (limits.memory_mib + 2 * limits.disk_mib + SHM_MIB) << 20
    host_config = api.create_host_config(
        auto_remove=True,
        cap_add=KEEPER_CAPABILITIES,
        cap_drop=["ALL"],
        init=True,
        ipc_mode="private",
        log_config=LogConfig(type="none"),
        mem_limit=memory,
        memswap_limit=memory,
        mounts=[_memory_volume(spec.workdir, "0755", limits.disk_mib), _memory_volume("/tmp", "1777", limits.disk_mib)],
        nano_cpus=int(limits.cpus * 1e9),
        network_mode="none" if spec.network == "none" else "bridge",
        oom_score_adj=500,
        pids_limit=limits.processes,
        privileged=False,
        read_only=True,
        security_opt=["no-new-privileges:true"],
        shm_size=SHM_MIB << 20,
        # Without these, System V segments and message queues would outlive the processes that made them.
        sysctls={"kernel.shm_rmid_forced": "1", "kernel.msgmni": "16", "fs.mqueue.queues_max": "16"},
        ulimits=[
            Ulimit(name="nofile", soft=limits.open_files, hard=limits.open_files),
            Ulimit(name="fsize", soft=limits.file_size_mib << 20, hard=limits.file_size_mib << 20),
            Ulimit(name="core", soft=0, hard=0),
        ],
    )
    try:
        return str(
            api.create_container(
                image,
                entrypoint=["/bin/sh"],
                command=[],
                environment={"ENV": ""},
                hostname="sandbox",
                host_config=host_config,
                labels={RUN_LABEL: run_id, OWNER_LABEL: owner_token()},
                stdin_open=True,
                user=KEEPER_USER,
                working_dir=spec.workdir,
            )["Id"]
        )
    except (DockerException, requests.RequestException) as error:
        raise SandboxUnavailableError(f"the Docker engine refused the container: {error}") from error


def _memory_volume(target: str, mode: str, size_mib: int) -> Mount:
    options = f"size={size_mib}m,nosuid,nodev,uid={AGENT_ID},gid={AGENT_ID},mode={mode}"
    driver = DriverConfig("local", {"type": "tmpfs", "device": "tmpfs", "o": options})
    return Mount(target=target, source=None, type="volume", no_copy=True, driver_config=driver)
