"""The keeper: a container's first program, and the one way into the container that no command can block.

The keeper is a shell that reads its script from a connection that the harness holds open. When the harness dies, even
by SIGKILL, the engine closes the connection, the shell ends, and the engine removes the container and its volumes.

Commands can break a `docker exec`. A command that stops or kills every process of its user also hits the engine's
helper, once the helper runs as that user, and a stopped helper blocks every later exec of the container. The keeper is
already running. It runs as root with CAP_KILL and no other capability, so commands, which have another uid, can neither
signal nor trace it. It kills with shell built-ins, so it needs neither a new process nor memory.
"""

from __future__ import annotations

import secrets
import select
import threading
import time
from typing import Any

from agentkit_environments.docker.exec_stream import Frames, close_socket, raw_socket

ANSWER_TIMEOUT_S = 5.0

# One `kill -1` as root reaches every process except PID 1 and the shell, atomically. The loop catches processes that an
# exec brings in meanwhile.
SCRIPT = rb"""
kill_everything() {
  tries=0
  while :; do
    living=
    kill -KILL -1 2>/dev/null
    for directory in /proc/[0-9]*; do
      case "${directory#/proc/}" in 1|$$) continue;; esac
      { IFS= read -r line <"$directory/stat"; } 2>/dev/null || continue
      case "${line##*) }" in [ZX]*) ;; *) living=1;; esac
    done
    tries=$((tries + 1))
    [ -n "$living" ] && [ "$tries" -lt 10000 ] || break
  done
  [ -z "$living" ]
}
"""


class Keeper:
    """The harness's end of the keeper's connection. Requests run one at a time."""

    def __init__(self, stream: Any) -> None:
        """Take over the connection that `attach_socket` returned."""
        self._stream = stream
        self._socket = raw_socket(stream)
        self._socket.setblocking(False)
        self._frames, self._said = Frames(), b""
        self._lock = threading.Lock()
        self._unsent = SCRIPT

    def kill_everything(self) -> bool:
        """Kill every process of the container except the keeper and PID 1.

        Returns False if some are still alive or the keeper does not answer.
        """
        return self._ask("kill_everything") == "0"

    def answers(self) -> bool:
        """Return whether the keeper answers, and so whether the container runs."""
        return self._ask(":") == "0"

    def close(self) -> None:
        """End the keeper and with it the container."""
        close_socket(self._stream)

    def _ask(self, command: str) -> str | None:
        """Run a command of the keeper's script; return its exit status, or None if no answer comes in time."""
        token = secrets.token_hex(8)
        deadline = time.monotonic() + ANSWER_TIMEOUT_S
        if not self._lock.acquire(timeout=ANSWER_TIMEOUT_S):
            return None
        try:
            self._unsent += f"{command}; echo {token} $?\n".encode()
            while (remaining_s := deadline - time.monotonic()) > 0:
                poll = select.poll()
                poll.register(self._socket, select.POLLIN | (select.POLLOUT if self._unsent else 0))
                for _, event in poll.poll(remaining_s * 1000 + 1):
                    if event & select.POLLOUT:
                        self._unsent = self._unsent[self._socket.send(self._unsent) :]
                    if event & ~select.POLLOUT and not self._receive():
                        return None
                *lines, self._said = self._said.split(b"\n")
                for line in lines:
                    if line.startswith(token.encode()):
                        return line.split()[1].decode()
            return None
        except OSError:  # closed by the engine or by `close`
            return None
        finally:
            self._lock.release()

    def _receive(self) -> bool:
        try:
            chunk = self._socket.recv(1 << 16)
        except (BlockingIOError, InterruptedError):
            return True
        self._said += b"".join(payload for _, payload in self._frames.feed(chunk))
        return bool(chunk)
