"""The example scripts run and print what they claim."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from agentkit_engine.engine import PACKAGED_MODELS
from agentkit_environments import available_backends

EXAMPLES = Path(__file__).parents[2] / "examples"


pytestmark = [
    pytest.mark.sandbox,
    pytest.mark.skipif(
        not (PACKAGED_MODELS["tiny"] / "config.json").is_file(), reason="the tiny model is not packaged"
    ),
    pytest.mark.skipif(
        all(reason for backend, reason in available_backends().items() if backend != "unsafe-local"),
        reason="no sandbox can be opened here",
    ),
]


def test_hello_agent_is_the_readmes_first_example() -> None:
    """`tests/test_examples.py` runs the README's examples and compares their output."""
    path = EXAMPLES / "hello_agent.py"
    assert len(path.read_text().splitlines()) < 20
    code = path.read_text().partition('"""\n\n')[2]
    shown = (EXAMPLES.parent / "README.md").read_text()
    assert f"```python\n{code}```\n\nIt prints `sunny, 21 degrees`" in shown


def test_mcp() -> None:
    path = EXAMPLES / "mcp.py"
    assert len(path.read_text().splitlines()) < 30
    done = subprocess.run([sys.executable, path], capture_output=True, text=True, check=True, timeout=60)
    assert (done.stdout, done.stderr) == ("-3.5h\n", "")


@pytest.mark.parametrize(
    ("name", "printed"),
    [
        ("typed_output", "sky='sunny' degrees=21\n"),
        ("fork_and_best_of_n", "1 of 3 is right: 100 10 9\n"),
        (
            "parallel_tools",
            "Paris?\nRome?\nOslo?\nOslo.\nRome.\nParis.\nParis is sunny, Rome is sunny, Oslo is sunny\n",
        ),
        ("subagents", "sunny, 21 degrees / rainy, 14 degrees\n2 turns, 6 with sub-agents\n"),
    ],
)
def test_an_example_is_short_and_prints_its_answer(name: str, printed: str) -> None:
    path = EXAMPLES / f"{name}.py"
    assert len(path.read_text().splitlines()) < 30
    done = subprocess.run([sys.executable, path], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout == printed


def test_replay() -> None:
    path = EXAMPLES / "replay.py"
    assert len(path.read_text().splitlines()) < 30
    done = subprocess.run([sys.executable, path], capture_output=True, text=True, check=True, timeout=60)
    first, second = done.stdout.splitlines()
    assert first == "equal"
    assert re.fullmatch(r"turn 1, token \d+ \(in a prompt\): recorded \d+ .*, replayed \d+ .*", second)


def test_resume() -> None:
    path = EXAMPLES / "resume.py"
    assert len(path.read_text().splitlines()) < 40
    done = subprocess.run([sys.executable, path], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout == "Error: outcome unknown\nsunny, 21 degrees, after 3 turns\n"
