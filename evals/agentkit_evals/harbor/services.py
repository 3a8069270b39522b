"""The services of a task, started beside the agent's sandbox."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

import anyio.to_thread

from agentkit.harbor import HarborConfig, ServiceConfig, ServiceHealthcheck
from agentkit_environments import Environment
from agentkit_environments.folder import image_tag, pack_folder
from agentkit_evals.harbor.artifacts import one_file
from agentkit_evals.harbor.sandbox import filled_in

if TYPE_CHECKING:
    from agentkit_environments.docker.services import ServiceSpec


@contextlib.asynccontextmanager
async def services_beside(config: HarborConfig, environment: Environment) -> AsyncIterator[None]:
    """Start the services of a task and connect its open sandbox to them; they are removed at the end.

    Raises:
        TaskSetupError: a variable that a service takes from this machine is not set.
        ServiceError: a service ended, became unhealthy, or was not ready in time.
        SandboxUnavailableError: an image cannot be built or pulled, or the engine fails.
    """
    if not config.services:
        yield
        return
    from agentkit_environments.docker import DockerEnvironment, open_services  # the docker library takes long to import

    assert isinstance(environment, DockerEnvironment), "other backends refuse a task with an image"
    specs = [await _spec(config, service, environment) for service in config.services]
    async with open_services(environment, specs, config.wait_for):
        yield


async def _spec(config: HarborConfig, service: ServiceConfig, environment: Environment) -> ServiceSpec:
    from agentkit_environments.docker import ServiceSpec, build_image

    if service.build is not None:
        build = partial(build_image, service.build.folder, service.build.sha256, timeout_s=service.build.timeout_s)
        await anyio.to_thread.run_sync(build)
    return ServiceSpec(
        name=service.name,
        image=image_tag(service.build.sha256) if service.build else str(service.image),
        limits=environment.spec.limits,
        command=service.command,
        entrypoint=service.entrypoint,
        env=filled_in(service.env),
        healthcheck=_healthcheck(service.healthcheck),
        depends_on=service.depends_on,
        volumes=service.volumes,
        files=[_packed(target, Path(config.folder, place)) for target, place in service.files.items()],
    )


def _healthcheck(check: ServiceHealthcheck | None) -> dict[str, Any] | None:
    """Return a health check with the engine's names and units."""
    if check is None:
        return None
    seconds = {"interval": check.interval_s, "timeout": check.timeout_s, "start_period": check.start_period_s}
    times = {key: int(value * 1e9) for key, value in seconds.items() if value is not None}
    return {"test": check.test, **times, **({} if check.retries is None else {"retries": check.retries})}


def _packed(target: str, path: Path) -> tuple[str, bytes]:
    """Return the folder and the archive to unpack there, so that a file or folder of the task is at `target`."""
    if path.is_dir():
        return target, pack_folder(path)
    place = PurePosixPath(target)
    return str(place.parent), one_file(place.name, path.read_bytes())
