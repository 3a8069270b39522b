"""The system call filter, run by a small interpreter of classic BPF, for both machines."""

from __future__ import annotations

import errno
import socket
import struct

import pytest

from agentkit_environments.seccomp import (
    ALLOW,
    ANY_BIT,
    AT_LEAST,
    AUDIT_ARCH,
    CLONE,
    EQUAL,
    ERRNO,
    FIRST_UNKNOWN_CALL,
    FORBIDDEN,
    INOTIFY,
    LOAD,
    MASK,
    MISSING,
    ON_INIT,
    RETURN,
    SOCKET,
    SOCKETPAIR,
    SYSV_IPC,
    UNACCOUNTED,
    seccomp_program,
)

MACHINES = sorted(AUDIT_ARCH, reverse=True)  # in the order of the tables' columns
I386 = 0x40000003


def run(program: bytes, number: int, arguments: tuple[int, ...] = (), arch: int = AUDIT_ARCH["x86_64"]) -> int:
    """Return 0 if the call is allowed, else its errno. Fails on a program that the kernel would refuse."""
    padded = [*arguments, *[0] * (6 - len(arguments))]
    data = struct.pack("<IIQ6Q", number, arch, 0, *padded)
    instructions = [struct.unpack_from("=HBBI", program, offset) for offset in range(0, len(program), 8)]
    accumulator = index = 0
    while True:
        code, if_true, if_false, value = instructions[index]
        index += 1
        if code == LOAD:
            assert value % 4 == 0
            accumulator = struct.unpack_from("<I", data, value)[0]
        elif code == MASK:
            accumulator &= value
        elif code == RETURN:
            assert value == ALLOW or value & 0xFFFF0000 == ERRNO
            return 0 if value == ALLOW else value & 0xFFFF
        else:
            holds = {EQUAL: accumulator == value, AT_LEAST: accumulator >= value, ANY_BIT: bool(accumulator & value)}
            index += if_true if holds[code] else if_false


@pytest.mark.parametrize("column", [0, 1])
def test_listed_calls_fail_and_others_do_not(column: int) -> None:
    arch, program = AUDIT_ARCH[MACHINES[column]], seccomp_program(MACHINES[column])
    assert len(program) // 8 < 4096
    expected = {numbers[column]: errno.EPERM for numbers in FORBIDDEN.values()}
    expected |= {numbers[column]: errno.ENOSYS for numbers in MISSING.values()}
    special = {SOCKET[column]: errno.EAFNOSUPPORT, SOCKETPAIR[column]: errno.EAFNOSUPPORT}  # family 0
    for number in range(FIRST_UNKNOWN_CALL):
        assert run(program, number, arch=arch) == (expected | special).get(number, 0), number
    for number in (FIRST_UNKNOWN_CALL, 1000, 0x40000000, 0x40000029, 0xFFFFFFFF):
        assert run(program, number, arch=arch) == errno.ENOSYS


@pytest.mark.parametrize("column", [0, 1])
@pytest.mark.parametrize("arch", [I386, 0x40000028, 0, 0xFFFFFFFF])
def test_calls_of_another_architecture_fail(column: int, arch: int) -> None:
    program = seccomp_program(MACHINES[column])
    assert {run(program, number, arch=arch) for number in range(500)} == {errno.ENOSYS}


@pytest.mark.parametrize("column", [0, 1])
def test_a_process_may_be_cloned_but_not_into_a_new_namespace(column: int) -> None:
    arch, program = AUDIT_ARCH[MACHINES[column]], seccomp_program(MACHINES[column])
    fork, thread = 0x01200011, 0x003D0F00
    for flags in (fork, thread, 0x4111):
        assert run(program, CLONE[column], (flags,), arch) == 0
    for namespace in (0x20000, 0x02000000, 0x04000000, 0x08000000, 0x10000000, 0x20000000, 0x40000000):
        assert run(program, CLONE[column], (fork | namespace,), arch) == errno.EPERM


@pytest.mark.parametrize("column", [0, 1])
def test_the_executor_is_out_of_reach_of_schedulers_and_limits(column: int) -> None:
    arch, program = AUDIT_ARCH[MACHINES[column]], seccomp_program(MACHINES[column])
    for numbers, values in ON_INIT.values():
        for index, value in values.items():
            arguments = [0] * 6
            for bad in (value, value | 1 << 32):  # the kernel reads 32 bits
                arguments[index] = bad
                assert run(program, numbers[column], tuple(arguments), arch) == errno.EPERM
            arguments[index] = 77
            assert run(program, numbers[column], tuple(arguments), arch) == 0


@pytest.mark.parametrize("column", [0, 1])
@pytest.mark.parametrize("call", [SOCKET, SOCKETPAIR])
def test_only_common_sockets_can_be_made(column: int, call: tuple[int, int]) -> None:
    arch, program = AUDIT_ARCH[MACHINES[column]], seccomp_program(MACHINES[column])
    flags = socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK
    for arguments in [
        (socket.AF_UNIX, socket.SOCK_SEQPACKET | flags, 0),
        (socket.AF_INET, socket.SOCK_STREAM | flags, socket.IPPROTO_TCP),
        (socket.AF_INET6, socket.SOCK_DGRAM, socket.IPPROTO_ICMPV6),
        (socket.AF_NETLINK, socket.SOCK_RAW | flags, 0),
        (socket.AF_INET | 1 << 32, socket.SOCK_STREAM, 0),  # the kernel reads 32 bits too
    ]:
        assert run(program, call[column], arguments, arch) == 0, arguments
    for family in set(range(64)) - {socket.AF_UNIX, socket.AF_INET, socket.AF_INET6, socket.AF_NETLINK}:
        assert run(program, call[column], (family, socket.SOCK_STREAM, 0), arch) == errno.EAFNOSUPPORT
    for kind in (4, 6, 10):  # RDM, DCCP, PACKET
        assert run(program, call[column], (socket.AF_INET, kind, 0), arch) == errno.ESOCKTNOSUPPORT
    for protocol in (12, 33, 115, 132, 136, 255, 262):  # among them DCCP, L2TP, SCTP, UDP-Lite, MPTCP
        assert run(program, call[column], (socket.AF_INET, 2, protocol), arch) == errno.EPROTONOSUPPORT


def test_more_calls_fail_without_a_cgroup() -> None:
    for names in (tuple(UNACCOUNTED), (*UNACCOUNTED, *SYSV_IPC), tuple(INOTIFY)):
        program = seccomp_program("x86_64", names)
        for name, (number, _) in (UNACCOUNTED | SYSV_IPC | INOTIFY).items():
            assert number is not None
            assert run(program, number) == (errno.ENOSYS if name in names else 0)
