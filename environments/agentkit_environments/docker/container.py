"""One container's life, in blocking calls.

Its first program is the keeper, a shell that reads a connection which the harness holds open. When the harness dies,
even by SIGKILL, the engine closes the connection, the shell ends, and the engine removes the container and its volumes.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, TypeVar

import requests
from docker.errors import DockerException

from agentkit_environments.docker.engine import connect, remove_container, require_image
from agentkit_environments.docker.exec_stream import KILL_TIMEOUT_S, ExecStream, close_socket
from agentkit_environments.docker.hardening import create_container
from agentkit_environments.environment import EnvironmentSpec
from agentkit_environments.errors import SandboxError, SandboxLostError, SandboxUnavailableError

T = TypeVar("T")


class Container:
    """A container that runs, and the connection that keeps it running."""

    def __init__(self, spec: EnvironmentSpec, run_id: str) -> None:
        """Start a container. Raises SandboxUnavailableError when that cannot be done."""
        self._client = connect()
        self.api = self._client.api
        try:
            self.id = create_container(self.api, require_image(self._client, spec.image), spec, run_id)
        except BaseException:
            self._client.close()
            raise
        self._keeper: Any = None
        try:
            self._keeper = self.api.attach_socket(self.id, params={"stdin": 1, "stream": 1})
            self.api.start(self.id)
        except (DockerException, requests.RequestException) as error:
            self.remove()
            raise SandboxUnavailableError(f"the container did not start: {error}") from error

    def __str__(self) -> str:
        return f"container {self.id[:12]}"

    def guard(self, function: Callable[[], T]) -> T:
        """Run `function`; what the engine, or the connection to it, says of a dead container is `SandboxLostError`."""
        try:
            return function()
        except (SandboxError, OSError) as error:
            if isinstance(error, requests.RequestException):
                raise SandboxLostError(f"{self}: the Docker engine is gone: {error}") from error
            raise
        except DockerException as error:
            raise SandboxLostError(f"{self} is gone: {error}") from error

    def run_script(self, script: str, arguments: list[str], user: str) -> int:
        """Run a script of ours with /bin/sh; return its exit code."""
        argv = ["/bin/sh", "-c", script, "sh", *arguments]
        with ExecStream(self.api, self.id, argv, b"", "/", {}, user, 1 << 12) as stream:
            if not stream.pump(time.monotonic() + KILL_TIMEOUT_S, None):
                self.remove()
                raise SandboxLostError(f"{self} was removed: its processes could not be killed")
            return stream.exit_code()

    def require_running(self) -> None:
        """Raise SandboxLostError, with the reason, if the container has ended."""
        state = self.api.inspect_container(self.id)["State"]
        if not state["Running"]:
            reason = f"killed for memory at {self.id}" if state["OOMKilled"] else f"exit code {state['ExitCode']}"
            raise SandboxLostError(f"{self} has ended: {reason}")

    def remove(self) -> None:
        """Kill and remove the container and its volumes, and let go of the engine. Safe to call twice."""
        try:
            remove_container(self._client, self.id)
        finally:
            keeper, self._keeper = self._keeper, None
            if keeper is not None:
                close_socket(keeper)
            self._client.close()
