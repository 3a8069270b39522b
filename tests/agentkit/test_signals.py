"""Ctrl-C and SIGTERM end a command at any time with one line and status 128 + the signal number."""

from __future__ import annotations

import os
import random
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

MAIN = """
import signal, sys
if "ignored" not in sys.argv:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a background shell may have had it ignored
from agentkit.cli import main, signals
original = signals.install
def install():
    original()
    print("installed", flush=True)
signals.install = install
sys.argv.remove("ignored") if "ignored" in sys.argv else None
main()
"""
TASK = "id: t\ninstruction: Say hello.\nverifier: {command: 'true'}\nsolution: {command: 'true'}\n"
LINES = {signal.SIGINT: "Interrupted.", signal.SIGTERM: "Terminated."}
COMMANDS = (
    ("eval", "everyday", "--limit", "6", "-k", "20", "--env", "unsafe-local"),
    ("run", "t.yaml", "--env", "unsafe-local"),
    ("demo", "--env", "unsafe-local"),
    ("check", "t.yaml", "--env", "unsafe-local"),
    ("doctor",),
    ("chat", "--env", "unsafe-local"),
)
ENDS = {"run": "list prices", "demo": "solved ", "check": "tasks are sound", "doctor": "models"}
"""The last words of commands that may be done before a signal comes; signals are ignored while the interpreter ends."""


def start(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    """Start a command in its own process and wait until its signal handlers are installed."""
    (folder / "t.yaml").write_text(TASK)
    child = subprocess.Popen(
        [sys.executable, "-c", MAIN, *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert child.stdout is not None and child.stdout.readline() == "installed\n"
    return child


def check_ending(child: subprocess.Popen[str], number: signal.Signals) -> None:
    output, errors = child.communicate(timeout=60)
    said = [line for line in errors.splitlines() if not line.startswith(("Warning: at temperature 0", "compiling"))]
    assert len(said) == 1 and (said[0] == LINES[number] or said[0].startswith("interrupted ")), errors
    assert child.returncode == (4 if said[0].startswith("interrupted ") else 128 + number), errors
    assert not any(line.startswith("Traceback") for line in output.splitlines()), output  # an answer may quote one


@pytest.mark.parametrize("number", LINES, ids=lambda number: signal.Signals(number).name)
def test_a_signal_right_after_the_start(number: signal.Signals, tmp_path: Path) -> None:
    child = start(tmp_path, "doctor")
    child.send_signal(number)
    check_ending(child, number)


def test_an_interrupted_evaluation_reports_its_progress(tmp_path: Path) -> None:
    child = start(
        tmp_path, "eval", "everyday", "--limit", "6", "-k", "30", "-n", "1", "--env", "unsafe-local", "--out", "run"
    )
    assert child.stdout is not None
    assert "[1/180]" in child.stdout.readline()
    child.send_signal(signal.SIGINT)
    output, errors = child.communicate(timeout=60)
    assert child.returncode == 4, errors
    finished = len((tmp_path / "run" / "trials.jsonl").read_text().splitlines())
    hint = "continue with `agentkit eval --resume run`"
    assert errors.splitlines()[-1] == f"interrupted after {finished} of 180 trials; {hint}"
    assert "report  run/report.html" in output and (tmp_path / "run" / "report.html").exists()


def test_a_signal_that_is_ignored_stays_ignored(tmp_path: Path) -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        child = start(tmp_path, "doctor", "ignored")
    finally:
        signal.signal(signal.SIGINT, before)
    child.send_signal(signal.SIGINT)
    output, errors = child.communicate(timeout=60)
    assert child.returncode in (0, 3) and "engine" in output, errors


@pytest.mark.hostile
@pytest.mark.parametrize("number", LINES, ids=lambda number: signal.Signals(number).name)
@pytest.mark.parametrize("arguments", COMMANDS, ids=lambda arguments: arguments[0])
def test_a_signal_at_any_moment(arguments: tuple[str, ...], number: signal.Signals, tmp_path: Path) -> None:
    """Sends a signal, sometimes twice, at random moments from the first import on."""
    draw = random.Random(f"{arguments}/{number}")
    for round_ in range(8):
        folder = tmp_path / str(round_)
        folder.mkdir()
        child = start(folder, *arguments)
        wait = draw.uniform(0, 0.4 if round_ % 2 else 4)
        assert child.stdout is not None
        deadline = time.monotonic() + wait
        while child.poll() is None and (left := deadline - time.monotonic()) > 0:
            select.select([], [], [], min(left, 0.05))
        if child.poll() is not None:
            child.communicate()
            continue
        child.send_signal(number)
        if round_ % 3 == 0 and child.poll() is None:
            child.send_signal(number)
        last_words = ENDS.get(arguments[0])
        if last_words is not None and child.wait(timeout=60) in (0, 1, 3):  # its work was done before the signal came
            output, errors = child.communicate()
            assert last_words in output, errors
            continue
        check_ending(child, number)
