"""Run an MCP server and kill the processes that it leaves behind: `keeper.py COMMAND [ARGUMENT...]`.

This script uses only the standard library. The server inherits standard input and output, which carry the protocol. All
its processes are killed when it ends, on SIGTERM, when the harness closes standard input (after a moment to exit on its
own) and, on Linux, when the harness dies in any way. On Linux every descendant is found, including daemons; elsewhere
only the process group.

When the server has ended, the last lines of its standard error are written to ours, with its exit status if not 0.
"""

from __future__ import annotations

import math
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress

GRACE_S = 1.0  # time for the server to exit after its standard input closes
TERM_S = 0.5  # time to exit after SIGTERM, which follows
TAIL_BYTES = 4096
PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36
LINUX = sys.platform == "linux"


def keep(argv: list[str]) -> int:
    """Run the server to its end, kill the processes that it leaves, and return its exit status."""
    terminated: list[int] = []
    woken, wakeup = os.pipe()
    os.set_blocking(wakeup, False)
    signal.set_wakeup_fd(wakeup, warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.signal(signal.SIGTERM, lambda number, _: terminated.append(number))
    if LINUX:
        _die_with_the_harness()
    try:
        server = subprocess.Popen(argv, stderr=subprocess.PIPE)
    except OSError as error:
        sys.stderr.write(f"{argv[0]}: {error.strerror}\n")
        return 127
    assert server.stderr is not None
    stderr = server.stderr.fileno()
    os.set_blocking(stderr, False)
    poll = select.poll()
    poll.register(0, 0)  # reports only that the other end is closed; the bytes are the server's
    poll.register(woken, select.POLLIN)
    poll.register(stderr, select.POLLIN)
    tail, deadline, asked = b"", math.inf, False
    while server.poll() is None and not terminated:
        left = deadline - time.monotonic()
        if left <= 0:
            if asked:
                break
            server.terminate()
            deadline, asked = time.monotonic() + TERM_S, True
            continue
        for ready, _ in poll.poll(None if left == math.inf else left * 1000):
            if ready == 0:
                poll.unregister(0)
                deadline = time.monotonic() + GRACE_S
            elif ready == woken:
                os.read(woken, 512)
                _reap_all_but(server.pid)
            else:
                chunk = os.read(stderr, 65536)
                tail = (tail + chunk)[-TAIL_BYTES:]
                if not chunk:
                    poll.unregister(stderr)
    status = server.poll()
    if LINUX:
        _kill_descendants()
    with suppress(BlockingIOError):
        while chunk := os.read(stderr, 65536):
            tail = (tail + chunk)[-TAIL_BYTES:]
    sys.stderr.buffer.write(tail)
    if status:
        ending = f"exited with status {status}" if status > 0 else f"was killed by signal {-status}"
        sys.stderr.write(f"{os.path.basename(argv[0])} {ending}\n")
    sys.stderr.flush()
    if not LINUX:
        os.killpg(0, signal.SIGKILL)  # this process too
    return status or 0


def _kill_descendants() -> None:
    """Kill our children until there are none: when one dies, its own children become ours."""
    while True:
        for pid in _children():
            with suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        try:
            os.waitpid(-1, 0)
        except ChildProcessError:
            return


def _reap_all_but(server: int) -> None:
    """Reap orphans that have ended; the server's own status is for `Popen`."""
    peek = os.WEXITED | os.WNOHANG | os.WNOWAIT
    with suppress(ChildProcessError):
        while (ended := os.waitid(os.P_ALL, 0, peek)) and ended.si_pid != server:
            os.waitpid(ended.si_pid, 0)


def _children() -> Iterator[int]:
    me = str(os.getpid())
    for entry in os.listdir("/proc"):
        with suppress(OSError):
            if entry.isdigit():
                with open(f"/proc/{entry}/stat", encoding="utf-8", errors="replace") as stat:
                    if stat.read().rpartition(")")[2].split()[1] == me:
                        yield int(entry)


def _die_with_the_harness() -> None:
    import ctypes

    libc = ctypes.CDLL(None)
    libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    libc.prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)


if __name__ == "__main__":
    sys.exit(keep(sys.argv[1:]))
