"""The life of one container, in blocking calls."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable
from typing import TypeVar

import requests
import urllib3
from docker.errors import DockerException

from agentkit_environments.docker.engine import connect, remove_container, require_image
from agentkit_environments.docker.exec_stream import ExecStream
from agentkit_environments.docker.hardening import create_container
from agentkit_environments.docker.keeper import Keeper
from agentkit_environments.docker.killing import KILL_COMMAND
from agentkit_environments.docker.loss import why_lost
from agentkit_environments.environment import EnvironmentSpec
from agentkit_environments.errors import SandboxLostError, SandboxUnavailableError

T = TypeVar("T")
ENGINE_ERRORS = (DockerException, requests.RequestException, urllib3.exceptions.HTTPError)
KILL_COMMAND_S = 1.0
"""Seconds to kill one command; after them everything in the container is killed."""


class Container:
    """A running container and the connection that keeps it running."""

    def __init__(self, spec: EnvironmentSpec, run_id: str) -> None:
        """Start a container. Raises SandboxUnavailableError if that fails."""
        self.client = connect()
        self.api = self.client.api
        self._memory_mib = spec.limits.memory_mib
        try:
            self.id = create_container(self.api, require_image(self.client, spec.image), spec, run_id)
        except BaseException:
            self.client.close()
            raise
        self._keeper: Keeper | None = None
        try:
            self._keeper = Keeper(self.api.attach_socket(self.id, params={"stdin": 1, "stdout": 1, "stream": 1}))
            self.api.start(self.id)
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
            raise self._lost(error) from error

    def kill_command(self, cookie: str, user: str, stream: ExecStream) -> None:
        """Kill the command that carries `cookie` and everything it started; its streams have ended on return.

        First a script tries to kill this command alone. A command can resist or delay the script; then everything in
        the container is killed.

        Raises:
            SandboxLostError: If killing everything has no effect either.
        """
        killed = threading.Event()

        def kill() -> None:
            with contextlib.suppress(*ENGINE_ERRORS, OSError):
                argv = ["/bin/sh", "-c", KILL_COMMAND, "sh", cookie]
                with ExecStream(self.api, self.id, argv, b"", "/", {}, user, 1 << 12) as script:
                    if script.pump(deadline, None) and script.exit_code(deadline, None) == 0:
                        killed.set()

        deadline = time.monotonic() + KILL_COMMAND_S
        # The script runs in a thread: the engine gets stuck unless a flooding command is read while it is being killed,
        # and the engine may not answer at all.
        thread = threading.Thread(target=kill, daemon=True)
        thread.start()
        has_ended = stream.pump(deadline, None)
        thread.join(max(0.0, deadline - time.monotonic()))
        if not (has_ended and killed.is_set()):
            self.kill_everything()
            stream.pump(time.monotonic() + KILL_COMMAND_S, None)

    def kill_everything(self) -> None:
        """Kill every process that commands have started. Raises SandboxLostError if that fails."""
        if self._keeper is None or not self._keeper.kill_everything():
            raise self._lost()

    def require_running(self) -> None:
        """Raise SandboxLostError, with the reason, if the container has ended."""
        if self._keeper is None or not self._keeper.answers():
            raise self._lost()

    def _lost(self, error: Exception | None = None) -> SandboxLostError:
        if self._keeper is None:
            return SandboxLostError(f"{self} was closed")
        return why_lost(self.api, self.id, error, self._memory_mib)

    def remove(self) -> None:
        """Kill and remove the container and its volumes, and close the connection to the engine. Safe to call twice."""
        keeper, self._keeper = self._keeper, None
        try:
            remove_container(self.client, self.id)
        finally:
            if keeper is not None:
                keeper.close()
            self.client.close()
