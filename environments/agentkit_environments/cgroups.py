"""Control groups for the commands of a process sandbox: total bounds on memory, processes and CPU time.

    location:  v2: beside the harness's own group, for root or the owner of a delegated subtree
               v1: below the harness's own group, one for each controller
    members:   the commands; the executor stays outside and survives when they run out of memory

The harness makes the groups and opens their `cgroup.procs`. It passes the descriptors to the executor, and each new
command joins through them before its program starts (`executor._become_command`). The kernel checks the rights of the
process that opened the file, so the sandbox needs no rights and cannot see the groups.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from agentkit_environments.environment import ResourceLimits
from agentkit_environments.owner import is_orphan, owner_token

PREFIX = "agentkit-process-"
CPU_PERIOD_US = 100_000
REMOVE_TIMEOUT_S = 2.0


@dataclass(frozen=True, slots=True)
class Hierarchy:
    """A mounted cgroup file system, and this process's group in it."""

    version: int
    controllers: frozenset[str]
    root: Path
    """The mount point."""
    own: Path
    """The directory of this process's group."""

    @property
    def parent(self) -> Path:
        """The directory in which groups for sandboxes are made.

        A v2 group that contains processes cannot have limited children, unless it is the root.
        """
        return self.own if self.version == 1 or self.own == self.root else self.own.parent


def hierarchies(proc: Path = Path("/proc/self")) -> list[Hierarchy]:
    """Return the cgroup file systems that show this process's group."""
    found = []
    try:
        mounts = [line.split(" ") for line in (proc / "mountinfo").read_text().splitlines()]
        memberships = [line.split(":", 2) for line in (proc / "cgroup").read_text().splitlines()]
    except OSError:
        return []
    for fields in mounts:
        kind, _, options = fields[fields.index("-") + 1 :][:3]
        if kind not in ("cgroup", "cgroup2"):
            continue
        for number, names, path in memberships:
            if (kind == "cgroup2") != (number == "0"):
                continue
            if kind == "cgroup" and not set(names.split(",")) <= set(options.split(",")):
                continue
            relative = os.path.relpath(path, fields[3])
            root = Path(re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), fields[4]))
            if relative.split("/")[0] != "..":
                own = root if relative == "." else root / relative
                found.append(Hierarchy(2 if kind == "cgroup2" else 1, frozenset(names.split(",")), root, own))
    return found


class CommandGroup:
    """The groups that hold the commands of one sandbox; empty where none can be made."""

    def __init__(self) -> None:
        self.directories: list[Path] = []
        self.procs_fds: list[int] = []
        self.bounds_memory = False
        self._events: Path | None = None
        self._own_events: Path | None = None
        self._kills_before = 0

    @classmethod
    def create(cls, limits: ResourceLimits, found: list[Hierarchy] | None = None) -> Self:
        """Make the groups that this process is allowed to make. A limit that the kernel refuses is left out."""
        group = cls()
        for hierarchy in hierarchies() if found is None else found:
            group._add(hierarchy, limits)
        return group

    def _add(self, hierarchy: Hierarchy, limits: ResourceLimits) -> None:
        is_v2 = hierarchy.version == 2
        if not is_v2 and not hierarchy.controllers & {"memory", "pids", "cpu"}:
            return
        if not os.access(hierarchy.parent, os.W_OK):
            return
        remove_orphans(hierarchy.parent)
        path = hierarchy.parent / _name(owner_token(), secrets.token_hex(6))
        try:
            if is_v2:
                for controller in ("memory", "pids", "cpu"):
                    _try_write(hierarchy.parent / "cgroup.subtree_control", f"+{controller}")
            path.mkdir()
        except OSError:
            return
        self.directories.append(path)
        memory = _limit(path, ("memory.max", "memory.limit_in_bytes"), str(limits.memory_mib << 20))
        _limit(path, ("memory.swap.max",), "0")
        _limit(path, ("memory.memsw.limit_in_bytes",), str(limits.memory_mib << 20))
        # One more than the sandbox's limit: a forked process waits to become the next command.
        processes = _limit(path, ("pids.max",), str(limits.processes + 1))
        cpu = _limit(path, ("cpu.max",), f"{int(limits.cpus * CPU_PERIOD_US)} {CPU_PERIOD_US}")
        _limit(path, ("cpu.cfs_period_us",), str(CPU_PERIOD_US))
        cpu |= _limit(path, ("cpu.cfs_quota_us",), str(int(limits.cpus * CPU_PERIOD_US)))
        try:
            if not (memory or processes or cpu):
                raise PermissionError(path)
            self.procs_fds.append(os.open(path / "cgroup.procs", os.O_WRONLY | os.O_CLOEXEC))
        except OSError:
            self.directories.remove(path)
            path.rmdir()
            return
        if memory:
            self.bounds_memory = True
            events = "memory.events.local" if is_v2 else "memory.oom_control"
            self._events, self._own_events = path / events, hierarchy.own / events
            self._kills_before = _oom_kills(self._own_events)

    def kills(self) -> int:
        """Return the number of processes that the kernel killed because the commands' memory was used up."""
        return 0 if self._events is None else _oom_kills(self._events)

    def host_failure(self) -> str | None:
        """Return evidence that the host ran out of memory since the group was made, or None.

        The evidence is the counter of the harness's own group, which contains the executor but not the commands.
        Without a bound on the commands' memory there is no evidence, because the commands may have used up the host's
        memory.
        """
        if self._own_events is None or _oom_kills(self._own_events) <= self._kills_before:
            return None
        return "the kernel killed a process of the harness's own control group because the host ran out of memory"

    def close_descriptors(self) -> None:
        """Close `procs_fds`, once the sandbox has its copies."""
        for fd in self.procs_fds:
            os.close(fd)
        self.procs_fds.clear()

    def remove(self) -> None:
        """Remove the groups of a sandbox that has ended. Retries, since its processes may take a moment to leave
        them."""
        self.close_descriptors()
        deadline = time.monotonic() + REMOVE_TIMEOUT_S
        for path in self.directories:
            while not _remove(path) and time.monotonic() < deadline:
                time.sleep(0.002)
        self.directories.clear()


def remove_orphans(parent: Path) -> int:
    """Remove the groups below `parent` that dead harnesses of this machine made; return how many."""
    try:
        names = [name for name in os.listdir(parent) if name.startswith(PREFIX)]
    except OSError:
        return 0
    count = 0
    for name in names:
        with contextlib.suppress(ValueError):  # a name that this package did not make
            if is_orphan(name.removeprefix(PREFIX).rpartition("-")[0].replace("~", "/")):
                count += _remove(parent / name)
    return count


def reap_groups() -> int:
    """Remove the groups that dead harnesses left behind; return how many."""
    return sum(remove_orphans(parent) for parent in {hierarchy.parent for hierarchy in hierarchies()})


def _name(token: str, unique: str) -> str:
    return f"{PREFIX}{token.replace('/', '~')}-{unique}"


def _remove(path: Path) -> bool:
    """Remove one group and return whether it is gone. A group with processes in it cannot be removed."""
    try:
        path.rmdir()
    except FileNotFoundError:
        return True
    except OSError:
        return False
    return True


def _limit(path: Path, names: tuple[str, ...], value: str) -> bool:
    return any(_try_write(path / name, value) for name in names if (path / name).exists())


def _try_write(path: Path, text: str) -> bool:
    with contextlib.suppress(OSError):
        path.write_text(text)
        return True
    return False


def _oom_kills(events: Path) -> int:
    with contextlib.suppress(OSError):
        for line in events.read_text().splitlines():
            if line.startswith("oom_kill "):
                return int(line.split()[1])
    return 0
