"""The first step into a process sandbox, outside it still: die with the parent, stop being root, run the launcher.

Run as `python3 -c` with one JSON argument; imports nothing but the standard library. When started as root it also makes
a mount namespace of its own, in which `expose` (the interpreter's prefix, which may lie in a directory that only root
may enter) is reachable for everyone, with nothing else of that directory around it.

    {"parent": 1234, "uid": 1610612741 or null, "expose": ["/root/.pyenv/versions/3.11.7"], "argv": ["bwrap", ...]}
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys

CLONE_NEWNS = 0x00020000
MS_BIND, MS_REC, MS_PRIVATE = 4096, 16384, 1 << 18
PR_SET_PDEATHSIG = 1

libc = ctypes.CDLL(None, use_errno=True)


def check(status: int, what: str) -> None:
    if status != 0:
        raise OSError(ctypes.get_errno(), f"{what}: {os.strerror(ctypes.get_errno())}")


def mount(source: str, target: str, kind: str, flags: int, options: str = "") -> None:
    status = libc.mount(source.encode(), target.encode(), kind.encode(), flags, options.encode())
    check(status, f"mount {source} on {target}")


def closed_ancestor(path: str) -> str | None:
    """Return the topmost directory above `path` that others may not enter."""
    parts = path.split("/")[1:]
    for length in range(1, len(parts)):
        directory = "/" + "/".join(parts[:length])
        if not os.stat(directory).st_mode & 0o001:
            return directory
    return None


def expose(paths: list[str]) -> None:
    """Make each path reachable under its own name, by putting an empty directory over what bars the way."""
    check(libc.unshare(CLONE_NEWNS), "unshare")
    mount("none", "/", "", MS_REC | MS_PRIVATE)
    barred = [(path, closed_ancestor(path), os.open(path, os.O_PATH)) for path in paths]
    for directory in {ancestor for _, ancestor, _ in barred if ancestor is not None}:
        mount("none", directory, "tmpfs", 0, "mode=0755")
    for path, ancestor, fd in barred:
        if ancestor is not None:
            os.makedirs(path, exist_ok=True)
            mount(f"/proc/self/fd/{fd}", path, "", MS_BIND | MS_REC)
        os.close(fd)


def main() -> None:
    request = json.loads(sys.argv[1])
    if request["uid"] is not None:
        expose(request["expose"])
        os.setgroups([])
        os.setresgid(request["uid"], request["uid"], request["uid"])
        os.setresuid(request["uid"], request["uid"], request["uid"])
    check(libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0), "prctl")
    if os.getppid() != request["parent"]:
        raise SystemExit("the harness is gone")
    os.chdir("/")
    os.execvp(request["argv"][0], request["argv"])


if __name__ == "__main__":
    main()
