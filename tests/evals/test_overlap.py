"""Verbatim overlap: planted copies are found, with their places, and compared with brute force."""

from __future__ import annotations

import json
import random
import string
import sys
from pathlib import Path

import pytest
import typer.testing
from hypothesis import given, settings
from hypothesis import strategies as st

from agentkit.cli import app
from agentkit.errors import MissingDependencyError
from agentkit_evals.errors import OverlapError
from agentkit_evals.overlap import Copy, Text, longest_copies, read_texts


def noise(seed: int, length: int) -> str:
    return "".join(random.Random(seed).choices(string.ascii_letters + " \n", k=length))


PLANTED = "The quick brown fox — «jumps» over the lazy dog, " * 3


def test_a_planted_copy_is_found_with_its_places(tmp_path: Path) -> None:
    rows = [
        {"messages": [{"role": "user", "content": noise(1, 900)}], "ids": [1, 2]},
        {
            "messages": [
                {"role": "user", "content": "x"},
                {"role": "tool", "content": noise(2, 70) + PLANTED + noise(3, 50)},
            ]
        },
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "a.txt").write_text(noise(4, 2000))
    (tmp_path / "corpus" / "b.md").write_text(noise(5, 33) + PLANTED + noise(6, 500))
    (tmp_path / "corpus" / "c.bin").write_bytes(b"\xff\xfe")  # no text
    arguments = ["overlap", str(tmp_path / "rows.jsonl"), str(tmp_path / "corpus"), "--json"]
    done = typer.testing.CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    (copy,) = json.loads(done.output)
    length = len(PLANTED.encode())
    assert length <= copy["length_bytes"] <= length + 4  # neighbours may agree by chance
    assert copy["export"] == f"{tmp_path}/rows.jsonl:2 messages.1.content" and copy["export_offset_bytes"] in (69, 70)
    assert copy["corpus"] == f"{tmp_path}/corpus/b.md" and copy["corpus_offset_bytes"] in (32, 33)
    assert PLANTED[1:60] in copy["text"]
    assert typer.testing.CliRunner().invoke(app, [*arguments, "--fail-above", "100"]).exit_code == 1
    assert typer.testing.CliRunner().invoke(app, [*arguments, "--fail-above", "500"]).exit_code == 0
    shown = typer.testing.CliRunner().invoke(app, arguments[:-1]).output
    assert "b.md +3" in shown and "1 copies of at least 50 bytes" in shown


def test_texts_that_are_not_there_are_an_error(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("")
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "c.bin").write_text("of another kind")
    (tmp_path / "text.txt").write_text("text")
    for names, missing in (
        (("rows.jsonl", "text.txt"), "rows.jsonl"),
        (("text.txt", "corpus"), "corpus"),
        (("text.txt", "text.txt", "corpus"), "corpus"),
    ):
        arguments = ["overlap", *(str(tmp_path / name) for name in names), "--fail-above", "9"]
        done = typer.testing.CliRunner().invoke(app, arguments)
        assert done.exit_code == 2 and f"{tmp_path / missing} has no text" in done.stderr and not done.stdout


def brute_force(export: list[str], corpora: list[str]) -> int:
    lengths = [
        len(ours[start:end].encode())
        for ours in export
        for start in range(len(ours))
        for end in range(start + 1, len(ours) + 1)
        if any(ours[start:end] in theirs for theirs in corpora)
    ]
    return max(lengths, default=0)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.text("abé", max_size=12), min_size=1, max_size=3),
    st.lists(st.text("abé", max_size=12), min_size=1, max_size=3),
)
def test_the_longest_copy_is_that_of_brute_force(export: list[str], corpora: list[str]) -> None:
    expected = brute_force(export, corpora)
    found = longest_copies([Text("e", each) for each in export], [Text("c", each) for each in corpora], min_bytes=1)
    # A copy of bytes can begin or end inside the two bytes of an é.
    assert expected <= max((copy.length_bytes for copy in found), default=0) <= expected + 2
    spans = sorted((copy.export, copy.export_offset_bytes) for copy in found if len(export) == 1)
    assert len(spans) == len(set(spans))


def test_no_copy_spans_two_texts() -> None:
    export = [Text("a", "x" * 20), Text("b", "y" * 20)]
    copies = longest_copies(export, [Text("c", "x" * 20 + "y" * 20)], min_bytes=10)
    assert sorted(copy.length_bytes for copy in copies) == [20, 20]
    assert {copy.export for copy in copies} == {"a", "b"}


def test_the_longest_come_first_and_short_ones_stay_out() -> None:
    export = [Text("e", "1" * 40 + "2" * 60 + "3" * 9)]
    corpora = [Text("c", "3" * 9), Text("d", "a" + "1" * 40 + "b" + "2" * 60)]
    copies = longest_copies(export, corpora, min_bytes=10)
    assert [
        (copy.length_bytes, copy.export_offset_bytes, copy.corpus, copy.corpus_offset_bytes) for copy in copies
    ] == [
        (60, 40, "d", 42),
        (40, 0, "d", 1),
    ]
    assert isinstance(copies[0], Copy) and longest_copies(export, corpora, min_bytes=10, most=1) == copies[:1]
    assert longest_copies(export, [], min_bytes=10) == [] == longest_copies([], corpora, min_bytes=10)
    with pytest.raises(ValueError, match="must be positive"):
        longest_copies(export, corpora, min_bytes=0)


def test_what_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(
        OverlapError, match="missing does not exist; expected a text file, JSON Lines, or a folder of them"
    ):
        read_texts(tmp_path / "missing")
    (tmp_path / "a.jsonl").write_text('{"a": 1}\n{"a": \n')
    with pytest.raises(OverlapError, match=r"a\.jsonl:2: not a JSON row"):
        read_texts(tmp_path / "a.jsonl")
    (tmp_path / "b.txt").write_bytes(b"\xff")
    with pytest.raises(OverlapError, match=r"b\.txt cannot be read as UTF-8 text"):
        read_texts(tmp_path / "b.txt")
    (tmp_path / "c.txt").write_text("A text.")
    done = typer.testing.CliRunner().invoke(app, ["overlap", str(tmp_path / "no"), str(tmp_path / "c.txt")])
    assert done.exit_code == 2 and "no does not exist; expected a text file" in " ".join(done.output.split())


def test_a_missing_package_and_too_much_text_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("agentkit_evals.overlap.MAX_BYTES", 9)
    with pytest.raises(OverlapError, match="12 bytes of text, expected at most 9; give less"):
        longest_copies([Text("e", "hello")], [Text("c", "hello")])
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "pydivsufsort", None)
    with pytest.raises(MissingDependencyError, match=r"pydivsufsort is missing; run: pip install '.*\[synth\]'"):
        longest_copies([Text("e", "hello")], [Text("c", "hello")])
