"""Services beside a sandbox: containers on a private network, which the sandbox joins under the name `main`.

Services run in their image as it is, with the restrictions of a sandbox `as_image`, and publish no ports. Without a
network of its own, the sandbox reaches only them, and they reach only it and each other.
"""

from __future__ import annotations

import contextlib
import io
import secrets
import tarfile
import time
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import anyio
import anyio.from_thread
import anyio.to_thread
from docker.types import LogConfig

from agentkit_environments.docker.container import ENGINE_ERRORS
from agentkit_environments.docker.engine import (
    OWNER_LABEL,
    RUN_LABEL,
    connect,
    is_podman,
    remove_container,
    remove_network,
    require_image,
)
from agentkit_environments.docker.environment import DockerEnvironment
from agentkit_environments.docker.hardening import AS_IMAGE_CAPABILITIES, volume_mounts
from agentkit_environments.environment import ResourceLimits, VolumeMount
from agentkit_environments.errors import SandboxUnavailableError, ServiceError
from agentkit_environments.network import PHASES
from agentkit_environments.owner import owner_token

Condition = Literal["service_started", "service_healthy", "service_completed_successfully"]
"""State of another service that a service waits for, in the words of Compose."""

Restart = Literal["no", "always", "unless-stopped", "on-failure"]
"""When a service that has ended is started again, in the words of Compose."""

MAIN = "main"
START_TIMEOUT_S = 600.0
POLL_S = 0.1
MAX_LOG_LINES = 20
NO_HOST = {"com.docker.network.bridge.inhibit_ipv4": "true"}
"""Option of a network on which this machine has no address; on an internal one it otherwise has."""


@dataclass(frozen=True, slots=True)
class ServiceSpec:
    """Specification of one service. None leaves a setting as it is in the image."""

    name: str
    """Host name on the private network."""
    image: str
    limits: ResourceLimits
    """Memory, CPU and processes."""
    command: Sequence[str] | None = None
    entrypoint: Sequence[str] | None = None
    user: str | None = None
    workdir: str | None = None
    env: Mapping[str, str] = field(default_factory=dict)
    healthcheck: Mapping[str, Any] | None = None
    """A health check with the names and units (nanoseconds) of the engine's interface."""
    aliases: Sequence[str] = ()
    """Further host names on the private network."""
    restart: Restart = "no"
    """When the engine starts it again."""
    depends_on: Mapping[str, Condition] = field(default_factory=dict)
    files: Sequence[tuple[str, bytes]] = ()
    """Folders, and the tar archives that are unpacked into them before the start."""
    volumes: Mapping[str, VolumeMount] = field(default_factory=dict)
    """Path in the container -> volume."""


@contextlib.asynccontextmanager
async def open_volumes(run_id: str, names: Iterable[str]) -> AsyncIterator[dict[str, str]]:
    """Make volumes, and remove them at the end, when no container may have them any more.

    Args:
        run_id: Their label, for `reap`.
        names: One per volume.

    Yields:
        Name -> the engine's name.

    Raises:
        SandboxUnavailableError: the engine does not answer, or makes no volume.
    """
    labels, made = {RUN_LABEL: run_id, OWNER_LABEL: owner_token()}, dict[str, str]()
    client = await anyio.to_thread.run_sync(connect)

    def make() -> None:
        for name in names:
            made[name] = client.api.create_volume(labels=labels)["Name"]

    def remove() -> None:
        for volume in made.values():
            with contextlib.suppress(*ENGINE_ERRORS):  # `reap` removes it
                client.api.remove_volume(volume)
        client.close()

    try:
        try:
            await anyio.to_thread.run_sync(make)
        except ENGINE_ERRORS as error:
            raise SandboxUnavailableError(f"the Docker engine makes no volume: {error}") from error
        yield made
    finally:
        with anyio.CancelScope(shield=True):
            await anyio.to_thread.run_sync(remove)


@contextlib.asynccontextmanager
async def open_services(
    environment: DockerEnvironment,
    services: Sequence[ServiceSpec],
    wait_for: Mapping[str, Condition],
    *,
    aliases: Sequence[str] = (),
) -> AsyncIterator[None]:
    """Start services in the given order, connect the sandbox to them, and remove them at the end.

    Args:
        environment: The sandbox.
        services: The services; each comes after those that it depends on.
        wait_for: What the block waits for.
        aliases: Names under which services reach the sandbox, besides `main`.

    Raises:
        ServiceError: a service ended or became unhealthy, or was not ready in time.
        SandboxUnavailableError: an image is missing and cannot be pulled, or the engine fails.
    """
    running = await anyio.to_thread.run_sync(_Services, environment, [MAIN, *aliases])
    environment.services = tuple(each.name for each in services)
    try:
        await anyio.to_thread.run_sync(running.start, services, wait_for)
        yield
    finally:
        with anyio.CancelScope(shield=True):
            await anyio.to_thread.run_sync(running.stop)
        environment.services = ()


class _Services:
    """The network and the containers of one sandbox; blocking calls."""

    def __init__(self, environment: DockerEnvironment, names: Sequence[str]) -> None:
        self._main, self._names = environment.container_id, list(names)
        network = environment.spec.network
        # With another policy in one phase, the services' network must not be a way around it.
        self._is_internal = any(network.policy(phase) != "public" for phase in PHASES)
        self._main_is_alone = not network.is_public
        self._labels = {RUN_LABEL: environment.run_id, OWNER_LABEL: owner_token()}
        self._network = f"agentkit-{secrets.token_hex(8)}"
        self._ids: dict[str, str] = {}
        self._client = connect()
        self._api = self._client.api

    def start(self, services: Sequence[ServiceSpec], wait_for: Mapping[str, Condition]) -> None:
        try:
            if self._is_internal and is_podman(self._client):
                raise SandboxUnavailableError(
                    "with Podman, services and the sandbox would reach this machine: use Docker's engine, or make the "
                    "task's network public in every phase"
                )
            options = NO_HOST if self._is_internal else {}
            self._api.create_network(
                self._network, driver="bridge", internal=self._is_internal, options=options, labels=self._labels
            )
            if self._main_is_alone:  # a container without a network cannot join another one
                self._api.disconnect_container_from_network(self._main, "none")
            self._api.connect_container_to_network(self._main, self._network, aliases=self._names)
            for service in services:
                self._wait(service.depends_on)
                self._start(service)
            self._wait(wait_for)
        except ENGINE_ERRORS as error:
            raise SandboxUnavailableError(f"the Docker engine cannot run the services: {error}") from error

    def stop(self) -> None:
        try:
            for container_id in self._ids.values():
                remove_container(self._client, container_id)
            with contextlib.suppress(*ENGINE_ERRORS):  # the engine is gone, or never had it; else `reap` removes it
                remove_network(self._client, self._network)
        finally:
            self._client.close()

    def _start(self, service: ServiceSpec) -> None:
        image = require_image(self._client, service.image)
        limits = service.limits
        container_id = self._api.create_container(
            str(image.id),
            command=None if service.command is None else [*service.command],
            entrypoint=None if service.entrypoint is None else [*service.entrypoint],
            environment=dict(service.env),
            healthcheck=None if service.healthcheck is None else dict(service.healthcheck),
            host_config=self._api.create_host_config(
                cap_add=sorted(AS_IMAGE_CAPABILITIES),
                cap_drop=["ALL"],
                log_config=LogConfig(type="json-file", config={"max-size": "1m"}),
                mem_limit=limits.memory_mib << 20,
                memswap_limit=limits.memory_mib << 20,
                mounts=volume_mounts(service.volumes),
                nano_cpus=int(limits.cpus * 1e9),
                network_mode=self._network,
                oom_score_adj=500,
                pids_limit=limits.processes,
                restart_policy={"Name": service.restart},
                security_opt=["no-new-privileges:true"],
            ),
            hostname=service.name,
            labels=self._labels,
            user=service.user,
            working_dir=service.workdir,
            networking_config=self._api.create_networking_config(
                {self._network: self._api.create_endpoint_config(aliases=[service.name, *service.aliases])}  # type: ignore[arg-type]
            ),
        )["Id"]
        self._ids[service.name] = container_id
        for folder, archive in service.files:
            self._api.put_archive(container_id, "/", _moved(archive, folder))
        self._api.start(container_id)

    def _wait(self, conditions: Mapping[str, Condition]) -> None:
        """Wait until each service is as it should be. Raises ServiceError."""
        deadline = time.monotonic() + START_TIMEOUT_S
        for name, condition in conditions.items():
            while not self._is_ready(name, condition):
                if time.monotonic() > deadline:
                    raise self._error(name, f"is not {condition.removeprefix('service_')} after {START_TIMEOUT_S:g} s")
                anyio.from_thread.check_cancelled()
                time.sleep(POLL_S)

    def _is_ready(self, name: str, condition: Condition) -> bool:
        state = self._api.inspect_container(self._ids[name])["State"]
        if state["Restarting"]:  # then it is "unhealthy" too
            return condition == "service_started"
        has_ended = state["Status"] in ("exited", "dead")
        if condition == "service_completed_successfully":
            if has_ended and state["ExitCode"] != 0:
                raise self._error(name, f"exited with status {state['ExitCode']}")
            return has_ended
        if condition == "service_started":
            return True
        if has_ended:
            raise self._error(name, f"exited with status {state['ExitCode']} before it was healthy")
        health = state.get("Health", {}).get("Status", "none")
        if health in ("none", "unhealthy"):
            raise self._error(name, "has no health check" if health == "none" else "is unhealthy")
        return bool(health == "healthy")

    def _error(self, name: str, problem: str) -> ServiceError:
        log = self._api.logs(self._ids[name], tail=MAX_LOG_LINES).decode("utf-8", "replace").strip()
        return ServiceError(f"service {name} {problem}; its last output: {log[-2000:] or 'none'}")


def _moved(archive: bytes, folder: str) -> bytes:
    """Return an archive whose entries belong to root and lie below a folder; the engine makes missing folders."""
    out = io.BytesIO()
    with tarfile.open(fileobj=io.BytesIO(archive)) as source, tarfile.open(fileobj=out, mode="w") as target:
        for member in source:
            member.name = f"{folder.strip('/')}/{member.name}"
            member.uid = member.gid = 0
            member.uname = member.gname = ""
            if member.islnk():
                member.linkname = f"{folder.strip('/')}/{member.linkname}"
            target.addfile(member, source.extractfile(member) if member.isreg() else None)
    return out.getvalue()
