"""The verifier of tables: lenient about wording, strict about other values, invented values and other files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from agentkit_evals.table_verifier import REFUSALS, accepts, names, problem, refuses


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("42", 42),
        ("The answer is 42.", 42),
        ("42.0", 42),
        ("1,574", 1574),
        ("-3", -3),
        ("It is 95.20 euros", 95.2),
        ("**Lima**", "Lima"),
        ("the capital is LIMA", "Lima"),
        ("It says: sunny,  21 degrees", "sunny, 21 degrees"),
        ("`redis://cache:6379`", "redis://cache:6379"),
        ("The meeting is at 11:30.", "11:30"),
        ("Übung", "übung"),
    ],
)
def test_answers_are_accepted_in_any_wording(answer: str, expected: Any) -> None:
    assert accepts(answer, expected)


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("", 42),
        ("420", 42),
        ("4.2", 42),
        ("-42", 42),
        ("42 or 43", 42),
        ("x42", 42),
        ("Limassol", "Lima"),
        ("12.3.1", "2.3.1"),
        (" ".join(["word"] * 30) + " Lima", "Lima"),
        ("", "Lima"),
    ],
)
def test_wrong_and_vague_answers_are_not(answer: str, expected: Any) -> None:
    assert not accepts(answer, expected)


def test_other_numbers_are_fine_if_the_request_has_them() -> None:
    assert accepts("386 times 274 is 105764", 105764, "What is 386 times 274?")
    assert not accepts("386 times 275 is 105764", 105764, "What is 386 times 274?")


def test_a_name_is_a_whole_word() -> None:
    assert names("see cat.png and dog.png", "cat.png")
    assert not names("see bobcat.png", "cat.png")


@pytest.mark.parametrize(
    "answer",
    [
        *(f"Sorry: {phrase} that" for phrase in REFUSALS),
        'There is no key "timeout" in client.json; it has `url` and retries 3.',
        "logins.log doesn’t exist",
    ],
)
def test_refusals(answer: str) -> None:
    assert refuses(answer, 'that\nclient.json\n{"url": 1, "timeout": 2, "retries": 3}\nlogins.log') is None


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ("", "does not say"),
        ("done", "does not say"),
        ("It is 30.", "does not say"),
        ("It is not found, so I take 30.", "invents 30"),
        ("There is no such key; I assume `fast`.", "invents 'fast'"),
        ('I cannot find it, but "Maria" wrote it', "invents 'maria'"),
        ("It cannot be done. " + "really " * 60, "more than 60 words"),
    ],
)
def test_inventions_and_evasions_are_not_refusals(answer: str, reason: str) -> None:
    assert reason in str(refuses(answer, "What is the timeout? a.txt port 80"))


def expected(**changes: Any) -> dict[str, Any]:
    return {"ask": "Do it.", "files": {"a.txt": "x\n", "b.json": '{"k": 1}\n'}, "impossible": False, **changes}


@pytest.fixture
def workdir(tmp_path: Path) -> Path:
    (tmp_path / "a.txt").write_text("x\n")
    (tmp_path / "b.json").write_text('{"k": 1}\n')
    return tmp_path


def test_files_that_the_task_does_not_name_must_stay_as_they_were(workdir: Path) -> None:
    assert problem(expected(answer=1), "1", workdir) is None
    (workdir / "b.json").write_text('{\n  "k":   1\n}')
    assert problem(expected(answer=1), "1", workdir) is None
    (workdir / "b.json").write_text('{"k": 2}')
    assert problem(expected(answer=1), "1", workdir) == "b.json has other contents"
    (workdir / "b.json").write_text("{")
    assert problem(expected(answer=1), "1", workdir) == "b.json has other contents"
    assert problem(expected(answer=1, edits=["b.json"]), "1", workdir) is None
    (workdir / "a.txt").unlink()
    assert problem(expected(answer=1, edits=["b.json"]), "1", workdir) == "a.txt is missing"


def test_files_afterwards(workdir: Path) -> None:
    after = {"a.txt": None, "c.txt": "one\ntwo\n"}
    assert problem(expected(after=after), "", workdir) == "a.txt still exists"
    (workdir / "a.txt").unlink()
    assert problem(expected(after=after), "", workdir) == "c.txt is missing"
    (workdir / "c.txt").write_text("one  \ntwo\n\n")
    assert problem(expected(after=after), "", workdir) is None
    (workdir / "c.txt").write_bytes(b"one\n\xff\n")
    assert problem(expected(after=after), "", workdir) == "c.txt has other contents"


def test_lists_must_be_complete_without_anything_else(workdir: Path) -> None:
    wanted = expected(lists=["a.txt", "b.json"], never=["c.md"])
    assert problem(wanted, "b.json\na.txt", workdir) is None
    assert problem(wanted, "a.txt", workdir) == "the answer does not name ['b.json']"
    assert problem(wanted, "a.txt b.json c.md", workdir) == "the answer names 'c.md'"
    assert problem(wanted, "a.txt b.json " + "x " * 40, workdir) == "the answer has many other words"


def test_one_of_several_answers_is_enough(workdir: Path) -> None:
    assert problem(expected(answer=["14 June", "June 14"]), "June 14", workdir) is None
    assert "expected ['14 June', 'June 14']" in str(problem(expected(answer=["14 June", "June 14"]), "May 14", workdir))


def test_printed_output(workdir: Path) -> None:
    assert problem(expected(prints={"cat a.txt": "x\n"}), "", workdir) is None
    assert "prints 'x\\n', expected 'y\\n'" in str(problem(expected(prints={"cat a.txt": "y\n"}), "", workdir))
    assert "exits with 1" in str(problem(expected(prints={"cat a.txt; exit 1": "x\n"}), "", workdir))


def test_commands_do_not_see_the_verifier(workdir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AGENTKIT_REWARD_DIR", str(workdir))
    assert problem(expected(prints={'echo "[$AGENTKIT_REWARD_DIR]"': "[]\n"}), "", workdir) is None


def test_an_impossible_request_leaves_the_workdir_alone(workdir: Path) -> None:
    wanted = expected(impossible=True, never=["x"])
    assert problem(wanted, "not found", workdir) is None
    assert problem(wanted, "not found, but x", workdir) == "the answer names 'x'"
    (workdir / "__pycache__").mkdir()
    (workdir / "__pycache__" / "a.pyc").write_text("")
    assert problem(wanted, "not found", workdir) is None
    (workdir / "c.txt").write_text("made up")
    assert problem(wanted, "not found", workdir) == "new file c.txt"
    (workdir / "c.txt").unlink()
    (workdir / "a.txt").write_text("y")
    assert problem(wanted, "not found", workdir) == "a.txt has other contents"


def test_a_refusal_may_count_and_name_what_is_known(workdir: Path) -> None:
    wanted = expected(impossible=True, known=["weather", 28])
    assert problem(wanted, "There is no third file, only 2 files with 1 line each", workdir) is None
    assert problem(wanted, "There is no third file, only 4 lines", workdir) == "the answer invents 4"
    assert problem(wanted, "The tool `weather` cannot do it, February has 28 days", workdir) is None
    assert problem(wanted, "The tool `mail` cannot do it", workdir) == "the answer invents 'mail'"
