"""Root directory of a process sandbox, built without bubblewrap: the step between `unshare` and the executor.

`unshare --map-current-user --keep-caps` runs this file as `python3 -c` with one JSON argument. It is the first process
of fresh user, mount, PID, network, IPC, UTS and cgroup namespaces, with all capabilities over these and none over the
host. It imports only the standard library. It does what bubblewrap does with the same layout: make an empty root, bind
the runtime's directories read-only, mount private /proc and /dev, add mount points for the writable directories, and
leave the old root. Then it becomes `confine.py`, which does the steps that both launchers leave to it.
"""

from __future__ import annotations

import ctypes
import fcntl
import json
import os
import socket
import struct
import sys
from typing import Any

MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC = 1, 2, 4, 8
MS_REMOUNT, MS_BIND, MS_REC, MS_PRIVATE = 32, 4096, 16384, 1 << 18
MNT_DETACH = 2
SYS_MOUNT_SETATTR = 442
AT_FDCWD, AT_RECURSIVE = -100, 0x8000
MOUNT_ATTR_RDONLY, MOUNT_ATTR_NOSUID, MOUNT_ATTR_NODEV = 1, 2, 4
SIOCGIFFLAGS, SIOCSIFFLAGS, IFF_UP = 0x8913, 0x8914, 1
DEVICES = ("null", "zero", "full", "random", "urandom", "tty")
ROOT = "/tmp"  # a mount point on every machine; the new root is mounted over it in this namespace only

libc = ctypes.CDLL(None, use_errno=True)


def check(status: int, what: str) -> None:
    if status != 0:
        raise OSError(ctypes.get_errno(), f"{what}: {os.strerror(ctypes.get_errno())}")


def mount(source: str, target: str, kind: str, flags: int, options: str = "") -> None:
    status = libc.mount(source.encode(), target.encode(), kind.encode(), flags, options.encode())
    check(status, f"mount {source} on {target}")


def read_only(target: str) -> None:
    """Make a mount and everything below it read-only, and disable set-user-id programs and devices."""
    attributes = struct.pack("QQQQ", MOUNT_ATTR_RDONLY | MOUNT_ATTR_NOSUID | MOUNT_ATTR_NODEV, 0, 0, 0)
    arguments = (AT_FDCWD, target.encode(), AT_RECURSIVE, attributes, ctypes.c_size_t(len(attributes)))
    check(libc.syscall(SYS_MOUNT_SETATTR, *arguments), f"mount_setattr {target}")


def bind(source: str, target: str) -> None:
    if os.path.isdir(source):
        os.makedirs(target, exist_ok=True)
    else:
        os.makedirs(os.path.dirname(target), exist_ok=True)
        os.close(os.open(target, os.O_CREAT, 0o644))
    mount(source, target, "", MS_BIND | MS_REC)


def build(layout: dict[str, Any]) -> None:
    """Mount the sandbox's root on `ROOT`."""
    mount("none", "/", "", MS_REC | MS_PRIVATE)
    # The new root hides the host's /tmp, which may contain paths to bind: open them all first.
    binds = {target: os.open(source, os.O_PATH) for source, target in layout["binds"]}
    devices = {f"/dev/{name}": os.open(f"/dev/{name}", os.O_PATH) for name in DEVICES}
    mount("none", ROOT, "tmpfs", MS_NOSUID | MS_NODEV, "mode=0755")
    mkdir("/dev")
    mount("none", ROOT + "/dev", "tmpfs", MS_NOSUID, "mode=0755,size=64k")
    for path, fd in (binds | devices).items():
        bind(f"/proc/self/fd/{fd}", ROOT + path)
        if path in binds:
            read_only(ROOT + path)
        os.close(fd)
    for name, number in (("stdin", 0), ("stdout", 1), ("stderr", 2)):
        os.symlink(f"/proc/self/fd/{number}", f"{ROOT}/dev/{name}")
    os.symlink("/proc/self/fd", ROOT + "/dev/fd")
    os.symlink("pts/ptmx", ROOT + "/dev/ptmx")
    mkdir("/dev/pts")
    mount("devpts", ROOT + "/dev/pts", "devpts", MS_NOSUID | MS_NOEXEC, "newinstance,ptmxmode=0666,mode=620")
    mkdir("/proc")
    mount("proc", ROOT + "/proc", "proc", MS_NOSUID | MS_NODEV | MS_NOEXEC)
    for path in layout["directories"]:
        mkdir(path)
    for path, text in layout["files"]:
        mkdir(os.path.dirname(path))
        with open(ROOT + path, "w") as file:
            file.write(text)
    for path, target in layout["symlinks"]:
        mkdir(os.path.dirname(path))
        os.symlink(target, ROOT + path)


def mkdir(path: str) -> None:
    os.makedirs(ROOT + path, exist_ok=True)


def enter_root() -> None:
    """Make `ROOT` the root directory, detach the old one, and close descriptors that are open for writing."""
    os.chdir(ROOT)
    check(libc.pivot_root(b".", b"."), "pivot_root")
    check(libc.umount2(b".", MNT_DETACH), "umount of the old root")
    os.chdir("/")
    for path in ("/dev", "/"):
        mount("none", path, "", MS_REMOUNT | MS_BIND | MS_RDONLY | MS_NOSUID | (MS_NODEV if path == "/" else 0))


def loopback_up() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        request = fcntl.ioctl(control, SIOCGIFFLAGS, struct.pack("16sh14x", b"lo", 0))
        flags = struct.unpack("16sh14x", request)[1]
        fcntl.ioctl(control, SIOCSIFFLAGS, struct.pack("16sh14x", b"lo", flags | IFF_UP))


def main() -> None:
    layout = json.loads(sys.argv[1])
    socket.sethostname(layout["hostname"])
    loopback_up()
    build(layout)
    enter_root()
    os.execv(layout["argv"][0], layout["argv"])


if __name__ == "__main__":
    main()
