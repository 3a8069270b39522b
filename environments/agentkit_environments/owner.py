"""Owner tokens: identify the process that made a sandbox, so that the sandboxes of dead processes can be found."""

from __future__ import annotations

import os
import re
from pathlib import Path


def owner_token() -> str:
    """Return `machine/pid/start` for this process; the machine part identifies this boot and this PID namespace."""
    return f"{_machine()}/{os.getpid()}/{_start_ticks(os.getpid())}"


def is_orphan(token: str) -> bool:
    """Return whether the process of `token` ran on this machine and is gone.

    False for a token of another machine, and for text that is not a token.
    """
    match = re.fullmatch(r"([^/]+)/([0-9]{1,10})/([0-9]+)", token)
    return match is not None and match[1] == _machine() and _start_ticks(int(match[2])) != match[3]


def _machine() -> str:
    boot_id = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot_id}-{os.stat('/proc/self/ns/pid').st_ino}"


def _start_ticks(pid: int) -> str:
    """Return the process's start time in clock ticks since boot, or an empty string if there is no such process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return ""
