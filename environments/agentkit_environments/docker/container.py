"""The life of one container, in blocking calls."""

from __future__ import annotations

import io
import socket
import tarfile
from collections.abc import Callable
from typing import Any, TypeVar

import requests
import urllib3
from docker.errors import DockerException

from agentkit_environments.docker.engine import connect, is_podman, remove_container, require_image
from agentkit_environments.docker.executor import ARCHITECTURES, executor_program
from agentkit_environments.docker.handover import Handover
from agentkit_environments.docker.hardening import AGENT_ID, EXECUTOR, create_container
from agentkit_environments.docker.loss import why_lost
from agentkit_environments.environment import EnvironmentSpec
from agentkit_environments.errors import SandboxLostError, SandboxUnavailableError

T = TypeVar("T")
ENGINE_ERRORS = (DockerException, requests.RequestException, urllib3.exceptions.HTTPError)


class Container:
    """A running container whose first program is the executor.

    The executor ends with the connection `stream`, which carries its standard streams. If the harness dies, even by
    SIGKILL, the engine closes the connection and removes the container with its volumes.
    """

    stream: Any = None
    """The attached connection, as the docker library returns it."""

    handover: Handover | None = None
    """The socket for the listening socket of the proxy, if a phase has an allowlist."""

    def __init__(self, spec: EnvironmentSpec, run_id: str) -> None:
        """Start a container. Raises SandboxUnavailableError if that fails."""
        self.client = connect()
        self.api = self.client.api
        self._memory_mib = spec.limits.memory_mib
        self._is_removed = False
        self._is_public, self._networks = spec.network.is_public, list[str]()
        try:
            if spec.network.has_allowlist and not self.api.base_url.startswith("http+docker"):
                raise SandboxUnavailableError(
                    f"a network allowlist needs a Docker engine on this machine, but DOCKER_HOST is {self.api.base_url}"
                )
            image = require_image(self.client, spec.image)
            architecture = image.attrs["Architecture"]
            if architecture not in ARCHITECTURES:
                raise SandboxUnavailableError(
                    f"image {spec.image} is for {architecture}; the docker backend has an executor for "
                    f"{' and '.join(ARCHITECTURES)}"
                )
            self.env = dict(each.partition("=")[::2] for each in image.attrs["Config"].get("Env") or ())
            self.is_podman = is_podman(self.client)
            self.image_id = str(image.id)
            if spec.network.has_allowlist:
                self.handover = Handover(run_id)
            proxy_socket = None if self.handover is None else self.handover.path
            self.id = create_container(
                self.api,
                self.image_id,
                spec,
                run_id,
                in_volumes=not self.is_podman,
                proxy_socket=proxy_socket,
            )
        except BaseException:
            if self.handover is not None:
                self.handover.close()
            self.client.close()
            raise
        try:
            # Through the engine, and not as a bind mount: the engine may not see the harness's files, because it is
            # remote, in a virtual machine, or because the harness itself runs in a container; and SELinux forbids
            # containers to run files of a user's home.
            folder, _, name = EXECUTOR.rpartition("/")
            self.api.put_archive(self.id, folder, _archive(name, 0, executor_program(architecture)))
            self.stream = self.api.attach_socket(self.id, params={"stdin": 1, "stdout": 1, "stderr": 1, "stream": 1})
            self.api.start(self.id)
            self.set_public(spec.network.setup == "public")
            if self.is_podman and not spec.as_image:
                self.api.put_archive(self.id, spec.workdir, _archive(".", AGENT_ID))  # this changes its owner
        except ENGINE_ERRORS as error:
            self.remove()
            raise SandboxUnavailableError(f"the container did not start: {error}") from error

    def __str__(self) -> str:
        return f"container {self.id[:12]}"

    def guard(self, function: Callable[[], T]) -> T:
        """Run `function`; if the engine fails, raise SandboxLostError or HostFailureError with the reason."""
        try:
            return function()
        except ENGINE_ERRORS as error:
            raise self.lost(error) from error

    def set_public(self, is_public: bool) -> None:
        """Disconnect the container from the engine's network, or connect it again."""
        if is_public == self._is_public:
            return
        if not is_public:
            networks = self.api.inspect_container(self.id)["NetworkSettings"]["Networks"]
            # An internal network, which leads to the services of a task and no further, stays.
            self._networks = [each for each in networks if not self.api.inspect_network(each)["Internal"]]
        change = self.api.connect_container_to_network if is_public else self.api.disconnect_container_from_network
        for network in self._networks:
            change(self.id, network)
        self._is_public = is_public

    def require_running(self) -> None:
        """Raise SandboxLostError, with the reason, if the container has ended."""
        if not self.api.inspect_container(self.id)["State"]["Running"]:
            raise self.lost()

    def lost(self, error: Exception | None = None) -> SandboxLostError:
        """Return the error for a container whose request failed with `error`, or whose connection ended (None)."""
        if self._is_removed:
            return SandboxLostError(f"{self} was closed")
        return why_lost(self.api, self.id, error, self._memory_mib)

    def remove(self) -> None:
        """Kill and remove the container and its volumes, and close the connection to the engine. Safe to call twice."""
        self._is_removed = True
        try:
            remove_container(self.client, self.id)
        finally:
            if self.handover is not None:
                self.handover.close()
            if self.stream is not None:
                close_stream(self.stream)
            self.client.close()


def close_stream(stream: Any) -> None:
    """Close a connection from the docker library and its response. Safe to call twice."""
    raw = raw_socket(stream)
    response = getattr(stream, "_response", None)
    if response is not None:
        response.close()
    stream.close()
    raw.close()


def raw_socket(stream: Any) -> socket.socket:
    """Return the socket of a docker library connection: inside a `SocketIO` for a local engine, the object itself
    for TLS."""
    raw: socket.socket = getattr(stream, "_sock", stream)
    return raw


def _archive(name: str, uid: int, program: bytes | None = None) -> bytes:
    """Return a tar archive of one program, or of one directory (None)."""
    member = tarfile.TarInfo(name)
    member.type = tarfile.DIRTYPE if program is None else tarfile.REGTYPE
    member.size, member.mode, member.uid, member.gid = len(program or b""), 0o755, uid, uid
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        archive.addfile(member, io.BytesIO(program or b""))
    return out.getvalue()
