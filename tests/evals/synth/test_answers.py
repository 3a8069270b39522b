"""The verifiers of answers, tables and lines accept what a person would, and nothing else."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from agentkit_evals.synth.answers import json_is, names_are, number_is
from agentkit_evals.synth.operations.lists.sort_lines import same_lines
from agentkit_evals.synth.operations.tables.write_table import same_table


def accepts(check: dict[str, Any], answer: str, folder: Path) -> bool:
    script = next(name for name in check["verifier_files"] if name.endswith(".py"))
    for name, text in check["verifier_files"].items():
        (folder / name).write_text(text, encoding="utf-8")
    environment = {**os.environ, "AGENTKIT_ANSWER": answer, "AGENTKIT_VERIFIER_DIR": str(folder)}
    done = subprocess.run(
        [sys.executable, "-I", "-S", str(folder / script)],
        env=environment,
        cwd=folder,
        capture_output=True,
        text=True,
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


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ('{"sky": "grün", "ok": true, "n": [1, 2.5]}', True),
        ('{"n":[1.0,25e-1],"ok":true,"sky":"gr\\u00fcn"}\n', True),
        *(('{"sky": "grün", "ok": 1, "n": [1, 2.5]}', False), ('{"sky": "grün", "ok": true, "n": [2.5, 1]}', False)),
        *(('{"sky": "grün", "ok": true, "n": ["1", 2.5]}', False), ('{"sky": "grün", "ok": true}', False)),
        *(('{"sky": "grün", "ok": true, "n": [1, 2.5], "m": null}', False), ("", False), ("sky: grün", False)),
        ('```json\n{"sky": "grün", "ok": true, "n": [1, 2.5]}\n```', False),
    ],
)
def test_json_is_compared_by_value(answer: str, expected: bool, tmp_path: Path) -> None:
    assert accepts(json_is({"sky": "grün", "ok": True, "n": [1, 2.5]}), answer, tmp_path) == expected


ROWS = [{"name": "Anna", "price": "2.50"}, {"name": "Bob, Jr.", "price": "10"}]


@pytest.mark.parametrize(
    ("path", "text", "expected"),
    [
        ("a.csv", 'name,price\nAnna,2.5\n"Bob, Jr.",10\n', True),
        ("a.csv", 'price;name\r\n2.50;Anna\r\n10.0;"Bob, Jr."\r\n', True),
        ("a.tsv", "name\tprice\nAnna\t2.5\nBob, Jr.\t10\n", True),
        ("a.json", '[{"name": "Anna", "price": 2.5}, {"name": "Bob, Jr.", "price": "10"}]', True),
        ("a.jsonl", '{"name": "Anna", "price": 2.5}\n{"name": "Bob, Jr.", "price": 10}\n', True),
        ("a.md", "| name | price |\n|---|---:|\n|Anna|2.5|\n| Bob, Jr. | 10 |\n", True),
        ("a.csv", 'name,price\n"Bob, Jr.",10\nAnna,2.5\n', False),
        ("a.csv", "name,price\nAnna,2.5\n", False),
        ("a.csv", 'name,cost\nAnna,2.5\n"Bob, Jr.",10\n', False),
        ("a.json", '{"name": "Anna"}', False),
        ("a.json", "[1, 2]", False),
        ("b.csv", "", False),
    ],
)
def test_a_table_has_the_rows_in_any_layout(path: str, text: str, expected: bool, tmp_path: Path) -> None:
    (tmp_path / path).write_text(text, encoding="utf-8")
    assert accepts(same_table(path.replace("b.", "a."), ROWS), "", tmp_path) == expected


@pytest.mark.parametrize(
    ("order", "text", "expected"),
    [
        *(("", "pear\nApple\n", True), ("", "pear\n\nApple", True), ("", "pear\n", False)),
        *(("sorted", "Apple\npear\n", True), ("sorted", "pear\nApple\n", False)),
        *(("reverse", "pear\nApple\n", True), ("reverse", "Apple\npear\n", False)),
        ("", "pear\nApple\npear\n", False),
    ],
)
def test_a_file_has_the_lines_in_order(order: str, text: str, expected: bool, tmp_path: Path) -> None:
    (tmp_path / "fruit.txt").write_text(text, encoding="utf-8")
    assert accepts(same_lines("fruit.txt", ["Apple", "pear"], order), "", tmp_path) == expected


def test_a_missing_file_is_not_accepted(tmp_path: Path) -> None:
    assert not accepts(same_lines("fruit.txt", ["Apple"]), "done", tmp_path)
    assert not accepts(same_table("a.csv", ROWS), "done", tmp_path)
