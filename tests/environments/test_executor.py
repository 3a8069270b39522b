"""The executor outside any sandbox: it answers every request and goes on."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
import termios
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from agentkit_environments import executor
from agentkit_environments.executor import FRAME, BoundedOutput, kill_processes

if TYPE_CHECKING:
    from tests.conftest import Tag, WaitUntil

SERVE = f"""
import errno, os, resource, struct, sys
sys.path.insert(0, {os.path.dirname(executor.__file__)!r})
import executor

def deep(): return deep()
def fill(): return [bytes(1 << 40)]
def raise_it(error): raise error

FAULTS = {{
    "overflow": lambda: os.utime(".", (1 << 80, 0)),
    "struct": lambda: struct.pack("B", 300),
    "recursion": deep,
    "memory": fill,
    "unicode": lambda: b"\\xff".decode(),
    "surrogate": lambda: os.stat("\\ud800"),
    "value": lambda: os.stat("a\\0b"),
    "type": lambda: len(3),
    "key": lambda: {{}}["x"],
    "zero": lambda: 1 / 0,
    "no-errno": lambda: raise_it(OSError("no number")),
    "bytes-path": lambda: os.stat(b"/nowhere\\xff"),
    "number-path": lambda: os.stat(10 ** 6),
    "stop": lambda: next(iter(())),
    "assertion": lambda: raise_it(AssertionError()),
}}
executor.OPERATIONS["fault"] = lambda request, _: FAULTS[request["fault"]]()
executor.OPERATIONS["echo"] = lambda request, body: body
executor._kill_everything = lambda: None
for name, value in eval(sys.argv[1]).items():
    resource.setrlimit(getattr(resource, name), (value, value))
executor.serve({{"cgroup_fds": [], "rlimits": {{}}}})
"""
FAULTS = [line.split('"')[1] for line in SERVE.splitlines() if line.startswith('    "')]


def state(pid: int) -> str:
    """Return the state letter of a process, X if there is none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "X"


class Peer:
    """The harness's end of an executor."""

    def __init__(self, limits: dict[str, int] | None = None) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-c", SERVE, repr(limits or {})], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        assert self.receive()[0] == {"id": 0}

    def send(self, header: dict[str, Any], body: bytes = b"") -> None:
        encoded = json.dumps(header).encode()
        assert self._process.stdin is not None
        self._process.stdin.write(FRAME.pack(len(encoded), len(body)) + encoded + body)
        self._process.stdin.flush()

    def receive(self) -> tuple[dict[str, Any], bytes]:
        assert self._process.stdout is not None
        header_size, body_size = FRAME.unpack(self._process.stdout.read(FRAME.size))
        header: dict[str, Any] = json.loads(self._process.stdout.read(header_size))
        return header, self._process.stdout.read(body_size)

    def unread(self) -> int:
        """Return the number of bytes that the executor has sent and nobody has read."""
        assert self._process.stdout is not None
        return int.from_bytes(fcntl.ioctl(self._process.stdout, termios.FIONREAD, bytes(4)), sys.byteorder)

    def ask(self, header: dict[str, Any], body: bytes = b"") -> tuple[dict[str, Any], bytes]:
        self.send(header, body)
        return self.receive()

    def exec(self, *argv: str, **fields: Any) -> tuple[dict[str, Any], bytes]:
        defaults = {"cwd": "/", "env": {"PATH": os.environ["PATH"]}, "timeout_s": 60, "max_output_bytes": 1 << 16}
        return self.ask({"id": 1, "op": "exec", "argv": argv, **defaults, **fields})

    def children(self) -> list[int]:
        pid = self._process.pid
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]

    def close(self) -> int:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.stdout.close()
        return self._process.wait(timeout=30)


@pytest.fixture(scope="module")
def peer() -> Iterator[Peer]:
    opened = Peer()
    yield opened
    assert opened.close() == 0


@pytest.mark.parametrize("fault", FAULTS)
def test_every_exception_becomes_a_reply(peer: Peer, fault: str) -> None:
    header, body = peer.ask({"id": 7, "op": "fault", "fault": fault})
    assert header["id"] == 7
    assert isinstance(header["errno"], int)
    assert header["errno"] > 0
    assert header["message"] is not None
    assert body == b""
    expected = {"overflow": errno.EOVERFLOW, "memory": errno.ENOMEM, "value": errno.EINVAL, "no-errno": errno.EIO}
    assert header["errno"] == expected.get(fault, header["errno"])
    assert peer.ask({"id": 8, "op": "echo"}, b"alive") == ({"id": 8}, b"alive")


def test_an_unknown_operation_and_missing_fields_are_replies(peer: Peer) -> None:
    assert peer.ask({"id": 1, "op": "no-such-operation"})[0]["errno"] == errno.EIO
    assert peer.ask({"id": 2})[0]["errno"] == errno.EIO
    assert peer.ask({"id": 3, "op": "read_file"})[0]["errno"] == errno.EIO
    assert peer.ask({"id": 4, "op": "exec", "argv": []})[0]["errno"] == errno.EIO
    assert peer.exec("true")[0]["exit_code"] == 0


def test_chunks_leave_room_for_replies_of_a_harness_that_does_not_read(tmp_path: Path, wait_until: WaitUntil) -> None:
    peer = Peer()
    flood = {"cwd": "/", "env": {"PATH": os.environ["PATH"]}, "timeout_s": 60, "max_output_bytes": 64 << 20}
    for number in range(8):
        peer.send({"id": number, "op": "exec", "argv": ["yes"], "chunks": True, **flood})
    wait_until(lambda: peer.unread() >= executor.UNREAD_BYTES, "chunks that nobody reads")
    path = str(tmp_path / "written")
    peer.send({"id": 98, "op": "write_file", "path": path}, b"x" * 1_000_000)
    wait_until(lambda: os.path.exists(path), "a request that is handled")
    for number in range(8):
        peer.send({"id": 99, "op": "cancel", "target": number})
    chunks, results = dict.fromkeys(range(8), b""), 0
    while results < 8:
        header, body = peer.receive()
        if "chunk" in header:
            chunks[header["id"]] += body
        elif "exit_code" in header:
            assert header["exit_code"] == 128 + signal.SIGKILL and body.startswith(chunks[header["id"]])
            results += 1
    assert any(chunks.values())
    assert peer.close() == 0


def test_a_body_that_does_not_fit_in_memory_is_refused() -> None:
    peer = Peer({"RLIMIT_DATA": 96 << 20})
    header, _ = peer.ask({"id": 1, "op": "echo"}, bytes(128 << 20))
    assert header["errno"] == errno.ENOMEM
    assert peer.ask({"id": 2, "op": "echo"}, b"alive") == ({"id": 2}, b"alive")
    assert peer.close() == 0


def test_output_that_does_not_fit_in_memory_is_cut() -> None:
    peer = Peer({"RLIMIT_DATA": 96 << 20})
    header, body = peer.exec("head", "-c", "300000000", "/dev/zero", max_output_bytes=1 << 30)
    assert (header["exit_code"], header["truncated"]) == (0, True)
    assert b" bytes cut ...]" in body
    assert peer.exec("echo", "alive")[1] == b"alive\n"
    assert peer.close() == 0


def test_a_command_fails_as_a_value_when_descriptors_run_out() -> None:
    peer = Peer({"RLIMIT_NOFILE": 40})
    for number in range(30):
        fields = {"cwd": "/", "env": {}, "timeout_s": 60, "max_output_bytes": 10}
        peer.send({"id": number, "op": "exec", "argv": ["/bin/sleep", "1"], **fields})
    replies = [peer.receive() for _ in range(30)]
    codes = [header["exit_code"] for header, _ in replies]
    assert set(codes) == {0, 126}
    assert b"Too many open files" in next(body for header, body in replies if header["exit_code"] == 126)
    assert peer.exec("echo", "alive")[1] == b"alive\n"
    assert peer.close() == 0


def test_commands_that_cannot_be_started(peer: Peer, tmp_path: Path) -> None:
    script = tmp_path / "script"
    script.write_text("no interpreter is named here")
    script.chmod(0o755)
    for argv, code, said in [
        (["no-such-program"], 127, b"not found"),
        (["/"], 126, b"Permission denied"),
        ([str(script)], 126, b"Exec format error"),
        (["echo", "x" * (1 << 20)], 126, b"Argument list too long"),
        (["x" * 5000], 126, b"File name too long"),
    ]:
        header, body = peer.exec(*argv)
        assert header["exit_code"] == code, argv
        assert said in body
    assert peer.exec("true", cwd="/nowhere")[0]["errno"] == errno.ENOENT
    assert peer.exec("true", cwd=str(script))[0]["errno"] == errno.ENOTDIR


def has_arrived(peer: Peer, pid: int) -> bool:
    return pid not in peer.children() or state(pid) == "T"


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_killing_or_stopping_the_spare_child_has_no_effect(
    peer: Peer, number: signal.Signals, wait_until: WaitUntil
) -> None:
    for _ in range(3):
        wait_until(lambda: len(peer.children()) == 1, "a spare child")
        (pid,) = peer.children()
        os.kill(pid, number)
        wait_until(partial(has_arrived, peer, pid), "the signal to arrive")
        assert peer.exec("echo", "alive")[1] == b"alive\n"


def test_bounded_output_keeps_both_ends_when_memory_is_short() -> None:
    class Full(bytearray):
        def __iadd__(self, other: Any) -> Any:  # type: ignore[misc]
            raise MemoryError

    output = BoundedOutput(100)
    output.add(b"a" * 50 + b"b" * 50)
    output._tail = Full(output._tail)
    output.add(b"lost")
    assert output.truncated
    assert output.value() == b"a" * 25 + b"\n[... 54 bytes cut ...]\n" + b"b" * 25


WATCHER = """
import os, subprocess, sys
cookie, tag = sys.argv[1:]
subprocess.run(["sleep", tag], env={"AGENTKIT_COMMAND": cookie, "PATH": os.environ["PATH"]})
if os.fork():
    os.wait()
os.setsid()
os.execvpe("sleep", ["sleep", tag], {"PATH": os.environ["PATH"]})
"""
COMMAND = """
import os, subprocess, sys
subprocess.run([sys.executable, "-c", *sys.argv[1:]], env={"PATH": os.environ["PATH"]}, start_new_session=True)
"""


def test_all_processes_are_stopped_before_any_is_killed(
    tag: Tag, monkeypatch: pytest.MonkeyPatch, wait_until: WaitUntil
) -> None:
    """A process without the cookie that forks when its child dies must not get the chance to fork."""
    cookie = f"cookie-{tag.value}"
    command = subprocess.Popen(
        [sys.executable, "-c", COMMAND, WATCHER, cookie, tag.value],
        env={"PATH": os.environ["PATH"], "AGENTKIT_COMMAND": cookie},
        start_new_session=True,
    )
    tag.wait(3)  # the command, the watcher, and `sleep`
    known = set(tag.pids())
    kill = os.kill

    def give_the_others_time(pid: int, number: int) -> None:
        kill(pid, number)
        if number == signal.SIGKILL:
            wait_until(lambda: state(pid) in "ZX", "the process to die")
            wait_until(lambda: all(state(one) in "TZX" for one in known) or set(tag.pids()) - known != set(), "them")

    monkeypatch.setattr(os, "kill", give_the_others_time)
    kill_processes(cookie=cookie, session=command.pid)
    command.wait(timeout=10)
    survivors = tag.pids()
    for pid in survivors:
        kill(pid, signal.SIGKILL)
    assert survivors == []


@contextmanager
def sleeping(env: dict[str, str], wait_until: WaitUntil) -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(["/bin/sleep", "60"], env=env, start_new_session=True)
    try:
        wait_until(lambda: "sleep" in Path(f"/proc/{process.pid}/cmdline").read_text(), "the program to run")
        yield process
    finally:
        process.kill()
        process.wait()


def test_a_process_whose_program_is_being_loaded_is_killed_once_it_has_variables(
    monkeypatch: pytest.MonkeyPatch, wait_until: WaitUntil
) -> None:
    """The kernel shows no variables of a process for a moment of each `exec`."""
    with sleeping({executor.COOKIE: "being-loaded"}, wait_until) as process:
        shown, looks = executor._environment, [None]

        def environment(pid: str) -> bytes | None:
            return looks.pop() if pid == str(process.pid) and looks else shown(pid)

        monkeypatch.setattr(executor, "_environment", environment)
        kill_processes(cookie="being-loaded")
        assert process.wait(timeout=10) == -signal.SIGKILL


def test_a_process_that_never_shows_its_variables_is_waited_for_in_vain(
    monkeypatch: pytest.MonkeyPatch, wait_until: WaitUntil
) -> None:
    monkeypatch.setattr(executor, "KILL_TIMEOUT_S", 0.05)
    with sleeping({}, wait_until) as process:
        assert executor._environment(str(process.pid)) == b""
        monkeypatch.setattr(executor, "_environment", lambda pid: None if pid == str(process.pid) else b"")
        kill_processes(cookie="of-nobody")
        assert process.poll() is None
