"""The executor: the one process that runs commands and touches files on a sandbox's behalf.

Inside a process sandbox it is PID 1 of the sandbox's PID namespace, started once per environment, and speaks frames
over its standard input and output (`connection.py` is the other end). This one file of the package is put into the
sandbox, so it imports nothing but the standard library. `LocalEnvironment` calls the same functions in the harness.

What the sandboxed commands cannot do to it:
- kill or stop it: the kernel drops signals that a PID namespace sends to its own init without a handler;
- read its memory, take its pipes or trace it: it is not dumpable, and commands inherit none of its descriptors;
- outlive it: when it exits, for whatever reason, the kernel kills everything in its PID namespace.

A frame is two big-endian 32-bit lengths, a JSON header of the first length, and a body of the second.

    request  {"id": 7, "op": "exec", "argv": [...], ...}  body: standard input
    reply    {"id": 7, "exit_code": 0, "stdout": 12, ...} body: standard output (12 bytes), then standard error
    reply    {"id": 8, "errno": 2, "message": "No such file or directory"}
"""

from __future__ import annotations

import errno
import json
import os
import resource
import select
import signal
import stat
import struct
import subprocess
import time

TYPE_CHECKING = False  # as in `typing`, which alone would add a tenth to the time a sandbox takes to open
if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping, Sequence
    from typing import IO, Any

FRAME = struct.Struct(">II")
COOKIE = "AGENTKIT_COMMAND"
CHUNK = 1 << 16
KILL_TIMEOUT_S = 2.0


class BoundedOutput:
    """The first and the last `limit / 2` bytes of a stream of any length, in bounded memory."""

    def __init__(self, limit: int) -> None:
        self._head_limit = limit - limit // 2
        self._tail_limit = limit // 2
        self._head = bytearray()
        self._tail = bytearray()
        self._total = 0

    @property
    def truncated(self) -> bool:
        return self._total > self._head_limit + self._tail_limit

    def add(self, chunk: bytes) -> None:
        self._total += len(chunk)
        room = self._head_limit - len(self._head)
        if room > 0:
            self._head += chunk[:room]
            chunk = chunk[room:]
        self._tail += chunk
        if len(self._tail) > self._tail_limit + (1 << 20):
            del self._tail[: len(self._tail) - self._tail_limit]

    def value(self) -> bytes:
        """Return what was kept, with a line in the middle that says how much was cut."""
        if not self.truncated:
            return bytes(self._head + self._tail)
        cut = self._total - self._head_limit - self._tail_limit
        tail = self._tail[len(self._tail) - self._tail_limit :]
        return bytes(self._head) + b"\n[... %d bytes cut ...]\n" % cut + bytes(tail)


class Command:
    """One running command: its process, its pipes and what it has printed so far.

    The owner polls `descriptors()`, calls `on_ready` for those that are ready, and `finish` once the process is gone.
    """

    def __init__(
        self,
        argv: Sequence[str],
        *,
        stdin: bytes,
        cwd: str,
        env: Mapping[str, str],
        timeout_s: float | None,
        max_output_bytes: int,
    ) -> None:
        """Start the process in a session of its own. Raises OSError when it cannot be started."""
        self.cookie = os.urandom(12).hex()
        self.stdout, self.stderr = BoundedOutput(max_output_bytes), BoundedOutput(max_output_bytes)
        self.timed_out = False
        self.exit_code: int | None = None
        self.started = time.monotonic()
        self.deadline = float("inf") if timeout_s is None else self.started + timeout_s
        self._stdin = memoryview(stdin)
        self._process = subprocess.Popen(
            argv,
            bufsize=0,
            stdin=subprocess.PIPE if stdin else subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            cwd=cwd,
            env={**env, COOKIE: self.cookie},
            start_new_session=True,
        )
        self.pid = self._process.pid
        self._pipes: dict[int, tuple[IO[bytes], BoundedOutput | None]] = {}
        for pipe, output in (
            (self._process.stdin, None),
            (self._process.stdout, self.stdout),
            (self._process.stderr, self.stderr),
        ):
            if pipe is not None:
                os.set_blocking(pipe.fileno(), False)
                self._pipes[pipe.fileno()] = (pipe, output)

    def descriptors(self) -> dict[int, int]:
        """Return the open pipes, with the poll events that each waits for."""
        return {fd: select.POLLOUT if output is None else select.POLLIN for fd, (_, output) in self._pipes.items()}

    def on_ready(self, fd: int) -> bool:
        """Move what can be moved through one pipe without blocking; return whether it is still open."""
        pipe, output = self._pipes[fd]
        try:
            if output is None:
                self._stdin = self._stdin[os.write(fd, self._stdin[:CHUNK]) :]
                done = not self._stdin
            else:
                chunk = os.read(fd, CHUNK)
                if self.exit_code is None:
                    output.add(chunk)
                done = not chunk
        except BlockingIOError:
            return True
        except BrokenPipeError:
            done = True
        if done:
            pipe.close()
            del self._pipes[fd]
        return not done

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
        """Take the process's wait status, and what it had printed before it ended."""
        for fd, (_, output) in list(self._pipes.items()):
            if output is None:
                self._pipes.pop(fd)[0].close()
                continue
            # A pipe holds at most 1 MiB; a writer left in the background must not keep us here.
            for _ in range((1 << 20) // CHUNK):
                if not select.select([fd], [], [], 0)[0] or not self.on_ready(fd):
                    break
        code = os.waitstatus_to_exitcode(wait_status)
        self.exit_code = self._process.returncode = code if code >= 0 else 128 - code
        self.duration_s = time.monotonic() - self.started

    def close(self) -> None:
        """Close the pipes that are still open."""
        for pipe, _ in self._pipes.values():
            pipe.close()
        self._pipes.clear()


def require_directory(path: str) -> None:
    if not stat.S_ISDIR(os.stat(path).st_mode):
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), path)


def start_failure(error: OSError, argv: Sequence[str]) -> tuple[int, str] | None:
    """Return the exit code and message that a shell has for a program that cannot be started, if it is that."""
    if error.errno == errno.ENOENT:
        return 127, f"{argv[0]}: not found\n"
    if error.errno == errno.EAGAIN:
        return 126, f"{argv[0]}: cannot start: too many processes\n"
    if error.errno in (errno.EACCES, errno.ENOEXEC, errno.ENOTDIR, errno.EISDIR, errno.E2BIG, errno.ENOMEM):
        return 126, f"{argv[0]}: cannot execute: {os.strerror(error.errno)}\n"
    return None


def find_processes(*, cookie: str, session: int | None = None) -> dict[int, str]:
    """Return pid -> state letter of the living processes that carry `cookie` in their environment, belong to
    `session`, or descend from one that does. Never this process itself."""
    marker = b"=" + cookie.encode() + b"\0"
    states: dict[int, str] = {}
    children: dict[int, list[int]] = {}
    roots: list[int] = []
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
            if int(sid) == session:
                roots.append(pid)
                continue
            with open(f"/proc/{name}/environ", "rb") as file:
                if marker in b"\0" + file.read(1 << 21) + b"\0":
                    roots.append(pid)
        except OSError:
            continue
    found: dict[int, str] = {}
    while roots:
        pid = roots.pop()
        if pid not in found and pid != os.getpid():
            found[pid] = states[pid]
            roots += children.get(pid, ())
    return found


def kill_processes(*, cookie: str, session: int | None = None) -> None:
    """Kill the processes that `find_processes` finds: all are stopped first, so that none can fork its way out.

    Raises:
        TimeoutError: If some are still alive after `KILL_TIMEOUT_S`.
    """
    deadline = time.monotonic() + KILL_TIMEOUT_S
    stopped: set[int] = set()
    while time.monotonic() < deadline:
        found = find_processes(cookie=cookie, session=session)
        if not found:
            return
        fresh = [pid for pid, state in found.items() if state not in "Tt" and pid not in stopped]
        _signal(fresh, signal.SIGSTOP)
        stopped.update(fresh)
        if not fresh:
            _signal(found, signal.SIGKILL)
            time.sleep(0.001)
    raise TimeoutError(errno.ETIMEDOUT, f"processes still alive after {KILL_TIMEOUT_S} s of SIGKILL")


def _signal(pids: Collection[int], number: signal.Signals) -> None:
    for pid in pids:
        try:
            os.kill(pid, number)
        except (ProcessLookupError, PermissionError):
            continue


def read_file(path: str, max_bytes: int) -> bytes:
    """Read a regular file of at most `max_bytes` bytes; EFBIG when it has more, EINVAL when it is no regular file."""
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
    """Write a regular file, making its parents; EINVAL when `path` is a pipe or a device."""
    _make_parents(path)
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_NONBLOCK | os.O_CLOEXEC, 0o644)
    try:
        _require_regular(fd, path)
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


def pack_dir(path: str, max_entries: int, max_bytes: int) -> bytes:
    """Return a directory as an uncompressed tar archive with names relative to it, in sorted order.

    Links are stored as links. EINVAL for a device, pipe or socket; EFBIG when there is too much.
    """
    import io
    import tarfile

    require_directory(path)
    buffer = io.BytesIO()
    entries = size = 0
    pending = [(path, "")]
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as archive:
        while pending:
            source, name = pending.pop()
            info = os.stat(source) if not name else os.lstat(source)
            member = tarfile.TarInfo(name)
            member.mtime, member.mode = int(info.st_mtime), stat.S_IMODE(info.st_mode)
            entries += 1
            if entries > max_entries:
                raise OSError(errno.EFBIG, f"more than {max_entries} entries", path)
            if stat.S_ISDIR(info.st_mode):
                member.type = tarfile.DIRTYPE
                children = sorted(os.listdir(source), reverse=True)
                pending += [(os.path.join(source, child), os.path.join(name, child)) for child in children]
                if name:
                    archive.addfile(member)
            elif stat.S_ISLNK(info.st_mode):
                member.type, member.linkname = tarfile.SYMTYPE, os.readlink(source)
                archive.addfile(member)
            elif stat.S_ISREG(info.st_mode):
                data = read_file(source, max_bytes - size)
                size += len(data)
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
            else:
                raise OSError(errno.EINVAL, "neither file, directory nor link", name)
    return buffer.getvalue()


def unpack_dir(path: str, data: bytes) -> None:
    """Unpack an archive that `archive.check_archive` has passed; the directory is made when missing.

    ENOTDIR when `path` is no directory; EEXIST when a directory is in the way of a file or link, or anything else in
    the way of a directory: a link that is already there is replaced, never followed.
    """
    import io
    import tarfile

    _make_parents(os.path.join(path, "x"))
    made: set[str] = set()
    directories: list[tuple[str, tarfile.TarInfo]] = []
    with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as archive:
        for member in archive:
            name = os.path.normpath(member.name)
            target = os.path.join(path, name)
            _make_inside(path, name if member.isdir() else os.path.dirname(name), made)
            if member.isdir():
                directories.append((target, member))
                continue
            try:
                os.unlink(target)
            except IsADirectoryError:
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), target) from None
            except FileNotFoundError:
                pass
            if member.issym():
                os.symlink(member.linkname, target)
            elif member.islnk():
                os.link(os.path.join(path, member.linkname), target, follow_symlinks=False)
            else:
                content = archive.extractfile(member)
                assert content is not None
                write_file(target, content.read())
                os.chmod(target, member.mode & 0o777)
                os.utime(target, (member.mtime, member.mtime))
    for target, member in reversed(directories):
        os.chmod(target, member.mode & 0o777 | 0o700)
        os.utime(target, (member.mtime, member.mtime))


def _make_inside(root: str, name: str, made: set[str]) -> None:
    """Make the directory `name` below `root`, and those above it; EEXIST when a link or a file is in the way."""
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
    """Make the directories above `path`, links followed; ENOTDIR when one of them is no directory."""
    try:
        os.makedirs(os.path.dirname(path), exist_ok=True)
    except FileExistsError:
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), path) from None


class Executor:
    """Serves requests until its input ends: one thread, one poll loop, any number of commands side by side."""

    def __init__(self, requests_fd: int, replies_fd: int) -> None:
        self._requests_fd, self._replies_fd = requests_fd, replies_fd
        self._buffer = bytearray()
        self._poll = select.poll()
        self._commands: dict[int, tuple[int, Command]] = {}
        self._pipes: dict[int, Command] = {}

    def serve(self) -> None:
        wakeup_read, wakeup_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(wakeup_write, warn_on_full_buffer=False)
        os.set_blocking(self._requests_fd, False)
        self._poll.register(self._requests_fd, select.POLLIN)
        self._poll.register(wakeup_read, select.POLLIN)
        self._reply({"id": 0})
        while True:
            deadline = min((command.deadline for _, command in self._commands.values()), default=float("inf"))
            timeout_ms = None if deadline == float("inf") else max(0.0, (deadline - time.monotonic()) * 1000 + 1)
            for fd, _ in self._poll.poll(timeout_ms):
                if fd == self._requests_fd:
                    if not self._receive():
                        return
                elif fd == wakeup_read:
                    os.read(wakeup_read, CHUNK)
                elif fd in self._pipes and not self._pipes[fd].on_ready(fd):
                    del self._pipes[fd]
                    self._poll.unregister(fd)
            self._reap()
            now = time.monotonic()
            for _, command in list(self._commands.values()):
                if command.deadline <= now:
                    command.timed_out, command.deadline = True, float("inf")
                    self._kill(command)

    def _receive(self) -> bool:
        chunk = os.read(self._requests_fd, 1 << 20)
        self._buffer += chunk
        while len(self._buffer) >= FRAME.size:
            header_size, body_size = FRAME.unpack_from(self._buffer)
            end = FRAME.size + header_size + body_size
            if len(self._buffer) < end:
                break
            header = json.loads(self._buffer[FRAME.size : FRAME.size + header_size])
            body = bytes(self._buffer[FRAME.size + header_size : end])
            del self._buffer[:end]
            self._handle(header, body)
        return bool(chunk)

    def _handle(self, request: dict[str, Any], body: bytes) -> None:
        operation = request.pop("op")
        try:
            if operation == "exec":
                self._start(request, body)
            elif operation == "cancel":
                for request_id, command in list(self._commands.values()):
                    if request_id == request["target"]:
                        self._kill(command)
            else:
                reply = OPERATIONS[operation](request, body)
                self._reap()
                self._reply({"id": request["id"]}, reply)
        except OSError as error:
            self._reply({"id": request["id"], "errno": error.errno, "message": error.strerror, "path": error.filename})
        except ValueError as error:  # text that is no path or argument: a NUL byte, half of a surrogate pair
            self._reply({"id": request["id"], "errno": errno.EINVAL, "message": str(error), "path": None})
        except MemoryError:
            message = "too large for the sandbox's limits"
            self._reply({"id": request["id"], "errno": errno.ENOMEM, "message": message, "path": None})

    def _start(self, request: dict[str, Any], body: bytes) -> None:
        argv = request["argv"]
        require_directory(request["cwd"])
        try:
            command = Command(
                argv,
                stdin=body,
                cwd=request["cwd"],
                env=request["env"],
                timeout_s=request["timeout_s"],
                max_output_bytes=request["max_output_bytes"],
            )
        except OSError as error:
            failure = start_failure(error, argv)
            if failure is None:
                raise
            exit_code, message = failure
            stderr = message.encode("utf-8", "surrogateescape")
            self._reply({"id": request["id"], **_result(exit_code, b"", False, False, 0.0)}, stderr)
            return
        self._commands[command.pid] = (request["id"], command)
        for fd, events in command.descriptors().items():
            self._pipes[fd] = command
            self._poll.register(fd, events)

    def _kill(self, command: Command) -> None:
        try:
            command.kill()
        except TimeoutError:
            _kill_everything()

    def _reap(self) -> None:
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            if pid not in self._commands:
                continue
            request_id, command = self._commands.pop(pid)
            open_before = command.descriptors()
            command.finish(status)
            for fd in open_before.keys() - command.descriptors().keys():
                del self._pipes[fd]
                self._poll.unregister(fd)
            stdout, stderr = command.stdout.value(), command.stderr.value()
            truncated = command.stdout.truncated or command.stderr.truncated
            assert command.exit_code is not None
            header = _result(command.exit_code, stdout, truncated, command.timed_out, command.duration_s)
            self._reply({"id": request_id, **header}, stdout + stderr)

    def _reply(self, header: dict[str, Any], body: bytes = b"") -> None:
        encoded = json.dumps(header).encode()
        for part in (FRAME.pack(len(encoded), len(body)) + encoded, body):
            view = memoryview(part)
            while view:
                view = view[os.write(self._replies_fd, view) :]


def _result(exit_code: int, stdout: bytes, truncated: bool, timed_out: bool, duration_s: float) -> dict[str, Any]:
    return {
        "exit_code": exit_code,
        "stdout": len(stdout),
        "truncated": truncated,
        "timed_out": timed_out,
        "duration_s": duration_s,
    }


def _kill_everything() -> None:
    """Kill every process of the PID namespace but this one, its init; the kernel does it in one sweep."""
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
    unpack_dir(request["path"], body)
    return b""


def _kill_all(request: dict[str, Any], body: bytes) -> bytes:
    _kill_everything()
    return b""


OPERATIONS: dict[str, Callable[[dict[str, Any], bytes], bytes]] = {
    "read_file": lambda request, _: read_file(request["path"], request["max_bytes"]),
    "write_file": _write,
    "export_dir": lambda request, _: pack_dir(request["path"], request["max_entries"], request["max_bytes"]),
    "import_dir": _unpack,
    "kill_all": _kill_all,
}


def main() -> None:
    """Become the init of a sandbox: refuse what is not one, set the limits that commands inherit, and serve."""
    import ctypes

    with open(os.path.join(os.path.dirname(__file__), "limits.json")) as file:
        limits: dict[str, int] = json.load(file)
    if os.getpid() != 1 or os.getuid() == 0:
        raise SystemExit(f"the executor must be PID 1 and not root, but it is PID {os.getpid()}, uid {os.getuid()}")
    for name, value in limits.items():
        number = getattr(resource, name)
        hard = resource.getrlimit(number)[1]
        bound = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(number, (bound, bound))
    with open("/proc/self/oom_score_adj", "w") as file:
        file.write("500")  # when the machine runs out of memory, a sandbox goes before the harness
    libc = ctypes.CDLL(None, use_errno=True)
    pr_set_dumpable, pr_set_no_new_privs = 4, 38
    if libc.prctl(pr_set_no_new_privs, 1, 0, 0, 0) or libc.prctl(pr_set_dumpable, 0, 0, 0, 0):
        raise SystemExit(f"prctl: {os.strerror(ctypes.get_errno())}")
    # A handler, unlike SIG_IGN, is not inherited by the commands; without either a command could interrupt us.
    signal.signal(signal.SIGINT, lambda *_: None)
    requests_fd, replies_fd = os.dup(0), os.dup(1)
    null = os.open("/dev/null", os.O_RDWR)
    os.dup2(null, 0)
    os.dup2(null, 1)
    os.umask(0o022)
    try:
        Executor(requests_fd, replies_fd).serve()
    except BrokenPipeError:
        return


if __name__ == "__main__":
    main()
