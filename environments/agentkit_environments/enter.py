"""First step into a process sandbox, still outside it: die with the parent, drop root, leave the session keyring, and
run the launcher.

    python3 -I -S enter.py PARENT_PID UID EXPOSE FOLDER COMMAND [ARGUMENT ...]

UID is the uid to change to, or `-` to stay. EXPOSE is a list of paths separated by colons, for a harness that runs as
root. Each path (the interpreter's prefix, which may be in a directory that only root can enter) becomes reachable for
every user, in a mount namespace of its own and without the rest of that directory. FOLDER, or `-` for none, becomes
reachable in the same way; in its mount, UID owns everything that FOLDER's owner owns. This file imports as little of
the standard library as it can, because every sandbox waits for it to start.
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct
import sys

CLONE_NEWNS, CLONE_NEWUSER = 0x00020000, 0x10000000
MS_BIND, MS_REC, MS_PRIVATE = 4096, 16384, 1 << 18
PR_SET_PDEATHSIG, SIGKILL = 1, 9
KEYCTL_JOIN_SESSION_KEYRING = 1
SYS_KEYCTL = {"x86_64": 250, "aarch64": 219}
SYS_OPEN_TREE, SYS_MOVE_MOUNT, SYS_MOUNT_SETATTR = 428, 429, 442
AT_FDCWD, AT_EMPTY_PATH, OPEN_TREE_CLONE, MOVE_MOUNT_F_EMPTY_PATH = -100, 0x1000, 1, 4
MOUNT_ATTR_IDMAP = 0x00100000
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


def user_namespace(uids: str, gids: str) -> int:
    """Return a descriptor of a new user namespace with these maps."""
    made_read, made_write = os.pipe()
    kept_read, kept_write = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(kept_write)
        os.write(made_write, b"1" if libc.unshare(CLONE_NEWUSER) == 0 else b"0")
        os.read(kept_read, 1)  # the pipe ends when the maps are written or the parent is gone
        os._exit(0)
    try:
        if os.read(made_read, 1) != b"1":
            raise OSError(errno.EPERM, "no user namespace can be created")
        for name, text in (("uid_map", uids), ("gid_map", gids)):
            with open(f"/proc/{child}/{name}", "w") as file:
                file.write(text)
        return os.open(f"/proc/{child}/ns/user", os.O_RDONLY | os.O_CLOEXEC)
    finally:
        for fd in (made_read, made_write, kept_read, kept_write):
            os.close(fd)
        os.waitpid(child, 0)


def mapped_tree(folder: str, uid: int) -> int:
    """Return a detached mount of a folder in which `uid` owns everything that the folder's owner and group own."""
    fd = libc.syscall(SYS_OPEN_TREE, AT_FDCWD, os.fsencode(folder), OPEN_TREE_CLONE | os.O_CLOEXEC)
    check(min(fd, 0), f"open_tree {folder}")
    owner = os.fstat(fd)
    namespace = user_namespace(f"{owner.st_uid} {uid} 1", f"{owner.st_gid} {uid} 1")
    attributes = struct.pack("QQQQ", MOUNT_ATTR_IDMAP, 0, 0, namespace)
    status = libc.syscall(SYS_MOUNT_SETATTR, fd, b"", AT_EMPTY_PATH, attributes, ctypes.c_size_t(len(attributes)))
    check(status, f"idmapped mount of {folder}")
    os.close(namespace)
    return int(fd)


def expose(paths: list[str], folder: str | None, uid: int) -> None:
    """Make each path reachable under its own name, by mounting an empty directory over the closed one above it."""
    check(libc.unshare(CLONE_NEWNS), "unshare")
    mount("none", "/", "", MS_REC | MS_PRIVATE)
    tree = -1 if folder is None else mapped_tree(folder, uid)
    barred = [(path, closed_ancestor(path), os.open(path, os.O_PATH)) for path in paths]
    closed = {closed_ancestor(path) for path in (*paths, *([folder] if folder else []))}
    for directory in sorted(filter(None, closed)):
        mount("none", directory, "tmpfs", 0, "mode=0755")
    for path, ancestor, fd in barred:
        if ancestor is not None:
            os.makedirs(path, exist_ok=True)
            mount(f"/proc/self/fd/{fd}", path, "", MS_BIND | MS_REC)
        os.close(fd)
    if folder is not None:
        os.makedirs(folder, exist_ok=True)
        status = libc.syscall(SYS_MOVE_MOUNT, tree, b"", AT_FDCWD, os.fsencode(folder), MOVE_MOUNT_F_EMPTY_PATH)
        check(status, f"move_mount on {folder}")
        os.close(tree)


def leave_session_keyring() -> None:
    """Join a new, empty session keyring. The harness's keys are then out of reach, also in `/proc/keys`."""
    status = libc.syscall(SYS_KEYCTL[os.uname().machine], KEYCTL_JOIN_SESSION_KEYRING, None)
    # EPERM and ENOSYS: there are no keyrings here, for the harness neither. EDQUOT: the sandbox's filter still forbids
    # `keyctl`.
    if status == -1 and ctypes.get_errno() not in (errno.EPERM, errno.ENOSYS, errno.EDQUOT):
        check(-1, "keyctl join_session_keyring")


def main() -> None:
    parent, uid, paths, folder, *command = sys.argv[1:]
    with open("/proc/self/oom_score_adj", "r+") as file:
        if int(file.read()) < OOM_SCORE_ADJ:
            file.write(str(OOM_SCORE_ADJ))  # written by root, this is also the minimum for commands
    if uid != "-":
        expose(paths.split(":"), None if folder == "-" else folder, int(uid))
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
