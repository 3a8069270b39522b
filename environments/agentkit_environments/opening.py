"""Choosing a backend, opening an environment, and removing leftovers of dead harnesses."""

from __future__ import annotations

import secrets
from contextlib import suppress
from typing import Literal, get_args

import anyio.to_thread

from agentkit_environments.cgroups import reap_groups
from agentkit_environments.environment import Backend, Environment, EnvironmentSpec
from agentkit_environments.errors import SandboxLostError, SandboxUnavailableError
from agentkit_environments.leftovers import reap_local
from agentkit_environments.local import LocalEnvironment
from agentkit_environments.process import ProcessEnvironment, process_failure
from agentkit_environments.snapshot import Snapshot

DEFAULT_SPEC = EnvironmentSpec()
_has_reaped = False


async def open_environment(
    spec: EnvironmentSpec = DEFAULT_SPEC,
    *,
    backend: Literal["auto", "docker", "process", "unsafe-local"] = "auto",
    run_id: str | None = None,
    snapshot: Snapshot | None = None,
) -> Environment:
    """Open an environment. The first container of a process also removes those of dead harnesses of this machine.

    Args:
        spec: The specification of the environment.
        backend: `auto` is docker if an engine answers (and has the base image, if `spec` names no other), else process.
            It is never unsafe-local, which must be requested by name.
        run_id: Label of everything that the environment makes, for `reap`; random by default.
        snapshot: Files to start with, from `Environment.snapshot` or `Snapshot.load`; also from another backend.

    Raises:
        TypeError, ValueError: If `spec` is not an EnvironmentSpec, or no such backend exists.
        SandboxUnavailableError: If the backend cannot be used here, or does not support `spec`; the message gives the
            reason and the remedy. There is no fallback to less isolation than requested.
        SnapshotError: If the snapshot was closed, or its files do not fit into the environment.
    """
    if not isinstance(spec, EnvironmentSpec):
        raise TypeError(f"spec must be an EnvironmentSpec, got {spec!r}")
    if backend not in ("auto", *get_args(Backend)):
        raise ValueError(f"backend must be one of auto, {', '.join(get_args(Backend))}, got {backend!r}")
    run_id = run_id or secrets.token_hex(6)
    if backend == "unsafe-local":
        return await LocalEnvironment.open(spec, run_id, snapshot=snapshot)
    if backend == "auto":
        from agentkit_environments.docker import docker_failure

        needs_docker = spec.image is not None or spec.network.is_public
        failure = await anyio.to_thread.run_sync(docker_failure, spec.image)
        if failure is not None and not needs_docker:
            return await ProcessEnvironment.open(spec, run_id, snapshot=snapshot)
        if failure is not None:
            raise SandboxUnavailableError(f"an image or a public network needs the docker backend: {failure}")
    if backend == "process":
        return await ProcessEnvironment.open(spec, run_id, snapshot=snapshot)
    # Imported on use: importing the docker library takes longer than opening a process sandbox.
    from agentkit_environments.docker import DockerEnvironment

    await _reap_docker_once()
    return await DockerEnvironment.open(spec, run_id, snapshot=snapshot)


async def _reap_docker_once() -> None:
    """Remove what dead harnesses of this machine have left in the Docker engine, if this process has not done so."""
    global _has_reaped
    if _has_reaped:
        return
    _has_reaped = True
    from agentkit_environments.docker import reap_docker

    with suppress(SandboxLostError, OSError):  # the next process tries again
        await anyio.to_thread.run_sync(reap_docker, None)


def available_backends() -> dict[str, str | None]:
    """Return every backend with None if it can be used here, else with the reason and the remedy.

    Blocks: it asks the Docker engine, and opens a process sandbox the first time (about 100 ms).
    """
    from agentkit_environments.docker import docker_failure

    return {"docker": docker_failure(), "process": process_failure(), "unsafe-local": None}


async def reap(run_id: str | None = None) -> int:
    """Remove the leftovers of a run: containers with their volumes, snapshots, temporary directories, processes.

    The kernel ends a process sandbox with its harness. Only empty control groups remain; they are removed but not
    counted.

    Args:
        run_id: Remove everything with this label, even if in use; None removes leftovers of dead harnesses of this
            machine.

    Returns:
        The number of environments removed.
    """
    from agentkit_environments.docker import reap_docker

    await anyio.to_thread.run_sync(reap_groups)
    return await anyio.to_thread.run_sync(reap_docker, run_id) + await anyio.to_thread.run_sync(reap_local, run_id)
