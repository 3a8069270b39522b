"""Contamination: planted leaks of every kind are found, and single common words are none."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentkit.task import Task
from agentkit_evals.contamination import Overlap, TaskText, overlaps, phrasing, template, text_of

MakeTask = Callable[..., Task]


def text(instruction: str, name: str = "", **parts: Any) -> TaskText:
    return TaskText(instruction, **{key: frozenset(value) for key, value in parts.items()}, name=name)


TASK = text(
    "How many guests are listed in party/guests.txt? The limit is in config.yaml.",
    "party",
    paths=["party/guests.txt", "config.yaml"],
    keys=["max_guests", "port"],
    tools=["count_guests", "stock"],
)


def test_a_training_row_with_only_the_same_words_is_no_leak() -> None:
    row = text(
        "In which town do most guests of the party live? Count the towns in guests.txt.",
        paths=["guests.txt", "party/towns.txt", "config.yaml"],
        keys=["guests", "max_towns", "port"],
        tools=["count_towns", "stock"],
    )
    assert overlaps([TASK], [row]) == []


@pytest.mark.parametrize(
    ("row", "kind", "leak"),
    [
        (text("Go.", paths=["x.txt", "party/guests.txt"]), "path", "party/guests.txt"),
        (text("Go.", keys=["max_guests"]), "key", "max_guests"),
        (text("Go.", tools=["count_guests"]), "tool", "count_guests"),
        (text("How many guests have no seat?"), "template", "how many guests"),
    ],
)
def test_a_planted_leak_is_found(row: TaskText, kind: Any, leak: str) -> None:
    rows = [text("Sum up the hours."), row, text("Paint it.")]
    assert overlaps([text("Walk."), TASK], rows) == [Overlap("party", kind, leak)]


def test_a_phrasing_with_other_names_is_a_leak() -> None:
    row = text(
        "How many guests are listed in inbox/old mail.csv? The limit is in Setup.ini.", paths=["inbox/old mail.csv"]
    )
    found = overlaps([TASK], [row])
    assert [(each.kind, each.text) for each in found] == [
        ("phrasing", "how many guests are listed in _ the limit is in _"),
        ("template", "how many guests"),
    ]


def test_conventional_names_may_occur_unless_they_are_in_a_folder() -> None:
    task = text("Go.", "t", paths=["README.md", ".env", "app/.env"])
    row = text("Stop.", paths=["README.md", ".env", "app/.env"])
    assert overlaps([task], [row]) == [Overlap("t", "path", "app/.env")]
    assert len(overlaps([task], [row], conventional=())) == 3


def test_training_is_read_once() -> None:
    assert overlaps([TASK, TASK], iter([TASK])) == overlaps([TASK, TASK], [TASK]) != []


@pytest.mark.parametrize(
    ("instruction", "masked"),
    [
        ("Set `port` to 8443 in server.json.", "set _ to _ in _"),
        ('Replace the title with "Mushroom Diary", please', "replace the title with _ please"),
        ("What is the weather in Kuala Lumpur?", "what is the weather in _"),
        ("The test fails. Fix TAX_RATE and maxRetries!", "the test fails fix _ and _"),
        ("I'd like src/cart.py (the newest) at 11:30", "i'd like _ the newest at _"),
        ("Send mail to ines@shop.example", "send mail to _"),
        ("", ""),
    ],
)
def test_names_are_masked(instruction: str, masked: str) -> None:
    assert phrasing(instruction) == masked


NAMES = st.from_regex(r"[a-z]{1,8}[_/.-]?[a-z]{0,8}\.(txt|json|csv|py)", fullmatch=True)


@given(NAMES, NAMES, st.sampled_from(["Read {} now.", "What does {} say?", "Move {} to {}, please.", "`{}` is old."]))
def test_the_phrasing_does_not_depend_on_the_names(one: str, other: str, frame: str) -> None:
    assert phrasing(frame.format(one, other)) == phrasing(frame.format(other, one))


@pytest.mark.parametrize(
    ("instruction", "expected"),
    [
        ("How many guests are in guests.txt?", ("how many", "guests")),
        ("What is the weather in Paris?", ("what is", "weather")),
        ("Please set the timezone to UTC", ("set", "timezone")),
        ("Rename draft.md to final.md.", None),
        ("How many lines of app.log contain ERROR?", None),
        ("Count the lines.", None),
        ("Hello there", None),
        ("Sort", None),
    ],
)
def test_templates(instruction: str, expected: tuple[str, str] | None) -> None:
    assert template(instruction) == expected


def test_the_texts_of_a_task(number_task: MakeTask) -> None:
    tool = {"name": "get_time", "description": "d", "parameters": {"type": "object"}, "command": "date"}
    files = {"n.txt": "42\n", "a/b.json": '{"maxSize": 1, "depth": 2}\n', ".env": "export API_KEY=x\nMODE: y\n"}
    task = number_task(
        instruction="Write n.txt to out/result.csv, then stop.",
        tools=["bash", tool],
        environment={"files": files},
        output_schema={"type": "object", "properties": {"is_written": {"type": "boolean"}}},
    )
    assert text_of(task) == TaskText(
        "Write n.txt to out/result.csv, then stop.",
        frozenset({"n.txt", "a/b.json", ".env", "out/result.csv"}),
        frozenset({"maxSize", "depth", "API_KEY", "MODE", "is_written"}),
        frozenset({"get_time"}),
        "number",
    )
    (leak,) = overlaps([text_of(task)], [text("Go.", keys=["maxSize", "depth", "MODE"])])
    assert leak == Overlap("number", "key", "maxSize")
