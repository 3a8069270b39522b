"""Last step into a process sandbox: mount what is writable, drop every capability, become the executor.

    python3 -I -S /opt/agentkit/confine.py

Every launcher ends here. This is the first process of the sandbox, in its root directory, with all capabilities over
the sandbox's own namespaces (except with `bwrap-plain`) and none over the host. `process.py` writes the settings,
including the executor. Only the standard library can be imported.
"""

from __future__ import annotations

import binascii
import ctypes
import errno
import json
import marshal
import os
import stat
import struct
import sys
import zlib

TYPE_CHECKING = False  # as in `typing`; importing `typing` would make opening a sandbox a tenth slower
if TYPE_CHECKING:
    from collections.abc import Mapping
    from types import ModuleType
    from typing import Any

HERE = os.path.dirname(__file__)
CLONE_NEWNS = 0x00020000
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_REMOUNT, MS_BIND = 1, 2, 4, 8, 32, 4096
MNT_DETACH = 2
PR_SET_DUMPABLE, PR_SET_SECCOMP, PR_CAPBSET_DROP, PR_SET_NO_NEW_PRIVS = 4, 22, 24, 38
PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL = 47, 4
SECCOMP_MODE_FILTER = 2
LINUX_CAPABILITY_VERSION_3 = 0x20080522

libc = ctypes.CDLL(None, use_errno=True)


def check(status: int, what: str) -> None:
    if status != 0:
        raise OSError(ctypes.get_errno(), f"{what}: {os.strerror(ctypes.get_errno())}")


def mount(source: str, target: str, kind: str, flags: int, options: str = "") -> None:
    status = libc.mount(source.encode(), target.encode(), kind.encode(), flags, options.encode())
    check(status, f"mount {source} on {target}")


def mount_overlay(overlay: Mapping[str, Any]) -> tuple[int, list[str]]:
    """Mount an overlay over the read-only folder at the work directory, with a private layer in memory for changes.

    Returns a descriptor of that layer, which has no path, and the hidden names.
    """
    lower, stage = os.fsencode(overlay["path"]), b"/tmp"  # its own tmpfs is mounted later
    mount("none", "/tmp", "tmpfs", MS_NOSUID | MS_NODEV, overlay["options"])
    upper, work = stage + b"/upper", stage + b"/work"
    os.mkdir(upper)
    os.mkdir(work)
    try:
        os.setxattr(upper, "user.agentkit", b"")
        os.removexattr(upper, "user.agentkit")
    except OSError:
        raise SystemExit("files in memory have no extended attributes: an overlay needs Linux 6.6") from None
    os.lseek(overlay["hidden_fd"], 0, os.SEEK_SET)
    with open(overlay["hidden_fd"], "rb") as file:
        hidden = file.read().split(b"\0")[:-1]
    hide(lower, upper, hidden)
    options = b"lowerdir=%b,upperdir=%b,workdir=%b,userxattr" % (lower, upper, work)
    mount("overlay", overlay["path"], "overlay", MS_NOSUID | MS_NODEV, os.fsdecode(options))
    upper_fd = os.open(upper, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    check(libc.umount2(stage, MNT_DETACH), "umount")
    return upper_fd, [os.fsdecode(name) for name in hidden]


def hide(lower: bytes, upper: bytes, names: list[bytes]) -> None:
    """Create whiteouts in the upper layer, so that the overlay shows nothing at these names. New files can use them."""
    made = {b""}
    for name in names:
        parts = name.split(b"/")
        for length in range(1, len(parts)):
            parent = b"/".join(parts[:length])
            if parent not in made:
                made.add(parent)
                os.mkdir(os.path.join(upper, parent))
        os.mknod(os.path.join(upper, name), stat.S_IFCHR, 0)
    for directory in made:
        path = os.path.join(upper, directory)
        try:
            info = os.lstat(os.path.join(lower, directory))
        except OSError:  # it has been removed meanwhile
            continue
        os.chmod(path, stat.S_IMODE(info.st_mode))
        os.utime(path, ns=(info.st_atime_ns, info.st_mtime_ns))


def write_sysctls(values: Mapping[str, int | str]) -> bool:
    """Write settings of the sandbox's own namespaces; return whether every setting that the kernel has was written."""
    written = True
    for name, value in values.items():
        try:
            with open(f"/proc/sys/{name}", "w") as file:
                file.write(str(value))
        except FileNotFoundError:
            continue
        except OSError:
            written = False
    return written


def limit_namespaces(settings: Mapping[str, Any]) -> list[str]:
    """Mount the directories in memory, set the namespaces' limits and drop all capabilities.

    Returns the names of the resources that stay unlimited.
    """
    for path, options in settings["tmpfs"]:
        mount("none", path, "tmpfs", MS_NOSUID | MS_NODEV, options)
    if not write_sysctls(settings["namespace_limits"]):
        raise SystemExit("/proc/sys/user cannot be written")
    has_ipc_limits = write_sysctls(settings["ipc_limits"])
    # The kernel lets uid 1000 write some of these without any capability.
    mount("/proc/sys", "/proc/sys", "", MS_BIND)
    mount("none", "/proc/sys", "", MS_REMOUNT | MS_BIND | MS_RDONLY | MS_NOSUID | MS_NODEV | MS_NOEXEC)
    for path in filter(os.path.exists, settings["hidden"]):
        mount("/dev/null", path, "", MS_BIND)
    drop_capabilities()
    return [] if has_ipc_limits else ["ipc"]


def drop_capabilities() -> None:
    """Drop every capability, for this process and any program it runs later."""
    capability = 0
    while libc.prctl(PR_CAPBSET_DROP, capability, 0, 0, 0) == 0:
        capability += 1
    if ctypes.get_errno() != errno.EINVAL or capability == 0:
        check(-1, f"prctl capbset_drop {capability}")
    check(libc.prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0), "prctl cap_ambient")
    header, nothing = struct.pack("Ii", LINUX_CAPABILITY_VERSION_3, 0), bytes(24)
    check(libc.capset(header, nothing), "capset")


def install_filter(program: bytes) -> None:
    """Install the system call filter for this process and all its children. It cannot be removed."""

    class Program(ctypes.Structure):
        _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_char_p))

    pointer = ctypes.byref(Program(len(program) // 8, program))
    check(libc.prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, pointer, 0, 0), "prctl seccomp")


def main() -> None:
    with open(f"{HERE}/settings.json") as file:
        settings = json.load(file)
    if os.getpid() != 1 or os.getuid() == 0:
        raise SystemExit(f"the executor must be PID 1 and not root, but it is PID {os.getpid()}, uid {os.getuid()}")
    if settings["proxy"] is not None:
        lend_listener(**settings["proxy"])
    missing = ["ipc", "inotify"]
    if settings["has_capabilities"]:
        # Bubblewrap's mount namespace belongs to an outer user namespace, over which we have no capabilities.
        check(libc.unshare(CLONE_NEWNS), "unshare")
        if settings["overlay"] is not None:
            settings["upper_fd"], settings["hidden_names"] = mount_overlay(settings["overlay"])
        missing = limit_namespaces(settings)
    check(libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "prctl no_new_privs")
    check(libc.prctl(PR_SET_DUMPABLE, 0, 0, 0, 0), "prctl dumpable")
    install_filter(bytes.fromhex(settings["filters"][" ".join(missing)]))
    os.chdir(settings["workdir"])
    for fd in settings["cgroup_fds"]:
        os.set_inheritable(fd, False)

    executor, tree = (load(name, settings["modules"][name]) for name in ("executor", "tree"))
    for name, value in settings["executor_rlimits"].items():
        executor.set_limit(name, value)
    executor.serve(settings, tree)


def lend_listener(fd: int, port: int) -> None:
    """Listen at a port of the sandbox's loopback interface, and send the listening socket to the harness."""
    import socket  # rarely needed, and every sandbox would wait for it

    with socket.socket(fileno=fd) as channel, socket.create_server(("127.0.0.1", port)) as listener:
        socket.send_fds(channel, [b"."], [listener.fileno()])


def load(name: str, code: str) -> ModuleType:
    """Return a module of the package, which is not installed here.

    The harness compiles it with the same interpreter, which saves a tenth of the opening time.
    """
    module = type(sys)(f"agentkit_environments.{name}")
    sys.modules[module.__name__] = module
    exec(marshal.loads(zlib.decompress(binascii.a2b_base64(code))), module.__dict__)
    return module


if __name__ == "__main__":
    main()
