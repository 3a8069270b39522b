"""Permissions and links of files: each case gives the same result in both sandboxes."""

from __future__ import annotations

import errno
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING

import anyio
import pytest

from agentkit_environments import Environment, EnvironmentSpec, FileTooLargeError, ResourceLimits, UnsafePathError

if TYPE_CHECKING:
    from tests.environments.conftest import Opener

pytestmark = pytest.mark.anyio

SETUP = r"""
mkdir -p d/sub closed noexec; echo text > d/f; echo x > closed/f; echo x > noexec/f; echo sub > d/sub/f
printf 'a\000b\377' > binary; printf '' > empty
printf 'no newline' > raw; echo dash > -n; n=$(printf 'o d\nd\t*'); echo odd >"$n"
ln -s d/f link; ln -s d dlink; ln -s link link2; ln -s loop loop; ln -s gone dangling; ln -s /etc/hostname absolute
ln -s /usr/bin/env program; ln -s ../../../../etc/passwd up; ln -s /root/x root; ln -s /workspace/d/f inside
ln -s /etc/new etcnew; ln -s d/new dnew; ln -s empty/x through
echo secret > unreadable; chmod 000 unreadable; echo secret > writeonly; chmod 200 writeonly
echo fixed > readonly; chmod 444 readonly; chmod 000 closed; chmod 600 noexec
mkdir wall; echo kept > wall/f; chmod 555 wall; mkfifo pipe; mkdir closed2; chmod 000 closed2
python3 -c 'import socket; socket.socket(socket.AF_UNIX).bind("socket")'
echo text > hard1; ln hard1 hard2; echo x > 'is a directory: no such file'; chmod 000 is*
"""

READS: list[tuple[str, bytes | int | type[Exception]]] = [
    ("d/f", b"text\n"),
    ("binary", b"a\0b\xff"),
    ("empty", b""),
    ("raw", b"no newline"),
    ("-n", b"dash\n"),
    ("o d\nd\t*", b"odd\n"),
    ("link", b"text\n"),
    ("link2", b"text\n"),
    ("dlink/f", b"text\n"),
    ("dlink/../d/f", b"text\n"),
    ("dlink//sub/./f", b"sub\n"),
    ("inside", b"text\n"),
    ("/workspace/../workspace/link", b"text\n"),
    ("writeonly", errno.EACCES),
    ("unreadable", errno.EACCES),
    ("is a directory: no such file", errno.EACCES),
    ("is a directory: no such file/x", errno.ENOTDIR),
    ("closed/f", errno.EACCES),
    ("closed/missing", errno.EACCES),
    ("noexec/f", errno.EACCES),
    ("closed2", errno.EACCES),
    ("d", errno.EISDIR),
    ("dlink", errno.EISDIR),
    ("/", errno.EISDIR),
    (".", errno.EISDIR),
    ("pipe", errno.EINVAL),
    ("socket", errno.ENXIO),
    ("/dev/null", errno.EINVAL),
    ("/dev/zero", errno.EINVAL),
    ("dangling", errno.ENOENT),
    ("missing", errno.ENOENT),
    ("d/missing/f", errno.ENOENT),
    ("d/f/x", errno.ENOTDIR),
    ("link/x", errno.ENOTDIR),
    ("through", errno.ENOTDIR),
    ("loop", UnsafePathError),
    ("loop/x", UnsafePathError),
    ("y" * 300, errno.ENAMETOOLONG),
    ("d/" * 2100 + "f", errno.ENAMETOOLONG),
]

WRITES: list[tuple[str, str | int | type[Exception]]] = [
    ("d/f", "d/f"),
    ("link", "d/f"),
    ("link2", "d/f"),
    ("dlink/f", "d/f"),
    ("inside", "d/f"),
    ("hard1", "hard2"),
    ("dnew", "d/new"),
    ("dangling", "gone"),
    ("deep/er/f", "deep/er/f"),
    ("dlink/made/f", "d/made/f"),
    ("-q", "./-q"),
    ("n l\n*", "n l\n*"),
    ("writeonly", "writeonly"),
    ("readonly", errno.EACCES),
    ("unreadable", errno.EACCES),
    ("is a directory: no such file", errno.EACCES),
    ("closed/new", errno.EACCES),
    ("closed/f", errno.EACCES),
    ("closed/d/f", errno.EACCES),
    ("wall/new", errno.EACCES),
    ("wall/d/f", errno.EACCES),
    ("wall/f", "wall/f"),
    ("noexec/new", errno.EACCES),
    ("d", errno.EISDIR),
    ("dlink", errno.EISDIR),
    ("d/f/below", errno.ENOTDIR),
    ("d/f/far/below", errno.ENOTDIR),
    ("link/x", errno.ENOTDIR),
    ("pipe", errno.ENXIO),
    ("socket", errno.ENXIO),
    ("/dev/null", errno.EINVAL),
    ("loop", UnsafePathError),
    ("loop/x/y", UnsafePathError),
    ("y" * 300, errno.ENAMETOOLONG),
    ("y" * 300 + "/f", errno.ENAMETOOLONG),
]

READ_ONLY = [
    "/etc/new",
    "/etc/passwd",
    "/usr/bin/env",
    "/new",
    "/new/d/f",
    "etcnew",
    "up",
    "program",
    "/proc/new",
    "root",
]


@pytest.fixture(scope="module")
async def files(backend: str, open_backend: Opener) -> AsyncIterator[Environment]:
    if backend == "unsafe-local":
        pytest.skip("unsafe-local runs commands as the harness user")
    async with await open_backend(backend, EnvironmentSpec(limits=ResourceLimits(file_size_mib=8, disk_mib=16))) as env:
        made = await env.exec(SETUP)
        assert (made.exit_code, made.stderr) == (0, ""), made
        yield env


async def outcome(files: Environment, path: str, data: bytes | None = None) -> object:
    """Read or write; return the content, None, or the number or type of the error."""
    try:
        with anyio.fail_after(30):
            return await (files.read_file(path) if data is None else files.write_file(path, data))
    except OSError as error:
        return error.errno
    except UnsafePathError:
        return UnsafePathError


async def test_reading(files: Environment) -> None:
    assert [(path, await outcome(files, path)) for path, _ in READS] == READS


async def test_writing(files: Environment) -> None:
    for path, expected in WRITES:
        found = await outcome(files, path, b"written\n")
        if isinstance(expected, str):
            assert (path, found) == (path, None)
            await files.exec(["chmod", "u+r", expected])
            result = await files.exec(["cat", expected])
            assert (path, result.stdout) == (path, "written\n")
        else:
            assert (path, found) == (path, expected)
    kept = await files.exec("chmod 700 closed; cat closed/f readonly; ls closed wall; stat -c %F pipe socket link loop")
    assert kept.stdout.split("\n") == [
        "x", "fixed", "closed:", "f", "", "wall:", "f", "fifo", "socket", "symbolic link", "symbolic link", ""
    ]  # fmt: skip


async def test_places_that_are_read_only(files: Environment) -> None:
    for path in READ_ONLY:
        found = await outcome(files, path, b"x")
        assert found in (errno.EROFS, errno.EACCES, errno.ENOENT), (path, found)
    assert b"nobody:" in await files.read_file("/etc/passwd")


async def test_a_link_that_leads_to_the_system_reads_what_a_command_reads(files: Environment) -> None:
    for path in ("absolute", "up", "program"):
        as_command = await files.exec(f"sha256sum <{path}")
        content = await outcome(files, path)
        if as_command.exit_code:
            assert isinstance(content, int), path
        else:
            assert isinstance(content, bytes), (path, content)
            await files.write_file("/tmp/copy", content)
            assert (await files.exec("sha256sum </tmp/copy")).stdout == as_command.stdout


async def test_bounds(files: Environment) -> None:
    await files.exec("head -c 1 /dev/zero | dd of=sparse bs=1 seek=1M 2>/dev/null; head -c 1000 /dev/zero > k")
    assert await files.read_file("k", max_bytes=1000) == bytes(1000)
    assert await files.read_file("empty", max_bytes=0) == b""
    for path, bound in (("k", 999), ("k", 0), ("sparse", 1000)):
        with pytest.raises(FileTooLargeError, match=f"more than {bound} bytes"):
            await files.read_file(path, max_bytes=bound)
    with pytest.raises(OSError, match="File too large"):
        await files.write_file("big", b"x" * ((8 << 20) + 1))
    await files.write_file("big", b"x" * (8 << 20))
    with pytest.raises(OSError, match="No space left"):
        await files.write_file("big2", b"x" * (8 << 20))
    await files.exec("rm big big2")


async def test_a_new_file_belongs_to_the_commands_user_and_a_rewritten_one_keeps_its_mode(files: Environment) -> None:
    await files.write_file("new/a", "x")
    await files.exec("chmod 640 raw")
    await files.write_file("raw", "y")
    found = await files.exec("stat -c '%u %g %a %s' new new/a raw; id -u")
    assert found.stdout.splitlines()[1:] == ["1000 1000 644 1", "1000 1000 640 1", "1000"]


async def test_a_path_that_changes_while_it_is_read_never_hangs(files: Environment) -> None:
    """A loop replaces the file by a pipe and back; a read always ends."""
    await files.exec("mkdir race; mkfifo race/pipe; echo x > race/file; ln -s file race/x")
    swap = "while :; do ln -sfn pipe race/y && mv -T race/y race/x; ln -sfn file race/y && mv -T race/y race/x; done"
    await files.exec(f"({swap}) >/dev/null 2>&1 &")
    found = {await outcome(files, "race/x") for _ in range(5)}
    await files.kill_all()
    assert found <= {b"x\n", errno.EINVAL, errno.ENOENT, errno.ETIMEDOUT}
