"""Choosing a backend, opening an environment, and clearing away what dead harnesses left."""

from __future__ import annotations

import secrets
from typing import Literal, get_args

import anyio.to_thread

from agentkit_environments.cgroups import reap_groups
from agentkit_environments.environment import Backend, Environment, EnvironmentSpec
from agentkit_environments.errors import SandboxUnavailableError
from agentkit_environments.leftovers import reap_local
from agentkit_environments.local import LocalEnvironment
from agentkit_environments.process import ProcessEnvironment, process_failure

DEFAULT_SPEC = EnvironmentSpec()


async def open_environment(
    spec: EnvironmentSpec = DEFAULT_SPEC,
    *,
    backend: Literal["auto", "docker", "process", "unsafe-local"] = "auto",
    run_id: str | None = None,
) -> Environment:
    """Open an environment.

    Args:
        spec: What to open.
        backend: `auto` is docker when an engine answers (and has the base image, if `spec` names no other), else
            process; never unsafe-local, which must be asked for by name.
        run_id: Label of everything the environment makes, for `reap`; a random one by default.

    Raises:
        TypeError, ValueError: If `spec` is no specification, or there is no such backend.
        SandboxUnavailableError: If the backend cannot be used here, or cannot do what `spec` asks; it says why and what
            to do. There is no falling back to less isolation than was asked for.
    """
    if not isinstance(spec, EnvironmentSpec):
        raise TypeError(f"spec must be an EnvironmentSpec, got {spec!r}")
    if backend not in ("auto", *get_args(Backend)):
        raise ValueError(f"backend must be one of auto, {', '.join(get_args(Backend))}, got {backend!r}")
    run_id = run_id or secrets.token_hex(6)
    if backend == "unsafe-local":
        return LocalEnvironment(spec, run_id)
    if backend == "auto":
        from agentkit_environments.docker import docker_failure

        needs_docker = spec.image is not None or spec.network != "none"
        failure = await anyio.to_thread.run_sync(docker_failure, spec.image)
        if failure is not None and not needs_docker:
            return await ProcessEnvironment.open(spec, run_id)
        if failure is not None:
            raise SandboxUnavailableError(f"an image or a network needs the docker backend: {failure}")
    if backend == "process":
        return await ProcessEnvironment.open(spec, run_id)
    # Imported when chosen: the docker library alone takes longer to import than a process sandbox to open.
    from agentkit_environments.docker import DockerEnvironment

    return await DockerEnvironment.open(spec, run_id)


def available_backends() -> dict[str, str | None]:
    """Return every backend with None when it can be used here, else with the reason why not and what to do.

    Blocks: it asks the Docker engine, and the first time opens a process sandbox (some 100 ms).
    """
    from agentkit_environments.docker import docker_failure

    return {"docker": docker_failure(), "process": process_failure(), "unsafe-local": None}


async def reap(run_id: str | None = None) -> int:
    """Remove what is left of a run: containers with their volumes, temporary directories, processes.

    Of a process sandbox nothing is left but empty control groups, which do not count: the kernel ends it with the
    harness.

    Args:
        run_id: Remove everything that carries this label, in use or not; None removes what belongs to harnesses of
            this machine that are no longer alive.

    Returns:
        How many environments were removed.
    """
    from agentkit_environments.docker import reap_docker

    await anyio.to_thread.run_sync(reap_groups)
    return await anyio.to_thread.run_sync(reap_docker, run_id) + await anyio.to_thread.run_sync(reap_local, run_id)
