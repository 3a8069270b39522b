"""The executor: the process that runs commands and handles files for a sandbox.

In a process sandbox it is PID 1 of the sandbox's PID namespace. It starts once per environment and exchanges frames
over its standard input and output (`connection.py` is the other end). The package is not installed in the sandbox, so
this file imports only the standard library; `confine.py` gets it compiled. `LocalEnvironment` calls the same functions
in the harness.

Commands in the sandbox cannot
- kill or stop it: the kernel drops signals from inside a PID namespace for which its init has no handler;
- read its memory, take its pipes or trace it: it is not dumpable, and commands inherit none of its descriptors;
- outlive it: when it exits for any reason, the kernel kills everything in its PID namespace.

A frame is two big-endian 32-bit lengths, a JSON header of the first length, and a body of the second.

    request  {"id": 7, "op": "exec", "argv": [...], ...}  body: standard input
    reply    {"id": 7, "exit_code": 0, "stdout": 12, ...} body: standard output (12 bytes), then standard error
    reply    {"id": 8, "errno": 2, "message": "No such file or directory"}

A request to exec with `"chunks": true` gets output before its reply, from the first half of what is kept of a stream.
The reply has all of it again.

    chunk    {"id": 7, "chunk": "stdout"}                 body: the next bytes of that stream

Chunks are sent only while the harness reads: a frame never waits, and it leaves room in the pipe for replies.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import resource
import select
import signal
import stat
import struct
import sys
import time

TYPE_CHECKING = False  # as in `typing`; importing `typing` would make opening a sandbox a tenth slower
if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Generator, Iterator, Mapping, Sequence
    from types import ModuleType
    from typing import Any, NoReturn

FRAME = struct.Struct(">II")
COOKIE = "AGENTKIT_COMMAND"
CHUNK = 1 << 16
KILL_TIMEOUT_S = 2.0
FLAGS, ENVIRONMENT_END, PF_KTHREAD = 6, 48, 0x00200000
"""Fields of /proc/PID/stat after the name, and the flag of the kernel's own threads; see proc_pid_stat(5)."""
START_TIMEOUT_S = 10.0
CHUNK_EVERY_S = 0.05
CHUNK_BYTES = 4000  # with its header at most PIPE_BUF, so that a pipe takes all of it at once
CHUNKS_AT_ONCE = 4
UNREAD_BYTES = 1 << 14
FIONREAD = 0x541B


class BoundedOutput:
    """The first and the last `limit / 2` bytes of a stream of any length, in bounded memory.

    If memory still runs out, half of the kept bytes are dropped and counted as cut.
    """

    def __init__(self, limit: int) -> None:
        self._head_limit = limit - limit // 2
        self._tail_limit = limit // 2
        self._head = bytearray()
        self._tail = bytearray()
        self._total = self._taken = 0

    @property
    def has_news(self) -> bool:
        """True if `take` has not returned all of the first half."""
        return self._taken < len(self._head)

    def take(self, most: int) -> bytes:
        """Return the next bytes of the first half, at most `most`. They stay in the value, too."""
        piece = bytes(self._head[self._taken : self._taken + most])
        self._taken += len(piece)
        return piece

    @property
    def truncated(self) -> bool:
        return self._total > self._head_limit + self._tail_limit

    def add(self, chunk: bytes) -> None:
        self._total += len(chunk)
        try:
            room = self._head_limit - len(self._head)
            if room > 0:
                self._head += chunk[:room]
                chunk = chunk[room:]
            self._tail += chunk
        except MemoryError:
            self._head_limit = max(len(self._head) // 2, self._taken)
            self._tail_limit = len(self._tail) // 2
            del self._head[self._head_limit :]
            del self._tail[: len(self._tail) - self._tail_limit]
        if len(self._tail) > self._tail_limit + (1 << 20):
            del self._tail[: len(self._tail) - self._tail_limit]

    def pieces(self) -> list[bytes | bytearray | memoryview]:
        """Return the kept bytes, with a line in the middle that gives the number of bytes cut; nothing is copied."""
        if not self.truncated:
            return [self._head, self._tail]
        cut = self._total - self._head_limit - self._tail_limit
        tail = memoryview(self._tail)[len(self._tail) - self._tail_limit :]
        return [self._head, b"\n[... %d bytes cut ...]\n" % cut, tail]

    def value(self) -> bytes:
        return b"".join(self.pieces())


class Command:
    """One running command: its process, its pipes and its output so far.

    The owner polls `descriptors()`, calls `on_ready` for those that are ready, and `finish` once the process is gone.
    """

    def __init__(
        self,
        pid: int,
        *,
        pipes: Sequence[int],
        stdin: Sequence[bytes],
        cookie: str,
        timeout_s: float | None,
        max_output_bytes: int,
        status_fd: int | None = None,
    ) -> None:
        """Take over a started process.

        Args:
            pid: The process, leader of its session (or about to become it).
            pipes: Our ends of its standard input, output and error; closed by this object.
            stdin: Data for standard input, which is closed afterwards.
            cookie: Value of the variable `COOKIE` in its environment.
            timeout_s: Seconds from now to `deadline`.
            max_output_bytes: Bytes kept of output and error each.
            status_fd: A pipe that ends when the process becomes the command's program. If the program cannot be
                started, the reason is written to it first.
        """
        self.pid, self.cookie = pid, cookie
        self.stdout, self.stderr = BoundedOutput(max_output_bytes), BoundedOutput(max_output_bytes)
        self.failure = BoundedOutput(1 << 12)
        self.timed_out = False
        self.exit_code: int | None = None
        self.started = time.monotonic()
        self.start_deadline = self.started + START_TIMEOUT_S
        self.deadline = float("inf") if timeout_s is None else self.started + timeout_s
        self.chunk_at = float("inf")
        self._status_fd = status_fd
        self._stdin = [memoryview(part) for part in stdin if part]
        outputs = (None, self.stdout, self.stderr)
        self._pipes: dict[int, BoundedOutput | None] = dict(zip(pipes, outputs, strict=True))
        if status_fd is not None:
            self._pipes[status_fd] = self.failure
        for fd in self._pipes:
            os.set_blocking(fd, False)

    @property
    def is_starting(self) -> bool:
        """True if the process has not yet become the command's program."""
        return self._status_fd in self._pipes

    def descriptors(self) -> dict[int, int]:
        """Return the open pipes with the poll event that each waits for."""
        return {fd: select.POLLOUT if output is None else select.POLLIN for fd, output in self._pipes.items()}

    def on_ready(self, fd: int) -> bool:
        """Transfer data through one pipe without blocking; return whether the pipe is still open."""
        return self._move(fd) is not None or fd in self._pipes

    def _move(self, fd: int) -> int | None:
        """Return the number of bytes transferred, or None if the pipe would block or has been closed."""
        output = self._pipes[fd]
        try:
            if output is not None:
                chunk = os.read(fd, CHUNK)
                if self.exit_code is None:
                    output.add(chunk)
                moved = len(chunk)
            elif self._stdin:
                moved = os.write(fd, self._stdin[0][:CHUNK])
                self._stdin[0] = self._stdin[0][moved:]
                if not self._stdin[0]:
                    del self._stdin[0]
            else:
                moved = 0
        except BlockingIOError:
            return None
        except OSError:  # the read end is closed
            moved = 0
        if moved and (output is not None or self._stdin):
            return moved
        os.close(fd)
        del self._pipes[fd]
        return None

    def kill(self) -> None:
        """Kill the command and everything it has started."""
        kill_processes(cookie=self.cookie, session=self.pid)

    def poll(self) -> bool:
        """Reap the process if it has ended; return whether it has."""
        pid, status = os.waitpid(self.pid, os.WNOHANG)
        if pid:
            self.finish(status)
        return bool(pid)

    def finish(self, wait_status: int) -> None:
        """Take the process's wait status and the output that it wrote before it ended."""
        for fd, output in list(self._pipes.items()):
            if output is None:
                os.close(fd)
                del self._pipes[fd]
                continue
            # A pipe holds at most 1 MiB; a background process that keeps writing must not keep this loop going.
            for _ in range((1 << 20) // CHUNK):
                if self._move(fd) is None:
                    break
        code = os.waitstatus_to_exitcode(wait_status)
        self.exit_code = code if code >= 0 else 128 - code
        self.duration_s = time.monotonic() - self.started

    def close(self) -> None:
        """Close the pipes that are still open."""
        for fd in self._pipes:
            os.close(fd)
        self._pipes.clear()


def require_directory(path: str) -> None:
    if not stat.S_ISDIR(os.stat(path).st_mode):
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), path)


def start_failure(error: OSError, argv: Sequence[str]) -> tuple[int, str]:
    """Return the exit code and message that a shell gives for a program that cannot be started."""
    if error.errno == errno.ENOENT:
        return 127, f"{argv[0]}: not found\n"
    if error.errno == errno.EAGAIN:
        return 126, f"{argv[0]}: cannot start: too many processes\n"
    return 126, f"{argv[0]}: cannot execute: {os.strerror(error.errno or errno.EIO)}\n"


def find_processes(*, cookie: str, session: int | None = None) -> tuple[dict[int, str], set[int]]:
    """Find the living processes that carry `cookie` in their environment or belong to `session`, and their descendants,
    except this process.

    Returns:
        Their state letters by pid, and the pids of processes whose program is being loaded: the kernel shows no
        environment of theirs yet, so they may be others of these.
    """
    marker = b"=" + cookie.encode() + b"\0"
    states: dict[int, str] = {}
    children: dict[int, list[int]] = {}
    roots: list[int] = []
    loading: set[int] = set()
    for name in os.listdir("/proc"):
        if not name.isdecimal():
            continue
        pid = int(name)
        try:
            with open(f"/proc/{name}/stat", "rb") as file:
                state, ppid, _, sid = file.read().rpartition(b")")[2].split()[:4]
            if state in b"ZX":
                continue
            states[pid] = state.decode()
            children.setdefault(int(ppid), []).append(pid)
            if session in (int(sid), pid):
                roots.append(pid)
                continue
            environment = _environment(name)
            if environment is None:
                loading.add(pid)
            elif marker in b"\0" + environment + b"\0":
                roots.append(pid)
        except OSError:
            continue
    found: dict[int, str] = {}
    while roots:
        pid = roots.pop()
        if pid not in found and pid != os.getpid():
            found[pid] = states[pid]
            roots += children.get(pid, ())
    return found, loading


def _environment(pid: str) -> bytes | None:
    """Return the variables of a process; None if the kernel shows none because its program is being loaded."""
    for _ in range(2):  # the program may have been loaded between the two reads
        with open(f"/proc/{pid}/environ", "rb") as file:
            if environment := file.read(1 << 21):
                return environment
        with open(f"/proc/{pid}/stat", "rb") as file:
            fields = file.read().rpartition(b")")[2].split()
        if fields[ENVIRONMENT_END] == b"0":
            return b"" if int(fields[FLAGS]) & PF_KTHREAD else None
    return b""


def kill_processes(*, cookie: str, session: int | None = None) -> None:
    """Kill the processes from `find_processes`. All are stopped before any is killed, so that none can escape by
    forking.

    Raises:
        TimeoutError: If some are still alive after `KILL_TIMEOUT_S`.
    """
    deadline = time.monotonic() + KILL_TIMEOUT_S
    stopped: set[int] = set()
    found, suspects = find_processes(cookie=cookie, session=session)
    while found or suspects:
        if time.monotonic() > deadline:
            if not found:  # they have been loading since the first look
                return
            raise TimeoutError(errno.ETIMEDOUT, f"processes still alive after {KILL_TIMEOUT_S} s of SIGKILL")
        fresh = [pid for pid, state in found.items() if state not in "Tt" and pid not in stopped]
        _signal(fresh, signal.SIGSTOP)
        stopped.update(fresh)
        if not fresh:
            _signal(found, signal.SIGKILL)
            time.sleep(0.001)
        found, loading = find_processes(cookie=cookie, session=session)
        suspects = loading if found else suspects & loading  # only those found can have started others


def _signal(pids: Collection[int], number: signal.Signals) -> None:
    for pid in pids:
        try:
            os.kill(pid, number)
        except (ProcessLookupError, PermissionError):
            continue


def read_file(path: str, max_bytes: int) -> bytes:
    """Read a regular file; EFBIG if it has more than `max_bytes` bytes, EINVAL if it is not a regular file."""
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        _require_regular(fd, path)
        data = bytearray()
        while len(data) <= max_bytes and (chunk := os.read(fd, min(1 << 20, max_bytes + 1 - len(data)))):
            data += chunk
    finally:
        os.close(fd)
    if len(data) > max_bytes:
        raise OSError(errno.EFBIG, f"more than {max_bytes} bytes", path)
    return bytes(data)


def write_file(path: str, data: bytes) -> None:
    """Write a regular file and make its parents; EINVAL if `path` is a pipe or a device."""
    _make_parents(path)
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_NONBLOCK | os.O_CLOEXEC, 0o644)
    try:
        _require_regular(fd, path)
        if os.fstat(fd).st_dev == os.stat("/proc").st_dev:  # some files there change the executor's own settings
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), path)
        os.ftruncate(fd, 0)
        view = memoryview(data)
        while view:
            view = view[os.write(fd, view) :]
    finally:
        os.close(fd)


def _require_regular(fd: int, path: str) -> None:
    mode = os.fstat(fd).st_mode
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), path)
    if not stat.S_ISREG(mode):
        raise OSError(errno.EINVAL, "not a regular file", path)


MAX_NAME_BYTES = 3584
"""Maximum bytes of a name in an archive. Keeps paths below PATH_MAX (4,096) in any directory."""
MAX_DEPTH = 128
MAX_DROPS_TOLD = 1_000
MAX_TIME = 8**11 - 1
"""The last second that a tar header can store (in the year 2242); file systems and engines support it too."""
PIECE = 1 << 20
OPAQUE = "SCHILY.xattr.user.overlay.opaque"
"""The tar header of the attribute that marks a directory as replacing one of an overlay's lower layer."""


class DropList:
    """The entries that an export leaves out, one line each; entries beyond `MAX_DROPS_TOLD` are only counted."""

    def __init__(self, lines: Sequence[str] = ()) -> None:
        self._lines = list(lines)
        self._untold = 0

    @property
    def lines(self) -> tuple[str, ...]:
        return (*self._lines, *([f"... and {self._untold} more"] if self._untold else ()))

    def add(self, name: str, reason: str) -> None:
        if len(self._lines) < MAX_DROPS_TOLD:
            shown = name if len(name) <= 200 else f"{name[:100]}...{name[-80:]}"
            self._lines.append(f"{shown!r}: {reason}")
        else:
            self._untold += 1


def name_problem(name: str) -> str | None:
    """Return the reason why a relative name cannot be carried in an archive, or None."""
    if name.count("/") >= MAX_DEPTH:
        return f"deeper than {MAX_DEPTH} directories"
    if len(os.fsencode(name)) > MAX_NAME_BYTES:
        return f"a path longer than {MAX_NAME_BYTES} bytes"
    return None


def clamp_time(seconds: float) -> int:
    """Return a modification time that tar and every file system supports; 0 for a value that is not a number."""
    return int(min(max(seconds, 0), MAX_TIME)) if seconds == seconds else 0


class Pieces:
    """A stream of bytes in pieces of about `PIECE` bytes."""

    drops: DropList
    """The entries that the stream leaves out."""

    def __init__(self, stream: Generator[bytes, None, None]) -> None:
        self._stream = stream

    def piece(self) -> bytes:
        """Return the next piece; an empty one marks the end."""
        piece = bytearray()
        for part in self._stream:
            piece += part
            if len(piece) >= PIECE:
                break
        return bytes(piece)

    def close(self) -> None:
        """Stop early."""
        self._stream.close()


class Packer(Pieces):
    """A directory as an uncompressed tar archive, in pieces; memory use is bounded by the size of a piece.

    Names are relative to the directory and in sorted order. Links are stored as links, and further names of a file as
    hard links. Entries that cannot be carried are left out and listed in `drops`. A directory or file that its owner
    has no permission for is opened up while it is read, and archived with its original mode.
    """

    def __init__(
        self,
        path: str,
        max_entries: int,
        max_bytes: int,
        hidden: Collection[str] | None = None,
        skip: Collection[str] = (),
    ) -> None:
        """Count entries and bytes. Raises EFBIG, before anything is read, if there are more than allowed.

        Args:
            path: The directory.
            max_entries: Maximum number of entries.
            max_bytes: Maximum bytes of file content and names.
            hidden: None, or the names that an overlay hides. `path` is then the overlay's upper layer, whiteouts are
                archived as character devices, and opaque directories keep their attribute.
            skip: Names that are left out without being reported.
        """
        require_directory(path)
        self._path, self._max_entries, self._max_bytes = path, max_entries, max_bytes
        self._is_upper, self._hidden, self._skip = hidden is not None, hidden or (), skip
        for _ in self._entries(DropList()):
            pass
        self.drops = DropList()
        super().__init__(self._pack())

    def _entries(self, drops: DropList) -> Generator[tuple[str, str, os.stat_result, str], None, None]:
        """Yield (name, path, status, name of the file that this is a hard link to) for every entry that can be
        carried."""
        unlocked: list[tuple[str, int]] = []
        inodes: dict[tuple[int, int], str] = {}
        entries = size = 0
        pending = [""]
        try:
            while pending:
                name = pending.pop()
                path = os.path.join(self._path, name) if name else self._path
                try:
                    info = os.lstat(path) if name else os.stat(path)
                    kind = stat.S_IFMT(info.st_mode)
                    if kind == stat.S_IFDIR:
                        if info.st_mode & 0o500 != 0o500 and try_chmod(path, info.st_mode | 0o700):
                            unlocked.append((path, info.st_mode))
                        children = children_of(path, self._max_entries - entries + len(self._hidden))
                except OSError as error:
                    if not name:
                        raise
                    drops.add(name, f"cannot be read: {error.strerror}")
                    continue
                if name in self._hidden:
                    if not _is_whiteout(info) and name not in self._skip:
                        drops.add(name, "new, but a hidden entry has this name")
                    continue
                if kind == stat.S_IFDIR:
                    entries += sum(os.path.join(name, child) not in self._hidden for child in children)
                    if entries > self._max_entries:
                        raise OSError(errno.EFBIG, f"more than {self._max_entries} entries", self._path)
                    for child in sorted(children, reverse=True):
                        below = os.path.join(name, child)
                        if problem := name_problem(below):
                            drops.add(below, problem)
                        else:
                            pending.append(below)
                elif kind not in (stat.S_IFREG, stat.S_IFLNK) and not (self._is_upper and _is_whiteout(info)):
                    drops.add(name, "a pipe, a socket or a device")
                    continue
                first = name
                if kind == stat.S_IFREG and info.st_nlink > 1:
                    first = inodes.setdefault((info.st_dev, info.st_ino), name)
                size += len(name) + (info.st_size if kind != stat.S_IFDIR and first == name else len(first))
                if size > self._max_bytes:
                    raise OSError(errno.EFBIG, f"more than {self._max_bytes} bytes", self._path)
                if name:
                    yield name, path, info, "" if first == name else first
        finally:
            for path, mode in reversed(unlocked):
                try_chmod(path, mode)

    def _pack(self) -> Generator[bytes, None, None]:
        import tarfile

        left_out: set[str] = set()
        entries = self._entries(self.drops)
        try:
            for name, path, info, first in entries:
                member = tarfile.TarInfo(name)
                member.mode, member.mtime = info.st_mode & 0o777, clamp_time(info.st_mtime)
                fd = -1
                try:
                    if stat.S_ISDIR(info.st_mode):
                        member.type = tarfile.DIRTYPE
                        if self._is_upper and _is_opaque(path):
                            member.pax_headers = {OPAQUE: "y"}
                    elif _is_whiteout(info):
                        member.type = tarfile.CHRTYPE
                    elif stat.S_ISLNK(info.st_mode):
                        member.type, member.linkname = tarfile.SYMTYPE, os.readlink(path)
                    elif first in left_out:
                        raise OSError(errno.ENOENT, "it is a hard link to a file that was left out")
                    elif first:
                        member.type, member.linkname = tarfile.LNKTYPE, first
                    else:
                        fd = open_for_reading(path, info.st_mode)
                        # Bytes appended after counting were not counted, so they are left out.
                        member.size = min(info.st_size, os.fstat(fd).st_size)
                except OSError as error:
                    left_out.add(name)
                    self.drops.add(name, f"cannot be read: {error.strerror}")
                    continue
                try:
                    yield member.tobuf(tarfile.PAX_FORMAT)
                    yield from _content(fd, member.size)
                finally:
                    if fd >= 0:
                        os.close(fd)
            yield bytes(1024)
        finally:
            entries.close()


def _is_whiteout(info: os.stat_result) -> bool:
    """Return whether an entry of an overlay's upper layer marks a deletion. No command can create such an entry."""
    return stat.S_ISCHR(info.st_mode) and info.st_rdev == 0


def _is_opaque(directory: str) -> bool:
    try:
        return os.getxattr(directory, "user.overlay.opaque") == b"y"
    except OSError:
        return False


def children_of(directory: str, most: int) -> list[str]:
    """Return the names in a directory, or `most` + 1 of them if there are more."""
    with os.scandir(directory) as entries:
        return [entry.name for _, entry in zip(range(most + 1), entries, strict=False)]


def try_chmod(path: str, mode: int) -> bool:
    try:
        os.chmod(path, stat.S_IMODE(mode))
    except OSError:
        return False
    return True


def open_for_reading(path: str, mode: int) -> int:
    """Open a regular file, even if its owner (this user) has no permission to read it."""
    flags = os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        fd = os.open(path, flags)
    except PermissionError:
        os.chmod(path, stat.S_IMODE(mode) | 0o400)
        try:
            fd = os.open(path, flags)
        finally:
            try_chmod(path, mode)
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise OSError(errno.EINVAL, "no longer a regular file")
    return fd


def _content(fd: int, size: int) -> Iterator[bytes]:
    """Yield exactly `size` bytes of a file and tar's padding; zeros replace bytes that were truncated meanwhile."""
    left = size
    while left and (chunk := os.read(fd, min(CHUNK, left))):
        left -= len(chunk)
        yield chunk
    left += -size % 512
    while left:
        yield bytes(min(CHUNK, left))
        left -= min(CHUNK, left)


def unpack(path: str, entries: Sequence[dict[str, Any]], content: bytes) -> None:
    """Unpack one piece of an archive (`archive.pieces`) into a directory, which is made if missing.

    ENOTDIR if `path` is not a directory. EEXIST if a directory is in the way of a file or link, or anything else is in
    the way of a directory. An existing link is replaced, never followed.
    """
    _make_parents(os.path.join(path, "x"))
    made: set[str] = set()
    view = memoryview(content)
    for entry in entries:
        name, kind = entry["name"], entry["kind"]
        target = os.path.join(path, name)
        if kind == "attributes":
            os.chmod(target, entry["mode"])
            os.utime(target, (entry["mtime"], entry["mtime"]))
            continue
        _make_inside(path, name if kind == "dir" else os.path.dirname(name), made)
        if kind == "dir":
            continue
        if entry["offset"] == 0:
            try:
                os.unlink(target)
            except IsADirectoryError:
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), target) from None
            except FileNotFoundError:
                pass
        if kind == "link":
            os.symlink(entry["target"], target)
        elif kind == "hard":
            os.link(os.path.join(path, entry["target"]), target, follow_symlinks=False)
        else:
            piece, view = view[: entry["size"]], view[entry["size"] :]
            _write_piece(target, piece, entry)


def _write_piece(target: str, piece: memoryview, entry: dict[str, Any]) -> None:
    create = os.O_CREAT | os.O_EXCL if entry["offset"] == 0 else 0
    fd = os.open(target, os.O_WRONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC | create, 0o600)
    try:
        os.lseek(fd, entry["offset"], os.SEEK_SET)
        while piece:
            piece = piece[os.write(fd, piece) :]
        if entry["last"]:
            os.fchmod(fd, entry["mode"])
            os.utime(fd, (entry["mtime"], entry["mtime"]))
    finally:
        os.close(fd)


def _make_inside(root: str, name: str, made: set[str]) -> None:
    """Make the directory `name` below `root` and its parents; EEXIST if a link or a file is in the way."""
    parts = name.split("/")
    for length in range(1, len(parts) + 1):
        directory = "/".join([root, *parts[:length]])
        if directory in made:
            continue
        try:
            os.mkdir(directory)
        except FileExistsError:
            if not stat.S_ISDIR(os.lstat(directory).st_mode):
                raise
        made.add(directory)


def _make_parents(path: str) -> None:
    """Make the directories above `path`, following links; ENOTDIR if one of them is not a directory."""
    try:
        os.makedirs(os.path.dirname(path), exist_ok=True)
    except FileExistsError:
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), path) from None


class Child:
    """A forked process that waits on its standard input for the program to become.

    The executor only forks. The child does everything that may block: joining cgroups (about 10 ms), changing
    directory, and exec, before which a hostile command may stop it. One child is kept ready for the next command.
    """

    def __init__(self, settings: Mapping[str, Any]) -> None:
        """Fork the process. Raises OSError if there are too many processes or descriptors, or too little memory."""
        ends: list[int] = []
        try:
            for _ in range(4):
                ends += os.pipe2(os.O_CLOEXEC)
            self.pid = os.fork()
        except OSError:
            _close(ends)
            raise
        stdin_read, stdin_write, stdout_read, stdout_write, stderr_read, stderr_write, status_read, status_write = ends
        if self.pid == 0:
            _become_command((stdin_read, stdout_write, stderr_write), status_write, settings)
        _close((stdin_read, stdout_write, stderr_write, status_write))
        self.pipes, self.status_fd = (stdin_write, stdout_read, stderr_read), status_read

    def close(self) -> None:
        _close((*self.pipes, self.status_fd))


def _close(fds: Sequence[int]) -> None:
    for fd in fds:
        os.close(fd)


def _become_command(standard: Sequence[int], status: int, settings: Mapping[str, Any]) -> NoReturn:
    """Wait for orders and become the program that they name; on failure write the reason to `status`."""
    stage = "join"
    try:
        signal.set_wakeup_fd(-1)
        for number in (signal.SIGCHLD, signal.SIGINT, signal.SIGPIPE, signal.SIGXFSZ):
            signal.signal(number, signal.SIG_DFL)
        os.setsid()
        for fd in settings["cgroup_fds"]:
            os.write(fd, b"0")  # 0 means this process
        for target, fd in enumerate(standard):
            os.dup2(fd, target)
        os.dup2(status, 3, inheritable=False)  # descriptor 3 belongs to the executor and is never one of these pipes
        os.closerange(4, 1 << 20)
        for name, value in settings["rlimits"].items():
            set_limit(name, value)
        size = int.from_bytes(_read_exactly(4), "big")
        orders = json.loads(_read_exactly(size))
        if not orders["has_stdin"]:
            os.dup2(os.open("/dev/null", os.O_RDONLY), 0)
        stage = "cwd"
        os.chdir(orders["cwd"])
        stage = "exec"
        os.execvpe(orders["argv"][0], orders["argv"], orders["env"])
    except OSError as error:
        os.write(3, json.dumps([stage, error.errno or errno.EIO]).encode())
    except MemoryError:
        os.write(3, json.dumps([stage, errno.ENOMEM]).encode())
    finally:
        os._exit(127)


def _read_exactly(size: int) -> bytes:
    data = bytearray()
    while len(data) < size:
        chunk = os.read(0, size - len(data))
        if not chunk:
            os._exit(0)  # the executor has dropped this process
        data += chunk
    return bytes(data)


def set_limit(name: str, value: int) -> None:
    """Set a soft and hard resource limit to `value`, or to the current hard limit if that is lower."""
    number = getattr(resource, name)
    hard = resource.getrlimit(number)[1]
    bound = value if hard == resource.RLIM_INFINITY else min(value, hard)
    resource.setrlimit(number, (bound, bound))


class Executor:
    """Serves requests until its input ends: one thread, one poll loop, any number of concurrent commands.

    No request and no command can end it: an exception becomes the reply to its request.
    """

    def __init__(
        self, requests_fd: int, replies_fd: int, settings: Mapping[str, Any], tree: ModuleType | None = None
    ) -> None:
        self._requests_fd, self._replies_fd, self._settings, self._tree = requests_fd, replies_fd, settings, tree
        self._head = bytearray()
        self._request: dict[str, Any] | None = None
        self._body: bytearray | None = None
        self._body_size = self._received = 0
        self._poll, self._room = select.poll(), select.poll()
        self._room.register(replies_fd, select.POLLOUT)
        self._spare: Child | None = None
        self._commands: dict[int, tuple[dict[str, Any], Command]] = {}
        self._pipes: dict[int, Command] = {}
        self._exports: dict[int, Pieces] = {}
        self._hidden = frozenset(settings.get("hidden_names", ()))

    def serve(self) -> None:
        self._wakeup_fd, wakeup_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(wakeup_write, warn_on_full_buffer=False)
        os.set_blocking(self._requests_fd, False)
        self._poll.register(self._requests_fd, select.POLLIN)
        self._poll.register(self._wakeup_fd, select.POLLIN)
        self._reply({"id": 0, **self._restore()})
        while True:
            try:
                if not self._turn():
                    return
            except BrokenPipeError:  # the pipe for replies: the harness is gone
                return
            except Exception as error:
                print(f"executor: {type(error).__name__}: {error}", file=sys.stderr)
                time.sleep(0.01)  # if the error recurs at once, commands still get most of the processor

    def _restore(self) -> dict[str, Any]:
        """Unpack the snapshot that the sandbox starts with, if any; return the fields of an error."""
        fd = self._settings.get("snapshot_fd")
        if fd is None or self._tree is None:
            return {}
        try:
            self._tree.unpack(fd, self._settings["trees"])
        except Exception as error:
            return _error_header(error.with_traceback(None))
        finally:
            os.close(fd)
        return {}

    def _turn(self) -> bool:
        """Handle everything that is ready, or wait for the next event; return whether requests can still arrive."""
        ready = self._poll.poll(0)
        if not ready:
            self._keep_a_spare()
            ready = self._poll.poll(self._wait_ms())
        for fd, _ in ready:
            if fd == self._requests_fd:
                if not self._receive():
                    return False
            elif fd == self._wakeup_fd:
                os.read(fd, CHUNK)
            elif fd in self._pipes and not self._pipes[fd].on_ready(fd):
                self._forget(fd)
        self._reap()
        self._expire()
        self._send_chunks()
        return True

    def _wait_ms(self) -> float | None:
        commands = [command for _, command in self._commands.values()]
        times = [min(each.deadline, each.chunk_at, self._start_deadline(each)) for each in commands]
        first = min(times, default=float("inf"))
        return None if first == float("inf") else max(0.0, (first - time.monotonic()) * 1000 + 1)

    @staticmethod
    def _start_deadline(command: Command) -> float:
        return command.start_deadline if command.is_starting else float("inf")

    def _expire(self) -> None:
        now = time.monotonic()
        for _, command in list(self._commands.values()):
            if command.deadline <= now:
                command.timed_out, command.deadline = True, float("inf")
                self._kill(command)
            elif self._start_deadline(command) <= now:
                command.stderr.add(b"killed: something stopped this command before its program ran\n")
                command.start_deadline = float("inf")
                _signal([command.pid], signal.SIGKILL)

    def _send_chunks(self) -> None:
        """Send new output of the commands whose requests ask for it, as far as there is room."""
        now = time.monotonic()
        for request, command in self._commands.values():
            if not request.get("chunks"):
                continue
            outputs = {"stdout": command.stdout, "stderr": command.stderr}
            if command.chunk_at <= now:
                command.chunk_at = float("inf")
                for name, output in outputs.items():
                    header = json.dumps({"id": request["id"], "chunk": name}).encode()
                    for _ in range(CHUNKS_AT_ONCE):
                        if output.has_news and self._has_room():
                            piece = output.take(CHUNK_BYTES)
                            self._write(FRAME.pack(len(header), len(piece)) + header + piece)
            if command.chunk_at == float("inf") and any(output.has_news for output in outputs.values()):
                command.chunk_at = now + CHUNK_EVERY_S

    def _has_room(self) -> bool:
        """Return whether a chunk can be sent without waiting, and would leave room for replies."""
        import fcntl  # here, because loading it takes time that few sandboxes need to spend

        unread = int.from_bytes(fcntl.ioctl(self._replies_fd, FIONREAD, bytes(4)), sys.byteorder)
        return unread < UNREAD_BYTES and bool(self._room.poll(0))

    def _forget(self, fd: int) -> None:
        del self._pipes[fd]
        self._poll.unregister(fd)

    def _keep_a_spare(self) -> None:
        if self._spare is None:
            try:
                self._spare = Child(self._settings)
            except OSError:
                return  # the next command tries again and reports the error

    def _take_child(self) -> Child:
        self._reap()
        child, self._spare = self._spare, None
        if child is None:
            return Child(self._settings)
        _signal([child.pid], signal.SIGCONT)
        return child

    def _receive(self) -> bool:
        """Read the request bytes that have arrived. A body that does not fit in memory is discarded as it arrives."""
        chunk = os.read(self._requests_fd, 1 << 20)
        view = memoryview(chunk)
        while view:
            if self._request is None:
                view = self._receive_header(view)
            else:
                part = view[: self._body_size - self._received]
                if self._body is not None:
                    self._body[self._received : self._received + len(part)] = part
                self._received += len(part)
                view = view[len(part) :]
            if self._request is not None and self._received == self._body_size:
                request, body = self._request, self._body
                self._request = self._body = None
                self._handle(request, body)
        return bool(chunk)

    def _receive_header(self, view: memoryview) -> memoryview:
        """Take a request's header, or a part of it, from the front of `view`; return the rest."""
        needed = FRAME.size
        if len(self._head) >= FRAME.size:
            needed += FRAME.unpack_from(self._head)[0]
        part = view[: needed - len(self._head)]
        self._head += part
        if len(self._head) == needed > FRAME.size:
            self._request = json.loads(self._head[FRAME.size :])
            self._body_size, self._received = FRAME.unpack_from(self._head)[1], 0
            self._head.clear()
            try:
                self._body = bytearray(self._body_size)
            except MemoryError:
                self._body = None
        return view[len(part) :]

    def _handle(self, request: dict[str, Any], body: bytearray | None) -> None:
        try:
            if body is None:
                raise MemoryError
            operation = request["op"]
            if operation == "exec":
                self._start(request, bytes(body))
                return
            if operation == "cancel":
                for started, command in list(self._commands.values()):
                    if started["id"] == request["target"]:
                        self._kill(command)
                return
            if operation in ("export_open", "export_next", "export_close"):
                self._export(operation, request)
                return
            if operation == "upper_directories":
                self._reply({"id": request["id"]}, self._upper_directories())
                return
            reply = OPERATIONS[operation](request, bytes(body))
            self._reap()
            header: dict[str, Any] = {}
        except Exception as error:
            # The traceback's frames hold the data that filled the memory, and the reply below needs some memory.
            header, reply = _error_header(error.with_traceback(None)), b""
        self._reply({"id": request["id"], **header}, reply)

    def _export(self, operation: str, request: dict[str, Any]) -> None:
        """Begin an export, send its next piece (the empty last one lists what was left out), or end it."""
        handle = request["handle"]
        header, piece = {"id": request["id"]}, b""
        if operation == "export_open":
            bounds = request["max_entries"], request["max_bytes"]
            if request["path"] is None and self._tree is not None:
                self._exports[handle] = self._tree.TreePacker(self._settings["trees"], *bounds)
            elif request["path"]:
                self._exports[handle] = Packer(request["path"], *bounds)
            else:
                skip = frozenset(request["skip"])
                self._exports[handle] = Packer(self._upper(), *bounds, self._hidden | skip, skip)
        elif operation == "export_next":
            piece = self._exports[handle].piece()
            header["dropped"] = [] if piece else self._exports[handle].drops.lines
        elif packer := self._exports.pop(handle, None):
            packer.close()
        self._reply(header, piece)

    def _upper(self) -> str:
        return f"/proc/self/fd/{self._settings['upper_fd']}"

    def _upper_directories(self) -> bytes:
        """Return the names of the directories in the overlay's upper layer that are not hidden."""
        found: list[str] = []
        root = self._upper()
        for parent, directories, _ in os.walk(root):
            names = [os.path.relpath(os.path.join(parent, name), root) for name in directories]
            names = [name for name in names if name not in self._hidden and not os.path.islink(f"{root}/{name}")]
            directories[:] = [os.path.basename(name) for name in names]
            found += names
        return b"".join(os.fsencode(name) + b"\0" for name in found)

    def _start(self, request: dict[str, Any], body: bytes) -> None:
        argv, cookie = request["argv"], os.urandom(12).hex()
        with contextlib.suppress(PermissionError):  # the child gets the same error, and its command fails
            require_directory(request["cwd"])
        orders = {"argv": argv, "cwd": request["cwd"], "env": {**request["env"], COOKIE: cookie}}
        encoded = json.dumps({**orders, "has_stdin": bool(body)}).encode()
        try:
            child = self._take_child()
        except OSError as error:
            self._reply_failure(request, *start_failure(error, argv))
            return
        command = Command(
            child.pid,
            pipes=child.pipes,
            stdin=(len(encoded).to_bytes(4, "big") + encoded, body),
            cookie=cookie,
            timeout_s=request["timeout_s"],
            max_output_bytes=request["max_output_bytes"],
            status_fd=child.status_fd,
        )
        self._commands[command.pid] = (request, command)
        for fd, events in command.descriptors().items():
            self._pipes[fd] = command
            self._poll.register(fd, events)

    def _kill(self, command: Command) -> None:
        try:
            command.kill()
        # processes fork faster than they are killed, or /proc cannot be read for lack of descriptors or memory
        except Exception:
            _kill_everything()

    def _reap(self) -> None:
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            if self._spare is not None and pid == self._spare.pid:
                self._spare.close()
                self._spare = None
            if pid in self._commands:
                request, command = self._commands.pop(pid)
                try:
                    self._end(request, command, status)
                except BrokenPipeError:
                    raise
                except Exception as error:
                    self._reply({"id": request["id"], **_error_header(error.with_traceback(None))})

    def _end(self, request: dict[str, Any], command: Command, status: int) -> None:
        """Reply to the request of a command whose process has ended."""
        # Background processes of the command may go on writing: their output is read and discarded, so that they do not
        # block.
        open_before = command.descriptors()
        command.finish(status)
        for fd in open_before.keys() - command.descriptors().keys():
            self._forget(fd)
        assert command.exit_code is not None
        failure = command.failure.value()
        if failure:
            stage, number = json.loads(failure)
            error = OSError(number, os.strerror(number), request["cwd"])
            if stage != "cwd":
                self._reply_failure(request, *start_failure(error, request["argv"]))
            elif number in (errno.ENOENT, errno.ENOTDIR):
                self._reply({"id": request["id"], **_error_header(error)})
            else:
                self._reply_failure(request, 126, f"cannot start in {request['cwd']}: {error.strerror}\n")
            return
        stdout, stderr = command.stdout.pieces(), command.stderr.pieces()
        truncated = command.stdout.truncated or command.stderr.truncated
        size = sum(map(len, stdout))
        header = _result(command.exit_code, size, truncated, command.timed_out, command.duration_s)
        self._reply({"id": request["id"], **header}, *stdout, *stderr)

    def _reply_failure(self, request: dict[str, Any], exit_code: int, message: str) -> None:
        header = {"id": request["id"], **_result(exit_code, 0, False, False, 0.0)}
        self._reply(header, message.encode("utf-8", "surrogateescape"))

    def _reply(self, header: dict[str, Any], *body: bytes | bytearray | memoryview) -> None:
        encoded = json.dumps(header).encode()
        for part in (FRAME.pack(len(encoded), sum(map(len, body))) + encoded, *body):
            self._write(part)

    def _write(self, data: bytes | bytearray | memoryview) -> None:
        view = memoryview(data)
        while view:
            view = view[os.write(self._replies_fd, view) :]


def _error_header(error: Exception) -> dict[str, Any]:
    """Return the fields of a reply that makes the harness raise an OSError like `error`."""
    path = None
    if isinstance(error, OSError):
        number, message = error.errno or errno.EIO, error.strerror or str(error)
        if isinstance(error.filename, str | bytes):
            path = os.fsdecode(error.filename)
    elif isinstance(error, MemoryError):
        number, message = errno.ENOMEM, "too large for the sandbox's limits"
    elif isinstance(error, ValueError):  # text that cannot be a path or argument: a NUL byte, half of a surrogate pair
        number, message = errno.EINVAL, str(error)
    elif isinstance(error, OverflowError):
        number, message = errno.EOVERFLOW, str(error)
    else:
        number, message = errno.EIO, f"{type(error).__name__}: {error}"
    return {"errno": number, "message": message, "path": path}


def _result(exit_code: int, stdout: int, truncated: bool, timed_out: bool, duration_s: float) -> dict[str, Any]:
    return {
        "exit_code": exit_code,
        "stdout": stdout,
        "truncated": truncated,
        "timed_out": timed_out,
        "duration_s": duration_s,
    }


def _kill_everything() -> None:
    """Kill every process of the PID namespace except this one, its init. The kernel does it in one sweep."""
    deadline = time.monotonic() + KILL_TIMEOUT_S
    while True:
        try:
            os.kill(-1, signal.SIGKILL)
        except ProcessLookupError:
            return
        living = [name for name in os.listdir("/proc") if name.isdecimal() and name != "1" and _is_alive(name)]
        if not living:
            return
        if time.monotonic() > deadline:
            raise TimeoutError(errno.ETIMEDOUT, f"processes still alive after {KILL_TIMEOUT_S} s of SIGKILL")
        time.sleep(0.001)


def _is_alive(pid: str) -> bool:
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            return file.read().rpartition(b")")[2].split()[0] not in b"ZX"
    except OSError:
        return False


def _write(request: dict[str, Any], body: bytes) -> bytes:
    write_file(request["path"], body)
    return b""


def _unpack(request: dict[str, Any], body: bytes) -> bytes:
    unpack(request["path"], request["entries"], body)
    return b""


def _kill_all(request: dict[str, Any], body: bytes) -> bytes:
    _kill_everything()
    return b""


OPERATIONS: dict[str, Callable[[dict[str, Any], bytes], bytes]] = {
    "read_file": lambda request, _: read_file(request["path"], request["max_bytes"]),
    "write_file": _write,
    "import_dir": _unpack,
    "kill_all": _kill_all,
}


def serve(settings: Mapping[str, Any], tree: ModuleType | None = None) -> None:
    """Serve the harness as the init of a sandbox, on standard input and output, after `confine.py` has set
    everything up. `tree` is the module of that name, for snapshots."""
    # With Python's own handler a command could interrupt the executor. Commands would inherit SIG_IGN, but not a
    # handler.
    signal.signal(signal.SIGINT, lambda *_: None)
    requests_fd, replies_fd = os.dup(0), os.dup(1)
    null = os.open("/dev/null", os.O_RDWR)
    os.dup2(null, 0)
    os.dup2(null, 1)
    os.umask(0o022)
    Executor(requests_fd, replies_fd, settings, tree).serve()
