"""System call filter of the process sandbox: a classic BPF program that the kernel runs at every system call.

The filter is a denylist of calls that no agent's command needs and that have a history of kernel exploits or reach
beyond namespaces: keyrings, io_uring, perf, userfaultfd, fanotify, bpf, reading other processes' memory, mounts,
namespaces, kernel modules, uncommon sockets, and changing the executor's priority or limits. Calls newer than this
table, 32-bit calls and x32 calls fail with ENOSYS.

This module generates the program and `confine.py` installs it before the first command. A filter sees registers only
and cannot follow pointers, so `clone3` (flags in memory) also fails with ENOSYS; C libraries fall back to `clone`.
"""

from __future__ import annotations

import errno
import socket
import struct
from collections.abc import Iterable

AUDIT_ARCH: dict[str, int] = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
ALLOW, ERRNO = 0x7FFF0000, 0x00050000

LOAD, EQUAL, AT_LEAST, ANY_BIT, MASK, RETURN = 0x20, 0x15, 0x35, 0x45, 0x54, 0x06
"""BPF instructions: load a word of `struct seccomp_data`; jump if equal, if >=, if any bit is set; `and`; return."""
NUMBER, ARCH = 0, 4
"""Offsets in `struct seccomp_data`; argument N is at 16 + 8 * N, low half first on these little-endian machines."""

FIRST_UNKNOWN_CALL = 463
"""Calls from Linux 6.13 on; C libraries work without newer calls. x32 calls are above this number too."""
NEW_NAMESPACE = 0x7E020000
"""The `CLONE_NEW*` flags of `clone`."""

SOCKET_FAMILIES = (socket.AF_UNIX, socket.AF_INET, socket.AF_INET6, socket.AF_NETLINK)
SOCKET_TYPES = (socket.SOCK_STREAM, socket.SOCK_DGRAM, socket.SOCK_RAW, socket.SOCK_SEQPACKET)
SOCKET_PROTOCOLS = (0, socket.IPPROTO_ICMP, socket.IPPROTO_TCP, socket.IPPROTO_UDP, socket.IPPROTO_ICMPV6)
"""0 is also NETLINK_ROUTE, which C libraries use to list interfaces; UNIX sockets have no protocol other than 0."""

# Numbers on (x86_64, aarch64); None if the machine has no such call.
FORBIDDEN: dict[str, tuple[int | None, int | None]] = {
    "add_key": (248, 217),
    "request_key": (249, 218),
    "keyctl": (250, 219),
    "perf_event_open": (298, 241),
    "userfaultfd": (323, 282),
    "fanotify_init": (300, 262),
    "fanotify_mark": (301, 263),
    "bpf": (321, 280),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "process_madvise": (440, 440),
    "kcmp": (312, 272),
    "pidfd_getfd": (438, 438),
    "name_to_handle_at": (303, 264),
    "open_by_handle_at": (304, 265),
    "mount": (165, 40),
    "umount2": (166, 39),
    "pivot_root": (155, 41),
    "chroot": (161, 51),
    "open_tree": (428, 428),
    "move_mount": (429, 429),
    "fsopen": (430, 430),
    "fsconfig": (431, 431),
    "fsmount": (432, 432),
    "fspick": (433, 433),
    "mount_setattr": (442, 442),
    "unshare": (272, 97),
    "setns": (308, 268),
    "kexec_load": (246, 104),
    "kexec_file_load": (320, 294),
    "init_module": (175, 105),
    "finit_module": (313, 273),
    "delete_module": (176, 106),
    "reboot": (169, 142),
    "swapon": (167, 224),
    "swapoff": (168, 225),
    "acct": (163, 89),
    "quotactl": (179, 60),
    "quotactl_fd": (443, 443),
    "settimeofday": (164, 170),
    "clock_settime": (227, 112),
    "syslog": (103, 116),
    "sethostname": (170, 161),
    "setdomainname": (171, 162),
    "vhangup": (153, 58),
    "lookup_dcookie": (212, 18),
    "nfsservctl": (180, 42),
    "modify_ldt": (154, None),
    "iopl": (172, None),
    "ioperm": (173, None),
    "uselib": (134, None),
    "sysfs": (139, None),
    "_sysctl": (156, None),
}
"""These fail with EPERM."""

MISSING: dict[str, tuple[int | None, int | None]] = {
    "io_uring_setup": (425, 425),
    "io_uring_enter": (426, 426),
    "io_uring_register": (427, 427),
    "clone3": (435, 435),
    "memfd_secret": (447, 447),
}
"""These fail with ENOSYS: programs probe for them and have a fallback."""

UNACCOUNTED: dict[str, tuple[int | None, int | None]] = {"memfd_create": (319, 279)}
"""ENOSYS where no cgroup bounds the sandbox's memory: no per-process limit counts these bytes."""

INOTIFY: dict[str, tuple[int | None, int | None]] = {"inotify_init": (253, None), "inotify_init1": (294, 26)}
"""ENOSYS where no limit of the user namespace stops the sandbox from using up its user's share."""

SYSV_IPC: dict[str, tuple[int | None, int | None]] = {"shmget": (29, 194), "msgget": (68, 186), "semget": (64, 190)}
"""ENOSYS where neither a cgroup nor a sysctl of the IPC namespace bounds them."""

INIT = 1
"""The executor's process id. It has the same user as the commands, which could otherwise starve it of time or
descriptors."""

ON_INIT: dict[str, tuple[tuple[int, int], dict[int, int]]] = {
    "sched_setscheduler": ((144, 119), {0: INIT}),
    "sched_setparam": ((142, 118), {0: INIT}),
    "sched_setattr": ((314, 274), {0: INIT}),
    "sched_setaffinity": ((203, 122), {0: INIT}),
    "prlimit64": ((302, 261), {0: INIT}),
    "setpriority": ((141, 140), {0: 2, 1: INIT}),
    "ioprio_set": ((251, 30), {0: 3, 1: INIT}),
}
"""These fail with EPERM if an argument has that value: the executor, or every process of the user (2 and 3)."""

CLONE, SOCKET, SOCKETPAIR = (56, 220), (41, 198), (53, 199)


def seccomp_program(machine: str, missing: Iterable[str] = ()) -> bytes:
    """Return the filter as an array of `struct sock_filter`.

    Args:
        machine: One of `AUDIT_ARCH`, as `platform.machine` names it.
        missing: Names from `UNACCOUNTED`, `SYSV_IPC` and `INOTIFY` that also fail with ENOSYS.
    """
    column = ("x86_64", "aarch64").index(machine)
    optional = UNACCOUNTED | SYSV_IPC | INOTIFY
    denials = [(numbers[column], errno.EPERM) for numbers in FORBIDDEN.values()]
    denials += [(numbers[column], errno.ENOSYS) for numbers in MISSING.values()]
    denials += [(optional[name][column], errno.ENOSYS) for name in missing]

    # Every jump skips at most one `return`, so that no offset exceeds its byte.
    program = [_op(LOAD, ARCH), _op(EQUAL, AUDIT_ARCH[machine], 1, 0), _fail(errno.ENOSYS), _op(LOAD, NUMBER)]
    program += [_op(AT_LEAST, FIRST_UNKNOWN_CALL, 0, 1), _fail(errno.ENOSYS)]
    for number, error in denials:
        if number is not None:
            program += [_op(EQUAL, number, 0, 1), _fail(error)]
    for numbers, values in ON_INIT.values():
        checks = [_argument(index) + _op(EQUAL, value, 0, 1) + _fail(errno.EPERM) for index, value in values.items()]
        block = b"".join([*checks, _op(RETURN, ALLOW)])
        program += [_op(EQUAL, numbers[column], 0, len(block) // 8), block]
    clone = [_argument(0), _op(ANY_BIT, NEW_NAMESPACE, 0, 1), _fail(errno.EPERM), _op(RETURN, ALLOW)]
    program += [_op(EQUAL, CLONE[column], 0, len(clone)), *clone]
    for call in (SOCKET, SOCKETPAIR):
        socket_rules = [
            *_one_of(_argument(0), SOCKET_FAMILIES, errno.EAFNOSUPPORT),
            *_one_of(_argument(1) + _op(MASK, 0xF), SOCKET_TYPES, errno.ESOCKTNOSUPPORT),
            *_one_of(_argument(2), SOCKET_PROTOCOLS, errno.EPROTONOSUPPORT),
            _op(RETURN, ALLOW),
        ]
        block = b"".join(socket_rules)
        program += [_op(EQUAL, call[column], 0, len(block) // 8), block]
    program.append(_op(RETURN, ALLOW))
    return b"".join(program)


def _op(code: int, value: int, if_true: int = 0, if_false: int = 0) -> bytes:
    return struct.pack("=HBBI", code, if_true, if_false, value)


def _fail(error: int) -> bytes:
    return _op(RETURN, ERRNO | error)


def _argument(index: int) -> bytes:
    return _op(LOAD, 16 + 8 * index)


def _one_of(load: bytes, values: Iterable[int], error: int) -> list[bytes]:
    """Fail with `error` unless the value that `load` loads is one of `values`."""
    listed = list(values)
    comparisons = [_op(EQUAL, value, len(listed) - index, 0) for index, value in enumerate(listed)]
    return [load, *comparisons, _fail(error)]
