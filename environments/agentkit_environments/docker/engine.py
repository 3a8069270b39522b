"""The Docker engine: connecting to it, its images, and removing containers of dead harnesses.

Every container and network is labelled with its run and its owner, so that `reap_docker` finds those that outlived a
killed engine or harness.
"""

from __future__ import annotations

import contextlib
import os
import socket
import time

import docker
import requests
from docker.errors import APIError, DockerException, ImageNotFound, NotFound
from docker.models.images import Image
from docker.utils import parse_host

from agentkit_environments.errors import ImageMissingError, SandboxLostError, SandboxUnavailableError
from agentkit_environments.owner import is_orphan

BASE_IMAGE = "agentkit-base:latest"
BUILD_HINT = "build it with `python -m agentkit_environments.images`"
RUN_LABEL, OWNER_LABEL = "agentkit.run", "agentkit.owner"
API_TIMEOUT_S = 60


def connect() -> docker.DockerClient:
    """Return a client of the engine at DOCKER_HOST, or of the local one.

    Raises:
        SandboxUnavailableError: If no engine answers.
    """
    try:
        host = str(parse_host(os.environ.get("DOCKER_HOST")))
        if host.startswith("http+unix://"):
            # Probe with a socket of our own: the docker library leaks its socket when nothing listens.
            with socket.socket(socket.AF_UNIX) as probe:
                probe.connect(host.removeprefix("http+unix://"))
        return docker.from_env(timeout=API_TIMEOUT_S, max_pool_size=64)
    except (DockerException, OSError) as error:
        raise SandboxUnavailableError(
            f"no Docker engine answers ({error}). Start one (`systemctl start docker`, or `dockerd &` as root), point "
            "DOCKER_HOST at one, or use the process backend"
        ) from error


def is_podman(client: docker.DockerClient) -> bool:
    """Return whether the engine is Podman behind Docker's interface."""
    return any(part["Name"].startswith("Podman") for part in client.version().get("Components") or ())


def docker_failure(image: str | None = None) -> str | None:
    """Return the reason why no container of `image` (None: the base image) can be opened here, or None if one can.

    An image other than the base image may still have to be pulled.
    """
    try:
        client = connect()
    except SandboxUnavailableError as error:
        return str(error)
    try:
        if image is None:
            require_image(client, None)
    except SandboxUnavailableError as error:
        return str(error)
    finally:
        client.close()
    return None


def require_image(client: docker.DockerClient, image: str | None) -> Image:
    """Return an image (None: the base image), which is pulled if it is missing. Raises SandboxUnavailableError, or
    ImageMissingError if it cannot be pulled."""
    name = image or BASE_IMAGE
    try:
        return client.images.get(name)
    except ImageNotFound:
        if image is None:
            raise SandboxUnavailableError(f"the base image {BASE_IMAGE} is missing: {BUILD_HINT}") from None
        try:
            client.images.pull(name)
            return client.images.get(name)
        except (DockerException, requests.RequestException) as error:
            raise ImageMissingError(f"image {name} is missing and could not be pulled: {error}") from error
    except (DockerException, requests.RequestException) as error:
        raise SandboxUnavailableError(f"image {name} cannot be used: {error}") from error


def reap_docker(run_id: str | None) -> int:
    """Remove the containers, networks and volumes of `run_id`, or of every dead harness of this machine.

    Returns:
        The number of containers.
    """
    try:
        client = connect()
    except SandboxUnavailableError:
        return 0
    try:
        label = RUN_LABEL if run_id is None else f"{RUN_LABEL}={run_id}"
        count, failures = 0, list[SandboxLostError]()
        for container in client.api.containers(all=True, filters={"label": label}):
            if run_id is not None or is_orphan(container["Labels"].get(OWNER_LABEL, "")):
                try:
                    remove_container(client, container["Id"])
                    count += 1
                except SandboxLostError as error:  # go on with the other containers
                    failures.append(error)
        for network in client.api.networks(filters={"label": label}):
            if run_id is not None or is_orphan((network["Labels"] or {}).get(OWNER_LABEL, "")):
                with contextlib.suppress(DockerException, requests.RequestException):  # another process removes it
                    remove_network(client, network["Id"])
        for volume in client.api.volumes(filters={"label": label})["Volumes"] or ():
            if run_id is not None or is_orphan(volume["Labels"].get(OWNER_LABEL, "")):
                with contextlib.suppress(DockerException, requests.RequestException):  # removed with its container
                    client.api.remove_volume(volume["Name"])
        if failures:
            raise failures[0]
        return count
    finally:
        client.close()


def remove_network(client: docker.DockerClient, network: str) -> None:
    """Disconnect every container from a network and remove it. Raises errors of the docker library."""
    for container_id in client.api.inspect_network(network).get("Containers") or ():
        with contextlib.suppress(APIError):  # it is gone
            client.api.disconnect_container_from_network(container_id, network, force=True)
    client.api.remove_network(network)


def remove_container(client: docker.DockerClient, container_id: str) -> None:
    """Remove a container and its volumes. It is gone on return, also if another client was removing it."""
    deadline = time.monotonic() + API_TIMEOUT_S
    while time.monotonic() < deadline:
        try:
            client.api.remove_container(container_id, force=True, v=True)
        except NotFound:
            return
        except APIError as error:
            if error.status_code != 409:
                raise SandboxLostError(f"container {container_id[:12]} cannot be removed: {error}") from error
            time.sleep(0.02)
        except (DockerException, requests.RequestException):
            return  # the engine is gone; it removes the container when it returns, or `reap` does
    raise SandboxLostError(f"container {container_id[:12]} could not be removed within {API_TIMEOUT_S} s")
