"""The services of a task, started beside the agent's sandbox."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from agentkit.harbor import HarborConfig, ServiceConfig, ServiceHealthcheck, VolumeConfig
from agentkit_environments import Environment
from agentkit_environments.environment import VolumeMount
from agentkit_evals.harbor.artifacts import packed_at
from agentkit_evals.harbor.sandbox import built, filled_in

if TYPE_CHECKING:
    from agentkit_environments.docker.services import ServiceSpec


@contextlib.asynccontextmanager
async def volumes_for(config: HarborConfig | None, run_id: str) -> AsyncIterator[dict[str, str]]:
    """Make the volumes of a task, if it has any, and remove them at the end. Yields name -> the engine's name.

    Raises:
        SandboxUnavailableError: the engine makes none.
    """
    mounts = [config.volumes, *(service.volumes for service in config.services)] if config else []
    wanted = {volume.name for each in mounts for volume in each.values()}
    if not wanted:
        yield {}
        return
    from agentkit_environments.docker import open_volumes  # the docker library takes long to import

    async with open_volumes(run_id, wanted) as names:
        yield names


def mounted(volumes: Mapping[str, VolumeConfig], names: Mapping[str, str]) -> dict[str, VolumeMount]:
    """Return volumes, by path in a container, with the engine's names."""
    return {path: VolumeMount(names[each.name], each.read_only) for path, each in volumes.items()}


@contextlib.asynccontextmanager
async def services_beside(
    config: HarborConfig | None, environment: Environment, volumes: Mapping[str, str]
) -> AsyncIterator[None]:
    """Start the services of a task, if it has any, and connect its open sandbox to them; they are removed at the end.

    Args:
        config: The task.
        environment: Its sandbox.
        volumes: The volumes, from `volumes_for`.

    Raises:
        TaskSetupError: a variable that a service takes from this machine is not set.
        ServiceError: a service ended, became unhealthy, or was not ready in time.
        SandboxUnavailableError: an image cannot be built or pulled, or the engine fails.
    """
    if config is None or not config.services:
        yield
        return
    from agentkit_environments.docker import DockerEnvironment, open_services

    assert isinstance(environment, DockerEnvironment), "other backends refuse a task with an image"
    specs = [await _spec(config, service, environment, volumes) for service in config.services]
    async with open_services(environment, specs, config.wait_for, aliases=config.aliases):
        yield


async def _spec(
    config: HarborConfig, service: ServiceConfig, environment: Environment, volumes: Mapping[str, str]
) -> ServiceSpec:
    from agentkit_environments.docker import ServiceSpec

    limits = environment.spec.limits
    return ServiceSpec(
        name=service.name,
        image=str(service.image) if service.build is None else await built(service.build),
        limits=replace(limits, cpus=service.cpus or limits.cpus, memory_mib=service.memory_mib or limits.memory_mib),
        command=service.command,
        entrypoint=service.entrypoint,
        user=service.user,
        workdir=service.workdir,
        env=filled_in(service.env),
        healthcheck=_healthcheck(service.healthcheck),
        aliases=service.aliases,
        restart=service.restart,
        depends_on=service.depends_on,
        volumes=mounted(service.volumes, volumes),
        files=[packed_at(target, Path(config.folder, place)) for target, place in service.files.items()],
    )


def _healthcheck(check: ServiceHealthcheck | None) -> dict[str, Any] | None:
    """Return a health check with the engine's names and units."""
    if check is None:
        return None
    seconds = {"interval": check.interval_s, "timeout": check.timeout_s, "start_period": check.start_period_s}
    times = {key: int(value * 1e9) for key, value in seconds.items() if value is not None}
    return {"test": check.test, **times, **({} if check.retries is None else {"retries": check.retries})}
