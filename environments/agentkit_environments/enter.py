"""First step into a process sandbox, still outside it: die with the parent, drop root, leave the session keyring, and
run the launcher.

    python3 -I -S enter.py PARENT_PID UID EXPOSE COMMAND [ARGUMENT ...]

UID is the uid to change to, or `-` to stay. EXPOSE is a list of paths separated by colons, for a harness that runs as
root. Each of them (the interpreter's prefix, which may be in a directory that only root can enter) becomes reachable
for every user, in a mount namespace of its own and without the rest of that directory. This file imports as little of
the standard library as it can, because its start-up time adds to that of every sandbox.
"""

from __future__ import annotations

import ctypes
import errno
import os
import sys

CLONE_NEWNS = 0x00020000
MS_BIND, MS_REC, MS_PRIVATE = 4096, 16384, 1 << 18
PR_SET_PDEATHSIG, SIGKILL = 1, 9
KEYCTL_JOIN_SESSION_KEYRING = 1
SYS_KEYCTL = {"x86_64": 250, "aarch64": 219}
OOM_SCORE_ADJ = 500
"""When the host runs out of memory, the kernel kills a sandbox before the harness."""

libc = ctypes.CDLL(None, use_errno=True)


def check(status: int, what: str) -> None:
    if status != 0:
        raise OSError(ctypes.get_errno(), f"{what}: {os.strerror(ctypes.get_errno())}")


def mount(source: str, target: str, kind: str, flags: int, options: str = "") -> None:
    status = libc.mount(source.encode(), target.encode(), kind.encode(), flags, options.encode())
    check(status, f"mount {source} on {target}")


def closed_ancestor(path: str) -> str | None:
    """Return the topmost directory above `path` that other users cannot enter."""
    parts = path.split("/")[1:]
    for length in range(1, len(parts)):
        directory = "/" + "/".join(parts[:length])
        if not os.stat(directory).st_mode & 0o001:
            return directory
    return None


def expose(paths: list[str]) -> None:
    """Make each path reachable under its own name, by mounting an empty directory over the closed one above it."""
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


def leave_session_keyring() -> None:
    """Join a new, empty session keyring. The harness's keys are then out of reach, also in `/proc/keys`."""
    status = libc.syscall(SYS_KEYCTL[os.uname().machine], KEYCTL_JOIN_SESSION_KEYRING, None)
    # EPERM and ENOSYS: there are no keyrings here, for the harness neither. EDQUOT: the sandbox's filter still forbids
    # `keyctl`.
    if status == -1 and ctypes.get_errno() not in (errno.EPERM, errno.ENOSYS, errno.EDQUOT):
        check(-1, "keyctl join_session_keyring")


def main() -> None:
    parent, uid, paths, *command = sys.argv[1:]
    with open("/proc/self/oom_score_adj", "r+") as file:
        if int(file.read()) < OOM_SCORE_ADJ:
            file.write(str(OOM_SCORE_ADJ))  # written by root, this is also the minimum for commands
    if uid != "-":
        expose(paths.split(":"))
        os.setgroups([])
        os.setresgid(int(uid), int(uid), int(uid))
        os.setresuid(int(uid), int(uid), int(uid))
    leave_session_keyring()
    check(libc.prctl(PR_SET_PDEATHSIG, SIGKILL, 0, 0, 0), "prctl")
    if os.getppid() != int(parent):
        raise SystemExit("the harness is gone")
    os.chdir("/")
    os.execvp(command[0], command)


if __name__ == "__main__":
    main()
