"""The expected answer of a task, read from the task itself, to show beside a wrong answer."""

from __future__ import annotations

import re
import shlex

from agentkit.task import CallsConfig, HarborConfig, Task, TestsConfig
from agentkit_evals.calls import shown_calls

VERDICT_LINES = 6
"""Number of lines of verifier output to show for a failure."""

_LITERAL = r"""('[^']*'|"[^"$`\\]*"|[^\s;&|()<>$`'"\\\]]+)"""
_EQUALS = re.compile(
    rf"""(?:test|\[)\s+"?\$(?:\{{AGENTKIT_ANSWER\}}|AGENTKIT_ANSWER|\([^()]*\$AGENTKIT_ANSWER[^()]*\))"?\s+==?\s+{_LITERAL}"""
)
_CONTAINS = re.compile(rf"""\$AGENTKIT_ANSWER"?\s*\|\s*grep\s+-\w*F\w*\s+(?:--\s+)?{_LITERAL}""")
_FILE = re.compile(rf"""(?:test|\[)\s+"\$\(cat\s+([\w./-]+)\)"\s+==?\s+{_LITERAL}""")
_PRINTS = re.compile(rf"""(?:echo|printf\s+'%s(?:\\n)?')\s+{_LITERAL}\s*""")


def expected_of(task: Task) -> str | None:
    """Return the answer that `task` expects, as readable text, or None if the task does not contain it.

    Sources, in this order: `metadata.expected`; the expected calls; a verifier that compares the answer, or a file,
    with a literal; a solution that only prints a literal.
    """
    if "expected" in task.metadata:
        return str(task.metadata["expected"])
    if task.verifier is None:
        return None
    if isinstance(task.verifier, CallsConfig):
        return shown_calls(task.verifier.calls)
    if isinstance(task.verifier, TestsConfig | HarborConfig):
        return None
    command = task.verifier.command
    if match := _EQUALS.search(command):
        return _unquoted(match[1])
    if match := _CONTAINS.search(command):
        return f"… {_unquoted(match[1])} …"
    if match := _FILE.search(command):
        return f"{match[1]}: {_unquoted(match[2])}"
    if task.solution is not None and (match := _PRINTS.fullmatch(task.solution.command)):
        return _unquoted(match[1])
    return None


def why_not(task: Task, answer: str | None, verifier_output: str) -> list[tuple[str, str]]:
    """Return (label, text) lines that explain a rejected answer: expected, given, end of the verifier's output."""
    lines: list[tuple[str, str]] = []
    if (expected := expected_of(task)) is not None:
        lines += [("expected", expected), ("given", "(no answer)" if answer is None else answer or "(empty)")]
    said = [line for line in verifier_output.splitlines() if line.strip()]
    return lines + [("verifier" if i == 0 else "", line) for i, line in enumerate(said[-VERDICT_LINES:])]


def _unquoted(literal: str) -> str:
    return " ".join(shlex.split(literal)) if literal[:1] in "'\"" else literal
