"""Who made a sandbox: a token that says whether that process still lives, so that orphans can be told from work."""

from __future__ import annotations

import os
import re
from pathlib import Path


def owner_token() -> str:
    """Return `machine/pid/start` for this process; the machine part is this boot and this PID namespace."""
    return f"{_machine()}/{os.getpid()}/{_start_ticks(os.getpid())}"


def is_orphan(token: str) -> bool:
    """Return whether the process of `token` was of this machine and is gone.

    A token of another machine, or text that is no token, never names an orphan.
    """
    match = re.fullmatch(r"([^/]+)/([0-9]{1,10})/([0-9]+)", token)
    return match is not None and match[1] == _machine() and _start_ticks(int(match[2])) != match[3]


def _machine() -> str:
    boot_id = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot_id}-{os.stat('/proc/self/ns/pid').st_ino}"


def _start_ticks(pid: int) -> str:
    """Return the process's start time in clock ticks since boot, or an empty string when there is none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return ""
