"""`agentkit chat` through a pipe and through a terminal."""

from __future__ import annotations

import errno
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from agentkit.events import Compacted
from agentkit.messages import AssistantMessage
from agentkit.trajectory import Trajectory
from agentkit_engine.engine import PACKAGED_MODELS

pytestmark = pytest.mark.skipif(
    not (PACKAGED_MODELS["tiny"] / "config.json").is_file(), reason="the tiny model is not packaged"
)
CHAT = [sys.executable, "-m", "agentkit", "chat", "--env", "unsafe-local", "--seed", "1"]


def test_each_line_of_piped_input_is_one_message(tmp_path: Path) -> None:
    said = b"What is the sum of 19, 23 and 31? Submit it.\n\n/help\nHello\n/nope\n\xff\xfe\n/new\n"
    said += b"What is the sum of 1 and 2? Submit it."
    done = subprocess.run(
        [*CHAT, "--trajectory", "chat.jsonl"], input=said, cwd=tmp_path, capture_output=True, timeout=120, check=False
    )
    shown, errors = done.stdout.decode(), done.stderr.decode()
    assert done.returncode == 0, errors
    assert "thought for" in shown
    assert "Unknown command /nope." in shown and "Started a new conversation." in shown
    assert "Traceback" not in errors
    first, second = Trajectory.load(tmp_path / "chat.jsonl"), Trajectory.load(tmp_path / "chat.1.jsonl")
    thoughts = [m.reasoning for m in first.messages if isinstance(m, AssistantMessage) and m.reasoning]
    assert thoughts and thoughts[0] not in shown
    users = [m.content for m in first.messages if m.role == "user"]
    assert users[:2] == ["What is the sum of 19, 23 and 31? Submit it.", "Hello"]
    assert [m.content for m in second.messages if m.role == "user"] == ["What is the sum of 1 and 2? Submit it."]


def test_a_long_conversation_is_compacted(tmp_path: Path) -> None:
    """Each message is a turn here, and all but the latest three are left out."""
    flags = ["--max-tokens", "4", "--compact-at", "1", "--trajectory", "chat.jsonl"]
    done = subprocess.run(
        [*CHAT, *flags], input=b"Hello\n" * 5, cwd=tmp_path, capture_output=True, timeout=120, check=False
    )
    assert done.returncode in (0, 1), done.stderr.decode()  # four tokens need not be an answer
    (compacted,) = [each for each in Trajectory.load(tmp_path / "chat.jsonl").records if isinstance(each, Compacted)]
    assert compacted.turns_left_out == 1
    assert f"compacted: {compacted.tokens_before:,} to {compacted.tokens_after:,} tokens" in done.stdout.decode()


class Terminal:
    """A chat in its own pseudo-terminal."""

    def __init__(self, folder: Path, *more: str) -> None:
        env = {
            **os.environ,
            "XDG_STATE_HOME": str(folder / "state"),
            "TERM": "xterm",
            "COLUMNS": "120",
        }
        self.pid, self.fd = pty.fork()
        if self.pid == 0:
            os.chdir(folder)
            os.execve(sys.executable, [*CHAT, *more], env)
        self.shown = self.matched = ""

    def wait_for(self, pattern: str, timeout_s: float = 60) -> None:
        """Read until the output since the last match contains the pattern."""
        deadline = time.monotonic() + timeout_s
        while not (match := re.search(pattern, self.shown)):
            ready, _, _ = select.select([self.fd], [], [], max(0.0, deadline - time.monotonic()))
            assert ready, f"no {pattern!r} in {self.shown!r}"
            try:
                data = os.read(self.fd, 65536)
            except OSError as exc:
                assert exc.errno == errno.EIO
                data = b""
            assert data, f"it ended without {pattern!r}: {self.shown!r}"
            self.shown += data.decode(errors="replace")
        self.matched = match[0]
        self.shown = self.shown[match.end() :]

    def type(self, text: str) -> None:
        os.write(self.fd, text.encode())

    def end(self) -> int:
        """Read the remaining output and return the exit status."""
        while True:
            try:
                if not os.read(self.fd, 65536):
                    break
            except OSError:
                break
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


def test_the_user_is_asked_before_a_call_that_may_change_something(tmp_path: Path) -> None:
    chat = Terminal(tmp_path, "--approve", "ask")
    chat.wait_for("> ")
    chat.type("What is the sum of 19, 23 and 31? Submit it.\n")
    asked = 0
    while True:
        chat.wait_for("> |a reason to refuse: ")
        if chat.matched == "> ":
            break
        asked += 1
        chat.type("y\n")
    assert asked >= 1
    chat.type("\x04")
    assert chat.end() == 0


def test_ctrl_c_stops_the_turn_and_ctrl_d_quits(tmp_path: Path) -> None:
    terminal = Terminal(tmp_path, "--trajectory", "chat.jsonl")
    terminal.wait_for("Ctrl-D to quit")
    terminal.wait_for("> ")
    for _ in range(20):  # Ctrl-C at the prompt only prints a hint
        terminal.type("\x03")
        if select.select([terminal.fd], [], [], 3)[0]:
            break
    terminal.wait_for("Ctrl-D to quit")
    terminal.wait_for("> ")
    terminal.type("Run `sleep 50` with bash.\n")
    terminal.wait_for(r"thinking|thought|→")
    terminal.type("\x03")
    terminal.wait_for("> ")
    terminal.type("What is the sum of 19, 23 and 31? Submit it.\n")
    terminal.wait_for(
        "thinking|thought|→"
    )  # what the model answers depends on how much of the stopped turn it has seen
    terminal.wait_for("> ")
    terminal.type("\x04")
    assert terminal.end() == 0
    record = Trajectory.load(tmp_path / "chat.jsonl")
    assert [m.content for m in record.messages if m.role == "user"][
        -1
    ] == "What is the sum of 19, 23 and 31? Submit it."
    history = tmp_path / "state" / "agentkit" / "chat_history"
    assert "sum of 19" in history.read_text() and history.stat().st_mode & 0o077 == 0


def test_sigterm_at_the_prompt_quits(tmp_path: Path) -> None:
    terminal = Terminal(tmp_path)
    terminal.wait_for("Ctrl-D to quit")
    terminal.wait_for("> ")
    for _ in range(20):  # readline may notice a signal only at the next one
        os.kill(terminal.pid, signal.SIGTERM)
        if select.select([terminal.fd], [], [], 3)[0]:
            break
    assert terminal.end() == 143
