"""Steps that oracles of several operations share."""

from __future__ import annotations

from agentkit_evals.synth.oracle import Act, Step, submit
from agentkit_evals.synth.shell import quote


def run(command: str) -> tuple[str, dict[str, str]]:
    """Return the call that runs a shell command."""
    return ("bash", {"command": command})


def always(act: Act) -> Step:
    """Return the step that takes one turn, whatever the results before it are."""
    return lambda results: act


def look(path: str) -> Act:
    """Return the turn that looks at the first lines of a file."""
    return Act(f"I look at the first lines of `{path}`.", [run(f"head -n 3 {quote(path)}")])


def look_and_run(path: str, thought: str, command: str, end: str) -> list[Step]:
    """Return an oracle that looks at a file, runs one command and submits what it prints."""
    return [
        lambda results: look(path),
        lambda results: Act(thought, [run(command)]),
        lambda results: submit(end, results[0].strip()),
    ]


def read_and_answer(path: str, thought: str, answer: str) -> list[Step]:
    """Return an oracle that reads a file and submits the answer."""
    return [
        lambda results: Act(f"I read `{path}`.", [("read_file", {"path": path})]),
        lambda results: submit(thought, answer),
    ]
