"""The verifier of answers accepts what a person would, and nothing else."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from agentkit_evals.synth.worlds.answers import names_are, number_is


def accepts(check: dict[str, Any], answer: str, folder: Path) -> bool:
    for name, text in check["verifier_files"].items():
        (folder / name).write_text(text, encoding="utf-8")
    environment = {**os.environ, "AGENTKIT_ANSWER": answer, "AGENTKIT_VERIFIER_DIR": str(folder)}
    done = subprocess.run(
        [sys.executable, "-I", "-S", str(folder / "check_answer.py")], env=environment, capture_output=True, text=True
    )
    assert "Traceback" not in done.stderr, done.stderr
    return done.returncode == 0


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        *(("12", True), ("There are 12.", True), ("**12**", True), ("12.0", True), ("12 of them in app-7.log", True)),
        *(("", False), ("13", False), ("12 or 13", False), ("120", False), ("1.12", False), ("x12", False)),
    ],
)
def test_a_number_in_a_sentence_is_accepted(answer: str, expected: bool, tmp_path: Path) -> None:
    assert accepts(number_is(12, ignored=["app-7.log"]), answer, tmp_path) == expected


@pytest.mark.parametrize(
    ("answer", "expected"), [("1234.5", True), ("1,234.50", True), ("$1,234.50", False), ("It is 1234.5", False)]
)
def test_a_bare_number_has_nothing_around_it(answer: str, expected: bool, tmp_path: Path) -> None:
    assert accepts(number_is(1234.5, layout="bare", decimals=2), answer, tmp_path) == expected


def test_numbers_of_the_request_can_be_repeated(tmp_path: Path) -> None:
    check = number_is(3, ignored=["", "3", "50", "sales 2024.csv"])
    assert accepts(check, "3", tmp_path)
    assert accepts(check, "3 rows of sales 2024.csv are above 50", tmp_path)
    assert not accepts(check, "50", tmp_path)


def test_decimals_that_were_not_asked_for_can_be_rounded(tmp_path: Path) -> None:
    assert accepts(number_is(2 / 3, decimals=1), "0.7", tmp_path)
    assert accepts(number_is(2 / 3, decimals=1), "0.6667", tmp_path)
    assert not accepts(number_is(2 / 3, decimals=1), "0.8", tmp_path)
    assert not accepts(number_is(3, decimals=0), "3.4", tmp_path)


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        *(
            ("Anna and red wine", True),
            ("anna\nRed Wine", True),
            ("- Anna\n- Red wine", True),
            ("Red wine, Anna", True),
        ),
        *(("Anna", False), ("Anna, Red wine, Bob", False), ("Annabel, Red wine", False), ("Anna, wine", False)),
        ("Anna, Red wine" + " and so on" * 20, False),
    ],
)
def test_all_names_and_no_others_are_mentioned(answer: str, expected: bool, tmp_path: Path) -> None:
    check = names_are(["Anna", "Red wine"], others=["wine", "Bob", "Annabel"])
    assert accepts(check, answer, tmp_path) == expected


@pytest.mark.parametrize(
    ("layout", "answer", "expected"),
    [
        *(("lines", "Anna\nBob", True), ("lines", "Anna, Bob", False), ("commas", "Anna, Bob", True)),
        *(("commas", "Anna\nBob", False), ("bare", "Anna, Bob", True), ("bare", "They are Anna, Bob", False)),
        ("", "Bob, Anna", False),
    ],
)
def test_order_and_form_of_names(layout: Any, answer: str, expected: bool, tmp_path: Path) -> None:
    assert accepts(names_are(["Anna", "Bob"], ordered=True, layout=layout), answer, tmp_path) == expected
