"""Reading a task's expected answer from the task."""

from __future__ import annotations

from typing import Any

import pytest

from agentkit.task import Task
from agentkit_evals.expected import expected_of, why_not
from agentkit_evals.synth.operations import OPERATIONS


def task(verifier: str, **more: Any) -> Task:
    return Task.model_validate({"id": "t", "instruction": "Do it.", "verifier": {"command": verifier}, **more})


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        ('test "$AGENTKIT_ANSWER" = 4', "4"),
        ('[ "$AGENTKIT_ANSWER" = "two words" ] && true', "two words"),
        ('test "$AGENTKIT_ANSWER" == \'a "b" c\'', 'a "b" c'),
        ('test "${AGENTKIT_ANSWER}" = x-1.5', "x-1.5"),
        ('test "$(printf %s "$AGENTKIT_ANSWER" | tr -d "\\n .")" = peach', "peach"),
        ("printf %s \"$AGENTKIT_ANSWER\" | grep -Fqw -- 'The owner is nuke.'", "… The owner is nuke. …"),
        ('test "$(cat out.txt)" = a-b', "out.txt: a-b"),
        ('test "$AGENTKIT_ANSWER" = "$(cat secret)"', None),
        ('test "$AGENTKIT_ANSWER" = $OTHER', None),
        ("python3 check.py", None),
        ('test "$AGENTKIT_ANSWER" != 4', None),
    ],
)
def test_the_expected_answer_is_read_from_the_verifier(command: str, expected: str | None) -> None:
    assert expected_of(task(command)) == expected


def test_metadata_takes_precedence_and_a_printing_solution_is_last() -> None:
    assert expected_of(task('test "$AGENTKIT_ANSWER" = 4', metadata={"expected": 5})) == "5"
    assert expected_of(task("sh check.sh", solution={"command": "printf '%s\\n' 'the end'"})) == "the end"
    assert expected_of(task("sh check.sh", solution={"command": "echo $(ls)"})) is None
    assert expected_of(Task(id="t", instruction="Do it.")) is None


def test_why_not_shows_expected_given_and_verifier_output() -> None:
    lines = why_not(task('test "$AGENTKIT_ANSWER" = 4'), "3", "\nfirst\n" + "more\n" * 9)
    assert lines[:2] == [("expected", "4"), ("given", "3")]
    assert len(lines) == 8 and lines[2] == ("verifier", "more")
    assert why_not(task("false"), None, "") == []
    assert why_not(task('test "$AGENTKIT_ANSWER" = 4'), None, "")[1] == ("given", "(no answer)")


@pytest.mark.parametrize("operation", ["read_setting", "ask_note", "look_up_row", "find_line"])
def test_the_expected_answer_of_a_generated_task_is_shown(operation: str) -> None:
    made = next(made for world in range(9) if (made := OPERATIONS[operation].sample(world, 0, "heldout")) is not None)
    assert expected_of(made.task) is not None
