"""The UNIX socket through which a container's executor hands the proxy's listening socket to the harness.

It is mounted into the container, so the engine must see this machine's files. It takes one connection: that of the
executor, which connects before any command runs. After that nobody listens there. Its file stays as long as the
container, because the engine needs the sources of all mounts when it reads and writes archives.
"""

from __future__ import annotations

import os
import socket
import tempfile
from pathlib import Path

from agentkit_environments.leftovers import OWNER_FILE, PREFIX, remove_tree
from agentkit_environments.owner import owner_token
from agentkit_environments.proxy import receive_listener


class Handover:
    """A socket at `path`, in a folder that only this user can enter."""

    def __init__(self, run_id: str) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix=PREFIX)).resolve()
        (self._folder / OWNER_FILE).write_text(f"{owner_token()}\n{run_id}\n")
        self.path = str(self._folder / "proxy")
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.bind(self.path)
        os.chmod(self.path, 0o666)  # in the container, the mount has this mode, and root there may be another user
        self._socket.listen(1)
        self._socket.settimeout(0)

    def receive(self) -> socket.socket:
        """Return the listening socket that the executor has sent, and take no more connections."""
        with self._socket:
            channel, _ = self._socket.accept()
        with channel:
            return receive_listener(channel)

    def close(self) -> None:
        """Remove the socket. Safe to call twice."""
        self._socket.close()
        remove_tree(self._folder)
